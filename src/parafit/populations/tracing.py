"""What two members must share to run in one program: equal steps, as JAX traces them."""

import hashlib
import re
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr

from parafit.adapters.step import Step
from parafit.support import compat
from parafit.support.jaxprs import opened
from parafit.tracing.trace import jaxpr_of, shapes_of

_MOST_KEPT = 64
_ADDRESS = re.compile(r"0x[0-9a-f]+")


@dataclass(frozen=True, kw_only=True)
class TracedStep:
    """One member's step as a jaxpr of `(fixed, state, batch)`.

    Attributes:
        closed: gives `(outputs, state)`; of logs their values only, in the order of `names`.
        outputs: their shapes.
        structure: of `(outputs, state)`.
        names: of the logs, in the step's own order; empty where it predicts.
        guard: place of the loss among the logs, where one that is not finite ends training; else None.
        digest: equal for steps that compute the same; unlike all others where a step calls Python.
    """

    closed: ClosedJaxpr
    outputs: Any
    structure: Any
    names: tuple[str, ...]
    guard: int | None
    digest: str


def traced_step(step: Step, batch: Any, config: str | None = None) -> TracedStep:
    """A step, traced for a batch.

    Args:
        step: the step.
        batch: shapes of the arrays of one batch.
        config: what tells the model from others (`compat.plain_config`): one of an equal config is not traced again.
    """
    arguments = shapes_of((step.read_fixed(), step.read(), batch))
    if config is None:
        return _traced(step, arguments)
    shapes = jax.tree.structure(arguments), tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(arguments))
    return kept(_STEPS, (step.name, config, compat.floatx(), *shapes), lambda: _traced(step, arguments))


_STEPS: dict[Hashable, TracedStep] = {}


def kept(store: dict, key: Hashable, make) -> Any:
    """What `make()` gave for this key; the store holds those that were used last.

    Args:
        store: from keys to what was made.
        key: tells apart what is kept.
        make: called where nothing is kept.
    """
    made = store.pop(key, None) or make()
    store[key] = made
    if len(store) > _MOST_KEPT:
        del store[next(iter(store))]
    return made


def _traced(step: Step, arguments: tuple) -> TracedStep:
    names: list[str] = []
    guards: list[int] = []

    def function(fixed, state, batch):
        outputs, new = step.function(fixed, state, batch)
        if step.name != "predict":
            if step.may_end_training(outputs):
                guards[:] = [list(outputs).index("loss")]
            flat = _flat(outputs)
            names[:], outputs = flat, list(flat.values())
        # A step of the user's may change a dtype; what goes round in a loop keeps the one it has.
        return outputs, jax.tree.map(lambda old, array: array.astype(old.dtype), state, new)

    closed, (outputs, new) = jaxpr_of(function, *arguments)
    guard = guards[0] if guards else None
    structure = jax.tree.structure((outputs, new))
    return TracedStep(
        closed=closed,
        outputs=outputs,
        structure=structure,
        names=tuple(names),
        guard=guard,
        digest=_digest(closed, f"{step.name} {structure} {guard}"),
    )


def _flat(logs: dict) -> dict[str, Any]:
    """Logs of logs, side by side."""
    return {
        name: value
        for outer, inner in logs.items()
        for name, value in (_flat(inner).items() if isinstance(inner, dict) else [(outer, inner)])
    }


def _digest(closed: ClosedJaxpr, more: str) -> str:
    digest = hashlib.sha256(more.encode())
    text = _ADDRESS.sub("", str(closed))
    digest.update(text.encode())
    if "callback" in text:  # what Python function it calls, no text tells
        digest.update(str(id(closed)).encode())
    _add_values(digest, closed)
    return digest.hexdigest()


def _add_values(digest: Any, closed: Any) -> None:
    """The numbers that a jaxpr holds, at every depth: printed, they may be cut short."""
    jaxpr, constants = opened(closed)
    for constant in constants:
        digest.update(_bytes(constant))
    for equation in jaxpr.eqns:
        for operand in equation.invars:
            if hasattr(operand, "val"):
                digest.update(_bytes(operand.val))
        for value in equation.params.values():
            for part in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(part, "eqns") or hasattr(getattr(part, "jaxpr", None), "eqns"):
                    _add_values(digest, part)
                elif isinstance(part, np.ndarray):
                    digest.update(_bytes(part))


def _bytes(value: Any) -> bytes:
    if jax.numpy.issubdtype(getattr(value, "dtype", np.float32), jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    array = np.asarray(value)
    return f"{array.dtype}{array.shape}".encode() + array.tobytes()
