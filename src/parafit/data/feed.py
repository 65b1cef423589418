"""Feeds: training data as blocks of equal batches, filled on the host while the devices compute.

A block holds up to `capacity` batches in one buffer per array, of shape (capacity, batch, ...), so that one compiled
program can run them all. Two buffers take turns; one is filled again only after the program that read it has finished.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from parafit import backends
from parafit.data.inputs import check_lengths, plain
from parafit.errors import DataError
from parafit.placement import Lookup, Placement
from parafit.support import compat
from parafit.support.host_memory import aligned

BLOCK_BYTES = 4 << 20  # Measured: small enough to stay in the cache between the host's write and the device's read,
MOST_STEPS = 256  # and still enough steps to hide the cost of a dispatch.
_BUFFERS = 2
_MANY_STEPS = 20  # With as many, a last batch that takes up to 1.8 times as long as it might makes an epoch 4 % longer.
_MOST_WORDS = 400  # Characters of Keras' message about data: it may print all of it.


@dataclass(frozen=True)
class Block:
    """Some steps' batches, ready for a program.

    Attributes:
        steps: how many batches are in it, at most its capacity.
        arrays: pytree of host arrays, each of shape (capacity, batch, ...); rows beyond `steps` are left over.
        release: to be called with an output of the program that reads the block, once it is dispatched.
        seldom: whether it is the short last batch of an epoch of many.
    """

    steps: int
    arrays: Any
    release: Callable[[jax.Array], None]
    seldom: bool


class Feed:
    """The batches of a run, in Keras' order, as blocks.

    Args:
        x, y, sample_weight, batch_size, steps_per_epoch, shuffle, class_weight: as in `keras.Model.fit`.
        steps_per_execution: as in `keras.Model.compile`; an epoch of so many steps may be the longer for it, as in Keras.

    Attributes:
        steps_per_epoch: steps in an epoch, None where the source does not tell.

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
        shuffle=False,
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
        self._arrays = None if self._batches.arrays is None else jax.tree.map(_as_array, self._batches.arrays)
        self._in_order, self._table = not shuffle, None
        self._most_steps = min(MOST_STEPS, self.steps_per_epoch or MOST_STEPS)
        self._buffers: dict[Any, _Buffers] = {}
        self._largest_batch = 0
        self._drawn: Any = None
        self._check: Callable[[Any], Any] | None = None

    @property
    def steps_per_epoch(self) -> Any:
        """Steps in an epoch, None where the source does not tell."""
        return self._batches.steps_per_epoch

    @property
    def rows_per_batch(self) -> int:
        """Rows of a whole batch; only of arrays is it known."""
        return min(self._batches.batch_size, len(jax.tree.leaves(self._arrays)[0]))

    def example(self, *, in_epoch: bool = False) -> Any:
        """One batch to build a model on; `in_epoch` as in `compat.Batches.first`."""
        self._drawn = self._batches.first(in_epoch=in_epoch)
        return self._drawn if self._arrays is None else jax.tree.map(lambda array: array[self._drawn], self._arrays)

    @property
    def was_drawn(self) -> bool:
        """Whether a batch was drawn to learn what batches are like: then an epoch starts with `restart`."""
        return self._drawn is not None

    @property
    def knows_shapes(self) -> bool:
        """Whether `shapes` can tell without drawing a batch."""
        return self._arrays is not None or self.was_drawn

    @property
    def known(self) -> Any:
        """What is there to look at: the arrays of all rows, or the batch that was drawn; None before one was."""
        return self._drawn if self._arrays is None else self._arrays

    @property
    def known_rows(self) -> int | None:
        """`rows_per_batch` of arrays, None of what is drawn."""
        return None if self._arrays is None else self.rows_per_batch

    def inspect(self, check: Callable[[Any], Any]) -> None:
        """Let every batch that will be drawn pass through `check`, which may refuse it; arrays are `known`."""
        self._check = check if self._arrays is None else None

    def shapes(self) -> Any:
        """The arrays of one batch as shapes; a batch is drawn (and, of a generator, lost) only where nothing else tells them."""
        if self._arrays is None:
            return jax.tree.map(_spec, self.example() if self._drawn is None else self._drawn)
        return jax.tree.map(lambda array: _rows_spec(array, self.rows_per_batch), self._arrays)

    def keep_on(self, placement: Placement, *, work: Callable[[int], float], epochs: int) -> None:
        """Keep the data on the devices where so many epochs are fed best from there; blocks then carry row numbers.

        Args:
            placement: the devices.
            work: gives the multiply-adds of the forward pass of so many rows.
            epochs: that will run.
        """
        if self._arrays is None:
            return
        specs = jax.tree.map(lambda array: _rows_spec(array, len(array)), self._arrays)
        backend, flops = backends.current(), lambda: work(self.rows_per_batch)
        if backend.resident(_byte_count(specs), one_device=placement.mesh is None, flops=flops, epochs=epochs):
            held = jax.tree.map(lambda array, spec: backend.resident_array(array, spec.dtype), self._arrays, specs)
            self._table = jax.tree.map(lambda array: jax.device_put(array, placement.replicated), held)

    def restart(self) -> None:
        """Start again from the source's beginning."""
        self._batches.restart()

    def foreseen(self) -> list[Block]:
        """A block of every shape an epoch will have, holding the first rows; empty where the source does not tell."""
        if self._arrays is None:
            return []
        rows, batch_size = len(jax.tree.leaves(self._arrays)[0]), self.rows_per_batch
        sizes = [batch_size, rows % batch_size] if self._batches.steps_per_epoch * batch_size > rows else [batch_size]
        return [self._fill(iter(()), np.arange(size), 1)[0] for size in sizes if size]

    def limit(self, strides: list[int]) -> None:
        """Make no room in a block for more steps than ever run between two callbacks."""
        self._most_steps = min(self._most_steps, *strides) if strides else self._most_steps

    def epoch(self) -> "Epoch":
        """The next epoch's blocks."""
        batches = self._batches.epoch()
        return Epoch(map(self._check, batches) if self._check else batches, self._fill, may_look_ahead=self._arrays is not None)

    def find_non_finite(self) -> str:
        """In words, which rows hold NaN or infinite values; empty where there are none or the rows are not known."""
        found = []
        for array in jax.tree.leaves(self._arrays):
            if array.dtype.kind == "f" and len(bad := np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(axis=1))):
                found.append(f"an array of shape {array.shape} holds NaN or infinite values in {len(bad)} rows, the first is row {bad[0]}")
        return f"The data has them already: {'; '.join(found)}." if found else ""

    def _fill(self, batches: Iterator[Any], first: Any, most: int) -> tuple[Block, Any]:
        """A block of `first` and what follows, and the batch of another shape that ended it, or None."""
        shape = _shape(first)
        buffers = self._buffers.get(shape) or self._make_buffers(shape, first)
        members, other = [first], None
        while len(members) < min(most, buffers.capacity) and (other := next(batches, None)) is not None:
            if _shape(other) != shape:
                break
            members.append(other)
            other = None
        arrays, release = buffers.next()
        if self._table is not None:
            arrays.rows.reshape(-1)[: len(members) * shape] = np.concatenate(members)
        elif self._arrays is None:
            _stack(members, arrays)
        else:
            jax.tree.map(self._gather_into(np.concatenate(members)), self._arrays, arrays)
        return Block(len(members), arrays, release, buffers.seldom), other

    def _make_buffers(self, shape, first) -> "_Buffers":
        """Buffers for batches of this shape; a batch smaller than before is an epoch's last and gets room for one."""
        leaves = (
            jax.tree.map(_spec, first) if self._arrays is None else jax.tree.map(lambda array: _rows_spec(array, len(first)), self._arrays)
        )
        sizes = [leaf.shape[0] for leaf in jax.tree.leaves(leaves) if leaf.shape]
        batch_size = max(sizes, default=1)
        if self._table is not None:
            leaves = Lookup(np.broadcast_to(np.int32(0), (batch_size,)), self._table)
        last = batch_size < self._largest_batch
        capacity = 1 if last else max(1, min(BLOCK_BYTES // max(_byte_count(leaves), 1), self._most_steps))
        self._largest_batch = max(self._largest_batch, batch_size)
        self._buffers[shape] = _Buffers(leaves, capacity, seldom=last and self._arrays is not None and self.steps_per_epoch >= _MANY_STEPS)
        return self._buffers[shape]

    def _gather_into(self, rows: np.ndarray) -> Callable[[np.ndarray, np.ndarray], None]:
        consecutive = self._in_order and rows[-1] - rows[0] == len(rows) - 1

        def gather(array: np.ndarray, buffer: np.ndarray) -> None:
            target = buffer.reshape((-1, *buffer.shape[2:]))[: len(rows)]
            if consecutive:
                target[...] = array[rows[0] : rows[-1] + 1]
            elif array.dtype == target.dtype:
                np.take(array, rows, axis=0, out=target, mode="clip")
            else:
                target[...] = array[rows]

        return gather


class Epoch:
    """One epoch's batches, taken in blocks of the size the caller wants next."""

    def __init__(self, batches: Iterator[Any], fill: Callable, *, may_look_ahead: bool):
        self._batches, self._fill, self._waiting, self._may_look_ahead = batches, fill, None, may_look_ahead

    def take(self, most: int) -> Block | None:
        """Up to `most` batches of one shape, None at the end of the epoch."""
        first = next(self._batches, None) if self._waiting is None else self._waiting
        if first is None:
            return None
        block, self._waiting = self._fill(self._batches, first, most)
        return block

    def take_ahead(self, most: int) -> Block | None:
        """`take` before a callback has run: arrays only, for a generator's user sees when a batch is drawn."""
        return self.take(most) if self._may_look_ahead else None


class _Buffers:
    """Host buffers that take turns, for blocks of `capacity` batches of one shape, `seldom` as in `Block`."""

    def __init__(self, leaves, capacity: int, *, seldom: bool):
        self.capacity, self.seldom = capacity, seldom
        self._turns = [jax.tree.map(lambda leaf: _buffer(capacity, leaf), leaves) for _ in range(_BUFFERS)]
        self._readers: list[jax.Array | None] = [None] * _BUFFERS
        self._turn = 0

    def next(self) -> tuple[Any, Callable[[jax.Array], None]]:
        """The buffers whose turn it is, once nothing reads them any more, and how to say what reads them now."""
        turn, self._turn = self._turn, (self._turn + 1) % _BUFFERS
        if self._readers[turn] is not None:
            jax.block_until_ready(self._readers[turn])
        return self._turns[turn], lambda reader: self._readers.__setitem__(turn, reader)


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
    """An array's batch of so many rows, as shape and dtype only; floats in Keras' floatx, as Keras feeds them."""
    dtype = np.dtype(compat.floatx()) if jax.numpy.issubdtype(array.dtype, np.floating) else array.dtype
    return np.broadcast_to(np.empty((), jax.dtypes.canonicalize_dtype(dtype)), (rows, *array.shape[1:]))


def _spec(array) -> np.ndarray:
    """A batch's array as shape and dtype only."""
    return np.broadcast_to(np.empty((), jax.dtypes.canonicalize_dtype(np.asarray(array).dtype)), np.shape(array))


def _shape(batch) -> Any:
    """What two batches must share to run in one program."""
    if isinstance(batch, np.ndarray):
        return batch.shape[0]
    leaves, structure = jax.tree.flatten(batch)
    return structure, tuple((np.shape(leaf), np.asarray(leaf).dtype) for leaf in leaves)


def _stack(members: list, arrays) -> None:
    for position, member in enumerate(members):
        for array, buffer in zip(jax.tree.leaves(member), jax.tree.leaves(arrays)):
            buffer[position] = array


def _byte_count(leaves) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(leaves) if not isinstance(leaf, jax.Array))


def _buffer(capacity: int, leaf):
    """Memory for `capacity` arrays like this one; what stays on the devices stays as it is."""
    return leaf if isinstance(leaf, jax.Array) else aligned((capacity, *leaf.shape), leaf.dtype)
