"""Finds identical blocks in a `Program` and writes them once. Imports neither JAX nor Keras.

Blocks are found in the order in which the forward pass uses parameters: a sequence of shapes that repeats. The operations between
one block's first parameter and the next block's are its forward part, those up to its last gradient its backward part. What does the
same work on equal shapes in each block is folded, with a count; what the first or the last block does differently stays beside it.
Tensors at the same place are the same tensor of the folded program, and their dims the same dims. A repetition is left alone if it
would make two dims of one tensor the same: a chain of equal square layers must stay free to split every other width.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher

import numpy as np

from parafit.planner.program import Operation, Program, Tensor

MOST_TRIES = 8
"""Repetitions that are looked at before giving up, those that save most first."""


def fold_blocks(program: Program) -> Program:
    """The program with each run of identical blocks written once.

    Args:
        program: as it was traced.

    Returns:
        A program of the same work and the same bytes of parameters, whose blocks' operations and tensors carry a `count`.
    """
    folding = _find(program)
    return folding.folded() if folding else program


def share_dims(program: Program) -> Program:
    """The program as it is, but for the dims of identical blocks: what is decided for one holds for all."""
    folding = _find(program)
    return folding.shared() if folding else program


def _find(program: Program) -> "_Folding | None":
    uses = _first_uses(program)
    names, prints = list(uses), _numbers([_use(program, name, index) for name, index in uses.items()])
    for start, period, times in _repetitions(prints):
        folding = _Folding(program, [names[start + k * period : start + (k + 1) * period] for k in range(times)])
        if folding.is_sound():
            return folding
    return None


def _first_uses(program: Program) -> dict[str, int]:
    """The parameters in the order in which the forward pass uses them, and the operation that does."""
    uses: dict[str, int] = {}
    for index, operation in enumerate(program.operations):
        for name in operation.inputs if operation.phase == "forward" else ():
            if program.tensors[name].role == "parameter":
                uses.setdefault(name, index)
    return uses


def _use(program: Program, name: str, index: int) -> Hashable:
    tensor = program.tensors[name]
    return tensor.shape, tensor.itemsize, program.operations[index].kind


def _repetitions(prints: Sequence[int]) -> list[tuple[int, int, int]]:
    """(start, period, times) of the longest repetition of each period, those that save most first.

    >>> _repetitions([7, 1, 2, 3, 1, 2, 3, 1, 2, 3, 8])[0]
    (1, 3, 3)
    """
    ids = np.asarray(prints)
    found = []
    for period in range(1, len(ids) // 2 + 1):
        breaks = np.flatnonzero(np.concatenate(([True], ids[:-period] != ids[period:], [True])))
        gaps = np.diff(breaks) - 1
        best = int(gaps.argmax())
        if times := int(gaps[best]) // period:
            found.append((int(breaks[best]), period, times + 1))
    return sorted(found, key=lambda run: (-run[1] * (run[2] - 1), run[1]))[:MOST_TRIES]


@dataclass(kw_only=True)
class _Classes:
    """Union-find over names."""

    parents: dict[str, str]

    def find(self, name: str) -> str:
        while (parent := self.parents.get(name, name)) != name:
            name = parent
        return name

    def join(self, one: str, other: str) -> None:
        one, other = self.find(one), self.find(other)
        if one != other:
            self.parents[other] = one


class _Folding:
    """What has been found to be the same: tensors, dims, and for each operation that is left out the one that stands for it."""

    def __init__(self, program: Program, blocks: Sequence[Sequence[str]]):
        self.program, self.times = program, len(blocks)
        self.prints = _numbers([_content(program, operation) for operation in program.operations])
        self.tensors, self.dims = _Classes(parents={}), _Classes(parents={})
        self.leaders: dict[int, int] = {}
        for block in blocks[1:]:
            for first, name in zip(blocks[0], block):
                self._same(first, name)
                if f"{name}/gradient" in program.tensors and f"{first}/gradient" in program.tensors:
                    self._same(f"{first}/gradient", f"{name}/gradient")
        forward = self._forward_parts(blocks)
        self.chained = len(forward) > 1 and self._follows(forward[0], forward[1], blocks)
        self._fold_parts(forward)
        self._fold_parts(self._backward_parts(blocks))
        self._fold_updates()

    def is_sound(self) -> bool:
        """Whether blocks follow each other, and folding makes the same no dims of different size, nor two dims of one tensor."""
        sizes = self.program.sizes
        return (
            self.chained
            and any(self.program.operations[index].phase == "forward" for index in self.leaders)
            and all(sizes[name] == sizes[self.dims.find(name)] for name in self.dims.parents)
            and all(len(set(tensor.dims)) == len(set(self._dims(tensor.dims))) for tensor in self.program.tensors.values())
        )

    def _forward_parts(self, blocks) -> list[list[int]]:
        """From a block's first use of a parameter to the next block's; for the last as far as it is like the one before."""
        indices = self._indices("forward", lambda operation: operation.inputs, blocks)
        starts = [min(found, default=-1) for found in indices]
        phase = [index for index, operation in enumerate(self.program.operations) if operation.phase == "forward"]
        return self._between([*starts, *_beyond(starts)], phase)

    def _backward_parts(self, blocks) -> list[list[int]]:
        """Up to a block's last gradient, from where the block behind it has its own."""
        names = [[f"{name}/gradient" for name in block] for block in blocks]
        indices = self._indices("backward", lambda operation: operation.outputs, names)
        ends = [-max(found, default=1) for found in indices]
        phase = [index for index, operation in enumerate(self.program.operations) if operation.phase == "backward"]
        parts = self._between([*ends, *_beyond(ends)], [-index for index in reversed(phase)])
        return [[-index for index in reversed(part)] for part in parts]

    def _indices(self, phase: str, arrays: Callable[[Operation], Iterable[str]], blocks) -> list[list[int]]:
        owner = {name: place for place, block in enumerate(blocks) for name in block}
        found: list[list[int]] = [[] for _ in blocks]
        for index, operation in enumerate(self.program.operations):
            if operation.phase == phase:
                for name in arrays(operation):
                    if name in owner:
                        found[owner[name]].append(index)
        return found

    def _follows(self, one: Sequence[int], other: Sequence[int], blocks: Sequence[Sequence[str]]) -> bool:
        """Whether the first use of the second block's parameters needs what the first block's first one made: they are not side by side."""
        operations = self.program.operations
        made = set(operations[one[0]].outputs)
        for index in [*one, *other]:
            operation = operations[index]
            if not made.isdisjoint(operation.inputs):
                if index in other and not set(blocks[1]).isdisjoint(operation.inputs):
                    return True
                made.update(operation.outputs)
            elif index == other[0]:
                return False
        return False

    def _between(self, marks: Sequence[int], indices: Sequence[int]) -> list[list[int]]:
        if any(one >= other for one, other in itertools.pairwise(marks)):
            return []
        return [[index for index in indices if start <= index < end] for start, end in itertools.pairwise(marks)]

    def _fold_parts(self, parts: Sequence[Sequence[int]]) -> None:
        """Fold what each part has in common with the second (the first and the last may be special)."""
        if not parts:
            return
        model = parts[min(1, len(parts) - 1)]
        places: dict[int, list[int]] = defaultdict(list)
        for part in parts:
            for place, index in self._matches(model, part):
                places[place].append(index)
        for first, *rest in places.values():
            for index in rest:
                self._fold(first, index)

    def _matches(self, model: Sequence[int], part: Sequence[int]) -> Iterable[tuple[int, int]]:
        """(place in the model, operation) of what is the same in both, in order."""
        ours, theirs = [self.prints[index] for index in model], [self.prints[index] for index in part]
        for run in SequenceMatcher(None, ours, theirs, autojunk=False).get_matching_blocks():
            yield from ((run.a + place, part[run.b + place]) for place in range(run.size))

    def _fold_updates(self) -> None:
        """Operations of the update that do the same to parameters that are the same."""
        groups: dict[Hashable, list[int]] = defaultdict(list)
        seen: dict[Hashable, int] = defaultdict(int)
        for index, operation in enumerate(self.program.operations):
            if operation.phase == "update":
                inputs = tuple(name for name in operation.inputs if self.program.tensors[name].role != "slot")
                seen[self.prints[index], inputs] += 1
                groups[self.prints[index], tuple(map(self.tensors.find, inputs)), seen[self.prints[index], inputs]].append(index)
        for first, *rest in groups.values():
            for index in rest:
                self._fold(first, index)

    def _fold(self, first: int, index: int) -> None:
        self.leaders[index] = first
        one, other = self.program.operations[first], self.program.operations[index]
        for ours, theirs in zip((*one.inputs, *one.outputs), (*other.inputs, *other.outputs)):
            self._same(ours, theirs)

    def folded(self) -> Program:
        """The program with one of each."""
        counts: dict[int, int] = defaultdict(lambda: 1)
        for first in self.leaders.values():
            counts[first] += 1
        operations = tuple(
            self._operation(operation, counts[index])
            for index, operation in enumerate(self.program.operations)
            if index not in self.leaders
        )
        members: dict[str, int] = defaultdict(int)
        for name in self.program.tensors:
            members[self.tensors.find(name)] += 1
        tensors = {
            name: replace(self._tensor(tensor), count=tensor.count * min(members[name], self.times))
            for name, tensor in self.program.tensors.items()
            if name in members
        }
        return self._with_dims(replace(self.program, operations=operations, tensors=tensors))

    def shared(self) -> Program:
        """The whole program, with dims of blocks shared."""
        operations = tuple(replace(each, contracted=self._dims(each.contracted)) for each in self.program.operations)
        tensors = {name: self._tensor(tensor) for name, tensor in self.program.tensors.items()}
        return self._with_dims(replace(self.program, operations=operations, tensors=tensors))

    def _operation(self, operation: Operation, count: int) -> Operation:
        return replace(
            operation,
            inputs=tuple(map(self.tensors.find, operation.inputs)),
            outputs=tuple(map(self.tensors.find, operation.outputs)),
            contracted=self._dims(operation.contracted),
            count=operation.count * count,
        )

    def _tensor(self, tensor: Tensor) -> Tensor:
        return replace(tensor, dims=self._dims(tensor.dims))

    def _dims(self, dims: Iterable[str]) -> tuple[str, ...]:
        return tuple(map(self.dims.find, dims))

    def _with_dims(self, program: Program) -> Program:
        sizes = {name: size for name, size in program.sizes.items() if self.dims.find(name) == name}
        return replace(program, sizes=sizes, fixed=frozenset(self._dims(program.fixed)))

    def _same(self, one: str, other: str) -> None:
        self.tensors.join(one, other)
        for first, second in zip(self.program.tensors[one].dims, self.program.tensors[other].dims):
            if first and second:
                self.dims.join(*(("batch", first) if second == "batch" else (first, second)))


def _beyond(marks: Sequence[int]) -> list[int]:
    """Where the last block may end: after one and a half times the length of the one before."""
    return [marks[-1] + (marks[-1] - marks[-2]) * 3 // 2]


def _numbers(items: Sequence[Hashable]) -> list[int]:
    """A number for each item, equal for equal items."""
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(item, len(numbers)) for item in items]


def _content(program: Program, operation: Operation) -> Hashable:
    """The work of an operation, and the shapes and roles of its arrays."""
    arrays = [program.tensors[name] for name in (*operation.inputs, *operation.outputs)]
    shapes = tuple((tensor.shape, tensor.itemsize, tensor.role) for tensor in arrays)
    return (
        operation.kind,
        operation.phase,
        operation.shape,
        operation.flops,
        operation.bytes,
        operation.steps,
        len(operation.inputs),
        shapes,
    )
