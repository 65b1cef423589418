"""Whether the rows of a batch may go through a pipeline apart: its loss must be the mean of theirs, with nothing drawn for all at once."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from parafit.adapters.step import Step
from parafit.errors import PlanError
from parafit.planner.plan import Plan
from parafit.techniques.microbatches import MEAN_TOLERANCE, TRIES, rows_of, some_rows


def check_apart(step: Step, batch: Any, plan: Plan) -> None:
    """Refuse a pipeline whose microbatches would not mean what their batch does.

    Args:
        step: of training.
        batch: shapes of the batch's arrays.
        plan: with a pipeline.

    Raises:
        PlanError: the step cannot be taken apart, or its rows cannot; why.
    """
    if step.parts is None:
        raise PlanError(
            f"plan {plan.short()!r}: a pipeline needs Keras' own training step, but this model's class has its own {step.own!r}. "
            "Leave pipeline out of the plan."
        )
    if plan.microbatches > 1 and (reason := _why_not_apart(step, batch)):
        raise PlanError(
            f"plan {plan.short()!r}: a batch of this model cannot go through a pipeline in microbatches: {reason}. Leave pipeline out of "
            "the plan; microbatches= alone may take it, and recompute=blocks and zero= save memory as well."
        )


def _why_not_apart(step: Step, batch: Any) -> str:
    assert step.parts
    state, parts = step.read(), step.parts
    if reason := parts.couples or parts.follows or parts.weighs:
        return reason
    lengths = sorted({leaf.shape[:1] for leaf in jax.tree.leaves(batch)})
    if len(lengths) > 1:
        return f"its arrays have different numbers of rows ({', '.join(str(*length) or 'none' for length in lengths)})"
    loss = jax.jit(lambda batch: parts.loss(state.weights, state, batch)[0])
    if "random_bits" in str(jax.make_jaxpr(loss)(batch)):
        return "it draws random numbers for all rows of a batch at a time"
    return _why_not_mean(loss, batch)


def _why_not_mean(loss: Callable, batch: Any) -> str:
    """Why the loss of a batch is not the mean of the losses of its parts, by a few rows; "" where it is."""
    for seed in range(TRIES):
        numbers = np.random.default_rng(seed)
        rows = jax.tree.map(lambda leaf: some_rows(leaf, numbers, 2), batch)  # noqa: B023  (called at once)
        try:
            both, *each = (float(loss(part)) for part in (rows, _row(rows, 0), _row(rows, 1)))
        except (TypeError, ValueError) as error:
            return f"it takes {rows_of(batch)} rows only ({(str(error).splitlines() or [''])[0].rstrip('.')})"
        if not math.isclose(both, sum(each) / 2, rel_tol=MEAN_TOLERANCE, abs_tol=MEAN_TOLERANCE):
            told = f"the loss of two rows is {both:.6g}, and the mean of their losses {sum(each) / 2:.6g}"
            return f"{told}: it sums over the batch, or ties its rows"
    return ""


def _row(rows: Any, index: int) -> Any:
    return jax.tree.map(lambda array: array[index : index + 1] if array.ndim else array, rows)
