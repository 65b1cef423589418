"""Gradients of a batch, accumulated over microbatches: parts of it, run one after the other."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Var, jaxpr_as_fun

from parafit import backends
from parafit.adapters.step import Parts, State, Step
from parafit.errors import PlanError
from parafit.placement import Placement
from parafit.planner.layout import pieces
from parafit.planner.plan import Plan
from parafit.techniques.shares import Kind, Share, share
from parafit.techniques.traces import NoShareError, flat
from parafit.tracing.trace import jaxpr_of, shapes_of

MEAN_TOLERANCE = 1e-3
"""Rounding in float32 through a deep network stays below this; a loss that ties rows is off by more."""
TRIES = 3
"""Times that a few rows are tried: their labels may be such that a loss does not show that it ties them."""
_TRIED = 4
"""Rows that are tried. Of one row, programs are often not what they are of several."""


class PartLoss:
    """The loss of a batch, traced once for all rows and once for some, and run on those.

    Args:
        loss: as `Parts.loss`.
        state, batch: arrays or shapes.
        some: rows of a microbatch.

    Attributes:
        others, metrics: what the loss makes of those groups of the state.
        predictions: what it makes of its outputs.
        unchanged: which metrics it leaves alone.
        why: what ties its rows together, "" where nothing does.

    Raises:
        NoShareError: it is another program for some rows than for all.
    """

    def __init__(self, loss: Callable, state: State, batch: Any, some: int):
        state, batch = shapes_of((state, batch))
        self.rows, self.some = rows_of(batch), some
        arguments, part = (state.weights, state, batch), jax.tree.map(lambda leaf: _resized(leaf, some), batch)
        whole, shapes = flat(loss, *arguments)
        traced, _ = flat(loss, state.weights, state, part)
        self._share: Share = share(whole, traced, weights=len(state.weights), rows=self.rows, some=some)
        self._structure = jax.tree.structure(shapes)
        kinds = jax.tree.unflatten(self._structure, self._share.kinds)
        (self.loss, (self.unscaled, self.predictions, self.others, self.metrics)) = kinds
        outputs = jax.tree.unflatten(self._structure, [isinstance(var, Var) and var in traced.jaxpr.invars for var in traced.jaxpr.outvars])
        self.unchanged: Sequence[bool] = outputs[1][3]

    @property
    def share(self) -> float:
        """The part of the batch's rows."""
        return self.some / self.rows

    def known(self, state: State, batch: Any) -> list:
        """What microbatches need to know of the whole batch.

        Args:
            state: arrays of the step's state.
            batch: arrays of all rows.
        """
        return jaxpr_as_fun(self._share.needs)(*jax.tree.leaves((state.weights, state, batch)))

    def __call__(self, weights: Any, state: State, part: Any, numbers: jax.Array, known: Sequence[Any]) -> tuple:
        """As `Parts.loss`: the loss is what these rows do for the batch's, all else as `Kind` says.

        Args:
            weights, state: as in `Parts.loss`.
            part: some rows of the batch.
            numbers: of these rows.
            known: what `known` gave.
        """
        results = self._share.run(jax.tree.leaves((weights, state, part)), numbers, known)
        loss, (unscaled, *aux) = jax.tree.unflatten(self._structure, results)
        return self._shared(loss, self.loss), (self._shared(unscaled, self.unscaled), *aux)

    def _shared(self, value: Any, kind: Kind) -> Any:
        return value if kind.of == "sum" else value * self.share

    def as_batch(self, values: Any, kinds: Any) -> Any:
        """Shares as what they would be of a batch of such rows.

        Args:
            values: a tree of arrays.
            kinds: a tree of the same structure, of `Kind`s.
        """
        return jax.tree.map(lambda value, kind: value / self.share if kind.of == "sum" else value, values, kinds)


def part_losses(step: Step, batch: Any, plan: Plan) -> list[PartLoss]:
    """The losses of a step's microbatches: of all but the last, and of the last where it has fewer rows.

    Args:
        step: with `parts`.
        batch: shapes of the batch's arrays.
        plan: that cuts it.

    Raises:
        PlanError: the batch cannot be cut so that it means the same; why.
    """
    assert step.parts
    lengths = sorted({leaf.shape[:1] for leaf in jax.tree.leaves(batch)})
    if step.parts.follows:
        raise _refusal(plan, step.parts.follows)
    if len(lengths) > 1:
        told = ", ".join(str(*length) or "none" for length in lengths)
        raise _refusal(plan, f"its arrays have different numbers of rows ({told})")
    try:
        losses = [PartLoss(step.parts.loss, step.read(), batch, int(piece.rows)) for piece in pieces(rows_of(batch), plan)]
    except NoShareError as error:
        raise _refusal(plan, str(error)) from error
    for variable, kind in zip(step.variables.others, losses[0].others):
        if kind.of == "rows":
            raise _refusal(plan, f"variable {variable.path!r} holds something of every row")
    if plan.statistics == "batch" and (reason := _why_tied(losses[0], step, step.parts, batch)):
        raise _refusal(plan, reason, instead=", or add statistics=microbatch, for each microbatch to be to them what a batch is")
    return losses


