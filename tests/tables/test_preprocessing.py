"""Columns and targets: what each kind becomes, what is learnt from training rows only, and what is refused."""

import re
from datetime import date, datetime, timedelta

import numpy as np
import polars as pl
import pytest

from parafit.errors import DataError
from parafit.tables import columns
from parafit.tables.memory import from_memory
from parafit.tables.prediction import Notes
from parafit.tables.preprocessing import Preparation, fit_preparation
from parafit.tables.target import Quantity, fit_target, judge_target
from parafit.tables.times import ISO

QUANTITY = Quantity(name="y", mean=0.0, scale=1.0, reason="a test")
ROWS = 40


def fit(training=None, **table):
    frame = from_memory(pl.DataFrame({**table, "y": np.zeros(len(next(iter(table.values()))))})).frame
    return fit_preparation(frame, QUANTITY, np.arange(frame.height) if training is None else np.array(training))


def transform(preparation, **table):
    return preparation.transform(from_memory(pl.DataFrame(table)).frame)


def check(preparation, first_row=1, **table):
    """Transform and count, as prediction does."""
    part = from_memory(pl.DataFrame(table), first_row=first_row)
    notes = Notes()
    notes.count(part, preparation.transform(part.frame))
    notes.check(preparation.treatments)
    return notes


def kinds(preparation):
    return {one.name: one.kind for one in preparation.treatments}


def test_numbers_are_standardised_by_the_training_rows():
    values = np.arange(ROWS, dtype=float) ** 2
    preparation = fit(training=range(10), x=values)
    z = (values - values[:10].mean()) / values[:10].std()
    np.testing.assert_allclose(transform(preparation, x=values).values[:, 0], z / np.sqrt(1 + (z / 3) ** 2), rtol=1e-6)


def test_missing_numbers_become_the_median_and_an_input():
    preparation = fit(x=[1.0, 2.0, 9.0, None])
    values = transform(preparation, x=[2.0, None]).values
    assert preparation.inputs == ["x", "x is missing"]
    assert values[0, 0] == values[1, 0]
    assert values[:, 1].tolist() == [0, 1]


def test_missing_only_later_is_counted():
    inputs = transform(fit(x=[1.0, 2.0, 9.0]), x=[2.0, None])
    assert inputs.values.shape == (2, 1)
    assert inputs.missing == {"x": 1}


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["1", "2.5", None, "-3e2"], "number"),
        ([1, 2, 3, 4], "number"),
        ([timedelta(hours=1), timedelta(hours=2), None, None], "number"),
        (["007", "012", "100", "007"], "category"),
        (["a", "b", "a", "b"], "category"),
        (["1", "2", "x", "2"], "category"),
        (["True", "false", "TRUE", None], "boolean"),
        ([True, False, None, True], "boolean"),
        (["2024-01-02", "2024-01-03", None, "2024-02-01"], "time"),
        (["2024-01-02T03:04:05Z", "2024-01-02 03:04:05.678", "2024-01-02 03:04", "2024-01-02T03:04:05+02:00"], "time"),
        (["2024-01-02", "2024-13-03", "2024-01-02", "2024-01-02"], "category"),
        ([date(2024, 1, 2), date(2024, 1, 3), None, None], "time"),
        ([datetime(2024, 1, 2, 3), datetime(2024, 1, 3), None, None], "time"),
    ],
)
def test_kinds_are_recognised(values, kind):
    assert kinds(fit(x=values)) == {"x": kind}


def test_booleans_from_every_writing():
    preparation = fit(x=[True, False, True, True])
    for values in ([True, False], ["TRUE", "false"], [1, 0], [1.0, 0.0], ["1", "0"]):
        assert transform(preparation, x=values).values.tolist() == [[1], [0]]


def test_categories_are_one_hot_and_unseen_ones_count_as_missing():
    inputs = transform(fit(x=["a", "b", "a", "b", None]), x=["a", "b", "c", None])
    assert inputs.values.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]]
    assert inputs.unseen == {"x": 1}


