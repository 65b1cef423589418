"""What is predicted: a class or a quantity, inferred from the target column."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from parafit.errors import DataError
from parafit.tables.columns import to_numbers, to_texts
from parafit.tables.kinds import LARGEST_EXACT, MOST_BAD, Reading, as_numbers, is_identifier, recognise, recognise_column
from parafit.tables.numbers import PLAIN, NumberWriting, parse_numbers
from parafit.tables.rows import Rows, some_of

if TYPE_CHECKING:
    import polars as pl

TASKS = ("classification", "regression")

_MOST_WHOLE_NUMBER_CLASSES = 20
_ROWS_FOR_EACH_WHOLE_NUMBER_CLASS = 10
_ROWS_OF_A_CLASS = 5
_LARGEST_INT64 = 2**63 - 1
_ROWS = Rows()
_PLAIN_WHOLE = r"^-?\d+(?:\.0*)?$"


@dataclass(frozen=True, kw_only=True)
class Classes:
    """A target with a class in each row.

    Args:
        name: the target column.
        labels: the classes, in the order of the network's outputs.
        values: "text", "whole number", "number" or "boolean": what a predicted label is written as.
        reason: why this target was taken for classes.
    """

    task: ClassVar[str] = "classification"
    name: str
    labels: tuple[str, ...]
    values: str
    reason: str

    def __post_init__(self):
        object.__setattr__(self, "labels", tuple(self.labels))

    @property
    def output_size(self) -> int:
        """Outputs of the network: one for each class."""
        return len(self.labels)

    def encode(self, series: "pl.Series") -> np.ndarray:
        """The class of each row as its place in `labels`: int32 of shape (rows,)."""
        import polars as pl

        places = {label: place for place, label in enumerate(self.labels)}
        return _to_labels(series, self.values).replace_strict(places, return_dtype=pl.Int32).to_numpy()

    def decode(self, outputs: np.ndarray) -> "pl.DataFrame":
        """The columns `prediction` and `probability_…` from probabilities of shape (rows, classes)."""
        import polars as pl

        labels = pl.Series("prediction", self.labels)
        if self.values == "whole number":
            labels = labels.cast(pl.UInt64 if max(map(int, self.labels)) > _LARGEST_INT64 else pl.Int64)
        elif self.values == "number":
            labels = labels.cast(pl.Float64)
        elif self.values == "boolean":
            labels = labels == "true"
        chosen = labels.alias("prediction").gather(outputs.argmax(axis=1))
        return pl.DataFrame([chosen, *(pl.Series(f"probability_{label}", outputs[:, place]) for place, label in enumerate(self.labels))])


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """A target with a number in each row; the network sees (value - mean) / scale of the training rows."""

    task: ClassVar[str] = "regression"
    output_size: ClassVar[int] = 1
    name: str
    mean: float
    scale: float
    reason: str
    writing: NumberWriting = PLAIN

    def encode(self, series: "pl.Series") -> np.ndarray:
        """Standardised values: float32 of shape (rows, 1)."""
        return ((_to_quantities(series, self.writing).to_numpy() - self.mean) / self.scale).astype(np.float32)[:, None]

    def decode(self, outputs: np.ndarray) -> "pl.DataFrame":
        """The column `prediction`, in the target's own units, from outputs of shape (rows, 1)."""
        import polars as pl

        return pl.DataFrame({"prediction": outputs[:, 0].astype(float) * self.scale + self.mean})


