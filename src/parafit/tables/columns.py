"""How one column of a table becomes numbers: a treatment for each kind of column, fitted on the training rows.

A treatment is a frozen record of plain numbers and texts (it goes into `preprocessing.json` as it is) with

- `fit(reading, training)`: the treatment with what it learnt from the training rows of a column,
- `inputs`: the names of the network's inputs it makes,
- `describe()`: what it does, in words, for the report,
- `transform(series)`: a `Part`.

A missing number becomes the training median, a missing time the training mean, a missing category no category; where the
training rows have missing values, one more input says so. A cell that is not of the column's kind is bad, and missing.

Args:
    reading: the column as it was recognised.
    training: the training rows (indices).
    series: a column, of training or of a table to predict.
    writing: how the training rows' numbers or times were written.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np

from parafit.errors import DataError
from parafit.tables.kinds import LARGEST_EXACT, MANY_LEVELS, Reading, known_texts, read_cells, to_floats, to_moments
from parafit.tables.numbers import PLAIN, NumberWriting
from parafit.tables.times import ISO, TimeWriting

if TYPE_CHECKING:
    import polars as pl

_CLIP = 3.0
_TRUE_WORDS = {"true": True, "false": False, "1": True, "0": False}
_SECONDS_PER_DAY = 86_400.0
_DAYS_PER_YEAR = 365.2425


class Part(NamedTuple):
    """What a treatment makes of a column.

    Attributes:
        values: the inputs, float32 of shape (rows, inputs).
        missing: how many values are missing, bad ones too.
        unseen: how many values are categories that training had not; they count as missing.
        bad: the rows (indices) of cells that are not of the column's kind.
    """

    values: np.ndarray
    missing: int
    unseen: int
    bad: np.ndarray


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
    writing: NumberWriting = PLAIN

    @classmethod
    def fit(cls, reading: Reading, training: np.ndarray) -> "Number":
        """Learn mean, deviation and median of the known numbers."""
        values = reading.values.gather(training)
        known = values.drop_nulls().to_numpy()
        fill, missing = float(np.median(known)), values.null_count()
        return cls(name=values.name, fill=fill, missing=missing, writing=reading.writing, **_mean_and_scale(known))  # type: ignore[arg-type]

    @property
    def inputs(self) -> list[str]:
        """Names of the network's inputs."""
        return [self.name, *_missing_input(self)]

    @property
    def expected(self) -> str:
        """What a cell should hold, in words."""
        return _with_words("a number", self.writing)

    def describe(self) -> str:
        """What it does, in words."""
        numbers = f"standardised (mean {self.mean:.4g}, deviation {self.scale:.4g})"
        return numbers + _missing_words(self, f"the median {self.fill:.4g}") + _read_words(self.writing)

    def transform(self, series: "pl.Series") -> Part:
        """The column standardised, with a smooth limit."""
        values, bad = to_numbers(series, self.writing)
        standard = (values.fill_null(self.fill).to_numpy() - self.mean) / self.scale
        return _with_missing(self, values, [_soft_clip(standard)], bad)


@dataclass(frozen=True, kw_only=True)
class Boolean:
    """0 or 1; missing is the share of true values among the training rows."""

    kind: ClassVar[str] = "boolean"
    expected: ClassVar[str] = "true or false"
    name: str
    share: float
    missing: int

    @classmethod
    def fit(cls, reading: Reading, training: np.ndarray) -> "Boolean":
        """Learn what share of the known values is true."""
        values = reading.values.gather(training)
        share = values.cast(float).mean()
        return cls(name=values.name, share=float(share), missing=values.null_count())  # type: ignore[arg-type]

    @property
    def inputs(self) -> list[str]:
        """Names of the network's inputs."""
        return [self.name, *_missing_input(self)]

    def describe(self) -> str:
        """What it does, in words."""
        return f"0 or 1 ({self.share:.0%} are 1)" + _missing_words(self, f"{self.share:.2f}")

    def transform(self, series: "pl.Series") -> Part:
        """The column as 0 and 1; the share of ones where it is missing."""
        values, bad = to_booleans(series)
        return _with_missing(self, values, [values.cast(float).fill_null(self.share).to_numpy()], bad)


