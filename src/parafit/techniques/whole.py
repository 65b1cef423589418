"""A step as one flat function of a microbatch: what a pipeline is cut from."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np

from parafit.adapters.step import Parts, State, Step
from parafit.errors import PlanError
from parafit.planner.program import Leaf
from parafit.tracing.inline import Inlined, inlined
from parafit.tracing.trace import jaxpr_of, shapes_of


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A step as one function of flat arguments: weights, state, the number of the first row, and the rows of a microbatch.

    It gives flat results: the loss to differentiate, if it trains; its outputs (logs or predictions); the new state.

    Attributes:
        flat: the traced function.
        leaves: what each of the weights and of the state's arrays is.
        weights: how many weights there are, the first arguments.
        others: how many variables of layers it may change, the next arguments.
        metrics: how many variables of metrics, the next ones.
        slots: how many arrays of the optimizer it reads, the next ones.
        trains: whether its first result is the loss to differentiate.
        outputs: shapes of its outputs.
        rows: of a microbatch.
    """

    flat: Inlined
    leaves: tuple[Leaf, ...]
    weights: int
    others: int
    metrics: int
    slots: int
    trains: bool
    outputs: Any
    rows: int

    @property
    def state(self) -> range:
        """The arguments that are state."""
        return range(self.weights, self.weights + self.others + self.metrics + self.slots)

    @property
    def measures(self) -> range:
        """The arguments that are variables of metrics."""
        return range(self.weights + self.others, self.weights + self.others + self.metrics)

    @property
    def batch(self) -> range:
        """The arguments that differ from microbatch to microbatch: the number of the first row, then arrays."""
        return range(self.state.stop, len(self.flat.inputs))

    @cached_property
    def replaces(self) -> dict[int, int]:
        """For each result that is new state, the argument whose place it takes."""
        kept = self.others + self.metrics
        first = len(self.flat.outputs) - kept
        return {first + place: self.weights + place for place in range(kept)}

    @property
    def told(self) -> range:
        """The results that are outputs."""
        return range(int(self.trains), len(self.flat.outputs) - self.others - self.metrics)


def whole_step(step: Step, batch: Any) -> Whole:
    """A step, traced for a microbatch.

    Args:
        step: of training, evaluation or prediction.
        batch: shapes of the microbatch's arrays, each of shape (rows, ...).

    Raises:
        PlanError: a training step that the model's class has itself, so that it cannot be taken apart.
    """
    function = _training(step) if step.name == "train" else _forward(step)
    state = step.read()
    weights = state.weights if step.name == "train" else step.read_fixed()
    arguments = (list(weights), list(state.others), list(state.metrics), list(state.slots), np.int32(0), batch)
    closed, shapes = jaxpr_of(function, *shapes_of(arguments))
    fixed, leaves = step.leaves
    return Whole(
        flat=inlined(closed),
        leaves=(*(leaves.weights if step.name == "train" else fixed), *leaves.others, *leaves.metrics, *leaves.slots),
        weights=len(weights),
        others=len(state.others),
        metrics=len(state.metrics),
        slots=len(state.slots),
        trains=step.name == "train",
        outputs=shapes[1],
        rows=max((leaf.shape[0] for leaf in jax.tree.leaves(batch) if leaf.shape), default=1),
    )


def _training(step: Step) -> Callable:
    parts = step.parts
    if parts is None:
        raise PlanError(
            f"a pipeline takes Keras' own training step apart, but this model's class has its own {step.own!r}. Leave pipeline out."
        )
    return _measured(parts)


def _measured(parts: Parts) -> Callable:
    def whole(weights, others, metrics, slots, row, batch):
        scaled, aux = parts.loss(weights, State(weights, others, slots, metrics), batch)
        loss, predictions, new_others, new_metrics = aux
        logs, new_metrics = parts.measure(list(new_metrics), loss, predictions, batch)
        return scaled, logs, _as_before(others, new_others), _as_before(metrics, new_metrics)

    return whole


def _forward(step: Step) -> Callable:
    def whole(weights, others, metrics, slots, row, batch):
        outputs, state = step.function(weights, State(others=others, metrics=metrics, slots=slots), batch)
        return None, outputs, _as_before(others, state.others), _as_before(metrics, state.metrics)

    return whole


def _as_before(old: list, new: Any) -> list:
    """New state in the dtypes that it had."""
    return [array if array.dtype == before.dtype else array.astype(before.dtype) for before, array in zip(old, new)]
