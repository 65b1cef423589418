"""fit, evaluate and predict: read this first.

Each does the same: check the arguments, the model and the plan; then `_prepare` makes a source from the data, lets Keras build what is
missing and places the step on the plan's devices; then `loop` runs whole chunks of steps in compiled programs and calls the callbacks
between them. `execution/events.py` says what a run tells.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import GeneratorType
from typing import Any

from parafit import backends, forecast
from parafit.adapters import adapter_of, checks
from parafit.adapters.keras_callbacks import batch_strides, callback_list
from parafit.adapters.step import Adapter, Step
from parafit.data import inputs
from parafit.data.feed import Feed
from parafit.data.residency import forward_flops, resident_table
from parafit.data.source import Source
from parafit.errors import ModelError, PlanError
from parafit.execution import loop
from parafit.execution.events import Console, Ended, JsonLines, Notice, Planned, emit, listening
from parafit.execution.pace import Pace
from parafit.execution.pipeline import runner_for
from parafit.placement import Placement
from parafit.planner.plan import Plan
from parafit.planner.program import Program
from parafit.planning import asked_for, place, plan_for
from parafit.support import compat
from parafit.support.arguments import check_arguments
from parafit.techniques.program import program_of


def fit(
    model,
    x=None,
    y=None,
    *,
    batch_size: int | None = None,
    epochs: int = 1,
    verbose: str | int = "auto",
    callbacks=None,
    validation_split: float = 0.0,
    validation_data=None,
    shuffle: bool | str = True,
    class_weight: dict | None = None,
    sample_weight=None,
    initial_epoch: int = 0,
    steps_per_epoch: int | None = None,
    validation_steps: int | None = None,
    validation_batch_size: int | None = None,
    validation_freq: int | list[int] = 1,
    plan: Plan | str = "auto",
    log: str | Path | None = None,
):
    """Train a model: `keras.Model.fit`, in compiled chunks of steps, on the devices of a plan.

    The arguments are those of `keras.Model.fit`, with the same meaning and the same results: for the same data and seed
    the history and the final weights are Keras' own, to rounding, on every plan.

    Args:
        model: a compiled `keras.Model` on the JAX backend, or a `parafit.nnx.Trainable`: a Flax module with loss and optimizer.
        x: inputs: an array of shape (rows, ...), a list or dict of them, a table, or a dataset, generator or loader.
        y: targets of shape (rows, ...), in the structure of the model's outputs; None if `x` yields them.
        batch_size: rows of one step over all devices together; 32 if not given.
        epochs: number of the epoch after which the run ends.
        verbose: "auto" or 1: a progress bar; 2: a line an epoch; 0: nothing.
        callbacks: a list of `keras.callbacks.Callback`.
        validation_split: share of the rows, the last ones, that is held out of training and evaluated after an epoch.
        validation_data: `(x, y)` or `(x, y, sample_weight)`, or a dataset, evaluated after an epoch; overrides `validation_split`.
        shuffle: whether rows are drawn in a new order in every epoch; "batch" draws batches in a new order.
        class_weight: weight of each class in the loss, by the class's number.
        sample_weight: weight of each row in the loss, of shape (rows,).
        initial_epoch: number of epochs that an earlier run has done; this one trains for `epochs - initial_epoch`.
        steps_per_epoch: number of batches in an epoch; None: as many as there are.
        validation_steps: number of batches in a validation; None: all.
        validation_batch_size: rows of a batch in a validation; None: `batch_size`.
        validation_freq: number of epochs from one validation to the next, or a list of the epochs that end with one.
        plan: "auto" (the fastest of this machine's plans, if it is worth it; see `find_plan`), a `Plan`, a text such as "data=8",
            or the path of a plan's JSON file.
        log: a file to which a line of JSON is added for whatever the run tells: plan, price, compilations, groups of steps, epochs, score.

    Returns:
        The `keras.callbacks.History` of the run.

    Raises:
        BackendError: Keras runs on another backend than JAX.
        ModelError: the model is not compiled, or lacks a loss or an optimizer.
        DataError: arrays of different lengths, without rows, or of a dtype no network reads.
        PlanError: the plan cannot run here.
        OutputError: the log cannot be written.
        NonFiniteLossError: the loss became NaN or infinite; the model holds its last good weights.

    >>> import parafit, keras, numpy as np
    >>> keras.utils.set_random_seed(0)
    >>> x = np.linspace(-1, 1, 256, dtype="float32")[:, None]
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    >>> model.compile(keras.optimizers.SGD(0.1), "mse")
    >>> history = parafit.fit(model, x, 3 * x + 1, epochs=20, verbose=0)
    >>> bool(history.history["loss"][-1] < 1e-3)
    True
    """
    check_arguments(
        **{"batch_size": batch_size, "epochs": epochs, "verbose": verbose, "validation_split": validation_split, "shuffle": shuffle},
        **{"class_weight": class_weight, "initial_epoch": initial_epoch, "steps_per_epoch": steps_per_epoch},
        **{"validation_steps": validation_steps, "validation_batch_size": validation_batch_size, "validation_freq": validation_freq},
    )
    adapter = adapter_of(model, "fit")
    model, asked = adapter.model, asked_for(plan)
    epochs = compat.limited_epochs(epochs)
    options = {"batch_size": batch_size, "steps_per_epoch": steps_per_epoch, "shuffle": shuffle, "class_weight": class_weight}
    if reason := _why_stepwise(adapter, x, y, sample_weight):
        _leave_to_keras(model, asked, reason)
        return model.fit(
            x,
            y,
            sample_weight=sample_weight,
            epochs=epochs,
            verbose=verbose,
            callbacks=callbacks,
            validation_split=validation_split,
            validation_data=validation_data,
            initial_epoch=initial_epoch,
            validation_steps=validation_steps,
            validation_batch_size=validation_batch_size,
            validation_freq=validation_freq,
            **options,
        )
    if validation_split and validation_data is None:
        x, y, sample_weight = inputs.plain(x, y, sample_weight)
        inputs.check_lengths(x, y, sample_weight)
        checks.check_split(x, validation_split)
        (x, y, sample_weight), validation_data = compat.split_validation((x, y, sample_weight), validation_split)
    with _told(verbose, log):
        run = _prepare("fit", adapter, (x, y, sample_weight), asked, options)
        listed = callback_list(callbacks, model, verbose=verbose, epochs=epochs, steps=run.source.steps_per_epoch, history=True)
        pace = _pace(listed, "train", model)
        rows = {"batch_size": validation_batch_size or batch_size, "steps": validation_steps}
        validation = None if validation_data is None else _Validation(adapter, validation_data, listed, run.placement, **rows)

        def validate(epoch: int) -> dict:
            return validation.logs() if validation and compat.should_validate(model, epoch, validation_freq) else {}

        flops = lambda: forward_flops(run.step, run.program, run.source.rows_per_batch)  # noqa: E731
        table = resident_table(run.source, run.placement, flops=flops, epochs=epochs - initial_epoch)
        feed = Feed(run.source, strides=pace.strides, table=table)
        blocks = feed.foreseen()
        runner = runner_for(adapter, run.step, run.placement, blocks)
        price = None
        if verbose and blocks and not run.placement.pipeline:
            steps = run.source.steps_per_epoch
            price = forecast.foresee(runner, blocks[0].arrays, run.program, steps=steps, epochs=epochs - initial_epoch)
        first_epoch = lambda: compat.restored_epoch(model) or initial_epoch  # noqa: E731
        with _ending(pace), backends.current().running():
            loop.train(runner, feed, listed, pace, first_epoch=first_epoch, epochs=epochs, validate=validate)
        if price and pace.steps:
            forecast.settle_up(model.name, run.placement.plan, run.source.rows_per_batch, price, pace.seconds / pace.steps)
    return model.history


def evaluate(
    model,
    x=None,
    y=None,
    *,
    batch_size: int | None = None,
    verbose: str | int = "auto",
    sample_weight=None,
    steps: int | None = None,
    callbacks=None,
    return_dict: bool = False,
    plan: Plan | str = "auto",
):
    """The loss and metrics of a compiled Keras model on data: `keras.Model.evaluate`, in compiled chunks of steps.

    Args and errors are those of `fit`.

    Args:
        steps: number of batches to take; None: as many as there are.
        return_dict: whether to give a dict by name rather than a list.

    Returns:
        A list of numbers in Keras' order (a number if there is only the loss), or a dict by name with `return_dict=True`.

    >>> import parafit, keras, numpy as np
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, kernel_initializer="ones")])
    >>> model.compile(loss="mse")
    >>> float(parafit.evaluate(model, np.ones((8, 2)), np.ones((8, 1)), verbose=0))
    1.0
    """
    check_arguments(batch_size=batch_size, verbose=verbose, steps=steps)
    adapter = adapter_of(model, "evaluate")
    model, asked = adapter.model, asked_for(plan)
    if reason := _why_stepwise(adapter, x, y, sample_weight):
        _leave_to_keras(model, asked, reason)
        return model.evaluate(x, y, batch_size, verbose, sample_weight, steps, callbacks, return_dict)
    with _told(verbose):
        run = _prepare("evaluate", adapter, (x, y, sample_weight), asked, {"batch_size": batch_size, "steps_per_epoch": steps})
        listed = callback_list(callbacks, model, verbose=verbose, epochs=1, steps=run.source.steps_per_epoch, history=False)
        pace = _pace(listed, "test", model)
        logs = _evaluate(adapter, Feed(run.source, strides=pace.strides), listed, pace, run.placement)
    return logs if return_dict else adapter.scores(logs)


def predict(
    model,
    x,
    *,
    batch_size: int | None = None,
    verbose: str | int = "auto",
    steps: int | None = None,
    callbacks=None,
    plan: Plan | str = "auto",
) -> Any:
    """The model's outputs for data: `keras.Model.predict`, in compiled chunks of steps.

    The model need not be compiled; it may be a bare Flax NNX module.

    Args and errors are those of `fit`.

    Args:
        steps: number of batches to take; None: as many as there are.

    Returns:
        NumPy arrays of shape (rows, ...) in the structure of the model's outputs.

    >>> import parafit, keras, numpy as np
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, kernel_initializer="ones")])
    >>> parafit.predict(model, np.ones((3, 2)), verbose=0).tolist()
    [[2.0], [2.0], [2.0]]
    """
    check_arguments(batch_size=batch_size, verbose=verbose, steps=steps)
    adapter = adapter_of(model, "predict")
    model, asked = adapter.model, asked_for(plan)
    if reason := _why_stepwise(adapter, x):
        _leave_to_keras(model, asked, reason)
        return model.predict(x, batch_size, verbose, steps, callbacks)
    with _told(verbose):
        run = _prepare("predict", adapter, (x,), asked, {"batch_size": batch_size, "steps_per_epoch": steps})
        listed = callback_list(callbacks, model, verbose=verbose, epochs=1, steps=run.source.steps_per_epoch, history=False)
        pace = _pace(listed, "predict", model)
        feed = Feed(run.source, strides=pace.strides)
        runner = runner_for(adapter, run.step, run.placement, feed.foreseen())
        with backends.current().running():
            return loop.predict(runner, feed, listed, pace)


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """A step on the devices of its plan, with its data.

    Attributes:
        source: the data.
        step: what runs.
        program: gives the step's program.
        placement: the devices.
    """

    source: Source
    step: Step
    program: Callable[[], Program]
    placement: Placement


def _prepare(verb: str, adapter: Adapter, data: tuple, asked: Plan | None, options: dict) -> _Prepared:
    """What fit, evaluate and predict do alike before a step runs.

    Args:
        verb: which of them.
        adapter: the model.
        data: x, y and sample_weight as far as there are such.
        asked: the plan that was asked for, None for "auto".
        options: of the source.
    """
    source = Source(*data, steps_per_execution=adapter.model.steps_per_execution, **options)
    checks.build(adapter, source, verb)
    step = {"fit": adapter.train_step, "evaluate": adapter.test_step, "predict": adapter.predict_step}[verb]()
    program = program_of(adapter, step, source.shapes)
    if asked is None and not source.knows_shapes:
        asked = Plan()  # a batch of a generator is not drawn to choose a plan
    plan = plan_for(asked, step, program, tell=lambda text: emit(Notice(text=text)))
    emit(Planned(plan=plan.short(), ranking=str(plan) if plan.ranking else ""))
    return _Prepared(source=source, step=step, program=program, placement=place(plan, step, program))


@contextmanager
def _told(verbose: str | int, log: str | Path | None = None) -> Iterator[None]:
    """While it lasts, what runs tell goes to the console, if they are to be verbose, and to the log."""
    with ExitStack() as stack:
        lines = [] if log is None else [stack.enter_context(closing(JsonLines(log)))]
        stack.enter_context(listening(*([Console()] if verbose else []), *lines))
        yield


@contextmanager
def _ending(pace: Pace) -> Iterator[None]:
    """Tell how a run ended, well or not."""
    try:
        yield
    except BaseException as error:
        emit(Ended(steps=pace.steps, seconds=pace.seconds, error=f"{type(error).__name__}: {error}"))
        raise
    emit(Ended(steps=pace.steps, seconds=pace.seconds))


class _Validation:
    """The validation at the end of an epoch, its data prepared once: before training, but for a generator, from which batches are drawn."""

    def __init__(self, adapter: Adapter, validation_data, callbacks, placement: Placement, *, batch_size, steps):
        self._adapter, self._callbacks, self._placement = adapter, callbacks, placement
        self._data = compat.unpack(validation_data)
        self._options = {"batch_size": batch_size, "steps_per_epoch": steps, "steps_per_execution": adapter.model.steps_per_execution}
        if not isinstance(self._data[0], GeneratorType):
            self._feed  # noqa: B018  (made, so that what is wrong with the data is said now)

    @cached_property
    def _feed(self) -> Feed:
        source = Source(*self._data, **self._options)
        checks.check(self._adapter, source, "evaluate", "validation_data")
        return Feed(source, strides=self._pace().strides)

    def _pace(self) -> Pace:
        return _pace(self._callbacks, "test", self._adapter.model)

    def logs(self) -> dict:
        logs = _evaluate(self._adapter, self._feed, self._callbacks, self._pace(), self._placement)
        return {f"val_{name}": value for name, value in logs.items()}


def _evaluate(adapter: Adapter, feed: Feed, callbacks, pace: Pace, placement: Placement) -> dict:
    runner = runner_for(adapter, adapter.test_step(), placement, feed.foreseen())
    with backends.current().running():
        return loop.evaluate(runner, feed, callbacks, pace)


def _pace(callbacks, phase: str, model) -> Pace:
    return Pace(batch_strides(callbacks, phase, model.steps_per_execution), model.steps_per_execution)


def _why_stepwise(adapter: Adapter, *parts) -> str | None:
    return "the data is sparse or ragged" if inputs.is_sparse(*parts) else adapter.why_stepwise()


def _leave_to_keras(model, asked: Plan | None, reason: str) -> None:
    if not hasattr(model, "fit"):
        raise ModelError(f"{model.name!r} cannot run, for {reason}: Flax modules run in compiled steps only. Pass dense arrays.")
    if asked not in (None, Plan()):
        raise PlanError(f"plan {asked.short()!r} needs compiled steps, but this model runs step by step: {reason}. Use plan='single'.")
    warnings.warn(f"parafit leaves this run to Keras, one step at a time: {reason}.", stacklevel=3)
