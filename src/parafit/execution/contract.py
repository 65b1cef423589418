"""The contract: what a compiled program communicates and holds, read from the compiler's text and compared with the plan.

Plain Python: the text is that of XLA's optimised program (`compiled.as_text()`), which is no stable format. What cannot be read is an
error here, never a collective less.
"""

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from parafit.errors import ProgramError
from parafit.planner.cost.collectives import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER
from parafit.planner.layout import lay_out
from parafit.planner.partition import Partition
from parafit.planner.plan import Plan
from parafit.planner.program import Program

TOLERANCE = 0.01
"""Bytes of a kind of collective over an axis may differ by this share without a word."""

SMALL_BYTES = 64
"""Collectives of less than this together (a loss, a count, a norm) pass without being planned: their price is a latency."""

_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")


@dataclass(frozen=True, kw_only=True)
class Collective:
    """Arrays that devices exchange along an axis, once or more often in a step.

    Attributes:
        kind: "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute" or "collective-broadcast".
        axis: the mesh axis it runs along, "data+tensor" for both together.
        bytes: of the arrays as they are before they are scattered or after they are gathered, on one device.
        count: how often in a step.
        source: what it is for: a tensor's name, or the operation the compiler made it for.
        again: planned a second time, as part of what is computed again for the backward pass; the compiler may find it unneeded.
    """

    kind: str
    axis: str
    bytes: int
    count: int = 1
    source: str = ""
    again: bool = False


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
        found: from `read`.
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
        planned_bytes: bytes of state and a block on one device, as the layouts split them.
        found_bytes: bytes of the program's arguments, as the compiler says.
    """
    reason = "nothing reads the rest" if found_bytes < planned_bytes else ""
    return Difference(kind="arguments", axis="", planned_bytes=planned_bytes, found_bytes=found_bytes, reason=reason)


def read(text: str, axes: Mapping[str, int]) -> tuple[Collective, ...]:
    """The collectives of one step in a compiled program, loops counted as often as they run.

    A loop of which the compiler does not know how often it runs is the loop over steps: it counts once.

    Args:
        text: the compiler's text of the program.
        axes: the mesh axes and their sizes, in the order of the mesh.

    Raises:
        ProgramError: the text has a collective in a form that is not known.

    >>> text = '''
    ... ENTRY %main (x: f32[8]) -> f32[8] {
    ...   ROOT %all-reduce.1 = f32[8]{0} all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%add, metadata={op_name="dense"}
    ... }'''
    >>> read(text, {"data": 2, "tensor": 4})
    (Collective(kind='all-reduce', axis='tensor', bytes=32, count=1, source='dense', again=False),)
    """
    computations, entry = _computations(text)
    groups = _axis_groups(axes)
    return tuple(_collective(line, count, axes, groups) for line, count in _walk(computations, entry, 1))


def expect(program: Program, plan: Plan) -> tuple[Collective, ...]:
    """The collectives of one step that follow from a plan's two layouts.

    Args:
        program: the step.
        plan: a resolved plan.
    """
    partition = Partition(program, plan)
    return (*_exchanged(partition), *_regathered(partition), *_recut(partition))


# What a program communicates --------------------------------------------------------------------------------------------------------

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)|(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(_KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+?(\d+)\w*)\[([\d,]*)\]")


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    found: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            name = header[2]
            found[name] = []
            entry = name if header[1] else entry
        elif name:
            found[name].append(line)
    if not entry:
        raise ProgramError(f"cannot read a compiled program: no ENTRY in its text, which starts {text[:80]!r}.")
    return found, entry


def _walk(computations: Mapping[str, list[str]], name: str, count: int) -> Iterator[tuple[str, int]]:
    """Every collective reached from a computation, with how often it runs."""
    for line in computations.get(name, ()):
        if _COLLECTIVE.search(line):
            yield line, count
            continue
        trips = _TRIPS.search(line)
        for one, many in _CALLED.findall(line):
            for called in [one] if one else many.replace("%", "").split(", "):
                yield from _walk(computations, called, count * (int(trips[1]) if trips else 1))


def _collective(line: str, count: int, axes: Mapping[str, int], groups: Mapping[frozenset, str]) -> Collective:
    result, kind, start = _COLLECTIVE.search(line).groups()  # type: ignore[union-attr]
    arrays = [_byte_count(*match) for match in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", result))]
    if start and kind == "all-gather":
        arrays = arrays[len(arrays) // 2 :]
    elif start and kind == "collective-permute":
        arrays = arrays[1:2]
    members = _replica_groups(line, math.prod(axes.values()))
    axis = _pairs_axis(members, axes) if kind == "collective-permute" else groups.get(frozenset(members), "an unknown group")
    size = len(next(iter(members)))
    source = re.search(r'op_name="([^"]*)"', line)
    byte_count = sum(arrays) * (size if kind == "reduce-scatter" else 1)
    return Collective(kind=kind, axis=axis, bytes=byte_count, count=count, source=source[1] if source else "")


def _byte_count(name: str, bits: str, shape: str) -> int:
    return math.prod(int(size) for size in shape.split(",") if size) * (1 if name == "pred" else max(int(bits), 8) // 8)


def _replica_groups(line: str, device_count: int) -> set[frozenset[int]]:
    """The groups of devices of a collective: written out, as a reshaped and transposed count, or as axes of a mesh."""
    if written := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", line):
        return {frozenset(map(int, group.split(","))) for group in re.findall(r"\{([\d, ]+)\}", written[1])}
    if counted := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", line):
        return _rows(_devices(counted[2]).reshape(_sizes(counted[1])))
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", line.replace("T(", "T<")):
        return _mesh_groups(*(part and part.replace("T<", "T(") for part in named.groups()))
    if "replica_groups={}" in line:
        return {frozenset(range(device_count))}
    raise ProgramError(f"cannot read which devices a collective joins: {line.strip()[:300]}")


def _mesh_groups(mesh: str, device_ids: str | None, names: str) -> set[frozenset[int]]:
    axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    devices = _devices(device_ids) if device_ids else np.arange(math.prod(axes.values()))
    devices = devices.reshape(list(axes.values()))
    joined = [list(axes).index(name) for name in re.findall(r"'(\w+)'", names)]
    if ":" in names:
        raise ProgramError(f"cannot read a collective over a part of a mesh axis: {{{names}}}.")
    size = math.prod(devices.shape[axis] for axis in joined)
    return _rows(np.moveaxis(devices, joined, range(-len(joined), 0)).reshape(-1, size))


def _devices(text: str) -> np.ndarray:
    """`[2,4]T(1,0)`: 0, 1, 2 ... in this shape, transposed."""
    shape, _, order = text.partition("T")
    devices = np.arange(math.prod(_sizes(shape))).reshape(_sizes(shape))
    return devices.transpose(_sizes(order)) if order else devices


def _sizes(text: str) -> list[int]:
    return [int(size) for size in re.findall(r"\d+", text)]


def _rows(devices: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(row.tolist()) for row in devices}


def _axis_groups(axes: Mapping[str, int]) -> dict[frozenset, str]:
    """Which groups of devices share all coordinates but those of some axes, and the names of these axes."""
    devices = np.arange(math.prod(axes.values())).reshape(list(axes.values()))
    found: dict[frozenset, str] = {}
    for length in range(1, len(axes) + 1):
        for joined in itertools.combinations(range(len(axes)), length):
            size = math.prod(devices.shape[axis] for axis in joined)
            rows = _rows(np.moveaxis(devices, joined, range(-length, 0)).reshape(-1, size))
            found.setdefault(frozenset(rows), "+".join(list(axes)[axis] for axis in joined))
    return found


def _pairs_axis(pairs: set[frozenset[int]], axes: Mapping[str, int]) -> str:
    """The axes along which pairs of devices differ."""
    sizes = tuple(axes.values())
    places = [np.transpose(np.unravel_index(sorted(pair), sizes)) for pair in pairs]
    apart = [any(len(set(place[:, axis])) > 1 for place in places) for axis in range(len(sizes))]
    return "+".join(name for name, differs in zip(axes, apart) if differs)


# What a plan communicates -----------------------------------------------------------------------------------------------------------


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
    """A batch that devices and microbatches do not divide: gathered before it is cut."""
    plan, axis = partition.plan, partition.plan.compute.get("batch")
    if axis and plan.microbatches > 1 and partition.program.sizes.get("batch", 1) % (plan.axes[axis] * plan.microbatches):
        for tensor in partition.program.of_role("input"):
            yield Collective(kind=ALL_GATHER, axis=axis, bytes=tensor.bytes, source=tensor.name)


# What differs -----------------------------------------------------------------------------------------------------------------------


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
