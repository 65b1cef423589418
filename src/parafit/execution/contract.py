"""The contract: what a compiled program communicates and holds, compared with the plan. Plain Python."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from parafit.execution.hlo import Collective
from parafit.planner.cost.collectives import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER
from parafit.planner.layout import lay_out
from parafit.planner.partition import Partition
from parafit.planner.plan import Plan
from parafit.planner.program import Program

TOLERANCE = 0.01
"""Bytes of a kind of collective over an axis may differ by this share without a word."""

SMALL_BYTES = 64
"""Collectives of less than this together (a loss, a count, a norm) pass without being planned: their price is a latency."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Collectives of one kind over one axis, planned and found; or memory, which has no axis.

    Attributes:
        kind, axis: as in `Collective`.
        planned_bytes, found_bytes: in one step, on one device.
        reason: why they differ, "" where that is not known.
        sources: what the collectives found are for, the largest first.
    """

    kind: str
    axis: str
    planned_bytes: int
    found_bytes: int
    reason: str = ""
    sources: tuple[str, ...] = ()

    @property
    def agrees(self) -> bool:
        """Whether the bytes agree to `TOLERANCE`, or both are small."""
        return _close(self.planned_bytes, self.found_bytes)

    def __str__(self):
        gap = "as planned" if self.agrees else self.reason or "NOT PLANNED: " + ", ".join(self.sources[:3])
        what = f"{self.kind} over {self.axis}" if self.axis else self.kind
        return f"{what}: planned {self.planned_bytes} bytes{' a step' if self.axis else ''}, found {self.found_bytes} ({gap})"


@dataclass(frozen=True, kw_only=True)
class Report:
    """Plan and compiled program side by side, one row for each kind of collective over each axis."""

    rows: tuple[Difference, ...]

    @property
    def broken(self) -> tuple[Difference, ...]:
        """Rows that differ without an explanation."""
        return tuple(row for row in self.rows if not row.agrees and not row.reason)

    def __str__(self):
        return "\n".join(map(str, self.rows)) or "no collectives, as planned"


def check(found: Iterable[Collective], planned: Iterable[Collective]) -> Report:
    """Compare what a program communicates with what its plan says.

    Args:
        found: from `hlo.read`.
        planned: from `expect`.

    >>> planned = [Collective(kind="all-reduce", axis="data", bytes=40_000, source="dense/kernel")]
    >>> str(check([Collective(kind="all-reduce", axis="data", bytes=40_004)], planned))
    'all-reduce over data: planned 40000 bytes a step, found 40004 (as planned)'
    >>> check([*planned, Collective(kind="all-gather", axis="data", bytes=40_000, source="dense/dot")], planned).broken[0].sources
    ('dense/dot',)
    """
    planned, found = list(planned), list(found)
    wanted, seen = _totals(each for each in planned if not each.again), _totals(found)
    again = _totals(each for each in planned if each.again)
    rows = []
    for kind, axis in sorted(set(wanted) | set(seen)):
        here = sorted((each for each in found if (each.kind, each.axis) == (kind, axis)), key=lambda each: -each.bytes * each.count)
        rows.append(
            Difference(
                kind=kind,
                axis=axis,
                planned_bytes=wanted[kind, axis],
                found_bytes=seen[kind, axis],
                reason=_reason(wanted, seen, again, kind, axis),
                sources=tuple(dict.fromkeys(each.source for each in here)),
            )
        )
    return Report(rows=tuple(rows))


def compare_memory(*, planned_bytes: int, found_bytes: int) -> Difference:
    """What a program's arguments take on one device: state and batches as the layouts lay them.

    Compilers drop arguments that nothing reads; holding less than planned is no breach.

    Args:
        planned_bytes: as the layouts lay them.
        found_bytes: as the compiler says.
    """
    reason = "nothing reads the rest" if found_bytes < planned_bytes else ""
    return Difference(kind="arguments", axis="", planned_bytes=planned_bytes, found_bytes=found_bytes, reason=reason)


def expect(program: Program, plan: Plan) -> tuple[Collective, ...]:
    """The collectives of one step that follow from a plan's two layouts.

    Args:
        program: the step.
        plan: a resolved plan.
    """
    partition = Partition(program, plan)
    return (*_exchanged(partition), *_regathered(partition), *_recut(partition))


def _exchanged(partition: Partition) -> Iterator[Collective]:
    """What operations exchange, in every microbatch; gradients that are stored in parts are scattered."""
    plan = partition.plan
    for operation in partition.program.operations:
        times = operation.count * operation.steps * (1 if operation.phase == "update" else plan.microbatches)
        for exchange in partition.of(operation).exchanges:
            scattered = exchange.tensor.role == "gradient" and exchange.axis == plan.store.get("gradient")
            kind = REDUCE_SCATTER if scattered else exchange.kind
            found = Collective(kind=kind, axis=exchange.axis, bytes=round(exchange.bytes), count=times, source=exchange.tensor.name)
            yield found
            if operation.phase == "forward" and plan.recompute != "none":
                yield replace(found, again=True)


def _regathered(partition: Partition) -> Iterator[Collective]:
    """Parameters that are updated, or stored, in parts: gathered once a step."""
    layout = lay_out(partition.program.tensors.values(), partition.plan)
    for tensor in partition.program.of_role("parameter"):
        split = [axis for axis in layout.store["slot"][tensor.name] if axis not in layout.compute[tensor.name]]
        if split and split[0]:
            yield Collective(
                kind=ALL_GATHER, axis=split[0], bytes=round(partition.local_bytes(tensor)), count=tensor.count, source=tensor.name
            )


def _recut(partition: Partition) -> Iterator[Collective]:
    """A batch that devices and microbatches do not divide, or whose microbatches are rows in order: gathered before it is cut."""
    plan, axis = partition.plan, partition.plan.compute.get("batch")
    rows, in_order = partition.program.sizes.get("batch", 1), plan.statistics == "microbatch"
    if axis and plan.microbatches > 1 and (in_order or rows % (plan.axes[axis] * plan.microbatches)):
        for tensor in partition.program.of_role("input"):
            yield Collective(kind=ALL_GATHER, axis=axis, bytes=tensor.bytes, source=tensor.name)


def _totals(collectives: Iterable[Collective]) -> defaultdict[tuple[str, str], int]:
    totals: defaultdict[tuple[str, str], int] = defaultdict(int)
    for each in collectives:
        totals[each.kind, each.axis] += each.bytes * each.count
    return totals


def _reason(wanted: Mapping, seen: Mapping, again: Mapping, kind: str, axis: str) -> str:
    """Why bytes may differ: compilers without a scattering sum, such as XLA:CPU's, reduce everything and slice."""
    if wanted[kind, axis] <= seen[kind, axis] <= (wanted[kind, axis] + again[kind, axis]) * (1 + TOLERANCE):
        return "with what is computed again for the backward pass"
    planned, found = (sum(totals.get((each, axis), 0) for each in (ALL_REDUCE, REDUCE_SCATTER)) for totals in (wanted, seen))
    if kind in (ALL_REDUCE, REDUCE_SCATTER) and _close(planned, found):
        return "summed whole and sliced, or scattered in the sum: the same bytes"
    return ""


def _close(planned: int, found: int) -> bool:
    return abs(found - planned) <= max(SMALL_BYTES, TOLERANCE * planned)
