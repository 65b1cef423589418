"""The last good state: what a model holds after a run whose loss became NaN, or that was cut off in the middle of a step."""

import time
from typing import Any

import jax
import numpy as np

from parafit.adapt import State

SHARE = 0.01
"""Copying takes at most this share of the time: a small network is copied before every group, a large one now and then."""
# A training state holds the trainable weights, the other weights, the optimizer's variables and the metrics.
_WEIGHT_GROUPS = 2
_GUARDED_GROUPS = 3


class Safeguard:
    """A copy of the training state in host memory, renewed as often as `SHARE` allows, and only with finite values.

    The first copy, at the start, is of weights and scalars alone: averages kept by an optimizer start from zero there.
    """

    def __init__(self):
        self._copy: Any = None
        self._time = self._due = -np.inf

    def update(self, state: State) -> None:
        """Copy the state if it is time and it is good."""
        started = time.perf_counter()
        if started < self._due:
            return
        first = self._copy is None
        copy = [
            [np.array(array) if _is_kept(number, array, first) else None for array in group]
            for number, group in enumerate(state[:_GUARDED_GROUPS])
        ]
        if all(_is_good(array) for array in jax.tree.leaves(copy)):
            self._copy, self._time = copy, started
        now = time.perf_counter()
        self._due = now + (now - started) / SHARE

    def mend(self, state: State) -> tuple[State, float]:
        """The last good state with the metrics of now, and how many seconds old it is."""
        mended = ([_better(*pair) for pair in zip(group, copies)] for group, copies in zip(state, self._copy))
        return (*mended, *state[_GUARDED_GROUPS:]), time.perf_counter() - self._time


def _is_kept(group_number: int, array, first: bool) -> bool:
    return not first or group_number < _WEIGHT_GROUPS or array.ndim == 0


def _is_good(array) -> bool:
    return not jax.numpy.issubdtype(array.dtype, np.inexact) or bool(np.isfinite(np.sum(array, dtype=np.float64)))


def _better(array, copy) -> jax.Array:
    return jax.numpy.zeros(array.shape, array.dtype) if copy is None else jax.numpy.asarray(copy)
