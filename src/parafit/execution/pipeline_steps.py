"""What runs blocks of one shape on the stages of a pipeline: compiled tasks, their order, and the ways of values between stages."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np

from parafit.adapters.step import Step
from parafit.execution.stage_programs import Compiler, RoundProgram, Slices, StageProgram, gradient_of, slices_of
from parafit.placement import Placement
from parafit.planner.layout import pieces
from parafit.planner.program import Leaf
from parafit.planner.schedules import make_forward_grid, make_grid
from parafit.planner.schedules.grid import Grid, Task
from parafit.planner.schedules.simulate import simulate
from parafit.planner.schedules.times import TaskTimes
from parafit.support import compat
from parafit.techniques.apart import check_apart
from parafit.techniques.stages import Stages, cut
from parafit.techniques.tasks import tasks_of
from parafit.techniques.updates import cut_update
from parafit.techniques.whole import Whole, whole_step


@dataclass(frozen=True, kw_only=True)
class Way:
    """Values that go from one stage to another.

    Attributes:
        to: the stage that takes them.
        places: which of what is sent.
        slots: which of what is taken, in the same order.
        copy: starts copying them, None where they lie there already.
    """

    to: int
    places: tuple[int, ...]
    slots: tuple[int, ...]
    copy: Callable[[list[Any]], list[Any]] | None


class Part:
    """The microbatches of a batch that have one size.

    Args:
        whole: the step, traced for one.
        stages: the step cut into stages.
        slices: which rows they are.
        placement: of the pipeline.
        compiler: of its programs.
        block: shapes of a block's arrays.
        split: whether gradients of weights are tasks of their own.

    Attributes:
        programs: of each stage.
        forward: for each stage, the ways of what it sends.
        backward: for each stage, the ways of the gradients of what it received.
    """

    def __init__(
        self, whole: Whole, stages: Stages, slices: Slices, placement: Placement, compiler: Compiler, block: Sequence[Any], *, split: bool
    ):
        plan = placement.plan
        self.whole, self.stages, self.slices = whole, stages, slices
        at = [placement.pipeline[stage % len(placement.pipeline)] for stage in range(plan.stages)]
        self.programs = [
            StageProgram(
                compiler, whole, stage, tasks_of(stage, whole, split=split, recompute=plan.recompute != "none"), where, slices, block
            )
            for stage, where in zip(stages.stages, at)
        ]
        for lower in (StageProgram.lower_forward, StageProgram.lower_backward, StageProgram.lower_weights):
            for program in self.programs:  # all of one kind first: where B's arguments lie, F's program tells
                lower(program)
        self.forward = [self._sent(stage) for stage in range(plan.stages)]
        self.backward = [self._returned(stage) for stage in range(plan.stages)]

    def _sent(self, stage: int) -> list[Way]:
        takers = self.stages.stages[stage].takers
        pairs = {
            to: [place for place, stages in enumerate(takers) if to in stages] for to in sorted({to for stages in takers for to in stages})
        }
        return [
            self._way(stage, to, places, [self.stages.stages[to].received.index((stage, place)) for place in places], places)
            for to, places in pairs.items()
        ]

    def _returned(self, stage: int) -> list[Way]:
        program = self.programs[stage]
        received = [program.stage.received[place] for place in program.tasks.returns]
        return [
            self._way(
                stage,
                to,
                [index for index, (source, _) in enumerate(received) if source == to],
                [self._slot(to, stage, place) for source, place in received if source == to],
                [place for source, place in received if source == to],
            )
            for to in sorted({source for source, _ in received})
        ]

    def _slot(self, sender: int, taker: int, place: int) -> int:
        """Where the gradient that a taker has for a value goes among those of its sender."""
        program = self.programs[sender]
        order = [(at, to) for at in dict.fromkeys(program.tasks.sends) for to in program.stage.takers[at]]
        return order.index((place, taker))

    def _way(self, stage: int, to: int, places: Sequence[int], slots: Sequence[int], values: Sequence[int]) -> Way:
        """A way to another stage, of values that the earlier of the two sends."""
        placements = self.programs[stage].placement, self.programs[to].placement
        if placements[0] is placements[1]:
            return Way(to=to, places=tuple(places), slots=tuple(slots), copy=None)
        sent = [self.stages.stages[min(stage, to)].closed.jaxpr.outvars[value].aval for value in values]
        source, target = ([self.programs[end].activation(shape) for shape in sent] for end in (stage, to))
        return Way(to=to, places=tuple(places), slots=tuple(slots), copy=carrier(sent, source, target, *placements))


class PipelineSteps:
    """What runs blocks of one shape.

    Args:
        step: what to run.
        placement: of the pipeline.
        arrays: of a block, each of shape (capacity, batch, ...).
        owners: the stage of each weight, by an earlier cut of the step; filled where it is empty.

    Attributes:
        capacity: batches of a block.
        parts: the microbatches of a batch, by their size.
        where: for each microbatch of a batch, its part and its place there.
    """

    def __init__(self, step: Step, placement: Placement, arrays: Any, owners: list[int]):
        self.plan, self.trains = placement.plan, step.name == "train"
        leaves, structure = jax.tree.flatten(arrays)
        self.capacity, self.rows = leaves[0].shape[0], max((leaf.shape[1] for leaf in leaves if leaf.ndim > 1), default=1)
        self.slices = [Slices(count=1, rows=self.rows, first=0)]
        if self.trains:
            check_apart(step, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), arrays), self.plan)
            self.slices = slices_of(pieces(self.rows, self.plan.inside))
        self._compiler = Compiler(self.plan.precision)
        shapes = [
            [jax.ShapeDtypeStruct((each.rows, *leaf.shape[2:]) if leaf.ndim > 1 else (), leaf.dtype) for leaf in leaves]
            for each in self.slices
        ]
        wholes = [whole_step(step, jax.tree.unflatten(structure, batch)) for batch in shapes]
        cuts = []
        for whole in wholes:
            cuts.append(cut(whole, self.plan.stages, owners=owners))
            owners[:] = owners or cuts[0].owners
        self._times = times_of(cuts[0])
        split = self.trains and self._grid(sum(each.count for each in self.slices)).splits_backward
        self.parts = [
            Part(whole, stages, slices, placement, self._compiler, self._blocks(slices, batch), split=split)
            for whole, stages, slices, batch in zip(wholes, cuts, self.slices, shapes)
        ]
        self.where = [(part, place) for part in self.parts for place in range(part.slices.count)]
        self._orders: dict[int, list[Task]] = {}

    def _blocks(self, slices: Slices, shapes: Sequence[Any]) -> list[Any]:
        count = self.capacity * slices.count
        return [jax.ShapeDtypeStruct((count, *shape.shape), jax.dtypes.canonicalize_dtype(shape.dtype)) for shape in shapes]

    def wait(self) -> None:
        """Until all is compiled."""
        for part in self.parts:
            for program in part.programs:
                program.programs  # noqa: B018
        self._compiler.check()

    def order(self, steps: int) -> list[Task]:
        """Tasks in the order in which they are started: those of a batch, or, of a step that only goes forward, of so many batches."""
        count = len(self.where) if self.trains else steps
        if count not in self._orders:
            self._orders[count] = simulate(self._grid(count), self._times).dispatch_order()
        return self._orders[count]

    def _grid(self, count: int) -> Grid:
        """The schedule; a short batch may have fewer microbatches than interleaving takes, and gets a list schedule."""
        words: dict[str, Any] = {"devices": self.plan.axes["pipeline"], "microbatches": count, "interleave": self.plan.interleave}
        if not self.trains:
            return make_forward_grid(**words)
        odd = self.plan.schedule == "interleaved" and count % self.plan.axes["pipeline"]
        return make_grid("list" if odd else self.plan.schedule, **words, times=self._times)

    def sliced(self, leaf: np.ndarray, slices: Slices) -> np.ndarray:
        """One array of a block as microbatches of one size, of shape (capacity · count, rows, ...).

        Args:
            leaf: of shape (capacity, batch, ...), or (capacity,).
            slices: which microbatches.
        """
        if leaf.ndim == 1:
            return np.repeat(leaf, slices.count)
        part = leaf[:, slices.first : slices.first + slices.count * slices.rows]
        return np.array(part).reshape((-1, slices.rows, *leaf.shape[2:]))


def carrier(shapes: Sequence[Any], source: Sequence[Any], target: Sequence[Any], *places: Placement) -> Callable[[Any], Any]:
    """A function that brings arrays from one place to another, of this process or not.

    JAX counts transfers between processes and tells them by their number, so every process calls it for each: those that do not have the
    arrays with None.

    Args:
        shapes: of the arrays.
        source, target: how they lie there.
        places: from which to which.
    """
    here, there = (place.is_here for place in places)
    if here and there:
        return compat.copier(list(target))
    if places[0].devices[0].process_index == places[1].devices[0].process_index:
        return lambda arrays: None

    def carry(arrays: Any) -> Any:
        if arrays is None:  # they are another process's, of which this one knows their shapes
            pairs = zip(shapes, source)
            arrays = [jax.make_array_from_single_device_arrays(shape.shape, at, [], dtype=shape.dtype) for shape, at in pairs]
        arrived = jax.device_put(arrays, list(target))
        return arrived if there else None

    return carry


def times_of(stages: Stages) -> TaskTimes:
    """About what the tasks of stages take."""
    seconds = tuple(stage.seconds for stage in stages.stages)
    return TaskTimes(forward=seconds, backward=seconds, weights=seconds, send=(0.0,) * (len(seconds) - 1))


class PipelineUpdate:
    """The optimizer's update on the devices of a pipeline.

    Args:
        step: of training.
        placement: of the pipeline.
        owners: the device of each weight.

    Attributes:
        update: its rounds.
        programs: of the rounds.
        owners: as above.
    """

    def __init__(self, step: Step, placement: Placement, owners: Sequence[int]):
        self.update, self.owners = cut_update(step, owners), tuple(owners)
        self._placement, self._leaves, self._state = placement, step.leaves[1], step.read()
        self._slots, self._weights = len(self._leaves.slots), len(owners)
        compiler = Compiler(placement.plan.precision)
        self.programs = [
            RoundProgram(compiler, each, placement.pipeline[each.stage], self._at(each.stage), self._given_away(index), self.gradients)
            for index, each in enumerate(self.update.rounds)
        ]

    @property
    def gradients(self) -> range:
        """The numbers of the values that are gradients."""
        return range(self._slots, self._slots + self._weights)

    def _given_away(self, index: int) -> set[int]:
        """What a round is the last of its device to take, and what does not stay as it is."""
        own = self.update.rounds[index]
        later = {number for each in self.update.rounds[index + 1 :] if each.stage == own.stage for number in each.takes}
        stays = {*self.update.new_slots, *self.update.new_weights}
        homes = [*self.update.homes, *((owner,) for owner in (*self.owners, *self.owners))]
        return (
            {number for number in own.takes if number < len(homes) and own.stage in homes[number]} - later - stays - set(self.update.sends)
        )

    @cached_property
    def _made(self) -> dict[int, Any]:
        return {number: var.aval for each in self.update.rounds for number, var in zip(each.gives, each.closed.jaxpr.outvars)}

    def _at(self, device: int) -> Any:
        placement = self._placement.pipeline[device]

        def at(number: int) -> Any:
            leaf, shape = self.what(number)
            if leaf is None:
                sharding = placement.replicated
            else:
                sharding = placement.stored(leaf, shape)
            return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

        return at

    def _named(self, number: int, made: dict[int, Any]) -> tuple[Leaf | None, Any]:
        """What a value is, None of values in between, and its shape."""
        slots, weights = self._leaves.slots, self._leaves.weights
        if number < self._slots:
            return slots[number], self._state.slots[number]
        if number in self.gradients:
            weight = weights[number - self._slots]
            return gradient_of(weight), self._state.weights[number - self._slots]
        if number < self._slots + 2 * self._weights:
            return weights[number - self.gradients.stop], self._state.weights[number - self.gradients.stop]
        if number in self.update.new_weights:
            return weights[self.update.new_weights.index(number)], made[number]
        if number in self.update.new_slots:
            return slots[self.update.new_slots.index(number)], made[number]
        return None, made[number]

    def what(self, number: int) -> tuple[Leaf | None, Any]:
        """What a value is, None of values in between, and its shape."""
        return self._named(number, self._made)
