"""The last good state: what a model holds after a run whose loss became NaN, or that was cut off in the middle of a step."""

import time
from typing import Any

import jax
import numpy as np

from parafit.adapters.step import State

SHARE = 0.01
"""Copying takes at most this share of the time: a small network is copied before every group, a large one now and then."""
_NEW_BYTES_PER_SECOND = 5e8
"""At which a system gives a process memory that it clears first: measured on a virtual machine, where it takes longest."""


class Snapshot:
    """A copy of the training state in host memory, renewed as often as `SHARE` allows, and only with finite values.

    The first copy, at the start, is of weights and scalars alone, whatever they are: averages kept by an optimizer start from zero there.
    """

    def __init__(self):
        self._copy: Any = None
        self._time = self._due = -np.inf

    def update(self, state: State) -> None:
        """Copy the state if it is time and it is good."""
        started = time.perf_counter()
        if started < self._due:
            return
        guarded = _guarded(state)
        first = self._copy is None
        groups = guarded._asdict().items()
        kept = State(*([np.asarray(array) if _is_kept(name, array, first) else None for array in group] for name, group in groups))
        if first or all(map(is_finite, jax.tree.leaves(kept))):
            before = self._copy or State(*([None] * len(group) for group in kept))
            self._copy = State(*([_copied(*pair) for pair in zip(*groups)] for groups in zip(kept, before)))
            self._time = started
        now = time.perf_counter()
        # What the next copy will take: it is of everything, and what the first left out needs new memory.
        whole, part, held = map(_byte_count, (guarded, kept, self._copy))
        self._due = now + ((now - started) * whole / max(part, 1) + (whole - held) / _NEW_BYTES_PER_SECOND) / SHARE

    def mend(self, state: State) -> tuple[State, float]:
        """The last good state with the metrics of now, and how many seconds old it is."""
        mended = State(*([_better(*pair) for pair in zip(group, copies)] for group, copies in zip(_guarded(state), self._copy)))
        return mended._replace(metrics=state.metrics), time.perf_counter() - self._time


def _guarded(state: State) -> State:
    return state._replace(metrics=[])


def _is_kept(group: str, array, first: bool) -> bool:
    return not first or group in ("weights", "others") or array.ndim == 0


def is_finite(array) -> bool:
    """Whether all numbers are finite, by their sum, which overflows only where they are about to."""
    if not jax.numpy.issubdtype(array.dtype, np.inexact):
        return True
    return bool(np.isfinite(np.sum(array, dtype=np.promote_types(array.dtype, np.float32))))


def _copied(array, copy):
    """A copy of an array, in the memory of the copy before where there is one: the system takes its time to give new memory."""
    if array is None:
        return None
    if copy is None:
        return np.array(array)
    np.copyto(copy, array)
    return copy


def _byte_count(arrays) -> int:
    return sum(array.nbytes for array in jax.tree.leaves(arrays))


def _better(array, copy) -> jax.Array:
    return jax.numpy.zeros(array.shape, array.dtype) if copy is None else jax.numpy.array(copy)
