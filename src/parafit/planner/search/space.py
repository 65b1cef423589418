"""The plans that a search chooses from: every mesh, every schedule on it, every way to store state under it. Plain Python."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property

from parafit.errors import PlanError
from parafit.planner.cost.memory import recomputing_saves
from parafit.planner.cost.stages import places_to_cut
from parafit.planner.layout import pieces, resolve
from parafit.planner.machine.machine import Machine
from parafit.planner.plan import STORED, Plan
from parafit.planner.program import Program

TECHNIQUES = ("data", "tensor", "pipeline", "sequence", "zero", "store_group", "microbatches", "recompute", "interleave", "bfloat16")
"""What a search may use: the mesh axes; "pipeline" with any schedule, "interleave" with several stages a
device; "sequence", rows' tokens split between blocks along the tensor axis; "zero", state split over
the data axis, and "store_group", inside a host only; "bfloat16" operands of matmuls, which change the numbers."""

SAME_NUMBERS = frozenset(TECHNIQUES) - {"bfloat16"}
"""What leaves the numbers as they are: allowed where nothing is said."""

SMALL_SIZES = (2, 3, 4, 5, 6, 7, 8, 16, 32)
"""Sizes that a data axis may have whatever the batch."""

CHUNKS = (2, 4, 8)
"""Stages that a device of a pipeline may have."""

MOST_LISTED = 128
"""Devices times microbatches for which a schedule is invented."""


class Candidates:
    """All plans of a program on a machine.

    A plan is built step by step, so that a search can leave out what comes of a mesh or a schedule that is too slow already.

    Args:
        program: what one step computes.
        machine: what computes.
        allow: names of `TECHNIQUES`.

    >>> from parafit.planner.networks import named
    >>> candidates = Candidates(named("gpt:125m", batch=4), Machine.load("h100x8").of(2), {"data", "zero"})
    >>> [plan.short() for plan in candidates]
    ['precision=bfloat16', 'data=2,precision=bfloat16', 'data=2,zero=1,precision=bfloat16', \
'data=2,zero=2,precision=bfloat16', 'data=2,zero=3,precision=bfloat16']
    """

    def __init__(self, program: Program, machine: Machine, allow: Iterable[str] = SAME_NUMBERS):
        self.program, self.machine, self.allow = program, machine, frozenset(allow)
        self.batch = program.sizes.get("batch", 1)
        self.blocks = places_to_cut(program)
        self.half = is_half(program)
        self._inner: dict[int, dict[str, str]] = {}

    def __iter__(self) -> Iterator[Plan]:
        return (
            plan
            for mesh in self.meshes()
            for schedule in self.schedules(mesh)
            for order in self.orders(schedule)
            for plan in self.stores(order)
        )

    @cached_property
    def recomputes(self) -> bool:
        """Whether computing activations again saves memory."""
        return recomputing_saves(self.program)

    @property
    def precisions(self) -> tuple[str, ...]:
        """The precisions that plans may have."""
        if self.half:
            return ("bfloat16",)
        wide = "bfloat16" in self.allow and "bfloat16" in self.machine.device.peak_flops
        return ("float32", "bfloat16") if wide else ("float32",)

    def meshes(self) -> Iterator[Plan]:
        """Axes, and how operations are split over them: pipeline outermost, tensor among neighbours; some devices may stay idle.

        Which sizes an axis may have does not depend on how many devices there are, so that more devices only add meshes.
        """
        count = self.machine.device_count
        for tensor in self._tensor_sizes(count):
            for stages in self._stage_counts(count // tensor):
                yield from (self._mesh(stages, data, tensor) for data in self._data_sizes(count // tensor // stages))

    def schedules(self, mesh: Plan) -> Iterator[Plan]:
        """What a mesh may do, and when."""
        for split in self._sequences(mesh):
            for cut in self._microbatches(split):
                for precise in self._precisions(cut):
                    yield precise
                    if "recompute" in self.allow and self.recomputes:
                        yield replace(precise, recompute="blocks")

    def orders(self, plan: Plan) -> Iterator[Plan]:
        """In which order a pipeline may run its tasks. Only small grids are left to the list scheduler, which looks at each task."""
        yield plan
        stages = plan.axes.get("pipeline", 1)
        if stages == 1 or plan.microbatches == 1:
            return
        few = stages * plan.microbatches <= MOST_LISTED
        yield from (replace(plan, schedule=schedule) for schedule in ("gpipe", "zb-h1", *["list"] * few))
        if "interleave" in self.allow and plan.microbatches % stages == 0:
            chunks = [count for count in CHUNKS if self.blocks >= stages * count]
            yield from (replace(plan, schedule="interleaved", interleave=count) for count in chunks)

    def stores(self, schedule: Plan) -> Iterator[Plan]:
        """How state may rest under a schedule."""
        yield schedule
        if "data" not in schedule.axes or "zero" not in self.allow:
            return
        for stage in range(1, len(STORED) + 1):
            split = replace(schedule, store=dict.fromkeys(STORED[:stage], "data"))
            yield split
            inside = self.machine.devices_per_host // schedule.axes.get("tensor", 1)
            if "store_group" in self.allow and 1 < inside < schedule.axes["data"] and schedule.axes["data"] % inside == 0:
                yield replace(split, store_group=inside)

    def _tensor_sizes(self, most: int) -> list[int]:
        """Parts of a host, or whole hosts."""
        host = self.machine.devices_per_host
        sizes = [*range(2, min(host, most) + 1), *range(2 * host, min(most, self._widest) + 1, host)] if "tensor" in self.allow else []
        return [1, *(size for size in dict.fromkeys(sizes) if self.inner(size))]

    @cached_property
    def _widest(self) -> int:
        return max((size for tensor in self.program.of_role("parameter") for size in tensor.shape), default=1)

    def _data_sizes(self, most: int) -> list[int]:
        """What divides the batch, and, in case little does, small sizes: a batch whole on each device lets state be split."""
        if "data" not in self.allow:
            return [1]
        return [size for size in sorted({*self._batch_divisors, *SMALL_SIZES}) if size <= most]

    @cached_property
    def _batch_divisors(self) -> list[int]:
        return _divisors(self.batch)

    def inner(self, size: int) -> dict[str, str]:
        """The dims that `layout.resolve` splits over a tensor axis of this size; none where it divides none."""
        if size not in self._inner:
            try:
                plan = resolve(self.program, Plan(axes={"tensor": size}, compute={"inner": "tensor"}))
                self._inner[size] = dict(plan.compute)
            except PlanError:
                self._inner[size] = {}
        return self._inner[size]

    def _stage_counts(self, most: int) -> list[int]:
        """The fewest stages for each number of blocks that the fullest one may have, first and last layers counted as one or not."""
        if "pipeline" not in self.allow:
            return [1]
        found = {math.ceil(blocks / each) for blocks in (self.blocks, self.blocks + 1) for each in range(1, blocks + 1)}
        return sorted(stages for stages in found if stages <= min(most, self.blocks))

    def _mesh(self, stages: int, data: int, tensor: int) -> Plan:
        axes = {axis: size for axis, size in (("pipeline", stages), ("data", data), ("tensor", tensor)) if size > 1}
        compute = {"blocks": "pipeline", "batch": "data"} | (self.inner(tensor) if tensor > 1 else {})
        return Plan(axes=axes, compute={dim: axis for dim, axis in compute.items() if axis in axes}, precision=self.precisions[0])

    def _sequences(self, plan: Plan) -> Iterator[Plan]:
        yield plan
        size = self.program.sizes.get("sequence", 1)
        taken = "sequence" in plan.compute or "sequence" in self.program.fixed
        if "sequence" in self.allow and "tensor" in plan.axes and not taken and size > 1 and size % plan.axes["tensor"] == 0:
            yield replace(plan, compute={**plan.compute, "sequence": "tensor"})

    def _microbatches(self, plan: Plan) -> Iterator[Plan]:
        yield plan
        data, stages = plan.axes.get("data", 1), plan.axes.get("pipeline", 1)
        if "microbatches" in self.allow and not self.program.couples_batch:
            rows = math.ceil(self.batch / data)
            counts = {base * 2**power for base in (1, stages) for power in range(rows.bit_length())}
            yield from (
                plan for count in sorted(counts) if 1 < count <= rows and self._cuts_well(plan := replace(plan, microbatches=count))
            )

    def _cuts_well(self, plan: Plan) -> bool:
        """Whether a batch makes as many microbatches, and all are split, or all but the last of a batch that nothing would split."""
        cut, data = pieces(self.batch, plan), plan.axes.get("data", 1)
        split = cut if self.batch % data == 0 else cut[:1]
        return sum(piece.count for piece in cut) == plan.microbatches and all(piece.devices == data for piece in split)

    def _precisions(self, plan: Plan) -> Iterator[Plan]:
        return (replace(plan, precision=precision) for precision in self.precisions)


def techniques(plan: Plan) -> set[str]:
    """The names of `TECHNIQUES` that a plan uses, precision left out.

    >>> sorted(techniques(Plan.parse("data=2,zero=1,microbatches=4")))
    ['data', 'microbatches', 'zero']
    """
    used = {
        "zero": bool(plan.store),
        "store_group": plan.store_group > 0,
        "microbatches": plan.microbatches > 1,
        "recompute": plan.recompute != "none",
        "interleave": plan.interleave > 1,
        "sequence": "sequence" in plan.compute,
    }
    return {*plan.axes, *(name for name, wanted in used.items() if wanted)}


def is_half(program: Program) -> bool:
    """Whether a program multiplies numbers of two bytes already."""
    kernels = [tensor for tensor in program.of_role("parameter") if len(tensor.shape) > 1]
    return bool(kernels) and all(tensor.itemsize == 2 for tensor in kernels)


def _divisors(number: int) -> list[int]:
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})
