"""XLA:CPU: what it runs well, and what it is asked for."""

import os
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr

from parafit.backends.backend import Backend, CompilerOptions
from parafit.backends.cpu.malloc import keeps_memory, takes_up_gaps
from parafit.backends.cpu.options import compiled, compiler_options
from parafit.backends.cpu.recompute import drops_barriers, recomputed_in_loop
from parafit.backends.cpu.rewrite import rewrite_jaxpr
from parafit.backends.cpu.stored import stored
from parafit.backends.cpu.versions import knows_memory
from parafit.planner.program import Leaf, Program
from parafit.support.host_memory import aligned
from parafit.support.processor import processor_name
from parafit.tracing.passes import equations

LOOKED_UP_BYTES = 1 << 29
"""At most this much data is copied to be looked up by steps."""
LOOKED_UP_EPOCHS = 5
"""Epochs from which the copy is made; it pays after 1 to 25, by the memory that it gets (decision 0001)."""
LOOKUP_WORK = 3_000_000
"""From so many multiply-adds in a forward pass on, a step uses all cores, and taking the next rows beside it slows it down more than
looking its rows up itself (decision 0001)."""


class CpuBackend(Backend):
    """What XLA:CPU needs; the modules beside this one say why."""

    name = "cpu"
    devices_share_cores = True

    def knows_storage(self) -> bool:
        return knows_memory()

    def device_kind(self) -> str:
        return processor_name()

    def rewrite(self, closed: ClosedJaxpr) -> ClosedJaxpr:
        return rewrite_jaxpr(closed)

    def compiler_options(self, closed: ClosedJaxpr, *, seldom: bool) -> CompilerOptions:
        return compiler_options(closed, seldom=seldom)

    def compile(self, lowered: jax.stages.Lowered, options: CompilerOptions) -> jax.stages.Compiled:
        return compiled(lowered, options)

    def compiling(self) -> AbstractContextManager[None]:
        return takes_up_gaps()

    def running(self) -> AbstractContextManager[None]:
        return keeps_memory()

    def recompute(self, segment: Callable, moving: Collection[int]) -> Callable:
        return recomputed_in_loop(segment, moving) if drops_barriers() else super().recompute(segment, moving)

    def stored(self, program: Program, closed: ClosedJaxpr, leaves: Sequence[Leaf], results: Sequence[Leaf]) -> Program:
        return stored(program, closed, leaves, results)

    def programs_at_once(self) -> int:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def stacks(self, closed: ClosedJaxpr) -> bool:
        """Convolutions with kernels of each model's own become grouped ones, which XLA:CPU runs many times slower."""
        return not any(equation.primitive.name == "conv_general_dilated" for equation in equations(closed.jaxpr))

    def resident(self, nbytes: int, *, one_device: bool, flops: Callable[[], float], epochs: int) -> bool:
        return one_device and epochs >= LOOKED_UP_EPOCHS and nbytes <= LOOKED_UP_BYTES and flops() >= LOOKUP_WORK

    def resident_array(self, array: np.ndarray, dtype: Any) -> np.ndarray:
        """A copy that JAX's CPU devices read in place; NumPy's memory has large pages, in which rows are found faster."""
        copy = aligned(array.shape, dtype)
        copy[...] = array
        return copy
