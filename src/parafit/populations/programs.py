"""Many steps of many members in one compiled program."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from parafit import backends
from parafit.adapters.step import Step
from parafit.execution.compiled import CompiledSteps, Tally
from parafit.placement import Placement
from parafit.planner.plan import Plan
from parafit.populations.tracing import TracedStep, kept, traced_step
from parafit.support import compat
from parafit.tracing.trace import jaxpr_of, shapes_of


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Turns:
    """Some batches of every member.

    Attributes:
        rows: row numbers, int32, of shape (capacity, members, batch), or (capacity, batch) where all members read the same rows; without
            a table a pytree of the rows themselves, of shape (capacity, members, batch, ...).
        table: pytree of arrays of shape (all rows, ...), or None.
        counts: how many of the batches are a member's, int32 of shape (members,); None: all are everybody's.
        shared: whether all members read the same rows.
    """

    rows: Any
    table: Any
    counts: Any = None
    shared: bool = field(default=False, metadata={"static": True})


_PROGRAMS: dict[Hashable, CompiledSteps] = {}


def stacked_steps(step: Step, main: TracedStep, turns: Turns, lanes: int, *, seldom: bool = False) -> CompiledSteps:
    """The program that runs a step of so many members at once: `(fixed, state, tally, steps, turns) -> (state, tally, outputs)`.

    Arrays of fixed, state and tally have the shape (members, ...); outputs are predictions of shape (capacity, members, batch, ...). A
    member's `Tally.done` counts its steps of finite loss; after another one, it is no longer `healthy`, and its logs stay.

    Args:
        step: of any of the members.
        main: the same, traced.
        turns: batches of the form that the program is to run.
        lanes: how many members.
        seldom: whether compiling it will take longer than running it.
    """
    leaves, structure = jax.tree.flatten(turns)
    shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)
    key = backends.current().name, main.digest, lanes, seldom, structure, shapes
    return kept(_PROGRAMS, key, lambda: _compiled(step, turns, lanes, seldom))


def _compiled(step: Step, turns: Turns, lanes: int, seldom: bool) -> CompiledSteps:
    turns = shapes_of(turns)
    batch = jax.eval_shape(lambda turns: _batch(turns, 0), turns)
    if not turns.shared:
        batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), batch)
    traced = traced_step(step, batch)
    stacked = lambda tree: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((lanes, *leaf.shape), leaf.dtype), tree)  # noqa: E731
    one = shapes_of((step.read_fixed(), step.read()))
    fixed, state = stacked(one)
    run, options = _stacked(traced, one, batch, lanes, shared=turns.shared, seldom=seldom)
    capacity = jax.tree.leaves(turns.rows)[0].shape[0]
    outputs = stacked(traced.outputs)
    predicts = step.name == "predict"
    many = _predict_many(run, outputs, capacity) if predicts else _run_many(run, capacity, traced.guard)
    done, healthy = (jax.ShapeDtypeStruct((lanes,), dtype) for dtype in (np.int32, np.bool_))
    tally = Tally(done, healthy, None if predicts else outputs)
    lowered = jax.jit(many, donate_argnums=1).trace(fixed, state, tally, jax.ShapeDtypeStruct((), np.int32), turns).lower()
    return CompiledSteps(lowered, options, None, capacity, Placement(Plan()))


def _stacked(traced: TracedStep, one: tuple, batch: Any, lanes: int, *, shared: bool, seldom: bool) -> tuple[Callable, dict]:
    """The step of all members as a function of `(fixed, state, batch)`, and options for the compiler."""
    held, rows = len(jax.tree.leaves(one)), jax.tree.leaves(batch)
    flat = compat.jaxpr_as_function(traced.closed)
    axes = (0,) * held + (None if shared else 0,) * len(rows)
    vmapped = jax.vmap(flat, in_axes=axes) if lanes > 1 else _of_one(flat, axes)
    stacked = lambda leaf: jax.ShapeDtypeStruct((lanes, *leaf.shape), leaf.dtype)  # noqa: E731
    closed, _ = jaxpr_of(vmapped, *map(stacked, jax.tree.leaves(one)), *(rows if shared else map(stacked, rows)))
    backend = backends.current()
    options = backend.compiler_options(closed, seldom=seldom)
    flat = compat.jaxpr_as_function(backend.rewrite(closed))
    return lambda *arguments: jax.tree.unflatten(traced.structure, flat(*jax.tree.leaves(arguments))), options


def _of_one(flat: Callable, axes: tuple) -> Callable:
    """`jax.vmap` for a single member, whose operations stay as they are."""

    def function(*leaves):
        return [array[None] for array in flat(*(leaf if axis is None else leaf[0] for leaf, axis in zip(leaves, axes)))]

    return function


def _run_many(run: Callable, capacity: int, guard: int | None) -> Callable:
    """Steps one after the other, each member on its next batch for as long as it has one."""

    def advance(index, fixed, state, tally, steps, turns):
        logs, new = run(fixed, state, _batch(turns, index))
        active = tally.healthy if turns.counts is None else tally.healthy & (index < turns.counts)
        good = jnp.isfinite(logs[guard]) if guard is not None else jnp.ones_like(active)
        if turns.counts is not None:
            new = _where(active, new, state)
        return new, Tally(tally.done + (active & good), tally.healthy & (good | ~active), _where(active, logs, tally.logs))

    def once(fixed, state, tally, steps, turns):
        return *advance(0, fixed, state, tally, steps, turns), None

    def loop(fixed, state, tally, steps, turns):
        def more(carry):
            index, _, tally = carry
            return (index < steps) & jnp.any(tally.healthy)

        def body(carry):
            index, state, tally = carry
            return index + 1, *advance(index, fixed, state, tally, steps, turns)

        _, state, tally = jax.lax.while_loop(more, body, (jnp.int32(0), state, tally))
        return state, tally, None

    return once if capacity == 1 else loop


def _predict_many(run: Callable, outputs: Any, capacity: int) -> Callable:
    """Predictions for batch after batch, collected in one array per output."""

    def loop(fixed, state, tally, steps, turns):
        def body(index, carry):
            state, collected = carry
            predicted, state = run(fixed, state, _batch(turns, index))
            put = lambda array, part: jax.lax.dynamic_update_index_in_dim(array, part, index, 0)  # noqa: E731
            return state, jax.tree.map(put, collected, predicted)

        empty = jax.tree.map(lambda leaf: jnp.zeros((capacity, *leaf.shape), leaf.dtype), outputs)
        state, collected = jax.lax.fori_loop(0, steps, body, (state, empty))
        return state, tally, collected

    return loop


def _where(active: Any, new: Any, old: Any) -> Any:
    """New arrays for the members that are active, old ones for the rest."""
    return jax.tree.map(lambda new, old: jnp.where(active.reshape((-1,) + (1,) * (new.ndim - 1)), new, old), new, old)


def _batch(turns: Turns, index: Any) -> Any:
    rows = jax.tree.map(lambda array: jax.lax.dynamic_index_in_dim(array, index, keepdims=False), turns.rows)
    return rows if turns.table is None else jax.tree.map(lambda array: jnp.take(array, rows, axis=0, mode="clip"), turns.table)
