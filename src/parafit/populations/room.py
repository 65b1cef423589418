"""How many members there is memory for."""

import math

import jax

from parafit.adapters.step import Step
from parafit.planning import this_machine
from parafit.populations.tracing import TracedStep

_SHARE = 0.4
"""Of the device's memory, which others use too, and of which data takes a share."""


def room(step: Step, traced: TracedStep) -> int:
    """How many members of a step there is memory for: each holds its state three times, and once what a step computes.

    Args:
        step: of one of them.
        traced: the same, traced.
    """
    state = sum(array.nbytes for array in jax.tree.leaves((step.read_fixed(), step.read())))
    results = [var.aval for equation in traced.closed.jaxpr.eqns for var in equation.outvars]
    computed = sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in results if hasattr(aval, "shape"))
    return max(1, int(_SHARE * this_machine().device.memory_bytes / max(1, 3 * state + computed)))
