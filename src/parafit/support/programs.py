"""Compiled programs, kept on disk so that a second start compiles nothing again.

JAX does that itself, in one folder for all, without a bound, each file written in place, and a damaged one there to stay (0.10 to 0.12;
its bound needs another package and reads the whole folder at every write). A program for a processor is that processor's machine code,
so parafit gives JAX a folder for each kind of processor and each jaxlib, and files of its own: whole, checked when they are read, their
owner's alone. Together they hold at most `MOST_BYTES`; those that were not used for longest go first.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from parafit.support.environment import cache_directory, chosen_by_user
from parafit.support.files import private_folder, prune, write_whole
from parafit.support.processor import processor_kind

MOST_BYTES = 1 << 30
"""Of all programs together."""

_SUFFIX = ".program"
_DIGEST_BYTES = 16
_LOOKS = 16
"""The folder is looked through when a process first writes, and again for each of so many parts of the bound that it wrote."""


def keep_programs(jax: Any) -> None:
    """Let JAX keep what it compiles in parafit's folder, unless the user chose another.

    Args:
        jax: the package, imported but not yet used.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    settings = {"jax_persistent_cache_min_compile_time_secs": 0, "jax_persistent_cache_min_entry_size_bytes": -1}
    for name, value in settings.items():
        if not chosen_by_user(name):
            jax.config.update(name, value)
    folder = Path("programs", f"jaxlib-{jax.lib.__version__}-{processor_kind()}")
    jax.config.update("jax_compilation_cache_dir", str(cache_directory() / folder))
    _serve(str(cache_directory() / folder), lambda: Programs(private_folder(cache_directory(), *folder.parts)))


def _serve(folder: str, make: Callable[[], "Programs"]) -> None:
    """Let JAX use these files in place of its own for this folder. JAX 0.10 to 0.12: private; where it is missing, JAX uses its own."""
    from jax._src import compilation_cache

    original = getattr(compilation_cache, "get_file_cache", None)

    def get_file_cache(path: str) -> Any:
        if path != folder:
            return original(path)  # type: ignore[misc]
        try:
            return make(), path
        except OSError as error:
            _warn("parafit: compiled programs are not kept for the next start: %s", error)
            return None

    if original is not None:
        compilation_cache.get_file_cache = get_file_cache


class Programs:
    """A folder of programs, as JAX asks for them: by a key, as bytes.

    Args:
        folder: which is there.
    """

    def __init__(self, folder: Path):
        self._path = folder
        self._written: int | None = None

    def get(self, key: str) -> bytes | None:
        """The program of this key, None where there is none, or what there is was damaged."""
        path = self._file(key)
        try:
            content = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        digest, program = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if digest == _digest(program):
            return program
        _warn("parafit: a compiled program on disk was damaged and is compiled anew: %s", path)
        path.unlink(missing_ok=True)
        return None

    def put(self, key: str, program: bytes) -> None:
        """Keep a program; the oldest go where the folders become too large.

        Args:
            key: what tells the program from others.
            program: the program's bytes.

        Raises:
            OSError: it cannot be written.
        """
        write_whole(self._file(key), _digest(program) + program, mode=0o600)
        self._written = None if self._written is None else self._written + len(program)
        if self._written is None or self._written > MOST_BYTES // _LOOKS:
            prune(self._path.parent, MOST_BYTES)
            self._written = 0

    def _file(self, key: str) -> Path:
        return self._path / f"{key}{_SUFFIX}"


def _warn(message: str, *values: object) -> None:
    import logging  # when it is needed: with it, importing parafit would take an eighth longer

    logging.getLogger("parafit").warning(message, *values)


def _digest(program: bytes) -> bytes:
    return hashlib.blake2b(program, digest_size=_DIGEST_BYTES).digest()
