"""Who holds and computes which part: what follows from a plan's two layouts, for every tensor and operation. Plain Python.

Along each axis a tensor is split over the first of its dims that `compute` maps to the axis, and an operation over the first dim of
all its tensors; a microbatch that its axis does not divide is split over none. Three cases follow. An input that lacks the
operation's dim but is split over another must be gathered whole first. An output that lacks it is a partial sum: it is reduced, and
scattered where it is itself split over another dim. All else is local.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from parafit.errors import PlanError
from parafit.planner.cost.collectives import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, Group
from parafit.planner.layout import GROUP, Piece, pieces, split_to_store
from parafit.planner.plan import Plan
from parafit.planner.program import Operation, Program, Tensor


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """A collective that the layouts ask for.

    Attributes:
        kind: of collective.
        axis: along which.
        tensor: what is exchanged.
        bytes: of the whole vector on one device.
    """

    kind: str
    axis: str
    tensor: Tensor
    bytes: float


@dataclass(frozen=True, kw_only=True)
class Share:
    """A device's part of one run of an operation on one microbatch.

    Attributes:
        flops: it computes.
        bytes: it moves to and from memory.
        shape: of a matmul: its (batches, rows, inner, columns).
        exchanges: collectives before and after it.
    """

    flops: float
    bytes: float
    shape: tuple[float, ...]
    exchanges: tuple[Exchange, ...]


class Partition:
    """What each device does under a plan.

    Args:
        program: what is computed.
        plan: who does it; each dim that it maps must be the program's.
        cut: the microbatches; default: as the plan cuts the program's batch.
        place: of which of them; default: the first.
        flat_state: as in `parafit.planner.cost.framework.Software`.

    Raises:
        PlanError: the plan maps a dim that the program does not have.

    >>> x = Tensor(name="x", shape=(32, 784), dims=("batch", "pixels"), role="input")
    >>> w = Tensor(name="w", shape=(784, 10), dims=("pixels", "classes"), role="parameter")
    >>> y = Tensor(name="y", shape=(32, 10), dims=("batch", "classes"))
    >>> dot = Operation(name="dense", kind="matmul", phase="forward", inputs=("x", "w"), outputs=("y",),
    ...                 flops=501760, contracted=("pixels",), shape=(1, 32, 784, 10))
    >>> program = Program(name="one", operations=(dot,), tensors={t.name: t for t in (x, w, y)},
    ...                   sizes={"batch": 32, "pixels": 784, "classes": 10})
    >>> partition = Partition(program, Plan(axes={"data": 2, "tensor": 4}, compute={"batch": "data", "pixels": "tensor"}))
    >>> share = partition.of(dot)
    >>> share.shape, [(exchange.kind, exchange.axis, exchange.bytes) for exchange in share.exchanges]
    ((1, 16, 196, 10), [('all-reduce', 'tensor', 640.0)])
    """

    def __init__(self, program: Program, plan: Plan, cut: Sequence[Piece] = (), *, place: int = 0, flat_state: bool = False):
        self.program, self.plan, self.flat_state = program, plan, flat_state
        rows = program.sizes.get("batch", 1)
        self.pieces = tuple(cut) or pieces(rows, plan)
        self.piece = self.pieces[place]
        self.stages = plan.axes.get("pipeline", 1)
        mapped = {dim: axis for dim, axis in plan.compute.items() if dim != "blocks"}
        if missing := sorted(set(mapped) - {*program.sizes, "batch"}):  # a batch of one row is no dim, and stays whole
            raise PlanError(
                f"the plan maps dim {missing[0]!r}, but program {program.name!r} has the dims {', '.join(program.sizes)}. "
                "Map one of these (a plan's text says 'inner' for dims that are found once the model is known)."
            )
        split = {dim: axis for dim, axis in mapped.items() if dim != "batch" or self.piece.devices > 1}
        self._orders = {axis: [dim for dim, at in split.items() if at == axis] for axis in plan.axes if axis != "pipeline"}
        self._fractions = {dim: self._fraction_of(dim, plan.axes[axis]) for dim, axis in mapped.items()}
        self._fractions["batch"] = self.piece.local_rows / rows
        self._local: dict[str, float] = {}
        self._shares: dict[int, Share] = {}

    @property
    def turns(self) -> int:
        """Microbatches of a step."""
        return sum(piece.count for piece in self.pieces)

    @property
    def rounds(self) -> float:
        """The same in microbatches of this one's rows on a device."""
        return sum(piece.count * piece.local_rows for piece in self.pieces) / self.piece.local_rows

    @cached_property
    def fullest(self) -> "Partition":
        """The shares of the microbatch of which a device has most."""
        place, largest = max(enumerate(self.pieces), key=lambda pair: pair[1].local_rows)
        if largest.local_rows == self.piece.local_rows:
            return self
        return Partition(self.program, self.plan, self.pieces, place=place, flat_state=self.flat_state)

    def group(self, axis: str) -> Group:
        """The devices along an axis: the plan's last axis joins neighbours."""
        names = list(self.plan.axes)
        stride = math.prod(self.plan.axes[name] for name in names[names.index(axis) + 1 :])
        return Group(self.plan.axes[axis], stride, self.plan.device_count)

    def split(self, dims: Iterable[str], axis: str) -> str:
        """The dim that is split along an axis, or "".

        Args:
            dims: dims of a tensor or an operation.
            axis: name of a mesh axis.
        """
        for dim in self._orders[axis]:
            if dim in dims:
                return dim
        return ""

    def local_bytes(self, tensor: Tensor) -> float:
        """Bytes of a device's part of a tensor, of one microbatch, as operations use it."""
        if tensor.name not in self._local:
            self._local[tensor.name] = tensor.bytes * self.fraction(tensor.dims)
        return self._local[tensor.name]

    def stored_bytes(self, tensor: Tensor) -> float:
        """Bytes of a device's part of a tensor of the training state, at rest: split once more where `store` says so."""
        return self.local_bytes(tensor) / self.stored_parts(tensor, tensor.role)

    def stored_parts(self, tensor: Tensor, role: str) -> int:
        """Into how many parts `store` splits a tensor further that is stored in a role: 1 where it does not, or no dimension divides.

        Args:
            tensor: a parameter, or what has its shape and dims.
            role: "parameter", "gradient" or "slot".
        """
        axis = self.plan.store.get(role, "")
        if not axis or self.split(tensor.dims, axis):
            return 1
        divided = tensor.size >= self.shards(axis) if self.flat_state else {axis, GROUP} & set(split_to_store(tensor, self.plan, role))
        return self.shards(axis) if divided else 1

    def shards(self, axis: str) -> int:
        """Parts into which state is split along an axis."""
        return self.plan.store_group or self.plan.axes[axis]

    def of(self, operation: Operation) -> Share:
        """A device's part of an operation of the program."""
        if id(operation) not in self._shares:
            self._shares[id(operation)] = self._work_out(operation)
        return self._shares[id(operation)]

    def _work_out(self, operation: Operation) -> Share:
        tensors = self.program.tensors
        inputs, outputs = [tensors[name] for name in operation.inputs], [tensors[name] for name in operation.outputs]
        dims = {dim for tensor in (*inputs, *outputs) for dim in tensor.dims}
        cuts = [dim for axis in self._orders if (dim := self.split(dims, axis))]
        # What a loop hands from turn to turn is listed with it, but exchanged by the operations inside.
        exchanged = () if operation.kind == "loop" else cuts
        exchanges = tuple(exchange for cut in exchanged for exchange in self._exchanges(cut, inputs, outputs))
        whole = sum(tensor.bytes for tensor in (*inputs, *outputs)) or 1
        local = sum(tensor.bytes * self._within(tensor, cuts) for tensor in (*inputs, *outputs))
        batch = ["batch"] if "batch" in dims and "batch" not in cuts else []
        share = math.prod(self._fractions[dim] for dim in (*cuts, *batch))
        shape = self._shape(operation, inputs, (*cuts, *batch))
        return Share(flops=operation.flops * share, bytes=operation.bytes * local / whole, shape=shape, exchanges=exchanges)

    def _fraction_of(self, dim: str, parts: int) -> float:
        """The largest part of a dim."""
        size = self.program.sizes.get(dim, 1)
        return math.ceil(size / parts) / size

    def fraction(self, dims: Iterable[str]) -> float:
        """A device's part of what has these dims, of one microbatch."""
        cuts = [dim for axis in self._orders if (dim := self.split(dims, axis))]
        if "batch" in dims and "batch" not in cuts:
            cuts.append("batch")
        return math.prod(self._fractions[dim] for dim in cuts)

    def _within(self, tensor: Tensor, cuts: list[str]) -> float:
        """The part of a tensor that the operation touches: split along the operation's dims, whole along all others."""
        touched = [dim for dim in cuts if dim in tensor.dims]
        if "batch" in tensor.dims and "batch" not in touched:
            touched.append("batch")
        return math.prod(self._fractions[dim] for dim in touched)

    def _exchanges(self, cut: str, inputs: list[Tensor], outputs: list[Tensor]) -> Iterable[Exchange]:
        axis = self.plan.compute[cut]
        for tensor in inputs:
            if cut not in tensor.dims and (own := self.split(tensor.dims, axis)):
                yield Exchange(kind=ALL_GATHER, axis=axis, tensor=tensor, bytes=self.local_bytes(tensor) / self._fractions[own])
        for tensor in outputs:
            if cut not in tensor.dims:
                own = self.split(tensor.dims, axis)
                nbytes = self.local_bytes(tensor) / (self._fractions[own] if own else 1)
                yield Exchange(kind=REDUCE_SCATTER if own else ALL_REDUCE, axis=axis, tensor=tensor, bytes=nbytes)

    def _shape(self, operation: Operation, inputs: list[Tensor], cuts: tuple[str, ...]) -> tuple[float, ...]:
        if not operation.shape:
            return ()
        shape = list(operation.shape)
        for dim in cuts:
            place = _place(dim, operation, inputs)
            shape[place] = max(1, math.ceil(shape[place] * self._fractions[dim] - 1e-9))
        return tuple(shape)


def _place(dim: str, operation: Operation, inputs: list[Tensor]) -> int:
    """Which of a product's (batches, rows, inner, columns) a dim belongs to."""
    if dim in operation.contracted:
        return 2
    having = [dim in tensor.dims for tensor in inputs]
    if all(having):
        return 0
    return 1 if having[0] else 3
