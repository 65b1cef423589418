"""What a step held is kept for the next step: the C library's heap, told not to return large blocks to the system.

XLA:CPU takes the memory for a program's temporaries anew at every dispatch. glibc maps blocks of more than 32 MiB into the process and
unmaps them when they are freed, so that the system clears and maps every page of them again, at each dispatch: a third of the step of a
transformer of 100 MiB. Blocks of the heap proper are used again as they are.
"""

import ctypes
import functools
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # malloc.h
_MOST, _USUAL_MAPPED, _USUAL_TRIM = 2**31 - 1, 65536, 1 << 26
"""What there is to set; what glibc sets itself: 65,536 blocks may be mapped, and twice 32 MiB of free memory is given back."""

_LOCK = threading.Lock()
_runs = 0


def use_one_arena() -> None:
    """Let threads that have not yet allocated anything share the main heap, the only one that can hold large blocks."""
    if library := _library():
        library.mallopt(_ARENA_MAX, 1)


@contextmanager
def keeps_memory() -> Iterator[None]:
    """While it lasts, freed memory stays with the process; afterwards it goes back with the next larger block that is freed.

    Runs may lie inside or beside each other.

    >>> with keeps_memory():
    ...     block = bytearray(1 << 26)
    """
    _change(1)
    try:
        yield
    finally:
        _change(-1)


def _change(by: int) -> None:
    global _runs
    with _LOCK:
        before, _runs = _runs, _runs + by
        if (library := _library()) and not (before and _runs):
            library.mallopt(_MMAP_MAX, 0 if _runs else _USUAL_MAPPED)
            library.mallopt(_TRIM_THRESHOLD, _MOST if _runs else _USUAL_TRIM)


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The C library, if it is glibc."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "mallopt") else None
