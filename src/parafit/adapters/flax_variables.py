"""Variables of Flax modules and Optax optimizers as arrays of a step's state, and back."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class NamedVariable:
    """A variable of a module or an optimizer, with its path.

    Random keys are read as the numbers they are made of: they can be copied to the host and back.
    """

    def __init__(self, path: str, variable: nnx.Variable):
        self.path, self.variable = path, variable
        self._seen: tuple[Any, Any] = None, None
        if not isinstance(variable.get_raw_value(), jax.Array):
            variable.set_raw_value(jnp.asarray(variable.get_raw_value()))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the variable's array."""
        return self.read().shape

    def read(self) -> jax.Array:
        """The variable's array, by reference."""
        value = self.variable.get_raw_value()
        if not is_key(value):
            return value
        if self._seen[0] is not value:
            self._seen = value, jax.random.key_data(value)
        return self._seen[1]

    def write(self, array: jax.Array) -> None:
        """Let the variable hold this array."""
        value = self.wrap(array)
        self._seen = value, array
        self.variable.set_raw_value(value)

    def own(self) -> None:
        """Make the array the variable's own: that of a state is given up to the program that changes it."""
        self.write(self.read().copy())

    def wrap(self, array: Any) -> Any:
        """The array in the form that the variable holds."""
        value = self.variable.get_raw_value()
        return jax.random.wrap_key_data(array, impl=jax.random.key_impl(value)) if is_key(value) else array


class VariableGroup:
    """Variables in the order of a tree's leaves: one group of a step's state.

    Args:
        tree: a pytree of variables.
        prefix: of their paths.
    """

    def __init__(self, tree: Any, prefix: str = ""):
        found, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_variable)
        self.variables = [
            NamedVariable(prefix + jax.tree_util.keystr(path, simple=True, separator="/"), variable) for path, variable in found
        ]
        self.structure = jax.tree.structure(nnx.as_pure(tree))

    def read(self) -> list[jax.Array]:
        """The variables' arrays, by reference."""
        return [variable.read() for variable in self.variables]

    def tree(self, arrays: Sequence[Any]) -> Any:
        """The tree with these arrays in place of variables."""
        return jax.tree.unflatten(self.structure, [variable.wrap(array) for variable, array in zip(self.variables, arrays, strict=True)])

    def arrays(self, tree: Any) -> list[Any]:
        """The arrays of such a tree."""
        return [jax.random.key_data(leaf) if is_key(leaf) else leaf for leaf in jax.tree.leaves(tree)]


def variables_of(tree: Any) -> list[nnx.Variable]:
    """The variables in a tree, in the order of its leaves."""
    return jax.tree.leaves(tree, is_leaf=_is_variable)


def is_key(array: Any) -> bool:
    """Whether an array holds random keys."""
    return jnp.issubdtype(array.dtype, jax.dtypes.prng_key)


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)
