"""Where the arrays of a step live under a plan: dims found for its axes, and a split for every parameter. Plain Python.

Splitting the inner width of a block over "tensor" makes its first kernel split by columns and its second by rows, with one sum
over the axis at the block's end: Megatron's layout (Shoeybi et al. 2019). Splitting what is stored over "data" is
ZeRO (Rajbhandari et al. 2020).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from parafit.errors import PlanError
from parafit.planner.plan import AXES, Plan
from parafit.planner.program import Operation, Program, Tensor

Spec = tuple[str | None, ...]
"""For each dimension of an array the axis it is split over, None where it is whole."""


GROUP = "group"
"""The part of the store axis inside which state is split, where a plan has a `store_group`."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where each parameter lives, by its path; what is not in it is whole on every device.

    Attributes:
        compute: as operations read it.
        store: by role ("parameter", "gradient", "slot") as it rests between steps.
    """

    compute: Mapping[str, Spec] = field(default_factory=dict)
    store: Mapping[str, Mapping[str, Spec]] = field(default_factory=dict)

    def __hash__(self):
        return hash((tuple(self.compute.items()), tuple(self.store)))


def resolve(program: Program, plan: Plan) -> Plan:
    """The plan with "inner" replaced by the program's own dims, and every mapped dim checked.

    Args:
        program: the step to run.
        plan: a plan as `Plan.parse` makes it, or one that names dims.

    Returns:
        A plan whose `compute` names dims of the program (and "batch", and "blocks" where it has a pipeline).

    Raises:
        PlanError: a dim that the program does not have or that its axis does not divide, or an axis that would split nothing.

    >>> x = Tensor(name="x", shape=(32, 8), dims=("batch", "f"), role="input")
    >>> a = Tensor(name="a", shape=(8, 64), dims=("f", "h"), role="parameter")
    >>> b = Tensor(name="b", shape=(64, 3), dims=("h", "c"), role="parameter")
    >>> y, z = (Tensor(name=n, shape=(32, w), dims=("batch", d)) for n, w, d in (("y", 64, "h"), ("z", 3, "c")))
    >>> one = Operation(name="1", kind="matmul", phase="forward", inputs=("x", "a"), outputs=("y",), flops=32768, contracted=("f",))
    >>> two = Operation(name="2", kind="matmul", phase="forward", inputs=("y", "b"), outputs=("z",), flops=12288, contracted=("h",))
    >>> mlp = Program(name="mlp", operations=(one, two), tensors={t.name: t for t in (x, a, b, y, z)},
    ...               sizes={"batch": 32, "f": 8, "h": 64, "c": 3})
    >>> plan = resolve(mlp, Plan.parse("data=2,tensor=4"))
    >>> dict(plan.compute)
    {'batch': 'data', 'h': 'tensor'}
    >>> lay_out(mlp.tensors.values(), plan).compute
    {'a': (None, 'tensor'), 'b': ('tensor', None)}
    """
    compute: dict[str, str] = {}
    for dim, axis in plan.compute.items():
        if dim == "inner":
            compute |= dict.fromkeys(_inner_dims(program, axis, plan.axes[axis]), axis)
        else:
            _check_dim(program, dim, axis, plan.axes[axis])
            compute[dim] = axis
    return replace(plan, compute=compute)


def lay_out(tensors: Iterable[Tensor], plan: Plan) -> Layout:
    """The layout of parameters (and other state with dims) under a resolved plan.

    Args:
        tensors: parameters and state; those of another role are passed over. Dims may be "" where nothing is known of them.
        plan: a resolved plan.
    """
    kept = [tensor for tensor in tensors if tensor.role in ("parameter", "state")]
    compute = {tensor.name: split_by_dims(tensor, plan) for tensor in kept}
    parameters = [tensor for tensor in kept if tensor.role == "parameter"]
    store = {role: {tensor.name: split_to_store(tensor, plan, role) for tensor in parameters} for role in plan.store}
    whole = {tensor.name: compute[tensor.name] for tensor in parameters}
    return Layout(compute=compute, store={"parameter": whole, "gradient": whole, "slot": whole} | store)


def split_by_dims(tensor: Tensor, plan: Plan) -> Spec:
    """How a tensor is split while operations run: for each axis along the first of its dims that the plan maps to it and it divides.

    Args:
        tensor: of the program.
        plan: a resolved plan.
    """
    spec: list[str | None] = [None] * len(tensor.shape)
    for dim, axis in plan.compute.items():
        if axis in spec or dim not in tensor.dims:
            continue
        position = tensor.dims.index(dim)
        if spec[position] is None and tensor.shape[position] % plan.axes[axis] == 0:
            spec[position] = axis
    return tuple(spec)


def split_to_store(tensor: Tensor, plan: Plan, role: str) -> Spec:
    """How what is like a parameter rests as one of the stored roles: its largest dimension that is whole and divides is split as well.

    Args:
        tensor: a parameter, or what is like one.
        plan: a resolved plan.
        role: "parameter", "gradient" or "slot".
    """
    spec = split_by_dims(tensor, plan)
    return _split_further(tensor.shape, spec, *_store_axis(plan, role)) if role in plan.store else spec


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Microbatches of one size.

    Attributes:
        count: how many there are.
        rows: of each.
        devices: that share it between them: 1 where they do not divide it and each has all of it.
    """

    count: int
    rows: float
    devices: int

    @property
    def local_rows(self) -> float:
        """Rows of each that a device computes."""
        return self.rows / self.devices


