"""Finds uneven splits in compiled programs: the compiler's own text of a program between spreading its splits and cutting it up."""

import contextlib
import math
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from parafit import backends
from parafit.backends.cpu.backend import CpuBackend

_PASS = "spmd-partitioning"
_LINE = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) [\w\-]+\(.*?, sharding=(.*)$")
_ARRAY = re.compile(r"\b(?:pred|token|[a-z]+\d\w*)\[([\d,]*)\]")


@dataclass
class Splits:
    """What was read.

    Attributes:
        programs: how many for more than one device.
        uneven: arrays with a dimension that their split does not divide.
    """

    programs: int = 0
    uneven: list[str] = field(default_factory=list)


@contextlib.contextmanager
def read_splits() -> Iterator[Splits]:
    """Reads the splits of all programs that are compiled within."""
    found = Splits()
    cached = jax.config.jax_enable_compilation_cache
    _use_cache(False)  # a program from there was not compiled, and left no text
    try:
        with backends.using(_Reading(found)):
            yield found
    finally:
        _use_cache(cached)


class _Reading(CpuBackend):
    """Compiles as XLA:CPU is asked to, and reads what comes between."""

    def __init__(self, found: Splits):
        self._found = found

    def compile(self, lowered, options):
        with tempfile.TemporaryDirectory() as folder:
            program = super().compile(lowered, {**options, "xla_dump_to": folder, "xla_dump_hlo_pass_re": _PASS})
            texts = [path.read_text() for path in Path(folder).glob(f"*before_{_PASS}*")]
        self._found.programs += len(texts)
        self._found.uneven += [line for text in texts for line in uneven_lines(text)]
        return program


def _use_cache(wanted: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", wanted)
    compilation_cache.reset_cache()  # JAX asks once whether to use it


def uneven_lines(text: str) -> list[str]:
    """The instructions of a program with a dimension that its split does not divide.

    >>> uneven_lines("  %a = f32[7,4]{1,0} add(%x, %y), sharding={devices=[2,1,2]<=[4] last_tile_dim_replicate}")
    ['f32[7,4]{1,0} a {devices=[2,1,2]<=[4] last_tile_dim_replicate}']
    >>> uneven_lines("  %a = f32[8,4]{1,0} add(%x, %y), sharding={devices=[2,1,2]<=[4] last_tile_dim_replicate}")
    []
    """
    return [told for line in text.splitlines() if (match := _LINE.match(line)) for told in _uneven(*match.groups())]


def _uneven(name: str, types: str, rest: str) -> Iterator[str]:
    shapes = [tuple(int(size) for size in shape.split(",") if size) for shape in _ARRAY.findall(types)]
    sharding = _braced(rest)
    splits = _parts(sharding) if sharding.startswith("{{") else [sharding] * len(shapes)
    for shape, split in zip(shapes, splits, strict=True):
        if any(size % part for size, part in zip(shape, _tiles(split))):
            yield f"{types} {name} {split}"


def _tiles(split: str) -> list[int]:
    """Into how many parts each dimension is split, written as a count or, since JAX 0.12, by the axes of a mesh.

    >>> _tiles("{devices=[2,1,2]<=[4] last_tile_dim_replicate}"), _tiles("{replicated}")
    ([2, 1, 2], [])
    >>> _tiles("{mesh['data'=2,'tensor'=4], [{'data', 'tensor':(1)2}, {}], replicated={'a'}}")
    [4, 1]
    """
    if counted := re.search(r"devices=\[([\d,]+)\]", split):
        return [int(size) for size in counted[1].split(",")]
    if named := re.search(r"mesh\[([^\]]*)\].*?, \[(.*?)\]", split):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        dims = [re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", dim) for dim in re.findall(r"\{([^}]*)\}", named[2])]
        return [math.prod(int(part or sizes[axis]) for axis, part in dim) for dim in dims]
    assert any(word in split for word in ("replicated", "maximal", "manual", "mesh[")), f"cannot read the split {split!r}"
    return []


def _braced(text: str) -> str:
    """What a text starts with, up to the brace that closes its first."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return text[: place + 1]
    raise AssertionError(f"no closing brace in {text[:200]!r}")


def _parts(text: str) -> list[str]:
    """The elements of a tuple of splits."""
    found, place = [], 1
    while (start := text.find("{", place)) >= 0:
        found.append(_braced(text[start:]))
        place = start + len(found[-1])
    return found
