"""Steps of all members of a stack at once, over batches that are each member's own."""

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import numpy as np

from parafit.adapters.step import Step
from parafit.data.feed import MOST_STEPS
from parafit.execution.compiled import CompiledSteps, Tally
from parafit.execution.events import Compiled, Compiling, emit
from parafit.execution.pace import Pace
from parafit.populations.programs import Turns, stacked_steps
from parafit.populations.rows import Batches, Table, in_blocks, in_runs
from parafit.populations.tracing import TracedStep

_MANY_STEPS = 20
"""As in `feed`: with as many in an epoch, a short last batch may take longer."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Batches of one size, some of every lane, and the program for them."""

    size: int
    parts: list[Batches]
    capacity: int
    masked: bool
    compiled: CompiledSteps


class Lockstep:
    """A step that all lanes take at once.

    Args:
        step: of any member.
        traced: the same, traced.
        table: the rows.
        longest: the most batches that a member takes in an epoch.
        shared: whether all lanes take the same batches.

    Attributes:
        seconds_compiling: time spent so far on tracing and waiting for the compiler.
    """

    _seconds: ClassVar[dict[str, float]] = {}
    _made: ClassVar[set[tuple[str, int]]] = set()

    def __init__(self, step: Step, traced: TracedStep, table: Table, *, longest: int, shared: bool = False):
        self._step, self._traced, self._table = step, traced, table
        self._longest, self._shared = longest, shared
        self._pace = Pace()
        self._known: set[int] = set()
        self.seconds_compiling = 0.0

    def seconds_to_make(self, lanes: int) -> float:
        """What programs for another number of lanes will take to compile, by what those before took; 0 where they were made before."""
        digest = self._traced.digest
        return 0.0 if (digest, lanes) in self._made else self._seconds.get(digest, 0.0)

    def prepare(self, batches: Sequence[Batches | None]) -> list[Part]:
        """Batches in runs of one size; the programs for them are compiled side by side.

        Args:
            batches: of each lane; None for one that is empty, whose state counts for nothing.
        """
        started = time.perf_counter()
        prepared = [self._part(size, parts, batches) for size, parts in in_runs([each or [] for each in batches])]
        self._spend(time.perf_counter() - started)
        self._made.add((self._traced.digest, len(batches)))
        return prepared

    def _spend(self, seconds: float) -> None:
        self.seconds_compiling += seconds
        digest = self._traced.digest
        self._seconds[digest] = max(self._seconds.get(digest, 0.0), self.seconds_compiling)

    def _part(self, size: int, parts: list[Batches], batches: Sequence[Batches | None]) -> Part:
        counts = {len(part) for part, given in zip(parts, batches) if given is not None}
        lanes = len(parts)
        most = self._table.capacity(size * (1 if self._shared else lanes))
        capacity = 1 if max(counts) == 1 else min(MOST_STEPS, self._longest, most)
        masked = len(counts) > 1
        seldom = capacity == 1 and self._longest >= _MANY_STEPS
        turns = self._turns(np.zeros((capacity, lanes, size), np.int32), np.zeros(lanes, np.int32), masked=masked)
        compiled = stacked_steps(self._step, self._traced, turns, lanes, seldom=seldom)
        return Part(size=size, parts=parts, capacity=capacity, masked=masked, compiled=compiled)

    def _turns(self, rows: np.ndarray, counts: np.ndarray, *, masked: bool) -> Turns:
        rows = rows[:, counts.argmax()] if self._shared else rows  # an empty lane has none
        return self._table.turns(rows, counts if masked else None, shared=self._shared)

    def run(
        self, prepared: Sequence[Part], fixed: Any, state: Any, take: Callable[[Any], None]
    ) -> Generator[None, None, tuple[np.ndarray, np.ndarray, list]]:
        """Run all steps; gives how many of each lane went well, whether all did, and the last logs. Waits after each dispatch.

        Args:
            prepared: as `prepare` gave them.
            fixed, state: arrays of shape (lanes, ...).
            take: is handed the new state after every block.
        """
        lanes = len(prepared[0].parts)
        logs = [np.zeros((lanes, *leaf.shape), leaf.dtype) for leaf in self._traced.outputs]
        tally = Tally(np.zeros(lanes, np.int32), np.ones(lanes, np.bool_), logs)
        for part in prepared:
            self._wait(part.compiled)
            for steps, rows, counts in in_blocks(part.parts, part.size, part.capacity, self._pace.next_steps):
                started = time.perf_counter()
                turns = self._turns(rows, counts, masked=part.masked)
                state, tally, _ = part.compiled(fixed, state, tally, steps, turns)
                take(state)
                yield
                jax.block_until_ready(tally.done)
                self._pace.count(steps)
                self._pace.record(steps, time.perf_counter() - started)
        return np.asarray(tally.done), np.asarray(tally.healthy), [np.asarray(log) for log in tally.logs]

    def evaluate(self, prepared: Sequence[Part], fixed: Any, state: Any, take: Callable[[Any], None]) -> list[np.ndarray]:
        """`run` at one go; gives the last logs.

        Args:
            prepared, fixed, state, take: as in `run`.
        """
        running = self.run(prepared, fixed, state, take)
        while True:
            try:
                next(running)
            except StopIteration as end:
                return end.value[2]

    def predict(self, prepared: Sequence[Part], fixed: Any, state: Any, take: Callable[[Any], None]) -> Any:
        """The outputs of all lanes, which take the same batches: host arrays of shape (lanes, rows, ...).

        Args:
            prepared, fixed, state, take: as in `run`.
        """
        found = []
        for part in prepared:
            self._wait(part.compiled)
            lanes = len(part.parts)
            tally = Tally(np.zeros(lanes, np.int32), np.ones(lanes, np.bool_), None)
            for steps, rows, counts in in_blocks(part.parts, part.size, part.capacity, lambda: MOST_STEPS):
                state, tally, outputs = part.compiled(fixed, state, tally, steps, self._turns(rows, counts, masked=False))
                take(state)
                found.append(jax.tree.map(lambda array, steps=steps: _by_lane(np.asarray(array)[:steps]), outputs))
        return jax.tree.map(lambda *arrays: np.concatenate(arrays, axis=1), *found)

    def _wait(self, compiled: CompiledSteps) -> None:
        if id(compiled) not in self._known:
            started = time.perf_counter()
            emit(Compiling(steps=compiled.capacity))
            compiled.wait()
            seconds = time.perf_counter() - started
            emit(Compiled(steps=compiled.capacity, seconds=seconds))
            self._spend(seconds)
            self._known.add(id(compiled))


def _by_lane(array: np.ndarray) -> np.ndarray:
    """From (steps, lanes, batch, ...) to (lanes, rows, ...)."""
    return np.moveaxis(array, 0, 1).reshape((array.shape[1], -1, *array.shape[3:]))