def test_one_category_in_every_writing():
    preparation = fit(x=["1", "2", "1", "2", "x", "x"])
    for values in (["1", "2"], [1, 2], [1.0, 2.0]):
        assert transform(preparation, x=values).values.tolist() == transform(preparation, x=["1", "2"]).values.tolist()
        assert sum(transform(preparation, x=values).unseen.values()) == 0


def test_rare_levels_share_inputs():
    preparation = fit(x=["a"] * 10 + ["b"] * 5 + ["c", "d"])
    assert preparation.inputs == ["x=a", "x=b", "x is rare", "frequency of x"]
    inputs = transform(preparation, x=["a", "c", "d", "e"])
    assert inputs.values[:, :3].tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 1], [0, 0, 0]]
    np.testing.assert_allclose(inputs.values[:, 3], np.log1p([10, 1, 1, 0]) / np.log1p(10), rtol=1e-6)
    assert inputs.unseen == {"x": 1}


def test_many_levels_have_a_bounded_number_of_inputs():
    preparation = fit(x=[f"level {number % 100}" for number in range(1000)])
    assert len(preparation.inputs) == columns.MANY_LEVELS + 2


def test_times_become_a_line_and_cycles():
    days = [datetime(2024, 1, 1, 6) + timedelta(days=number) for number in range(ROWS)]
    preparation = fit(x=days)
    cycles = [f"x {wave} of {cycle}" for cycle in ("year", "week", "day") for wave in ("cos", "sin")]
    assert preparation.inputs == ["x", *cycles]
    values = transform(preparation, x=[days[0], days[7]]).values
    np.testing.assert_allclose(values[0, 3:], values[1, 3:], atol=1e-5)  # the same weekday, the same hour
    assert values[0, 0] < values[1, 0]
    assert "x cos of day" not in fit(x=[day.date() for day in days]).inputs
    texts = [day.isoformat() for day in days]
    np.testing.assert_array_equal(transform(preparation, x=texts).values, transform(preparation, x=days).values)


def test_zones_are_one_line_of_time():
    texts = pl.Series("x", ["2024-01-02T03:00:00+02:00", "2024-01-02T01:00:00Z", "2024-01-02 01:00"])
    assert columns.to_times(texts, ISO)[0].n_unique() == 1


def test_missing_times():
    values = transform(fit(x=[date(2024, 1, 2), date(2024, 1, 5), None]), x=["2024-01-02", None]).values
    assert values[1].tolist() == [0, 0, 0, 0, 0, 1]
    assert values[0, -1] == 0


@pytest.mark.parametrize(
    ("name", "values", "reason"),
    [
        ("x", [3] * ROWS, r"the same value everywhere \(3\)"),
        ("x", [None] * ROWS, "no value in the training rows"),
        ("x", list(range(1, ROWS + 1)), "it numbers the rows"),
        ("customer_id", [17 * number % 9973 for number in range(ROWS)], "an identifier by its name"),
        ("orderID", [17 * number % 9973 for number in range(ROWS)], "an identifier by its name"),
        ("x", [f"text {number}" for number in range(ROWS)], "text that hardly repeats"),
        ("x", [[1, 2]] * ROWS, "are not used"),
    ],
)
def test_what_is_dropped_and_why(name, values, reason):
    preparation = fit(**{name: values, "z": np.arange(ROWS) ** 2})
    assert list(preparation.dropped) == [name]
    assert re.search(reason, preparation.dropped[name])


