"""Prices of many plans of one program on one machine: what the plans have in common is worked out once. Plain Python."""

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import cached_property
from typing import Any

from parafit.planner.cost.cost import Cost
from parafit.planner.cost.estimator import Estimator, StagesEstimator, cuts_anywhere
from parafit.planner.cost.framework import Software
from parafit.planner.cost.memory import Stage, is_compiled, peak
from parafit.planner.cost.pipeline import Tasks
from parafit.planner.layout import Piece
from parafit.planner.machine.machine import Machine
from parafit.planner.partition import Partition, Share
from parafit.planner.plan import Plan
from parafit.planner.program import Operation, Program
from parafit.planner.schedules.times import TaskTimes


class Prices:
    """`price`, for a search.

    What one microbatch takes does not depend on pipeline stages or on how state is stored, and what the optimiser does depends on
    nothing else: each part is remembered under what it depends on.

    Args:
        program: what one step computes.
        machine: what computes.
        software: what the framework does, where it is not parafit.

    >>> from parafit.planner.cost.estimator import price
    >>> from parafit.planner.networks import named
    >>> program, machine = named("gpt:125m", batch=8), Machine.load("a100x8")
    >>> plan = Plan(axes={"data": 8}, compute={"batch": "data"}, precision="bfloat16")
    >>> Prices(program, machine).of(plan) == price(program, plan, machine)
    True
    """

    def __init__(self, program: Program, machine: Machine, software: Software | None = None):
        self.program, self.machine, self.software = program, machine, software or Software()
        self._traits = _Traits(program)
        self._memo: dict[Hashable, Any] = {}
        self._stages: dict[Hashable, Any] = {}

    @cached_property
    def state_bytes(self) -> float:
        """Parameters and slots, whole: what all devices together hold at least."""
        return float(self.program.bytes_of("parameter") + self.program.bytes_of("slot"))

    def arithmetic_seconds(self, precisions: Iterable[str]) -> float:
        """What one device takes at least for all products: each at the best rate of these precisions."""
        matmul, flops = self.machine.device.matmul, self._matmul_flops
        known = [precision for precision in precisions if precision in self.machine.device.peak_flops]
        rates = [matmul.best.get(precision, 1.0) * self.machine.device.peak(precision) for precision in known]
        return flops / max([*rates, *(row[-1] for row in matmul.table if row[0] in known)], default=math.inf)

    @cached_property
    def _matmul_flops(self) -> float:
        products = [operation for operation in self.program.operations if operation.kind == "matmul" and operation.phase != "update"]
        return sum(min(one.flops, 2.0 * math.prod(one.shape)) * one.count * one.steps for one in products if one.shape)

    def of(self, plan: Plan) -> Cost:
        """The price of a plan."""
        return self._estimator(plan).cost()

    def at_least(self, plan: Plan) -> Cost:
        """The same, a pipeline by what its schedule takes at least."""
        return self._estimator(plan).cost(simulated=False)

    def peak_bytes(self, plan: Plan) -> int:
        """The bytes of the price alone."""
        return math.ceil(math.fsum(self._estimator(plan).memory().values()))

    def least_seconds(self, plan: Plan) -> float:
        """What a plan takes at least: its microbatches by what its schedule takes at least, and no exchange of gradients."""
        estimator = self._estimator(plan)
        return estimator.least_seconds() if estimator.devices > 1 else self.even_seconds(plan)

    def even_seconds(self, plan: Plan) -> float:
        """The same if its stages were all equally long, and never waited."""
        estimator = self._whole(plan)
        return estimator.step_seconds * estimator.partition.rounds / estimator.devices

    def _estimator(self, plan: Plan) -> Estimator:
        whole = self._whole(plan)
        return _RememberedStages(whole, self.of_stage) if cuts_anywhere(self.program, plan) else whole

    def _whole(self, plan: Plan) -> "_RememberedEstimator":
        return _RememberedEstimator(self.program, plan, self.machine, self.software, self._memo, self._traits)

    def of_stage(self, program: Program, plan: Plan) -> Estimator:
        """The estimator of what a plan's pipeline has on one stage or device.

        Args:
            program: of the stage or device.
            plan: of the whole.
        """
        key = tuple(map(id, program.operations))
        if key not in self._stages:
            self._stages[key] = (program, {}, _Traits(program))
        known, memo, traits = self._stages[key]
        return _RememberedEstimator(known, plan, self.machine, self.software, memo, traits, is_stage=True)


