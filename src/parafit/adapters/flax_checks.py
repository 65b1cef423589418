"""What a Flax module is given, held against what it and its loss can take, before anything is compiled.

A loss is a function of the user's, so it is tried: traced on the shapes of a batch, and once more with targets of another number of rows,
which a loss that compares each row with its own target refuses, and one that broadcasts all targets against all rows does not.
"""

import contextlib
import itertools
import re
import sysconfig
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.extend.core import Var

from parafit.errors import DataError, ParafitError
from parafit.support.compat import unpack

_PROMOTION = re.compile(r"rank promotion for (\w+) on shapes (.*?)\. ")
_FAULTS = (TypeError, ValueError, IndexError, KeyError)
"""What JAX, Flax and Python raise where shapes or structures do not fit."""

_NOT_THE_USERS = (*(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")), str(Path(__file__).parents[1]))

_UNSEEN = itertools.count(1)
"""JAX warns only where it traces: each trial has a length of its own."""


def try_out(function: Callable, batch: Any, *, what: str) -> Any:
    """The shapes that a function of a batch gives.

    Args:
        function: of a batch.
        batch: shapes, as `fit` packs them.
        what: "the loss of 'net'", for messages.

    Raises:
        DataError: it cannot be computed from such a batch; where it failed, and why.
    """
    try:
        return jax.eval_shape(function, batch)
    except ParafitError:
        raise
    except _FAULTS as error:
        raise DataError(f"{what} cannot be computed from {_words(batch)}: {_reason(error)}{_advice(what, batch)}") from error


def check_rows(loss: Callable, batch: Any, *, name: str, sizes: set[int]) -> None:
    """Refuse a loss that compares targets, or weights, with the outputs of other rows, and one that takes rows for parts of a batch.

    Args:
        loss: of a batch.
        batch: shapes, as `fit` packs them.
        name: of the model.
        sizes: all lengths of its variables.
    """
    x, y, weights = unpack(batch)
    if y is None:
        _check_parts(loss, batch, name)
    rows = next((leaf.shape[0] for leaf in jax.tree.leaves(x) if leaf.shape), 0)
    for part, which in ((y, "y"), (weights, "sample_weight")):
        if not rows or part is None:
            continue
        other = next(_UNSEEN) + max(sizes.union(*(leaf.shape for leaf in jax.tree.leaves(batch))))
        longer = _with_rows(part, other)
        for operation, shapes in _promotions(loss, *((x, longer, weights) if which == "y" else (x, y, longer))):
            if {shape[:1] for shape in shapes} == {(rows,), (other,)}:
                told = " and ".join(_row_words(shape) for shape in shapes)
                raise DataError(
                    f"the loss of {name!r} would {operation} arrays of shape {told}, and so compare {which} of every row with the outputs "
                    "of every other, for shapes are broadcast from the last axis. Give both the same shape, such as "
                    f"module(x).squeeze(-1), or {which}[:, None]."
                )


def _with_rows(part: Any, rows: int) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype) if leaf.shape else leaf, part)


def _promotions(loss: Callable, x: Any, y: Any, weights: Any) -> list[tuple[str, list[tuple[int, ...]]]]:
    """The operations, with the shapes of their operands, in which JAX adds axes to an array by itself."""
    with warnings.catch_warnings(record=True) as told, jax.numpy_rank_promotion("warn"):
        warnings.simplefilter("always")
        with contextlib.suppress(*_FAULTS):  # as it should
            jax.eval_shape(loss, (x, y) if weights is None else (x, y, weights))
    found = [_PROMOTION.search(str(each.message)) for each in told]
    return [(match[1], [_shape(text) for text in re.findall(r"\(([\d, ]*)\)", match[2])]) for match in found if match]


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in re.findall(r"\d+", text))


def _check_parts(loss: Callable, x: Any, name: str) -> None:
    """Refuse a loss that was given x alone and reads its first rows as if they were x and y."""
    if not hasattr(x, "shape") or len(x.shape) < 2 or x.shape[0] < 2:
        return
    jaxpr = jax.make_jaxpr(loss)(x).jaxpr
    reads = [equation for equation in jaxpr.eqns if any(each is jaxpr.invars[0] for each in equation.invars if isinstance(each, Var))]
    if reads and all(each.primitive.name == "slice" and each.outvars[0].aval.shape[0] == 1 for each in reads):
        raise DataError(
            f"the loss of {name!r} reads single rows of its batch, which is x alone, an array of shape {x.shape}: batch[0] is its first "
            "row. Pass y as well, fit(model, x, y), and the batch is (x, y)."
        )


def _reason(error: BaseException) -> str:
    """The error in a line, with the module and the line of the user's code that it came from."""
    frames = list(traceback.walk_tb(error.__traceback__))
    modules = [frame.f_locals["self"] for frame, _ in frames if isinstance(frame.f_locals.get("self"), nnx.Module)]
    inside = f" in {type(modules[-1]).__name__} ({_parameters(modules[-1])})" if modules else ""
    lines = [(frame.f_code.co_filename, line) for frame, line in frames if not frame.f_code.co_filename.startswith(_NOT_THE_USERS)]
    at = f" ({Path(lines[-1][0]).name}, line {lines[-1][1]})" if lines else ""
    return f"{(str(error).splitlines() or [type(error).__name__])[0].rstrip('.')}{inside}{at}."


def _parameters(module: nnx.Module) -> str:
    shapes = {"/".join(map(str, path)): value.shape for path, value in nnx.to_flat_state(nnx.state(module, nnx.Param))}
    return ", ".join(f"{path} of shape {tuple(shape)}" for path, shape in list(shapes.items())[:2]) or "no parameters"


def _advice(what: str, batch: Any) -> str:
    if what.startswith("the loss") and unpack(batch)[1] is None:
        return " The batch is x alone: pass y if the loss takes (x, y); else give the rows of x the shape that the module was made for."
    targets = ", and those of y that of its outputs" if unpack(batch)[1] is not None else ""
    return f" Give the rows of x the shape that the module was made for{targets}."


def _words(batch: Any) -> str:
    parts = zip(("x", "y", "sample_weight"), unpack(batch))
    told = (
        f"{name} of shape {' and '.join(str(leaf.shape) for leaf in jax.tree.leaves(part))}" for name, part in parts if part is not None
    )
    return ", ".join(told)


def _row_words(shape: tuple[int, ...]) -> str:
    return f"({', '.join(['rows', *map(str, shape[1:])])}{',' if len(shape) == 1 else ''})"


def sizes_of(arrays: Any) -> set[int]:
    """All lengths of arrays."""
    return {size for leaf in jax.tree.leaves(arrays) for size in leaf.shape}
