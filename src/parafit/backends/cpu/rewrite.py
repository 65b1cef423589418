"""Puts the operations that XLA:CPU runs badly, above all inside loops, into forms that it runs well.

A chunk of training steps is one loop, and XLA:CPU's own clean-up of convolutions visits a program's outermost computation only. Other
operations are slow everywhere: kernel gradients of dense layers over more than two dimensions, pooling and its gradients, convolutions of
few channels, strided, depthwise and grouped ones, random bits, `top_k` of few candidates, bfloat16 products. Thresholds are measured
(JAX 0.10.2, 2 cores of a Zen 4 or a Zen 5).
`rewrite_jaxpr` exchanges each such equation of a traced step for one equation that calls a function of plain, fast operations. Every other
equation is kept as the very object it was, with its names, effects and sharding constraints.

The values are those of the original to the rounding of its dtype; random bits, `top_k` and pooling of finite numbers are identical.
"""

import functools
from collections.abc import Callable

from jax.extend.core import ClosedJaxpr, JaxprEqn

from parafit.backends.cpu.bits import choose_random_bits, choose_threefry, choose_top_k
from parafit.backends.cpu.convolutions import choose_convolution, is_kernel_gradient
from parafit.backends.cpu.pools import choose_pool, choose_pool_gradient
from parafit.backends.cpu.products import choose_dot
from parafit.tracing.passes import Exchange, equations


def rewrite_jaxpr(closed: ClosedJaxpr) -> ClosedJaxpr:
    """`closed` with its slow operations exchanged, at every depth; `closed` itself if it has none.

    >>> import jax
    >>> closed = jax.make_jaxpr(lambda x: x + 1)(1.0)
    >>> rewrite_jaxpr(closed) is closed
    True
    """
    trains = any(map(is_kernel_gradient, equations(closed.jaxpr)))
    return Exchange(_CHOOSERS if trains else _CHOOSERS | _FORWARD_CHOOSERS).closed(closed)


_CHOOSERS: dict[str, Callable[[JaxprEqn], Callable | None]] = {
    "conv_general_dilated": choose_convolution,
    "dot_general": choose_dot,
    "random_bits": choose_random_bits,
    "reduce_window_max": choose_pool,
    "reduce_window_sum": choose_pool,
    "select_and_scatter_add": choose_pool_gradient,
    "threefry2x32": choose_threefry,
    "top_k": choose_top_k,
}

_FORWARD_CHOOSERS: dict[str, Callable[[JaxprEqn], Callable | None]] = {
    "conv_general_dilated": functools.partial(choose_convolution, alone=False),
    "reduce_window_max": functools.partial(choose_pool, alone=False),
    "reduce_window_sum": functools.partial(choose_pool, alone=False),
}
"""Without a backward pass, which needs what the convolutions give, XLA:CPU can make a whole network one operation that stays in cache."""
