"""Whether a run's data stays on the devices, where steps look their rows up, instead of coming in blocks."""

from collections.abc import Callable
from typing import Any

import jax

from parafit import backends
from parafit.adapters.step import Step
from parafit.data.source import Source
from parafit.errors import ModelError, ProgramError
from parafit.placement import Placement
from parafit.planner.program import Program

_KERNEL_DIMS = 3
"""A convolution's kernel has at least these: places, channels, filters."""


def resident_table(source: Source, placement: Placement, *, flops: Callable[[], float], epochs: int) -> Any:
    """The source's arrays on the devices, where so many epochs are fed best from there; else None.

    Args:
        source: the data.
        placement: the devices.
        flops: gives the multiply-adds of a batch's forward pass.
        epochs: that will run.
    """
    if source.arrays is None or placement.pipeline:
        return None
    backend, specs = backends.current(), source.row_specs(source.row_count)
    nbytes = sum(spec.nbytes for spec in jax.tree.leaves(specs))
    if not backend.resident(nbytes, one_device=placement.mesh is None, flops=flops, epochs=epochs):
        return None
    held = jax.tree.map(lambda array, spec: backend.resident_array(array, spec.dtype), source.arrays, specs)
    return jax.tree.map(lambda array: jax.device_put(array, placement.replicated), held)


def forward_flops(step: Step, program: Callable[[], Program], rows: int) -> float:
    """Multiply-adds of the forward pass of so many rows: one a weight, but where convolutions use theirs at many places.

    Args:
        step: what is to run.
        program: gives its program, of a batch of `rows`.
        rows: of a batch.
    """
    least = float(step.weight_count * rows)
    if all(len(weight.shape) < _KERNEL_DIMS for weight in step.weights):
        return least
    try:
        convolutions = [each for each in program().operations if each.kind == "convolution" and each.phase == "forward"]
    except (ModelError, ProgramError):
        return least
    return max(least, sum(each.flops * each.count * each.steps for each in convolutions) / 2)
