"""What a traced step is made of: leaves of its arguments, values and records of operations. Plain Python."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False, kw_only=True)
class Value:
    """An array of the traced step.

    Attributes:
        shape, itemsize, role: as in `parafit.planner.program.Tensor`.
        dims: numbers in the graph's `Dims`.
        name: of a leaf, else "".
        layer: the layer it belongs to, "" while unknown.
        source: the value it is another view of.
        producer: the operation that writes it.
        loop: the loop that gives it, carried or stacked.
        readers: operations that read it.
        leaves: the program returns it, or a loop hands it on.
        literal: a number in the program's text.
        number: which one.
        cheap: computed from numbers in the program's text by what fuses, so that no loop need store it.
        seen: the view of it that tells what it is (a gradient in the shape of its parameter).
    """

    shape: tuple[int, ...]
    itemsize: int
    dims: list[int]
    role: str = "activation"
    name: str = ""
    layer: str = ""
    source: "Value | None" = None
    producer: "Record | None" = None
    loop: "Record | None" = None
    readers: "list[Record]" = field(default_factory=list)
    leaves: bool = False
    literal: bool = False
    number: Any = None
    cheap: bool = False
    seen: "Value | None" = None

    @property
    def size(self) -> int:
        """Elements of the whole array."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of the whole array."""
        return self.size * self.itemsize

    def root(self) -> "Value":
        """The value this one is a view of, itself if of none."""
        value = self
        while value.source is not None:
            value = value.source
        return value


@dataclass(eq=False, kw_only=True)
class Record:
    """An operation of the traced step; fields as in `parafit.planner.program.Operation` and `Primitive`, dims as numbers.

    Attributes:
        params: of its primitive.
        loop: the record of the innermost loop that it runs in, None outside of loops.
        again: it repeats for the backward pass what the forward pass did.
    """

    primitive: str
    kind: str
    scope: str
    layer: str
    phase: str
    inputs: list[Value]
    outputs: list[Value]
    flops: float
    contracted: list[int] = field(default_factory=list)
    shape: tuple[int, ...] = ()
    steps: int = 1
    fuses: bool = False
    alias: bool = False
    costly: bool = False
    absorbs: bool = False
    params: Mapping[str, Any] = field(default_factory=dict)
    loop: "Record | None" = None
    again: bool = False