def _refusal(plan: Plan, reason: str, instead: str = "") -> PlanError:
    return PlanError(
        f"plan {plan.short()!r}: a batch of this model cannot be cut into microbatches: {reason}. Leave microbatches out of the plan"
        f"{instead}; recompute=blocks and zero= save memory as well."
    )


def _why_tied(loss: PartLoss, step: Step, parts: Parts, batch: Any) -> str:
    """Why rows of a batch are not independent: by what is known of the layers, by the traces, and by trying it."""
    if parts.couples:
        return parts.couples
    for variable, kind in zip(step.variables.others, loss.others):
        if kind.of == "own" or kind.why:
            return f"variable {variable.path!r} is made of all rows of a batch together ({kind.why})"
    if isinstance(loss.predictions, dict):
        for name, kind in loss.predictions.items():
            if isinstance(kind, Kind) and kind.of == "own":
                return f"{name!r} is no sum or mean over the rows ({kind.why})"
    return _why_not_mean(parts.loss, step.read(), batch, loss.loss.why)


def _why_not_mean(loss: Callable, state: State, batch: Any, told: str) -> str:
    """Why a few rows show that halves of a batch do not add up to it; "" where they do.

    Args:
        loss: as `Parts.loss`.
        state: the model's.
        batch: shapes.
        told: what the traces say of it.
    """
    compare = None
    for seed in range(TRIES):
        numbers = np.random.default_rng(seed)
        rows = jax.tree.map(lambda leaf: some_rows(leaf, numbers, _TRIED), batch)  # noqa: B023  (called at once)
        try:
            compare = compare or _comparing(loss, state, rows)
            both, together = map(float, compare(*jax.tree.leaves((state, rows))))
        except NoShareError:
            return ""  # of few rows it is another program, which says nothing of the batch
        except (TypeError, ValueError) as error:
            return f"it takes {rows_of(batch)} rows only ({(str(error).splitlines() or [''])[0].rstrip('.')})"
        if not math.isclose(both, together, rel_tol=MEAN_TOLERANCE, abs_tol=MEAN_TOLERANCE):
            why = f"; {told}" if told else ""
            return f"the loss of a few rows is {both:.6g}, and that of its halves together {together:.6g}: it ties its rows{why}"
    return ""


