"""How fast a device multiplies matrices: by its kernels' tiles, or between measured rates. Plain Python."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Matmul:
    """How much of a device's peak a matrix product reaches, by its shape.

    Two ways to say it. A table of measurements, for a calibrated machine; or the geometry of the kernels: the product is cut into
    tiles, `units` of them run at once, the last wave is not full, and the first and last steps of the inner loop do no work.

    Attributes:
        best: share of the peak that the best shape reaches, by precision.
        units: multiprocessors (or matrix units, or cores) that work on tiles side by side.
        tiles: (rows, columns, share): tiles a kernel may choose, with the share of `best` that a tile of that size sustains at the highest
            peak; slower precisions lose less, as far as their operands are not wider.
        fill: inner length that takes as long as starting a tile and writing it out, at the highest peak but float8's (a latency: a slower
            precision does less in that time).
        alignment: (bytes, share): a row whose bytes are a multiple of so many is read at that share; largest first. Empty: all alike.
        table: (precision, rows, inner, columns, FLOP/s) measured; where it has the precision, it is used and the geometry is not. Other
            ways to run a product are rows of their own: "float32 transposed" (a dense layer's kernel transposed, for its input's gradient),
            "float32 gradient" (of a dense layer's kernel), "float32 batched" (many at once), "float32 convolution" (a convolution by the
            product it stands for), "float32 correlation" (the gradient of its kernel).
    """

    best: Mapping[str, float] = field(default_factory=dict)
    units: int = 1
    tiles: tuple[tuple[float, ...], ...] = ((1, 1, 1.0),)
    fill: float = 0.0
    alignment: tuple[tuple[float, ...], ...] = ()
    table: tuple[tuple[Any, ...], ...] = ()

    @cached_property
    def _rates(self) -> dict[tuple, float]:
        return {}

    def rate(self, name: str, rows: float, inner: float, columns: float) -> float:
        """FLOP/s between what was measured under this name, 0 where nothing was; kept, for a program asks for few shapes, often.

        Args:
            name: name of a precision, with the form after a space, as in `table`.
            rows, inner, columns: sizes of the product.
        """
        asked = name, rows, inner, columns
        if asked not in self._rates:
            self._rates[asked] = rate_between(self.table, *asked)
        return self._rates[asked]


def aligned_share(alignment: Sequence[tuple[float, ...]], itemsize: int, lengths: Sequence[float]) -> float:
    """The share at which the rows of the least aligned operand are read.

    Args:
        alignment: as `Matmul.alignment`.
        itemsize: bytes of a number.
        lengths: numbers in a row, of each operand.
    """
    return min((next((share for size, share in alignment if length * itemsize % size == 0), 1.0) for length in lengths), default=1.0)


def tile_work(tile: tuple[float, ...], loads: float, units: int, batches: float, rows: float, columns: float) -> float:
    """Elements of the output times 1/share that the busiest unit computes, scaled by the number of units.

    Args:
        tile: (rows, columns, share), one of `Matmul.tiles`.
        loads: what a small tile loses it waits for operands: so much of what the fastest precision waits, against its arithmetic.
        units: as `Matmul.units`.
        batches, rows, columns: of the product.
    """
    height, width, share = tile
    waves = math.ceil(batches * math.ceil(rows / height) * math.ceil(columns / width) / units)
    return waves * units * height * width * (1 + (1 / share - 1) * loads)


_SOFT, _STIFF = 0.3, 0.03
"""What is added to squared distances, so that one measurement does not decide alone; and to slopes."""

_RAGGED = 0.5
"""How far rows that do not start with a cache line are from those that do, where twice the size is 1."""

_LINE_BYTES, _PAGE_BYTES = 64, 4096
"""Of a processor's cache and memory."""


def rate_between(table: Iterable[tuple[Any, ...]], name: str, rows: float, inner: float, columns: float) -> float:
    """FLOP/s at a shape: a plane through the logarithms of the rates of shapes alike (locally weighted regression, Cleveland 1979), each
    weighted by the inverse sixth power of its distance. What is larger than all is as fast as the largest; nothing is faster than all.

    Args:
        table: as `Matmul.table`.
        name: of the rows of it that count; 0 if there are none.
        rows, inner, columns: of the product.

    >>> table = [("float32", 256, 256, 256, 1e11), ("float32", 1024, 1024, 1024, 3e11)]
    >>> [round(rate_between(table, "float32", size, size, size) / 1e11, 3) for size in (256, 1024, 4096)]
    [1.0, 3.0, 3.0]
    """
    known = [(shape, math.log(rate)) for each, *shape, rate in table if each == name]
    if not known:
        return 0.0
    most = [max(values) for values in zip(*(shape for shape, _ in known))]
    wanted = [min(size, limit) for size, limit in zip((rows, inner, columns), most)]
    here = _traits(wanted, name)
    lines = []
    for shape, value in known:
        offset = [1.0, *(place - ours for place, ours in zip(_traits(shape, name), here))]
        distance = sum(part**2 for part in offset[1:])
        if distance < 1e-9:
            return math.exp(value)
        lines.append((offset, value, (distance + _SOFT) ** -3))
    stiff = _STIFF * sum(weight for *_, weight in lines)
    places = range(1 + len(here))
    matrix = [
        [sum(w * a[i] * a[j] for a, _, w in lines) + stiff * (i == j > 0) for j in places] + [sum(w * a[i] * v for a, v, w in lines)]
        for i in places
    ]
    fastest = max(value for _, value in known)
    return math.exp(min(fastest, _solved(matrix)[0]))


def _traits(shape: Sequence[float], name: str) -> list[float]:
    """What the rate of a product follows: its sizes, how far the rows of its matrices fall on the same places of a cache, and whether they
    start at any place of a line."""
    rows, inner, columns = shape
    widths = (rows, columns) if name.endswith("gradient") else (inner, columns)  # of a kernel's gradient both operands lie upright
    return [*map(math.log2, shape), *map(_aliasing, widths), *(_RAGGED * (4 * int(width) % _LINE_BYTES > 0) for width in widths)]


def _aliasing(size: float) -> float:
    """0 where rows of so many float32 numbers start at any of a cache's lines in turn, 2 where all start at the same: whole pages apart."""
    return math.log2(max(1, math.gcd(4 * int(size), _PAGE_BYTES) // _LINE_BYTES)) / 3


def _solved(matrix: list[list[float]]) -> list[float]:
    """The solution of linear equations, by elimination: the matrix is positive definite."""
    size = len(matrix)
    for column in range(size):
        for row in (row for row in range(size) if row != column):
            share = matrix[row][column] / matrix[column][column]
            matrix[row] = [mine - share * other for mine, other in zip(matrix[row], matrix[column])]
    return [row[-1] / row[place] for place, row in enumerate(matrix)]
