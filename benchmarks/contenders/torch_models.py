"""The workloads as PyTorch modules that return logits, as PyTorch users write them."""

from itertools import pairwise

import torch
from torch import nn

from benchmarks.workloads import Workload


def build(workload: Workload) -> nn.Module:
    """The module of `workload`, with the layers and sizes of its Keras model."""
    torch.manual_seed(0)
    return {"mlp": _mlp, "cnn": _cnn, "lstm": _Lstm, "transformer": _transformer}[workload.family](workload)


def _mlp(workload: Workload) -> nn.Module:
    parts = []
    for inputs, width in pairwise((*workload.input_shape, *workload.hidden)):
        parts.append(nn.Linear(inputs, width))
        if workload.batch_norm:
            parts.append(nn.BatchNorm1d(width, eps=1e-3, momentum=0.01))
        parts.append(nn.ReLU())
        if workload.dropout:
            parts.append(nn.Dropout(workload.dropout))
    return nn.Sequential(*parts, nn.Linear(workload.hidden[-1], workload.classes))


def _cnn(workload: Workload) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 28)),
        nn.Flatten(3),
        nn.Conv2d(1, 32, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(workload.dropout),
        nn.Linear(1600, workload.classes),
    )


class _Lstm(nn.Module):
    def __init__(self, workload: Workload):
        super().__init__()
        self.lstm = nn.LSTM(workload.input_shape[1], 64, batch_first=True)
        self.head = nn.Linear(64, workload.classes)

    def forward(self, x):
        outputs, _ = self.lstm(x)
        return self.head(outputs[:, -1])


def _transformer(workload: Workload) -> nn.Module:
    layer = nn.TransformerEncoderLayer(128, 4, dim_feedforward=512, dropout=workload.dropout, activation="gelu", batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Embedding(workload.vocabulary, 128), encoder, _MeanOverTokens(), nn.Linear(128, workload.classes))


class _MeanOverTokens(nn.Module):
    def forward(self, x):
        return x.mean(dim=1)
