"""Recomputation on an XLA:CPU that drops the barriers of `jax.checkpoint` and merges what is computed twice (JAX 0.10.0 to 0.11.0)."""

from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp

from parafit.backends.cpu.versions import BARRIERS_HOLD_SINCE, jaxlib_version


def drops_barriers() -> bool:
    """Whether this compiler merges what `jax.checkpoint` wants computed twice."""
    return jaxlib_version() < BARRIERS_HOLD_SINCE


def recomputed_in_loop(segment: Callable, moving: Collection[int]) -> Callable:
    """`segment`, that keeps only its inputs for its backward pass, by other means than `jax.checkpoint`.

    A loop it can neither merge nor move before the gradients that enter it. That it runs once, and that its inputs do not change
    with its turns, is hidden from the compiler; should it run twice, because a gradient is NaN, the result is the same.

    Args:
        segment: a function of arrays.
        moving: which of its arguments, by index, are not weights.
    """

    def forward(*inputs):
        return segment(*inputs), inputs

    def backward(inputs, gradients):
        smooth = [index for index, value in enumerate(inputs) if jnp.issubdtype(value.dtype, jnp.inexact)]

        def again(carry):
            turn, _ = carry
            held = [_held(value, turn) if index in moving else value for index, value in enumerate(inputs)]

            def of_smooth(*values):
                given = dict(zip(smooth, values))
                return segment(*(given.get(index, value) for index, value in enumerate(held)))

            return turn + 1, jax.vjp(of_smooth, *(held[index] for index in smooth))[1](gradients)

        flowing = [value for value in gradients if value.dtype != jax.dtypes.float0]
        if not flowing:  # it makes whole numbers only, such as random bits
            return (None,) * len(inputs)
        # Summed, for to take one number out of an array that is split, XLA would gather it whole.
        total = jnp.sum(min(flowing, key=lambda value: value.size))
        turns = 1 + (total != total).astype(jnp.int32)
        start = jnp.int32(0), tuple(jnp.zeros_like(inputs[index]) for index in smooth)
        found = dict(zip(smooth, jax.lax.while_loop(lambda carry: carry[0] < turns, again, start)[1]))
        return tuple(found.get(index) for index in range(len(inputs)))

    run = jax.custom_vjp(lambda *inputs: segment(*inputs))
    run.defvjp(forward, backward)
    return run


def _held(value, turn):
    """The value itself, in a form that the compiler takes to depend on the turn."""
    return jnp.where(turn < 2, value, jnp.zeros_like(value)) if not jax.numpy.issubdtype(value.dtype, jax.dtypes.extended) else value
