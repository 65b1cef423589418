"""What a step holds in memory under XLA:CPU beside its state, and from when to when. Plain Python.

Read from the programs that XLA makes (JAX 0.10.2; read again in 0.11 and 0.12, `versions.py`):
- fusion: an operation on elements runs inside every operation that can take it in, however often it is then computed, unless it is
  costly (exp, a division) and has several readers. What some reader must have in memory is stored; others read it there too, unless it
  is made from one array of its size alone: then they compute it again.
- order: an operation runs as soon as what it reads is there, first come, first served, constants first, then in the order in which
  one comes to the operations from the results. So an update follows its gradient at once, and what the backward pass gathers from
  inputs waits for it. Where memory is to be saved, that or one result after the other, each with what it needs: what holds least.
- in place: an operation on elements writes over an operand of its size that nothing else needs.
- state is donated: new weights are written over the old ones. If the old ones are read by what need not have run before, they are copied
  at the start and read from the copy; until the new ones are written, their memory is free for others.
- loops: what a loop carries, stacks or reads stays for as long as it runs, and what it stacks is zeros from the start of the step.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from parafit.backends.cpu.arrays import Array
from parafit.planner.program import Buffer, Program
from parafit.tracing.graph import Graph
from parafit.tracing.values import Record, Value


def buffers(graph: Graph, program: Program, arrays: Sequence[Array], results: Sequence[Array], *, frugal: bool) -> tuple[Buffer, ...]:
    """The memory that a step needs beside its state.

    Args:
        graph: over the step as the compiler is given it, with phases, owners and places of results filled in.
        program: the same step, for the names of its dims.
        arrays, results: what the compiler makes of it (`arrays_of`).
        frugal: whether the compiler orders the step so that little is held (`parafit.backends.cpu.options.saves_memory`).
    """
    stored = _stored(arrays)
    kernels = {id(array): _kernel(array, stored) for array in arrays if array.record is not None and id(array) in stored}
    _set_paths(kernels.values())
    needs = _from_results(_needs(kernels), [kernels[id(array)] for array in results if id(array) in kernels])
    names = {
        graph.dims.major(dim): name for value in graph.arguments for dim, name in zip(value.dims, program.tensors[value.name].dims) if name
    }
    return tuple(
        Buffer(
            part=_part(held.value),
            bytes=held.bytes,
            dims=tuple(names[factor] for factor in map(graph.dims.major, held.value.dims) if factor in names),
            first=held.first,
            last=held.last,
        )
        for held in min((_held(kernels, needs, order) for order in ((False, True) if frugal else (False,))), key=_most)
    )


def dim_names(graph: Graph, program: Program) -> dict[Any, str]:
    """The program's names of the dims of a graph of the same step, as far as its arguments have them.

    Args:
        graph: a step as a graph.
        program: the same step as a program.
    """
    return {
        graph.dims.major(dim): name for value in graph.arguments for dim, name in zip(value.dims, program.tensors[value.name].dims) if name
    }


def _part(value: Value) -> str:
    if value.role in ("gradient", "input"):
        return f"{value.role}s"
    return "activations" if value.producer is not None and value.producer.phase == "forward" else "temporaries"


@dataclass(eq=False, kw_only=True, repr=False)
class _Kernel:
    """A stored array, or a loop, with the arrays that are computed inside.

    Attributes:
        array: what it writes.
        reads: the stored arrays that it reads, by `id`.
        pointwise: those of them that it may write over.
        path: the loops that it runs in, and itself.
        first, last: the moment at which it runs; of a loop, those of its first and last operation.
    """

    array: Array
    reads: dict[int, Array]
    pointwise: set[int] = field(default_factory=set)
    path: "tuple[_Kernel, ...]" = ()
    first: int = 0
    last: int = 0

    @property
    def is_constant(self) -> bool:
        """Whether it depends on nothing, not even on a batch."""
        return not self.reads and not self.array.is_loop and self.array.value.role != "input"


@dataclass(eq=False, kw_only=True)
class _Held:
    """Memory while it is assigned; as `parafit.planner.program.Buffer`, with the value it was made for."""

    value: Value
    bytes: int
    first: int
    last: int


_Needs = dict[_Kernel, dict[_Kernel, None]]
"""What has to run before each kernel, among those of its own loop."""


# Kernels ------------------------------------------------------------------------------------------------------------------------------


def _stored(arrays: Sequence[Array]) -> set[int]:
    """The arrays that are written to memory, by `id`."""
    stored: set[int] = set()
    kernels: dict[int, set[int]] = {}
    for array in reversed(arrays):
        inside = set().union(*(kernels[id(reader)] for reader in array.readers if reader.takes_in(array)))
        if array.kept or _must_store(array, len(inside)):
            stored.add(id(array))
            inside = {id(array), *inside} if array.passes else {id(array)}
        kernels[id(array)] = inside
    for array in arrays:
        if array.primitive == "reshape" and id(array) in stored and id(array.reads[0]) in stored and not array.reads[0].passes:
            array.place = array.reads[0]
    return stored


def _must_store(array: Array, kernels: int) -> bool:
    """Whether an array that could be computed inside so many kernels is stored."""
    if array.record is None:
        return False
    if array.call is not None:
        return array.call is array
    if not array.fuses or not all(reader.takes_in(array) for reader in array.readers) or (array.costly and kernels > 1):
        return True
    loops = {id(reader.record.loop) for reader in array.readers if reader.record is not None}
    return not array.value.cheap and not loops <= {id(array.record.loop)}


def _kernel(array: Array, stored: set[int]) -> _Kernel:
    kernel = _Kernel(array=array, reads={})
    pending, seen = _sources(array, array.fuses), set()
    while pending:
        reader, source, same = pending.pop()
        if id(source) in stored and not (source.passes and reader.takes_in(source)):
            kernel.reads[id(source)] = source
            kernel.pointwise.update({id(source)} if same else ())
        elif (id(source), same) not in seen:
            seen.add((id(source), same))
            pending += _sources(source, same)
    if array.record is not None and (array.record.kind == "scatter" or array.primitive == "dynamic_update_slice"):
        kernel.pointwise.add(id(array.reads[0]))
    return kernel


def _sources(array: Array, same: bool) -> list[tuple[Array, Array, bool]]:
    """(array, one that it is made from, whether element by element), the last first."""
    same = same and array.primitive not in _ELSEWHERE
    return [(array, source, same and source.value.size == array.value.size) for source in reversed(array.reads)]


_ELSEWHERE = frozenset({"transpose", "rev", "concatenate", "stack", "unstack", "pad", "slice", "dynamic_slice", "gather"})
"""What brings numbers to other places, so that it cannot be done in place."""


# Order --------------------------------------------------------------------------------------------------------------------------------


def _set_paths(kernels: Iterable[_Kernel]) -> None:
    loops = {id(kernel.array.record): kernel for kernel in kernels if kernel.array.is_loop}

    def around(record: Record | None) -> tuple[_Kernel, ...]:
        return () if record is None or record.loop is None else (*around(record.loop), loops[id(record.loop)])

    for kernel in kernels:
        kernel.path = (*around(kernel.array.record), kernel)


def _needs(kernels: dict[int, _Kernel]) -> _Needs:
    needs: _Needs = {kernel: {} for kernel in kernels.values()}
    for kernel in kernels.values():
        for source in kernel.reads:
            if source in kernels:
                reader, read = _parting(kernel, kernels[source])
                needs[reader].update({} if reader is read else {read: None})
    return needs


def _parting(one: _Kernel, other: _Kernel) -> tuple[_Kernel, _Kernel]:
    """Of two kernels, themselves or the loops around them that are in the same loop, or in none; the first twice if one is the other."""
    return next(((ours, theirs) for ours, theirs in zip(one.path, other.path) if ours is not theirs), (one, one))


def _from_results(needs: _Needs, results: Sequence[_Kernel]) -> _Needs:
    """The same in the order in which one comes to kernels who follows from result after result what it needs."""
    done: dict[_Kernel, None] = {}
    begun: set[_Kernel] = set()
    pending = [*reversed(needs), *reversed(results)]
    while pending:
        kernel = pending[-1]
        missing = [] if kernel in begun else [each for each in needs[kernel] if each not in begun]
        begun.add(kernel)
        if missing:
            pending += reversed(missing)
        else:
            done[pending.pop()] = None
    return {kernel: needs[kernel] for kernel in done}


def _run(needs: _Needs, in_sequence: bool) -> None:
    """Give each kernel its moment: in the order of `needs`, or as soon as what it reads is there."""
    places = {kernel: place for place, kernel in enumerate(needs)}
    inside: dict[_Kernel | None, list[_Kernel]] = {}
    readers: _Needs = {kernel: {} for kernel in needs}
    for kernel, read in needs.items():
        inside.setdefault(kernel.path[-2] if len(kernel.path) > 1 else None, []).append(kernel)
        for each in read:
            readers[each][kernel] = None
    waiting = {kernel: len(read) for kernel, read in needs.items()}

    def run(loop: _Kernel | None, moment: int) -> int:
        ready = sorted((kernel for kernel in inside.get(loop, ()) if not waiting[kernel]), key=lambda kernel: not kernel.is_constant)
        while ready:
            kernel = min(ready, key=places.__getitem__) if in_sequence else ready[0]
            ready.remove(kernel)
            kernel.first, moment = moment, run(kernel, moment + 1)
            kernel.last = moment - 1
            for reader in readers[kernel]:
                waiting[reader] -= 1
                ready.extend([reader] if not waiting[reader] else ())
        return moment

    run(None, 0)


def _held(kernels: dict[int, _Kernel], needs: _Needs, in_sequence: bool) -> "list[_Held]":
    _run(needs, in_sequence)
    return _Memory(kernels, needs).held


def _most(held: "list[_Held]") -> int:
    """Bytes at the fullest moment."""
    changes = sorted(change for each in held for change in ((each.first, each.bytes), (each.last + 1, -each.bytes)))
    return max(itertools.accumulate((nbytes for _, nbytes in changes), initial=0))


# Memory -------------------------------------------------------------------------------------------------------------------------------


class _Memory:
    """Who lies where, and how long."""

    def __init__(self, kernels: dict[int, _Kernel], needs: _Needs):
        self.kernels = kernels
        self.at: dict[int, _Held] = {}
        self.readers: dict[int, list[_Kernel]] = {}
        self.writers: dict[int, _Kernel] = {}
        in_order = sorted(kernels.values(), key=lambda kernel: kernel.first)
        for kernel in in_order:
            for array in (kernel.array, *kernel.reads.values()):
                self._use(kernel, array)
        for kernel in in_order:
            self._overwrite(kernel)
        copies, free = self._copies(needs)
        self.held = [*copies, *_left_over({id(held): held for held in self.at.values()}.values(), free)]

    def _use(self, kernel: _Kernel, array: Array) -> None:
        place = _place(array)
        if id(place) not in self.kernels:
            if array is kernel.array:
                self.writers[id(place)] = kernel.path[0]
            elif array is place:
                self.readers.setdefault(id(place), []).append(kernel.path[0])
        elif place.bytes:
            around = _parting(kernel, self.kernels[id(place)])[0]
            held = self.at.setdefault(id(place), _Held(value=place.value, bytes=place.bytes, first=around.first, last=around.last))
            held.first, held.last = min(held.first, around.first), max(held.last, around.last)

    def _overwrite(self, kernel: _Kernel) -> None:
        """Let an array take the memory of one that dies as it is made."""
        mine = self.at.get(id(kernel.array))
        if mine is None:
            return
        others = (self.at.get(id(_place(array))) for key, array in kernel.reads.items() if key in kernel.pointwise)
        for other in others:
            if other is not None and other.bytes == mine.bytes and other.last == kernel.first == mine.first > other.first:
                other.last = mine.last
                self.at[id(kernel.array)] = other
                return

    def _copies(self, needs: _Needs) -> tuple[list[_Held], list[_Held]]:
        """Copies of state that is still read when the new one may be written, and the memory of it that is free till then."""
        copies, free = [], []
        before, start = _ancestors(needs), sum(kernel.is_constant and len(kernel.path) == 1 for kernel in needs)
        for leaf, writer in self.writers.items():
            readers = self.readers.get(leaf, [])
            if any(reader is not writer and not before[writer] >> reader.first & 1 for reader in readers):
                old = _place(writer.array)
                copies.append(_Held(value=old.value, bytes=old.bytes, first=0, last=max(reader.last for reader in readers)))
                free.append(_Held(value=old.value, bytes=old.bytes, first=start, last=writer.first))
        return copies, free


def _ancestors(needs: _Needs) -> dict[_Kernel, int]:
    """For each kernel what must have run before it: the moments, as the bits of a number."""
    before: dict[_Kernel, int] = {}
    for kernel in sorted(needs, key=lambda kernel: kernel.first):
        before[kernel] = 0
        for each in needs[kernel]:
            before[kernel] |= before[each] | 1 << each.first
    return before


def _left_over(held: Iterable[_Held], free: list[_Held]) -> list[_Held]:
    """What does not fit into free memory: the largest first, each into the smallest place."""
    taken: dict[int, list[_Held]] = {id(place): [] for place in free}
    left = []
    for each in sorted(held, key=lambda each: -each.bytes):
        fitting = (
            place
            for place in sorted(free, key=lambda place: place.bytes)
            if place.bytes >= each.bytes
            and place.first <= each.first
            and each.last < place.last + (place.bytes == each.bytes)
            and all(other.last < each.first or each.last < other.first for other in taken[id(place)])
        )
        place = next(fitting, None)
        (left if place is None else taken[id(place)]).append(each)
    return left


def _place(array: Array) -> Array:
    while array.place is not None:
        array = array.place
    return array
