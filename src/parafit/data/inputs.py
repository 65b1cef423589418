"""What a user passes as x, y and sample_weight: looked at, and refused where no feed can be made of it."""

import jax
import numpy as np

from parafit.errors import DataError
from parafit.support import compat


def plain(*parts) -> tuple:
    """Tables that Keras does not know (polars, Arrow) as NumPy arrays, in the structures that they came in."""
    return tuple(jax.tree.map(_plain, part, is_leaf=_is_array) for part in parts)


def check_lengths(x, y, sample_weight) -> None:
    """Refuse arrays that have no rows or not the same number of rows, naming them.

    Args:
        x, y, sample_weight: trees of arrays of shape (rows, ...), or None.
    """
    named = {"x": x, "y": y, "sample_weight": sample_weight}
    rows = {
        name: [leaf.shape[0] for leaf in jax.tree.leaves(part, is_leaf=_is_array) if len(getattr(leaf, "shape", None) or ()) > 0]
        for name, part in named.items()
    }
    lengths = {length for part in rows.values() for length in part}
    told = ", ".join(f"{name}: {' and '.join(map(str, part))} rows" for name, part in rows.items() if part)
    if 0 in lengths:
        raise DataError(f"the data is empty ({told}). At least one row is needed.")
    if len(lengths) > 1:
        raise DataError(f"the arrays have different numbers of rows ({told}). Every row of x needs its row of y and of sample_weight.")


def is_sparse(*parts) -> bool:
    """Whether any array among these is sparse or ragged."""
    return any(compat.is_sparse(leaf) for leaf in jax.tree.leaves(parts, is_leaf=_is_array))


def _is_array(part) -> bool:
    """Whether part of the user's data is one array, table or source rather than a structure of them."""
    return not isinstance(part, (list, tuple, dict))


def _plain(leaf):
    """Tables that Keras does not know (polars, Arrow) as NumPy arrays; lists of numbers refused with advice."""
    if isinstance(leaf, (bool, int, float, str)):
        raise DataError(f"expected arrays, got a list that holds {leaf!r}. Turn lists of numbers into an array with numpy.asarray(...).")
    return np.asarray(leaf) if type(leaf).__module__.split(".")[0] in ("polars", "pyarrow") else leaf
