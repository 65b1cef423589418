"""Plain networks of dense layers, trained by compiled programs: what an epoch of `parafit.sklearn.estimators` computes."""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.sparse import issparse
from sklearn.neural_network._stochastic_optimizers import AdamOptimizer, SGDOptimizer

from parafit.placement import Placement

_CHUNK_BYTES = 4 * 2**20
"""Input rows gathered for one dispatch: the next chunk is gathered while the devices compute this one."""


class Rows(NamedTuple):
    """Rows to learn from: on the host (n, ...), in a program (steps, batch, ...)."""

    x: Any
    y: Any
    weights: Any = None


class Schedule(NamedTuple):
    """What the steps of a program differ in besides their rows; both (steps,)."""

    step_size: Any
    row_count: Any


@dataclass(frozen=True, kw_only=True)
class Network:
    """What decides which program is compiled, apart from shapes.

    Args:
        widths: features, units of each hidden layer, outputs.
        activation: of the hidden layers, as scikit-learn calls it.
        output: activation of the last layer; it decides the loss.
        solver: "adam" or "sgd".
        nesterov: whether "sgd" looks ahead.
    """

    widths: tuple[int, ...]
    activation: str
    output: str
    solver: str
    nesterov: bool

    @classmethod
    def of(cls, model) -> "Network":
        """The network of a scikit-learn model whose weights were made."""
        return cls(
            widths=(model.coefs_[0].shape[0], *(len(intercept) for intercept in model.intercepts_)),
            activation=model.activation,
            output=model.out_activation_,
            solver=model.solver,
            nesterov=model.nesterovs_momentum,
        )


