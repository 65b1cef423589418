"""The page of `parafit report`: what past fits were predicted to take, and what they took."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from parafit.reports.html import Section, page, table
from parafit.reports.plots import scatter_plot


def history_page(fits: Sequence[Any]) -> str:
    """Predicted against measured seconds and bytes of past fits, as one self-contained HTML page.

    Args:
        fits: records as `calibration.history` keeps them, oldest first.
    """
    pieces = [_predictions([(fit.measured_seconds * 1e3, fit.predicted_seconds * 1e3) for fit in fits], "step, ms")]
    sized = [(fit.measured_bytes / 2**20, fit.predicted_bytes / 2**20) for fit in fits if fit.measured_bytes and fit.predicted_bytes]
    if sized:
        pieces.append(_predictions(sized, "peak, MiB"))
    rows = [[fit.date[:16], fit.model, fit.batch, fit.plan, *_times(fit), 100 * error(fit)] for fit in fits]
    header = ["ended", "model", "batch", "plan", "predicted, ms", "measured, ms", "off by, %"]
    return page("Predicted against measured", f"{len(fits)} fits", [Section(heading="Fits", pieces=[*pieces, table(header, rows[::-1])])])


def error(fit: Any) -> float:
    """Predicted over measured seconds, less 1."""
    return fit.predicted_seconds / fit.measured_seconds - 1


def _predictions(pairs: list[tuple[float, float]], name: str) -> str:
    measured, predicted = np.array(pairs).T
    return scatter_plot(measured, predicted, name, known="measured", scale="log")


def _times(fit: Any) -> tuple[float, float]:
    return fit.predicted_seconds * 1e3, fit.measured_seconds * 1e3
