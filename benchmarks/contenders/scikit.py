"""scikit-learn's MLPClassifier: Adam, no weight decay; it tracks the loss but no accuracy."""

import time

import numpy as np
from sklearn.neural_network import MLPClassifier

from benchmarks.workloads import Workload


def make(workload: Workload, x: np.ndarray, y: np.ndarray):
    """The contender; an epoch is one `partial_fit`, which shuffles and cuts batches itself."""
    return _PartialFit(workload, x, y)


class _PartialFit:
    def __init__(self, workload, x, y):
        self._x, self._y, self._classes = x, y, np.arange(workload.classes)
        self._network = MLPClassifier(workload.hidden, batch_size=workload.batch_size, alpha=0.0, epsilon=1e-7, random_state=0)

    def train(self, epochs: int) -> list[float]:
        ends = [time.perf_counter()]
        for _ in range(epochs):
            self._network.partial_fit(self._x, self._y, classes=self._classes)
            ends.append(time.perf_counter())
        return np.diff(ends).tolist()

    def predict(self) -> np.ndarray:
        return np.asarray(self._network.predict_proba(self._x))
