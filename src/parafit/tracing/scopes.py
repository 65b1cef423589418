"""What an operation's place in the model's text tells: its layer, its pass, and words for the dims of parameters. Plain Python."""

import functools
import re
from collections.abc import Iterable, Sequence

from parafit.tracing.values import Record, Value


@functools.lru_cache(4096)
def layer_of(scope: str) -> str:
    """The layer in a name stack.

    >>> layer_of("transpose(jvp(block0))/attention/query/abc,cde->abde")
    'block0/attention/query'
    """
    plain = re.sub(r"\w+\(|\)", "", scope)
    return "/".join(part for part in plain.split("/") if part and part not in _TRANSFORMS and "->" not in part and "," not in part)


_TRANSFORMS = {"rematted_computation", "checkpoint", "while", "body", "cond", "closed_call"}


def is_again(scope: str) -> bool:
    """Whether what a name stack is of belongs to a forward pass inside a backward pass.

    >>> is_again("transpose(jvp(jvp()))/rematted_computation/dense"), is_again("transpose(jvp())/jvp(dense)/while/body")
    (True, True)
    >>> is_again("transpose(jvp())/transpose(jvp(dense))"), is_again("jvp(dense)")
    (False, False)
    """
    _, backward, inner = scope.partition("transpose(")
    parts = inner.split("/")[1:]
    repeats = "rematted_computation" in parts or any(part.startswith("jvp(") for part in parts)
    return bool(backward) and repeats and not any(part.startswith("transpose(") for part in parts)


def inherited_layer(inputs: list[Value]) -> str:
    """The layer of an operation that does not tell: that of the parameter it reads, else of its first operand that has one."""
    for value in inputs:
        root = value.root()
        if root.role == "parameter":
            return root.layer or root.name.rpartition("/")[0] or root.name
    return next((value.layer for value in inputs if value.layer), "")


def label_of(value: Value) -> str:
    """What a parameter's dims are named after: its layer, or the parameter where its own name tells more."""
    parent, _, last = value.name.rpartition("/")
    return (value.layer or parent or value.name) if last in _PLAIN else value.name


_PLAIN = {"kernel", "weight", "weights", "w", "embeddings", "embedding", "gamma", "scale", "bias", "b", "beta", "recurrent_kernel"}


def shared_folder(names: Sequence[str]) -> str:
    """The folder that all names are in."""
    parts = [name.split("/")[:-1] for name in names]
    shared = [column[0] for column in zip(*parts) if len(set(column)) == 1]
    return "/".join(shared)


def dim_words(equation, record: Record, side: int, value: Value) -> Iterable[tuple[int, str, int]]:
    """(rank, word, dim) of a parameter's dims as an operation uses them.

    Args:
        equation: of the traced step.
        record: made of it.
        side: which of its operands the parameter is.
        value: the parameter.
    """
    params = equation.params
    if record.kind == "matmul":
        sums, batch = params["dimension_numbers"]
        free = [place for place in range(len(value.dims)) if place not in {*sums[side], *batch[side]}]
        words = {1: ["units"], 2: ["heads", "head_size"]}.get(len(free), ["units"] * len(free))
        yield from ((1, word, value.dims[place]) for word, place in zip(words, free))
        yield from ((4, "inputs", value.dims[place]) for place in sums[side])
        yield from ((1, "experts", value.dims[place]) for place in batch[side])
    elif record.kind == "convolution" and side == 1:
        leaving, entering, *windows = params["dimension_numbers"].rhs_spec
        yield 1, "filters", value.dims[leaving]
        yield 4, "channels", value.dims[entering]
        yield from ((1, "window", value.dims[place]) for place in windows)
    elif record.primitive == "gather" and side == 0:
        collapsed = params["dimension_numbers"].collapsed_slice_dims
        yield from ((1, "vocabulary" if place in collapsed else "features", dim) for place, dim in enumerate(value.dims))
    elif record.kind == "elementwise" and len(value.dims) == 1:
        yield from ((2, "features", dim) for dim in value.dims)
