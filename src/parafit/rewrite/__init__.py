"""Puts the operations that XLA:CPU runs badly, above all inside loops, into forms that it runs well.

A chunk of training steps is one loop, and XLA:CPU's own clean-up of convolutions visits a program's outermost computation only. Other
operations are slow everywhere: kernel gradients of dense layers over more than two dimensions, pooling and its gradients, convolutions of
few channels, strided, depthwise and grouped ones, random bits, `top_k` of few candidates, bfloat16 products. Thresholds are measured
(JAX 0.10.2, 2 cores of a Zen 4 or a Zen 5).
The first pass exchanges each such equation of a traced step for one equation that calls a function of plain, fast operations. Every other
equation is kept as the very object it was, with its names, effects and sharding constraints.

The values are those of the original to the rounding of its dtype; random bits, `top_k` and pooling of finite numbers are identical.

The second pass, `in_bfloat16`, is for plans that ask for it, on every machine: it rounds the operands of products.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, JaxprEqn, jaxpr_as_fun

from parafit.rewrite.bits import choose_random_bits, choose_top_k
from parafit.rewrite.convolutions import choose_convolution, is_kernel_gradient
from parafit.rewrite.half import HalfProducts
from parafit.rewrite.passes import Pass
from parafit.rewrite.pools import choose_pool, choose_pool_gradient
from parafit.rewrite.products import choose_dot
from parafit.schedule import equations


def rewrite(step: Callable) -> Callable:
    """`step` with its slow operations exchanged: same arguments, same values.

    Args:
        step: a function of pytrees of arrays, returning a pytree of arrays.

    Returns:
        A function that traces `step`, rewrites the trace and evaluates it. Call it under `jax.jit`, which traces it once.

    >>> import jax, jax.numpy as jnp
    >>> best = rewrite(lambda x: {"best": jax.lax.top_k(x, 2)[1]})
    >>> best(jnp.array([3.0, 1.0, 4.0, 4.0]))["best"].tolist()
    [2, 3]
    """

    def rewritten(*args):
        closed, shapes = jax.make_jaxpr(step, return_shape=True)(*args)
        outputs = jaxpr_as_fun(rewrite_jaxpr(closed))(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return rewritten


def rewrite_jaxpr(closed: ClosedJaxpr) -> ClosedJaxpr:
    """`closed` with its slow operations exchanged, at every depth; `closed` itself if it has none.

    >>> import jax
    >>> closed = jax.make_jaxpr(lambda x: x + 1)(1.0)
    >>> rewrite_jaxpr(closed) is closed
    True
    """
    trains = any(map(is_kernel_gradient, equations(closed.jaxpr)))
    return _Rewriter(_CHOOSERS if trains else _CHOOSERS | _FORWARD_CHOOSERS).closed(closed)


def in_bfloat16(closed: ClosedJaxpr) -> ClosedJaxpr:
    """`closed` with float32 products of matrices and convolutions of bfloat16 operands, at every depth; their results stay float32.

    Raises:
        PlanError: it has no such products, nor products of numbers of two bytes.

    >>> import jax, jax.numpy as jnp
    >>> closed = in_bfloat16(jax.make_jaxpr(lambda x: x @ x)(jnp.full((2, 2), 1 + 2**-9)))
    >>> jaxpr_as_fun(closed)(jnp.full((2, 2), 1 + 2**-9))[0].tolist()
    [[2.0, 2.0], [2.0, 2.0]]
    """
    half = HalfProducts()
    halved = _Rewriter(dict.fromkeys(("dot_general", "conv_general_dilated"), half.choose)).closed(closed)
    half.check()
    return halved


class _Rewriter(Pass):
    """A pass that exchanges equations; equal ones share one replacement, so that the lowered program holds it once.

    Args:
        choosers: for primitives by name: `equation -> form`, a function of its operands to call instead, or None to keep the equation.
    """

    def __init__(self, choosers: dict[str, Callable[[JaxprEqn], Callable | None]]):
        super().__init__()
        self.choosers = choosers
        self.replacements: dict[Any, JaxprEqn] = {}

    def equations(self, equation: JaxprEqn) -> list[JaxprEqn]:
        choose = self.choosers.get(equation.primitive.name)
        form = choose(equation) if choose else None
        return [self.exchanged(equation, form)] if form else super().equations(equation)

    def exchanged(self, equation: JaxprEqn, form: Callable) -> JaxprEqn:
        key = equation.primitive, tuple((var.aval.shape, var.aval.dtype) for var in equation.invars), tuple(equation.params.items())
        if key not in self.replacements:
            self.replacements[key] = _call(equation, form)
        call = self.replacements[key]
        return call.replace(
            invars=list(equation.invars), outvars=list(equation.outvars), source_info=equation.source_info, ctx=equation.ctx
        )


def _call(equation: JaxprEqn, form: Callable) -> JaxprEqn:
    """One equation that calls `form` on operands like those of `equation`."""
    form.__name__ = f"fast_{equation.primitive.name.replace('-', '_')}"
    with equation.ctx.manager:  # undocumented (JAX 0.10.2): the mesh and the flags that the equation was traced under
        traced = jax.make_jaxpr(jax.jit(form))(*(jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in equation.invars))
    (call,) = traced.eqns
    assert not traced.consts
    assert list(call.invars) == list(traced.jaxpr.invars)
    assert [(var.aval.shape, var.aval.dtype) for var in call.outvars] == [(var.aval.shape, var.aval.dtype) for var in equation.outvars]
    return call


_CHOOSERS: dict[str, Callable[[JaxprEqn], Callable | None]] = {
    "conv_general_dilated": choose_convolution,
    "dot_general": choose_dot,
    "random_bits": choose_random_bits,
    "reduce_window_max": choose_pool,
    "reduce_window_sum": choose_pool,
    "select_and_scatter_add": choose_pool_gradient,
    "top_k": choose_top_k,
}

_FORWARD_CHOOSERS: dict[str, Callable[[JaxprEqn], Callable | None]] = {
    "conv_general_dilated": functools.partial(choose_convolution, alone=False),
    "reduce_window_max": functools.partial(choose_pool, alone=False),
    "reduce_window_sum": functools.partial(choose_pool, alone=False),
}
"""Without a backward pass, which needs what the convolutions give, XLA:CPU can make a whole network one operation that stays in cache."""
