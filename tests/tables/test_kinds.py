"""What the values of a column are: numbers and dates as people write them, codes, and cells that are neither."""

from datetime import datetime

import polars as pl
import pytest

from parafit.errors import DataError
from parafit.tables.kinds import recognise, recognise_column
from parafit.tables.numbers import NumberWriting, parse_numbers
from parafit.tables.rows import Rows
from parafit.tables.target import judge_target
from parafit.tables.times import TimeWriting, parse_times


def column(values):
    return recognise_column(pl.Series("x", values), Rows())


WRITTEN = {
    "plain": (["1.5", "-2", "+3", "1e3", ".5", "2."], "", [1.5, -2, 3, 1000, 0.5, 2]),
    "decimal comma": (["1,5", "-2", "0,25"], "decimal comma", [1.5, -2, 0.25]),
    "three decimals after a comma": (["0,125", "1,125"], "decimal comma", [0.125, 1.125]),
    "exponents after a comma": (["1,5E+03", "2,25e-1"], "decimal comma", [1500, 0.225]),
    "commas between thousands": (["1,234", "999", "12,345"], "groups of digits parted by ','", [1234, 999, 12345]),
    "both, English": (["1,234.5", "2"], "groups of digits parted by ','", [1234.5, 2]),
    "both, German": (["1.234,5", "2"], "decimal comma, groups of digits parted by '.'", [1234.5, 2]),
    "millions, German": (["1.234.567", "12"], "decimal comma, groups of digits parted by '.'", [1234567, 12]),
    "points between thousands": (
        ["1.234", "2.500", "12.000", "999"],
        "decimal comma, groups of digits parted by '.'",
        [1234, 2500, 12000, 999],
    ),
    "three decimals after a point": (["1.234", "2.500", "12.000"], "", [1.234, 2.5, 12]),
    "blanks": (["1 234", "1 234 567"], "groups of digits parted by ' '", [1234, 1234567]),
    "blanks, French": (["1\u202f234,5", "1\u00a0000"], "decimal comma, groups of digits parted by ' '", [1234.5, 1000]),
    "apostrophes, Swiss": (["1'234.50", "1’000"], 'groups of digits parted by "\'"', [1234.5, 1000]),
    "lakhs": (["1,23,456", "12,34,567.5"], "groups of digits parted by ','", [123456, 1234567.5]),
    "dollars": (["$1,200", "-$5.50", "$-3", "$ 7"], "groups of digits parted by ',', unit '$'", [1200, -5.5, -3, 7]),
    "euros after": (["1.200 EUR", "5 EUR"], "decimal comma, groups of digits parted by '.', unit 'EUR'", [1200, 5]),
    "euros on both sides": (["€ 1.234,50", "5 €"], "decimal comma, groups of digits parted by '.', unit '€'", [1234.5, 5]),
    "reais": (["R$ 5,50", "R$ 1.000,00"], "decimal comma, groups of digits parted by '.', unit 'R$'", [5.5, 1000]),
    "per cent": (["12 %", "7.5%", "-1 %"], "unit '%'", [12, 7.5, -1]),
    "square metres": (["114.4 m2", "60 m2"], "unit 'm2'", [114.4, 60]),
    "speeds": (["50 km/h", "7,5 km/h"], "decimal comma, unit 'km/h'", [50, 7.5]),
    "densities": (["1.5 kg/m3", "2 kg/m3"], "unit 'kg/m3'", [1.5, 2]),
    "degrees": (["20 °C", "−5 °C"], "unit '°C'", [20, -5]),
    "one year": (["1 year", "12 years"], "unit 'year'", [1, 12]),
    "accounting": (["(12)", "5", "(1,234.50)"], "groups of digits parted by ',', parentheses for negative", [-12, 5, -1234.5]),
    "accounting in dollars": (["($5)", "$7"], "unit '$', parentheses for negative", [-5, 7]),
    "minus signs": (["−5", "–6.5", "7"], "", [-5, -6.5, 7]),
    "zeros": (["0", "0.5", "-0.5"], "", [0, 0.5, -0.5]),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_numbers_as_people_write_them(name):
    texts, words, values = WRITTEN[name]
    for given in (texts, [f" {text} " for text in texts], [*texts, None, "n/a"]):
        read = column(given)
        assert read.kind == "number"
        assert read.writing.words() == words
        assert read.values.drop_nulls().to_list() == values
        assert not len(read.bad)


TEXTS = [
    ["ID1", "ID2"],
    ["1A", "2B", "3C"],
    ["192.168.0.1", "10.0.0.1"],
    ["1.2.3", "1.10.0"],
    ["5 kg", "3 m"],
    ["5x3", "7x3"],
    ["12-15", "15-20"],
    ["<5", "<10"],
    ["1/2", "3/4"],
    ["10:30", "11:45"],
    ["a", "b"],
]


@pytest.mark.parametrize("texts", TEXTS, ids=str)
def test_what_is_text(texts):
    assert column(texts * 5).kind == "text"


CODES = [["007", "12"], ["01", "1"], ["02139", "90210"], ["1234567890123456", "1"], ["+491701234567", "5"], ["1E5", "10E4"], ["00", "01"]]


@pytest.mark.parametrize("texts", CODES, ids=str)
def test_codes_are_text_and_say_so(texts):
    read = column(texts)
    assert (read.kind, read.values.to_list()) == ("text", texts)
    assert read.reason.startswith("codes such as")


def test_whole_numbers_that_float64_has_not_are_text():
    read = column([2**53, 2**53 + 1])
    assert read.kind == "text"
    assert read.values.n_unique() == 2
    assert "codes: a whole number of 16 digits" in read.reason
    assert column([2**53, -(2**53)]).kind == "number"


def test_a_stray_code_among_fractions_is_a_bad_cell():
    read = column([f"{number / 8}" for number in range(1, 200)] + ["007"])
    assert (read.kind, read.bad.tolist()) == ("number", [199])
    assert read.values[199] is None


NUMBERS = [f"{number * 1.25:.2f}" for number in range(100)]


@pytest.mark.parametrize("words", [["abc"], ["abc", "x", "-"], ["unknown"] * 10, ["12,5", "1.2.3"], ["5 kg"], ["inf", "-nan"]])
def test_a_few_bad_cells_leave_numbers_numbers(words):
    read = column([*NUMBERS, *words, None, "?"])
    assert (read.kind, read.bad.tolist()) == ("number", list(range(100, 100 + len(words))))
    assert read.values.to_list() == [float(text) for text in NUMBERS] + [None] * (len(words) + 2)


def test_many_words_among_numbers_are_refused_with_their_places():
    with pytest.raises(DataError, match=r"'x' holds numbers, but 20 of 120 cells are none: 'abc' in row 101, .*, and 15 more. Mend"):
        column([*NUMBERS, *["abc"] * 20])
    with pytest.raises(DataError, match=r"'x' holds times, but 20 of 60 cells are none"):
        column([f"2024-{month:02}-{day:02}" for month in (1, 2) for day in range(1, 21)] + ["soon"] * 20)


@pytest.mark.parametrize(
    "values", [["1", "2", "3+", "2"] * 10, [*NUMBERS, *(f"{number}a" for number in range(40))], [*NUMBERS[:30], *["abc"] * 70]], ids=str
)
def test_mixtures_that_are_text(values):
    assert column(values).kind == "text"


DATES = {
    "ISO": (["2024-01-02", "2024-12-31T23:59:59"], "", [datetime(2024, 1, 2), datetime(2024, 12, 31, 23, 59, 59)]),
    "ISO with slashes": (["2024/1/2", "2024/12/31"], "", [datetime(2024, 1, 2), datetime(2024, 12, 31)]),
    "ISO without separators": (["20240102", "20241231"], "", [datetime(2024, 1, 2), datetime(2024, 12, 31)]),
    "months": (["2024-01", "2024-12"], "", [datetime(2024, 1, 1), datetime(2024, 12, 1)]),
    "zones": (
        ["2024-01-02T03:04:05Z", "2024-01-02 03:04:05.5 +02:00", "2024-01-02 03:04 UTC", "2024-01-02T03:04-0500"],
        "",
        [datetime(2024, 1, 2, 3, 4, 5), datetime(2024, 1, 2, 1, 4, 5, 500_000), datetime(2024, 1, 2, 3, 4), datetime(2024, 1, 2, 8, 4)],
    ),
    "German": (["1.2.2024", "31.12.2024 9:30"], "dates as day.month.year", [datetime(2024, 2, 1), datetime(2024, 12, 31, 9, 30)]),
    "German, undecided": (["1.2.2024", "3.4.24"], "dates as day.month.year", [datetime(2024, 2, 1), datetime(2024, 4, 3)]),
    "British": (["01/02/2024", "25/12/2024"], "dates as day.month.year", [datetime(2024, 2, 1), datetime(2024, 12, 25)]),
    "American": (
        ["01/02/2024", "12/25/2024 3:04 PM"],
        "dates as month/day/year",
        [datetime(2024, 1, 2), datetime(2024, 12, 25, 15, 4)],
    ),
    "short years": (["01/02/70", "12/25/69"], "dates as month/day/year", [datetime(1970, 1, 2), datetime(2069, 12, 25)]),
    "hyphens": (["01-02-2024", "31-12-2024"], "dates as day.month.year", [datetime(2024, 2, 1), datetime(2024, 12, 31)]),
    "names": (
        ["12 Jan 2024", "1. February 2024", "Mar 3, 2024", "Friday, April 5, 2024", "06-MAY-24"],
        "dates as day month's name year",
        [datetime(2024, 1, 12), datetime(2024, 2, 1), datetime(2024, 3, 3), datetime(2024, 4, 5), datetime(2024, 5, 6)],
    ),
}


@pytest.mark.parametrize("name", DATES)
def test_dates_in_every_order(name):
    texts, words, values = DATES[name]
    read = column([*texts, None, "n/a"])
    assert read.kind == "time"
    assert read.writing.words() == words
    assert read.values.drop_nulls().to_list() == values


@pytest.mark.parametrize("texts", [["2024-13-01", "2024-01-32"], ["1/2/0024"], ["31.02.2024"], ["soon"]])
def test_what_is_no_date(texts):
    assert column(texts * 3).kind == "text"


def test_the_table_decides_what_a_column_leaves_open():
    dates = pl.DataFrame({"open": ["01/02/2024", "03/04/2024"], "british": ["25/12/2024", "01/01/2024"]})
    assert column(["01/02/2024", "03/04/2024"]).values[0] == datetime(2024, 1, 2)
    assert recognise(dates, Rows())["open"].values[0] == datetime(2024, 2, 1)
    numbers = pl.DataFrame({"open": ["1.234", "2.500"], "comma": ["1,234", "2"], "german": ["0,5", "1,25"]})
    read = recognise(numbers, Rows())
    assert read["open"].values.to_list() == [1234, 2500]
    assert read["comma"].values.to_list() == [1.234, 2]
    typed = recognise(pl.DataFrame({"open": ["1,234", "2,500"], "typed": [0.5, 1.25]}), Rows())
    assert typed["open"].values.to_list() == [1234, 2500]


def test_the_table_decides_what_a_target_leaves_open():
    table = pl.DataFrame({"german": ["0,5", "1,25"] * 30, "y": [f"{number},{number:03}" for number in range(1, 61)]})
    assert judge_target(table["y"]).writing.decimal == "."
    assert judge_target(table["y"], table=table).writing.decimal == ","


def test_another_writing_than_that_of_training_is_not_read():
    comma = NumberWriting(decimal=",", grouping=".", unit="€")
    texts = ["1.234,5 €", "1,234.5 €", "1.5 €", "12 €", "12", "12 $", "(12 €)", "€ 1 €", "--5 €", ""]
    assert parse_numbers(pl.Series(texts), comma).to_list() == [1234.5, None, None, 12, None, None, None, None, None, None]
    assert parse_times(pl.Series(["12/25/2024", "25/12/2024", "2024-12-25"]), TimeWriting(order="day.month.year")).null_count() == 1


def test_booleans_and_what_frames_say_is_missing():
    assert column(["true", "FALSE", " n/a", None]).values.to_list() == [True, False, None, None]
    assert column(["1", "", "NA", "2"]).values.to_list() == [1, None, None, 2]
    assert column(["None", "x", "", "NA"]).values.to_list() == ["None", "x", "", "NA"]
