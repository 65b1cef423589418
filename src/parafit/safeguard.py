"""The last good weights: what is left of a run whose loss became NaN, or that was cut off in the middle of a step."""

import time
from typing import Any

import jax
import numpy as np

from parafit.adapt import State

INTERVAL_SECONDS = 10.0  # Copying the weights this seldom costs less than a hundredth of the run.
_WEIGHT_GROUPS = 2  # A training state starts with the trainable and the other weights.


class Safeguard:
    """A copy of the weights in host memory, renewed every `INTERVAL_SECONDS`.

    A program stops before a step whose loss is not finite, so the weights it leaves are nearly always good. They are not
    where a finite loss had a gradient that was not; then this copy is what is left.

    """

    def __init__(self):
        self._copy: Any = None
        self._time = -np.inf

    def update(self, state: State) -> None:
        """Copy the weights, and scalars such as the learning rate, if it is time and they are good."""
        if time.perf_counter() - self._time < INTERVAL_SECONDS:
            return
        kept = [[np.array(array) if _is_kept(number, array) else None for array in group] for number, group in enumerate(state)]
        if _all_good(jax.tree.leaves(kept)):
            self._copy = kept
        self._time = time.perf_counter()

    def mend(self, state: State) -> tuple[State, str]:
        """The state with good weights, and in words which ones; averages that are not finite start again from zero."""
        if _all_good(jax.tree.leaves(state[:_WEIGHT_GROUPS])):
            return state, "the weights from just before that step"
        seconds = time.perf_counter() - self._time
        mended = tuple([_better(*pair) for pair in zip(group, copies)] for group, copies in zip(state, self._copy))
        return mended, f"the weights from {seconds:.0f} s earlier, because the gradients of the step before were not finite"


def _is_kept(group_number: int, array) -> bool:
    return group_number < _WEIGHT_GROUPS or array.ndim == 0


def _all_good(arrays) -> bool:
    return all(_is_good(array) for array in arrays)


def _is_good(array) -> bool:
    if isinstance(array, jax.Array) and array.is_deleted():
        return False
    return not jax.numpy.issubdtype(array.dtype, np.inexact) or bool(np.isfinite(np.sum(np.asarray(array), dtype=np.float64)))


def _better(array, copy) -> jax.Array:
    if copy is None:
        return array if _is_good(array) else jax.numpy.zeros(array.shape, array.dtype)
    return jax.numpy.asarray(copy)