Target = Classes | Quantity


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What a target column asks for.

    Args:
        task: "classification" or "regression".
        reason: why.
        values: as in `Classes`, or "number" for a quantity.
        writing: how a quantity is written.
        rows: the rows (indices) with a target, the ones to learn from.
        bad: the rows with one that cannot be read among numbers.
    """

    task: str
    reason: str
    values: str
    writing: NumberWriting = PLAIN
    rows: np.ndarray
    bad: np.ndarray


def judge_target(series: "pl.Series", task: str | None = None, rows: Rows = _ROWS, table: "pl.DataFrame | None" = None) -> Judgement:
    """The task that the target column asks for, the reason, and the rows that can be learnt from; `task` settles it.

    Args:
        series: the column, of a frame that `read_table` gave.
        task: "classification" or "regression"; inferred if not given.
        rows: where the column's rows stand.
        table: the column's table, which decides what the column leaves open of how its numbers are written.

    Raises:
        DataError: too many values that cannot be read, fewer than two classes or values, text without repetition, dates, or
            a type that is neither number, text nor boolean.

    >>> import polars as pl
    >>> judge_target(pl.Series("species", ["seal", "whale"] * 10)).reason
    'the target is text'
    """
    if task is not None and task not in TASKS:
        raise DataError(f"unknown task {task!r}: expected {' or '.join(map(repr, TASKS))}.")
    reading = _read(series, task, rows, table)
    judged = _judge_numbers(series, reading, task) if reading.kind == "number" else _judge_texts(series, reading)
    if not len(judged.rows):
        raise DataError(f"target {series.name!r} is missing in every row.")
    _check_few_bad(series, judged, rows)
    _check_varies(series[judged.rows], judged.task)
    return judged


def fit_target(series: "pl.Series", judged: Judgement, training: np.ndarray) -> Target:
    """What to predict: the labels in all rows, or mean and deviation of the `training` rows (indices).

    Args:
        series: the target of the rows that `judged` kept.
        judged: what it asks for.
        training: the rows to learn from.
    """
    if judged.task == "regression":
        values = _to_quantities(series, judged.writing).to_numpy()[training]
        own = {"mean": float(values.mean()), "scale": float(values.std()) or 1.0}
        return Quantity(name=series.name, reason=judged.reason, writing=judged.writing, **own)
    labels = _to_labels(series, judged.values).unique().sort()
    if judged.values in ("whole number", "number"):
        labels = sorted(labels, key=int if judged.values == "whole number" else float)
    return Classes(name=series.name, labels=tuple(labels), values=judged.values, reason=judged.reason)


def to_record(target: Target) -> dict:
    """The target as plain values for JSON; `from_record` undoes it."""
    return {"task": target.task, **asdict(target)}


def from_record(record: Mapping) -> Target:
    """The target that `to_record` wrote down."""
    content = dict(record)
    if content.pop("task") == "classification":
        return Classes(**content)
    return Quantity(**{**content, "writing": NumberWriting(**content["writing"])})


def _to_labels(series: "pl.Series", values: str) -> "pl.Series":
    """The label of each row, as `Classes` names them."""
    import polars as pl

    if values == "whole number":
        if series.dtype.is_float() or series.dtype.is_decimal():
            series = series.cast(pl.Int64)
        return series.cast(pl.String).str.strip_chars().str.replace(r"\.0*$", "")
    return series.cast(pl.Float64).cast(pl.String) if values == "number" else to_texts(series)


def _to_quantities(series: "pl.Series", writing: NumberWriting) -> "pl.Series":
    import polars as pl

    return parse_numbers(series, writing) if series.dtype == pl.String else to_numbers(series, writing)[0]


def _read(series: "pl.Series", task: str | None, rows: Rows, table: "pl.DataFrame | None") -> Reading:
    """What the target's values are: numbers, texts, booleans, or times if they are to be classes."""
    import polars as pl

    reading = recognise_column(series, rows)
    if reading.is_open and table is not None:
        reading = recognise(table, rows)[series.name]
    if reading.kind == "other" or series.dtype == pl.Duration or (reading.kind == "time" and task != "classification"):
        raise _no_target(series, reading)
    if task is None and reading.kind == "number" and _are_codes(series):
        return replace(reading, kind="text", values=series, reason=f"codes such as {series.drop_nulls()[0]!r}")
    if task != "regression" or reading.kind == "number":
        return reading
    numbers = as_numbers(series.cast(pl.String))
    if len(numbers.bad) > MOST_BAD * (len(series) - numbers.values.null_count() + len(numbers.bad)):
        word = series[int(numbers.bad[0])]
        raise DataError(f"target {series.name!r} holds text such as {word!r}: regression needs a number in each row.")
    return numbers


def _are_codes(series: "pl.Series") -> bool:
    """Whether whole numbers that run into one word, 3b and 4b, are more likely classes than quantities."""
    import polars as pl

    return series.dtype == pl.String and bool(series.str.contains(r"^\s*\d+\p{L}+\s*$").all())


