"""What a step held is kept for the next step: the C library's heap, told not to return large blocks to the system. For XLA:CPU only.

XLA:CPU takes the memory for a program's temporaries anew at every dispatch. glibc maps blocks of more than 32 MiB into the process and
unmaps them when they are freed, so that the system clears and maps every page of them again, at each dispatch: a third of the step of a
transformer of 100 MiB. Blocks of the heap proper are used again as they are.

Compiling leaves thousands of gaps in the heap. Whoever asks for memory walks through them under the heap's one lock while other threads
wait, so parafit takes them up until the next program is compiled.

All of this was measured with XLA:CPU, whose arrays lie in the heap; where JAX computes elsewhere, the heap is left alone.
"""

import ctypes
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8  # malloc.h
_MOST, _USUAL_MAPPED, _USUAL_LARGE = 2**31 - 1, 65536, 1 << 25
"""What there is to set; what glibc comes to itself in a process that frees large blocks: 65,536 of 32 MiB or more may be mapped, and twice
32 MiB of free memory is given back."""

_GAPS = (1 << 20, 1 << 17, 1 << 14)
"""Sizes of the blocks that take up gaps, in bytes, in this order; what is left is too small for the walks."""

_LOCK = threading.Lock()
_runs = _compiling = 0
_taken: list[int] = []


def use_one_arena() -> None:
    """Let threads that have not yet allocated anything share the main heap, the only one that can hold large blocks.

    XLA:CPU's threads allocate when they start, so this comes before them: with parafit, where JAX will compute on the processor. glibc
    takes the limit once, for as long as the process lives: it is the one setting that cannot be undone.
    """
    if library := _library():
        library.mallopt(_ARENA_MAX, 1)


@contextmanager
def keeps_memory() -> Iterator[None]:
    """While it lasts, freed memory stays with the process; afterwards it goes back with the next larger block that is freed.

    Runs may lie inside or beside each other.

    >>> with keeps_memory():
    ...     block = bytearray(1 << 26)
    """
    with _counted(_change):
        yield


@contextmanager
def takes_up_gaps() -> Iterator[None]:
    """While it lasts the gaps of the heap can be used, as compiling does; afterwards they are allocated, without memory behind them.

    Programs may be compiled beside each other: the last to end takes up the gaps.

    >>> with takes_up_gaps():
    ...     blocks = [bytearray(1 << 15) for _ in range(100)]
    ...     del blocks[::2]
    """
    with _counted(_compile):
        yield


@contextmanager
def _counted(change: Callable[[int], None]) -> Iterator[None]:
    change(1)
    try:
        yield
    finally:
        change(-1)


def _compile(by: int) -> None:
    global _compiling
    with _LOCK:
        before, _compiling = _compiling, _compiling + by
        if (library := _library()) and not (before and _compiling):
            if _compiling:
                _release(library)
            else:
                _take_up(library)


def _release(library: ctypes.CDLL) -> None:
    while _taken:
        library.free(_taken.pop())


def _take_up(library: ctypes.CDLL) -> None:
    """Allocate what lies free between the blocks of the main heap; trimming returns the memory in it, and leaves nothing above them."""
    library.malloc_trim(0)
    end = library.sbrk(0)
    for size in _GAPS:
        while block := library.malloc(size):
            if block + size > end:
                library.free(block)
                break
            _taken.append(block)


def _change(by: int) -> None:
    global _runs
    with _LOCK:
        before, _runs = _runs, _runs + by
        if (library := _library()) and not (before and _runs):
            library.mallopt(_MMAP_MAX, 0 if _runs else _USUAL_MAPPED)
            library.mallopt(_TRIM_THRESHOLD, _MOST if _runs else 2 * _USUAL_LARGE)
            library.mallopt(_MMAP_THRESHOLD, _USUAL_LARGE)  # glibc ends its own search for it when either is set


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The C library, if it is glibc."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(library, "mallopt"):
        return None
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    library.sbrk.restype, library.sbrk.argtypes = ctypes.c_void_p, (ctypes.c_ssize_t,)
    library.free.argtypes = (ctypes.c_void_p,)
    return library
