"""`price`: what a plan takes on a machine, worked out by an `Estimator`. Plain Python.

Every operation takes the longer of its arithmetic and its memory traffic (the roofline), plus what starting it costs. Collectives
follow from the layouts (`partition`) and take alpha-beta times (`collectives`); what runs beside computation is hidden as far as there
is computation to hide it. What a pipeline adds is in `pipeline`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property

from parafit.planner.cost.calibrated import Measured
from parafit.planner.cost.collectives import ALL_GATHER, seconds
from parafit.planner.cost.cost import Cost
from parafit.planner.cost.exchanges import Exchanges
from parafit.planner.cost.framework import Software
from parafit.planner.cost.memory import Stage, peak, recomputed
from parafit.planner.cost.pipeline import Tasks, merge
from parafit.planner.cost.stages import cut_program, is_counted, joined
from parafit.planner.layout import Piece
from parafit.planner.machine.machine import Machine
from parafit.planner.partition import Exchange, Partition
from parafit.planner.plan import Plan
from parafit.planner.program import Operation, Program
from parafit.planner.schedules.grid import SPLIT_BACKWARD


def price(program: Program, plan: Plan, machine: Machine, *, software: Software | None = None) -> Cost:
    """What a plan takes on a machine.

    Args:
        program: what one step computes.
        plan: who does it; its dims must be the program's.
        machine: what computes.
        software: what the framework does, where it is not parafit.

    Returns:
        The `Cost` of one step.

    Raises:
        PlanError: the plan maps a dim that the program does not have.
        MachineError: the machine lacks the precision that the plan asks for.

    >>> from parafit.planner.networks import named
    >>> plan = Plan(axes={"data": 8, "tensor": 8}, compute={"batch": "data", "heads": "tensor", "ffn": "tensor", "vocabulary": "tensor"},
    ...             microbatches=8, recompute="blocks", precision="bfloat16")
    >>> cost = price(named("gpt:7.5b", batch=64), plan, Machine.load("a100x8", hosts=8))
    >>> abs(sum(cost.times.values()) - cost.seconds) < 1e-12
    True
    """
    return estimator(program, plan, machine, software or Software()).cost()


def estimator(program: Program, plan: Plan, machine: Machine, software: Software, *, cut: Sequence[Piece] = ()) -> "Estimator":
    """What works a price out.

    Args:
        program: what one step computes.
        plan: who does it.
        machine: what computes.
        software: what the framework does.
        cut: the microbatches; default: as the plan cuts the program's batch.
    """
    kind = StagesEstimator if cuts_anywhere(program, plan) else Estimator
    return kind(program, plan, machine, software, cut=cut)


class Estimator(Exchanges):
    """The parts of a price while they are worked out. Times are of one microbatch and one block until `cost` adds them up."""

    def __init__(
        self, program: Program, plan: Plan, machine: Machine, software: Software, *, cut: Sequence[Piece] = (), is_stage: bool = False
    ):
        program = (plan.recompute == "blocks" and program.recomputed) or program
        super().__init__(program, plan, machine, software, self.split(program, plan, cut, software.flat_state))
        self.pipelines = self.devices > 1
        if is_stage:
            self.devices = self.stages = 1
        self.precision = software.precision or plan.precision
        self.rate = machine.device.memory_bytes_per_second * machine.device.memory_share
        measured = Measured(program, self.partition, machine.device, self.precision, lambda: self.reach_bytes)
        self.measured = measured if machine.device.curves else None

    def split(self, program: Program, plan: Plan, cut: Sequence[Piece], flat_state: bool) -> Partition:
        """What each device does.

        Args:
            program: what one step computes.
            plan: who does it.
            cut: the microbatches; none: as the plan cuts the program's batch.
            flat_state: as in `parafit.planner.cost.framework.Software`.
        """
        return Partition(program, plan, cut, flat_state=flat_state)

    @cached_property
    def places(self) -> list[str]:
        """Where each operation is: "first", before the blocks; in one of the "blocks"; "last", after them."""
        return _places(self.program)

    @cached_property
    def reach_bytes(self) -> float:
        """All that a step touches."""
        return math.fsum(self.memory().values())

    @cached_property
    def forward_results(self) -> frozenset[str]:
        """Names of what the forward pass writes."""
        return frozenset(name for operation in self.program.operations if operation.phase == "forward" for name in operation.outputs)

    def cost(self, *, simulated: bool = True) -> Cost:
        """All parts together.

        Args:
            simulated: a pipeline by its schedule's grid; else by what that takes at least.
        """
        times, timeline = self.pipelined(simulated=simulated)
        for part in (self.updated(), self.reduced(times), self.gathered(times)):
            merge(times, part)
        merge(
            times, {"dispatch": self.machine.device.dispatch_seconds / self.software.steps_per_dispatch + self.machine.device.loop_seconds}
        )
        if self.measured:
            times["feed"] = self.measured.feed_seconds(self.software.steps_per_dispatch)
            times["operations"] = self.measured.starting_seconds() / self.devices
        return Cost(times=times, memory=self.memory(), timeline=timeline)

    def tasks(self, place: str) -> Tasks:
        times: dict[str, dict[str, float]] = {kind: {} for kind in SPLIT_BACKWARD}
        launched = {"forward": 0.0, "backward": 0.0}
        seen: set[tuple[str, str, str]] = set()
        repeats = place == "blocks" and self.plan.recompute == "blocks"
        needed = recomputed(self.program) if repeats else []
        for operation, at in zip(self.program.operations, self.places):
            if at != place or operation.phase == "update":
                continue
            share = self.partition.of(operation)
            part = {operation.label: self.operation_seconds(operation, share) * operation.steps}
            host = self.software.launch_seconds
            for exchange in share.exchanges:
                key = (exchange.tensor.name, exchange.axis, operation.phase)
                if exchange.tensor.role not in ("gradient", "parameter") and (exchange.kind != ALL_GATHER or key not in seen):
                    seen.add(key)
                    host += self.software.collective_seconds
                    name = f"{exchange.kind} {exchange.axis}"
                    beside = sum(part.values()) / operation.steps if self.overlaps(exchange, operation) else 0.0
                    part[name] = part.get(name, 0.0) + self.exposed(exchange, beside) * operation.steps
            idle = host * operation.steps - sum(part.values())
            launched[operation.phase] += idle
            merge(times[self.kind_of(operation)], part)
            if repeats and operation.phase == "forward" and (self.software.recomputes_all or operation in needed):
                merge(times["B"], {name.replace("forward", "recompute"): value for name, value in part.items()})
                launched["backward"] += idle
        for kind, phase in (("F", "forward"), ("B", "backward")):
            times[kind]["launch"] = max(0.0, launched[phase])
        return times

    def kind_of(self, operation: Operation) -> str:
        """The kind of task that an operation of the forward or backward pass is in: W if it gives gradients of parameters alone."""
        if operation.phase == "forward":
            return "F"
        return "W" if all(self.program.tensors[name].role == "gradient" for name in operation.outputs) else "B"

    def operation_seconds(self, operation: Operation, share) -> float:
        """The roofline of one run, or what was measured.

        Args:
            operation: an operation of the program.
            share: the part of one run of it that a device does.
        """
        if self.measured:
            return self.measured.operation_seconds(operation, share)
        return max(self.arithmetic_seconds(operation, share), share.bytes / self.rate) + self.machine.device.operation_seconds

    def arithmetic_seconds(self, operation: Operation, share) -> float:
        """Seconds of the arithmetic of one run; 0 where memory alone decides.

        Args:
            operation: an operation of the program.
            share: the part of one run of it that a device does.
        """
        if operation.kind == "attention":
            shares = self.software.attention or self.machine.device.attention
            if shares:
                return share.flops / (self.machine.device.peak(self.precision) * shares[operation.phase] * _head_share(share.shape))
        if operation.kind in ("matmul", "convolution") and share.shape:
            return self.machine.device.matmul_seconds(self.precision, share.shape)
        if operation.kind in ("matmul", "convolution", "attention"):
            best = self.machine.device.matmul.best.get(self.precision, 1.0)
            return share.flops / (self.machine.device.peak(self.precision) * best)
        return 0.0

    def exposed(self, exchange: Exchange, beside: float) -> float:
        """Seconds of a collective that nothing hides, where so many seconds of computation run beside it.

        Args:
            exchange: the collective, with the bytes on a device.
            beside: seconds of the computation.
        """
        taken = seconds(exchange.kind, exchange.bytes, self.partition.group(exchange.axis), self.machine)
        copied = self.software.overlap_tensor == "all"
        return max(0.0, taken - beside) if copied or not beside else self.hidden(taken, 0.0, beside, exchange.axis)

    def overlaps(self, exchange: Exchange, operation: Operation) -> bool:
        """Whether a collective runs beside a product. Both products of a layer's backward pass wait for the gradient of its result.

        Args:
            exchange: the collective.
            operation: the operation that needs it.
        """
        if exchange.axis != "tensor" or self.software.overlap_tensor != "independent":
            return exchange.axis == "tensor" and self.software.overlap_tensor == "all"
        waited = exchange.kind == ALL_GATHER and exchange.tensor.name not in self.forward_results
        return operation.phase == "backward" and not waited

    def updated(self) -> dict[str, float]:
        """The optimiser's pass over the state of the fullest stage."""
        device, total = self.machine.device, 0.0
        for operation in self.program.operations:
            if operation.phase == "update":
                share = self.partition.of(operation)
                slots = [self.program.tensors[name] for name in operation.inputs if self.program.tensors[name].role == "slot"]
                split = min((self.partition.stored_bytes(slot) / self.partition.local_bytes(slot) for slot in slots), default=1.0)
                nbytes = share.bytes * split * self.software.update_passes
                once = self.measured.far_seconds("update", nbytes) if self.measured else nbytes / self.rate + device.operation_seconds
                total += once * self.copies(operation.count)
        return {"update": total}

    def memory(self, *, in_flight: float = 1) -> dict[str, float]:
        """Bytes by part of the fullest device.

        Args:
            in_flight: microbatches whose activations it keeps at once, where the program is a stage.
        """
        found = [
            peak(self.program, self.partition.fullest, stage, reserved_bytes=self.machine.device.context_bytes)
            for stage in self.stage_parts(in_flight)
        ]
        parts = max(found, key=lambda part: sum(part.values()))
        parts["communication"] = self.buffer_bytes()
        parts["slack"] = self.software.memory_slack * (sum(parts.values()) - parts["context"])
        return parts

    def stage_parts(self, in_flight: float = 1) -> list[Stage]:
        """The stages that may hold most: all in one, or those of the first device (as full as one in the middle) and of the last."""
        operations = [operation for operation in self.program.operations if operation.phase != "update"]
        if self.devices == 1:
            return [Stage(operations=operations, block_share=1.0, in_flight=in_flight)]
        placed = [(operation, place) for operation, place in zip(self.program.operations, self.places) if operation.phase != "update"]
        ends = [[operation for operation, place in placed if place != other] for other in ("last", "first")]
        *others, last = [sum(self.counts[device :: self.devices]) for device in range(self.devices)]
        kept = self.in_flight()
        shares = [count / self.blocks - 1e-9 for count in (max(others), last)]  # whole numbers of blocks stay whole
        return [Stage(operations=part, block_share=share, in_flight=count) for part, share, count in zip(ends, shares, (kept[0], kept[-1]))]

    def buffer_bytes(self) -> float:
        """Blocks of parameters gathered ahead, and one block's gradients before they are scattered (ZeRO 3)."""
        if self.plan.zero_stage < 3:
            return 0.0
        block = [tensor for tensor in self.program.of_role("parameter") if tensor.count > 1 or self.blocks == 1]
        gathered = sum(self.partition.local_bytes(tensor) for tensor in block)
        return (3 if self.software.prefetch else 2) * gathered


