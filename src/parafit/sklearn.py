"""MLPClassifier and MLPRegressor: scikit-learn's networks, trained by compiled programs.

The estimators are scikit-learn's own, from parameter checks to scoring; what is replaced is the arithmetic of an
epoch and of the L-BFGS loss. All random numbers are drawn as scikit-learn draws them, from `random_state` alone, and
an epoch is computed in the dtype of the input, so that the loss curve is scikit-learn's to rounding.
The decision and its measurements: docs/decisions/0002-estimators.md.

```python
from parafit.sklearn import MLPClassifier

model = MLPClassifier((256, 256), random_state=0).fit(x, y)
```
"""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.sparse import issparse
from sklearn import neural_network
from sklearn.base import is_classifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.neural_network._multilayer_perceptron import BaseMultilayerPerceptron
from sklearn.neural_network._stochastic_optimizers import AdamOptimizer, SGDOptimizer

from parafit.errors import PlanError
from parafit.mesh import Placement
from parafit.plan import Plan

_CHUNK_BYTES = 4 * 2**20
"""Input rows gathered for one dispatch: the next chunk is gathered while the devices compute this one."""


class _CompiledTraining(BaseMultilayerPerceptron):
    """Scikit-learn's multilayer perceptron with its training loops replaced by compiled programs.

    `_fit_stochastic`, `_fit_lbfgs` and `_loss_grad_lbfgs` are the seam: scikit-learn 1.7 to 1.9 calls them after it
    has validated the input, encoded the target and drawn the initial weights. In `scratch` it passes work arrays,
    which are not used here; the last item for `_fit_stochastic` tells whether this is `partial_fit`.
    """

    plan: Plan | str | Path
    _label_binarizer: Any  # set by the classifier

    def _fit_stochastic(self, X, y, sample_weight, *scratch):
        incremental = scratch[-1]
        if incremental and self.early_stopping:
            raise ValueError("partial_fit does not support early_stopping=True")
        placement = Placement(Plan.read(self.plan))
        if not incremental or not hasattr(self, "_optimizer"):
            self._optimizer = self._new_optimizer()
        rows, held_out = self._hold_out(X, y, sample_weight)
        batch_size = self._rows_per_batch(len(rows.y))
        _check_split(placement.plan, batch_size)
        with jax.enable_x64(True):
            self._run_epochs(_Trainer(self, placement, rows, batch_size), held_out, incremental)

    def _run_epochs(self, trainer: "_Trainer", held_out: "_Rows", incremental: bool):
        order = np.arange(len(trainer.rows.y))
        self.n_iter_ = 0
        try:
            for _ in range(1 if incremental else self.max_iter):
                if self.shuffle:
                    # As sklearn.utils.shuffle does, at a tenth of its overhead.
                    order = order[self._random_state.permutation(len(order))]
                self._end_epoch(trainer.run_epoch(order), len(order), trainer, held_out)
                if self._stops():
                    break
            else:
                if not incremental:
                    warnings.warn(
                        f"Stochastic Optimizer: Maximum iterations ({self.max_iter}) reached and the optimization hasn't converged yet.",
                        ConvergenceWarning,
                        stacklevel=2,
                    )
        except KeyboardInterrupt:
            warnings.warn("Training interrupted by user.", stacklevel=2)
        trainer.write_back()
        if self.early_stopping:
            self.coefs_, self.intercepts_ = self._best_coefs, self._best_intercepts

    def _end_epoch(self, loss: float, row_count: int, trainer: "_Trainer", held_out: "_Rows"):
        self.n_iter_ += 1
        self.t_ += row_count
        self.loss_ = loss
        self.loss_curve_.append(loss)
        if self.verbose:
            print(f"Iteration {self.n_iter_}, loss = {loss:.8f}")
        if self.early_stopping:
            trainer.write_back()
        self._update_no_improvement_count(self.early_stopping, *held_out)
        self._optimizer.iteration_ends(self.t_)

    def _stops(self) -> bool:
        if self._no_improvement_count <= self.n_iter_no_change:
            return False
        watched = "Validation score" if self.early_stopping else "Training loss"
        message = f"{watched} did not improve more than tol={self.tol:f} for {self.n_iter_no_change} consecutive epochs."
        stops = self._optimizer.trigger_stopping(message, self.verbose)
        if not stops:
            self._no_improvement_count = 0
        return stops

    def _new_optimizer(self) -> SGDOptimizer | AdamOptimizer:
        parameters = self.coefs_ + self.intercepts_
        if self.solver == "adam":
            return AdamOptimizer(parameters, self.learning_rate_init, self.beta_1, self.beta_2, self.epsilon)
        return SGDOptimizer(parameters, self.learning_rate_init, self.learning_rate, self.momentum, self.nesterovs_momentum, self.power_t)

    def _hold_out(self, X, y, sample_weight) -> "tuple[_Rows, _Rows]":
        """The rows to train on and, for early stopping, the rows to score."""
        if not self.early_stopping:
            return _Rows(X, y, sample_weight), _Rows(None, None)
        arrays = [X, y] if sample_weight is None else [X, y, sample_weight]
        stratify = y if is_classifier(self) and self.n_outputs_ == 1 else None
        parts = train_test_split(*arrays, random_state=self._random_state, test_size=self.validation_fraction, stratify=stratify)
        training, held_out = (_Rows(*parts[part::2]) for part in (0, 1))
        if len(held_out.y) < 2:
            raise ValueError("The validation set is too small. Increase 'validation_fraction' or the size of your dataset.")
        if is_classifier(self):
            held_out = held_out._replace(y=self._label_binarizer.inverse_transform(held_out.y))
        return training, held_out

    def _rows_per_batch(self, row_count: int) -> int:
        if self.batch_size == "auto":
            return min(200, row_count)
        if self.batch_size > row_count:
            warnings.warn("Got `batch_size` less than 1 or larger than sample size. It is going to be clipped", stacklevel=2)
        return min(self.batch_size, row_count)

    def _fit_lbfgs(self, X, y, sample_weight, *scratch):
        placement = Placement(Plan.read(self.plan))
        if not issparse(X):
            _check_split(placement.plan, len(y))
            weights = np.ones(len(y)) if sample_weight is None else sample_weight
            with jax.enable_x64(True):
                X = _Rows(*(placement.put_block(column[None]) for column in (X, y, weights)))
        elif placement.plan.device_count > 1:
            raise PlanError(
                f"plan {placement.plan.short()!r} cannot split a sparse X under solver='lbfgs'. Use plan='single', or pass X.toarray()."
            )
        super()._fit_lbfgs(X, y, sample_weight, *scratch)

    def _loss_grad_lbfgs(self, packed, X, y, sample_weight, *scratch):
        if issparse(X):
            return super()._loss_grad_lbfgs(packed, X, y, sample_weight, *scratch)
        with jax.enable_x64(True):
            loss, gradient = _run_full_batch(_Network.of(self), Placement(Plan.read(self.plan)), packed, X, self.alpha)
        return float(loss), np.array(gradient)


