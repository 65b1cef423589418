"""Flax NNX modules as programs. Only this module imports Flax."""

from collections.abc import Callable

import jax
from flax import nnx

from parafit.program import Program
from parafit.trace import trace, tree_leaves
from parafit.walk import Leaf


def trace_nnx(model: nnx.Module, loss: Callable, batch, *, optimizer=None, name: str = "") -> Program:
    """The program of a training step of a Flax NNX module.

    Args:
        model: a module, or one without arrays as `nnx.eval_shape(lambda: Net(rngs=nnx.Rngs(0)))` makes it.
        loss: `(model, batch) -> scalar`.
        batch: a pytree of arrays or `jax.ShapeDtypeStruct`s, rows first.
        optimizer: an Optax transformation: a pair of functions `(init, update)`; None: gradients only.
        name: of the model.

    Returns:
        Its program. Parameters are named by their path: "blocks/0/linear/kernel".

    Raises:
        ModelError: the module cannot be traced.

    >>> model = nnx.eval_shape(lambda: nnx.Linear(784, 10, rngs=nnx.Rngs(0)))
    >>> program = trace_nnx(model, lambda model, x: model(x).sum(), jax.ShapeDtypeStruct((32, 784), "float32"))
    >>> program.tensors["kernel"].dims
    ('x/features', 'kernel/units')
    """
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)
    init, update = optimizer[:2] if optimizer is not None else (lambda weights: (), None)
    slots = jax.eval_shape(init, parameters)

    def value(parameters, rest, batch):
        merged = nnx.merge(graph, parameters, rest, copy=True)
        return loss(merged, batch), nnx.split(merged, nnx.Param, ...)[2]

    def step(parameters, rest, slots, batch):
        (result, rest), gradients = jax.value_and_grad(value, has_aux=True)(parameters, rest, batch)
        if update is None:
            return result, gradients, rest
        changes, slots = update(gradients, slots, parameters)
        return result, jax.tree.map(lambda old, change: old + change.astype(old.dtype), parameters, changes), rest, slots

    held = [*_leaves(parameters, "parameter"), *_leaves(rest, "state"), *_leaves(slots, "slot")]
    return trace(step, (parameters, rest, slots, batch), [*held, *tree_leaves(batch, "input", "x")], results=held, name=name)


def _leaves(tree, role: str) -> list[Leaf]:
    """Variables are leaves called "value" of the tree: the name is that of the variable."""
    return [Leaf(name=leaf.name.removesuffix("/value"), role=role) for leaf in tree_leaves(tree, role, role)]
