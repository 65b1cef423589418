"""Recomputation: a traced loss cut into segments, of which only what passes between them is kept for the backward pass.

Keeping the activations of n equal layers takes memory n; in segments of k layers it takes n / k for what is kept and k for the segment
that is being computed again: least at k = √n (Chen et al. 2016, "Training deep nets with sublinear memory cost").
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun

from parafit import backends
from parafit.tracing.inline import read

_MOST_TRIED = 64


def in_segments(loss: Callable) -> Callable:
    """`loss` with the same values and gradients, that keeps fewer activations for its backward pass.

    Args:
        loss: a function of pytrees of arrays, the weights first, returning a pytree of arrays.

    >>> import jax.numpy as jnp
    >>> def loss(weights, x):
    ...     for weight in weights:
    ...         x = jnp.tanh(x @ weight)
    ...     return jnp.sum(x)
    >>> weights, x = [jnp.eye(3)] * 9, jnp.ones((2, 3))
    >>> bool(jnp.allclose(jax.grad(in_segments(loss))(weights, x)[4], jax.grad(loss)(weights, x)[4]))
    True
    """

    def segmented(*args):
        closed, shapes = jax.make_jaxpr(loss, return_shape=True)(*args)
        weights = set(closed.jaxpr.invars[: len(jax.tree.leaves(args[0]))])
        outputs = _run(closed, _best_cuts(closed.jaxpr), jax.tree.leaves(args), weights)
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return segmented


def _run(closed: ClosedJaxpr, cuts: Sequence[int], arguments: Sequence[Any], weights: set[Var]) -> list:
    """The values of a traced function, each stretch of equations between two cuts a segment of its own."""
    jaxpr = closed.jaxpr
    values: dict[Var, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *arguments)))
    for start, end in zip((0, *cuts), (*cuts, len(jaxpr.eqns))):
        inputs, outputs = _ends(jaxpr, start, end)
        segment = jaxpr_as_fun(ClosedJaxpr(_part(jaxpr, jaxpr.eqns[start:end], inputs, outputs), ()))
        # The last segment's backward pass follows at once: nothing would be gained by computing it again.
        moving = {index for index, var in enumerate(inputs) if var not in weights}
        run = backends.current().recompute(segment, moving) if end < len(jaxpr.eqns) else segment
        values.update(zip(outputs, run(*(values[var] for var in inputs))))
    return [var.val if isinstance(var, Literal) else values[var] for var in jaxpr.outvars]


def _ends(jaxpr: Jaxpr, start: int, end: int) -> tuple[list[Var], list[Var]]:
    """What a stretch of equations reads from before, and what it makes that is read after."""
    made = [var for equation in jaxpr.eqns[start:end] for var in equation.outvars]
    read_after = {var for equation in jaxpr.eqns[end:] for var in read(equation)} | {var for var in jaxpr.outvars if isinstance(var, Var)}
    own = set(made)
    inputs = dict.fromkeys(var for equation in jaxpr.eqns[start:end] for var in read(equation) if var not in own)
    return list(inputs), [var for var in made if var in read_after]


def _part(jaxpr: Jaxpr, equations: Sequence[JaxprEqn], inputs: list[Var], outputs: list[Var]) -> Jaxpr:
    debug = jaxpr.debug_info._replace(arg_names=("",) * len(inputs), result_paths=("",) * len(outputs))
    return jaxpr.replace(eqns=list(equations), invars=inputs, outvars=outputs, constvars=(), debug_info=debug)


def _best_cuts(jaxpr: Jaxpr) -> list[int]:
    """Where to cut so that what is kept and the largest segment take the fewest bytes together."""
    made, passing = _made_bytes(jaxpr), _passing_bytes(jaxpr)
    tried = ([], *(_cuts(made, passing, count) for count in range(2, min(_MOST_TRIED, len(made)) + 1)))
    return min(tried, key=lambda cuts: _peak(made, passing, cuts))


def _made_bytes(jaxpr: Jaxpr) -> list[int]:
    """Bytes that each equation makes."""
    return [sum(_bytes(var) for var in equation.outvars) for equation in jaxpr.eqns]


def _passing_bytes(jaxpr: Jaxpr) -> list[int]:
    """Bytes made before each equation, and before the end, that are read from there on."""
    born = {var: index for index, equation in enumerate(jaxpr.eqns) for var in equation.outvars}
    last = {var: index for index, equation in enumerate(jaxpr.eqns) for var in read(equation)}
    last |= {var: len(jaxpr.eqns) for var in jaxpr.outvars if isinstance(var, Var)}
    changes = [0] * (len(jaxpr.eqns) + 2)
    for var, index in born.items():
        if var in last:
            changes[index + 1] += _bytes(var)
            changes[last[var] + 1] -= _bytes(var)
    passing, total = [], 0
    for change in changes[:-1]:
        total += change
        passing.append(total)
    return passing


def _cuts(made: Sequence[int], passing: Sequence[int], count: int) -> list[int]:
    """Cuts into so many segments that make about as many bytes each, moved to where the least passes."""
    share = sum(made) / count
    cuts: list[int] = []
    start, here = 0, 0
    for index, size in enumerate(made):
        here += size
        if here >= share and index + 1 < len(made):
            middle = (start + index + 1) // 2
            cut = min(range(max(start, middle) + 1, index + 2), key=lambda place: (passing[place], -place))
            cuts.append(cut)
            start, here = cut, sum(made[cut : index + 1])
    return cuts


def _peak(made: Sequence[int], passing: Sequence[int], cuts: Sequence[int]) -> int:
    segments = [sum(made[start:end]) for start, end in zip((0, *cuts), (*cuts, len(made)))]
    return sum(passing[cut] for cut in cuts) + max(segments)


def _bytes(var: Any) -> int:
    return var.aval.size * var.aval.dtype.itemsize if hasattr(var.aval, "dtype") and hasattr(var.aval.dtype, "itemsize") else 0