class Trainer:
    """The epochs of one fit: gathers chunks of shuffled batches and runs the compiled program on them.

    Args:
        model: the estimator; its weights and its optimizer's moments are where training starts.
        placement: where state and batches live.
        rows: the rows to train on.
        batch_size: rows in a batch; the last one of an epoch may have fewer.
        dtype: of the arithmetic.
    """

    def __init__(self, model, placement: Placement, rows: Rows, batch_size: int, dtype: np.dtype):
        self.rows = rows if issparse(rows.x) else rows._replace(x=rows.x.astype(dtype, copy=False))
        self._model, self._placement, self._network = model, placement, Network.of(model)
        row_count, self._dtype = len(rows.y), dtype
        self._step_count = -(-row_count // batch_size)
        most_steps = max(1, _CHUNK_BYTES // (batch_size * rows.x.shape[1] * self._dtype.itemsize))
        chunk_count = -(-self._step_count // most_steps)
        self._chunk_steps = -(-self._step_count // chunk_count)
        shape = chunk_count * self._chunk_steps, batch_size
        # Every batch has the same shape: what the last one lacks is filled with rows of weight 0.
        self._present = (np.arange(math.prod(shape)) < row_count).astype(self._dtype).reshape(shape)
        constants = {name: float(getattr(model, name)) for name in ("alpha", "momentum", "beta_1", "beta_2", "epsilon")}
        state = np.stack([_pack(np, part) for part in (model.coefs_ + model.intercepts_, *_moments(model._optimizer))]).astype(dtype)
        self._state, self._constants = jax.device_put((state, constants), placement.replicated)

    def run_epochs(self, orders: Iterable[np.ndarray], *, ahead: bool) -> Iterator[float]:
        """Train on every row once in each of these orders; yields the mean loss of a row after each epoch.

        Args:
            orders: for each epoch, all row numbers in the order in which rows are met.
            ahead: whether the devices compute an epoch while the caller looks at the loss of the one before; if the caller then
                stops, that epoch is dropped.
        """
        running: deque[tuple[Any, Any]] = deque()
        latest = self._state
        for order in orders:
            running.append(self._start_epoch(order, latest, steps_before=len(running) * self._step_count))
            latest = running[-1][1]
            if len(running) > ahead:
                yield self._end_epoch(*running.popleft())
        while running:
            yield self._end_epoch(*running.popleft())

    def _start_epoch(self, order: np.ndarray, state, steps_before: int):
        """Dispatch an epoch: the sum of the rows' losses and the state, once they are computed."""
        carry = np.zeros((), self._dtype), state
        for step_count, block, schedule in self._chunks(order, steps_before):
            carry = _run_chunk(self._network, self._placement, carry, step_count, block, schedule, self._constants)
        return carry

    def _end_epoch(self, loss_sum, state) -> float:
        mean_loss = float(loss_sum) / len(self.rows.y)
        self._state = state
        if isinstance(self._model._optimizer, AdamOptimizer):
            self._model._optimizer.t += self._step_count
        return mean_loss

    def write_back(self) -> None:
        """Bring the weights and the optimizer's moments to the estimator."""
        parameters, *moments = (_unpack(self._network, row) for row in np.array(self._state, self._model.coefs_[0].dtype))
        layer_count = len(parameters) // 2
        self._model.coefs_, self._model.intercepts_ = parameters[:layer_count], parameters[layer_count:]
        _set_moments(self._model._optimizer, moments)

    def _chunks(self, order: np.ndarray, steps_before: int) -> Iterator[tuple[int, Rows, Schedule]]:
        """An epoch's chunks, all of one shape: how many of the steps count, their rows, their schedule."""
        chosen = np.resize(order, self._present.shape)
        step_sizes, row_counts = self._step_sizes(steps_before), self._present.sum(axis=1)
        for start in range(0, len(chosen), self._chunk_steps):
            steps = slice(start, start + self._chunk_steps)
            block = self._gather(chosen[steps], self._present[steps])
            yield min(self._chunk_steps, self._step_count - start), block, Schedule(step_sizes[steps], row_counts[steps])

    def _gather(self, chosen: np.ndarray, present: np.ndarray) -> Rows:
        """The rows with these numbers (steps, batch); split over the devices if there are several."""
        x, y, weights = self.rows
        inputs = x[chosen.ravel()].toarray().reshape(*chosen.shape, -1) if issparse(x) else np.take(x, chosen, axis=0)
        block = Rows(
            inputs.astype(self._dtype, copy=False),
            np.take(y, chosen, axis=0),
            present if weights is None else np.take(weights, chosen) * present,
        )
        return block if self._placement.mesh is None else Rows(*map(self._placement.put_block, block))

    def _step_sizes(self, steps_before: int) -> np.ndarray:
        """The factor of each of an epoch's updates (steps,), so many steps from now; for Adam with the correction of both moments' bias."""
        optimizer = self._model._optimizer
        if isinstance(optimizer, SGDOptimizer):
            return np.full(len(self._present), optimizer.learning_rate, self._dtype)
        step = optimizer.t + steps_before + np.arange(1, len(self._present) + 1)
        correction = np.sqrt(1 - optimizer.beta_2**step) / (1 - optimizer.beta_1**step)
        return (optimizer.learning_rate_init * correction).astype(self._dtype)


def _moments(optimizer) -> list:
    """The running averages an optimizer keeps: lists with one array per weight or bias."""
    return [optimizer.velocities] if isinstance(optimizer, SGDOptimizer) else [optimizer.ms, optimizer.vs]


def _set_moments(optimizer, moments: list) -> None:
    if isinstance(optimizer, SGDOptimizer):
        [optimizer.velocities] = moments
    else:
        optimizer.ms, optimizer.vs = moments


@partial(jax.jit, static_argnames=("network", "placement"))
def _run_chunk(network: Network, placement: Placement, carry, step_count, block: Rows, schedule: Schedule, constants):
    """`step_count` updates in one program.

    The carry is (sum of the rows' losses, state); the state (1 + moments, parameters) is one array, because every
    array that enters or leaves a program costs microseconds.
    """

    def step(number, carry):
        loss_sum, (parameters, *moments) = carry
        (step_size, row_count), batch = jax.tree.map(lambda column: column[number], (schedule, block))
        loss, gradient = _loss_and_gradient(network, parameters, placement.split_batch(batch), constants["alpha"])
        # Updates that wait for the last to read the old weights, the loss and the first layer's slopes, are made in place: XLA copies
        # the weights otherwise. A loss too large for its dtype must not spoil them.
        step_size += 0 * jnp.clip(loss + gradient[len(gradient) // 2][0], -1, 1)
        state = _UPDATES[network.solver](network, parameters, moments, gradient, step_size, constants)
        return loss_sum + loss * row_count, placement.replicate(state)

    loss_sum, state = carry
    loss_sum, state = jax.lax.fori_loop(0, step_count, step, (loss_sum, [_unpack(network, row) for row in state]))
    return loss_sum, placement.replicate(jnp.stack([_pack(jnp, part) for part in state]))


@partial(jax.jit, static_argnames=("network", "placement"))
def run_full_batch(network: Network, placement: Placement, packed, block: Rows, alpha):
    """Loss and packed gradient of all rows.

    Args:
        network: the network.
        placement: the plan on its devices.
        packed: all weights in one vector.
        block: all rows, as one batch of shape (1, rows, ...).
        alpha: strength of the L2 penalty.
    """
    batch = placement.split_batch(jax.tree.map(lambda column: column[0], block))
    loss, gradient = _loss_and_gradient(network, _unpack(network, packed), batch, alpha)
    return placement.replicate((loss, _pack(jnp, gradient)))


def _pack(numpy, parameters: list):
    """Weight matrices, then biases, as one vector: the order scikit-learn's L-BFGS uses too."""
    return numpy.concatenate([numpy.ravel(part) for part in parameters])


def _unpack(network: Network, vector) -> list:
    shapes = [*pairwise(network.widths), *((width,) for width in network.widths[1:])]
    ends = [0, *accumulate(math.prod(shape) for shape in shapes)]
    return [vector[start:end].reshape(shape) for (start, end), shape in zip(pairwise(ends), shapes)]


def _loss_and_gradient(network: Network, parameters: list, batch: Rows, alpha):
    """Loss = (Σ_rows weight · loss + α/2 · Σ coef²) / Σ_rows weight, and its gradient by back propagation.

    For every pair of output and loss below, the derivative of a row's loss by the output's input is a − y
    (https://scikit-learn.org/stable/modules/neural_networks_supervised.html#mathematical-formulation). With several
    outputs, scikit-learn reports the mean of the squared errors and descends along the gradient of their sum.
    """
    layer_count = len(parameters) // 2
    coefs, intercepts = parameters[:layer_count], parameters[layer_count:]
    activate, derivative = _ACTIVATIONS[network.activation]
    inputs = [batch.x]
    for coef, intercept in zip(coefs[:-1], intercepts[:-1]):
        inputs.append(activate(inputs[-1] @ coef + intercept))
    z = inputs[-1] @ coefs[-1] + intercepts[-1]

    y, weights = batch.y.astype(z.dtype), batch.weights.astype(z.dtype)
    a, losses = _OUTPUTS[network.output](z, y)
    weight_sum = weights.sum()
    loss = (jnp.vdot(weights, losses) + alpha / 2 * sum(jnp.vdot(coef, coef) for coef in coefs)) / weight_sum

    delta = (a - y) * (weights / weight_sum)[:, None]
    slopes = []
    for number in reversed(range(layer_count)):
        slopes.append((_kernel_gradient(inputs[number], delta) + alpha / weight_sum * coefs[number], delta.sum(axis=0)))
        if number:
            delta = delta @ coefs[number].T * derivative(inputs[number])
    return loss, [slope for part in zip(*reversed(slopes)) for slope in part]


def _kernel_gradient(inputs, delta):
    """inputsᵀ delta, for (batch, inputs) and (batch, outputs); of few outputs, those are transposed.

    The transpose is an array of its own: XLA:CPU multiplies a transposed float64 operand at half the speed. A single output is left to
    XLA, which fuses its product. `backends.cpu.products.kernel_gradient` suits optimisers that read it transposed; here it was 10 % slower.
    """
    if 1 < delta.shape[1] <= inputs.shape[1] // 4:
        return jax.lax.optimization_barrier(_transpose(delta) @ inputs).T
    return _transpose(inputs) @ delta


def _transpose(matrix):
    return jax.lax.optimization_barrier(matrix.T)


_ACTIVATIONS = {
    "identity": (lambda z: z, lambda a: 1),
    "logistic": (jax.lax.logistic, lambda a: a * (1 - a)),
    "tanh": (jnp.tanh, lambda a: 1 - a**2),
    "relu": (lambda z: jnp.maximum(z, 0), lambda a: (a > 0).astype(a.dtype)),
}
"""A hidden layer's a = f(z), and f'(z) written in terms of a."""


def _softmax(z, y):
    a = jax.nn.softmax(z)
    return a, -(y * jnp.log(_clip(a))).sum(axis=1)


def _logistic(z, y):
    a = jax.lax.logistic(z)
    return a, -(y * jnp.log(_clip(a)) + (1 - y) * jnp.log(1 - _clip(a))).sum(axis=1)


def _clip(probability):
    epsilon = jnp.finfo(probability.dtype).eps
    return jnp.clip(probability, epsilon, 1 - epsilon)


def _identity(z, y):
    return z, ((z - y) ** 2).mean(axis=1) / 2


def _exponential(z, y):
    a = jnp.exp(z)
    return a, (jax.scipy.special.xlogy(y, y / a) - y + a).sum(axis=1)


_OUTPUTS = {"softmax": _softmax, "logistic": _logistic, "identity": _identity, "exp": _exponential}
"""(z, y) → the output a (batch, outputs) and each row's loss (batch,)."""


def _descend(network: Network, parameters, moments, gradient, step_size, constants):
    """Velocity u ← μ u − η g; w ← w + u, or, after Nesterov, w ← w + μ u − η g."""
    momentum = constants["momentum"]
    updates = velocities = [momentum * old - step_size * slope for old, slope in zip(moments[0], gradient)]
    if network.nesterov:
        updates = [momentum * velocity - step_size * slope for velocity, slope in zip(velocities, gradient)]
    return [[parameter + update for parameter, update in zip(parameters, updates)], velocities]


def _adapt(network: Network, parameters, moments, gradient, step_size, constants):
    """Adam (Kingma & Ba 2015): m ← β₁ m + (1 − β₁) g; v ← β₂ v + (1 − β₂) g²; w ← w − η_t m / (√v + ε)."""
    beta_1, beta_2, epsilon = (constants[name] for name in ("beta_1", "beta_2", "epsilon"))
    first = [beta_1 * old + (1 - beta_1) * slope for old, slope in zip(moments[0], gradient)]
    second = [beta_2 * old + (1 - beta_2) * slope**2 for old, slope in zip(moments[1], gradient)]
    updates = [-step_size * m / (jnp.sqrt(v) + epsilon) for m, v in zip(first, second)]
    return [[parameter + update for parameter, update in zip(parameters, updates)], first, second]


_UPDATES = {"sgd": _descend, "adam": _adapt}
