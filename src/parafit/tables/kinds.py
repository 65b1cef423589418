"""What the values of each column are: numbers, times, booleans or texts, and how they are written."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from parafit.errors import DataError
from parafit.tables.numbers import PLAIN, NumberWriting, find_number_writing, parse_numbers
from parafit.tables.rows import Rows
from parafit.tables.text import says_missing
from parafit.tables.times import ISO, TimeWriting, find_time_writing, parse_times

if TYPE_CHECKING:
    import polars as pl

MOST_BAD = 0.1
"""A column stays numbers or times with at most this share of cells that are neither; they count as missing."""
MANY_LEVELS = 32
"""A category column has one input for each of at most this many levels."""

_BOOLEANS = ("true", "false")
_LARGEST_EXACT = 2**53
_FEW_CODES = 0.01
_CODE = r"^0\d|^(?:\d ?){16,}$|^\+(?:\d ?){7}"  # leading zeros, more digits than a float64 holds, telephone numbers
_EXPONENT_CODE = r"^\d+[eE]\d+$"  # 12E4 and 120E3 are two codes
_COMPACT_DATE = r"^(?:19|20)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])$"
_IDENTIFIER = re.compile(
    r"(?i:(^|[\W_])(id|uuid|guid|index|row|rownum|rownames|code|zip|zipcode|postcode)$|^unnamed)|[a-z](Id|ID|Code)$"
)


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

    Raises:
        DataError: numbers or times among which too many cells are words.
    """
    readings = {series.name: recognise_column(series, rows) for series in frame.iter_columns()}
    comma, day_first = _customs(readings)
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
    return Reading(kind="number", values=to_floats(series), writing=PLAIN, bad=none)


def is_identifier(series: "pl.Series") -> bool:
    """Whether a column is named as identifiers are, and all its numbers are whole."""
    if not _IDENTIFIER.search(series.name):
        return False
    known = series.drop_nulls()
    return not series.dtype.is_float() or bool((known == known.round()).all())


def known_texts(series: "pl.Series") -> "pl.Series":
    """Which texts say something, if they are not texts but numbers, times or booleans."""
    return series.is_not_null() & ~says_missing(series.str.strip_chars()).fill_null(True)


def to_floats(series: "pl.Series") -> "pl.Series":
    """Numbers and durations (seconds) as float64, NaN as null."""
    import polars as pl

    if series.dtype == pl.Duration:
        series = series.dt.total_microseconds() / 1e6
    return series.cast(pl.Float64).fill_nan(None)


def to_moments(series: "pl.Series") -> "pl.Series":
    """Dates and times as moments without a zone (UTC where they had one)."""
    import polars as pl

    if series.dtype == pl.Datetime and series.dtype.time_zone:  # type: ignore[attr-defined]
        series = series.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
    return series.cast(pl.Datetime("us"))


def _reason_codes_by_type(series: "pl.Series") -> str:
    import polars as pl

    if series.dtype.is_integer():
        largest = max((abs(int(value)) for value in (series.min(), series.max()) if value is not None), default=0)  # type: ignore[arg-type]
        if largest > _LARGEST_EXACT:
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
    if best.kind == "time":
        return best
    reason = _reason_codes(texts)
    return replace(as_text, reason=reason) if reason else _without_codes(series, best)


def _best_reading(series: "pl.Series", known: "pl.Series", texts: "pl.Series", comma: bool | None, day_first: bool | None) -> Reading:
    number = _try(series, known, "number", *find_number_writing(texts, comma))
    if not len(number.bad) and not texts.str.contains(_COMPACT_DATE).all():
        return number
    time = _try(series, known, "time", *find_time_writing(texts, day_first))
    return min(time, number, key=lambda reading: len(reading.bad))


def _try(series: "pl.Series", known: "pl.Series", kind: str, writing, is_open: bool) -> Reading:
    values = parse(series.set(~known, None), writing)
    return Reading(kind=kind, values=values, writing=writing, bad=(known & values.is_null()).arg_true().to_numpy(), is_open=is_open)


def parse(series: "pl.Series", writing: NumberWriting | TimeWriting) -> "pl.Series":
    """Texts as numbers or times, null where they are none."""
    return parse_numbers(series, writing) if isinstance(writing, NumberWriting) else parse_times(series, writing)


def _reason_codes(texts: "pl.Series") -> str:
    """Why texts that can be read as numbers are codes: what is lost if they are read so."""
    if texts.str.contains(_EXPONENT_CODE).all():
        return f"codes such as {texts[0]!r}"
    codes = texts.filter(texts.str.contains(_CODE))
    if not len(codes) or (len(codes) <= _FEW_CODES * len(texts) and texts.str.contains(r"^[+-]|[.,]").any()):
        return ""
    return f"codes such as {codes[0]!r}"


def _without_codes(series: "pl.Series", reading: Reading) -> Reading:
    """A few cells that look like codes among numbers with fractions or signs are bad."""
    codes = series.str.strip_chars().str.contains(_CODE).fill_null(False) & reading.values.is_not_null()
    if not codes.any():
        return reading
    bad = np.union1d(reading.bad, codes.arg_true().to_numpy())
    return replace(reading, values=reading.values.set(codes, None), bad=bad)


def _check_no_mixture(reading: Reading, series: "pl.Series", known: int, rows: Rows) -> None:
    """Refuse a column of many different numbers or times in which a good part are words; few levels or codes with letters are text."""
    words = series[reading.bad]
    if len(reading.bad) > known / 2 or words.str.contains(r"\d").mean() > 0.5 or reading.values.n_unique() <= MANY_LEVELS:  # type: ignore[operator]
        return
    raise DataError(
        f"column {series.name!r} holds {reading.kind}s, but {len(reading.bad):,} of {known:,} cells are none: "
        f"{rows.list_cells(series, reading.bad)}. Mend these cells, leave them empty, or take the column out."
    )


def _customs(readings: Mapping[str, Reading]) -> tuple[bool | None, bool | None]:
    """Whether numbers have a decimal comma and whether dates begin with the day, where columns tell and agree."""
    commas = {
        reading.writing.decimal == ","
        for reading in readings.values()
        if isinstance(reading.writing, NumberWriting) and not reading.is_open and _has_fractions(reading)
    }
    orders = {reading.writing.order for reading in readings.values() if isinstance(reading.writing, TimeWriting) and not reading.is_open}
    days = {order == "day.month.year" for order in orders if order in ("day.month.year", "month/day/year")}
    return next(iter(commas)) if len(commas) == 1 else None, next(iter(days)) if len(days) == 1 else None


def _has_fractions(reading: Reading) -> bool:
    return bool((reading.values != reading.values.round()).any())
