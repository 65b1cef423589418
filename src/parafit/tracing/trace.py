"""From a step to a `Program`: a traced step is walked once, nothing is computed and no array is allocated."""

import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr

from parafit.errors import ModelError
from parafit.planner.program import Leaf, Program, told_apart
from parafit.tracing.describe import describe
from parafit.tracing.graph import Graph

Stored = Callable[[Program, ClosedJaxpr, Sequence[Leaf], Sequence[Leaf]], Program]
"""From a program, its trace, and the leaves of arguments and results, to the program with what a compiler stores."""


def trace_step(step, state, batch, *, fixed=(), name: str = "", stored: Stored | None = None, like: Program | None = None) -> Program:
    """The program of an adapted model's step.

    Args:
        step: a `parafit.adapters.step.Step`.
        state: its state: arrays or `jax.ShapeDtypeStruct`s in the groups of `step.variables`.
        batch: one global batch, packed as the step takes it: arrays or shapes, rows first.
        fixed: the weights that the step only reads.
        name: of the model.
        stored: adds what the compiler stores (`parafit.backends.Backend.stored`); None: for a machine whose compiler is not known.
        like: the program of another form of the same step, whose names the dims get.

    Returns:
        Its program. Parameters, slots and state are tensors named by the path of their variable.

    Raises:
        ModelError: the step cannot be traced; the layer it happened in, and why.
    """
    read_only, changed = step.leaves
    held = [leaf for group in changed for leaf in group]
    leaves = [*read_only, *held, *_batch_leaves(batch)]
    return trace(step.function, (list(fixed), state, batch), leaves, results=held, name=name, stored=stored, like=like)


def trace_loss(loss: Callable, parameters, batch, *, optimizer=None, name: str = "loss") -> Program:
    """The program of a training step of a plain JAX loss.

    Args:
        loss: `(parameters, batch) -> scalar`.
        parameters: a pytree of arrays or `jax.ShapeDtypeStruct`s.
        batch: a pytree of the same, rows first.
        optimizer: a pair of functions `(init, update)` as Optax has them; None: gradients only.
        name: of the model.

    Returns:
        Its program. Parameters are named by their place in the tree: "blocks/3/kernel".

    Raises:
        ModelError: the loss cannot be traced.

    >>> import jax, jax.numpy as jnp
    >>> shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    >>> loss = lambda weights, x: jnp.mean((x @ weights["inner"] @ weights["outer"]) ** 2)
    >>> program = trace_loss(loss, {"inner": shape(784, 32), "outer": shape(32, 10)}, shape(64, 784))
    >>> program.tensors["inner"].dims, program.tensors["outer"].dims
    (('x/features', 'inner/units'), ('inner/units', 'outer/units'))
    >>> program.operations[0].shape
    (1, 64, 784, 32)
    """
    weights = tree_leaves(parameters, "parameter", "parameters")
    inputs = tree_leaves(batch, "input", "x")
    if optimizer is None:
        return trace(jax.value_and_grad(loss), (parameters, batch), [*weights, *inputs], results=weights, name=name)
    init, update = optimizer[:2]
    slots = jax.eval_shape(init, parameters)

    def step(parameters, slots, batch):
        value, gradients = jax.value_and_grad(loss)(parameters, batch)
        changes, slots = update(gradients, slots, parameters)
        return value, jax.tree.map(lambda old, change: old + change.astype(old.dtype), parameters, changes), slots

    state = [*weights, *tree_leaves(slots, "slot", "slots")]
    return trace(step, (parameters, slots, batch), [*state, *inputs], results=state, name=name)


def trace(
    function: Callable,
    arguments: tuple,
    leaves: Sequence[Leaf],
    *,
    results: Sequence[Leaf] = (),
    name: str = "",
    stored: Stored | None = None,
    like: Program | None = None,
) -> Program:
    """The program of any step.

    Args:
        function: a function of pytrees of arrays.
        arguments: what it takes: arrays or `jax.ShapeDtypeStruct`s.
        leaves: name and role of each of the arguments' leaves.
        results: for the last leaves of what it returns, the argument each replaces (or is the gradient of).
        name: of the model.
        stored, like: as in `trace_step`.

    Raises:
        ModelError: the function cannot be traced.
    """
    try:
        closed, _ = jaxpr_of(function, *shapes_of(arguments))
    except Exception as error:
        raise _untraceable(error, name) from error
    named = _named(leaves)
    returned = [named[id(leaf)] for leaf in results]
    program = describe(Graph(closed, list(named.values()), returned), name, like)
    return stored(program, closed, list(named.values()), returned) if stored else program


def jaxpr_of(function: Callable, *arguments: Any) -> tuple[ClosedJaxpr, Any]:
    """A function as a jaxpr, and the shapes of what it returns.

    Softmax's gradient is y (g - Σ y g), of its result y: JAX's default, that of exp(x) / Σ exp(x), is the same but for rounding, and moves
    about twice as much. (JAX 0.10 lists the flag, off by default, among its options.)

    Args:
        function: of pytrees of arrays.
        arguments: what it takes: arrays or `jax.ShapeDtypeStruct`s.
    """
    with jax.softmax_custom_jvp(True):
        return jax.make_jaxpr(function, return_shape=True)(*arguments)


def shapes_of(tree: Any) -> Any:
    """The shapes of a pytree's arrays, in the dtypes that JAX computes in: of 32 bits for 64 unless it is told otherwise.

    Args:
        tree: of arrays or `jax.ShapeDtypeStruct`s.

    >>> import numpy as np
    >>> shapes_of({"x": np.zeros((2, 3), "float16")})
    {'x': ShapeDtypeStruct(shape=(2, 3), dtype=float16)}
    """
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype, True)), tree)


def tree_leaves(tree, role: str, alone: str, prefix: str = "") -> list[Leaf]:
    """Name and role of a pytree's leaves, named by their place in it.

    Args:
        tree: any pytree.
        role: of all of its leaves.
        alone: the name of the leaf if the tree is nothing else.
        prefix: of the names.
    """
    found, _ = jax.tree_util.tree_flatten_with_path(tree)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in found]
    return [Leaf(name=prefix + path if path else alone, role=role) for path in paths]


def _batch_leaves(batch) -> list[Leaf]:
    names = ("x", "y", "sample_weight")
    parts = batch if isinstance(batch, (tuple, list)) and len(batch) <= len(names) else (batch,)
    return [leaf for name, part in zip(names, parts) for leaf in tree_leaves(part, "input", name, f"{name}/")]


def _named(leaves: Sequence[Leaf]) -> dict[int, Leaf]:
    """Leaves by `id`, those of equal names numbered."""
    names = told_apart(leaf.name for leaf in leaves)
    return {id(leaf): replace(leaf, name=name) for leaf, name in zip(leaves, names)}


def _untraceable(error: BaseException, name: str) -> ModelError:
    while error.__context__ is not None:  # Keras wraps errors, and may fail at it
        error = error.__context__
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    layer = _layer_of(error)
    where = f" in layer {layer!r}" if layer else ""
    return ModelError(
        f"model {name!r} cannot be traced{where}: {type(error).__name__}: {reason} "
        "A step is planned from its shapes alone, so it must not look at the values of arrays (float(x), if x > 0, x.numpy())."
    )


def _layer_of(error: BaseException) -> str:
    """The name of the innermost layer whose method was running; layers are known by having a name and a `call`."""
    owners = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    layers = [owner for owner in owners if isinstance(getattr(owner, "name", None), str) and callable(getattr(owner, "call", None))]
    return str(getattr(layers[-1], "name", "")) if layers else ""
