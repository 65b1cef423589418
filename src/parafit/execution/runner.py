"""A model's state on its way through compiled programs: how fast, at what price, and in whose hands."""

import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from parafit.adapters.step import Adapter, State, Step, same_state
from parafit.data.feed import Block
from parafit.execution.compiled import CompiledSteps, Tally, compiled_steps
from parafit.execution.contract import Report, check, compare_memory, expect
from parafit.execution.events import Compiled, Compiling, emit
from parafit.execution.hlo import read
from parafit.execution.snapshot import Snapshot, is_finite
from parafit.placement import Placement
from parafit.planner.program import Program


class Runner:
    """A step's state on its way through programs, which are compiled side by side while the caller goes on.

    Args:
        adapter: the model.
        step: what to run.
        placement: where.
        blocks: of every shape that is foreseen; other shapes are compiled when they come.

    Attributes:
        seconds_compiling: time spent so far on tracing and waiting for the compiler.
    """

    def __init__(self, adapter: Adapter, step: Step, placement: Placement, blocks: Sequence[Block] = ()):
        self.adapter, self.step, self.placement = adapter, step, placement
        self.seconds_compiling = 0.0
        self._state: Any = None
        self._written: Any = None
        self._tally: Any = None
        self._fixed: list[jax.Array] = []
        self._found: dict[int, tuple[Any, Any]] = {}
        self._snapshot: Any = Snapshot() if step.stops_on_bad_loss else None
        for block in blocks:
            self.make(block.arrays, seldom=block.seldom)

    def make(self, arrays: Any, *, seldom: bool = False) -> Any:
        """The program for blocks of these arrays, which may still be compiling.

        Args:
            arrays, seldom: as in `find`.
        """
        return compiled_steps(self.adapter.keeper, self.step, arrays, self.placement, seldom=seldom)

    def find(self, arrays: Any, *, seldom: bool = False) -> CompiledSteps:
        """The compiled program for a block of these arrays.

        Args:
            arrays: of a block, each of shape (capacity, batch, ...), or a `Lookup`.
            seldom: as in `Block`.
        """
        known, compiled = self._found.get(id(arrays), (None, None))
        if known is arrays:  # buffers filled again
            return compiled
        started = time.perf_counter()
        compiled = self.make(arrays, seldom=seldom)
        emit(Compiling(steps=compiled.capacity))
        compiled.wait()  # so that compiling is not taken for running
        seconds = time.perf_counter() - started
        emit(Compiled(steps=compiled.capacity, seconds=seconds))
        self.seconds_compiling += seconds
        self._found[id(arrays)] = arrays, compiled
        return compiled

    def check(self, arrays: Any, program: Program) -> Report:
        """What the compiled program for this block communicates, against what its plan says of the traced one.

        Args:
            arrays: of a block, each of shape (capacity, batch, ...), or a `Lookup`.
            program: the step as it was traced.
        """
        placement = self.placement
        if placement.mesh is None:
            return Report(rows=())
        compiled = self.find(arrays)
        report = check(read(compiled.text, dict(placement.mesh.shape)), expect(program, placement.plan))
        held = self.step.read_fixed(), self.step.read()
        state_bytes = _local_bytes(held, jax.tree.map(placement.stored, self.step.leaves, held))
        memory = compare_memory(planned_bytes=state_bytes + self.block_bytes(arrays), found_bytes=compiled.argument_bytes)
        return Report(rows=(*report.rows, memory))

    def block_bytes(self, arrays: Any) -> int:
        """Bytes of a block on one device."""
        placement = self.placement
        return _local_bytes(arrays, placement.blocks(arrays)) if placement.mesh else sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))

    def enter(self) -> None:
        """Take the state from the model, which a callback may have changed, to the devices."""
        held = self.step.read()
        if self._snapshot:
            self._snapshot.update(held)
        if self._written is None or not same_state(held, self._written):
            self._fixed, self._state = jax.tree.map(self.placement.put_state, self.step.leaves, (self.step.read_fixed(), unshared(held)))
        self._tally = None

    def run(self, block: Block) -> Any:
        """Dispatch the steps of a block; gives the predictions, if the step makes any."""
        compiled = self.find(block.arrays, seldom=block.seldom)
        tally = self._tally or compiled.fresh_tally
        # One batch goes in as it is: a copy costs less than a call that avoids it.
        arrays = block.arrays if compiled.capacity == 1 else self.placement.put_block(block.arrays)
        self._state, self._tally, outputs = compiled(self._fixed, self._state, tally, block.steps, arrays)
        block.release(self._tally.done if outputs is None else jax.tree.leaves(outputs)[0])
        return outputs

    def rest(self) -> Tally:
        """Wait for what was dispatched and let the model hold the state."""
        logs = self._tally.logs
        guards = self.step.may_end_training(logs)
        # One array stands for all that the program gives; callbacks that read the loss find it on the host already.
        value = np.asarray(logs["loss"] if guards else self._tally.done)
        self.step.write(self._state)
        self._written = self._state
        return Tally(self._tally.done, not guards or bool(np.isfinite(value)), logs)

    def recover(self) -> float:
        """Bring the last good state back; gives how many seconds old it is."""
        self._written, seconds = self._snapshot.mend(self._state)
        self._state = self._written
        self.step.write(self._state)
        return seconds

    def find_non_finite(self) -> str:
        """In words, which of the model's weights are NaN or infinite; empty where none is."""
        weights = zip(self.step.leaves[1].weights, self._state.weights)
        bad = [leaf.name for leaf, array in weights if not is_finite(array)]
        return f"Before training, these weights already were NaN or infinite: {', '.join(bad)}." if bad else ""

    def leave(self) -> None:
        """Let the model hold the state on its first device, as it was before the run."""
        if self._state is not self._written:  # cut off within a group
            if self._snapshot and any(array.is_deleted() for array in jax.tree.leaves(self._state)):
                self.recover()
            else:
                self.step.write(self._state)
        self.step.write(jax.tree.map(self.placement.bring_home, self.step.read()))


def _local_bytes(arrays: Any, shardings: Any) -> int:
    """Bytes of arrays on one device."""
    shares = jax.tree.map(lambda leaf, at: math.prod(at.shard_shape(leaf.shape)) * leaf.dtype.itemsize, arrays, shardings)
    return sum(jax.tree.leaves(shares))


def unshared(state: State) -> State:
    """The state with arrays that several variables hold copied, so that each can be donated (averaged weights share)."""
    seen: set[int] = set()

    def own(array):
        shared = id(array) in seen
        seen.add(id(array))
        return array.copy() if shared else array

    return jax.tree.map(own, state)
