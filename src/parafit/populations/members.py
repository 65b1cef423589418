"""One of many: a model with its own seed, rows, callbacks and history, prepared as `fit` would prepare it alone."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from parafit.adapters import adapter_of, checks
from parafit.adapters.keras_callbacks import are_of_users, batch_hooks, callback_list, looks_at_tests, looks_at_weights
from parafit.adapters.step import State, same_state
from parafit.execution.loop import bad_loss
from parafit.populations.rows import Batches, Rows
from parafit.populations.tracing import TracedStep, traced_step
from parafit.support import compat


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is trained on.

    Attributes:
        train: gives the source of the member's rows; called where its random state holds.
        validation: the rows to validate on, or None.
        epochs: the epoch to stop before.
        validation_freq: as in `fit`.
    """

    train: Callable[[int], Rows]
    validation: Rows | None
    epochs: int
    validation_freq: Any


class Member:
    """A member on its way from its first epoch to its last.

    Args:
        number: among all members, from 0.
        seed: as in `keras.utils.set_random_seed`.
        make: gives the model; called where the seed is set.
        settings: numbers for the optimizer, by name.
        callbacks: of this member.
        order: what it trains on.

    Attributes:
        why_alone: why it cannot be stacked with others, "" where it can.
        error: how it ended, where it did not end well.
    """

    def __init__(self, number: int, seed: int, make: Callable[[], Any], settings: dict[str, float], callbacks: Any, order: Order):
        self.number, self.seed, self.order = number, seed, order
        self.random = compat.RandomState(seed)
        self.user_callbacks = callbacks
        self.error: Exception | None = None
        self.random.enter()
        self.given = make()
        self.adapter = adapter_of(self.given, "fit")
        self.model = self.adapter.model
        for name, value in settings.items():
            self.adapter.set_hyperparameter(name, value)
        self.why_alone = self.adapter.why_stepwise() or ""
        if not self.why_alone:
            self._prepare()

    def _prepare(self) -> None:
        order, adapter = self.order, self.adapter
        self.source = order.train(self.model.steps_per_execution)
        checks.build(adapter, self.source, "fit")
        self.step = adapter.train_step()
        self.callbacks = callback_list(self.user_callbacks, self.model, verbose=0, epochs=order.epochs, steps=self._steps(), history=True)
        self.why_alone = batch_hooks(self.callbacks, self.model.steps_per_execution)
        if order.validation is not None:
            checks.check(adapter, order.validation, "evaluate", "validation_data")
            self.validation_batches: Batches = list(order.validation.batches())
            self.test_step = adapter.test_step()
        self._config = adapter.config()
        self.watches = looks_at_weights(self.callbacks)
        self._user_watches = are_of_users(self.callbacks)
        self.watches_tests = looks_at_tests(self.callbacks)
        self._shown: Any = None

    def _steps(self) -> int:
        return self.source.steps_per_epoch

    @cached_property
    def traces(self) -> "Traces":
        """Its steps as JAX traces them."""
        order = self.order
        with compat.attention_to_be_stacked(self.model):
            test = None if order.validation is None else traced_step(self.test_step, order.validation.shapes(), self._config)
            return Traces(train=traced_step(self.step, self.source.shapes(), self._config), test=test)

    @property
    def test_names(self) -> tuple[str, ...]:
        """Of the logs of a validation."""
        return self.traces.test.names if self.traces.test else ()

    def variables(self) -> list:
        """What training changes of it; empty where it trains alone."""
        return [] if self.why_alone else [getattr(each, "variable", each) for group in self.step.variables for each in group]

    # Its epochs -----------------------------------------------------------------------------------------------------------------------

    def begin(self) -> bool:
        """What comes before the first epoch; gives whether there is one."""
        self.model.stop_training = False
        self.logs: dict = {}
        self.random.enter()
        self.source.restart()
        self.callbacks.on_train_begin()
        self.epoch = compat.restored_epoch(self.model) or 0
        if self.epoch < self.order.epochs:
            return True
        self.finish(self.step.read())
        return False

    def begin_epoch(self) -> None:
        """Tell that an epoch begins, and draw the order of its rows; the model holds the state."""
        self.random.enter()
        if self._user_watches or self._shown is None:
            self.model.reset_metrics()
        self.callbacks.on_epoch_begin(self.epoch)
        self.batches: Batches = list(self.source.batches())

    def show(self, state: State) -> None:
        """Let the model hold the state."""
        self.step.write(state)
        self._shown = state

    def changed(self) -> State | None:
        """The state that the model holds, if a callback has changed it since it was shown."""
        held = self.step.read()
        return None if self._shown is not None and same_state(held[:3], self._shown[:3]) else held

    def end_training(self, done: int, healthy: bool, logs: dict, seconds: float) -> None:
        """Tell how the training part of the epoch ended.

        Args:
            done: steps of finite loss.
            healthy: whether these are all.
            logs: of the last step.
            seconds: since the state that is left where not all went well.
        """
        self.callbacks.on_train_batch_end(done if not healthy else len(self.batches) - 1, logs)  # Keras' own callbacks only
        if not healthy and not self.model.stop_training:
            self.error = bad_loss(self.epoch, done, float(logs["loss"]), seconds, self.source.find_non_finite())

    def validates(self) -> bool:
        """Whether this epoch ends with a validation."""
        return self.order.validation is not None and compat.should_validate(self.model, self.epoch, self.order.validation_freq)

    def end_epoch(self, logs: dict) -> bool:
        """Tell that the epoch has ended, with these logs; gives whether there is another."""
        self.logs = logs
        self.random.enter()
        self.callbacks.on_epoch_end(self.epoch, logs)
        self.epoch += 1
        return not self.model.stop_training and self.epoch < self.order.epochs

    def finish(self, state: State) -> None:
        """What comes after the last epoch."""
        self.leave(state)
        self.random.enter()
        self.callbacks.on_train_end(self.logs)

    def leave(self, state: State) -> None:
        """Let the model hold the state for good."""
        self.step.write(state)
        if self.order.epochs > 0:
            self.adapter.finish_training()

    @property
    def history(self) -> Any:
        """Its `keras.callbacks.History`."""
        return self.model.history


@dataclass(frozen=True, kw_only=True)
class Traces:
    """A member's steps as JAX traces them; those of equal digests run in one program."""

    train: TracedStep
    test: TracedStep | None

    @property
    def digest(self) -> tuple:
        """Equal for members that may be stacked."""
        return self.train.digest, len(self.train.names), self.test and (self.test.digest, len(self.test.names))