class StagesEstimator(Estimator):
    """The same of a pipeline that is cut between any operations: each stage, and what one device has of them, is priced as a program of
    its own.

    Args:
        part: gives the estimator of such a program.
    """

    def __init__(
        self,
        program: Program,
        plan: Plan,
        machine: Machine,
        software: Software,
        *,
        cut: Sequence[Piece] = (),
        part: Callable[[Program], Estimator] | None = None,
    ):
        super().__init__(program, plan, machine, software, cut=cut)
        self.part = part or (lambda stage: Estimator(stage, plan, machine, software, cut=cut, is_stage=True))

    @cached_property
    def pieces(self) -> tuple[tuple[Program, ...], tuple[float, ...]]:
        """The program of each stage, and what each passes on."""
        return self.cut_pieces()

    def cut_pieces(self) -> tuple[tuple[Program, ...], tuple[float, ...]]:
        """The same, worked out."""
        return cut_program(self.program, self.stages, self.near_seconds, self.partition.local_bytes)

    @cached_property
    def on_stages(self) -> list[Estimator]:
        """The estimator of each stage."""
        return [self.part(program) for program in self.pieces[0]]

    @cached_property
    def on_devices(self) -> list[Estimator]:
        """The estimator of all that each device has."""
        programs, step = self.pieces[0], self.devices
        if step == self.stages:
            return self.on_stages
        return [self.part(joined(self.program, programs[device::step])) for device in range(step)]

    def near_seconds(self, operation: Operation) -> float:
        """One run of an operation with its arrays near by: all that can be known before it is known what a device touches."""
        share = self.partition.of(operation)
        return self.measured.near_seconds(operation, share) if self.measured else self.operation_seconds(operation, share)

    def stage_tasks(self, stage: int) -> Tasks:
        return self.on_stages[stage].stage_tasks(0)

    def stage_sums(self, stage: int) -> dict[str, float]:
        return self.on_stages[stage].stage_sums(0)

    def passed_bytes(self, stage: int) -> float:
        return self.pieces[1][stage]

    def updated(self) -> dict[str, float]:
        return _longest(each.updated() for each in self.on_devices)

    def reduced(self, times: Mapping[str, float]) -> dict[str, float]:
        return _longest(each.reduced(times) for each in self.on_devices)

    def gathered(self, times: Mapping[str, float]) -> dict[str, float]:
        return _longest(each.gathered(times) for each in self.on_devices)

    def memory(self) -> dict[str, float]:
        return _longest(each.memory(in_flight=count) for each, count in zip(self.on_devices, self.in_flight()))


def cuts_anywhere(program: Program, plan: Plan) -> bool:
    """Whether a plan cuts a program between any of its operations, for its blocks are not counted.

    Args:
        program: what one step computes.
        plan: who does it.
    """
    return plan.axes.get("pipeline", 1) > 1 and not is_counted(program)


def _longest(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    return max(parts, key=lambda part: sum(part.values()))


def _head_share(shape: tuple[float, ...]) -> float:
    """Fused attention against heads of 128: each score costs its products and about as much as 32 more for the exponential.

    FlashAttention-2 on A100 (Dao 2023, figure 5): 190 TFLOP/s for heads of 64, 225 for 128.
    """
    head = shape[2] if shape else 128
    return head / (head + 32) / 0.8


def _places(program: Program) -> list[str]:
    """Where each operation is: before the blocks, in one, or after them (in the backward pass the other way round)."""
    places, passed, phase = [], False, ""
    for operation in program.operations:
        if operation.phase != phase:
            passed, phase = False, operation.phase
        passed = passed or operation.count > 1
        after, before = ("last", "first") if phase == "forward" else ("first", "last")
        places.append("blocks" if operation.count > 1 else after if passed else before)
    return places
