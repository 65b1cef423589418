"""A step's state on its way through the stages of a pipeline: a runner like that of other plans."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from parafit import backends
from parafit.adapters.step import Adapter, Step, remembered
from parafit.data.feed import Block
from parafit.execution.compiled import Tally
from parafit.execution.line import Line
from parafit.execution.pipeline_steps import PipelineSteps, PipelineUpdate
from parafit.execution.runner import Runner, unshared
from parafit.placement import Placement


def runner_for(adapter: Adapter, step: Step, placement: Placement, blocks: Sequence[Block] = ()) -> Runner:
    """What runs a step on the devices of a plan.

    Args:
        adapter, step, placement, blocks: as of `Runner`.

    Raises:
        PlanError: the plan has a pipeline that the step cannot be cut for.
    """
    return (PipelineRunner if placement.pipeline else Runner)(adapter, step, placement, blocks)


class PipelineRunner(Runner):
    """A `Runner` on the stages of a pipeline. Between groups the model holds arrays that lie on their stages' devices."""

    def __init__(self, adapter: Adapter, step: Step, placement: Placement, blocks: Sequence[Block] = ()):
        super().__init__(adapter, step, placement)
        self.line = Line(step, placement)
        self._logs: list[Any] = []
        self._torn = self._ahead = False
        for block in blocks:
            self.make(block.arrays)

    def make(self, arrays: Any, *, seldom: bool = False) -> PipelineSteps:
        """The programs for blocks of these arrays, made once for as long as the model stays as it is."""
        leaves, structure = jax.tree.flatten(arrays)
        plan, name = self.placement.plan, backends.current().name
        owners = remembered(self.adapter.keeper, self.step, ("owners", name, plan), list)
        key = ("stages", name, plan, structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        steps = remembered(self.adapter.keeper, self.step, key, lambda: PipelineSteps(self.step, self.placement, arrays, owners))
        if self.step.name == "train":
            devices = [owner % len(self.placement.pipeline) for owner in owners]
            update = lambda: PipelineUpdate(self.step, self.placement, devices)  # noqa: E731
            self.line.update = remembered(self.adapter.keeper, self.step, ("update", name, plan), update)
        return steps

    def enter(self) -> None:
        """Take the state from the model, which a callback may have changed, to the stages."""
        held = self.step.read()
        if self._snapshot:
            self._snapshot.update(held)
        self.line.load(self.step.read_fixed(), unshared(held))
        self._logs = []

    def run(self, block: Block) -> Any:
        """Start the tasks of a block; gives the predictions, if the step makes any."""
        steps: Any = self.find(block.arrays)
        self._torn = self._ahead = True
        told = self.line.run(steps, block)
        self._torn = False
        block.release(())  # type: ignore[arg-type]  (the stages have copies)
        if self.step.name == "predict":
            return jax.tree.map(lambda *arrays: _Rows(arrays), *told)
        self._logs += told
        return None

    def rest(self) -> Tally:
        """Wait for what was started and let the model hold the state."""
        self._state = self._written = self.line.state()
        logs = self._logs[-1] if self._logs else None
        guards = self.step.may_end_training(logs)
        losses = [float(np.asarray(each["loss"])) for each in self._logs] if guards else []
        jax.block_until_ready(self._state)
        self.step.write(self._state)
        self._ahead = False
        done = next((index for index, loss in enumerate(losses) if not np.isfinite(loss)), len(self._logs))
        healthy = done == len(self._logs)
        return Tally(np.int32(done), healthy, logs if healthy else self._logs[done])

    def leave(self) -> None:
        """Let the model hold the state on its first device, as it was before the run."""
        if self._torn and self._snapshot:  # cut off within a step: some stages have gone on and others have not
            self._state = self.line.state()
            self.recover()
        elif self._ahead:
            self.step.write(self.line.state())
        first = jax.local_devices()[0]
        self.step.write(jax.tree.map(lambda array: array if array.devices() == {first} else jax.device_put(array, first), self.step.read()))


class _Rows:
    """Predictions of several batches, on their devices until they are read."""

    def __init__(self, arrays: Sequence[jax.Array]):
        self._arrays, self.shape = arrays, (len(arrays), *arrays[0].shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.stack([np.asarray(array) for array in self._arrays]).astype(dtype or self._arrays[0].dtype)