class _RememberedEstimator(Estimator):
    """`Estimator` that looks into `memo` before it works a part out."""

    def __init__(
        self, program: Program, plan: Plan, machine: Machine, software: Software, memo: dict, traits: "_Traits", *, is_stage: bool = False
    ):
        super().__init__(program, plan, machine, software, is_stage=is_stage)
        self.memo = memo
        axis = plan.compute.get("batch", "")
        others = {name: self.reach(name) for name in plan.axes if name not in (axis, "pipeline")}
        dims = tuple((dim, at) for dim, at in plan.compute.items() if dim not in ("batch", "blocks"))
        self.width_key = (dims, tuple(others.items()))
        self.cut_rows, self.full_rows = (
            (self.width_key, each.piece.local_rows, axis if each.piece.devices > 1 else "")
            for each in (self.partition, self.partition.fullest)
        )
        self.pass_key = (self.cut_rows, self.reach(axis) if axis and traits.sums_rows else None, plan.recompute, plan.precision)
        self.state_key = (
            self.cut_rows if traits.updates_rows else self.width_key,
            tuple(plan.store.items()),
            plan.store_group,
            plan.axes.get(axis),
            self.devices,
            plan.recompute,
        )

    def split(self, program: Program, plan: Plan, cut: Sequence[Piece], flat_state: bool) -> Partition:
        return _RememberedPartition(program, plan, self, flat_state)

    def reach(self, axis: str) -> tuple:
        """What a collective along an axis depends on."""
        group = self.partition.group(axis)
        return group.size, group.stride, group.split(self.machine.devices_per_host)

    def remember(self, key: Hashable, work: Callable[[], Any]) -> Any:
        if key not in self.memo:
            self.memo[key] = work()
        return self.memo[key]

    def tasks(self, place: str) -> Tasks:
        return self.remember(("tasks", place, self.pass_key), lambda: super(_RememberedEstimator, self).tasks(place))

    def sums(self, place: str) -> dict[str, float]:
        return self.remember(("sums", place, self.pass_key), lambda: super(_RememberedEstimator, self).sums(place))

    @property
    def step_seconds(self) -> float:
        """All of one microbatch."""
        counts = {"first": 1, "blocks": self.blocks, "last": 1}
        return math.fsum(count * sum(self.sums(place).values()) for place, count in counts.items())

    def timed(self) -> TaskTimes:
        key = ("timed", self.pass_key, self.devices, self.stages, self.devices_inside, self.plan.compute.get("sequence"))
        return self.remember(key, super().timed)

    def cut(self, totals) -> tuple[int, int, int]:
        return self.remember(("cut", self.stages, *totals.values()), lambda: super(_RememberedEstimator, self).cut(totals))

    def updated(self) -> dict[str, float]:
        far = self.pass_key if self.machine.device.curves else None  # how far state is away, there, depends on all that a step touches
        return dict(self.remember(("update", self.state_key, far), super().updated))

    def memory(self, *, in_flight: float = 1) -> dict[str, float]:
        found = [self.stage_memory(place, stage) for place, stage in enumerate(self.stage_parts(in_flight))]
        parts = max(found, key=lambda part: sum(part.values()))
        parts["communication"] = self.buffer_bytes()
        parts["slack"] = self.software.memory_slack * (sum(parts.values()) - parts["context"])
        return parts

    def stage_memory(self, place: int, stage: Stage) -> dict[str, float]:
        """`memory.peak`: activations follow from the microbatch, state from how it is stored."""

        def work() -> dict[str, float]:
            one = Stage(operations=stage.operations, block_share=stage.block_share, in_flight=1)
            return peak(self.program, self.partition.fullest, one, reserved_bytes=self.machine.device.context_bytes)

        def remembered(key: Hashable, *names: str) -> dict[str, float]:
            return self.remember(key, lambda: {name: value for name, value in work().items() if (name in names)})

        # Gradients rest like state where they wait for the update, and pass like activations in a program that knows its buffers.
        compiled = is_compiled(self.program, self.plan)
        gradients = (
            "gradients",
            place,
            stage.block_share,
            self.state_key,
            (self.pass_key, self.full_rows, self.plan.store_group) if compiled else None,
        )
        moving = remembered(
            ("activations", place, stage.block_share, self.pass_key, self.full_rows), "inputs", "activations", "temporaries", "context"
        )
        resting = remembered(("state", place, stage.block_share, self.state_key), "parameters", "slots", "state")
        resting |= remembered(gradients, "gradients")
        return resting | moving | {"activations": moving["activations"] * stage.in_flight}


class _RememberedStages(StagesEstimator):
    """`StagesEstimator` that remembers how it cut, and the parts of its stages."""

    def __init__(self, whole: _RememberedEstimator, of_stage: Callable[[Program, Plan], Estimator]):
        plan = whole.plan
        super().__init__(whole.program, plan, whole.machine, whole.software, part=lambda program: of_stage(program, plan))
        self.partition, self.remembered = whole.partition, whole

    def timed(self) -> TaskTimes:
        one = self.remembered
        return one.remember(("timed", one.pass_key, one.devices, one.stages, one.devices_inside), super().timed)

    def cut_pieces(self) -> tuple[tuple[Program, ...], tuple[float, ...]]:
        return self.remembered.remember(("pieces", self.stages, self.remembered.pass_key), super().cut_pieces)


class _RememberedPartition(Partition):
    def __init__(self, program: Program, plan: Plan, estimator: _RememberedEstimator, flat_state: bool):
        super().__init__(program, plan, flat_state=flat_state)
        self.estimator = estimator

    def of(self, operation: Operation) -> Share:
        key = ("share", id(operation), self.estimator.cut_rows)
        return self.estimator.remember(key, lambda: super(_RememberedPartition, self).of(operation))


class _Traits:
    """What decides whether parts of a price depend on how many rows a device has, or on who has the others.

    Attributes:
        sums_rows: some operation sums over rows what is not a gradient, so that devices along the batch's axis wait for each other.
        updates_rows: some operation of the update has rows.
    """

    def __init__(self, program: Program):
        def tensors(names):
            return [program.tensors[name] for name in names]

        moving = [operation for operation in program.operations if operation.phase != "update"]
        touching = [
            operation for operation in moving if any("batch" in tensor.dims for tensor in tensors((*operation.inputs, *operation.outputs)))
        ]
        sums = [tensor for operation in touching for tensor in tensors(operation.outputs) if "batch" not in tensor.dims]
        self.sums_rows = any(tensor.role not in ("gradient", "parameter") for tensor in sums)
        updates = [operation for operation in program.operations if operation.phase == "update"]
        self.updates_rows = any(
            "batch" in tensor.dims for operation in updates for tensor in tensors((*operation.inputs, *operation.outputs))
        )
