"""Dates and times as people write them. The order of day, month and year is found once, from all texts of a column."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import polars as pl

_DAY, _MONTH, _YEAR, _SHORT_YEAR, _PART = r"(\d{1,2})", r"(\d{1,2})", r"(\d{4})", r"(\d{2})", r"[./-]"
_NAME = r"(\p{L}{3,9})\.?"
_END = r"($|[T ,].*$)"
_ORDERS = {
    "year-month-day": (
        (rf"^{_YEAR}{_PART}{_MONTH}{_PART}{_DAY}{_END}", "$1-$2-$3$4"),
        (rf"^{_YEAR}-{_MONTH}$", "$1-$2-01"),
        (r"^((?:19|20)\d{2})(\d{2})(\d{2})($|T.*$)", "$1-$2-$3$4"),
    ),
    "day.month.year": (
        (rf"^{_DAY}{_PART}{_MONTH}{_PART}{_YEAR}{_END}", "$3-$2-$1$4"),
        (rf"^{_DAY}{_PART}{_MONTH}{_PART}{_SHORT_YEAR}{_END}", "'$3-$2-$1$4"),
    ),
    "month/day/year": (
        (rf"^{_MONTH}{_PART}{_DAY}{_PART}{_YEAR}{_END}", "$3-$1-$2$4"),
        (rf"^{_MONTH}{_PART}{_DAY}{_PART}{_SHORT_YEAR}{_END}", "'$3-$1-$2$4"),
    ),
    "day month's name year": (
        (rf"^{_DAY}\.?[ -]{_NAME}[ -]{_YEAR}{_END}", "$3-$2-$1$4"),
        (rf"^{_DAY}\.?[ -]{_NAME}[ -]{_SHORT_YEAR}{_END}", "'$3-$2-$1$4"),
        (rf"^(?:\p{{L}}{{3,9}},? )?{_NAME} {_DAY}(?:st|nd|rd|th)?,? {_YEAR}{_END}", "$3-$1-$2$4"),
    ),
}
"""How each order of a date's parts becomes year-month-day; a short year is marked by an apostrophe."""

_CLOCKS = ("", " %H:%M:%S%.f", " %H:%M", " %I:%M:%S %p", " %I:%M %p", " %H:%M:%S%.f%#z", " %H:%M%#z")
_ROWS_TO_JUDGE = 200
_FIRST_YEAR = 1000


@dataclass(frozen=True, kw_only=True)
class TimeWriting:
    """How the dates of a column are written.

    Args:
        order: the order of a date's parts.
    """

    order: str = "year-month-day"

    def words(self) -> str:
        """The order in words; empty for year-month-day."""
        return "" if self == ISO else f"dates as {self.order}"


ISO = TimeWriting()


def find_time_writing(texts: "pl.Series", day_first: bool | None = None) -> tuple[TimeWriting, bool]:
    """How most of the texts are written, if they are dates, and whether they leave the order of day and month open.

    Args:
        texts: the column's values, none of them missing.
        day_first: whether the day comes first where a column leaves it open; if None, it does unless slashes part them.

    >>> import polars as pl
    >>> find_time_writing(pl.Series(["03/04/2024", "03/25/2024"]))
    (TimeWriting(order='month/day/year'), False)
    """
    sample = texts.gather_every(-(-len(texts) // _ROWS_TO_JUDGE))
    sampled = {order: len(sample) - parse_times(sample, TimeWriting(order=order)).null_count() for order in _ORDERS}
    best = max(sampled, key=sampled.__getitem__)
    day, month = "day.month.year", "month/day/year"
    if not sampled[best] or best not in (day, month):
        return TimeWriting(order=best), False
    days, months = (len(texts) - parse_times(texts, TimeWriting(order=order)).null_count() for order in (day, month))
    if days != months:
        return TimeWriting(order=day if days > months else month), False
    has_slashes = bool(texts.str.contains("/", literal=True).any())
    return TimeWriting(order=day if day_first or (day_first is None and not has_slashes) else month), has_slashes


def parse_times(texts: "pl.Series", writing: TimeWriting) -> "pl.Series":
    """The texts as moments without a zone (UTC where they had one), null where a text is none or written otherwise.

    Dates as ISO 8601 writes them can be taken for nothing else, and are read in every column.

    Args:
        texts: a column of texts.
        writing: how its times are written.

    >>> import polars as pl
    >>> parse_times(pl.Series(["1.2.2024 9:30", "2024-02-01", "2/13/2024"]), TimeWriting(order="day.month.year")).to_list()
    [datetime.datetime(2024, 2, 1, 9, 30), datetime.datetime(2024, 2, 1, 0, 0), None]
    """
    import polars as pl

    dates = texts.to_frame("text").select(_to_iso(writing.order)).to_series()
    moments = pl.repeat(None, len(texts), dtype=pl.Datetime("us"), eager=True)
    for form in _formats(writing.order):
        left = (moments.is_null() & dates.is_not_null()).arg_true()
        if not len(left):
            break
        moments = moments.scatter(left, _read(dates.gather(left), form))
    return moments.alias(texts.name)


def _to_iso(order: str) -> "pl.Expr":
    """Year, month and day parted by hyphens, one blank, the clock, the zone."""
    import polars as pl

    text = pl.col("text").str.strip_chars()
    for pattern, replacement in _ORDERS[order]:
        text = text.str.replace(pattern, replacement)
    text = text.str.replace(r"^(\S{6,})(?:T|,?\s+)(\d{1,2}:)", "$1 $2").str.replace(r"(:\d\d),(\d)", "$1.$2")
    return text.str.replace(r"\s*(?:Z|UTC|GMT)$", "+00:00").str.replace(r"\s+([+-]\d\d)", "$1")


def _formats(order: str) -> list[str]:
    orders = ("%Y-%m-%d", "%Y-%B-%d", "'%y-%B-%d") if "name" in order else ("%Y-%m-%d", "'%y-%m-%d")
    return [date + clock for date in orders for clock in _CLOCKS]


def _read(dates: "pl.Series", form: str) -> "pl.Series":
    zone = "UTC" if form.endswith("z") else None
    moments = dates.str.to_datetime(form, strict=False, time_unit="us", time_zone=zone).dt.replace_time_zone(None)
    return moments.set(moments.dt.year() < _FIRST_YEAR, None)
