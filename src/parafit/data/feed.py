"""Feeds: a source's batches as blocks, filled on the host while the devices compute.

A block holds up to `capacity` batches in one buffer per array, of shape (capacity, batch, ...), so that one compiled
program can run them all.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from parafit.data.host_buffers import HostBuffers
from parafit.data.source import Source
from parafit.placement import Lookup

BLOCK_BYTES = 4 << 20  # Measured: small enough to stay in the cache between the host's write and the device's read,
MOST_STEPS = 256  # and still enough steps to hide the cost of a dispatch.
_MANY_STEPS = 20  # With as many, a last batch that takes up to 1.8 times as long as it might makes an epoch 4 % longer.


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
    """The batches of a source as blocks.

    Args:
        source: the data.
        strides: every how many steps some callback must have control: a block has no room for more.
        table: the source's arrays where they stay on the devices (`residency.resident_table`); blocks then carry row numbers.
    """

    def __init__(self, source: Source, *, strides: Sequence[int] = (), table: Any = None):
        self.source, self._table = source, table
        self._most_steps: int = min([MOST_STEPS, *strides, *([source.steps_per_epoch] if source.steps_per_epoch else [])])
        self._buffers: dict[Any, HostBuffers] = {}
        self._largest_batch = 0

    def foreseen(self) -> list[Block]:
        """A block of every shape an epoch will have, holding the first rows; empty where the source does not tell."""
        if self.source.arrays is None:
            return []
        rows, batch_size = self.source.row_count, self.source.rows_per_batch
        sizes = [batch_size, rows % batch_size] if self.source.steps_per_epoch * batch_size > rows else [batch_size]
        return [self._fill(iter(()), np.arange(size), 1)[0] for size in sizes if size]

    def epoch(self) -> "Epoch":
        """The next epoch's blocks."""
        return Epoch(self.source.batches(), self._fill, may_look_ahead=self.source.arrays is not None)

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
        elif self.source.arrays is None:
            _stack(members, arrays)
        else:
            jax.tree.map(self._gather_into(np.concatenate(members)), self.source.arrays, arrays)
        return Block(len(members), arrays, release, buffers.seldom), other

    def _make_buffers(self, shape, first) -> HostBuffers:
        """Buffers for batches of this shape; a batch smaller than before is an epoch's last and gets room for one."""
        arrays, steps = self.source.arrays, self.source.steps_per_epoch
        leaves = self.source.specs(first) if arrays is None else self.source.row_specs(len(first))
        batch_size = max((leaf.shape[0] for leaf in jax.tree.leaves(leaves) if leaf.shape), default=1)
        if self._table is not None:
            leaves = Lookup(np.broadcast_to(np.int32(0), (batch_size,)), self._table)
        last = batch_size < self._largest_batch
        nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(leaves) if not isinstance(leaf, jax.Array))
        capacity = 1 if last else max(1, min(BLOCK_BYTES // max(nbytes, 1), self._most_steps))
        self._largest_batch = max(self._largest_batch, batch_size)
        self._buffers[shape] = HostBuffers(leaves, capacity, seldom=last and arrays is not None and steps >= _MANY_STEPS)
        return self._buffers[shape]

    def _gather_into(self, rows: np.ndarray) -> Callable[[np.ndarray, np.ndarray], None]:
        consecutive = self.source.in_order and rows[-1] - rows[0] == len(rows) - 1

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
