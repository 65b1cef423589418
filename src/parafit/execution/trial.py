"""A few steps on a copy of a model's state, timed."""

import time
from typing import Any

import jax

from parafit.adapters.step import Step
from parafit.execution.compiled import CompiledSteps
from parafit.placement import Placement

_TRIALS = 4
_TRIAL_SECONDS = 0.05
_LONG_SECONDS = 0.5


def trial_seconds(step: Step, placement: Placement, compiled: CompiledSteps, arrays: Any) -> float:
    """Seconds of a step, by a few steps on a copy of the state; the model's own state stays as it is.

    Args:
        step: the model's step.
        placement: the devices.
        compiled: its program for such blocks.
        arrays: a block, of arrays of shape (capacity, batch, ...).
    """
    held = step.read_fixed(), step.read()
    fixed, state = jax.tree.map(lambda leaf, array: placement.put_state(leaf, array.copy()), step.leaves, held)
    block = placement.put_block(arrays)
    steps, seconds = 1, 0.0
    for _ in range(_TRIALS):  # the first also brings memory in; later ones run more steps at once
        started = time.perf_counter()
        state, tally, _ = compiled(fixed, state, compiled.fresh_tally, steps, block)
        jax.block_until_ready((state, tally))
        seconds = (time.perf_counter() - started) / max(1, int(tally.done))
        if seconds > _LONG_SECONDS:
            break
        steps = max(1, min(compiled.capacity, int(_TRIAL_SECONDS / seconds)))
    return seconds
