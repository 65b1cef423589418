"""Random numbers of some rows: those that belong to them in a draw for all rows of a batch.

Partitionable threefry counts elements: element i of a draw depends on the key and on i alone, so rows can be drawn by themselves. Of
other generators all rows are drawn, and some are kept.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.extend.random import threefry2x32_p

from parafit.support.jaxprs import opened, read_branches, read_scan
from parafit.techniques.traces import CALLS, NoShareError, closed_of, pairs, run_equation, tied, value_of


def bits_of_rows(key: jax.Array, numbers: jax.Array, *, shape: tuple[int, ...], dim: int, rows: int, bit_width: int) -> jax.Array:
    """`jax.random.bits(key, shape)` at some rows.

    Args:
        key: one random key.
        numbers: of the rows, int32, of shape (n,).
        shape: of the whole draw.
        dim: the dimension that holds the rows, several places of it one after the other for each where it is a multiple of them.
        rows: of the batch.
        bit_width: of a number: 8, 16, 32 or 64.

    >>> key, numbers = jax.random.key(0), jnp.array([2, 3])
    >>> some = bits_of_rows(key, numbers, shape=(4, 3), dim=0, rows=4, bit_width=32)
    >>> bool((some == jax.random.bits(key, (4, 3))[2:]).all())
    True
    """
    places = places_of_rows(numbers, shape[dim] // rows)
    counted = str(key.dtype) == "key<fry>" and jax.config.jax_threefry_partitionable
    if not counted or math.prod(shape) >= 2**32:
        drawn = jax.random.bits(key, shape, f"uint{bit_width}")
        return jnp.take(drawn, places, axis=dim)
    return _bits(key, _counts(places, shape, dim), bit_width)


def places_of_rows(numbers: jax.Array, each: int) -> jax.Array:
    """Where rows are in a dimension that holds so many places of each row.

    Args:
        numbers: of the rows, whole numbers of shape (rows,).
        each: places of a row.
    """
    return numbers if each == 1 else (numbers[:, None] * each + jnp.arange(each, dtype=numbers.dtype)).reshape(-1)


def _counts(places: jax.Array, shape: tuple[int, ...], dim: int) -> jax.Array:
    """The numbers, in the whole draw, of the elements at these places of one dimension."""
    some = (*shape[:dim], places.shape[0], *shape[dim + 1 :])
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    total: Any = jnp.uint32(0)
    for axis, stride in enumerate(strides):
        along = places.astype(jnp.uint32) if axis == dim else jnp.arange(shape[axis], dtype=jnp.uint32)
        total = total + jax.lax.broadcast_in_dim(along * np.uint32(stride), some, (axis,))
    return total


def _bits(key: jax.Array, counts: jax.Array, bit_width: int) -> jax.Array:
    words = jax.random.key_data(key)
    high, low = threefry2x32_p.bind(words[0], words[1], jnp.zeros_like(counts), counts)
    if bit_width < 64:
        return (high ^ low).astype(f"uint{bit_width}")
    return high.astype("uint64") << 32 | low.astype("uint64")


@dataclass(frozen=True)
class Given:
    """What a microbatch is told: its row numbers, and values of the whole batch."""

    numbers: jax.Array
    known: Sequence[Any]


def draws_differ(ours: JaxprEqn, theirs: JaxprEqn) -> bool:
    """Whether an equation draws, at any depth, other numbers for a part than for the whole.

    Args:
        ours: of the part's trace.
        theirs: of the whole one.
    """
    if ours.primitive.name in _DRAWS:
        return ours.params["shape"] != theirs.params["shape"]
    return any(draws_differ(one, other) for one, other in _inner_pairs(ours, theirs) if other is not None)


def _inner_pairs(ours: JaxprEqn, theirs: JaxprEqn) -> Iterator[tuple[JaxprEqn, JaxprEqn | None]]:
    for one, other in zip(_inner(ours), _inner(theirs)):
        if any(equation.primitive.name in _DRAWS or _inner(equation) for equation in one.eqns):
            yield from pairs(one, other)


def _inner(equation: JaxprEqn) -> list[Jaxpr]:
    values = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda value: isinstance(value, Jaxpr | ClosedJaxpr))
    return [opened(value)[0] for value in values if isinstance(value, Jaxpr | ClosedJaxpr)]


def drawing(ours: JaxprEqn, theirs: JaxprEqn, rows: int, some: int) -> Callable:
    """`(operands, given) -> results` of an equation whose draws are rows of the whole batch's.

    Args:
        ours, theirs: as in `draws_differ`.
        rows: of the batch.
        some: of them, those of the part.
    """
    name = ours.primitive.name
    if name in _DRAWS:
        return _drawn(ours, theirs, rows, some)
    if name in CALLS:
        return _redrawn(_body(ours), _body(theirs), rows, some)
    if name in ("checkpoint", "remat", "remat2"):
        inner, params = _redrawn(_body(ours), _body(theirs), rows, some), ours.params
        options = {"prevent_cse": params.get("prevent_cse", True), "policy": params.get("policy")}
        return lambda operands, given: jax.checkpoint(lambda *values: inner(values, given), **options)(*operands)
    if (loop := read_scan(ours)) is not None and loop.length == theirs.params["length"]:
        return _scanning(ours, loop, _redrawn(closed_of(loop.body), _body(theirs), rows, some))
    if branches := read_branches(ours):
        forms = [_redrawn(closed_of(one), closed_of(other), rows, some) for one, other in zip(branches, read_branches(theirs))]
        return lambda operands, given: jax.lax.switch(
            operands[0], [lambda *values, form=form: form(values, given) for form in forms], *operands[1:]
        )
    again = ", again and again until all have what they need" if name == "while" else ""
    raise NoShareError(tied(ours, f"draws random numbers for all rows of a batch{again}"))


def _scanning(equation: JaxprEqn, loop: Any, body: Callable) -> Callable:
    def form(operands, given):
        fixed, rest = operands[: loop.fixed], operands[loop.fixed :]

        def turn(carry, slices):
            results = body([*fixed, *carry, *slices], given)
            return results[: loop.carried], results[loop.carried :]

        options = {"length": loop.length, "reverse": equation.params["reverse"], "unroll": equation.params["unroll"]}
        carry, collected = jax.lax.scan(turn, list(rest[: loop.carried]), list(rest[loop.carried :]), **options)
        return [*carry, *collected]

    return form


def _body(equation: JaxprEqn) -> ClosedJaxpr:
    return closed_of(equation.params.get("jaxpr", equation.params.get("call_jaxpr")))


def _redrawn(part: ClosedJaxpr, whole: ClosedJaxpr, rows: int, some: int) -> Callable:
    """`(operands, given) -> results` of a jaxpr, its draws rows of the whole batch's."""
    forms = [
        (ours, drawing(ours, theirs, rows, some) if theirs is not None and draws_differ(ours, theirs) else None)
        for ours, theirs in pairs(part.jaxpr, whole.jaxpr)
    ]

    def run(operands, given):
        values: dict[Any, Any] = dict(zip((*part.jaxpr.constvars, *part.jaxpr.invars), (*part.consts, *operands)))
        for equation, form in forms:
            read = [value_of(values, var) for var in equation.invars]
            values.update(zip(equation.outvars, form(read, given) if form else run_equation(equation, read)))
        return [value_of(values, var) for var in part.jaxpr.outvars]

    return run


def _drawn(ours: JaxprEqn, theirs: JaxprEqn, rows: int, some: int) -> Callable:
    shape, whole = ours.params["shape"], theirs.params["shape"]
    differing = [dim for dim, (one, other) in enumerate(zip(shape, whole)) if one != other]
    if (
        len(shape) != len(whole)
        or len(differing) != 1
        or any(whole[dim] * some != shape[dim] * rows or whole[dim] % rows for dim in differing)
    ):
        raise NoShareError(tied(ours, f"draws {whole} random numbers for {rows} rows and {shape} for {some} of them"))
    (dim,) = differing
    if ours.primitive.name == "random_bits" and ours.invars[0].aval.ndim == 0:
        width = ours.params["bit_width"]
        return lambda operands, given: [bits_of_rows(operands[0], given.numbers, shape=whole, dim=dim, rows=rows, bit_width=width)]
    axis = ours.invars[0].aval.ndim + dim
    equation = theirs

    def form(operands, given):
        (drawn,) = run_equation(equation, operands)
        return [jnp.take(drawn, places_of_rows(given.numbers, whole[dim] // rows), axis=axis)]

    return form


_DRAWS = ("random_bits", "random_split")
