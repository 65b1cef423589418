"""Files that are written whole or not at all, and folders of what can be made again: their owner's alone, and bounded."""

import os
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from parafit.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_LEFT_BEHIND_SECONDS = 3600.0
"""A part of a file that is older belongs to a process that ended while it wrote."""


def write_whole(path: Path, content: str | bytes, *, mode: int = 0o666) -> None:
    """Write a file so that no reader ever sees a part of it, whoever else writes it; text is UTF-8.

    Args:
        path: where.
        content: all of it.
        mode: who may read and write it, less what the process's mask takes away.

    Raises:
        OSError: it cannot be written; what was there before stays.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_output(path: Path, text: str) -> None:
    """`write_whole` at a place that somebody chose.

    Args:
        path: path of the file.
        text: what will be in it.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        write_whole(path, text)
    except OSError as error:
        raise OutputError(f"cannot write {str(path)!r}: {error.strerror or error}. Choose a place that can be written to.") from error


def private_folder(root: Path, *names: str) -> Path:
    """The folder of these names below `root`, made where it is missing; it and those above it, up to `root`, are their owner's alone.

    Args:
        root: the first folder that is made private.
        names: names of folders, each in the one before.

    Raises:
        OSError: it cannot be made, or is somebody else's, who could put anything into it.
    """
    folder = root
    for name in ("", *names):
        folder = folder / name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if hasattr(os, "getuid") and status.st_uid != os.getuid():
            raise PermissionError(f"{folder} belongs to another user")
        if stat.S_IMODE(status.st_mode) & 0o077:
            folder.chmod(0o700)
    return folder


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """While it lasts no other process holds this file's lock, which lies beside it. Where the system has none, nothing is locked."""
    if fcntl is None:
        yield
        return
    file = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def prune(folder: Path, most_bytes: int, *, pattern: str = "*") -> None:
    """Where files hold more than `most_bytes`, take away those not used for longest, until they hold three quarters of it.

    Other processes may do the same, or write.

    Args:
        folder: whose files, and those of the folders in it, are to be bounded.
        most_bytes: that they may hold together.
        pattern: of the files' names.
    """
    found = []
    for path in folder.rglob(pattern):
        with suppress(OSError):  # gone by now
            status = path.stat()
            if stat.S_ISREG(status.st_mode):
                found.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in found)
    least = 3 * most_bytes // 4 if total > most_bytes else total
    for used, size, path in sorted(found):
        if path.suffix == ".part":
            if time.time() - used < _LEFT_BEHIND_SECONDS:
                continue
        elif total <= least:
            continue
        with suppress(OSError):
            path.unlink()
        total -= size
