"""The program of a model's step, with what is known of its layers and of what techniques make of it."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax

from parafit import backends
from parafit.adapters.step import Adapter, Step, remembered
from parafit.errors import ModelError
from parafit.placement import Placement
from parafit.planner.plan import Plan
from parafit.planner.program import Program
from parafit.techniques import planned_function
from parafit.tracing.trace import shapes_of, trace_step

_WHOLE_STEP = frozenset({"microbatches", "recompute"})  # need a step that can be taken apart


def program_of(adapter: Adapter, step: Step, shapes: Callable[[], Any]) -> Callable[[], Program]:
    """Gives the program of a model's step, traced when it is first asked for and kept for as long as the model stays as it is.

    Args:
        adapter: the model.
        step: its step.
        shapes: gives the arrays of one batch, or their shapes.
    """

    def program() -> Program:
        batch = shapes_of(shapes())
        key = ("program", jax.tree.structure(batch), tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(batch)))
        return remembered(adapter.keeper, step, key, lambda: step_program(step, batch, adapter.model.name))

    return program


def step_program(step: Step, batch: Any, name: str, *, here: bool = True) -> Program:
    """The program of an adapted model's step, with what is known of its layers.

    Args:
        step: the step.
        batch: one global batch, packed as the step takes it: arrays or shapes.
        name: of the model.
        here: whether it is to run on this machine, whose compiler is known.
    """
    backend = backends.current()
    stored = backend.stored if here and backend.knows_storage() else None
    state, fixed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (step.read(), step.read_fixed()))
    program = trace_step(step, state, batch, fixed=fixed, name=name, stored=stored)
    if not step.parts:
        return program

    @functools.cache
    def recomputing() -> Program | None:
        function = planned_function(step, Placement(Plan(recompute="blocks")), batch)
        try:
            return trace_step(replace(step, function=function), state, batch, fixed=fixed, name=name, stored=stored, like=program)
        except ModelError:
            return None

    return replace(program, couples_batch=program.couples_batch or step.parts.couples, recomputing=recomputing)


def refused_techniques(step: Step) -> frozenset[str]:
    """The techniques that a step cannot run: those that take a training step apart, or store what only training has."""
    if step.name != "train":
        return _WHOLE_STEP | {"zero", "store_group"}
    return frozenset() if step.parts else _WHOLE_STEP
