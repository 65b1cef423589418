"""Series of measured values in a result, and what is said about them: medians, quartiles, ratios round by round."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median and quartiles of a series.

    >>> print(Spread.of([1.0, 1.1, 1.2]))
    1.10 [1.05–1.15]
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, series: Sequence[float]) -> "Spread":
        """The spread of `series`, which must not be empty."""
        low, median, high = np.percentile(series, (25, 50, 75)).tolist()
        return cls(median=median, low=low, high=high)

    def __str__(self) -> str:
        return f"{significant(self.median)} [{significant(self.low)}–{significant(self.high)}]"


def values(workload: dict, contender: str, measure: str) -> list[float]:
    """The series `measure` of `contender`, one value a round; empty where it was not measured.

    `measure` names it from the contender's record down: `"step_seconds"`, `"fresh_cold.total_seconds"`.
    """
    found = workload["contenders"].get(contender, {})
    for name in measure.split("."):
        found = found.get(name, {})
    return found or []


def fastest(workload: dict, contenders: Iterable[str], measure: str) -> str | None:
    """Who of `contenders` has the smallest median of `measure`; None if it was not measured for all of them."""
    series = {name: values(workload, name, measure) for name in contenders}
    if not all(series.values()):
        return None
    return min(series, key=lambda name: Spread.of(series[name]).median)


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """`above / below`, round by round, as far as both go.

    >>> ratios([4.0, 6.0], [2.0, 2.0, 1.0])
    [2.0, 3.0]
    """
    return [a / b for a, b in zip(above, below)]


def significant(value: float) -> str:
    """`value` to three digits, as people write it.

    >>> significant(0.1234), significant(12.345), significant(1234.5)
    ('0.123', '12.3', '1,234')
    """
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.{1 if value >= 10 else 2 if value >= 1 else 3}f}"
