"""`Program`: what one training step computes. Plain Python: imports neither JAX nor Keras.

A program is a list of operations over named tensors, in the order they run. Every dimension of every tensor carries the
name of its **dim**: the class of dimensions that the operations tie together (the columns of one kernel are the columns
of its bias, of the activation, and the rows of the next kernel). A layout maps dims to mesh axes, so one line of a plan
says how everything that shares the dim is split.

Identical blocks are written once: the tensors and operations of a block that occurs twelve times carry `count=12`.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

ROLES = ("parameter", "slot", "state", "input", "activation", "gradient")
"""What a tensor is: a trained weight; an optimiser's slot; other state (statistics, seeds, metrics); a batch's array; a
result of the forward pass, or of the backward pass on the way; the gradient of a parameter."""

BUFFERED = ("inputs", "activations", "gradients", "temporaries")
"""What memory is for that a step needs for some time: a copy of its batch, results of the forward pass, gradients, all else."""

PHASES = ("forward", "backward", "update")

KINDS = (
    "matmul",
    "convolution",
    "attention",
    "elementwise",
    "reduction",
    "pooling",
    "normalisation",
    "gather",
    "scatter",
    "sort",
    "random",
    "move",
    "loop",
    "unknown",
)
"""What an operation does, as far as its price depends on it. "pooling" takes windows, or is its gradient; "attention" is a fused
softmax(QKᵀ)V; "move" a copy or transpose; "loop" a sequential loop; "unknown" is replicated on every device and listed to the user."""


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """What an array is that a step is given or gives back.

    Attributes:
        name: unique among the step's arrays; of a parameter, the path of its variable.
        role: one of `ROLES`.
        like: of a slot, the name of the parameter that it is shaped like.
    """

    name: str
    role: str
    like: str = ""

    @property
    def parameter(self) -> str:
        """The name by which a layout knows how it is split: its parameter's, where it is a parameter, its gradient or a slot."""
        return self.like or self.name


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """An array of the program.

    Attributes:
        name: unique in the program; of a parameter, the variable's path ("block0/dense/kernel").
        shape: sizes of its dimensions, for the global batch.
        dims: the dim of each dimension; "" where a dimension is tied to none (size 1, or made by a reshape that mixes dims).
        itemsize: bytes of one element.
        role: one of `ROLES`.
        count: how many blocks have such a tensor.
    """

    name: str
    shape: tuple[int, ...]
    dims: tuple[str, ...]
    itemsize: int = 4
    role: str = "activation"
    count: int = 1

    @cached_property
    def size(self) -> int:
        """Elements of one such tensor."""
        return math.prod(self.shape)

    @cached_property
    def bytes(self) -> int:
        """Bytes of one such tensor, whole."""
        return self.size * self.itemsize


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operation on tensors.

    Attributes:
        name: the layer it belongs to ("block0/dense"), "" where unknown.
        kind: one of `KINDS`.
        phase: one of `PHASES`.
        inputs: names of the tensors it reads.
        outputs: names of the tensors it writes.
        flops: floating-point operations of one run, over the global batch (a multiplication and an addition are two).
        functions: how many exponentials, hyperbolic tangents, divisions and the like are among them.
        bytes: bytes it must move to and from memory in one run, fused neighbours left out.
        contracted: dims it sums over: where one is split, the result is a partial sum on each device.
        shape: of a matmul (batches, rows, inner, columns), whole; empty otherwise.
        count: how many blocks run it.
        steps: how many times one after the other a loop runs it inside one block.
        again: it was done in the forward pass already, and is repeated for the backward pass.
    """

    name: str
    kind: str
    phase: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    flops: float = 0.0
    functions: float = 0.0
    bytes: float = 0.0
    contracted: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()
    count: int = 1
    steps: int = 1
    again: bool = False

    @property
    def label(self) -> str:
        """What its time is listed under: when it runs and what it does."""
        return f"{'recompute' if self.again else self.phase} {self.kind}"


@dataclass(frozen=True, kw_only=True)
class Buffer:
    """Memory that a compiled step needs for some time, beside its state.

    Attributes:
        part: one of `BUFFERED`, after the array it is made for.
        bytes: for the global batch.
        dims: of that array, as far as the program's tensors have them.
        first, last: the moments from which and up to which it is needed.
    """

    part: str
    bytes: int
    dims: tuple[str, ...]
    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class Program:
    """What one training step computes.

    Attributes:
        name: the model's name.
        operations: in the order they run: forward, backward, update.
        tensors: by name.
        sizes: size of each dim by its name; the rows of the batch are the dim "batch".
        unknown: names of primitives that are replicated because parafit does not know how they split.
        couples_batch: why the rows of a batch are not independent ("" where they are): batch statistics.
        fixed: dims that some operation cannot split (windows slide over it, a sort or a loop runs along it, a slice cuts it).
        buffers: what the compiled step holds, where its compiler is known; else memory follows from the operations.
        recomputing: gives the program of the same step with recomputation, with the same names of dims, or None; where there is none to
            ask, blocks that are counted more than once are what is computed again.

    >>> x = Tensor(name="x", shape=(32, 784), dims=("batch", "pixels"), role="input")
    >>> w = Tensor(name="w", shape=(784, 10), dims=("pixels", "classes"), role="parameter")
    >>> y = Tensor(name="y", shape=(32, 10), dims=("batch", "classes"))
    >>> dot = Operation(name="dense", kind="matmul", phase="forward", inputs=("x", "w"), outputs=("y",),
    ...                 flops=2 * 32 * 784 * 10, contracted=("pixels",), shape=(1, 32, 784, 10))
    >>> program = Program(name="one", operations=(dot,), tensors={t.name: t for t in (x, w, y)},
    ...                   sizes={"batch": 32, "pixels": 784, "classes": 10})
    >>> program.flops, program.bytes_of("parameter")
    (501760.0, 31360)
    """

    name: str
    operations: tuple[Operation, ...]
    tensors: Mapping[str, Tensor]
    sizes: Mapping[str, int]
    unknown: tuple[str, ...] = ()
    couples_batch: str = ""
    fixed: frozenset[str] = frozenset()
    buffers: tuple[Buffer, ...] = ()
    recomputing: "Callable[[], Program | None] | None" = None

    @cached_property
    def recomputed(self) -> "Program | None":
        """The program of the same step with recomputation, itself where its blocks are counted; None where nothing would be repeated."""
        if self.recomputing is not None:
            return self.recomputing()
        return self if any(operation.count > 1 for operation in self.operations) else None

    @cached_property
    def flops(self) -> float:
        """Floating-point operations of one step over the global batch."""
        return float(sum(operation.flops * operation.count * operation.steps for operation in self.operations))

    def of_role(self, role: str) -> tuple[Tensor, ...]:
        """The tensors of a role."""
        return tuple(tensor for tensor in self.tensors.values() if tensor.role == role)

    def bytes_of(self, role: str) -> int:
        """Bytes of all tensors of a role, whole, over all blocks."""
        return sum(tensor.bytes * tensor.count for tensor in self.of_role(role))


def with_dims_of(program: Program, other: Program) -> Program:
    """`other`, which has the same arguments as `program`, with the names that their dims have there.

    Args:
        program: whose names count.
        other: what is renamed; dims that no argument has keep their names, or get new ones where those are taken.
    """
    given = [tensor for tensor in program.tensors.values() if tensor.role not in ("activation", "gradient")]
    names = {theirs: ours for tensor in given for ours, theirs in zip(tensor.dims, other.tensors[tensor.name].dims) if theirs}
    names |= {name: f"{name} again" for name in other.sizes if name not in names and name in names.values()}

    def renamed(dims: Iterable[str]) -> tuple[str, ...]:
        return tuple(names.get(dim, dim) for dim in dims)

    return replace(
        other,
        operations=tuple(replace(operation, contracted=renamed(operation.contracted)) for operation in other.operations),
        tensors={name: replace(tensor, dims=renamed(tensor.dims)) for name, tensor in other.tensors.items()},
        sizes={names.get(name, name): size for name, size in other.sizes.items()},
        fixed=frozenset(renamed(other.fixed)),
    )


def told_apart(names: Iterable[str]) -> list[str]:
    """Names, equal ones numbered from the second on.

    >>> told_apart(["kernel", "kernel_2", "kernel", "kernel"])
    ['kernel', 'kernel_2', 'kernel_3', 'kernel_4']
    """
    found: dict[str, None] = {}
    for name in names:
        numbered = (f"{name}_{number}" for number in itertools.count(2))
        found[next(each for each in itertools.chain([name], numbered) if each not in found)] = None
    return list(found)
