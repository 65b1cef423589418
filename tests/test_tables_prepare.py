"""Columns and targets: what each kind becomes, what is learnt from training rows only, and what is refused."""

import re
from datetime import date, datetime, timedelta

import numpy as np
import polars as pl
import pytest

from parafit.errors import DataError
from parafit.tables import columns
from parafit.tables.prepare import Preparation, fit_preparation
from parafit.tables.read import clean_text
from parafit.tables.target import Quantity, fit_target, infer_task

QUANTITY = Quantity(name="y", mean=0.0, scale=1.0, reason="a test")
ROWS = 40


def fit(training=None, **table):
    frame = clean_text(pl.DataFrame({**table, "y": np.zeros(len(next(iter(table.values()))))}))
    return fit_preparation(frame, QUANTITY, np.arange(frame.height) if training is None else np.array(training))


def transform(preparation, **table):
    return preparation.transform(clean_text(pl.DataFrame(table)))


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
    assert columns.to_times(pl.Series("x", ["2024-01-02T03:00:00+02:00", "2024-01-02T01:00:00Z", "2024-01-02 01:00"])).n_unique() == 1


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
        ([1.0, 2.0], ["3", "abc", "x"], r"column 'x' holds 'abc' in row 2: expected a number, as in training \(2 such rows\)"),
        ([1.0, 2.0], [date(2024, 1, 1)], "holds Date: expected numbers"),
        ([1.0, 2.0], [1.0, float("inf")], "column 'x' holds an infinite number in 1 of 2 rows, first in row 2"),
        ([True, False], [2], "column 'x' holds 2 in row 1: expected true or false"),
        ([date(2024, 1, 1), date(2024, 1, 2)], ["soon"], "column 'x' holds 'soon' in row 1: expected a date or time"),
        ([date(2024, 1, 1), date(2024, 1, 2)], [5], "holds Int64: expected dates"),
    ],
)
def test_a_changed_type_is_refused(trained, given, message):
    preparation = fit(x=trained * 10)
    with pytest.raises(DataError, match=message):
        transform(preparation, x=given)


def test_rows_are_numbered_on_across_batches():
    frame = clean_text(pl.DataFrame({"x": ["1", "abc"]}))
    with pytest.raises(DataError, match="in row 102"):
        fit(x=[1.0, 2.0]).transform(frame, first_row=101)


def test_infinite_numbers_in_training_name_their_row():
    with pytest.raises(DataError, match=r"column 'x' holds an infinite number in 2 of 40 rows, first in row 6"):
        fit(training=range(20, 40), x=[1.0, 2, 3, 4, 5, float("inf"), -float("inf"), *range(33)])


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
    "text", ["{", "[]", '{"format": 1}', '{"format": 1, "columns": [{"kind": "pickle"}], "dropped": {}, "target": {}}']
)
def test_json_of_something_else(text):
    with pytest.raises(DataError, match=r"not what parafit wrote as preprocessing.json"):
        Preparation.from_json(text)


def test_json_of_another_version():
    with pytest.raises(DataError, match="format 99; this parafit reads format 1"):
        Preparation.from_json('{"format": 99}')


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
    inferred = infer_task(pl.Series("y", values))
    assert inferred[0] == task
    assert reason in inferred[1]


@pytest.mark.parametrize(
    ("values", "task", "message"),
    [
        ([1, 2, None, 3, None], None, "target 'y' is missing in 2 of 5 rows, first in row 3"),
        ([1.0, float("inf")], None, "target 'y' is infinite or no number in 1 of 2 rows, first in row 2"),
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
        infer_task(pl.Series("y", values), task)


@pytest.mark.parametrize(
    ("values", "labels", "predicted"),
    [
        (["b", "a"], ("a", "b"), ["b", "a"]),
        (["10", "9"], ("9", "10"), [10, 9]),
        (["1.0", "2"], ("1", "2"), [1, 2]),
        ([True, False], ("false", "true"), [True, False]),
        ([2.0, 1.0], ("1", "2"), [2, 1]),
    ],
)
def test_classes_come_back_as_they_were_written(values, labels, predicted):
    series = pl.Series("y", values)
    classes = fit_target(series, "classification", "a test", np.arange(2))
    assert classes.labels == labels
    frame = classes.decode(np.eye(2)[classes.encode(series)])
    assert frame["prediction"].to_list() == predicted
    assert frame.columns == ["prediction", *(f"probability_{label}" for label in labels)]


def test_quantities_come_back_in_their_units():
    series = pl.Series("y", [10.0, 20.0, 90.0])
    quantity = fit_target(series, "regression", "a test", np.array([0, 1]))
    assert (quantity.mean, quantity.scale) == (15.0, 5.0)
    np.testing.assert_allclose(quantity.decode(quantity.encode(series))["prediction"], [10, 20, 90])