_CONSTRAINTS = {"plan": [str, Plan, Path]}


class MLPClassifier(_CompiledTraining, neural_network.MLPClassifier):
    """scikit-learn's `MLPClassifier`, trained by compiled programs.

    Every parameter, attribute and method is that of `sklearn.neural_network.MLPClassifier`, and from the same
    `random_state` the loss curve is the same to rounding. One parameter more:

    Args:
        plan: the devices to train on: "auto" (one device), a `Plan`, a string such as "data=8", or the path of a
            plan's JSON. Each batch is split over the devices, which changes the numbers by rounding only.

    Raises:
        PlanError: at `fit`, a plan that cannot run here.

    >>> import numpy as np
    >>> x, y = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]), ["same", "differ", "differ", "same"]
    >>> model = MLPClassifier((8,), solver="lbfgs", random_state=1).fit(x, y)
    >>> model.predict(x).tolist()
    ['same', 'differ', 'differ', 'same']
    """

    _parameter_constraints = neural_network.MLPClassifier._parameter_constraints | _CONSTRAINTS

    def __init__(
        self,
        hidden_layer_sizes=(100,),
        activation="relu",
        *,
        solver="adam",
        alpha=0.0001,
        batch_size="auto",
        learning_rate="constant",
        learning_rate_init=0.001,
        power_t=0.5,
        max_iter=200,
        shuffle=True,
        random_state=None,
        tol=1e-4,
        verbose=False,
        warm_start=False,
        momentum=0.9,
        nesterovs_momentum=True,
        early_stopping=False,
        validation_fraction=0.1,
        beta_1=0.9,
        beta_2=0.999,
        epsilon=1e-8,
        n_iter_no_change=10,
        max_fun=15000,
        plan="auto",
    ):
        parameters = {name: value for name, value in locals().items() if name not in ("self", "plan", "__class__")}
        super().__init__(**parameters)
        self.plan = plan


