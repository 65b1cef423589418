"""Sources: a user's x, y and sample_weight as batches in Keras' order."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from parafit.data.inputs import check_lengths, plain
from parafit.errors import DataError
from parafit.support import compat

_MOST_WORDS = 400  # Characters of Keras' message about data: it may print all of it.


class Source:
    """The batches of a run, epoch by epoch. What is known of them without drawing one is told.

    Args:
        x, y, sample_weight, batch_size, steps_per_epoch, shuffle, class_weight: as in `keras.Model.fit`.
        steps_per_execution: as in `keras.Model.compile`; an epoch of so many steps may be the longer for it, as in Keras.

    Attributes:
        arrays: for array input, pytree of arrays of shape (rows, ...); else None.
        in_order: whether rows come as they lie.

    Raises:
        DataError: arrays that are empty, of different lengths, or of a dtype no network can read.
    """

    def __init__(
        self,
        x,
        y=None,
        sample_weight=None,
        *,
        batch_size=None,
        steps_per_epoch=None,
        shuffle: bool | str = False,
        class_weight=None,
        steps_per_execution: int = 1,
    ):
        x, y, sample_weight = plain(x, y, sample_weight)
        check_lengths(x, y, sample_weight)
        options = {"batch_size": batch_size, "steps_per_epoch": steps_per_epoch, "shuffle": shuffle, "class_weight": class_weight}
        try:
            self._batches = compat.Batches(x, y, sample_weight, steps_per_execution=steps_per_execution, **options)
        except ValueError as error:
            raise DataError(str(error)[:_MOST_WORDS]) from error
        self.arrays = None if self._batches.arrays is None else jax.tree.map(_as_array, self._batches.arrays)
        self.in_order = not shuffle
        self._drawn: Any = None
        self._check: Callable[[Any], Any] | None = None

    @property
    def steps_per_epoch(self) -> Any:
        """Steps in an epoch, None where the source does not tell."""
        return self._batches.steps_per_epoch

    @property
    def row_count(self) -> int:
        """Rows of all arrays; only of arrays is it known."""
        return len(jax.tree.leaves(self.arrays)[0])

    @property
    def rows_per_batch(self) -> int:
        """Rows of a whole batch; only of arrays is it known."""
        return min(self._batches.batch_size, self.row_count)

    @property
    def known_rows(self) -> int | None:
        """`rows_per_batch` of arrays, None of what is drawn."""
        return None if self.arrays is None else self.rows_per_batch

    @property
    def was_drawn(self) -> bool:
        """Whether a batch was drawn to learn what batches are like."""
        return self._drawn is not None

    @property
    def knows_shapes(self) -> bool:
        """Whether `shapes` can tell without drawing a batch."""
        return self.arrays is not None or self.was_drawn

    @property
    def known(self) -> Any:
        """What is there to look at: the arrays of all rows, or the batch that was drawn; None before one was."""
        return self._drawn if self.arrays is None else self.arrays

    def example(self, *, in_epoch: bool = False) -> Any:
        """One batch to build a model on; `in_epoch` as in `compat.Batches.first`."""
        self._drawn = self._batches.first(in_epoch=in_epoch)
        return self._drawn if self.arrays is None else jax.tree.map(lambda array: array[self._drawn], self.arrays)

    def inspect(self, check: Callable[[Any], Any]) -> None:
        """Let every batch that will be drawn pass through `check`, which may refuse it; arrays are `known`."""
        self._check = check if self.arrays is None else None

    def shapes(self) -> Any:
        """The arrays of one batch as shapes; a batch is drawn (and, of a generator, lost) only where nothing else tells them."""
        if self.arrays is None:
            return self.specs(self.example() if self._drawn is None else self._drawn)
        return self.row_specs(self.rows_per_batch)

    def row_specs(self, rows: int) -> Any:
        """So many rows of the arrays, as shapes and dtypes only; floats in Keras' floatx, as Keras feeds them."""
        return jax.tree.map(lambda array: _rows_spec(array, rows), self.arrays)

    @staticmethod
    def specs(batch: Any) -> Any:
        """A batch that was drawn, as shapes and dtypes only."""
        return jax.tree.map(_spec, batch)

    def batches(self) -> Iterator[Any]:
        """The next epoch's batches: row numbers, int32 of shape (batch,), for arrays; else tuples of arrays."""
        batches = self._batches.epoch()
        return map(self._check, batches) if self._check else batches

    def restart(self) -> None:
        """Start again from the beginning."""
        self._batches.restart()

    def find_non_finite(self) -> str:
        """In words, which rows hold NaN or infinite values; empty where there are none or the rows are not known."""
        found = []
        for array in jax.tree.leaves(self.arrays):
            if array.dtype.kind == "f" and len(bad := np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(axis=1))):
                found.append(f"an array of shape {array.shape} holds NaN or infinite values in {len(bad)} rows, the first is row {bad[0]}")
        return f"The data has them already: {'; '.join(found)}." if found else ""


def _as_array(leaf) -> np.ndarray:
    """What Keras makes of one array of the user's: pandas columns upright, the rest as it is."""
    array = np.asarray(leaf)
    if type(leaf).__module__.startswith("pandas") and array.ndim == 1:
        array = array[:, np.newaxis]
    if array.dtype.kind not in "biufcV":  # V: bfloat16 and its kin
        raise DataError(
            f"an array of shape {array.shape} has dtype {array.dtype}, which no network reads (it starts with {array.reshape(-1)[0]!r}). "
            "Turn text and mixed columns into numbers first; `parafit train` and parafit.tables do that for tables."
        )
    return array


def _rows_spec(array: np.ndarray, rows: int) -> np.ndarray:
    dtype = np.dtype(compat.floatx()) if jax.numpy.issubdtype(array.dtype, np.floating) else array.dtype
    return np.broadcast_to(np.empty((), jax.dtypes.canonicalize_dtype(dtype)), (rows, *array.shape[1:]))


def _spec(array) -> np.ndarray:
    return np.broadcast_to(np.empty((), jax.dtypes.canonicalize_dtype(np.asarray(array).dtype)), np.shape(array))
