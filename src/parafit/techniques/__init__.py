"""What a plan does inside a training step: gradients sharded, gradients accumulated, activations computed again."""

from collections.abc import Callable
from typing import Any

import jax

from parafit.adapters.step import Parts, State, Step
from parafit.errors import PlanError
from parafit.placement import Placement
from parafit.planner.program import Leaf
from parafit.techniques.microbatches import accumulate, part_losses
from parafit.techniques.recompute import in_segments


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
        return _compose(step, step.parts, placement, batch)
    if wanted["microbatches"] or wanted["recompute"]:
        raise PlanError(
            f"plan {plan.short()!r}: microbatches and recompute need Keras' own training step, but this model's class has its own "
            f"{step.own!r}. Leave them out of the plan, or accumulate in the optimizer (gradient_accumulation_steps=)."
        )
    return step.function


def _compose(step: Step, parts: Parts, placement: Placement, batch: Any) -> Callable:
    plan, weights = placement.plan, step.leaves[1].weights
    gradient_leaves = [Leaf(name=f"{weight.name}/gradient", role="gradient", like=weight.name) for weight in weights]
    wrap = in_segments if plan.recompute == "blocks" else lambda loss: loss
    if plan.microbatches > 1:
        gradients_of = accumulate(parts, part_losses(step, batch, plan), placement, wrap)
    else:
        gradients_of = _gradients(wrap(parts.loss), parts.measure)

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
