"""MLPClassifier and MLPRegressor: scikit-learn's networks, trained by compiled programs.

The estimators are scikit-learn's own, from parameter checks to scoring; what is replaced is the arithmetic of an
epoch and of the L-BFGS loss. All random numbers are drawn as scikit-learn draws them, from `random_state` alone, so
that the loss curve is scikit-learn's to rounding. An epoch is computed in float32, as everything on JAX is. float64 input is
computed in float64 where that costs nothing (few rows), where `jax.config.update("jax_enable_x64", True)` asks for it, and by L-BFGS.
The decision and its measurements: docs/decisions/0002-estimators.md.

```python
from parafit.sklearn.estimators import MLPClassifier

model = MLPClassifier((256, 256), random_state=0).fit(x, y)
```
"""

import math
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
from scipy.sparse import issparse
from sklearn import neural_network
from sklearn.base import is_classifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.neural_network._multilayer_perceptron import BaseMultilayerPerceptron
from sklearn.neural_network._stochastic_optimizers import AdamOptimizer, SGDOptimizer

from parafit.errors import PlanError
from parafit.execution.events import Console
from parafit.placement import Placement
from parafit.planner.plan import Plan
from parafit.planning import asked_for
from parafit.sklearn.perceptron import Network, Rows, Trainer, run_full_batch

_FEW_NUMBERS = 2**14
"""Input of no more numbers than this is computed in its own dtype: an epoch of it is nearly all overhead, in any dtype."""


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
        placement = _placement(self.plan)
        if not incremental or not hasattr(self, "_optimizer"):
            self._optimizer = self._new_optimizer()
        rows, held_out = self._hold_out(X, y, sample_weight)
        batch_size = self._rows_per_batch(len(rows.y))
        _check_split(placement.plan, batch_size)
        exact = jax.config.jax_enable_x64 or math.prod(rows.x.shape) <= _FEW_NUMBERS
        dtype = self.coefs_[0].dtype if exact else np.dtype(np.float32)
        with jax.enable_x64(True):
            self._run_epochs(Trainer(self, placement, rows, batch_size, dtype), held_out, incremental)

    def _run_epochs(self, trainer: "Trainer", held_out: "Rows", incremental: bool):
        orders = _Orders(self._random_state, len(trainer.rows.y), 1 if incremental else self.max_iter, self.shuffle)
        # What an epoch's loss may change is the step size of the next, and under Adam it does not.
        ahead = self.solver == "adam" or self.learning_rate == "constant"
        self.n_iter_ = 0
        try:
            for loss in trainer.run_epochs(orders, ahead=ahead):
                self._end_epoch(loss, len(trainer.rows.y), trainer, held_out)
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
        orders.give_back(self.n_iter_)
        trainer.write_back()
        if self.early_stopping:
            self.coefs_, self.intercepts_ = self._best_coefs, self._best_intercepts

    def _end_epoch(self, loss: float, row_count: int, trainer: "Trainer", held_out: "Rows"):
        self.n_iter_ += 1
        self.t_ += row_count
        self.loss_ = loss
        self.loss_curve_.append(loss)
        if self.verbose:
            Console().say(f"Iteration {self.n_iter_}, loss = {loss:.8f}")
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

    def _hold_out(self, X, y, sample_weight) -> "tuple[Rows, Rows]":
        """The rows to train on and, for early stopping, the rows to score."""
        if not self.early_stopping:
            return Rows(X, y, sample_weight), Rows(None, None)
        arrays = [X, y] if sample_weight is None else [X, y, sample_weight]
        stratify = y if is_classifier(self) and self.n_outputs_ == 1 else None
        parts = train_test_split(*arrays, random_state=self._random_state, test_size=self.validation_fraction, stratify=stratify)
        training, held_out = (Rows(*parts[part::2]) for part in (0, 1))
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
        placement = _placement(self.plan)
        if not issparse(X):
            _check_split(placement.plan, len(y))
            weights = np.ones(len(y)) if sample_weight is None else sample_weight
            with jax.enable_x64(True):
                X = Rows(*(placement.put_block(column[None]) for column in (X, y, weights)))
        elif placement.plan.device_count > 1:
            raise PlanError(
                f"plan {placement.plan.short()!r} cannot split a sparse X under solver='lbfgs'. Use plan='single', or pass X.toarray()."
            )
        super()._fit_lbfgs(X, y, sample_weight, *scratch)

    def _loss_grad_lbfgs(self, packed, X, y, sample_weight, *scratch):
        if issparse(X):
            return super()._loss_grad_lbfgs(packed, X, y, sample_weight, *scratch)
        with jax.enable_x64(True):
            loss, gradient = run_full_batch(Network.of(self), _placement(self.plan), packed, X, self.alpha)
        return float(loss), np.array(gradient)


class _Orders:
    """The orders of a fit's rows, epoch by epoch, drawn as scikit-learn draws them.

    Args:
        random: drawn from.
        rows: how many.
        epochs: how many at most.
        shuffle: whether the order changes.
    """

    def __init__(self, random: np.random.RandomState, rows: int, epochs: int, shuffle: bool):
        self._random, self._rows, self._epochs, self._shuffle = random, rows, epochs, shuffle
        self._drawn, self._before_last = 0, random.get_state()

    def __iter__(self):
        order = np.arange(self._rows)
        for _ in range(self._epochs):
            self._drawn += 1
            if self._shuffle:
                self._before_last = self._random.get_state()
                # As sklearn.utils.shuffle does, at a tenth of its overhead.
                order = order[self._random.permutation(self._rows)]
            yield order

    def give_back(self, used: int) -> None:
        """Undo the last draw if its order was not used."""
        if self._shuffle and self._drawn > used:
            self._random.set_state(self._before_last)


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


def _placement(plan: Plan | str | Path) -> Placement:
    """The devices of a plan that does nothing but split batches."""
    wanted = asked_for(plan) or Plan()  # an estimator's own choice is one device
    if wanted != Plan.parse(f"data={wanted.device_count}" if wanted.device_count > 1 else "single"):
        raise PlanError(
            f"plan {wanted.short()!r}: these estimators run on one device, or split each batch over several. "
            "Use plan='single', or one such as 'data=8'."
        )
    return Placement(wanted)


def _check_split(plan: Plan, batch_size: int) -> None:
    if batch_size < plan.device_count:
        raise PlanError(
            f"plan {plan.short()!r} splits a batch over {plan.device_count} devices, but a batch has {batch_size} rows. "
            f"Raise batch_size to at least {plan.device_count}, or choose a smaller plan."
        )
