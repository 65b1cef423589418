"""How one column of a table becomes numbers: a treatment for each kind of column, fitted on the training rows.

A treatment is a frozen record of plain numbers and texts (it goes into `preprocessing.json` as it is) with

- `fit(series, training)`: the treatment with what it learnt from the `training` rows (indices) of a column,
- `inputs`: the names of the network's inputs it makes,
- `describe()`: what it does, in words, for the report,
- `transform(series, first_row)`: the inputs, float32 of shape (rows, inputs), and how many values were unseen.

A missing number becomes the training median, a missing time the training mean, a missing category no category; where the
training rows have missing values, one more input says so.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from parafit.errors import DataError

if TYPE_CHECKING:
    import polars as pl

MANY_LEVELS = 32
"""A category column has one input for each of at most this many levels."""

_CLIP = 3.0
_TRUE_WORDS = {"true": True, "false": False, "1": True, "0": False}
_TIME_FORMATS = ("%Y-%m-%d", "%Y-%m-%d %H:%M", "%Y-%m-%d %H:%M:%S%.f")
_ZONED_FORMATS = ("%Y-%m-%d %H:%M%#z", "%Y-%m-%d %H:%M:%S%.f%#z")
_SECONDS_PER_DAY = 86_400.0
_DAYS_PER_YEAR = 365.2425


@dataclass(frozen=True, kw_only=True)
class Number:
    """z = (value - mean) / scale, then z / sqrt(1 + (z / 3)²): the far tail of a column cannot drown the rest.

    The smooth clip is that of Holzmüller, Grinsztajn and Steinwart, Better by Default, NeurIPS 2024.
    """

    kind: ClassVar[str] = "number"
    name: str
    mean: float
    scale: float
    fill: float
    missing: int

    @classmethod
    def fit(cls, series: "pl.Series", training: np.ndarray) -> "Number":
        values = to_numbers(series).gather(training)
        known = values.drop_nulls().to_numpy()
        return cls(name=series.name, fill=float(np.median(known)), missing=values.null_count(), **_mean_and_scale(known))

    @property
    def inputs(self) -> list[str]:
        return [self.name, *_missing_input(self)]

    def describe(self) -> str:
        return f"standardised (mean {self.mean:.4g}, deviation {self.scale:.4g})" + _missing_words(self, f"the median {self.fill:.4g}")

    def transform(self, series: "pl.Series", first_row: int) -> tuple[np.ndarray, int]:
        values = to_numbers(series, first_row)
        standard = (values.fill_null(self.fill).to_numpy() - self.mean) / self.scale
        return _with_missing(self, values, [_soft_clip(standard)]), 0


@dataclass(frozen=True, kw_only=True)
class Boolean:
    """0 or 1; missing is the share of true values among the training rows."""

    kind: ClassVar[str] = "boolean"
    name: str
    share: float
    missing: int

    @classmethod
    def fit(cls, series: "pl.Series", training: np.ndarray) -> "Boolean":
        values = to_booleans(series).gather(training)
        share = values.cast(float).mean()
        return cls(name=series.name, share=float(share), missing=values.null_count())  # type: ignore[arg-type]

    @property
    def inputs(self) -> list[str]:
        return [self.name, *_missing_input(self)]

    def describe(self) -> str:
        return f"0 or 1 ({self.share:.0%} are 1)" + _missing_words(self, f"{self.share:.2f}")

    def transform(self, series: "pl.Series", first_row: int) -> tuple[np.ndarray, int]:
        values = to_booleans(series, first_row)
        return _with_missing(self, values, [values.cast(float).fill_null(self.share).to_numpy()]), 0


@dataclass(frozen=True, kw_only=True)
class Category:
    """One input for each frequent level, one for all the rare ones, and where there are rare ones how frequent the level is.

    Args:
        levels: the levels with an input of their own, most frequent first.
        counts: training rows of every level, rare ones too.
    """

    kind: ClassVar[str] = "category"
    name: str
    levels: tuple[str, ...]
    counts: Mapping[str, int] = field(hash=False)
    missing: int

    def __post_init__(self):
        object.__setattr__(self, "levels", tuple(self.levels))

    @classmethod
    def fit(cls, series: "pl.Series", training: np.ndarray) -> "Category":
        texts = to_texts(series).gather(training)
        by_count = texts.drop_nulls().value_counts(name="rows").sort("rows", texts.name, descending=[True, False])
        counts = dict(by_count.iter_rows())
        enough = max(2, min(10, len(texts) // 100))
        frequent = [level for level, rows in counts.items() if rows >= enough][:MANY_LEVELS]
        return cls(name=series.name, levels=tuple(frequent), counts=counts, missing=texts.null_count())

    @property
    def has_rare(self) -> bool:
        return len(self.counts) > len(self.levels)

    @property
    def inputs(self) -> list[str]:
        own = [f"{self.name}={level}" for level in self.levels]
        rare = [f"{self.name} is rare", f"frequency of {self.name}"] if self.has_rare else []
        return [*own, *rare, *_missing_input(self)]

    def describe(self) -> str:
        rare = f", {len(self.counts) - len(self.levels)} rare levels together with their frequency" if self.has_rare else ""
        return f"one input for each of {len(self.levels)} levels{rare}" + _missing_words(self, "no level")

    def transform(self, series: "pl.Series", first_row: int) -> tuple[np.ndarray, int]:
        import polars as pl

        texts = to_texts(series)
        seen = texts.replace_strict({level: index for index, level in enumerate(self.counts)}, default=None, return_dtype=pl.Int64)
        index = seen.fill_null(-1).to_numpy()
        columns = [index == position for position in range(len(self.levels))]
        if self.has_rare:
            columns += [index >= len(self.levels), self._frequency(index)]
        return _with_missing(self, seen, columns), seen.null_count() - texts.null_count()

    def _frequency(self, index: np.ndarray) -> np.ndarray:
        logs = np.log1p(np.array([*self.counts.values(), 0], float))  # index -1, no level, is the last: frequency 0
        return logs[index] / logs.max()


@dataclass(frozen=True, kw_only=True)
class Time:
    """The moment, standardised; the place within the year, the week and (where there are hours) the day as cosine and sine."""

    kind: ClassVar[str] = "time"
    name: str
    mean: float
    scale: float
    hours: bool
    missing: int

    @classmethod
    def fit(cls, series: "pl.Series", training: np.ndarray) -> "Time":
        days, missing = _days(series.gather(training))
        known = days[~missing]
        hours = bool(np.any(known % 1 != 0))
        return cls(name=series.name, hours=hours, missing=int(missing.sum()), **_mean_and_scale(known))

    @property
    def cycles(self) -> dict[str, float]:
        return {"year": _DAYS_PER_YEAR, "week": 7.0} | ({"day": 1.0} if self.hours else {})

    @property
    def inputs(self) -> list[str]:
        waves = [f"{self.name} {wave} of {cycle}" for cycle in self.cycles for wave in ("cos", "sin")]
        return [self.name, *waves, *_missing_input(self)]

    def describe(self) -> str:
        return f"standardised; place within the {', '.join(self.cycles)} as cosine and sine" + _missing_words(self, "the mean")

    def transform(self, series: "pl.Series", first_row: int) -> tuple[np.ndarray, int]:
        days, missing = _days(series, first_row)
        columns = [_soft_clip((days - self.mean) / self.scale)]
        for length in self.cycles.values():
            angle = 2 * np.pi * days / length
            columns += [np.cos(angle), np.sin(angle)]
        for column in columns:
            column[missing] = 0.0
        return _with_missing(self, missing, columns), 0


TREATMENTS = {treatment.kind: treatment for treatment in (Number, Boolean, Category, Time)}
Treatment = Number | Boolean | Category | Time


def to_record(treatment: Treatment) -> dict:
    """The treatment as plain values for JSON; `from_record` undoes it."""
    return {"kind": treatment.kind, **asdict(treatment)}


def from_record(record: Mapping) -> Treatment:
    content = dict(record)
    return TREATMENTS[content.pop("kind")](**content)


def to_numbers(series: "pl.Series", first_row: int = 1) -> "pl.Series":
    """The values as float64, missing ones (NaN too) null.

    Raises:
        DataError: a value that is not a number, or infinite; names its row.
    """
    import polars as pl

    if series.dtype == pl.Duration:
        series = series.dt.total_microseconds() / 1e6
    if not (series.dtype.is_numeric() or series.dtype in (pl.String, pl.Boolean, pl.Null)):
        raise DataError(f"column {series.name!r} holds {series.dtype}: expected numbers, as in training.")
    numbers = series.cast(pl.Float64, strict=False)
    _check_converted(series, numbers, first_row, "a number")
    numbers = numbers.fill_nan(None)
    _check_finite(numbers, first_row)
    return numbers


def to_booleans(series: "pl.Series", first_row: int = 1) -> "pl.Series":
    """The values as booleans, from booleans, 0 and 1, or the words true and false in any case."""
    import polars as pl

    if series.dtype == pl.Boolean:
        return series
    if series.dtype.is_numeric():
        words = series.cast(pl.Float64).replace_strict({1.0: True, 0.0: False}, default=None, return_dtype=pl.Boolean)
    else:
        words = to_texts(series).str.to_lowercase().replace_strict(_TRUE_WORDS, default=None, return_dtype=pl.Boolean)
    _check_converted(series, words, first_row, "true or false")
    return words


def to_texts(series: "pl.Series") -> "pl.Series":
    """The values as text; whole numbers without a decimal point, so that 3, 3.0 and "3" are one category."""
    import polars as pl

    if series.dtype.is_float():
        whole = series.drop_nulls()
        if (whole == whole.round()).all() and whole.is_finite().all():
            series = series.cast(pl.Int64)
    return series.cast(pl.String)


def to_times(series: "pl.Series", first_row: int = 1) -> "pl.Series":
    """The values as moments without a zone (UTC where they had one), from dates, times or ISO 8601 text.

    Raises:
        DataError: text that is no date or time; names its row.
    """
    import polars as pl

    if series.dtype in (pl.String, pl.Null):
        moments = parse_times(series.cast(pl.String))
        _check_converted(series, moments, first_row, "a date or time such as 2026-11-22 or 2026-11-22 09:30")
        return moments
    if series.dtype not in (pl.Date, pl.Datetime):
        raise DataError(f"column {series.name!r} holds {series.dtype}: expected dates or times, as in training.")
    if series.dtype == pl.Datetime and series.dtype.time_zone:  # type: ignore[attr-defined]
        series = series.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
    return series.cast(pl.Datetime("us"))


def parse_times(texts: "pl.Series") -> "pl.Series":
    """ISO 8601 texts as moments in UTC, null where a text is none."""
    import polars as pl

    text = pl.col("text").str.replace("T", " ", literal=True)
    plain = [text.str.to_datetime(written, strict=False, time_unit="us") for written in _TIME_FORMATS]
    zoned = [text.str.to_datetime(written, strict=False, time_unit="us", time_zone="UTC") for written in _ZONED_FORMATS]
    moment = pl.coalesce(*plain, *(one.dt.replace_time_zone(None) for one in zoned))
    return texts.alias("text").to_frame().select(moment).to_series().alias(texts.name)


def _days(series: "pl.Series", first_row: int = 1) -> tuple[np.ndarray, np.ndarray]:
    moments = to_times(series, first_row)
    return moments.dt.epoch("us").fill_null(0).to_numpy() / (1e6 * _SECONDS_PER_DAY), moments.is_null().to_numpy()


def _check_converted(before: "pl.Series", after: "pl.Series", first_row: int, expected: str) -> None:
    wrong = (before.is_not_null() & after.is_null()).arg_true()
    if len(wrong):
        row, value = wrong[0], before[wrong[0]]
        raise DataError(
            f"column {before.name!r} holds {value!r} in row {first_row + row}: expected {expected}, as in training"
            + (f" ({len(wrong)} such rows)." if len(wrong) > 1 else ".")
        )


def _check_finite(values: "pl.Series", first_row: int) -> None:
    wrong = values.is_infinite().fill_null(False).arg_true()
    if len(wrong):
        raise DataError(
            f"column {values.name!r} holds an infinite number in {len(wrong)} of {len(values)} rows, first in row {first_row + wrong[0]}: "
            "replace it by a finite number or leave the field empty."
        )


def _mean_and_scale(known: np.ndarray) -> dict[str, float]:
    deviation = float(known.std())
    return {"mean": float(known.mean()), "scale": deviation if deviation > 0 else 1.0}


def _soft_clip(standard: np.ndarray) -> np.ndarray:
    return standard / np.hypot(1.0, standard / _CLIP)


def _missing_input(treatment) -> list[str]:
    return [f"{treatment.name} is missing"] if treatment.missing else []


def _missing_words(treatment, filled_with: str) -> str:
    return f"; {treatment.missing} missing: {filled_with} and an input that says so" if treatment.missing else ""


def _with_missing(treatment, values, columns: list[np.ndarray]) -> np.ndarray:
    if treatment.missing:
        missing = values if isinstance(values, np.ndarray) else values.is_null().to_numpy()
        columns = [*columns, missing]
    return np.stack(columns, axis=1, dtype=np.float32, casting="unsafe") if columns else np.zeros((len(values), 0), np.float32)
