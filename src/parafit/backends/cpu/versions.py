"""Which jaxlib compiles: what was read from the behaviour of one holds for that one, and for others only where it was read again."""

import re

MEMORY_READ_FROM = frozenset({(0, 10), (0, 11), (0, 12)})
"""The jaxlibs whose use of memory on a CPU is known (`buffers.py`); of others, the general
estimate holds (`planner/cost/memory.py`)."""

BARRIERS_HOLD_SINCE = (0, 11, 1)
"""The jaxlib since which XLA:CPU computes again what `jax.checkpoint` asks it to (`recompute.py`); those before merged both."""


def jaxlib_version() -> tuple[int, ...]:
    """The version of the compiler, as far as it is numbers.

    >>> jaxlib_version() >= (0, 10)
    True
    """
    from jaxlib.version import __version__

    return tuple(int(number) for number in re.findall(r"\d+", __version__)[:3])


def knows_memory() -> bool:
    """Whether the rules of what XLA:CPU holds were read from this jaxlib."""
    return jaxlib_version()[:2] in MEMORY_READ_FROM
