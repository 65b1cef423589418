"""Host arrays that devices read without a copy of their own."""

from typing import Any

import numpy as np

ALIGNMENT_BYTES = 64
"""XLA:CPU reads a host buffer in place where it is aligned so, and copies it where not."""


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros, aligned to `ALIGNMENT_BYTES`.

    Args:
        shape: of the array.
        dtype: of its numbers.

    >>> aligned((2, 3), "float32").ctypes.data % ALIGNMENT_BYTES
    0
    """
    dtype = np.dtype(dtype)
    nbytes = int(np.prod(shape)) * dtype.itemsize
    memory = np.zeros(nbytes + ALIGNMENT_BYTES, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT_BYTES
    return memory[start : start + nbytes].view(dtype).reshape(shape)
