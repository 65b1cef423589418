"""Host buffers that take turns: one is filled while the devices read another."""

from collections.abc import Callable
from typing import Any

import jax

from parafit.support.host_memory import aligned

_TURNS = 2


class HostBuffers:
    """Buffers for blocks of `capacity` batches of one shape; one is filled again only after the program that read it has finished.

    Args:
        leaves: pytree of arrays of shape (batch, ...), of which only shape and dtype count; what is on the devices stays as it is.
        capacity: batches in a block.
        seldom: as in `Block`.
    """

    def __init__(self, leaves: Any, capacity: int, *, seldom: bool):
        self.capacity, self.seldom = capacity, seldom
        self._buffers = [jax.tree.map(lambda leaf: _buffer(capacity, leaf), leaves) for _ in range(_TURNS)]
        self._readers: list[jax.Array | None] = [None] * _TURNS
        self._turn = 0

    def next(self) -> tuple[Any, Callable[[jax.Array], None]]:
        """The buffers whose turn it is, of shape (capacity, batch, ...), once nothing reads them, and how to say what reads them now."""
        turn, self._turn = self._turn, (self._turn + 1) % _TURNS
        if self._readers[turn] is not None:
            jax.block_until_ready(self._readers[turn])
        return self._buffers[turn], lambda reader: self._readers.__setitem__(turn, reader)


def _buffer(capacity: int, leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.Array) else aligned((capacity, *leaf.shape), leaf.dtype)