class MLPRegressor(_CompiledTraining, neural_network.MLPRegressor):
    """scikit-learn's `MLPRegressor`, trained by compiled programs.

    Every parameter, attribute and method is that of `sklearn.neural_network.MLPRegressor`, and from the same
    `random_state` the loss curve is the same to rounding. One parameter more:

    Args:
        plan: the devices to train on, as in `MLPClassifier`.

    Raises:
        PlanError: at `fit`, a plan that cannot run here.

    >>> import numpy as np
    >>> x = np.linspace(-1, 1, 40)[:, None]
    >>> model = MLPRegressor(hidden_layer_sizes=(20,), activation="tanh", solver="lbfgs", random_state=0).fit(x, x[:, 0] ** 2)
    >>> round(float(model.predict([[0.5]])[0]), 1)
    0.2
    """

    _parameter_constraints = neural_network.MLPRegressor._parameter_constraints | _CONSTRAINTS

    def __init__(
        self,
        loss="squared_error",
        hidden_layer_sizes=(100,),
        activation="relu",
        *,
        solver="adam",
        alpha=0.0001,
        batch_size="auto",
        learning_rate="constant",
        learning_rate_init=0.001,
        power_t=0.5,
        max_iter=200,
        shuffle=True,
        random_state=None,
        tol=1e-4,
        verbose=False,
        warm_start=False,
        momentum=0.9,
        nesterovs_momentum=True,
        early_stopping=False,
        validation_fraction=0.1,
        beta_1=0.9,
        beta_2=0.999,
        epsilon=1e-8,
        n_iter_no_change=10,
        max_fun=15000,
        plan="auto",
    ):
        parameters = {name: value for name, value in locals().items() if name not in ("self", "plan", "__class__")}
        super().__init__(**parameters)
        self.plan = plan


def _check_split(plan: Plan, batch_size: int) -> None:
    if batch_size < plan.device_count:
        raise PlanError(
            f"plan {plan.short()!r} splits a batch over {plan.device_count} devices, but a batch has {batch_size} rows. "
            f"Raise batch_size to at least {plan.device_count}, or choose a smaller plan."
        )


class _Rows(NamedTuple):
    """Rows to learn from: on the host (n, ...), in a program (steps, batch, ...)."""

    x: Any
    y: Any
    weights: Any = None


class _Schedule(NamedTuple):
    """What the steps of a program differ in besides their rows; both (steps,)."""

    step_size: Any
    row_count: Any


@dataclass(frozen=True, kw_only=True)
class _Network:
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
    def of(cls, model) -> "_Network":
        return cls(
            widths=(model.coefs_[0].shape[0], *(len(intercept) for intercept in model.intercepts_)),
            activation=model.activation,
            output=model.out_activation_,
            solver=model.solver,
            nesterov=model.nesterovs_momentum,
        )


