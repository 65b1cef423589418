"""A model's state on its way through compiled programs: how fast, at what price, and in whose hands."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from parafit.adapters.step import Adapter, State, Step
from parafit.data.feed import Block
from parafit.errors import PlanError
from parafit.execution.compiled import CompiledSteps, Tally, compiled_steps
from parafit.execution.contract import Report, check, compare_memory, expect
from parafit.execution.hlo import read
from parafit.execution.snapshot import Snapshot, is_finite
from parafit.placement import Placement
from parafit.planner.layout import lay_out, resolve, split_by_dims
from parafit.planner.plan import AXES, Plan
from parafit.planner.program import Program, Tensor

CONTROL_SECONDS = 0.2
_TRIALS = 4
_TRIAL_SECONDS = 0.05
_LONG_SECONDS = 0.5


def settle(placement: Placement, step: Step, program: Callable[[], Program]) -> Placement:
    """The placement with the plan's layout worked out for this model.

    Args:
        placement: a plan on devices.
        step: the model's step.
        program: gives the step's program; called where the plan needs the model's dims.

    Raises:
        PlanError: the plan does not fit the model.
    """
    plan = placement.plan
    if placement.mesh is None:
        return placement
    if set(plan.compute) <= {AXES["data"]}:
        return Placement(plan, lay_out(_shaped(step), plan))
    traced = program()
    plan = resolve(traced, plan)
    _check_split(traced, plan)
    return Placement(plan, lay_out(traced.tensors.values(), plan))


def _check_split(program: Program, plan: Plan) -> None:
    parameters = program.of_role("parameter")
    for dim, axis in plan.compute.items():
        if dim != AXES["data"] and not any(axis in split_by_dims(tensor, plan) for tensor in parameters if dim in tensor.dims):
            raise PlanError(
                f"the plan maps {dim!r} to {axis!r}, which splits no parameter of {program.name!r}: this version runs splits of the batch "
                "and of dims of parameters, and only prices others."
            )


def _shaped(step: Step) -> list[Tensor]:
    """The arrays of a step's state, of whose dims nothing needs to be known."""
    owners, arrays = jax.tree.leaves(step.owners), jax.tree.leaves((step.read_fixed(), step.read()))
    return [Tensor(name=owner.path, shape=array.shape, dims=("",) * array.ndim, role=owner.role) for owner, array in zip(owners, arrays)]


@dataclass
class Pace:
    """How many steps to run before the host takes control again: about `CONTROL_SECONDS` of them, measured as they run.

    Attributes:
        strides: every how many steps some callback must have control.
        steps_per_execution: what the model was compiled with; where it is among the strides, callbacks have control after exactly so
            many steps, counted in each epoch.
        steps: steps run so far.
        seconds: what they took.
    """

    strides: list[int] = field(default_factory=list)
    steps_per_execution: int = 1
    steps: int = 0
    seconds: float = 0.0
    _last_steps: int = 0
    _last_seconds_per_step: float = CONTROL_SECONDS

    @property
    def execution(self) -> int:
        """Steps in what callbacks are told to be one execution; their numbers are those of its first and last step."""
        return self.steps_per_execution if self.steps_per_execution in self.strides else 1

    def next_steps(self) -> int:
        """How many steps to run next: an execution, or one at first, then at most eight times what was run before."""
        if self.execution > 1:
            return self.execution
        wanted = min(int(CONTROL_SECONDS / self._last_seconds_per_step), 8 * self._last_steps)
        return max(1, min([wanted, *(stride - self.steps % stride for stride in self.strides)]))

    def count(self, steps: int) -> None:
        """Tell that the next group, of so many steps, is on its way."""
        self.steps += steps

    def record(self, steps: int, seconds: float) -> None:
        """Tell what the last group took."""
        self.seconds += seconds
        self._last_steps, self._last_seconds_per_step = steps, max(seconds / steps, 1e-9)


