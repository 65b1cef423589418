"""A PyTorch training loop as a careful user writes it: fused Adam, rows taken from one tensor, no DataLoader in the way."""

import time

import numpy as np
import torch
from torch import nn

from benchmarks.contenders import torch_models
from benchmarks.workloads import Workload


def make(workload: Workload, x: np.ndarray, y: np.ndarray, *, compiled: bool = False):
    """The contender; with `compiled` the model goes through `torch.compile`."""
    model = torch_models.build(workload)
    if compiled:
        model.compile()
    return Loop(model, torch.from_numpy(x), torch.from_numpy(y).long(), workload.batch_size)


class Loop:
    """Trains `model` on `batch_size` rows of `x` and `y` a step, tracking loss and accuracy without waiting for them."""

    def __init__(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor, batch_size: int):
        self.model, self._x, self._y, self._batch_size = model, x, y, batch_size
        self._optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-7, fused=True)
        self._loss = nn.CrossEntropyLoss()

    def train(self, epochs: int) -> list[float]:
        self.model.train()
        ends = [time.perf_counter()]
        for _ in range(epochs):
            self._epoch()
            ends.append(time.perf_counter())
        return np.diff(ends).tolist()

    def predict(self) -> np.ndarray:
        self.model.eval()
        with torch.inference_mode():
            return torch.cat([self.model(rows).softmax(dim=1) for rows in self._x.split(self._batch_size)]).numpy()

    def _epoch(self) -> tuple[float, float]:
        """One pass over the rows in a new order; its mean loss and accuracy."""
        total, correct = torch.zeros(()), torch.zeros((), dtype=torch.long)
        for rows in torch.randperm(len(self._x)).split(self._batch_size):
            x, y = self._x[rows], self._y[rows]
            logits = self.model(x)
            loss = self._loss(logits, y)
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
            total += loss.detach() * len(rows)
            correct += (logits.detach().argmax(dim=1) == y).sum()
        return total.item() / len(self._x), correct.item() / len(self._x)
