"""What is predicted: a class or a quantity, inferred from the target column."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from parafit.errors import DataError
from parafit.tables.columns import to_numbers, to_texts

if TYPE_CHECKING:
    import polars as pl

TASKS = ("classification", "regression")

_MOST_WHOLE_NUMBER_CLASSES = 20
_ROWS_FOR_EACH_WHOLE_NUMBER_CLASS = 10


@dataclass(frozen=True, kw_only=True)
class Classes:
    """A target with a class in each row.

    Args:
        name: the target column.
        labels: the classes, in the order of the network's outputs.
        values: "text", "whole number" or "boolean": what a predicted label is written as.
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
        return len(self.labels)

    def encode(self, series: "pl.Series") -> np.ndarray:
        """The class of each row as its place in `labels`: int32 of shape (rows,)."""
        import polars as pl

        places = {label: place for place, label in enumerate(self.labels)}
        texts = to_texts(to_numbers(series) if self.values == "whole number" else series)
        return texts.replace_strict(places, return_dtype=pl.Int32).to_numpy()

    def decode(self, outputs: np.ndarray) -> "pl.DataFrame":
        """The columns `prediction` and `probability_…` from probabilities of shape (rows, classes)."""
        import polars as pl

        labels = pl.Series("prediction", self.labels)
        if self.values == "whole number":
            labels = labels.cast(pl.Int64)
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

    def encode(self, series: "pl.Series") -> np.ndarray:
        """Standardised values: float32 of shape (rows, 1)."""
        return ((to_numbers(series).to_numpy() - self.mean) / self.scale).astype(np.float32)[:, None]

    def decode(self, outputs: np.ndarray) -> "pl.DataFrame":
        """The column `prediction`, in the target's own units, from outputs of shape (rows, 1)."""
        import polars as pl

        return pl.DataFrame({"prediction": outputs[:, 0].astype(float) * self.scale + self.mean})


Target = Classes | Quantity


def infer_task(series: "pl.Series", task: str | None = None) -> tuple[str, str]:
    """The task that the target column asks for and the reason; `task` settles it.

    Raises:
        DataError: missing or infinite values, fewer than two classes or values, text without repetition, or a type that is
            neither.

    >>> import polars as pl
    >>> infer_task(pl.Series("species", ["seal", "whale"] * 10))
    ('classification', 'the target is text')
    """
    _check_complete(series)
    numbers = _as_numbers(series)
    if task is not None and task not in TASKS:
        raise DataError(f"unknown task {task!r}: expected {' or '.join(map(repr, TASKS))}.")
    if numbers is None:
        if task == "regression":
            raise DataError(f"target {series.name!r} holds text such as {series[0]!r}: regression needs a number in each row.")
        task, reason = "classification", _reason_not_numeric(series)
    elif task is None:
        task, reason = _judge_numbers(numbers)
    else:
        reason = "asked for"
    _check_varies(series, task)
    return task, reason


def fit_target(series: "pl.Series", task: str, reason: str, training: np.ndarray) -> Target:
    """What to predict: the labels in all rows, or mean and deviation of the `training` rows (indices)."""
    import polars as pl

    if task == "regression":
        values = to_numbers(series).to_numpy()[training]
        return Quantity(name=series.name, mean=float(values.mean()), scale=float(values.std()) or 1.0, reason=reason)
    numbers = _as_numbers(series)
    typed = numbers if numbers is not None and _is_whole(numbers) else series
    labels = to_texts(typed.unique().sort())
    values = "boolean" if series.dtype == pl.Boolean else "whole number" if typed is numbers else "text"
    return Classes(name=series.name, labels=tuple(labels), values=values, reason=reason)


def to_record(target: Target) -> dict:
    """The target as plain values for JSON; `from_record` undoes it."""
    return {"task": target.task, **asdict(target)}


def from_record(record: Mapping) -> Target:
    content = dict(record)
    return {"classification": Classes, "regression": Quantity}[content.pop("task")](**content)


def _as_numbers(series: "pl.Series") -> "pl.Series | None":
    import polars as pl

    if series.dtype.is_numeric():
        return series.cast(pl.Float64)
    if series.dtype == pl.String:
        numbers = series.cast(pl.Float64, strict=False)
        return None if numbers.has_nulls() else numbers
    return None


def _reason_not_numeric(series: "pl.Series") -> str:
    import polars as pl

    if series.dtype not in (pl.String, pl.Boolean):
        raise DataError(f"target {series.name!r} holds {series.dtype}: expected numbers, text or booleans.")
    return "the target is boolean" if series.dtype == pl.Boolean else "the target is text"


def _judge_numbers(numbers: "pl.Series") -> tuple[str, str]:
    distinct, rows = numbers.n_unique(), len(numbers)
    few = distinct <= 2 or (distinct <= _MOST_WHOLE_NUMBER_CLASSES and distinct * _ROWS_FOR_EACH_WHOLE_NUMBER_CLASS <= rows)
    if not _is_whole(numbers):
        return "regression", "the target holds numbers with fractions"
    if few:
        return "classification", f"the target holds whole numbers, only {distinct} different ones in {rows} rows"
    return "regression", f"the target holds whole numbers, {distinct} different ones in {rows} rows"


def _is_whole(numbers: "pl.Series") -> bool:
    return bool((numbers == numbers.round()).all())


def _check_complete(series: "pl.Series") -> None:
    _check_rows(series, "is missing", series.is_null())
    numbers = _as_numbers(series)
    if numbers is not None:
        _check_rows(series, "is infinite or no number", ~numbers.is_finite())


def _check_rows(series: "pl.Series", what: str, wrong: "pl.Series") -> None:
    rows = wrong.arg_true()
    if len(rows):
        raise DataError(
            f"target {series.name!r} {what} in {len(rows)} of {len(series)} rows, first in row {rows[0] + 1}: "
            "fill them in or leave these rows out."
        )


def _check_varies(series: "pl.Series", task: str) -> None:
    distinct, rows = series.n_unique(), len(series)
    if distinct < 2:
        one = "class" if task == "classification" else "value"
        raise DataError(f"target {series.name!r} is {series[0]!r} in every row: there is nothing to learn with one {one}.")
    if task == "classification" and distinct > rows / 2:
        raise DataError(f"target {series.name!r} has {distinct} values in {rows} rows: too many for classes. Is it a name?")
