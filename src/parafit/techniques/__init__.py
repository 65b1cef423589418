"""What a plan does inside a training step: gradients sharded, gradients accumulated, activations computed again."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from parafit.adapters.step import Parts, State, Step
from parafit.errors import PlanError
from parafit.placement import Placement
from parafit.planner.layout import pieces
from parafit.planner.program import Leaf
from parafit.techniques.recompute import in_segments

_MEAN_TOLERANCE = 1e-3
"""Rounding in float32 through a deep network stays below this; a loss that sums over its rows, or divides by sums, is off by more."""
_TRIES = 3
"""Pairs of rows that are tried: of two, labels may be such that a loss does not show that it ties them."""


def planned_function(step: Step, placement: Placement, batch: Any) -> Callable:
    """`step.function` with what the plan does inside it: a function of `(fixed, state, batch)`.

    Args:
        step: the model's step.
        placement: the plan on devices.
        batch: shapes of the batch's arrays.

    Raises:
        PlanError: the plan wants something of a step that cannot be taken apart.
    """
    plan = placement.plan
    wanted = {"zero": plan.zero_stage > 1, "microbatches": plan.microbatches > 1, "recompute": plan.recompute != "none"}
    if step.name != "train" or not any(wanted.values()):
        return step.function
    if step.parts is not None:
        if wanted["microbatches"]:
            _check_parts(step, step.parts, batch, plan.short())
        return _compose(step.parts, placement, step.leaves[1].weights)
    if wanted["microbatches"] or wanted["recompute"]:
        raise PlanError(
            f"plan {plan.short()!r}: microbatches and recompute need Keras' own training step, but this model's class has its own "
            f"{step.own!r}. Leave them out of the plan, or accumulate in the optimizer (gradient_accumulation_steps=)."
        )
    return step.function


def _check_parts(step: Step, parts: Parts, batch: Any, plan: str) -> None:
    """Refuse to cut a batch whose loss is not the mean of the losses of its parts: by what is known of the layers, and by trying it."""
    state = step.read()
    loss = jax.jit(lambda batch: parts.loss(state.weights, state, batch)[0])
    reason = parts.couples
    if not reason and "random_bits" in str(jax.make_jaxpr(loss)(batch)):
        reason = "it draws random numbers for all rows of a batch at a time"
    if not reason and len(lengths := sorted({leaf.shape[:1] for leaf in jax.tree.leaves(batch)})) > 1:
        reason = f"its arrays have different numbers of rows ({', '.join(str(*length) or 'none' for length in lengths)})"
    if not reason:
        reason = _why_not_mean(loss, batch)
    if reason:
        raise PlanError(
            f"plan {plan!r}: a batch of this model cannot be cut into microbatches: {reason}. Leave microbatches out of the plan; "
            "recompute=blocks and zero= save memory as well."
        )


def _why_not_mean(loss: Callable, batch: Any) -> str:
    """Why the loss of a batch is not the mean of the losses of its parts, by a few rows; "" where it is."""
    for seed in range(_TRIES):
        numbers = np.random.default_rng(seed)
        rows = jax.tree.map(lambda leaf: _some_rows(leaf, numbers), batch)  # noqa: B023  (called at once)
        try:
            both, *each = (float(loss(part)) for part in (rows, _row(rows, 0), _row(rows, 1)))
        except (TypeError, ValueError) as error:
            size = next(leaf.shape[0] for leaf in jax.tree.leaves(batch) if leaf.shape)
            return f"it takes {size} rows only ({(str(error).splitlines() or [''])[0].rstrip('.')})"
        if not math.isclose(both, sum(each) / 2, rel_tol=_MEAN_TOLERANCE, abs_tol=_MEAN_TOLERANCE):
            told = f"the loss of two rows is {both:.6g}, and the mean of their losses {sum(each) / 2:.6g}"
            return f"{told}: it sums over the batch, or ties its rows"
    return ""


def _some_rows(leaf: Any, numbers: np.random.Generator) -> Any:
    """Two rows to try a loss on: any numbers, or the first two classes and words."""
    if not leaf.shape:
        return np.zeros((), leaf.dtype)
    shape = (2, *leaf.shape[1:])
    whole = np.issubdtype(leaf.dtype, np.integer) or leaf.dtype == bool
    return (numbers.integers(0, 2, shape) if whole else numbers.uniform(size=shape)).astype(leaf.dtype)


def _row(rows: Any, index: int) -> Any:
    return jax.tree.map(lambda array: array[index : index + 1] if array.ndim else array, rows)


def _compose(parts: Parts, placement: Placement, weights: Sequence[Leaf]) -> Callable:
    plan = placement.plan
    gradient_leaves = [Leaf(name=f"{weight.name}/gradient", role="gradient", like=weight.name) for weight in weights]
    loss = in_segments(parts.loss) if plan.recompute == "blocks" else parts.loss
    gradients_of = _gradients(loss, parts.measure)
    if plan.microbatches > 1:
        gradients_of = accumulate(gradients_of, placement)

    def function(fixed, state, batch):
        gradients, logs, others, metrics = gradients_of(state, batch)
        gradients = placement.constrain(placement.stored, gradient_leaves, gradients)
        weights, slots = parts.update(state.slots, gradients, state.weights)
        return logs, State(weights, others, slots, metrics)

    return function


def _gradients(loss: Callable, measure: Callable) -> Callable:
    def gradients_of(state, batch):
        (_, aux), gradients = jax.value_and_grad(loss, has_aux=True)(state.weights, state, batch)
        unscaled, predictions, others, metrics = aux
        logs, metrics = measure(metrics, unscaled, predictions, batch)
        return gradients, logs, list(others), list(metrics)

    return gradients_of


def accumulate(gradients_of: Callable, placement: Placement) -> Callable:
    """`gradients_of` run on microbatches one after the other: gradients are those of the mean loss over the whole batch.

    A batch that the devices and microbatches do not divide is cut into equal parts and a smaller last one; no part is split unevenly.

    Args:
        gradients_of: `(weights, (non-trainable, optimizer, metrics), batch) -> (gradients, logs, non-trainable, metrics)`.
        placement: its plan says how many microbatches there are, and its devices how each is split.
    """

    def accumulated(state, batch):
        rows = _rows(batch)
        parts, rest = _cut(batch, rows, placement)

        def run(carry, part):
            total, others, metrics = carry
            part = placement.split_batch(part)
            gradients, logs, others, metrics = gradients_of(state._replace(others=others, metrics=metrics), part)
            total = jax.tree.map(lambda sum_, gradient: sum_ + gradient * (_rows(part) / rows), total, gradients)
            return (total, others, metrics), logs

        carry = jax.tree.map(jnp.zeros_like, state.weights), list(state.others), list(state.metrics)
        carry, logs = jax.lax.scan(run, carry, parts)
        logs = jax.tree.map(lambda values: values[-1], logs)
        if rest is not None:
            carry, logs = run(carry, rest)
        total, others, metrics = carry
        return total, logs, others, metrics

    return accumulated


def _rows(batch: Any) -> int:
    return next(leaf.shape[0] for leaf in jax.tree.leaves(batch) if leaf.ndim)


def _cut(batch: Any, rows: int, placement: Placement) -> tuple[Any, Any]:
    """Microbatches stacked along a new first dimension, and the rows that are left, None where there are none.

    Where everything divides, each device cuts its own share of the batch, so that no rows move. Elsewhere they are those of
    `layout.pieces`.
    """
    devices, count = placement.batch_parts, placement.plan.microbatches
    if rows % (devices * count) == 0:
        shape = (devices, count, rows // (devices * count))
        return jax.tree.map(lambda array: _own_shares(array, shape), batch), None
    first, *rest = pieces(rows, placement.plan)
    end = first.count * first.rows
    batch = placement.replicate(batch)
    parts = jax.tree.map(lambda array: array[:end].reshape((first.count, first.rows, *array.shape[1:])), batch)
    return parts, jax.tree.map(lambda array: array[end:], batch) if rest else None


def _own_shares(array, shape: tuple[int, int, int]):
    devices, count, size = shape
    return jnp.moveaxis(array.reshape((*shape, *array.shape[1:])), 1, 0).reshape((count, devices * size, *array.shape[1:]))
