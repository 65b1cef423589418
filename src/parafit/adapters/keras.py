"""Keras models as pure steps over explicit state."""

from collections.abc import Callable
from typing import Any

import keras

from parafit.adapters.step import Parts, State, Step
from parafit.errors import BackendError, ModelError
from parafit.support import compat


class KerasModel:
    """A Keras model the way parafit runs it.

    Args:
        model: a `keras.Model`.
        verb: "fit", "evaluate" or "predict": what it is to be used for.

    Raises:
        BackendError: Keras runs on another backend than JAX.
        ModelError: not a Keras model, or not compiled for what the verb needs.
    """

    def __init__(self, model, verb: str):
        _check(model, verb)
        self.model = self.keeper = model

    def why_stepwise(self) -> str | None:
        """Why this model must run one Python step at a time, None where whole chunks of steps can be compiled."""
        if self.model.run_eagerly:
            return "it was compiled with run_eagerly=True"
        if reason := compat.why_not_compiled(self.model):
            return reason
        if keras.distribution.distribution() is not None:
            return "a keras.distribution is set"
        return None

    def build(self, example: Callable[[], Any]) -> None:
        """Create all variables; `example` draws a batch, and is called only if the model needs one, as in Keras."""
        if compat.needs_batch_to_build(self.model):
            compat.symbolic_build(self.model, example())
        elif self.model.optimizer is not None and not self.model.optimizer.built:
            self.model.optimizer.build(self.model.trainable_variables)

    def build_layers(self, example: Callable[[], Any]) -> None:
        """Create the layers' variables: enough to predict."""
        if not compat.is_built(self.model):
            x, _, _ = keras.utils.unpack_x_y_sample_weight(example())
            with keras.StatelessScope():
                self.model(x)

    def train_step(self) -> Step:
        """`keras.Model.train_step`, overridden or not, over all of the model's and the optimizer's variables."""
        model = self.model
        variables = State(model.trainable_variables, self._non_trainable(), model.optimizer.variables, model.metrics_variables)
        scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)

        def function(fixed, state, batch):
            logs, new = model.train_step(tuple(state), batch)
            return logs, State(*map(list, new))

        return self._step(
            "train",
            function,
            variables,
            stops_on_bad_loss=not scaled,
            parts=self._parts(),
            own=compat.own_step(model),
        )

    def test_step(self) -> Step:
        """`keras.Model.test_step`."""
        model = self.model

        def function(weights, state, batch):
            logs, (_, others, metrics) = model.test_step((weights, state.others, state.metrics), batch)
            return logs, state._replace(others=list(others), metrics=list(metrics))

        variables = State(others=self._non_trainable(), metrics=model.metrics_variables)
        return self._step("test", function, variables, fixed=model.trainable_variables)

    def predict_step(self) -> Step:
        """`keras.Model.predict_step`."""
        model = self.model

        def function(weights, state, batch):
            outputs, others = model.predict_step((weights, state.others), batch)
            return outputs, state._replace(others=list(others))

        return self._step("predict", function, State(others=self._non_trainable()), fixed=model.trainable_variables)

    def result(self, logs: dict) -> dict[str, Any]:
        """An epoch's logs: the metrics' results, or the step's own logs where a custom step returns others."""
        metrics = self.model.get_metrics_result()
        return dict(metrics if set(metrics) == set(logs) else logs)

    def scores(self, logs: dict) -> Any:
        """Logs as `keras.Model.evaluate` returns them."""
        return compat.flatten_metrics(self.model, logs)

    def finish_training(self) -> None:
        """What Keras' optimizers do once after the last step (such as taking over averaged weights)."""
        self.model.optimizer.finalize_variable_values(self.model.trainable_weights)

    def config(self) -> str | None:
        """See `parafit.adapters.step.Adapter`."""
        return compat.plain_config(self.model)

    def set_hyperparameter(self, name: str, value: float) -> None:
        """Let the optimizer use another number; see `parafit.adapters.step.Adapter`.

        Args:
            name: of the number.
            value: to use.
        """
        optimizer = self.model.optimizer
        inner = getattr(optimizer, "inner_optimizer", optimizer)
        if not isinstance(getattr(inner, name, None) if name != "learning_rate" else 0.0, (int, float, type(None))) or not hasattr(
            inner, name
        ):
            raise ModelError(f"optimizer {inner.name!r} of model {self.model.name!r} has no number called {name!r}.")
        try:
            setattr(inner, name, value)
        except (TypeError, ValueError) as error:
            raise ModelError(f"{name}={value} cannot be given to optimizer {inner.name!r} of model {self.model.name!r}: {error}") from error

    def _parts(self) -> Parts | None:
        """`keras.Model.train_step` in parts, None where the model's class computes something of it in its own way."""
        model = self.model
        if compat.own_step(model):
            return None
        return Parts(
            loss=lambda weights, state, batch: compat.loss_and_updates(model, weights, state, batch),
            measure=lambda metrics, loss, predictions, batch: compat.update_metrics(model, metrics, loss, predictions, batch),
            update=lambda slots, gradients, weights: model.optimizer.stateless_apply(slots, gradients, weights),
            couples=compat.why_rows_couple(model),
            follows=compat.why_rows_follow(model),
            weighs=compat.why_rows_weigh(model),
        )

    def _non_trainable(self) -> list:
        with compat.recurrent_states(self.model):
            return self.model.non_trainable_variables

    def _step(self, name: str, function: Callable, variables: State, *, fixed=(), **options) -> Step:
        def stateful(*arguments):
            with compat.recurrent_states(self.model):
                return function(*arguments)

        variables = State(*map(list, variables))
        identity = (*compat.compiled_parts(self.model), *fixed, *(variable for group in variables for variable in group))
        return Step(name=name, function=stateful, variables=variables, fixed_variables=list(fixed), identity=identity, **options)


def _check(model, verb: str) -> None:
    if keras.backend.backend() != "jax":
        raise BackendError(
            f"Keras runs on the {keras.backend.backend()!r} backend, and parafit needs 'jax'. Import parafit before keras, or set "
            "KERAS_BACKEND=jax in the environment before Python starts; a model built on another backend can be saved and loaded again."
        )
    if not compat.is_model(model):
        raise ModelError(f"expected a keras.Model, got {type(model).__name__}: {model!r:.80}.")
    if verb != "predict" and not model.compiled:
        raise ModelError(
            f"model {model.name!r} is not compiled, so {verb} has no loss. Call model.compile(optimizer, loss, metrics=...) first."
        )
    if verb == "fit" and model.optimizer is None:
        raise ModelError(
            f"model {model.name!r} was compiled without an optimizer, so fit cannot train it. Call model.compile(optimizer, loss)."
        )
