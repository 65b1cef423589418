"""From a table to the network's inputs: recognise each column, choose its treatment, keep what it learnt as JSON."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from parafit.errors import DataError
from parafit.tables import columns
from parafit.tables.columns import TREATMENTS, Category, Treatment
from parafit.tables.kinds import Reading, is_identifier, recognise
from parafit.tables.rows import Rows
from parafit.tables.target import Target, from_record, to_record

if TYPE_CHECKING:
    import polars as pl

_FORMAT = 2
_ROWS_TO_JUDGE = 20
_ROWS = Rows()
_KINDS = {**TREATMENTS, "text": Category}


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How a table becomes the network's inputs and its outputs become predictions.

    Args:
        treatments: one for each column that is used, in the order of the network's inputs.
        dropped: why each other column is not used.
        target: what is predicted.
    """

    treatments: tuple[Treatment, ...]
    dropped: Mapping[str, str] = field(hash=False)
    target: Target

    @property
    def inputs(self) -> list[str]:
        """The names of the network's inputs."""
        return [name for treatment in self.treatments for name in treatment.inputs]

    def transform(self, frame: "pl.DataFrame") -> "Inputs":
        """The network's inputs for the rows of a table that `read` gave.

        Raises:
            DataError: a column is absent, or of another type than in training.
        """
        check_columns(frame, [treatment.name for treatment in self.treatments])
        parts = {treatment.name: treatment.transform(frame.get_column(treatment.name)) for treatment in self.treatments}
        used = {treatment.name: treatment for treatment in self.treatments}
        return Inputs(
            values=np.concatenate([np.zeros((frame.height, 0), np.float32), *(part.values for part in parts.values())], axis=1),
            known={name: frame.height - part.missing + len(part.bad) for name, part in parts.items()},
            unseen={name: part.unseen for name, part in parts.items()},
            missing={name: 0 if used[name].missing else part.missing - len(part.bad) for name, part in parts.items()},
            bad={name: part.bad for name, part in parts.items() if len(part.bad)},
            extra=tuple(name for name in frame.columns if name not in {*used, *self.dropped, self.target.name}),
        )

    def to_json(self) -> str:
        """The text that `from_json` reads."""
        content = {
            "format": _FORMAT,
            "target": to_record(self.target),
            "columns": [columns.to_record(treatment) for treatment in self.treatments],
            "dropped": dict(self.dropped),
        }
        return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Preparation":
        """What `to_json` wrote.

        Raises:
            DataError: not JSON, or of another format.
        """
        try:
            content = json.loads(text)
            if content["format"] != _FORMAT:
                raise DataError(f"this preprocessing has format {content['format']}; this parafit reads format {_FORMAT}. Train again.")
            treatments = tuple(columns.from_record(record) for record in content["columns"])
            return cls(treatments=treatments, dropped=content["dropped"], target=from_record(content["target"]))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(
                f"this is not what parafit wrote as preprocessing.json ({type(error).__name__}: {error}). Train again."
            ) from error


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """A table as the network sees it.

    Args:
        values: float32 of shape (rows, inputs).
        known: for each column, how many cells say something.
        unseen: for each column, how many values training had not seen; they count as missing.
        missing: for each column without missing values in training, how many are missing here.
        bad: for each column that has some, the rows (indices) of cells that are not of its kind; they count as missing.
        extra: columns that training had not.
    """

    values: np.ndarray
    known: Mapping[str, int]
    unseen: Mapping[str, int]
    missing: Mapping[str, int]
    bad: Mapping[str, np.ndarray]
    extra: tuple[str, ...]


def fit_preparation(frame: "pl.DataFrame", target: Target, training: np.ndarray, rows: Rows = _ROWS) -> Preparation:
    """Choose and fit a treatment for every column but the target; statistics come from the training rows alone.

    Args:
        frame: the table.
        target: the column to predict.
        training: the training rows (indices).
        rows: names its rows in messages.

    Raises:
        DataError: no column is left to learn from, or one holds numbers or times and too many cells that are none.
    """
    treatments, dropped = [], {}
    for name, reading in recognise(frame, rows).items():
        if name == target.name:
            continue
        reading = _as_identifier(frame.get_column(name), reading)
        reason = _reason_to_drop(reading, training)
        if reason:
            dropped[name] = reason
        else:
            treatments.append(_KINDS[reading.kind].fit(reading, training))
    if not treatments:
        why = "; ".join(f"{name}: {reason}" for name, reason in dropped.items()) or "the target is the only column"
        raise DataError(f"no column is left to predict {target.name!r} from ({why}).")
    return Preparation(treatments=tuple(treatments), dropped=dropped, target=target)


def check_columns(frame: "pl.DataFrame", names: list[str]) -> None:
    """Raise DataError when `frame` lacks one of these columns, with what it has instead.

    Args:
        frame: a table.
        names: names of the columns that it should have.
    """
    import difflib

    absent = [name for name in names if name not in frame.columns]
    if not absent:
        return
    close = difflib.get_close_matches(absent[0], frame.columns, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    others = f" (and {len(absent) - 1} more: {', '.join(map(repr, absent[1:6]))})" if len(absent) > 1 else ""
    has = ", ".join(map(repr, frame.columns[:12])) + (", …" if frame.width > 12 else "") or "no columns"
    raise DataError(f"the table has no column {absent[0]!r}{others}; it has {has}.{hint}")


def _as_identifier(series: "pl.Series", reading: Reading) -> Reading:
    """Whole numbers that are identifiers by their name and come more than once are categories."""
    if reading.kind != "number" or len(reading.bad) or not is_identifier(reading.values) or _differs_everywhere(reading):
        return reading
    return replace(reading, kind="text", values=columns.to_texts(series), reason="an identifier by its name")


def _reason_to_drop(reading: Reading, training: np.ndarray) -> str | None:
    if reading.kind == "other":
        return f"values of type {reading.values.dtype} are not used"
    seen = reading.values.gather(training)
    if seen.null_count() == len(seen):
        return "no value in the training rows"
    if seen.n_unique() == 1:
        return f"the same value everywhere ({columns.to_texts(seen)[0]})"
    return _reason_identifier(reading)


def _reason_identifier(reading: Reading) -> str | None:
    if reading.kind == "text":
        known = reading.values.drop_nulls()
        distinct = known.n_unique()
        if distinct > max(_ROWS_TO_JUDGE, 0.5 * len(known)):
            words = f"text that hardly repeats ({distinct} different values in {len(known)} rows)"
            return f"{words}; {reading.reason}" if reading.reason else words
    elif reading.kind == "number" and len(reading.values) >= _ROWS_TO_JUDGE:
        numbers = reading.values.to_numpy()
        if numbers[0] in (0, 1) and np.all(np.diff(numbers) == 1):
            return "it numbers the rows"
        if is_identifier(reading.values) and _differs_everywhere(reading):
            return "an identifier by its name, different in every row"
    return None


def _differs_everywhere(reading: Reading) -> bool:
    return reading.values.n_unique() == len(reading.values) >= _ROWS_TO_JUDGE and not reading.values.has_nulls()