@pytest.mark.parametrize("values", [list(range(1980, 1980 + ROWS)), [0.5 * number for number in range(ROWS)], [0, 1] * (ROWS // 2)])
def test_what_is_not_an_identifier(values):
    assert kinds(fit(x=values, humid=values)) == {"x": "number", "humid": "number"}


def test_constant_with_missing_values_is_information():
    assert fit(x=[1.0, None] * 10).inputs == ["x", "x is missing"]


def test_nothing_left_to_learn_from():
    with pytest.raises(DataError, match=r"no column is left to predict 'y' from \(x: the same value"):
        fit(x=[1] * ROWS)


@pytest.mark.parametrize(
    ("trained", "given", "message"),
    [
        (
            [1.0, 2.0],
            ["3", "abc", "x"],
            r"column 'x' holds 'abc' in row 2, 'x' in row 3: expected a number, as in training \(2 of 3 cells are none",
        ),
        ([1.0, 2.0], [date(2024, 1, 1)], "holds Date: expected numbers"),
        ([1.0, 2.0], [1.0, float("inf")], "column 'x' holds inf in row 2: expected a number"),
        ([True, False], [2], "column 'x' holds 2 in row 1: expected true or false"),
        ([date(2024, 1, 1), date(2024, 1, 2)], ["soon"], "column 'x' holds 'soon' in row 1: expected a date or time"),
        ([date(2024, 1, 1), date(2024, 1, 2)], [5], "holds Int64: expected dates"),
    ],
)
def test_a_changed_type_is_refused(trained, given, message):
    preparation = fit(x=trained * 10)
    with pytest.raises(DataError, match=message):
        check(preparation, x=given)


def test_rows_are_numbered_on_across_batches():
    with pytest.raises(DataError, match="in row 102"):
        check(fit(x=[1.0, 2.0]), first_row=101, x=["1", "abc"])


def test_infinite_numbers_are_bad_cells():
    preparation = fit(x=[1.0, 2, 3, 4, 5, float("inf"), -float("inf"), *range(33)])
    assert preparation.treatments[0].missing == 2
    inputs = transform(preparation, x=[1.0, float("inf"), None])
    assert inputs.bad["x"].tolist() == [1]
    assert inputs.values[1].tolist() == inputs.values[2].tolist()


def test_absent_and_extra_columns():
    preparation = fit(size=[1.0, 2.0], colour=["a", "b"])
    with pytest.raises(DataError, match=r"no column 'size' \(and 1 more: 'colour'\); it has 'sizes'. Did you mean 'sizes'\?"):
        transform(preparation, sizes=[1.0])
    assert transform(preparation, size=[1.0], colour=["a"], y=[0.0], new=[1]).extra == ("new",)


def test_json_round_trip():
    table = {
        "number": [1.0, None, 3.0] * 10,
        "boolean": [True, False, None] * 10,
        "category": ["a", "bé", None] * 9 + ["r", "s", "t"],
        "time": [date(2024, 1, 2), date(2024, 1, 3), None] * 10,
        "constant": [1] * 30,
    }
    preparation = fit(**table)
    again = Preparation.from_json(preparation.to_json())
    assert again == preparation
    np.testing.assert_array_equal(transform(again, **table).values, transform(preparation, **table).values)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": 2}', '{"format": 2, "columns": [{"kind": "pickle"}], "dropped": {}, "target": {}}']
)
def test_json_of_something_else(text):
    with pytest.raises(DataError, match=r"not what parafit wrote as preprocessing.json"):
        Preparation.from_json(text)


def test_json_of_another_version():
    with pytest.raises(DataError, match="format 99; this parafit reads format 2"):
        Preparation.from_json('{"format": 99}')


def test_identifiers_that_come_again_are_categories_and_targets_are_classes():
    preparation = fit(customer_id=[17 * number % 30 for number in range(60)], size=[17 * number % 30 for number in range(60)])
    assert kinds(preparation) == {"customer_id": "category", "size": "number"}
    assert "an identifier by its name" in preparation.treatments[0].describe()
    judged = judge_target(pl.Series("user_id", list(range(30)) * 20))
    assert (judged.task, judged.values) == ("classification", "whole number")


def test_codes_as_input_keep_their_zeros():
    preparation = fit(x=["01", "1", "01", "1"] * 5)
    assert preparation.inputs == ["x=01", "x=1"]
    assert "codes such as '01'" in preparation.treatments[0].describe()
    assert transform(preparation, x=["1", "01", "001"]).values.tolist() == [[0, 1], [1, 0], [0, 0]]


@pytest.mark.parametrize("given", [["1.234,5 €", "12 €", "abc"], [1234.5, 12.0, None]], ids=["as in training", "numbers"])
def test_prediction_reads_as_training_did(given):
    preparation = fit(x=["1.234,5 €", "12 €", "7,25 €"] * 5)
    assert preparation.treatments[0].describe().endswith("; read (decimal comma, groups of digits parted by '.', unit '€')")
    again = Preparation.from_json(preparation.to_json())
    assert again == preparation
    expected = transform(fit(x=[1234.5, 12, 7.25] * 5), x=[1234.5, 12.0, None])
    np.testing.assert_array_equal(transform(again, x=given).values, expected.values)


def test_another_writing_than_training_is_refused():
    preparation = fit(x=["1,5", "2,25"] * 5, day=["25/12/2024", "01/01/2024"] * 5)
    with pytest.raises(DataError, match=r"'x' holds '1.5' in row 1, '2.5' in row 2: expected a number \(decimal comma\), as in training"):
        check(preparation, x=["1.5", "2.5"], day=["25/12/2024"] * 2)
    with pytest.raises(DataError, match=r"'day' holds '12/25/2024' in row 1: expected a date .* \(dates as day.month.year\)"):
        check(preparation, x=["1,5"], day=["12/25/2024"])


def test_a_few_bad_cells_of_prediction_are_missing_and_listed():
    notes = check(fit(x=[1.0, 2.0]), x=["1"] * 19 + ["abc"])
    assert notes.words() == ["column x: cells that cannot be read, taken as missing: 'abc' in row 20"]


NUMBERS = [f"{number * 1.25:.2f}" for number in range(100)]


@pytest.mark.parametrize(
    ("values", "task", "rows", "bad"),
    [
        ([*NUMBERS, "abc", None, "?"], "regression", 100, [100]),
        (["0", "1"] * 50 + ["abc"], "classification", 100, [100]),
        ([1.0, 2.0, None, float("nan")] * 20, "classification", 40, []),
        (["a", None, "", "b"] * 5, "classification", 10, []),
        (["None", "NA"] * 5, "classification", 10, []),
    ],
)
def test_rows_without_a_target(values, task, rows, bad):
    judged = judge_target(from_memory(pl.DataFrame({"y": values}, strict=False)).frame["y"])
    assert (judged.task, len(judged.rows), judged.bad.tolist()) == (task, rows, bad)


def test_a_word_that_comes_again_among_classes_is_a_class():
    series = pl.Series("y", ["0", "1"] * 50 + ["other"] * 6)
    judged = judge_target(series)
    assert fit_target(series, judged, np.arange(2)).labels == ("0", "1", "other")


@pytest.mark.parametrize(
    ("values", "task", "values_are"),
    [
        (["1,234", "2,500", "999"] * 20 + [f"{number:,}" for number in range(1000, 1100)], "regression", "number"),
        (["007", "012"] * 20, "classification", "text"),
        (["7c", "8c"] * 20, "classification", "text"),
        (["5.5 kg", "6 kg"] * 20, "regression", "number"),
        (["true", "false"] * 20, "classification", "text"),
    ],
)
def test_targets_as_people_write_them(values, task, values_are):
    judged = judge_target(pl.Series("y", values))
    assert (judged.task, judged.values) == (task, values_are)


def test_codes_are_quantities_when_asked():
    series = pl.Series("y", ["007", "012"] * 20)
    quantity = fit_target(series, judge_target(series, "regression"), np.arange(40))
    assert (quantity.mean, quantity.scale) == (9.5, 2.5)


@pytest.mark.parametrize("values", [["2024-01-02", "2024-03-04"] * 10, ["25.12.2024", "1.1.2024"] * 10])
def test_a_date_as_target_is_refused_with_advice(values):
    with pytest.raises(
        DataError, match=r"holds dates such as '.*': expected numbers, .* Predict a number made from them, such as the days"
    ):
        judge_target(pl.Series("y", values))


@pytest.mark.parametrize(
    ("values", "task", "reason"),
    [
        (["a", "b"] * 20, "classification", "the target is text"),
        ([True, False] * 20, "classification", "the target is boolean"),
        ([0.0, 1.0] * 20, "classification", "whole numbers, only 2 different ones in 40 rows"),
        (["1", "2", "3"] * 20, "classification", "whole numbers, only 3 different ones"),
        (list(range(40)), "regression", "whole numbers, 40 different ones"),
        ([0.5, 1.0] * 20, "regression", "numbers with fractions"),
    ],
)
def test_the_task_is_inferred_with_its_reason(values, task, reason):
    judged = judge_target(pl.Series("y", values))
    assert judged.task == task
    assert reason in judged.reason


@pytest.mark.parametrize(
    ("values", "task", "message"),
    [
        ([None, None], None, "target 'y' is missing in every row"),
        ([1.0, float("inf")], None, "target 'y' is infinite or no number in 1 of 2 rows: inf in row 2"),
        (["a", "a"], None, "'a' in every row: there is nothing to learn with one class"),
        ([1.5, 1.5], None, "nothing to learn with one value"),
        (["a", "b"], "regression", "holds text such as 'a': regression needs a number"),
        (["a", "b"], "clustering", "unknown task 'clustering': expected 'classification' or 'regression'"),
        ([date(2024, 1, 1), date(2024, 1, 2)], None, "holds Date: expected numbers, text or booleans"),
        ([f"name {number}" for number in range(40)], None, "has 40 values in 40 rows: too many for classes"),
    ],
)
def test_targets_that_cannot_be_used(values, task, message):
    with pytest.raises(DataError, match=message):
        judge_target(pl.Series("y", values), task)


@pytest.mark.parametrize(
    ("values", "labels", "predicted"),
    [
        (["b", "a"], ("a", "b"), ["b", "a"]),
        (["10", "9"], ("9", "10"), [10, 9]),
        (["1.0", "2"], ("1", "2"), [1, 2]),
        ([True, False], ("false", "true"), [True, False]),
        ([2.0, 1.0], ("1", "2"), [2, 1]),
        ([0.5, 1.0], ("0.5", "1.0"), [0.5, 1.0]),
        (["0,5", "1"], ("0,5", "1"), ["0,5", "1"]),
        (["01", "1"], ("01", "1"), ["01", "1"]),
        (["1 %", "2 %"], ("1 %", "2 %"), ["1 %", "2 %"]),
        (
            ["12345678901234567", "12345678901234568"],
            ("12345678901234567", "12345678901234568"),
            ["12345678901234567", "12345678901234568"],
        ),
        ([2**53 + 1, 2**53], (str(2**53), str(2**53 + 1)), [2**53 + 1, 2**53]),
        ([-(2**62) - 1, -(2**62)], (str(-(2**62) - 1), str(-(2**62))), [-(2**62) - 1, -(2**62)]),
        ([2**64 - 1, 2**64 - 2], (str(2**64 - 2), str(2**64 - 1)), [2**64 - 1, 2**64 - 2]),
        ([" a", "None"], (" a", "None"), [" a", "None"]),
        (["1E5", "10E4"], ("10E4", "1E5"), ["1E5", "10E4"]),
        ([date(2024, 2, 1), date(2024, 1, 1)], ("2024-01-01", "2024-02-01"), ["2024-02-01", "2024-01-01"]),
    ],
)
def test_classes_come_back_as_they_were_written(values, labels, predicted):
    series = pl.Series("y", values)
    judged = judge_target(pl.concat([series] * 3), "classification")
    classes = fit_target(series, judged, np.arange(2))
    assert classes.labels == labels
    frame = classes.decode(np.eye(2)[classes.encode(series)])
    assert frame["prediction"].to_list() == predicted
    assert frame.columns == ["prediction", *(f"probability_{label}" for label in labels)]


def test_quantities_come_back_in_their_units():
    series = pl.Series("y", [10.0, 20.0, 90.0])
    quantity = fit_target(series, judge_target(series, "regression"), np.array([0, 1]))
    assert (quantity.mean, quantity.scale) == (15.0, 5.0)
    np.testing.assert_allclose(quantity.decode(quantity.encode(series))["prediction"], [10, 20, 90])
