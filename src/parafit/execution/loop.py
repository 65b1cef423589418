"""Training, evaluation and prediction: steps in compiled chunks, callbacks between them.

A *group* is what runs between two callbacks: as many blocks as take a fraction of a second, dispatched one after the
other so that the host fills the next block while the devices compute. Before every callback the model holds the
current state; after it the state is read again, so what a callback writes counts.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from parafit.data.feed import Epoch, Feed
from parafit.errors import NonFiniteLossError
from parafit.execution.events import EpochEnded, GroupEnded, emit
from parafit.execution.pace import Pace
from parafit.execution.runner import Runner
from parafit.support import compat


def train(
    runner: Runner,
    feed: Feed,
    callbacks,
    pace: Pace,
    *,
    first_epoch: Callable[[], int],
    epochs: int,
    validate: Callable[[int], dict],
) -> None:
    """Train for epochs `first_epoch()` to `epochs`, as `keras.Model.fit` does once data and callbacks are there.

    Args:
        runner: the model's training step on the plan's devices.
        feed: the training data.
        callbacks: the run's callbacks; `model.history` is among them.
        pace: how many steps to run between two callbacks.
        first_epoch: asked after `on_train_begin`, when a callback may have restored a state.
        epochs: the epoch to stop before.
        validate: called with the epoch's number, gives the logs to add to it.

    Raises:
        NonFiniteLossError: the loss became NaN or infinite and no callback ended training for it.
    """
    adapter, model = runner.adapter, runner.adapter.model
    model.stop_training = False
    finished, logs = False, {}
    feed.source.restart()
    callbacks.on_train_begin()
    try:
        for epoch in range(first_epoch(), epochs):
            model.reset_metrics()
            callbacks.on_epoch_begin(epoch)
            last = _train_epoch(epoch, feed, runner, callbacks, pace)
            logs = adapter.result(last) | validate(epoch)
            callbacks.on_epoch_end(epoch, logs)
            emit(EpochEnded(epoch=epoch, logs=logs))
            if model.stop_training:
                break
        finished = True
    finally:
        runner.leave()
        if epochs > 0:
            adapter.finish_training()
        if finished:
            callbacks.on_train_end(logs)


def evaluate(runner: Runner, feed: Feed, callbacks, pace: Pace) -> dict[str, float]:
    """The loss and metrics of the model on the feed's one epoch, from its source's beginning, by name.

    Args:
        runner: the model's step of evaluation on the plan's devices.
        feed, callbacks, pace: as in `train`.
    """
    adapter, model = runner.adapter, runner.adapter.model
    feed.source.restart()
    model.stop_evaluating = False
    callbacks.on_test_begin()
    model.reset_metrics()
    logs = {}
    for group in _groups(feed.epoch(), runner, pace, callbacks.on_test_batch_begin):
        logs = group.logs
        callbacks.on_test_batch_end(group.last, logs)
        if model.stop_evaluating:
            break
    runner.leave()
    logs = compat.log_values(adapter.result(logs))
    callbacks.on_test_end(logs)
    return logs


def predict(runner: Runner, feed: Feed, callbacks, pace: Pace) -> Any:
    """The model's outputs for the feed's one epoch: NumPy arrays of shape (rows, ...) in the structure of the outputs.

    Args:
        runner: the model's step of prediction on the plan's devices.
        feed, callbacks, pace: as in `train`.
    """
    model = runner.adapter.model
    if feed.source.was_drawn:
        feed.source.restart()
    model.stop_predicting = False
    callbacks.on_predict_begin()
    parts = []
    for group in _groups(feed.epoch(), runner, pace, callbacks.on_predict_batch_begin):
        parts += [_joined(group.outputs)] if pace.strides else group.outputs  # else no callback looks at them
        callbacks.on_predict_batch_end(group.last, {"outputs": parts[-1]})
        if model.stop_predicting:
            break
    runner.leave()
    callbacks.on_predict_end()
    return _joined(parts)


@dataclass(frozen=True)
class Group:
    """Steps that ran between two callbacks: their first and last number, whether all went well, the last logs, and predictions."""

    first: int
    last: int
    healthy: bool
    logs: Any
    outputs: list


def _train_epoch(epoch: int, feed: Feed, runner: Runner, callbacks, pace: Pace) -> dict:
    model = runner.adapter.model
    logs = {}
    for group in _groups(feed.epoch(), runner, pace, callbacks.on_train_batch_begin):
        logs = group.logs
        callbacks.on_train_batch_end(group.last, logs)
        if not group.healthy:
            seconds = runner.recover()
            if not model.stop_training:
                raise bad_loss(epoch, group.last, float(logs["loss"]), seconds, feed.source.find_non_finite() or runner.find_non_finite())
        if model.stop_training:
            break
    return logs


def _groups(epoch: Epoch, runner: Runner, pace: Pace, on_begin: Callable[[int], None]):
    first = 0
    block = epoch.take(pace.next_steps())
    while block is not None:
        on_begin(first)
        runner.enter()
        planned, compiling, started = pace.next_steps(), runner.seconds_compiling, time.perf_counter()
        steps, outputs = 0, []
        while block is not None:
            outputs.append((block.steps, runner.run(block)))
            steps += block.steps
            block = epoch.take(planned - steps) if steps < planned else None
        pace.count(steps)
        block = epoch.take_ahead(pace.next_steps())
        tally = runner.rest()
        seconds = time.perf_counter() - started - (runner.seconds_compiling - compiling)
        pace.record(steps, seconds)
        emit(GroupEnded(first=first, last=first + steps - 1, seconds=seconds))
        # An execution cut short by the end of the epoch has the number of its last step as if it were whole, as in Keras.
        last = first + (-(-steps // pace.execution) * pace.execution - 1 if tally.healthy else int(tally.done))
        yield Group(first, last, tally.healthy, tally.logs, [_rows(*part) for part in outputs] if outputs[0][1] is not None else [])
        first += steps
        block = block or epoch.take(pace.next_steps())


def _joined(parts: list) -> Any:
    """Predictions of several blocks in one array each."""
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def _rows(steps: int, outputs: Any) -> Any:
    """Predictions of shape (capacity, batch, ...) as host arrays of shape (steps · batch, ...)."""
    return jax.tree.map(lambda array: np.asarray(array)[:steps].reshape((-1, *array.shape[2:])), outputs)


def bad_loss(epoch: int, step: int, loss: float, seconds: float, found: str) -> NonFiniteLossError:
    """The error of a loss that is not finite.

    Args:
        epoch, step: where it was, from 0.
        loss: its value.
        seconds: age of the state that the model holds.
        found: what is known of the cause, in words; "" where nothing is.
    """
    causes = found or (
        "Often the learning rate is too high, or a logarithm or division meets zero: lower it, scale the data, or clip gradients."
    )
    return NonFiniteLossError.advising(
        f"the loss became {loss} in epoch {epoch + 1} at step {step + 1}. Training stopped; the model holds its last good weights, from "
        f"{seconds:.1f} s before. {causes}",
        python="To end training without an error, pass keras.callbacks.TerminateOnNaN().",
        command="Give a network of your own, with other settings, by --model.",
        epoch=epoch,
        step=step,
        value=loss,
    )