@dataclass(frozen=True, kw_only=True)
class Category:
    """One input for each frequent level, one for all the rare ones, and where there are rare ones how frequent the level is.

    Args:
        levels: the levels with an input of their own, most frequent first.
        counts: training rows of every level, rare ones too.
        reason: why its texts are no numbers though they look so; empty if they do not.
    """

    kind: ClassVar[str] = "category"
    expected: ClassVar[str] = "text"
    name: str
    levels: tuple[str, ...]
    counts: Mapping[str, int] = field(hash=False)
    missing: int
    reason: str = ""

    def __post_init__(self):
        object.__setattr__(self, "levels", tuple(self.levels))

    @classmethod
    def fit(cls, reading: Reading, training: np.ndarray) -> "Category":
        """Learn the levels, most frequent first, and how many rows have each."""
        texts = reading.values.gather(training)
        by_count = texts.drop_nulls().value_counts(name="rows").sort("rows", texts.name, descending=[True, False])
        counts = dict(by_count.iter_rows())
        enough = max(2, min(10, len(texts) // 100))
        frequent = [level for level, rows in counts.items() if rows >= enough][:MANY_LEVELS]
        return cls(name=texts.name, levels=tuple(frequent), counts=counts, missing=texts.null_count(), reason=reading.reason)

    @property
    def has_rare(self) -> bool:
        """Whether there are levels that have no input of their own."""
        return len(self.counts) > len(self.levels)

    @property
    def inputs(self) -> list[str]:
        """Names of the network's inputs."""
        own = [f"{self.name}={level}" for level in self.levels]
        rare = [f"{self.name} is rare", f"frequency of {self.name}"] if self.has_rare else []
        return [*own, *rare, *_missing_input(self)]

    def describe(self) -> str:
        """What it does, in words."""
        rare = f", {len(self.counts) - len(self.levels)} rare levels together with their frequency" if self.has_rare else ""
        levels = f"one input for each of {len(self.levels)} levels{rare}" + _missing_words(self, "no level")
        return levels + (f"; {self.reason}" if self.reason else "")

    def transform(self, series: "pl.Series") -> Part:
        """An input for each level, and two for the rare ones: whether a row has one, and its frequency."""
        import polars as pl

        texts = to_texts(series)
        seen = texts.replace_strict({level: index for index, level in enumerate(self.counts)}, default=None, return_dtype=pl.Int64)
        index = seen.fill_null(-1).to_numpy()
        columns = [index == position for position in range(len(self.levels))]
        if self.has_rare:
            columns += [index >= len(self.levels), self._frequency(index)]
        part = _with_missing(self, seen, columns)
        return part._replace(missing=texts.null_count(), unseen=seen.null_count() - texts.null_count())

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
    writing: TimeWriting = ISO

    @classmethod
    def fit(cls, reading: Reading, training: np.ndarray) -> "Time":
        """Learn mean and deviation in days, and whether the hours of the day matter."""
        days, missing = _days(reading.values.gather(training))
        known = days[~missing]
        hours = bool(np.any(known % 1 != 0))
        own = {"hours": hours, "missing": int(missing.sum()), "writing": reading.writing}
        return cls(name=reading.values.name, **own, **_mean_and_scale(known))  # type: ignore[arg-type]

    @property
    def cycles(self) -> dict[str, float]:
        """Cycles by name, with their lengths in days."""
        return {"year": _DAYS_PER_YEAR, "week": 7.0} | ({"day": 1.0} if self.hours else {})

    @property
    def inputs(self) -> list[str]:
        """Names of the network's inputs."""
        waves = [f"{self.name} {wave} of {cycle}" for cycle in self.cycles for wave in ("cos", "sin")]
        return [self.name, *waves, *_missing_input(self)]

    @property
    def expected(self) -> str:
        """What a cell should hold, in words."""
        return _with_words("a date or time such as 2026-11-22 or 2026-11-22 09:30", self.writing)

    def describe(self) -> str:
        """What it does, in words."""
        place = f"standardised; place within the {', '.join(self.cycles)} as cosine and sine"
        return place + _missing_words(self, "the mean") + _read_words(self.writing)

    def transform(self, series: "pl.Series") -> Part:
        """The column standardised in days, and its place within each cycle as cosine and sine."""
        values, bad = to_times(series, self.writing)
        days, missing = _days(values)
        columns = [_soft_clip((days - self.mean) / self.scale)]
        for length in self.cycles.values():
            angle = 2 * np.pi * days / length
            columns += [np.cos(angle), np.sin(angle)]
        for column in columns:
            column[missing] = 0.0
        return _with_missing(self, values, columns, bad)


TREATMENTS = {treatment.kind: treatment for treatment in (Number, Boolean, Category, Time)}
Treatment = Number | Boolean | Category | Time


def to_record(treatment: Treatment) -> dict:
    """The treatment as plain values for JSON; `from_record` undoes it."""
    return {"kind": treatment.kind, **asdict(treatment)}


def from_record(record: Mapping) -> Treatment:
    """The treatment that `to_record` wrote down."""
    content = dict(record)
    kind = content.pop("kind")
    if "writing" in content:
        content["writing"] = {"number": NumberWriting, "time": TimeWriting}[kind](**content["writing"])
    return TREATMENTS[kind](**content)


def to_numbers(series: "pl.Series", writing: NumberWriting) -> "tuple[pl.Series, np.ndarray]":
    """The values as float64, missing and bad ones null, and the rows (indices) of those that are no numbers, or infinite.

    Raises:
        DataError: a type that holds none.
    """
    import polars as pl

    if series.dtype == pl.String:
        return read_cells(series, writing)
    if not (series.dtype.is_numeric() or series.dtype in (pl.Duration, pl.Boolean, pl.Null)):
        raise DataError(f"column {series.name!r} holds {series.dtype}: expected numbers, as in training.")
    return to_floats(series)


def to_booleans(series: "pl.Series") -> "tuple[pl.Series, np.ndarray]":
    """The values as booleans, from booleans, 0 and 1, or the words true and false in any case, and the rows of others."""
    import polars as pl

    known = known_texts(series) if series.dtype == pl.String else series.is_not_null()
    if series.dtype.is_numeric():
        values = series.cast(pl.Float64).replace_strict({1.0: True, 0.0: False}, default=None, return_dtype=pl.Boolean)
    else:
        words = series.cast(pl.String).str.strip_chars().str.to_lowercase()
        values = words.replace_strict(_TRUE_WORDS, default=None, return_dtype=pl.Boolean)
    return values, (known & values.is_null()).arg_true().to_numpy()


def to_texts(series: "pl.Series") -> "pl.Series":
    """The values as text; whole numbers without a decimal point, so that 3, 3.0 and "3" are one category."""
    import polars as pl

    if series.dtype.is_float():
        known = series.drop_nulls()
        if (known == known.round()).all() and (known.abs() <= LARGEST_EXACT).all():
            series = series.cast(pl.Int64)
    return series.cast(pl.String)


def to_times(series: "pl.Series", writing: TimeWriting) -> "tuple[pl.Series, np.ndarray]":
    """The values as moments without a zone (UTC where they had one), and the rows (indices) of texts that are none.

    Raises:
        DataError: a type that holds none.
    """
    import polars as pl

    if series.dtype in (pl.String, pl.Null):
        return read_cells(series.cast(pl.String), writing)
    if series.dtype not in (pl.Date, pl.Datetime):
        raise DataError(f"column {series.name!r} holds {series.dtype}: expected dates or times, as in training.")
    return to_moments(series), np.zeros(0, int)


def _days(moments: "pl.Series") -> tuple[np.ndarray, np.ndarray]:
    return moments.dt.epoch("us").fill_null(0).to_numpy() / (1e6 * _SECONDS_PER_DAY), moments.is_null().to_numpy()


def _with_words(expected: str, writing: NumberWriting | TimeWriting) -> str:
    words = writing.words()
    return f"{expected} ({words})" if words else expected


def _read_words(writing: NumberWriting | TimeWriting) -> str:
    return _with_words("; read", writing) if writing.words() else ""


def _mean_and_scale(known: np.ndarray) -> dict[str, float]:
    deviation = float(known.std())
    return {"mean": float(known.mean()), "scale": deviation if deviation > 0 else 1.0}


def _soft_clip(standard: np.ndarray) -> np.ndarray:
    return standard / np.hypot(1.0, standard / _CLIP)


def _missing_input(treatment) -> list[str]:
    return [f"{treatment.name} is missing"] if treatment.missing else []


def _missing_words(treatment, filled_with: str) -> str:
    return f"; {treatment.missing} missing: {filled_with} and an input that says so" if treatment.missing else ""


def _with_missing(treatment, values: "pl.Series", columns: list[np.ndarray], bad: np.ndarray | None = None) -> Part:
    missing = values.is_null().to_numpy()
    if treatment.missing:
        columns = [*columns, missing]
    inputs = np.stack(columns, axis=1, dtype=np.float32, casting="unsafe") if columns else np.zeros((len(values), 0), np.float32)
    return Part(values=inputs, missing=int(missing.sum()), unseen=0, bad=np.zeros(0, int) if bad is None else bad)