class Runner:
    """A step's state on its way through programs.

    Args:
        adapter: the model.
        step: what to run.
        placement: where.

    Attributes:
        seconds_compiling: time spent so far on tracing and waiting for the compiler.
    """

    def __init__(self, adapter: Adapter, step: Step, placement: Placement):
        self.adapter = adapter
        self.seconds_compiling = 0.0
        self._step, self._placement = step, placement
        self._state: Any = None
        self._written: Any = None
        self._tally: Any = None
        self._fixed: list[jax.Array] = []
        self._found: dict[int, tuple[Any, Any]] = {}
        self._snapshot: Any = Snapshot() if step.stops_on_bad_loss else None

    def compile(self, blocks: list[Block]) -> None:
        """Start compiling the programs for blocks like these, all at once."""
        for block in blocks:
            compiled_steps(self.adapter.keeper, self._step, block.arrays, self._placement, seldom=block.seldom)

    def find(self, arrays: Any, *, seldom: bool = False) -> CompiledSteps:
        """The compiled program for a block of these arrays."""
        known, compiled = self._found.get(id(arrays), (None, None))
        if known is arrays:  # buffers filled again
            return compiled
        started = time.perf_counter()
        compiled = compiled_steps(self.adapter.keeper, self._step, arrays, self._placement, seldom=seldom)
        compiled.wait()  # so that compiling is not taken for running
        self.seconds_compiling += time.perf_counter() - started
        self._found[id(arrays)] = arrays, compiled
        return compiled

    def time(self, arrays: Any) -> float:
        """Seconds of a step, by a few steps on a copy of the state; the model's own state stays as it is."""
        fixed, state = jax.tree.map(
            lambda owner, array: self._placement.put_state(owner, array.copy()),
            self._step.owners,
            (self._step.read_fixed(), self._step.read()),
        )
        compiled = self.find(arrays)
        block = self._placement.put_block(arrays)
        steps, seconds = 1, 0.0
        for _ in range(_TRIALS):  # the first also brings memory in; later ones run more steps at once
            started = time.perf_counter()
            state, tally, _ = compiled(fixed, state, compiled.fresh_tally, steps, block)
            jax.block_until_ready((state, tally))
            seconds = (time.perf_counter() - started) / max(1, int(tally.done))
            if seconds > _LONG_SECONDS:
                break
            steps = max(1, min(compiled.capacity, int(_TRIAL_SECONDS / seconds)))
        return seconds

    def check(self, arrays: Any, program: Program) -> Report:
        """What the compiled program for this block communicates, against what its plan says of the traced one."""
        placement = self._placement
        if placement.mesh is None:
            return Report(rows=())
        compiled = self.find(arrays)
        report = check(read(compiled.text, dict(placement.mesh.shape)), expect(program, placement.plan))
        held = self._step.read_fixed(), self._step.read()
        state_bytes = _local_bytes(held, jax.tree.map(placement.stored, self._step.owners, held))
        memory = compare_memory(planned_bytes=state_bytes + self.block_bytes(arrays), found_bytes=compiled.argument_bytes)
        return Report(rows=(*report.rows, memory))

    def block_bytes(self, arrays: Any) -> int:
        """Bytes of a block on one device."""
        placement = self._placement
        return _local_bytes(arrays, placement.blocks(arrays)) if placement.mesh else sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))

    def enter(self) -> None:
        """Take the state from the model, which a callback may have changed, to the devices."""
        held = self._step.read()
        if self._snapshot:
            self._snapshot.update(held)
        if self._written is None or not _same(held, self._written):
            self._fixed, self._state = jax.tree.map(
                self._placement.put_state, self._step.owners, (self._step.read_fixed(), _unshared(held))
            )
        self._tally = None

    def run(self, block: Block) -> Any:
        """Dispatch the steps of a block; gives the predictions, if the step makes any."""
        compiled = self.find(block.arrays, seldom=block.seldom)
        tally = self._tally or compiled.fresh_tally
        # One batch goes in as it is: a copy costs less than a call that avoids it.
        arrays = block.arrays if compiled.capacity == 1 else self._placement.put_block(block.arrays)
        self._state, self._tally, outputs = compiled(self._fixed, self._state, tally, block.steps, arrays)
        block.release(self._tally.done if outputs is None else jax.tree.leaves(outputs)[0])
        return outputs

    def rest(self) -> Tally:
        """Wait for what was dispatched and let the model hold the state."""
        logs = self._tally.logs
        guards = self._step.may_end_training(logs)
        # One array stands for all that the program gives; callbacks that read the loss find it on the host already.
        value = np.asarray(logs["loss"] if guards else self._tally.done)
        self._step.write(self._state)
        self._written = self._state
        return Tally(self._tally.done, not guards or bool(np.isfinite(value)), logs)

    def recover(self) -> float:
        """Bring the last good state back; gives how many seconds old it is."""
        self._written, seconds = self._snapshot.mend(self._state)
        self._state = self._written
        self._step.write(self._state)
        return seconds

    def find_non_finite(self) -> str:
        """In words, which of the model's weights are NaN or infinite; empty where none is."""
        weights = zip(self._step.owners[1][0], self._state[0])
        bad = [owner.path for owner, array in weights if not is_finite(array)]
        return f"Before training, these weights already were NaN or infinite: {', '.join(bad)}." if bad else ""

    def leave(self) -> None:
        """Let the model hold the state on its first device, as it was before the run."""
        if self._state is not self._written:  # cut off within a group
            if self._snapshot and any(array.is_deleted() for array in jax.tree.leaves(self._state)):
                self.recover()
            else:
                self._step.write(self._state)
        self._step.write(jax.tree.map(self._placement.bring_home, self._step.read()))


def _local_bytes(arrays: Any, shardings: Any) -> int:
    """Bytes of arrays on one device."""
    shares = jax.tree.map(lambda leaf, at: math.prod(at.shard_shape(leaf.shape)) * leaf.dtype.itemsize, arrays, shardings)
    return sum(jax.tree.leaves(shares))


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
