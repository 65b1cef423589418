"""The arrays that XLA:CPU makes of a step, from a graph of it, and what it takes together. Plain Python.

Read from the programs that XLA makes (JAX 0.10.2; read again in 0.11 and 0.12, `versions.py`):
- what is written down twice is computed once; smaller operands are broadcast by operations of their own;
- a product asks for its operands in an order of dims; where they lie otherwise, it reads a transposed copy;
- sums over many numbers are calls of a library, and take in the products and the arithmetic around them that nothing else reads.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from parafit.tracing.graph import Graph
from parafit.tracing.values import Record, Value


@dataclass(eq=False, kw_only=True, repr=False)
class Array:
    """An array, or for a leaf of the step what is given.

    Attributes:
        value: it in the graph.
        bytes: of the whole.
        record: the operation that makes it; None of a leaf.
        reads: what it is made from.
        fuses: it can be computed inside what reads it.
        absorbs: what it is made from can be computed inside it.
        costly: not worth computing twice.
        place: the array it is written into, if it has no memory of its own.
        kept: it is stored whoever reads it.
        readers: arrays made from it.
        call: the array that the library call gives in which it is computed.
        primitive: what makes it.
    """

    value: Value
    bytes: int
    record: Record | None = None
    reads: "list[Array]" = field(default_factory=list)
    fuses: bool = False
    absorbs: bool = False
    costly: bool = False
    place: "Array | None" = None
    kept: bool = False
    readers: "list[Array]" = field(default_factory=list)
    call: "Array | None" = None
    primitive: str = ""

    def __post_init__(self):
        self.primitive = self.primitive or (self.record.primitive if self.record else "")

    @property
    def is_loop(self) -> bool:
        """Whether it stands for a loop as a whole."""
        return self.value is _NOTHING

    @cached_property
    def passes(self) -> bool:
        """Where it is stored, it is computed again all the same by who can: from one array of its size, which costs no more to read."""
        if not self.fuses or self.costly or self.kept or self.call is not None:
            return False
        size = self.value.size
        return sum(each.value.size >= size and each.primitive not in ("broadcast_in_dim", "iota") for each in self.reads) <= 1

    def takes_in(self, source: "Array") -> bool:
        """Whether `source` can be computed inside it."""
        if self.call is not None or source.call is not None:
            return self.call is source.call
        return self.absorbs and (self.primitive != "concatenate" or source.only_moves)

    @cached_property
    def only_moves(self) -> bool:
        """Whether it takes numbers from stored arrays as they are."""
        moves = self.record is None or self.kept or not self.fuses or self.record.kind == "move"
        return moves and (self.kept or not self.fuses or all(each.only_moves for each in self.reads))


_NOTHING = Value(shape=(), itemsize=0, dims=[])
"""What a loop gives by itself: its results are arrays of their own."""


def arrays_of(graph: Graph) -> tuple[list[Array], list[Array]]:
    """All arrays of a graph in the order they are written down, its leaves first, and those that it returns."""
    builder = _Builder(graph)
    for array in builder.arrays:
        if array.primitive in _SUMS and array.call is None and _in_library(array):
            _call(array)
    return builder.arrays, builder.results


class _Builder:
    """Writes arrays down, record after record."""

    def __init__(self, graph: Graph):
        self.arrays: list[Array] = []
        self.known: dict[int, Array] = {}
        self.copies: dict[tuple[int, tuple[int, ...]], Array] = {}
        self.loops: dict[int, Array] = {}
        self.once: dict[tuple, Array] = {}
        for value in graph.arguments:
            self.known[id(value)] = self._add(_leaf(value))
        for record in graph.records:
            self._record(record)
        self.results = [self.find(value) for _, value in graph.results]
        for array in self.results:
            array.kept = True

    def find(self, value: Value) -> Array:
        """The array that a value is, or is a view of."""
        if id(value) not in self.known:
            self.known[id(value)] = self._loop_result(value) or self._source(value)
        return self.known[id(value)]

    def _loop_result(self, value: Value) -> Array | None:
        """What a loop gives: an array that it carried, or one stacked by its turns in what was zeros at the start."""
        if value.loop is None:
            return None
        zeros = Array(value=value, bytes=value.bytes, record=value.loop, kept=True)
        place = self._add(zeros) if value.source is None else self.find(value.source)
        return self._add(Array(value=value, bytes=0, record=value.loop, reads=[self.loops[id(value.loop)]], place=place, kept=True))

    def _source(self, value: Value) -> Array:
        if value.source is None:
            return self._add(Array(value=value, bytes=0, fuses=True))
        found = self.find(value.source)
        found.kept = found.kept or (value.producer is None and not found.value.cheap)  # as a loop's body sees it
        return found

    def _record(self, record: Record) -> None:
        if record.kind == "loop":
            self.loops[id(record)] = self._add(Array(value=_NOTHING, bytes=0, record=record, kept=True))
            return
        operands = [self.find(value) for value in record.inputs]
        if record.primitive == "optimization_barrier":
            for value, operand in zip(record.outputs, operands):
                operand.kept = True
                self.known[id(value)] = operand
        elif record.alias and not _moves(record):
            self.known[id(record.outputs[0])] = self._view(record, record.outputs[0], operands[0])
        elif record.primitive == "transpose" and _turns_back(record, operands[0]):
            self.known[id(record.outputs[0])] = self._view(record, record.outputs[0], operands[0].reads[0])
        elif record.primitive == "max" and any(value.literal and value.number == -math.inf for value in record.inputs):
            self.known[id(record.outputs[0])] = operands[record.inputs[0].literal]
        elif record.kind == "matmul":
            self._write(record, [self._operand(record, side, operand) for side, operand in enumerate(operands)])
        elif record.primitive == "erfc":
            self._write(record, [*operands, self._bell(record, operands[0])])
        else:
            self._write(record, operands)

    def _bell(self, record: Record, array: Array) -> Array:
        """exp(-x²), which `erfc` is worked out from, and which its derivative needs again."""
        return self._once(record, "exp", [self._once(record, "neg", [self._once(record, "mul", [array, array])])], costly=True)

    def _write(self, record: Record, operands: list[Array]) -> None:
        if record.kind == "elementwise" and record.outputs[0].shape:
            operands = [self._spread(record, array, record.outputs[0]) for array in operands]
        for value in record.outputs:
            self.known[id(value)] = self._result(record, value, operands)

    def _result(self, record: Record, value: Value, operands: list[Array]) -> Array:
        replaces = value.source is not None and not record.alias
        if (record.fuses or record.absorbs) and len(record.outputs) == 1 and not value.leaves and not replaces:
            costly = record.costly and not (record.primitive == "div" and record.inputs[1].literal)
            return self._once(record, *_plain(record, operands), costly=costly, fuses=record.fuses)
        made = Array(value=value, bytes=value.bytes, record=record, reads=operands, kept=value.leaves or replaces)
        made.fuses, made.absorbs, made.costly = record.fuses, record.fuses or record.absorbs, record.costly
        if replaces and value.source is not None:
            made.place = self.find(value.source)
        return self._add(made)

    def _view(self, record: Record, value: Value, source: Array) -> Array:
        """An array in another shape: it has a memory of its own only where its source has none."""
        if source.kept or not source.fuses or value.shape == source.value.shape:
            return source
        return self._once(record, "reshape", [source], written=value)

    def _spread(self, record: Record, array: Array, written: Value) -> Array:
        """An operand that is smaller than the result, broadcast to its shape."""
        value = array.value
        if value.size >= written.size:
            return array
        number = str(value.number) if value.literal else ""
        return self._once(record, "broadcast_in_dim", [array], written=written, number=number)

    def _once(
        self,
        record: Record,
        primitive: str,
        operands: list[Array],
        *,
        costly: bool = False,
        fuses: bool = True,
        written: Value | None = None,
        number: str = "",
    ) -> Array:
        """An array that is computed once however often it is written down; `number`: of a number of the program's text, which."""
        written = written or record.outputs[0]
        made_of = (number,) if number else (*map(id, operands), *_told(record, primitive))
        key = primitive, written.shape, written.itemsize, id(record.loop), made_of
        if key not in self.once:
            made = Array(value=written, bytes=written.bytes, record=record, reads=operands, primitive=primitive)
            made.costly, made.fuses, made.absorbs = costly, fuses, True
            self.once[key] = self._add(made)
        return self.once[key]

    def _operand(self, record: Record, side: int, operand: Array) -> Array:
        """What a product reads as an operand: the operand as a matrix, what it is the transpose of, or a transposed copy."""
        value, (sums, batches) = record.inputs[side], (dims[side] for dims in record.params["dimension_numbers"])
        if _fits(value.shape, sums, batches, side):
            flat = len(value.shape) > 2 and not batches
            return self._view(record, _flat(value, sums, side), operand) if flat else operand
        if operand.primitive == "transpose" and operand.record is not None and operand.value.shape == value.shape:
            turned = operand.record.params["permutation"]
            if _fits(operand.record.inputs[0].shape, [turned[dim] for dim in sums], [turned[dim] for dim in batches], side):
                return operand.reads[0]
        key = id(operand), _order(value.shape, sums, batches, side)
        if key not in self.copies:
            copy = Array(value=value, bytes=value.bytes, record=record, reads=[operand], kept=True, primitive="transpose")
            copy.fuses = copy.absorbs = True
            self.copies[key] = self._add(copy)
        return self.copies[key]

    def _add(self, array: Array) -> Array:
        for source in array.reads:
            source.readers.append(array)
        self.arrays.append(array)
        return array


