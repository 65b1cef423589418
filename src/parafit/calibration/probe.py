"""`Probe`: one kind of operation to time, in a compiled loop, as parafit runs steps, after the same rewriting."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from parafit import backends
from parafit.tracing.passes import traced_through

_BURST_SECONDS = 4e-3


@dataclass(eq=False, kw_only=True)
class Probe:
    """Something to time.

    Attributes:
        part: which number it is for: "curve", "matmul", "network" or "turn".
        kind: of operation, or precision.
        size: bytes of one run, a matmul's (rows, inner, columns), or a network's layers.
        body: one turn of the loop: carry to carry.
        carry: what the loop starts with.
        runs: operations in one turn.
        samples: seconds of one run, each over a few milliseconds.
        turns: of the loop, the next time.
        called: whether a run is a call of a library, so that the quicker of XLA's emitters may compile what is around it.
    """

    part: str
    kind: str
    size: Any
    body: Callable
    carry: Any
    runs: int = 1
    turns: int = 1
    called: bool = False
    samples: list[float] = field(default_factory=list)
    _loop: Any = field(default=None)

    @property
    def seconds(self) -> float:
        """Of one run: the median, which is what training meets; the fastest moments of a busy machine do not last.

        Of calls of a library the lower quartile: its threads, awoken after others worked, at first share a core in many a short burst.
        """
        return float(np.quantile(self.samples, 0.25 if self.called else 0.5)) if self.samples else math.inf

    @property
    def rate(self) -> float:
        """FLOP/s of a product."""
        return 2 * math.prod(self.size) / self.seconds

    def compile(self) -> None:
        """Make the loop."""
        backend = backends.current()  # as steps are compiled
        options = backend.compiler_options(jax.make_jaxpr(self.body)(self.carry), seldom=self.called)
        body = traced_through(backend.rewrite, self.body)

        def loop(carry, count):
            return lax.fori_loop(0, count, lambda _, carry: body(carry), carry)

        with jax.enable_x64(self.kind == "float64"):  # whatever this process computes in
            self.carry = jax.device_put(self.carry)
            self._loop = backend.compile(jax.jit(loop, donate_argnums=0).lower(self.carry, np.int32(1)), options)

    def time(self) -> None:
        """Run the loop for a few milliseconds, once one turn has brought its arrays as near as a step of training finds them."""
        self.carry = jax.block_until_ready(self._loop(self.carry, np.int32(1)))
        started = time.perf_counter()
        self.carry = jax.block_until_ready(self._loop(self.carry, np.int32(self.turns)))
        taken = time.perf_counter() - started
        if self.turns > 1 or taken > _BURST_SECONDS / 2:
            self.samples.append(taken / self.turns / self.runs)
        if taken < _BURST_SECONDS / 2:
            self.turns = math.ceil(self.turns * min(100.0, _BURST_SECONDS / taken))


def numbers(*shape: int, dtype: str = "float32") -> np.ndarray:
    """An array of halves, for a probe to start with.

    Args:
        shape: shape of the array.
        dtype: dtype of the array.
    """
    return np.full(shape, 0.5, jnp.dtype(dtype))


apart = lax.optimization_barrier
"""Keeps the compiler from joining what computes a value with what reads it."""
