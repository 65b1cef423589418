"""What the values of each column are: numbers, times, booleans or texts, and how they are written."""

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from parafit.errors import DataError
from parafit.tables.numbers import PLAIN, NumberWriting, find_number_writing, parse_numbers
from parafit.tables.rows import Rows, some_of
from parafit.tables.text import says_missing
from parafit.tables.times import ISO, TimeWriting, find_time_writing, parse_times

if TYPE_CHECKING:
    import polars as pl

MOST_BAD = 0.1
"""A column stays numbers or times with at most this share of cells that are neither; they count as missing."""
MANY_LEVELS = 32
"""A category column has one input for each of at most this many levels."""
LARGEST_EXACT = 2**53
"""Whole numbers beyond are not all float64."""

_BOOLEANS = ("true", "false")
_FEW_CODES = 0.01
_CODE = r"^0\d|^(?:\d ?){16,}$|^\+(?:\d ?){7}"  # leading zeros, more digits than a float64 holds, telephone numbers
_EXPONENT_CODE = r"^\d+[eE]\d+$"  # 12E4 and 120E3 are two codes
_COMPACT_DATE = r"^(?:19|20)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])$"
_IDENTIFIER = re.compile(r"(?i:(^|[\W_])(id|uuid|guid|index|row|rownum|rownames|code|zip|zipcode|postcode)$|^unnamed)|[a-z](Id|ID|Code)$")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a column's values are.

    Args:
        kind: "number", "time", "boolean", "text", or "other" for what is not used.
        values: float64, moments, booleans or texts; null where missing or bad.
        writing: how numbers or times are written.
        bad: the rows (indices) of cells that are not of this kind.
        reason: why these texts are no numbers though they look so; empty if they do not.
        is_open: whether the writing was decided by what is usual, not by the column.
    """

    kind: str
    values: "pl.Series"
    writing: NumberWriting | TimeWriting | None = None
    bad: np.ndarray
    reason: str = ""
    is_open: bool = False


def recognise(frame: "pl.DataFrame", rows: Rows) -> dict[str, Reading]:
    """What each column's values are. Where a column leaves its decimal sign or the order of its dates open, the others decide.

    Args:
        frame: the table.
        rows: names its rows in messages.

    Raises:
        DataError: numbers or times among which too many cells are words.
    """
    import polars as pl

    readings = {series.name: recognise_column(series, rows) for series in frame.iter_columns()}
    comma, day_first = _customs([reading for name, reading in readings.items() if frame.schema[name] == pl.String])
    for name, reading in readings.items():
        if reading.is_open and (comma if reading.kind == "number" else day_first) is not None:
            readings[name] = recognise_column(frame.get_column(name), rows, comma=comma, day_first=day_first)
    return readings


def recognise_column(series: "pl.Series", rows: Rows, *, comma: bool | None = None, day_first: bool | None = None) -> Reading:
    """What a column's values are.

    Args:
        series: of a frame that `read_table` gave.
        rows: where its rows stand.
        comma: whether the table's numbers have a decimal comma; None if no column tells.
        day_first: whether the day comes first in the table's dates; None if no column tells.

    Raises:
        DataError: numbers or times among which too many cells are words.

    >>> import polars as pl
    >>> recognise_column(pl.Series("price", ["1,5 EUR", "2,25 EUR"]), Rows()).values.to_list()
    [1.5, 2.25]
    """
    import polars as pl

    none = np.zeros(0, int)
    if series.dtype == pl.String:
        return _recognise_text(series, rows, comma, day_first)
    if series.dtype == pl.Boolean:
        return Reading(kind="boolean", values=series, bad=none)
    if series.dtype in (pl.Date, pl.Datetime):
        return Reading(kind="time", values=to_moments(series), writing=ISO, bad=none)
    if not (series.dtype.is_numeric() or series.dtype in (pl.Duration, pl.Null)):
        return Reading(kind="other", values=series, bad=none)
    reason = _reason_codes_by_type(series)
    if reason:
        return Reading(kind="text", values=series.cast(pl.String), bad=none, reason=reason)
    values, bad = to_floats(series)
    return Reading(kind="number", values=values, writing=PLAIN, bad=bad)


def as_numbers(series: "pl.Series") -> Reading:
    """Texts as numbers, codes too."""
    known = known_texts(series)
    return _try(series, known, "number", *find_number_writing(series.filter(known).str.strip_chars()))


def is_identifier(series: "pl.Series") -> bool:
    """Whether a column is named as identifiers are, and all its numbers are whole."""
    if not _IDENTIFIER.search(series.name):
        return False
    known = series.drop_nulls()
    return not series.dtype.is_float() or bool((known == known.round()).all())


def known_texts(series: "pl.Series") -> "pl.Series":
    """Which texts say something, if they are not texts but numbers, times or booleans."""
    import polars as pl

    numbers = series.cast(pl.Float64, strict=False)
    if numbers.null_count() == series.null_count() and not numbers.is_nan().any():  # the usual column, in a quarter of the time
        return series.is_not_null()
    return series.is_not_null() & ~says_missing(series.str.strip_chars()).fill_null(True)


def read_cells(series: "pl.Series", writing: NumberWriting | TimeWriting) -> "tuple[pl.Series, np.ndarray]":
    """Texts as numbers or times, null where they are missing or bad, and the rows (indices) of the bad ones.

    Args:
        series: a column of texts.
        writing: how its numbers or times are written.
    """
    known = known_texts(series)
    texts = series if known.sum() == len(series) - series.null_count() else series.set(~known, None)
    values = _parse(texts, writing)
    if isinstance(writing, NumberWriting):
        values = values.set(texts.str.contains(_CODE).fill_null(False), None)
    return values, (known & values.is_null()).arg_true().to_numpy()


def to_floats(series: "pl.Series") -> "tuple[pl.Series, np.ndarray]":
    """Numbers and durations (seconds) as float64, NaN as null, and the rows (indices) of infinite ones, null too."""
    import polars as pl

    if series.dtype == pl.Duration:
        series = series.dt.total_microseconds() / 1e6
    return _finite(series.cast(pl.Float64).fill_nan(None))


def to_moments(series: "pl.Series") -> "pl.Series":
    """Dates and times as moments without a zone (UTC where they had one)."""
    import polars as pl

    if series.dtype == pl.Datetime and series.dtype.time_zone:  # type: ignore[attr-defined]
        series = series.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
    return series.cast(pl.Datetime("us"))


def _finite(values: "pl.Series") -> "tuple[pl.Series, np.ndarray]":
    infinite = values.is_infinite().fill_null(False)
    return values.set(infinite, None), infinite.arg_true().to_numpy()


def _reason_codes_by_type(series: "pl.Series") -> str:
    import polars as pl

    if series.dtype.is_integer():
        largest = max((abs(int(value)) for value in (series.min(), series.max()) if value is not None), default=0)  # type: ignore[arg-type]
        if largest > LARGEST_EXACT:
            return f"codes: a whole number of {len(str(largest))} digits, more than computing keeps"
    elif series.dtype.is_decimal():
        return _reason_codes_by_type(series.cast(pl.Int128)) if series.dtype.scale == 0 else ""  # type: ignore[attr-defined]
    return ""


def _recognise_text(series: "pl.Series", rows: Rows, comma: bool | None, day_first: bool | None) -> Reading:
    known = known_texts(series)
    texts = series.filter(known).str.strip_chars()
    as_text = Reading(kind="text", values=series, bad=np.zeros(0, int))
    if not len(texts):
        return as_text
    if texts.head(1).str.to_lowercase().is_in(_BOOLEANS).all() and texts.str.to_lowercase().is_in(_BOOLEANS).all():
        return replace(as_text, kind="boolean", values=series.set(~known, None).str.strip_chars().str.to_lowercase() == "true")
    best = _best_reading(series, known, texts, comma, day_first)
    if len(best.bad) > MOST_BAD * len(texts):
        _check_no_mixture(best, series, len(texts), rows)
        return as_text
    return best if best.kind == "time" else _without_codes(series, texts, best, as_text)


def _best_reading(series: "pl.Series", known: "pl.Series", texts: "pl.Series", comma: bool | None, day_first: bool | None) -> Reading:
    number = _try(series, known, "number", *find_number_writing(texts, comma))
    if not len(number.bad) and not texts.str.contains(_COMPACT_DATE).all():
        return number
    time = _try(series, known, "time", *find_time_writing(texts, day_first))
    return min(time, number, key=lambda reading: len(reading.bad))


def _try(series: "pl.Series", known: "pl.Series", kind: str, writing, is_open: bool) -> Reading:
    values = _parse(series.set(~known, None), writing)
    return Reading(kind=kind, values=values, writing=writing, bad=(known & values.is_null()).arg_true().to_numpy(), is_open=is_open)


def _parse(texts: "pl.Series", writing: NumberWriting | TimeWriting) -> "pl.Series":
    if isinstance(writing, NumberWriting):
        return _finite(parse_numbers(texts, writing).fill_nan(None))[0]
    return parse_times(texts, writing)


def _without_codes(series: "pl.Series", texts: "pl.Series", reading: Reading, as_text: Reading) -> Reading:
    """Text where reading codes as numbers would lose what tells them apart; a few among fractions or signs are bad cells."""
    if texts.head(1).str.contains(_EXPONENT_CODE).all() and texts.str.contains(_EXPONENT_CODE).all():
        return replace(as_text, reason=f"codes such as {texts[0]!r}")
    codes = texts.filter(texts.str.contains(_CODE))
    if not len(codes):
        return reading
    if len(codes) > _FEW_CODES * len(texts) or not texts.str.contains(r"^[+-]|[.,]").any():
        return replace(as_text, reason=f"codes such as {codes[0]!r}")
    values, bad = read_cells(series, reading.writing or PLAIN)
    return replace(reading, values=values, bad=bad)


def _check_no_mixture(reading: Reading, series: "pl.Series", known: int, rows: Rows) -> None:
    """Refuse a column of many different numbers or times in which a good part are words; few levels or codes with letters are text."""
    words = series[reading.bad]
    if len(reading.bad) > known / 2 or words.str.contains(r"\d").mean() > 0.5 or reading.values.n_unique() <= MANY_LEVELS:  # type: ignore[operator]
        return
    raise DataError(
        f"column {series.name!r} holds {reading.kind}s, but {len(reading.bad):,} of {known:,} cells are none: "
        f"{some_of(rows.cells(series, reading.bad), len(reading.bad))}. Mend these cells, leave them empty, or take the column out."
    )


def _customs(readings: list[Reading]) -> tuple[bool | None, bool | None]:
    """Whether numbers have a decimal comma and whether dates begin with the day, where columns tell and agree."""
    told = [reading for reading in readings if not reading.is_open]
    numbers = [reading.writing for reading in told if isinstance(reading.writing, NumberWriting) and _has_fractions(reading)]
    orders = [reading.writing.order for reading in told if isinstance(reading.writing, TimeWriting)]
    commas = {writing.decimal == "," for writing in numbers}
    days = {order == "day.month.year" for order in orders if order in ("day.month.year", "month/day/year")}
    return commas.pop() if len(commas) == 1 else None, days.pop() if len(days) == 1 else None


def _has_fractions(reading: Reading) -> bool:
    return bool((reading.values != reading.values.round()).any())
