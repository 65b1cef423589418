"""A model's state on its way through compiled programs: how fast, at what price, and in whose hands."""

import time
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from parafit.adapt import KerasModel, State, Step
from parafit.chunk import Chunk, Tally, find_chunk
from parafit.data import Block
from parafit.mesh import Placement
from parafit.price import Price
from parafit.safeguard import Safeguard

CONTROL_SECONDS = 0.2
_TRIALS = 4
_TRIAL_SECONDS = 0.05
_LONG_SECONDS = 0.5


@dataclass
class Pace:
    """How many steps to run before the host takes control again: about `CONTROL_SECONDS` of them, measured as they run.

    Attributes:
        strides: every how many steps some callback must have control.
        steps: steps run so far.
        seconds: what they took.
    """

    strides: list[int] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    _last_steps: int = 0
    _last_seconds_per_step: float = CONTROL_SECONDS

    def next_steps(self) -> int:
        """How many steps to run next: one at first, then at most eight times what was run before."""
        wanted = min(int(CONTROL_SECONDS / self._last_seconds_per_step), 8 * self._last_steps)
        return max(1, min([wanted, *(stride - self.steps % stride for stride in self.strides)]))

    def record(self, steps: int, seconds: float) -> None:
        """Tell what the last group took."""
        self.steps += steps
        self.seconds += seconds
        self._last_steps, self._last_seconds_per_step = steps, max(seconds / steps, 1e-9)


class Progress:
    """A step's state on its way through programs.

    Args:
        adapter: the model.
        step: what to run.
        placement: where.

    Attributes:
        seconds_compiling: time spent so far on tracing and waiting for the compiler.
    """

    def __init__(self, adapter: KerasModel, step: Step, placement: Placement):
        self.adapter = adapter
        self.seconds_compiling = 0.0
        self._step, self._placement = step, placement
        self._state: Any = None
        self._written: Any = None
        self._tally: Any = None
        self._fixed: list[jax.Array] = []
        self._found: dict[int, tuple[Any, Any]] = {}
        self._safeguard: Any = Safeguard() if step.stops_on_bad_loss else None

    def compile(self, shapes: list[Any]) -> None:
        """Start compiling the programs for blocks of these shapes, all at once."""
        for arrays in shapes:
            find_chunk(self.adapter.model, self._step, arrays, self._placement)

    def price(self, arrays: Any) -> Price:
        """Time a few steps on a copy of the state; the model's own state stays as it is."""
        state = jax.tree.map(lambda array: self._placement.put_state(array.copy()), self._step.read())
        chunk = self._find(arrays)
        block = self._placement.put_block(arrays)
        steps, seconds = 1, 0.0
        for _ in range(_TRIALS):  # the first also brings memory in; later ones run more steps at once
            started = time.perf_counter()
            state, tally, _ = chunk([], state, chunk.fresh_tally(), steps, block)
            jax.block_until_ready((state, tally))
            seconds = (time.perf_counter() - started) / max(1, int(tally.done))
            if seconds > _LONG_SECONDS:
                break
            steps = max(1, min(chunk.capacity, int(_TRIAL_SECONDS / seconds)))
        return Price(seconds_per_step=seconds, peak_bytes=chunk.peak_bytes)

    def enter(self) -> None:
        """Take the state from the model, which a callback may have changed, to the devices."""
        held = self._step.read()
        if self._safeguard:
            self._safeguard.update(held)
        if self._written is None or not _same(held, self._written):
            self._state = jax.tree.map(self._placement.put_state, _unshared(held))
            self._fixed = [self._placement.put_state(array) for array in self._step.read_fixed()]
        self._tally = None

    def run(self, block: Block) -> Any:
        """Dispatch the steps of a block; gives the predictions, if the step makes any."""
        chunk = self._find(block.arrays)
        tally = self._tally or chunk.fresh_tally()
        # One batch goes in as it is: a copy costs less than a call that avoids it.
        arrays = block.arrays if chunk.capacity == 1 else self._placement.put_block(block.arrays)
        self._state, self._tally, outputs = chunk(self._fixed, self._state, tally, block.steps, arrays)
        block.release(self._tally.done if outputs is None else jax.tree.leaves(outputs)[0])
        return outputs

    def rest(self) -> Tally:
        """Wait for what was dispatched and let the model hold the state."""
        logs = self._tally.logs
        guards = self._step.stops_on_bad_loss and "loss" in logs
        # One array stands for all that the program gives; callbacks that read the loss find it on the host already.
        value = np.asarray(logs["loss"] if guards else self._tally.done)
        self._step.write(self._state)
        self._written = self._state
        return Tally(self._tally.done, not guards or bool(np.isfinite(value)), logs)

    def recover(self) -> float:
        """Bring the last good state back; gives how many seconds old it is."""
        self._written, seconds = self._safeguard.mend(self._state)
        self._state = self._written
        self._step.write(self._state)
        return seconds

    def leave(self) -> None:
        """Let the model hold the state on its first device, as it was before the run."""
        if self._state is not self._written:  # cut off within a group
            if self._safeguard and any(array.is_deleted() for array in jax.tree.leaves(self._state)):
                self.recover()
            else:
                self._step.write(self._state)
        self._step.write(jax.tree.map(self._placement.bring_home, self._step.read()))

    def _find(self, arrays) -> Chunk:
        known, chunk = self._found.get(id(arrays), (None, None))
        if known is arrays:  # buffers filled again
            return chunk
        started = time.perf_counter()
        chunk = find_chunk(self.adapter.model, self._step, arrays, self._placement)
        chunk.wait()  # so that compiling is not taken for running
        self.seconds_compiling += time.perf_counter() - started
        self._found[id(arrays)] = arrays, chunk
        return chunk


def _same(state: State, other: State) -> bool:
    return all(ours is theirs for group, others in zip(state, other) for ours, theirs in zip(group, others))


def _unshared(state: State) -> State:
    """The state with arrays that several variables hold copied, so that each can be donated (averaged weights share)."""
    seen: set[int] = set()

    def own(array):
        shared = id(array) in seen
        seen.add(id(array))
        return array.copy() if shared else array

    return jax.tree.map(own, state)