class _Trainer:
    """The epochs of one fit: gathers chunks of shuffled batches and runs the compiled program on them.

    Args:
        model: the estimator; its weights and its optimizer's moments are where training starts.
        placement: where state and batches live.
        rows: the rows to train on.
        batch_size: rows in a batch; the last one of an epoch may have fewer.
    """

    def __init__(self, model, placement: Placement, rows: _Rows, batch_size: int):
        self.rows = rows
        self._model, self._placement, self._network = model, placement, _Network.of(model)
        row_count, self._dtype = len(rows.y), model.coefs_[0].dtype
        self._step_count = -(-row_count // batch_size)
        most_steps = max(1, _CHUNK_BYTES // (batch_size * rows.x.shape[1] * self._dtype.itemsize))
        chunk_count = -(-self._step_count // most_steps)
        self._chunk_steps = -(-self._step_count // chunk_count)
        shape = chunk_count * self._chunk_steps, batch_size
        # Every batch has the same shape: what the last one lacks is filled with rows of weight 0.
        self._present = (np.arange(math.prod(shape)) < row_count).astype(self._dtype).reshape(shape)
        constants = {name: float(getattr(model, name)) for name in ("alpha", "momentum", "beta_1", "beta_2", "epsilon")}
        state = np.stack([_pack(np, part) for part in (model.coefs_ + model.intercepts_, *_moments(model._optimizer))])
        self._state, self._constants = jax.device_put((state, constants), placement.replicated)

    def run_epoch(self, order: np.ndarray) -> float:
        """Train on every row once, in this order, and return the mean loss of a row."""
        carry = np.zeros((), self._dtype), self._state
        for step_count, block, schedule in self._chunks(order):
            carry = _run_chunk(self._network, self._placement, carry, step_count, block, schedule, self._constants)
        loss_sum, state = carry
        mean_loss = float(loss_sum) / len(order)
        self._state = state
        if isinstance(self._model._optimizer, AdamOptimizer):
            self._model._optimizer.t += self._step_count
        return mean_loss

    def write_back(self) -> None:
        """Bring the weights and the optimizer's moments to the estimator."""
        parameters, *moments = (_unpack(self._network, row) for row in np.array(self._state))
        layer_count = len(parameters) // 2
        self._model.coefs_, self._model.intercepts_ = parameters[:layer_count], parameters[layer_count:]
        _set_moments(self._model._optimizer, moments)

    def _chunks(self, order: np.ndarray) -> Iterator[tuple[int, _Rows, _Schedule]]:
        """An epoch's chunks, all of one shape: how many of the steps count, their rows, their schedule."""
        chosen = np.resize(order, self._present.shape)
        step_sizes, row_counts = self._step_sizes(), self._present.sum(axis=1)
        for start in range(0, len(chosen), self._chunk_steps):
            steps = slice(start, start + self._chunk_steps)
            block = self._gather(chosen[steps], self._present[steps])
            yield min(self._chunk_steps, self._step_count - start), block, _Schedule(step_sizes[steps], row_counts[steps])

    def _gather(self, chosen: np.ndarray, present: np.ndarray) -> _Rows:
        """The rows with these numbers (steps, batch); split over the devices if there are several."""
        x, y, weights = self.rows
        inputs = x[chosen.ravel()].toarray().reshape(*chosen.shape, -1) if issparse(x) else np.take(x, chosen, axis=0)
        block = _Rows(
            inputs.astype(self._dtype, copy=False),  # partial_fit and warm_start may bring another dtype than before
            np.take(y, chosen, axis=0),
            present if weights is None else np.take(weights, chosen) * present,
        )
        return block if self._placement.mesh is None else _Rows(*map(self._placement.put_block, block))

    def _step_sizes(self) -> np.ndarray:
        """The factor of each of the epoch's updates (steps,); for Adam with the correction of both moments' bias."""
        optimizer = self._model._optimizer
        if isinstance(optimizer, SGDOptimizer):
            return np.full(len(self._present), optimizer.learning_rate, self._dtype)
        step = optimizer.t + np.arange(1, len(self._present) + 1)
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
def _run_chunk(network: _Network, placement: Placement, carry, step_count, block: _Rows, schedule: _Schedule, constants):
    """`step_count` updates in one program.

    The carry is (sum of the rows' losses, state); the state (1 + moments, parameters) is one array, because every
    array that enters or leaves a program costs microseconds.
    """

    def step(number, carry):
        loss_sum, (parameters, *moments) = carry
        (step_size, row_count), batch = jax.tree.map(lambda column: column[number], (schedule, block))
        loss, gradient = _loss_and_gradient(network, parameters, placement.split_batch(batch), constants["alpha"])
        state = _UPDATES[network.solver](network, parameters, moments, gradient, step_size, constants)
        return loss_sum + loss * row_count, placement.replicate(state)

    loss_sum, state = carry
    loss_sum, state = jax.lax.fori_loop(0, step_count, step, (loss_sum, [_unpack(network, row) for row in state]))
    return loss_sum, placement.replicate(jnp.stack([_pack(jnp, part) for part in state]))


@partial(jax.jit, static_argnames=("network", "placement"))
def _run_full_batch(network: _Network, placement: Placement, packed, block: _Rows, alpha):
    """Loss and packed gradient of all rows."""
    batch = placement.split_batch(jax.tree.map(lambda column: column[0], block))
    loss, gradient = _loss_and_gradient(network, _unpack(network, packed), batch, alpha)
    return placement.replicate((loss, _pack(jnp, gradient)))


def _pack(numpy, parameters: list):
    """Weight matrices, then biases, as one vector: the order scikit-learn's L-BFGS uses too."""
    return numpy.concatenate([numpy.ravel(part) for part in parameters])


def _unpack(network: _Network, vector) -> list:
    shapes = [*pairwise(network.widths), *((width,) for width in network.widths[1:])]
    ends = [0, *accumulate(math.prod(shape) for shape in shapes)]
    return [vector[start:end].reshape(shape) for (start, end), shape in zip(pairwise(ends), shapes)]


def _loss_and_gradient(network: _Network, parameters: list, batch: _Rows, alpha):
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
        slopes.append((_transpose(inputs[number]) @ delta + alpha / weight_sum * coefs[number], delta.sum(axis=0)))
        if number:
            delta = delta @ coefs[number].T * derivative(inputs[number])
    return loss, [slope for part in zip(*reversed(slopes)) for slope in part]


def _transpose(matrix):
    """The transpose as an array of its own: XLA:CPU multiplies a transposed float64 operand at half the speed."""
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


def _descend(network: _Network, parameters, moments, gradient, step_size, constants):
    """Velocity u ← μ u − η g; w ← w + u, or, after Nesterov, w ← w + μ u − η g."""
    momentum = constants["momentum"]
    updates = velocities = [momentum * old - step_size * slope for old, slope in zip(moments[0], gradient)]
    if network.nesterov:
        updates = [momentum * velocity - step_size * slope for velocity, slope in zip(velocities, gradient)]
    return [[parameter + update for parameter, update in zip(parameters, updates)], velocities]


def _adapt(network: _Network, parameters, moments, gradient, step_size, constants):
    """Adam (Kingma & Ba 2015): m ← β₁ m + (1 − β₁) g; v ← β₂ v + (1 − β₂) g²; w ← w − η_t m / (√v + ε)."""
    beta_1, beta_2, epsilon = (constants[name] for name in ("beta_1", "beta_2", "epsilon"))
    first = [beta_1 * old + (1 - beta_1) * slope for old, slope in zip(moments[0], gradient)]
    second = [beta_2 * old + (1 - beta_2) * slope**2 for old, slope in zip(moments[1], gradient)]
    updates = [-step_size * m / (jnp.sqrt(v) + epsilon) for m, v in zip(first, second)]
    return [[parameter + update for parameter, update in zip(parameters, updates)], first, second]


_UPDATES = {"sgd": _descend, "adam": _adapt}
