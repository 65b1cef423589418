"""The ceiling: an epoch of a hand-written JAX training loop as one `lax.scan`.

MLPs are written out in `jax.numpy` (`plain_mlp`); the other families scan the `train_step` of the Keras model, which is what
someone would write by hand who wants that model on JAX. The state is donated, loss and accuracy are tracked, and an epoch ends
when they are on the host. Three ways to feed it:

- `cut`: shuffled and cut into batches once, before the clock runs; the bare scan;
- `gather`: all rows on the device; each epoch sends a new order and each step gathers its rows;
- `take`: each epoch takes its rows in a new order on the host, some steps at a time, while the device computes the ones before.
"""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.contenders import plain_mlp
from benchmarks.workloads import Workload

TAKEN_STEPS = 50


def make(workload: Workload, x: np.ndarray, y: np.ndarray, *, feed: str):
    """The contender that feeds its scan by `feed`: `"cut"`, `"gather"` or `"take"`."""
    ways = plain_mlp.program(workload) if workload.family == "mlp" else _keras_program(workload, x, y)
    return {"cut": _Cut, "gather": _Gather, "take": _Take}[feed](*ways, x, y, workload.batch_size)


class _Scan:
    """What the three have in common: `step(state, (x, y)) -> state`, and `measure(state) -> (metrics, state with metrics at zero)`."""

    def __init__(self, state, step, measure, x: np.ndarray, y: np.ndarray, batch_size: int):
        self._state, self._step, self._measure = state, step, measure
        self._arrays, self._batch_size = (x, y), batch_size
        self._scan = jax.jit(self._over_batches, donate_argnums=0)
        self._prepare()

    def train(self, epochs: int) -> list[float]:
        ends = [time.perf_counter()]
        for _ in range(epochs):
            self._epoch()
            metrics, self._state = self._measure(self._state)
            jax.device_get(metrics)
            ends.append(time.perf_counter())
        return np.diff(ends).tolist()

    def _over_batches(self, state, batches):
        return jax.lax.scan(lambda state, batch: (self._step(state, batch), None), state, batches)[0]

    def _prepare(self) -> None:
        """Put on the device what stays there."""

    def _epoch(self) -> None:
        """Run one epoch of steps; what does not fill a batch is one step of its own."""
        raise NotImplementedError

    def _cut(self, rows):
        """`rows` of shape (count, ...) as whole batches (steps, batch_size, ...), and the rest (0 or 1, rest, ...)."""
        whole = len(rows) // self._batch_size * self._batch_size
        return rows[:whole].reshape(-1, self._batch_size, *rows.shape[1:]), rows[whole:][None]


class _Cut(_Scan):
    def _prepare(self):
        order = np.random.permutation(len(self._arrays[0]))
        pieces = [self._cut(array[order]) for array in self._arrays]
        self._pieces = [jax.device_put(tuple(piece)) for piece in zip(*pieces) if piece[0].size]

    def _epoch(self):
        for batches in self._pieces:
            self._state = self._scan(self._state, batches)


class _Gather(_Scan):
    def _prepare(self):
        self._rows = jax.device_put(self._arrays)
        self._gathering = jax.jit(self._over_orders, donate_argnums=0)

    def _over_orders(self, state, rows, orders):
        def step(state, order):
            return self._step(state, jax.tree.map(partial(jnp.take, indices=order, axis=0, mode="clip"), rows)), None

        return jax.lax.scan(step, state, orders)[0]

    def _epoch(self):
        for orders in self._cut(np.random.permutation(len(self._arrays[0])).astype(np.int32)):
            if orders.size:
                self._state = self._gathering(self._state, self._rows, orders)


class _Take(_Scan):
    def _epoch(self):
        whole, rest = self._cut(np.random.permutation(len(self._arrays[0])))
        for orders in (*(whole[start : start + TAKEN_STEPS] for start in range(0, len(whole), TAKEN_STEPS)), rest):
            if orders.size:
                batches = jax.device_put(tuple(np.take(array, orders, axis=0) for array in self._arrays))
                self._state = self._scan(self._state, batches)


def _keras_program(workload: Workload, x: np.ndarray, y: np.ndarray):
    from benchmarks.contenders import keras_models

    model = keras_models.build(workload)
    model.train_on_batch(x[: workload.batch_size], y[: workload.batch_size])
    groups = (model.trainable_variables, model.non_trainable_variables, model.optimizer.variables, model.metrics_variables)
    state = tuple([jnp.array(variable.value) for variable in group] for group in groups)

    @partial(jax.jit, donate_argnums=0)
    def measure(state):
        return state[3], (*state[:3], [jnp.zeros_like(value) for value in state[3]])

    return state, lambda state, batch: model.train_step(state, batch)[1], measure
