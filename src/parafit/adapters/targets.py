"""What a loss of Keras' own compares: an output and its target, of which the shapes must fit and the labels mean something.

Labels are looked at once: the least and the largest, where a loss wants class numbers or probabilities. What a sample weight of 0, a mask
or `ignore_class` leaves out of the loss may be any label.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from parafit.errors import DataError

SPARSE = frozenset({"sparse_categorical_crossentropy", "categorical_generalized_cross_entropy", "ctc"})
_BINARY = {"binary_crossentropy", "binary_focal_crossentropy"}
_ONE_HOT = {"categorical_crossentropy", "categorical_focal_crossentropy", "categorical_hinge"}
_WHOLE_BATCH = {"ctc", "dice", "tversky", "circle"}
_OVERSHOOT = 0.1
"""Interpolated images leave 0 to 1 by so much, and a crossentropy still means something."""

Shape = tuple[int | None, ...]
"""Rows first; None where a length is not known."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """An output, and the target that a loss of Keras' compares with it.

    Attributes:
        where: the target's name in messages.
        model: the model's name.
        function: the loss.
        output, target: shapes, rows first.
        axis: of the output, that classes lie along.
        ignored: the label that the loss leaves out.
        leaf, weights: places of the target and its sample weights among the leaves of a batch.
        mask: gives the output's mask from the model's inputs, if it has one.
        inputs: places of these.
        uncertain: whether there may be a mask that is not known.
    """

    where: str
    model: str
    function: str
    output: Shape
    target: Shape
    axis: int = -1
    ignored: int | None = None
    leaf: int
    weights: int | None
    mask: Callable | None
    inputs: list[int]
    uncertain: bool

    @property
    def classes(self) -> int | None:
        """How many classes the output tells apart."""
        return self.output[self.axis] if -len(self.output) <= self.axis < len(self.output) else None

    @property
    def _labels_shape(self) -> Shape:
        """The output's shape without the axis of the classes."""
        return tuple(size for place, size in enumerate(self.output) if place != self.axis % len(self.output))

    # Shapes ---------------------------------------------------------------------------------------------------------------------------

    def check_shape(self) -> None:
        """Refuse targets that the loss would broadcast, or cannot compare."""
        if self.function == "circle":
            return
        if self.function == "ctc":
            wanted = (None, None)
            fits = len(self.output) != 3 or len(self.target) == 2
        elif self.function in SPARSE:
            wanted = self._labels_shape
            column = self.function == "sparse_categorical_crossentropy" and self.target[-1:] == (1,)
            fits = same_shape(self.target, wanted) or (column and same_shape(self.target[:-1], wanted))
        else:
            wanted = self.output
            fits = same_shape(*_at_one_rank(self.target, self.output))
        if not fits:
            raise DataError(
                f"{self.where} has shape {shape_words(self.target)}, but the loss {self.function!r} compares outputs of shape "
                f"{shape_words(self.output)} with targets of shape {shape_words(wanted)}. {self._shape_advice()}"
            )

    def _shape_advice(self) -> str:
        output, target = self.output, self.target
        if self.function == "sparse_categorical_crossentropy" and len(target) == len(output) and target[-1:] == output[-1:]:
            return "These look like one-hot labels: use the loss 'categorical_crossentropy', or class numbers: y.argmax(axis=-1)."
        if self.function == "categorical_generalized_cross_entropy" and target[-1:] == (1,):
            return "Drop the last axis: y[:, 0]."
        labels = same_shape(target, output[:-1]) or (target[-1:] == (1,) and same_shape(target[:-1], output[:-1]))
        if self.function in _ONE_HOT and labels:
            return (
                f"These look like class numbers: use the loss 'sparse_categorical_crossentropy', or one-hot labels: "
                f"keras.utils.to_categorical(y, {output[-1]})."
            )
        if self.function in _BINARY and labels:
            return (
                f"For labels of two classes end the network with Dense(1, 'sigmoid'); for {output[-1]} classes use the loss "
                "'sparse_categorical_crossentropy'."
            )
        if len(output) > max(2, len(target)) or (len(output) == 3 and len(target) == 2):
            return "For one target a row reduce the outputs to one (return_sequences=False, pooling or Flatten), or give each its target."
        last = target[-1] if len(target) > 1 else 1
        return f"Give the targets that shape, or let the network end with {last} {'output' if last == 1 else 'outputs'}."

    def check_weights(self, shape: Shape) -> None:
        """Refuse sample weights that would be broadcast against the losses of other positions."""
        losses = self._labels_shape if self.function in SPARSE else _at_one_rank(self.target, self.output)[1][:-1]
        if self.function in _WHOLE_BATCH or not losses:
            return
        brought, weights = _at_one_rank(losses, shape)
        if len(brought) != len(weights) or not all(weight == 1 or _alike(loss, weight) for loss, weight in zip(brought[1:], weights[1:])):
            raise DataError(
                f"the sample weights of {self.where} have shape {shape_words(shape)}, but its losses have shape {shape_words(losses)}. "
                f"{self._weights_advice(losses, shape)}"
            )

    def _weights_advice(self, losses: Shape, weights: Shape) -> str:
        ones = ", 1" * (len(losses) - 1)
        if len(weights) < len(losses):
            return f"For a weight a row pass sample_weight.reshape(-1{ones}); class_weight is for one label a row."
        if len(self.output) > len(self.target) and self.output[-1] == 1:
            return "For a weight a position give the targets a last axis of 1, too: y[..., None]."
        return f"Give sample_weight the shape {shape_words(losses)}."

    # Labels ---------------------------------------------------------------------------------------------------------------------------

    def check(self, leaves: list) -> None:
        """Refuse labels that the loss would read as something else."""
        limits = self._limits()
        labels = np.asarray(leaves[self.leaf])
        if limits is None or self.uncertain or not labels.size:
            return
        least, most = limits
        if labels.dtype.kind in "biu" and least <= labels.min() and labels.max() <= most:
            return
        wrong = ~((labels >= least) & (labels <= most))
        if self.function in SPARSE and labels.dtype.kind not in "biu":
            wrong |= labels != np.floor(labels)
        if wrong.any() and self.ignored is not None:
            wrong &= labels != self.ignored
        if wrong.any() and self.weights is not None:
            wrong &= _spread(np.asarray(leaves[self.weights]), labels.shape) != 0
        if wrong.any() and self.mask is not None:
            wrong &= _spread(np.asarray(self.mask([leaves[number] for number in self.inputs])), labels.shape) != 0
        if wrong.any():
            raise self._wrong_labels(labels, wrong)

    def _limits(self) -> tuple[float, float] | None:
        if self.function in SPARSE:
            return 0, math.inf if self.classes is None else self.classes - 1
        return (-_OVERSHOOT, 1 + _OVERSHOOT) if self.function in _BINARY else None

    def _wrong_labels(self, labels: np.ndarray, wrong: np.ndarray) -> DataError:
        values = np.unique(labels[wrong] * 1)  # True as 1
        shown = ", ".join(f"{value}" for value in values[:3].tolist()) + (", …" if len(values) > 3 else "")
        row = int(np.argwhere(wrong)[0][0])
        found = f"{self.where} holds {shown} in {int(wrong.sum()):,} of {labels.size:,} labels, first in row {row}"
        if self.function in _BINARY:
            return DataError(
                f"{found}, but the loss {self.function!r} takes labels from 0 to 1. "
                f"{_binary_advice(labels[labels == labels], self.output[-1])}"
            )
        classes = self.classes
        whole = bool(np.all(labels[wrong] == np.floor(labels[wrong])))
        wanted = f"whole numbers from 0 to {classes - 1}" if classes else "whole numbers from 0 on"
        return DataError(
            f"{found}, but {self.model!r} tells {classes} {'class' if classes == 1 else 'classes'} apart, so the loss {self.function!r} "
            f"takes {wanted}. {_class_advice(labels, wrong, classes or 0) if whole else 'For quantities use a loss such as mse.'}"
        )


