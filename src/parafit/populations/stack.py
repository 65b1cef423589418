"""The states of several members, stacked along a new first dimension: its places are lanes."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from parafit.adapters.step import State

Lanes = Sequence[int]


class Stack:
    """States in lanes, and of each lane the last good one.

    Args:
        states: of the members, equal in shapes; their metrics are as they are at the start of an epoch.

    Attributes:
        state: arrays of shape (lanes, ...).
    """

    def __init__(self, states: Sequence[State]):
        self._fresh = _stacked([state.metrics for state in states])
        self.state: State = jax.device_put(_stacked(states))
        self._good: Any = None

    @property
    def lanes(self) -> int:
        """How many there are."""
        return len(jax.tree.leaves(self.state)[0])

    def read(self, lane: int) -> State:
        """The state of a lane."""
        return _read(self.state, lane)

    def write(self, lane: int, state: State) -> None:
        """Let a lane hold another state; its metrics stay.

        Args:
            lane: its number.
            state: of one member.
        """
        self.state = _write(self.state, lane, _on_device(state._replace(metrics=_read(self.state.metrics, lane))))

    def replace(self, lane: int, state: State) -> None:
        """Let a lane hold another member's state.

        Args:
            lane: its number.
            state: of that member, its metrics as they are at the start of an epoch.
        """
        for kept, array in zip(self._fresh, state.metrics):
            kept[lane] = array
        self.state = _write(self.state, lane, _on_device(state))
        if self._good is not None:
            self._good = _write(self._good, lane, _on_device(_guarded(state)))

    def keep(self) -> None:
        """Remember the states of all lanes that hold finite numbers, to go back to."""
        guarded = _guarded(self.state)
        self._good = _copy(guarded) if self._good is None else _renewed(self._good, guarded)

    def restore(self, lanes: Lanes) -> None:
        """Go back to the last good state in some lanes; their metrics stay as they are."""
        mended = _chosen(_mask(lanes, self.lanes), self._good, _guarded(self.state))
        self.state = mended._replace(metrics=self.state.metrics)

    def reset_metrics(self, lanes: Lanes) -> None:
        """Metrics as they are at the start of an epoch, in some lanes."""
        whole = len(lanes) == self.lanes
        mask = _mask(lanes, self.lanes)
        pairs = zip(self._fresh, self.state.metrics)
        self.state = self.state._replace(metrics=[fresh.copy() if whole else _pick(mask, fresh, held) for fresh, held in pairs])

    def take(self, lanes: Lanes) -> None:
        """Leave only some lanes, in this order; a lane may come twice."""
        chosen = np.asarray(lanes, np.int32)
        self.state = _taken(self.state, chosen)
        self._fresh = [array[chosen] for array in self._fresh]
        self._good = None if self._good is None else _taken(self._good, chosen)

    def recover(self) -> bool:
        """Where a program was cut off while it held the states, go back to the last good ones; gives whether there are any."""
        lost = any(isinstance(array, jax.Array) and array.is_deleted() for array in jax.tree.leaves(self.state))
        if lost and self._good is not None:
            self.state = self._good._replace(metrics=[array.copy() for array in self._fresh])
        return not lost or self._good is not None


def _stacked(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *arrays: np.stack([np.asarray(array) for array in arrays]), *trees)


def _on_device(state: State) -> State:
    return jax.tree.map(jnp.asarray, state)


def _guarded(state: State) -> State:
    return state._replace(metrics=[])


def _mask(lanes: Lanes, count: int) -> np.ndarray:
    mask = np.zeros(count, bool)
    mask[list(lanes)] = True
    return mask


def _pick(mask: np.ndarray, fresh: np.ndarray, held: Any) -> np.ndarray:
    return np.where(mask.reshape((-1,) + (1,) * (fresh.ndim - 1)), fresh, np.asarray(held))


@jax.jit
def _read(tree, lane):
    return jax.tree.map(lambda array: jax.lax.dynamic_index_in_dim(array, lane, keepdims=False), tree)


@jax.jit
def _write(tree, lane, one):
    return jax.tree.map(lambda array, part: jax.lax.dynamic_update_index_in_dim(array, part.astype(array.dtype), lane, 0), tree, one)


@jax.jit
def _taken(tree, lanes):
    return jax.tree.map(lambda array: jnp.take(array, lanes, axis=0), tree)


@jax.jit
def _copy(tree):
    return jax.tree.map(jnp.copy, tree)


@jax.jit
def _chosen(mask, new, old):
    return jax.tree.map(lambda new, old: jnp.where(mask.reshape((-1,) + (1,) * (new.ndim - 1)), new, old), new, old)


@jax.jit
def _renewed(good, state):
    floats = [array for array in jax.tree.leaves(state) if jnp.issubdtype(array.dtype, jnp.inexact)]
    finite = [jnp.isfinite(array).reshape((array.shape[0], -1)).all(axis=1) for array in floats]
    return _chosen(jnp.stack(finite).all(axis=0), state, good) if finite else state