def _no_target(series: "pl.Series", reading: Reading) -> DataError:
    is_text = reading.kind == "time" and not series.dtype.is_temporal()
    held = f"dates such as {series.drop_nulls()[0]!r}" if is_text else str(series.dtype)
    advice = " Predict a number made from them, such as the days since a first date." if is_text or series.dtype.is_temporal() else ""
    return DataError(f"target {series.name!r} holds {held}: expected numbers, text or booleans.{advice}")


def _judge_numbers(series: "pl.Series", reading: Reading, task: str | None) -> Judgement:
    numbers = reading.values.drop_nulls()
    if not len(numbers):
        return _judge_texts(series, reading)
    inferred, reason = (task, "asked for") if task else _infer(numbers)
    rows = reading.values.is_not_null().arg_true().to_numpy()
    if inferred == "regression":
        return Judgement(task=inferred, reason=reason, values="number", writing=reading.writing, rows=rows, bad=reading.bad)  # type: ignore[arg-type]
    if _most_equal(series[reading.bad]) >= _ROWS_OF_A_CLASS:  # a class of its own, not a slip
        return _judge_texts(series, replace(reading, kind="text", values=series))
    return Judgement(task=inferred, reason=reason, values=_values_of(series[rows]), rows=rows, bad=reading.bad)


def _judge_texts(series: "pl.Series", reading: Reading) -> Judgement:
    import polars as pl

    kind = "boolean" if series.dtype == pl.Boolean else "text"
    reason = f"the target holds {reading.reason}" if reading.reason else f"the target is {kind}"
    known = reading.values.is_not_null()
    if series.dtype == pl.String:
        known &= (series.str.strip_chars() != "").fill_null(False)
    values = "whole number" if series.dtype.is_integer() else kind
    rows = known.arg_true().to_numpy()
    return Judgement(task="classification", reason=reason, values=values, rows=rows, bad=np.zeros(0, int))


def _infer(numbers: "pl.Series") -> tuple[str, str]:
    distinct, rows = numbers.n_unique(), len(numbers)
    few = distinct <= 2 or (distinct <= _MOST_WHOLE_NUMBER_CLASSES and distinct * _ROWS_FOR_EACH_WHOLE_NUMBER_CLASS <= rows)
    if not (numbers == numbers.round()).all():
        return "regression", "the target holds numbers with fractions"
    if is_identifier(numbers):
        return "classification", "the target is an identifier by its name"
    if few:
        return "classification", f"the target holds whole numbers, only {distinct} different ones in {rows} rows"
    return "regression", f"the target holds whole numbers, {distinct} different ones in {rows} rows"


def _most_equal(cells: "pl.Series") -> int:
    return int(cells.value_counts(name="rows").get_column("rows").max() or 0)  # type: ignore[arg-type]


def _values_of(series: "pl.Series") -> str:
    """What labels that can be read as numbers are written as: plain whole numbers are told apart by their value."""
    import polars as pl

    if series.dtype == pl.String:
        return "whole number" if series.str.strip_chars().str.contains(_PLAIN_WHOLE).all() else "text"
    if series.dtype.is_integer():
        return "whole number"
    numbers = series.cast(pl.Float64)
    return "whole number" if ((numbers == numbers.round()) & (numbers.abs() <= LARGEST_EXACT)).all() else "number"


def _check_few_bad(series: "pl.Series", judged: Judgement, rows: Rows) -> None:
    known = len(judged.rows) + len(judged.bad)
    if len(judged.bad) > MOST_BAD * known:
        cells = some_of(rows.cells(series, judged.bad), len(judged.bad))
        raise DataError(
            f"target {series.name!r} is infinite or no number in {len(judged.bad):,} of {known:,} rows: {cells}. "
            "Mend them, or leave these rows out."
        )


def _check_varies(series: "pl.Series", task: str) -> None:
    distinct, rows = series.n_unique(), len(series)
    if distinct < 2:
        one = "class" if task == "classification" else "value"
        raise DataError(f"target {series.name!r} is {series[0]!r} in every row: there is nothing to learn with one {one}.")
    if task == "classification" and distinct > rows / 2:
        raise DataError(f"target {series.name!r} has {distinct} values in {rows} rows: too many for classes. Is it a name?")
