"""`parafit.fit` and `keras.Model.fit` with the same model and the same call."""

import importlib
import time
from functools import partial

import numpy as np

from benchmarks.workloads import Workload


def make(workload: Workload, x: np.ndarray, y: np.ndarray, *, parafit: bool = False, steps_per_execution: int = 1):
    """The contender; `parafit` decides whose `fit` and `predict` it calls."""
    library = importlib.import_module("parafit") if parafit else None
    from benchmarks.contenders import keras_models

    model = keras_models.build(workload, steps_per_execution=steps_per_execution)
    fit, predict = (partial(library.fit, model), partial(library.predict, model)) if library else (model.fit, model.predict)
    return _Fit(fit, predict, x, y, workload.batch_size)


class _Fit:
    def __init__(self, fit, predict, x, y, batch_size):
        self._fit, self._predict, self._x, self._y, self._batch_size = fit, predict, x, y, batch_size

    def train(self, epochs: int) -> list[float]:
        ends = [time.perf_counter()]
        self._fit(self._x, self._y, batch_size=self._batch_size, epochs=epochs, verbose=0, callbacks=[_clock(ends)])
        return np.diff(ends).tolist()

    def predict(self) -> np.ndarray:
        return np.asarray(self._predict(self._x, batch_size=self._batch_size, verbose=0))


def _clock(ends: list[float]):
    """A callback that notes when epochs end: `on_epoch_end` has the epoch's metrics, so its computation is over."""
    import keras

    class Clock(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            ends.append(time.perf_counter())

    return Clock()
