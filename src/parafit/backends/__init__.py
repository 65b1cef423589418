"""What does one compiler need? `current()` is the only door to it; the default backend needs nothing.

Nothing else in parafit asks which devices JAX computes on. Importing this module imports no JAX.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

from parafit.support import environment

TYPE_CHECKING = False  # importing `typing` for it would take a sixth of parafit's own import
if TYPE_CHECKING:
    from parafit.backends.backend import Backend

_CPU = "cpu"
_used: list["Backend"] = []


def prepare() -> None:
    """What has to come before JAX starts its threads. Runs when parafit is imported."""
    if environment.jax_platform(otherwise=_CPU) == _CPU:
        from parafit.backends.cpu.malloc import use_one_arena

        use_one_arena()


def current() -> "Backend":
    """What the compiler of JAX's default devices needs.

    >>> import jax
    >>> current() is current()
    True
    """
    import jax

    return _used[-1] if _used else _backend_of(jax.default_backend())


@contextmanager
def using(backend: "Backend") -> Iterator[None]:
    """While it lasts, steps are compiled and run as this backend says, whatever the devices are.

    Args:
        backend: `Backend()` itself runs everywhere, if not as fast.

    >>> from parafit.backends.backend import Backend
    >>> with using(Backend()):
    ...     current().name
    'default'
    """
    _used.append(backend)
    try:
        yield
    finally:
        _used.pop()


@functools.cache
def _backend_of(platform: str) -> "Backend":
    if platform == _CPU:
        from parafit.backends.cpu.backend import CpuBackend

        return CpuBackend()
    from parafit.backends.backend import Backend

    return Backend()
