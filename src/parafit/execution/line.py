"""The arrays of a step on the devices of a pipeline, and the loop that starts its tasks.

Tasks are started in the order in which a simulation of the schedule starts them; nothing waits. Arrays go to the stages that take them as
soon as the task that makes them has been started; JAX runs each task when all that it takes is there.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from parafit.adapters.step import State, Step
from parafit.data.feed import Block
from parafit.execution.pipeline_steps import Part, PipelineSteps, Way, carrier
from parafit.execution.stage_programs import gradient_of
from parafit.placement import Placement


class Line:
    """The arrays of a step on the devices of a pipeline, and the loop that starts its tasks.

    Args:
        step: what runs.
        placement: of the pipeline.

    Attributes:
        update: the optimizer's, of a training step.
        loaded: whether it holds the state.
        kept: by stage and microbatch, what waits between F and B, or W.
    """

    def __init__(self, step: Step, placement: Placement):
        self._step, self._places = step, placement.pipeline
        self.update: Any = None
        self.loaded = False
        self.kept: dict[tuple[int, int], list[Any]] = {}
        self._several = jax.process_count() > 1
        self._homes: list[Any] = []
        self._homes_at: list[int | None] = []
        self._shapes: list[Any] = []
        self._leaves: list[Any] = []
        self._held: list[dict[int, Any]] = [{} for _ in self._places]
        self._slots: list[dict[int, Any]] = [{} for _ in self._places]
        self._slots_read: list[Any] = []
        self._sums: list[dict[int, Any]] = [{} for _ in self._places]
        self._numbers: list[list[Any]] = [[] for _ in self._places]
        self._shares: dict[Any, Any] = {}

    def load(self, fixed: list[Any], state: State) -> None:
        """Take arrays over that are not those that are here already.

        Args:
            fixed: arrays that the step only reads.
            state: arrays of the step's state.
        """
        trains = self._step.name == "train"
        homes = [*(state.weights if trains else fixed), *state.others, *state.metrics]
        if not self.loaded:
            own, leaves = self._step.leaves
            self._leaves = [*(leaves.weights if trains else own), *leaves.others, *leaves.metrics]
            self._homes, self._slots_read, self._slot_leaves = [None] * len(homes), [None] * len(state.slots), leaves.slots
            self._shapes, self._homes_at = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in homes], [None] * len(homes)
        for argument, array in enumerate(homes):
            if array is not self._homes[argument] or self._several:
                self._homes[argument], self._homes_at[argument] = array, None
                for held in self._held:
                    held.pop(argument, None)
        for slot, array in enumerate(state.slots):
            if array is not self._slots_read[slot] or self._several:
                self._slots_read[slot] = array
                for slots in self._slots:
                    slots.pop(slot, None)
        self.loaded = True

    def state(self) -> State:
        """The state, each array on a stage that has it."""
        weights = len(self._step.weights)
        others = len(self._homes) - weights - len(self._step.variables.metrics)
        homes, slots = self._homes, self._slots_read
        if self._several:
            homes = [self._everywhere(*each) for each in zip(homes, self._homes_at, self._shapes, self._leaves)]
            at = [plan[0] for plan in self.update.update.homes] if self.update else []
            shapes = [self.update.what(slot)[1] for slot in range(len(slots))]
            slots = [self._everywhere(*each) for each in zip(slots, at, shapes, self._slot_leaves)]
        return State(
            homes[:weights] if self._step.name == "train" else [], homes[weights : weights + others], list(slots), homes[weights + others :]
        )

    def _move(self, value: Any, source: int | None, target: int, shape: Any, leaf: Any) -> Any:
        """An array brought from one device of the pipeline to another; None where that is another process's.

        Args:
            value: the array, None where it is another process's.
            source: its device; None: every process has it.
            target: the other.
            shape: its shape.
            leaf: what it is; None: whole on all devices of a stage.
        """
        places = [self._places[target if source is None else source], self._places[target]]
        ends = [place.replicated if leaf is None else place.stored(leaf, shape) for place in places]
        if source is None:
            return jax.device_put(value, ends[1]) if places[1].is_here else None
        if source == target:
            return value
        if not self._several:
            return jax.device_put(value, ends[1])
        carried = carrier([shape], [ends[0]], [ends[1]], *places)([value] if places[0].is_here else None)
        return carried[0] if carried else None

    def _everywhere(self, value: Any, source: int | None, shape: Any, leaf: Any) -> Any:
        """An array that every process has."""
        if source is None:
            return value
        own = self._places[source].devices[0].process_index
        firsts = {place.devices[0].process_index: device for device, place in reversed(list(enumerate(self._places)))}
        moved = [self._move(value, source, device, shape, leaf) for process, device in sorted(firsts.items()) if process != own]
        return value if self._places[source].is_here else next(array for array in moved if array is not None)

    def run(self, steps: PipelineSteps, block: Block) -> list[Any]:
        """Start all tasks of a block; gives the outputs of each batch.

        Args:
            steps: the programs for blocks of this shape.
            block: the batches.
        """
        blocks = [self._put_block(steps, part, block) for part in steps.parts]
        if not steps.trains:
            return self._forward(steps, blocks, block.steps)
        return [self._train(steps, blocks, index) for index in range(block.steps)]

    def _put_block(self, steps: PipelineSteps, part: Part, block: Block) -> list[list[Any]]:
        """For each stage, the arrays of a block that it reads."""
        arrays = [steps.sliced(leaf, part.slices) for leaf in jax.tree.leaves(block.arrays)]
        return [
            jax.device_put(
                [arrays[leaf] for leaf in program.leaves], [program.placement.block(arrays[leaf].shape) for leaf in program.leaves]
            )
            if program.placement.is_here
            else []
            for program in part.programs
        ]

    def _forward(self, steps: PipelineSteps, blocks: list, count: int) -> list[Any]:
        (part,), told = steps.parts, [{} for _ in range(count)]
        given = [self._given(part, stage) for stage in range(len(part.programs))]
        inboxes = _Boxes(part)
        for _, stage, batch in steps.order(count):
            values = [*given[stage], *inboxes.take(stage, batch)]
            for result, value in self._run_forward(part, stage, batch, values, blocks[0][stage], batch, inboxes):
                argument = part.whole.replaces.get(result)
                if argument is None:
                    told[batch][result] = stage, value
                else:
                    self._change(part, stage, argument, value, given[stage])
        return [self._outputs(part, results) for results in told]

    def _train(self, steps: PipelineSteps, blocks: list, index: int) -> Any:
        """Start the tasks of one batch, and the update; gives its logs."""
        programs = len(steps.parts[0].programs)
        given = {id(part): [self._given(part, stage) for stage in range(programs)] for part in steps.parts}
        inboxes = {id(part): _Boxes(part) for part in steps.parts}
        coming = {id(part): _Gradients(part) for part in steps.parts}
        block_of = {id(part): arrays for part, arrays in zip(steps.parts, blocks)}
        told: dict[int, Any] = {}
        advanced: dict[int, list[tuple[int, Any]]] = {}
        for kind, stage, microbatch in steps.order(1):
            part, place = steps.where[microbatch]
            own = id(part)
            block, number = block_of[own][stage], index * part.slices.count + place
            if kind == "F":
                values = [*given[own][stage], *inboxes[own].take(stage, microbatch)]
                for result, value in self._run_forward(part, stage, microbatch, values, block, number, inboxes[own]):
                    argument = part.whole.replaces.get(result)
                    if argument is None:
                        told[result] = stage, value
                    elif argument in part.stages.changing:
                        for each in steps.parts:
                            self._change(each, stage, argument, value, given[id(each)][stage])
                    else:
                        advanced[argument] = [*advanced.get(argument, []), (stage, value)]
            else:
                self._run_backward(kind, part, stage, microbatch, block, number, coming[own], steps.rows)
        for argument, values in advanced.items():
            self._renew(argument, values)
        self._run_update()
        return self._outputs(steps.parts[0], told)

    def _run_forward(self, part: Part, stage: int, microbatch: int, values: list, block: list, number: int, inboxes: "_Boxes") -> list:
        program = part.programs[stage]
        sent, results, residuals = None, [None] * len(program.stage.results), []
        if program.placement.is_here:
            run = program.programs["F"]
            sent, results, residuals = run([values[place] for place in program.takes["F"]], block, self._number(stage, number))
        for way in part.forward[stage]:
            inboxes.put(way, microbatch, sent)
        if program.placement.is_here and program.tasks.backward:
            values += residuals
            self.kept[stage, microbatch] = [value if keep else None for value, keep in zip(values, program.keeps)]
        return list(zip(program.stage.results, results))

    def _run_backward(
        self, kind: str, part: Part, stage: int, microbatch: int, block: list, number: int, coming: "_Gradients", rows: int
    ) -> None:
        program = part.programs[stage]
        if not program.tasks.backward:
            return
        if not program.placement.is_here:
            self._sums[stage % len(self._places)].update(dict.fromkeys(program.trained))
            for way in part.backward[stage] if kind == "B" else ():
                coming.put(way, microbatch, None)
            return
        values = self.kept[stage, microbatch]
        split = program.tasks.weights is not None
        if kind == "B":
            values += [*coming.take(stage, microbatch), self._share(program, part.slices.rows / rows)]
        run, takes = program.programs.get(kind), program.takes[kind]
        if run is not None:
            arguments = [values[place] for place in takes], block, self._number(stage, number)
            if kind == "B" and split:
                returned, left = run(*arguments)
                values += left
            else:
                returned, sums = run(self._sums_of(program, stage), *arguments)
                self._sums[stage % len(self._places)].update(zip(program.trained, sums))
            for way in part.backward[stage] if kind == "B" else ():
                coming.put(way, microbatch, returned)
        if kind == "W" or not split:
            del self.kept[stage, microbatch]

    def _given(self, part: Part, stage: int) -> list[Any]:
        """The arrays of state that a stage reads; None in the place of rows."""
        program = part.programs[stage]
        return [
            self._hold(stage % len(self._places), argument) if argument < part.whole.state.stop else None
            for argument in program.stage.reads
        ]

    def _hold(self, device: int, argument: int) -> Any:
        held = self._held[device]
        if argument not in held:
            home = self._homes[argument], self._homes_at[argument]
            held[argument] = self._move(*home, device, self._shapes[argument], self._leaves[argument])
            if self._is_owner(device, argument):
                self._homes[argument], self._homes_at[argument] = held[argument], device
        return held[argument]

    def _is_owner(self, device: int, argument: int) -> bool:
        return self.update is not None and argument < len(self.update.owners) and self.update.owners[argument] == device

    def _change(self, part: Part, stage: int, argument: int, value: Any, given: list) -> None:
        """Let a stage's next microbatch read new state."""
        self._renew(argument, [(stage, value)])
        reads = part.programs[stage].stage.reads
        if argument in reads:
            given[reads.index(argument)] = value

    def _renew(self, argument: int, values: list[tuple[int, Any]]) -> None:
        """Let stages hold new state; copies that others have are old now. (Batches of other sizes may be cut at other places.)"""
        for held in self._held:
            held.pop(argument, None)
        for stage, value in values:
            self._homes_at[argument] = device = stage % len(self._places)
            self._homes[argument] = self._held[device][argument] = value

    def _outputs(self, part: Part, results: dict[int, Any]) -> Any:
        shapes, structure = jax.tree.flatten(part.whole.outputs)
        found = [results[result] for result in part.whole.told]
        if self._several:
            places = [stage % len(self._places) for stage, _ in found]
            arrays = [self._everywhere(value, at, shape, None) for at, (_, value), shape in zip(places, found, shapes)]
        else:
            arrays = [value for _, value in found]
        return jax.tree.unflatten(structure, arrays)

    def _number(self, stage: int, number: int) -> Any:
        """A number on a stage's devices."""
        numbers = self._numbers[stage % len(self._places)]
        if number >= len(numbers):
            more = [np.int32(each) for each in range(len(numbers), 2 * number + 16)]
            numbers += jax.device_put(more, self._places[stage % len(self._places)].replicated)
        return numbers[number]

    def _share(self, program: Any, share: float) -> Any:
        if program.loss_dtype is None:
            return None
        key = share, program.loss_dtype, program.placement
        if key not in self._shares:
            self._shares[key] = jax.device_put(np.asarray(share, program.loss_dtype), program.placement.replicated)
        return self._shares[key]

    def _sums_of(self, program: Any, stage: int) -> list[Any]:
        sums = self._sums[stage % len(self._places)]
        for weight, sharding in program.sums_at:
            if weight not in sums:
                sums[weight] = jax.device_put(np.zeros(self._shapes[weight].shape, self._shapes[weight].dtype), sharding)
        return [sums[weight] for weight in program.trained]

    def _run_update(self) -> None:
        update, plan = self.update, self.update.update
        slots, weights = len(self._slots_read), len(update.owners)
        self._sum_tied()
        values: list[dict[int, Any]] = [{} for _ in self._places]
        for slot, homes in enumerate(plan.homes):
            for device in homes:
                values[device][slot] = self._slot(device, slot)
        for weight, owner in enumerate(update.owners):
            values[owner][slots + weight] = self._sum(owner, weight)
            values[owner][slots + weights + weight] = self._hold(owner, weight)
        for number in plan.sends:
            source = next((device for device, own in enumerate(values) if number in own), None)
            self._send_value(number, source, values)
        for program in update.programs:
            own, made, zeros = values[program.stage], [None] * len(program.gives), [None] * len(program.zeroed)
            if program.program:
                made, zeros = program.program([own[number] for number in program.given_away], [own[number] for number in program.kept])
            own.update(zip(program.gives, made))
            self._sums[program.stage].update(zip((number - slots for number in program.zeroed), zeros))
            for number in program.gives:
                self._send_value(number, program.stage, values)
        for weight, (number, owner) in enumerate(zip(plan.new_weights, update.owners)):
            self._homes[weight] = self._held[owner][weight] = values[owner][number]
            self._homes_at[weight] = owner
            for device, held in enumerate(self._held):
                if weight in held and device != owner:
                    held[weight] = self._move(values[owner][number], owner, device, self._shapes[weight], self._leaves[weight])
        for slot, number in enumerate(plan.new_slots):
            for device in plan.homes[slot]:
                self._slots[device][slot] = values[device][number]
            self._slots_read[slot] = self._slots[plan.homes[slot][0]][slot]

    def _send_value(self, number: int, source: int | None, values: list[dict[int, Any]]) -> None:
        """Bring a value of an update, once a device has it, to those that take it."""
        if source is None:
            return
        leaf, shape = self.update.what(number)
        for device in self.update.update.sends.get(number, ()):
            values[device][number] = self._move(values[source][number], source, device, shape, leaf)

    def _slot(self, device: int, slot: int) -> Any:
        slots = self._slots[device]
        if slot not in slots:
            slots[slot] = self._move(self._slots_read[slot], None, device, self._slots_read[slot], self._slot_leaves[slot])
        return slots[slot]

    def _sum(self, device: int, weight: int) -> Any:
        """The gradient of a weight where it is kept; zero of one that nothing reads."""
        sums = self._sums[device]
        if weight not in sums:
            zeros = np.zeros(self._shapes[weight].shape, self._shapes[weight].dtype)
            sums[weight] = self._move(zeros, None, device, zeros, gradient_of(self._leaves[weight]))
        return sums[weight]

    def _sum_tied(self) -> None:
        """Bring the gradients of weights that several devices read to those that keep them."""
        for device, sums in enumerate(self._sums):
            for weight in [weight for weight in sums if self.update.owners[weight] != device]:
                owner = self.update.owners[weight]
                total = self._sum(owner, weight)
                more = self._move(sums[weight], device, owner, self._shapes[weight], gradient_of(self._leaves[weight]))
                self._sums[owner][weight] = None if total is None else _add(total, more)
                sums[weight] = None if sums[weight] is None else _zeros(sums[weight])


_add = jax.jit(lambda one, other: one + other, donate_argnums=0)
_zeros = jax.jit(lambda array: 0 * array, donate_argnums=0)


class _Boxes:
    """What stages have been sent and have not taken yet."""

    def __init__(self, part: Part):
        self._sizes = [len(program.stage.received) for program in part.programs]
        self._boxes: dict[tuple[int, int], list[Any]] = {}

    def put(self, way: Way, microbatch: int, sent: Sequence[Any] | None) -> None:
        """Send values on their way; None where they are of another process."""
        values: Any = None if sent is None else [sent[place] for place in way.places]
        if way.copy:
            values = way.copy(values)
        if values is None:
            return
        box = self._boxes.setdefault((way.to, microbatch), [None] * self._sizes[way.to])
        for slot, value in zip(way.slots, values):
            box[slot] = value

    def take(self, stage: int, microbatch: int) -> list[Any]:
        """All that a stage was sent of a microbatch."""
        return self._boxes.pop((stage, microbatch), [])


class _Gradients(_Boxes):
    """Gradients on their way back."""

    def __init__(self, part: Part):
        super().__init__(part)
        self._sizes = [len(program.tasks.sends) for program in part.programs]
