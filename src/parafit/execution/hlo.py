"""What a compiled program communicates, read from the compiler's text.

The text is that of XLA's optimised program (`compiled.as_text()`), which is no stable format. What cannot be read is an error here, never
a collective less.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from parafit.errors import ProgramError


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


_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")

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
