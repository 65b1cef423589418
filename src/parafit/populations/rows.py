"""The data of many members: held once, each member's batches as numbers of its rows."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from parafit import backends
from parafit.data.source import Source
from parafit.errors import DataError
from parafit.populations.programs import Turns

_HELD_SHARE = 0.5
"""Data stays on the device if it takes less than this share of its memory."""
_BLOCK_BYTES = 64 << 20


class Table:
    """Arrays that members read rows of.

    Args:
        x, y, sample_weight, class_weight: as in `fit`, arrays of all rows.
        memory_bytes: of the device.

    Attributes:
        source: the same, as `fit` takes it.

    Raises:
        DataError: not arrays, or as `Source` refuses them.
    """

    def __init__(self, x, y=None, sample_weight=None, *, class_weight=None, memory_bytes: float):
        self.source = Source(x, y, sample_weight, class_weight=class_weight)
        if self.source.arrays is None:
            raise DataError(
                f"many models read the same rows, each in its own order, so x must be arrays; got {type(x).__name__}. "
                "Pass arrays, or train one model after another with parafit.fit."
            )
        nbytes = sum(spec.nbytes for spec in jax.tree.leaves(self.source.row_specs(self.source.row_count)))
        self._fits = nbytes < _HELD_SHARE * memory_bytes
        self._held: Any = None

    @property
    def row_count(self) -> int:
        """Of all arrays."""
        return self.source.row_count

    def turns(self, rows: np.ndarray, counts: np.ndarray | None = None, *, shared: bool = False) -> Turns:
        """Batches of these rows, as a program takes them.

        Args:
            rows: row numbers, int32, of shape (capacity, members, batch), or (capacity, batch) where `shared`.
            counts, shared: as in `Turns`.
        """
        if self._fits:
            return Turns(rows, self._on_device(), counts, shared)
        specs = self.source.row_specs(1)
        taken = jax.tree.map(lambda array, spec: array[rows].astype(spec.dtype, copy=False), self.source.arrays, specs)
        return Turns(taken, None, counts, shared)

    def capacity(self, batch_rows: int) -> int:
        """How many batches of so many rows, those of all members together, one block has room for."""
        row_bytes = sum(spec.nbytes for spec in jax.tree.leaves(self.source.row_specs(1)))
        return max(1, _BLOCK_BYTES // (batch_rows * (4 if self._fits else row_bytes)))

    def _on_device(self) -> Any:
        if self._held is None:
            backend = backends.current()
            specs = self.source.row_specs(self.row_count)
            self._held = jax.tree.map(
                lambda array, spec: jax.device_put(backend.resident_array(array, spec.dtype)), self.source.arrays, specs
            )
        return self._held


class Rows(Source):
    """Some rows of a table, in the order in which Keras would draw them from arrays of these rows alone.

    Args:
        table: the table.
        rows: row numbers, int32.
        batch_size, shuffle, steps_per_execution: as in `Source`.
    """

    def __init__(self, table: Table, rows: np.ndarray, *, batch_size: int | None, shuffle: bool | str, steps_per_execution: int):
        super().__init__(
            np.arange(len(rows), dtype=np.int32), batch_size=batch_size, shuffle=shuffle, steps_per_execution=steps_per_execution
        )
        self.table, self.rows = table, np.asarray(rows, np.int32)
        self.arrays = table.source.arrays

    @property
    def row_count(self) -> int:
        return len(self.rows)

    def batches(self) -> Iterator[np.ndarray]:
        return (self.rows[batch] for batch in super().batches())

    def example(self, *, in_epoch: bool = False) -> Any:
        self._drawn = self._batches.first(in_epoch=in_epoch)
        return jax.tree.map(lambda array: array[self.rows[self._drawn]], self.arrays)

    def taken(self) -> tuple:
        """The rows as arrays of their own: x, y and sample_weight, as far as there are such."""
        return jax.tree.map(lambda array: array[self.rows], self.arrays)


Batches = Sequence[np.ndarray]


def in_runs(batches: Sequence[Batches]) -> Iterator[tuple[int, list[Batches]]]:
    """Batches of several members as runs of one size: that size, and each member's part of the run, which may be empty.

    >>> short, long = np.arange(2), np.arange(3)
    >>> [(size, [len(part) for part in parts]) for size, parts in in_runs([[long, long, short], [long]])]
    [(3, [2, 1]), (2, [1, 0])]
    """
    places = [0] * len(batches)
    while any(place < len(each) for place, each in zip(places, batches)):
        size = max(len(each[place]) for place, each in zip(places, batches) if place < len(each))
        parts = [_run(each[place:], size) for place, each in zip(places, batches)]
        places = [place + len(part) for place, part in zip(places, parts)]
        yield size, parts


def _run(batches: Batches, size: int) -> Batches:
    end = next((number for number, batch in enumerate(batches) if len(batch) != size), len(batches))
    return batches[:end]


def in_blocks(parts: Sequence[Batches], size: int, capacity: int, steps: Callable[[], int]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """A run as blocks: how many steps, row numbers of shape (capacity, members, size), and how many batches are each member's.

    Args:
        parts: each member's part of the run.
        size: of its batches.
        capacity: of a block.
        steps: asked before each block how many steps it may have.
    """
    counts = np.array([len(part) for part in parts], np.int32)
    stacked = [np.asarray(part, np.int32).reshape((-1, size)) for part in parts]
    done, most = 0, counts.max()
    while done < most:
        taken = int(min(steps(), capacity, most - done))
        rows = np.zeros((capacity, len(parts), size), np.int32)
        for lane, numbers in enumerate(stacked):
            part = numbers[done : done + taken]
            rows[: len(part), lane] = part
        yield taken, rows, np.clip(counts - done, 0, taken).astype(np.int32)
        done += taken
