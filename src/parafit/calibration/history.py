"""Residuals: what fits were predicted to take, and what they took. Kept beside the machine's calibration; they mend the next prediction.

One line of JSON a fit, appended in one write, so that fits that end at the same time do not mix. A line that was cut off, or that another
version wrote, is passed over. Plain Python.
"""

import json
import math
import os
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from parafit.support.environment import cache_directory
from parafit.support.files import locked, private_folder, write_whole

MOST_BYTES = 1 << 20
"""A larger file is cut to the newer half of its records."""
RECENT = 9
"""Fits that the next prediction learns from: the load of a machine changes within minutes."""

_PRICE_ERROR = 0.1
"""What prices of other programs are wrong by in any case, as ln(measured / predicted)."""

_SIGMAS = 1.4826
"""Standard deviations in a median absolute deviation, where errors are normal."""


@dataclass(frozen=True, kw_only=True)
class Residual:
    """One fit.

    Attributes:
        machine: its id (`detect.machine_id`).
        model: its name.
        batch: rows of a step over all devices.
        plan: its text (`Plan.short`).
        predicted_seconds, measured_seconds: of one step; the prediction before any correction.
        predicted_bytes, measured_bytes: peak of one device; 0 where it was not measured.
        date: when the fit ended, ISO 8601.
    """

    machine: str
    model: str
    batch: int
    plan: str
    predicted_seconds: float
    measured_seconds: float
    predicted_bytes: float
    measured_bytes: float
    date: str


def residuals_path() -> Path:
    """Where residuals are kept: beside the calibrations."""
    return cache_directory() / "machines" / "residuals.jsonl"


def append(residual: Residual, path: Path | None = None) -> None:
    """Keep one more residual; the oldest are dropped when the file becomes too large.

    Args:
        residual: of the fit that has just ended.
        path: the file; None: `residuals_path()`.
    """
    path = path or residuals_path()
    private_folder(path.parent)
    line = (json.dumps(asdict(residual)) + "\n").encode()
    with locked(path):
        size = _append(path, line)
        if size > MOST_BYTES:
            _halve(path)


def _append(path: Path, line: bytes) -> int:
    """Add a line in one write, a new one where the last was cut off; gives the bytes of the file."""
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        size = os.fstat(file).st_size
        torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"
        return size + os.write(file, b"\n" * torn + line)
    finally:
        os.close(file)


def load(path: Path | None = None, *, machine: str = "") -> list[Residual]:
    """All residuals that can be read, oldest first; those of one machine if it is named.

    Args:
        path: the file; None: `residuals_path()`.
        machine: its id; "": any machine.
    """
    path = path or residuals_path()
    if not path.exists():
        return []
    read = (_parse(line) for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
    return [residual for residual in read if residual is not None and machine in ("", residual.machine)]


def correction(residuals: Iterable[Residual], predicted_seconds: float = 0.0) -> float:
    """The machine's load as recent fits met it: a factor on predicted seconds.

    exp of the median of ln(measured / predicted) over the last `RECENT` fits: of those of which exactly the same was predicted if there
    are any, for they ran the same program under the same plan and share what the price leaves out. Other programs share what else runs on
    the machine, and not what their own prices leave out: their median m, of a scatter s, counts as m · m² / (m² + s²), the more the
    clearer all point to one side (shrinkage towards 1, as in James, Stein 1961). Nothing known: 1.

    Args:
        residuals: of one machine, oldest first.
        predicted_seconds: of the fit to come, before any correction.

    Returns:
        Measured over predicted seconds, to be expected.

    >>> from dataclasses import replace
    >>> fit = Residual(machine="m", model="net", batch=32, plan="single", predicted_seconds=1.0, measured_seconds=1.2,
    ...                predicted_bytes=1, measured_bytes=1, date="2026-01-01T00:00:00")
    >>> fits = [fit, replace(fit, measured_seconds=1.5), replace(fit, measured_seconds=1.3)]
    >>> round(correction(fits, 1.0), 2), round(correction(fits, 2.0), 2)
    (1.3, 1.21)
    >>> correction([])
    1.0
    """
    found = list(residuals)
    alike = [residual for residual in found if math.isclose(residual.predicted_seconds, predicted_seconds)]
    ratios = [math.log(residual.measured_seconds / residual.predicted_seconds) for residual in (alike or found)[-RECENT:]]
    if not ratios:
        return 1.0
    middle = statistics.median(ratios)
    scatter = 0.0 if alike else math.hypot(_PRICE_ERROR, _SIGMAS * statistics.median(abs(ratio - middle) for ratio in ratios))
    return math.exp(middle**3 / (middle**2 + scatter**2)) if middle else 1.0


def _parse(line: str) -> Residual | None:
    try:
        residual = Residual(**json.loads(line))
    except (json.JSONDecodeError, TypeError):
        return None
    times = residual.predicted_seconds, residual.measured_seconds
    numbers = *times, residual.predicted_bytes, residual.measured_bytes
    known = all(isinstance(number, (int, float)) and number >= 0 and math.isfinite(number) for number in numbers)
    return residual if known and all(times) else None


def _halve(path: Path) -> None:
    """Keep the newer half, in one step."""
    lines = path.read_bytes().splitlines(keepends=True)
    write_whole(path, b"".join(lines[len(lines) // 2 :]), mode=0o600)
