"""Keras callbacks, and how often each must be given control."""

import keras
from keras.callbacks import Callback

from parafit.support import compat

_HOOKS = {
    "train": ("on_batch_begin", "on_batch_end", "on_train_batch_begin", "on_train_batch_end"),
    "test": ("on_test_batch_begin", "on_test_batch_end"),
    "predict": ("on_predict_batch_begin", "on_predict_batch_end"),
}


def callback_list(callbacks, model, *, verbose, epochs: int, steps: int | None, history: bool) -> keras.callbacks.CallbackList:
    """The user's callbacks with Keras' progress bar and, for training, History; a CallbackList is taken as it is.

    Args:
        callbacks: a list, one callback, None, or a CallbackList.
        model: the model that the callbacks see.
        verbose: 0: no progress bar; else as Keras takes it.
        epochs: number of epochs that will run.
        steps: number of steps in an epoch, None where nobody knows.
        history: whether `model.history` is to be written.
    """
    if isinstance(callbacks, keras.callbacks.CallbackList):
        return callbacks
    return keras.callbacks.CallbackList(
        callbacks, add_history=history, add_progbar=verbose != 0, verbose=verbose, epochs=epochs, steps=steps, model=model
    )


def batch_strides(callbacks: keras.callbacks.CallbackList, phase: str, steps_per_execution: int) -> list[int]:
    """Every how many batches some callback must have control: one number per callback that needs it.

    Args:
        callbacks: the run's callbacks.
        phase: "train", "test" or "predict".
        steps_per_execution: what the model was compiled with: the user's own word on how often is enough.

    Keras' own callbacks are known; a callback of the user's that has a batch hook gets every batch. Checkpoints that count batches
    count executions where these are of several, as in Keras.
    """
    strides = (_stride(callback, hook, steps_per_execution) for callback in callbacks.callbacks for hook in _HOOKS[phase])
    return sorted({stride for stride in strides if stride is not None})


def batch_hooks(callbacks: keras.callbacks.CallbackList, steps_per_execution: int) -> str:
    """Which callbacks must have control between batches, in words; "" where none must.

    Args:
        callbacks, steps_per_execution: as in `batch_strides`.
    """
    names = {
        type(callback).__name__
        for callback in callbacks.callbacks
        for phase in ("train", "test")
        for hook in _HOOKS[phase]
        if _stride(callback, hook, steps_per_execution) is not None
    }
    return f"its callback {', '.join(sorted(names))} is called between batches" if names else ""


def looks_at_weights(callbacks: keras.callbacks.CallbackList) -> bool:
    """Whether a callback may look at more than logs, or change something, at the ends of epochs; Keras' own callbacks are known."""
    quiet = (keras.callbacks.History, keras.callbacks.CSVLogger, keras.callbacks.TerminateOnNaN)
    stops = lambda each: type(each) is keras.callbacks.EarlyStopping and not each.restore_best_weights  # noqa: E731
    return any(type(each) not in quiet and not stops(each) for each in callbacks.callbacks)


def are_of_users(callbacks: keras.callbacks.CallbackList) -> bool:
    """Whether a callback is not one of Keras' own, and may look at whatever it likes."""
    return any(not type(each).__module__.startswith("keras.") or vars(each).keys() & _FREE for each in callbacks.callbacks)


_FREE = {"on_epoch_begin", "on_epoch_end", "on_train_begin", "on_train_end"}
"""Hooks that LambdaCallback sets on the instance."""


def looks_at_tests(callbacks: keras.callbacks.CallbackList) -> bool:
    """Whether a callback has a hook around validations."""
    hooks = ("on_test_begin", "on_test_end")
    return any(
        hook in vars(each) or getattr(type(each), hook) is not getattr(Callback, hook) for each in callbacks.callbacks for hook in hooks
    )


def _stride(callback: Callback, hook: str, otherwise: int) -> int | None:
    if hook in vars(callback):  # LambdaCallback sets its hooks on the instance
        return otherwise
    owner = next(owner for owner in type(callback).__mro__ if hook in vars(owner))
    known = {Callback: None, keras.callbacks.ProgbarLogger: None, keras.callbacks.TerminateOnNaN: None}
    if owner in known:
        return known[owner]
    if owner in (keras.callbacks.ModelCheckpoint, keras.callbacks.BackupAndRestore, keras.callbacks.OrbaxCheckpoint):
        saves = isinstance(callback.save_freq, int) and callback.save_freq
        return (callback.save_freq if otherwise == 1 else otherwise) if saves else None
    if owner is keras.callbacks.TensorBoard and callback.update_freq == "epoch" and not compat.times_batches(callback):
        return None
    return otherwise
