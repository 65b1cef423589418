"""Numbers as people write them. How a column's numbers are written is found once, from all its texts, and holds ever after."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import polars as pl

_CURRENCY_CODES = r"AUD|BRL|CAD|CHF|CNY|CZK|DKK|EUR|GBP|HKD|HUF|ILS|INR|JPY|KRW|MXN|NOK|NZD|PLN|RON|RUB|SEK|SGD|THB|TRY|TWD|USD|ZAR"
_CURRENCY = rf"(?:{_CURRENCY_CODES}|[A-Z]{{0,3}}[$€£¥₹₽₩₺]|kr\.?|Rs\.?|Fr\.?|zł|Kč|Ft)"  # alone may stand before a number: ID7 is a code
_AFTER = r"[^\d\s.,'()+\-−/:;=<>][^()\d]{0,20}|[\p{L}/]{0,10}(?:m|ft|in|yd|mi)\^?[23](?:/\p{L}{1,10})?"  # kg, % of GDP, kg/m3
_BODY = r"\d(?:[\d.,' ]*\d)?[.,]?|[.,]\d+"
_EXPONENT = r"(?:[eE][+-]?\d{1,3})?"
_NUMBER = rf"^\(?\s?[+-]?\s?({_CURRENCY})?\s?[+-]?({_BODY}){_EXPONENT}\s?({_AFTER})?\s?\)?$"
_ROWS_TO_JUDGE = 2000
_ROWS_TO_TELL = 3

_GROUPED = r"^[1-9]\d{{0,2}}(?:{0}\d{{2,3}})*{0}\d{{3}}(?:[.,]\d*)?$"
_VOTES = {
    ",": r"\..*,|^(0|\d{4,})?,\d|^\d+,(\d{0,2}|\d{4,})$|^\d{1,3}(\.\d{3}){2,}$|^\d{1,3}([ ']\d{3})+,\d*$",
    ".": r",.*\.|^(0|\d{4,})?\.\d|^\d+\.(\d{0,2}|\d{4,})$|^\d{1,3}(,\d{2,3})+,\d{3}$|^\d{1,3}([ ']\d{3})+\.\d*$",
}
"""Bodies that can only be read with this decimal sign."""


@dataclass(frozen=True, kw_only=True)
class NumberWriting:
    """How the numbers of a column are written.

    Args:
        decimal: the decimal sign, "." or ",".
        grouping: what stands between groups of digits: "", ",", ".", " " or "'".
        unit: what stands before or after each number, such as "$", "%" or "m2"; "" if nothing does.
        parentheses: whether (12) means -12.
    """

    decimal: str = "."
    grouping: str = ""
    unit: str = ""
    parentheses: bool = False

    def words(self) -> str:
        """What is not plain about it, in words; empty if nothing is.

        >>> NumberWriting(decimal=",", grouping=".", unit="EUR").words()
        "decimal comma, groups of digits parted by '.', unit 'EUR'"
        """
        parts = [
            "decimal comma" if self.decimal == "," else "",
            f"groups of digits parted by {self.grouping!r}" if self.grouping else "",
            f"unit {self.unit!r}" if self.unit else "",
            "parentheses for negative" if self.parentheses else "",
        ]
        return ", ".join(filter(None, parts))


PLAIN = NumberWriting()


def find_number_writing(texts: "pl.Series", comma: bool | None = None) -> tuple[NumberWriting, bool]:
    """How most of the texts are written, if they are numbers, and whether they leave the decimal sign open.

    Args:
        texts: the column's values, none of them missing.
        comma: whether columns that leave it open have a decimal comma; if None, one sign before three digits is a decimal
            point or a comma between thousands.

    >>> import polars as pl
    >>> find_number_writing(pl.Series(["1.234,5 m2", "12 m2"]))
    (NumberWriting(decimal=',', grouping='.', unit='m2', parentheses=False), False)
    """
    import polars as pl

    is_plain = not texts.cast(pl.Float64, strict=False).has_nulls()
    if is_plain and _some(texts).str.contains(r"^[+-]?0?\.|\.\d{0,2}$|\.\d{4}").any():
        return PLAIN, False
    unit = "" if is_plain else _find_unit(texts)
    if unit is None:
        return PLAIN, False
    cells = texts if is_plain else _normalise(texts)
    bodies = _without(cells, unit).str.replace(r"[eE][+-]?\d{1,3}$", "")
    decimal, is_open = _decimal(bodies, unit, comma)
    if is_plain and decimal == ".":
        return PLAIN, is_open
    parentheses = not is_plain and bool(cells.str.contains(r"^\(.*\d.*\)$").any())
    return NumberWriting(decimal=decimal, grouping=_grouping(bodies, decimal), unit=unit, parentheses=parentheses), is_open


def parse_numbers(texts: "pl.Series", writing: NumberWriting) -> "pl.Series":
    """The texts as float64, null where a text is no number or written otherwise.

    Args:
        texts: a column of texts.
        writing: how its numbers are written.

    >>> import polars as pl
    >>> parse_numbers(pl.Series(["$1,200", "($5)", "1,20"]), NumberWriting(grouping=",", unit="$", parentheses=True)).to_list()
    [1200.0, -5.0, None]
    """
    import polars as pl

    if writing == PLAIN:
        plain = texts.cast(pl.Float64, strict=False)
        return plain if plain.null_count() == texts.null_count() else _normalise(texts).cast(pl.Float64, strict=False)
    cells = _normalise(texts)
    bodies = _without(cells, writing.unit)
    if writing.grouping:
        bodies = bodies.str.replace_all(writing.grouping, "", literal=True)
    numbers = bodies.str.replace(writing.decimal, ".", literal=True).cast(pl.Float64, strict=False)
    negative = cells.str.contains(r"^\(|^[^\d.,]*-")
    return pl.select(pl.when(cells.str.contains(_pattern(writing))).then(pl.when(negative).then(-numbers).otherwise(numbers))).to_series()


def _normalise(texts: "pl.Series") -> "pl.Series":
    """Without blanks around, and with one kind of blank, minus sign and apostrophe."""
    plain = texts.str.strip_chars()
    if not plain.str.contains(r"[^\x00-\x7f]").any():
        return plain
    plain = plain.str.replace_all(r"[\u00a0\u2007\u2009\u202f]", " ").str.replace_all("[’‘´]", "'")
    return plain.str.replace_all("[−‒–]", "-")


def _find_unit(texts: "pl.Series") -> str | None:
    """The unit of most of the numbers, "" for none, judged by rows spread over the column; None if there are no numbers."""
    cells = _normalise(_some(texts))
    parts = cells.str.extract_groups(_NUMBER).struct.unnest().drop_nulls("2")
    if not parts.height:
        return None
    units = parts.get_column("1").fill_null("") + parts.get_column("3").fill_null("").str.strip_chars()
    return units.str.replace(r"^(\p{L}{3,})s$", "$1").value_counts(sort=True)[units.name][0]


def _some(texts: "pl.Series") -> "pl.Series":
    return texts.gather_every(-(-len(texts) // _ROWS_TO_JUDGE))


def _without(cells: "pl.Series", unit: str) -> "pl.Series":
    """The digits and what stands between them, without unit, sign and parentheses."""
    if unit:
        cells = cells.str.replace(_unit_pattern(unit), "")
    return cells.str.strip_chars("()+- ")


def _pattern(writing: NumberWriting) -> str:
    point, group = re.escape(writing.decimal), re.escape(writing.grouping)
    whole = rf"(?:[1-9]\d{{0,2}}(?:{group}\d{{2,3}})*{group}\d{{3}}|\d+)" if group else r"\d+"
    body = rf"(?:{whole}(?:{point}\d*)?|{point}\d+){_EXPONENT}"
    unit = _unit_pattern(writing.unit)
    signed = rf"[+-]?\s?{body}"
    if unit:
        signed = rf"(?:{signed}\s?{unit}|[+-]?\s?{unit}\s?{body}|{unit}\s?{signed})"
        body = rf"(?:{body}\s?{unit}|{unit}\s?{body})"
    return rf"^(?:{signed}|\(\s?{body}\s?\))$" if writing.parentheses else rf"^{signed}$"


def _unit_pattern(unit: str) -> str:
    """The unit as it is found: days are 1 day too."""
    return re.escape(unit) + ("s?" if re.fullmatch(r"[^\W\d_]{3,}", unit) else "")


def _decimal(bodies: "pl.Series", unit: str, comma: bool | None) -> tuple[str, bool]:
    """The decimal sign, and whether the bodies leave it open."""
    comma_votes, point_votes = (int(bodies.str.contains(_VOTES[sign]).sum()) for sign in ",.")
    if comma_votes != point_votes:
        return ("," if comma_votes > point_votes else "."), False
    commas, points = (int(bodies.str.contains(rf"^[1-9]\d{{0,2}}{sign}\d{{3}}$").sum()) for sign in (",", r"\."))
    if comma_votes or not commas + points:
        return ".", False
    if re.fullmatch(_CURRENCY, unit):  # nobody writes a thousandth of a cent
        return ("," if points > commas else "."), False
    some_without = points >= _ROWS_TO_TELL and bodies.str.contains(r"^\d{1,3}$").any()  # 999 and 1.000: decimals would not end there
    return ("," if comma or (comma is None and some_without) else "."), True


def _grouping(bodies: "pl.Series", decimal: str) -> str:
    """What parts groups of digits in most of the numbers that are long enough to need it."""
    counts = {sign: int(bodies.str.contains(_GROUPED.format(re.escape(sign))).sum()) for sign in (",", ".", " ", "'") if sign != decimal}
    sign = max(counts, key=counts.__getitem__)
    return sign if counts[sign] >= max(1, bodies.str.contains(r"^\d{5,}(?:[.,]|$)").sum()) else ""