def _leaf(value: Value) -> Array:
    """State is given; a batch is a slice of its block."""
    if value.role != "input":
        return Array(value=value, bytes=value.bytes, kept=True)
    record = Record(primitive="dynamic_slice", kind="move", scope="", layer="", phase="forward", inputs=[], outputs=[value], flops=0.0)
    return Array(value=value, bytes=value.bytes, record=record, fuses=True, absorbs=True)


def _moves(record: Record) -> bool:
    """Whether a view of another array is none for XLA, because numbers change places."""
    return record.primitive == "transpose" and _is_moved(record.params["permutation"], record.inputs[0].shape)


def _is_moved(order: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether numbers lie otherwise if the dims of an array of this shape are put in that order."""
    whole = [dim for dim in order if shape[dim] > 1]
    return whole != sorted(whole)


def _turns_back(record: Record, operand: Array) -> bool:
    """Whether a transpose undoes the one that made its operand."""
    first = operand.record
    if first is None or first.primitive != "transpose" or operand.primitive != "transpose" or operand.value.shape != record.inputs[0].shape:
        return False
    order = [first.params["permutation"][dim] for dim in record.params["permutation"]]
    return not _is_moved(order, first.inputs[0].shape)


def _plain(record: Record, operands: list[Array]) -> tuple[str, list[Array]]:
    """An operation in the words in which the compiler compares it with others."""
    if record.primitive == "square" or (record.primitive == "integer_pow" and record.params["y"] == 2):
        return "mul", [*operands, *operands]
    return {"add_any": "add"}.get(record.primitive, record.primitive), operands


def _told(record: Record, primitive: str) -> Iterable[tuple[str, str]]:
    """The parameters that tell an operation from others of its name and shapes."""
    if primitive != record.primitive or primitive in ("mul", "add", "sub", "div", "max", "neg", "exp"):
        return ()
    return sorted((name, str(item)) for name, item in record.params.items())


def _flat(value: Value, sums: Sequence[int], side: int) -> Value:
    """A product's operand as a matrix."""
    inner = math.prod(value.shape[dim] for dim in sums)
    outer = value.size // max(1, inner)
    return Value(shape=(inner, outer) if side else (outer, inner), itemsize=value.itemsize, dims=value.dims, layer=value.layer)


def _order(shape: Sequence[int], sums: Sequence[int], batches: Sequence[int], side: int) -> tuple[int, ...]:
    """The order of dims that a product asks for: batch, rows, inner of the left operand, batch, inner, columns of the right one."""
    free = [dim for dim in range(len(shape)) if dim not in {*sums, *batches}]
    return (*batches, *sums, *free) if side else (*batches, *free, *sums)


def _fits(shape: Sequence[int], sums: Sequence[int], batches: Sequence[int], side: int) -> bool:
    """Whether a product can read an operand as it lies: in the order that it asks for, or any that is a matrix."""
    return not _is_moved(_order(shape, sums, batches, side), shape) or (len(shape) == 2 and not batches)


# Library calls ------------------------------------------------------------------------------------------------------------------------

_SUMS = frozenset({"reduce_sum", "reduce_max", "reduce_min"})
_IN_LIBRARY = _SUMS | {"dot_general", "mul", "add", "sub", "neg", "div", "exp", "broadcast_in_dim", "reshape"}
_LEAST_ELEMENTS = 4096
"""Smaller operations are not worth a call: seen as the least size of any that was one (4,000 was none)."""


def _in_library(array: Array) -> bool:
    values = [array.value, *(each.value for each in array.reads[:1] if array.primitive in _SUMS)]
    return array.primitive in _IN_LIBRARY and max(value.size for value in values) >= _LEAST_ELEMENTS


def _call(array: Array) -> None:
    """Gather what one library call computes around a sum: what only leads to it, and what follows from it alone."""
    inside = {id(array): array}
    _add_sources(inside)
    while not array.kept and len({id(reader) for reader in array.readers}) == 1 and _in_library(array.readers[0]):
        array = array.readers[0]
        inside[id(array)] = array
        _add_sources(inside)
    for each in inside.values():
        each.call = array


def _add_sources(inside: dict[int, Array]) -> None:
    """Take in what nothing outside reads."""
    pending = list(inside.values())
    while pending:
        for source in pending.pop().reads:
            alone = all(id(reader) in inside for reader in source.readers)
            if id(source) not in inside and alone and not source.kept and source.call is None and _in_library(source):
                inside[id(source)] = source
                pending.append(source)