def pieces(rows: int, plan: Plan) -> tuple[Piece, ...]:
    """The microbatches of a batch: equal ones, as large as the devices divide, then a smaller one where rows are left.

    What the devices do not divide, each has whole. Where microbatches have their own statistics, the devices do not matter: the first rows
    of the batch, in order, are the first microbatch on every layout.

    Args:
        rows: of the batch.
        plan: that cuts and splits it.

    >>> pieces(64, Plan.parse("data=4,microbatches=2"))
    (Piece(count=2, rows=32, devices=4),)
    >>> pieces(127, Plan.parse("data=8,microbatches=16"))
    (Piece(count=15, rows=8, devices=8), Piece(count=1, rows=7, devices=1))
    >>> pieces(12, Plan.parse("data=4,microbatches=2"))
    (Piece(count=1, rows=8, devices=4), Piece(count=1, rows=4, devices=4))
    >>> pieces(12, Plan.parse("data=4,microbatches=2,statistics=microbatch"))
    (Piece(count=2, rows=6, devices=1),)
    """
    devices = plan.axes.get(plan.compute.get(AXES["data"], ""), 1)
    divided = -(-rows // (devices * plan.microbatches)) * devices
    splits = plan.microbatches > 1 and divided <= rows and plan.statistics == "batch"
    size = divided if splits else -(-rows // plan.microbatches)
    cut = [(rows // size, size), (1, rows % size)]
    return tuple(Piece(count=count, rows=each, devices=1 if each % devices else devices) for count, each in cut if each)


def undivided(rows: int, plan: Plan) -> str:
    """What a plan does not split of a batch, in words, and which sizes near by it would split; "" where it splits all of it.

    Args:
        rows: of the batch.
        plan: a plan, resolved or not.

    >>> undivided(127, Plan.parse("data=8"))
    'data=8 does not divide a batch of 127 rows: every device computes all of them, 8 times its part (120 or 128 rows would be split)'
    >>> undivided(128, Plan.parse("data=8"))
    ''
    """
    axis = plan.compute.get(AXES["data"], "")
    whole = [piece for piece in pieces(rows, plan) if axis and piece.devices == 1]
    if not whole:
        return ""
    step = plan.axes[axis] * plan.microbatches
    sizes = " or ".join(str(size) for size in (rows // step * step, (rows // step + 1) * step) if size)
    left = sum(piece.count * piece.rows for piece in whole)
    more = sum(piece.count * piece.local_rows for piece in pieces(rows, plan)) * plan.axes[axis] / rows
    parts = f" in {plan.microbatches} microbatches" if plan.microbatches > 1 else ""
    which = "all of them" if left == rows else f"{left} of them"
    return (
        f"{axis}={plan.axes[axis]} does not divide a batch of {rows} row{'s' * (rows > 1)}{parts}: "
        f"every device computes {which}, {more:.2g} times its part ({sizes} rows would be split)"
    )


def axis_size(plan: Plan, axis: str | None) -> int:
    """How many parts an entry of a `Spec` makes of its dimension.

    Args:
        plan: whose axes they are.
        axis: the entry: an axis, `GROUP`, or None for a whole dimension.
    """
    if axis is None:
        return 1
    return plan.store_group if axis == GROUP else plan.axes[axis]


def _store_axis(plan: Plan, role: str) -> tuple[str, int]:
    axis = plan.store[role]
    grouped = 0 < plan.store_group < plan.axes[axis]
    return (GROUP, plan.store_group) if grouped else (axis, plan.axes[axis])


def _split_further(shape: tuple[int, ...], spec: Spec, axis: str, size: int) -> Spec:
    """`spec` with the largest dimension that is still whole, and that the axis divides, split as well."""
    free = [position for position, taken in enumerate(spec) if taken is None and shape[position] and shape[position] % size == 0]
    if not free or axis in spec:
        return spec
    largest = max(free, key=lambda position: (shape[position], -position))
    return tuple(axis if position == largest else taken for position, taken in enumerate(spec))


def _inner_dims(program: Program, axis: str, size: int) -> list[str]:
    """Dims of kernels to split over an axis: none beside another in one tensor, those first that share out much work for few bytes.

    A dim that is summed over leaves partial sums, whose bytes are its price; what it shares out are the operations it is part of.
    In a chain of layers this takes every other width, in a block its inner width and not the stream between blocks.
    """
    kernels = kernel_dims(program)
    candidates = [dim for dim in kernels if program.sizes[dim] % size == 0]
    given = {dim for tensor in program.of_role("input") for dim in tensor.dims}
    candidates = [
        dim for dim in candidates if dim not in given
    ] or candidates  # what the data brings along: only where nothing else is left
    chosen: list[str] = []
    for dim in sorted(candidates, key=lambda dim: (_summed_bytes(program, dim) / max(_shared_flops(program, dim), 1.0), dim)):
        if _shared_flops(program, dim) and not any(_meet(program, dim, other) for other in chosen):
            chosen.append(dim)
    if not chosen:
        sizes = ", ".join(f"{dim!r} ({program.sizes[dim]})" for dim in kernels) or "none"
        raise PlanError(
            f"axis {axis}={size} splits nothing in {program.name!r}: {size} divides none of the dims that kernels can be "
            f"split along: {sizes}. Choose a size that divides one of them, or leave the axis out."
        )
    return chosen


def kernel_dims(program: Program) -> list[str]:
    """Dims along which kernels can be split: not the batch, not what an operation keeps together, not what a kernel has twice."""
    kernels = [tensor for tensor in program.of_role("parameter") if len(tensor.shape) > 1]
    twice = {dim for tensor in kernels for dim in tensor.dims if tensor.dims.count(dim) > 1}
    refused = program.fixed | twice | {"", AXES["data"]}
    return list(dict.fromkeys(dim for tensor in kernels for dim in tensor.dims if dim not in refused))


def _summed_bytes(program: Program, dim: str) -> float:
    """Bytes of the partial sums that splitting a dim leaves in one step."""
    summing = (operation for operation in program.operations if dim in operation.contracted)
    return sum(program.tensors[name].bytes * operation.count * operation.steps for operation in summing for name in operation.outputs)


def _shared_flops(program: Program, dim: str) -> float:
    """Floating-point operations of one step that splitting a dim shares out."""
    return sum(operation.flops * operation.count * operation.steps for operation in program.operations if dim in _dims(program, operation))


def _dims(program: Program, operation: Operation) -> set[str]:
    names = (name for name in (*operation.inputs, *operation.outputs) if name in program.tensors)
    return {dim for name in names for dim in program.tensors[name].dims}


def _meet(program: Program, one: str, other: str) -> bool:
    return any(one in tensor.dims and other in tensor.dims for tensor in program.tensors.values())


def _check_dim(program: Program, dim: str, axis: str, size: int) -> None:
    one_row = dim == AXES["data"] and dim not in program.sizes  # a batch of one row has no dim, and is whole
    if one_row or (dim == AXES["pipeline"] and axis == "pipeline"):
        return
    if dim not in program.sizes:
        known = ", ".join(sorted(name for name in program.sizes if name))
        raise PlanError(f"the plan maps {dim!r} to axis {axis!r}, but {program.name!r} has no such dim: it has {known}.")
    if dim != AXES["data"] and program.sizes[dim] % size:
        raise PlanError(f"the plan splits dim {dim!r} of size {program.sizes[dim]} over {axis}={size}, which does not divide it.")