def _comparing(loss: Callable, state: State, rows: Any) -> Callable:
    """The loss of a few rows, and that of its halves together, compiled quickly: a function of the flat state and rows."""
    part = PartLoss(loss, state, rows, _TRIED // 2)

    def losses(state, rows):
        known, numbers = part.known(state, rows), jnp.arange(_TRIED, dtype=jnp.int32)
        halves = jax.tree.map(lambda array: array.reshape(2, _TRIED // 2, *array.shape[1:]), (rows, numbers))
        shares = jax.lax.map(lambda half: part(state.weights, state, half[0], half[1], known)[0], halves)
        return loss(state.weights, state, rows)[0], shares.sum()

    backend, (closed, _) = backends.current(), jaxpr_of(losses, *shapes_of((state, rows)))
    options = backend.compiler_options(closed, seldom=True)
    program = jax.jit(jaxpr_as_fun(backend.rewrite(closed)))
    with backend.compiling():
        return backend.compile(
            program.lower(*(jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in closed.jaxpr.invars)), options
        )


def some_rows(leaf: Any, numbers: np.random.Generator, count: int) -> Any:
    """A few rows to try a loss on: any numbers, or the first two classes and words.

    Args:
        leaf: an array of the batch, or its shape.
        numbers: where they come from.
        count: how many rows.
    """
    if not leaf.shape:
        return np.zeros((), leaf.dtype)
    shape = (count, *leaf.shape[1:])
    whole = np.issubdtype(leaf.dtype, np.integer) or leaf.dtype == bool
    return (numbers.integers(0, 2, shape) if whole else numbers.uniform(size=shape)).astype(leaf.dtype)


def accumulate(parts: Parts, losses: Sequence[PartLoss], placement: Placement, wrap: Callable = lambda loss: loss) -> Callable:
    """`(state, batch) -> (gradients, logs, others, metrics)` of a batch, run on microbatches one after the other.

    A batch that the devices and microbatches do not divide is cut into equal parts and a smaller last one; no part is split unevenly.

    Args:
        parts: of the step.
        losses: of the microbatches, as `part_losses` gives them.
        placement: its plan says how many microbatches there are, and its devices how each is split.
        wrap: what is made of the loss of a microbatch, such as one that keeps fewer activations.
    """
    first, last = losses[0], losses[-1]
    carried = _carried(first, placement.plan)

    def run(loss, state, known, carry, part):
        total, others, metrics = carry
        rows, numbers = placement.split_batch(part)
        given = state._replace(others=[new if moves else old for new, old, moves in zip(others, state.others, carried)])
        (_, aux), gradients = jax.value_and_grad(wrap(loss), has_aux=True)(state.weights, given, rows, numbers, known)
        unscaled, predictions, made, counted = aux
        logs, metrics = parts.measure(
            _counted(loss, metrics, counted), unscaled / loss.share, loss.as_batch(predictions, loss.predictions), rows
        )
        return (jax.tree.map(jnp.add, total, gradients), _next_others(loss, carried, others, made), list(metrics)), logs

    def accumulated(state, batch):
        rows = rows_of(batch)
        stacked, rest = _cut((batch, jnp.arange(rows, dtype=jnp.int32)), rows, placement)
        known = first.known(state, batch)
        carry = list(jax.tree.map(jnp.zeros_like, state.weights)), _first_others(first, carried, state), _first_metrics(first, state)
        carry, logs = jax.lax.scan(lambda carry, part: run(first, state, known, carry, part), carry, stacked)
        logs = jax.tree.map(lambda values: values[-1], logs)
        if rest is not None:
            carry, logs = run(last, state, last.known(state, batch), carry, rest)
        total, others, metrics = carry
        return total, logs, others, metrics

    return accumulated


def _carried(loss: PartLoss, plan: Plan) -> list[bool]:
    """Which variables go from microbatch to microbatch: those made of rows, where each microbatch has its own statistics."""
    return [plan.statistics == "microbatch" and kind.of != "same" for kind in loss.others]


def _first_others(loss: PartLoss, carried: Sequence[bool], state: State) -> list:
    return [
        jnp.zeros_like(value) if kind.of == "sum" and not moves else value for value, kind, moves in zip(state.others, loss.others, carried)
    ]


def _next_others(loss: PartLoss, carried: Sequence[bool], before: Sequence[Any], made: Sequence[Any]) -> list:
    """Variables after a microbatch: moved on by it as by a batch, added to, or the same after each."""
    return [
        loss.as_batch(new, kind) if moves else old + new if kind.of == "sum" else new
        for old, new, kind, moves in zip(before, made, loss.others, carried)
    ]


def _first_metrics(loss: PartLoss, state: State) -> list:
    return [jnp.zeros_like(value) if kind.of == "sum" else value for value, kind in zip(state.metrics, loss.metrics)]


def _counted(loss: PartLoss, before: Sequence[Any], made: Sequence[Any]) -> list:
    """Metrics after the loss of a microbatch: those that it leaves alone are as `measure` left them."""
    return [
        old if untouched else old + new if kind.of == "sum" else new
        for old, new, kind, untouched in zip(before, made, loss.metrics, loss.unchanged)
    ]


def rows_of(batch: Any) -> int:
    """The rows of a batch."""
    return next(leaf.shape[0] for leaf in jax.tree.leaves(batch) if leaf.shape)


def _resized(leaf: Any, rows: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, *leaf.shape[1:]) if leaf.shape else (), leaf.dtype)


def _cut(batch: Any, rows: int, placement: Placement) -> tuple[Any, Any]:
    """Microbatches stacked along a new first dimension, and the rows that are left, None where there are none.

    Where everything divides, each device cuts its own share of the batch, so that no rows move, unless it matters which rows are together.
    Elsewhere they are those of `layout.pieces`.
    """
    devices, plan = placement.batch_parts, placement.plan
    if rows % (devices * plan.microbatches) == 0 and plan.statistics == "batch":
        shape = (devices, plan.microbatches, rows // (devices * plan.microbatches))
        return jax.tree.map(lambda array: _own_shares(array, shape), batch), None
    first, *rest = pieces(rows, plan)
    end = int(first.count * first.rows)
    batch = placement.replicate(batch) if placement.mesh is not None else batch
    parts = jax.tree.map(lambda array: array[:end].reshape((first.count, int(first.rows), *array.shape[1:])), batch)
    return parts, jax.tree.map(lambda array: array[end:], batch) if rest else None


def _own_shares(array, shape: tuple[int, int, int]):
    devices, count, size = shape
    return jnp.moveaxis(array.reshape((*shape, *array.shape[1:])), 1, 0).reshape((count, devices * size, *array.shape[1:]))