def _binary_advice(labels: np.ndarray, outputs: int | None) -> str:
    kinds = np.unique(labels[:10_000])
    if len(kinds) == 2:
        return f"Make them 0 and 1, such as (y == {kinds[1]}).astype('float32')."
    if np.all(labels == np.floor(labels)) and len(kinds) < 256 and outputs == 1 and labels.min() >= 0:
        return f"For {int(labels.max()) + 1} classes end the network with as many outputs and use 'sparse_categorical_crossentropy'."
    return "Scale them, such as y / 255 for pixels, or use another loss."


def _class_advice(labels: np.ndarray, wrong: np.ndarray, classes: int) -> str:
    least, most = int(labels.min()), int(labels.max())
    if least > 0 and most - least < classes:
        return f"Count from 0: pass y - {least}."
    if least < 0 and not np.any(labels[wrong] >= classes):
        return (
            "Number the classes from 0; if the label stands for no label, compile with "
            f"keras.losses.SparseCategoricalCrossentropy(ignore_class={least}), or give it a sample weight of 0."
        )
    two = " (or, for two classes, one output with the loss 'binary_crossentropy')" if classes == 1 and most == 1 else ""
    return f"Number the classes from 0, such as numpy.unique(y, return_inverse=True)[1], or end the network with {most + 1} outputs{two}."


def _at_one_rank(shape: Shape, other: Shape) -> tuple[Shape, Shape]:
    """Shapes as Keras' losses bring them to one rank: a last axis of 1 is dropped, or added to what has rows only."""
    if len(shape) < len(other):
        other, shape = _at_one_rank(other, shape)
    elif len(shape) == len(other) + 1 and shape[-1] == 1:
        return (shape, (*other, 1)) if len(other) == 1 else (shape[:-1], other)
    return shape, other


def same_shape(shape: Shape, other: Shape) -> bool:
    """Whether shapes agree, numbers of rows and unknown lengths left out.

    Args:
        shape, other: shapes of arrays, the number of rows first; None for an unknown length.
    """
    return len(shape) == len(other) and all(map(_alike, shape[1:], other[1:]))


def _alike(size: int | None, other: int | None) -> bool:
    return None in (size, other) or size == other


def shape_words(shape: Shape) -> str:
    """A shape in a message: `(rows, 10)`."""
    if not shape:
        return "()"
    inner = ["rows", *("any" if size is None else str(size) for size in shape[1:])]
    return f"({', '.join(inner)}{',' if len(inner) == 1 else ''})"


def _spread(weights: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Weights, or a mask, for each label."""
    weights = weights[..., 0] if weights.ndim > len(shape) else weights.reshape((*weights.shape, *(1,) * (len(shape) - weights.ndim)))
    return np.broadcast_to(weights, shape)
