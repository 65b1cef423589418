"""The default backend: what runs on GPUs and TPUs, whose compilers take a step as it is traced."""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr

from parafit.planner.program import Leaf, Program

CompilerOptions = dict[str, str | bool]
"""As `jax.stages.Lowered.compile` takes them."""

RESIDENT_SHARE = 0.25
"""Data stays on an accelerator if it takes less than this share of the memory that is free there."""


class Backend:
    """What one compiler and its devices need; here nothing.

    Attributes:
        name: tells programs of one backend from those of another.
        devices_share_cores: whether several devices are one processor's cores, so that more of them compute nothing faster.
    """

    name = "default"
    devices_share_cores = False

    def device_kind(self) -> str:
        """What the devices are called by those who sell them."""
        return jax.devices()[0].device_kind

    def rewrite(self, closed: ClosedJaxpr) -> ClosedJaxpr:
        """A traced step in the form that the compiler runs well: same arguments, same values."""
        return closed

    def compiler_options(self, closed: ClosedJaxpr, *, seldom: bool) -> CompilerOptions:
        """Options to compile a traced step with.

        Args:
            closed: the step, before `rewrite`.
            seldom: whether compiling it will take longer than running it.
        """
        return {}

    def compile(self, lowered: jax.stages.Lowered, options: CompilerOptions) -> jax.stages.Compiled:
        """The program. Call it inside `compiling`.

        Args:
            lowered: the program before it is compiled.
            options: what `compiler_options` gave for its step.
        """
        return lowered.compile(options or None)

    def compiling(self) -> AbstractContextManager[None]:
        """To be held while programs are compiled."""
        return nullcontext()

    def running(self) -> AbstractContextManager[None]:
        """To be held while programs run again and again."""
        return nullcontext()

    def recompute(self, segment: Callable, moving: Collection[int]) -> Callable:
        """A function that keeps only its inputs for its backward pass, which computes it again.

        Args:
            segment: a function of arrays.
            moving: which of its arguments, by index, are not weights.
        """
        return jax.checkpoint(segment)

    def knows_storage(self) -> bool:
        """Whether `stored` adds what the compiler keeps."""
        return False

    def stored(self, program: Program, closed: ClosedJaxpr, leaves: Sequence[Leaf], results: Sequence[Leaf]) -> Program:
        """A program with the arrays that the compiler really stores; as it is where that is not known.

        Args:
            program: the step as described.
            closed: the step as traced.
            leaves: name and role of each of its arguments.
            results: for the last of what it returns, the argument that each replaces.
        """
        return program

    def programs_at_once(self) -> int:
        """How many programs of few operations each run side by side without slowing each other down."""
        return 1

    def stacks(self, closed: ClosedJaxpr) -> bool:
        """Whether a step runs faster for several models at once, under `jax.vmap`, than for one after another.

        Args:
            closed: the step of one model.
        """
        return True

    def resident(self, nbytes: int, *, one_device: bool, flops: Callable[[], float], epochs: int) -> bool:
        """Whether steps should look their rows up in data that stays on the devices, rather than get them in blocks.

        Args:
            nbytes: of the data, as the devices hold it.
            one_device: whether a single device runs the steps.
            flops: gives the multiply-adds of a batch's forward pass.
            epochs: that will run.
        """
        memory = jax.devices()[0].memory_stats() or {}
        return nbytes < RESIDENT_SHARE * (memory.get("bytes_limit", 0) - memory.get("bytes_in_use", 0))

    def resident_array(self, array: np.ndarray, dtype: Any) -> np.ndarray:
        """An array in the dtype in which it will stay on the devices, ready to be put there.

        Args:
            array: an array of shape (rows, ...).
            dtype: dtype of the array on the devices.
        """
        return np.asarray(array, dtype)
