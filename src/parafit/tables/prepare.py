"""From a table to the network's inputs: recognise each column, choose its treatment, keep what it learnt as JSON."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from parafit.errors import DataError
from parafit.tables import columns
from parafit.tables.columns import Boolean, Category, Number, Time, Treatment
from parafit.tables.target import Target, from_record, to_record

if TYPE_CHECKING:
    import polars as pl

_FORMAT = 1
_ROWS_TO_JUDGE = 20
_IDENTIFIER_NAME = re.compile(r"(?i:(^|[\W_])(id|uuid|guid|index|row|rownum|rownames)$|^unnamed)|[a-z](Id|ID)$")


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

    def transform(self, frame: "pl.DataFrame", first_row: int = 1) -> "Inputs":
        """The network's inputs for the rows of a table that `read` gave.

        Raises:
            DataError: a column is absent, or holds values of another type than in training.
        """
        check_columns(frame, [treatment.name for treatment in self.treatments])
        parts, unseen, missing = [np.zeros((frame.height, 0), np.float32)], {}, {}
        for treatment in self.treatments:
            series = frame.get_column(treatment.name)
            part, unseen[treatment.name] = treatment.transform(series, first_row)
            missing[treatment.name] = 0 if treatment.missing else series.null_count()
            parts.append(part)
        extra = tuple(name for name in frame.columns if name not in {*missing, *self.dropped, self.target.name})
        return Inputs(values=np.concatenate(parts, axis=1), unseen=unseen, missing=missing, extra=extra)

    def to_json(self) -> str:
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
        unseen: for each column, how many values training had not seen; they count as missing.
        missing: for each column without missing values in training, how many are missing here.
        extra: columns that training had not.
    """

    values: np.ndarray
    unseen: Mapping[str, int]
    missing: Mapping[str, int]
    extra: tuple[str, ...]


def fit_preparation(frame: "pl.DataFrame", target: Target, training: np.ndarray) -> Preparation:
    """Choose and fit a treatment for every column but the target; statistics come from the `training` rows (indices).

    Raises:
        DataError: no column is left to learn from, or one holds infinite numbers.
    """
    treatments, dropped = [], {}
    for series in frame.drop(target.name).iter_columns():
        seen = series.gather(training)
        reason = _reason_to_drop(series, seen)
        if reason:
            dropped[series.name] = reason
        else:
            treatments.append(_recognise(series).fit(series, training))
    if not treatments:
        why = "; ".join(f"{name}: {reason}" for name, reason in dropped.items()) or "the target is the only column"
        raise DataError(f"no column is left to predict {target.name!r} from ({why}).")
    return Preparation(treatments=tuple(treatments), dropped=dropped, target=target)


def check_columns(frame: "pl.DataFrame", names: list[str]) -> None:
    """Raise DataError when `frame` lacks one of these columns, with what it has instead."""
    import difflib

    absent = [name for name in names if name not in frame.columns]
    if not absent:
        return
    close = difflib.get_close_matches(absent[0], frame.columns, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    others = f" (and {len(absent) - 1} more: {', '.join(map(repr, absent[1:6]))})" if len(absent) > 1 else ""
    has = ", ".join(map(repr, frame.columns[:12])) + (", …" if frame.width > 12 else "")
    raise DataError(f"the table has no column {absent[0]!r}{others}; it has {has}.{hint}")


def _reason_to_drop(series: "pl.Series", seen: "pl.Series") -> str | None:
    import polars as pl

    if not (series.dtype.is_numeric() or series.dtype in (pl.String, pl.Boolean, pl.Date, pl.Datetime, pl.Duration, pl.Null)):
        return f"values of type {series.dtype} are not used"
    if seen.null_count() == len(seen):
        return "no value in the training rows"
    if seen.n_unique() == 1:
        return f"the same value everywhere ({seen[0]})"
    return _reason_identifier(series)


def _reason_identifier(series: "pl.Series") -> str | None:
    known = series.drop_nulls()
    distinct = known.n_unique()
    kind = _recognise(series)
    if kind is Category and distinct > max(_ROWS_TO_JUDGE, 0.5 * len(known)):
        return f"text that hardly repeats ({distinct} different values in {len(known)} rows)"
    if kind is Number and distinct == len(series) >= _ROWS_TO_JUDGE:
        numbers = columns.to_numbers(series).to_numpy()
        if numbers[0] in (0, 1) and np.all(np.diff(numbers) == 1):
            return "it numbers the rows"
        if _IDENTIFIER_NAME.search(series.name) and np.all(numbers == np.round(numbers)):
            return "an identifier by its name, different in every row"
    return None


def _recognise(series: "pl.Series") -> type[Treatment]:
    import polars as pl

    if series.dtype == pl.Boolean:
        return Boolean
    if series.dtype in (pl.Date, pl.Datetime):
        return Time
    if series.dtype != pl.String:
        return Number
    return _recognise_text(series.drop_nulls())


def _recognise_text(known: "pl.Series") -> type[Treatment]:
    import polars as pl

    if not known.cast(pl.Float64, strict=False).has_nulls():
        codes = known.str.contains(r"^0\d").any()  # 007 and 02139 are names, not numbers
        return Category if codes else Number
    if known.str.to_lowercase().is_in(["true", "false"]).all():
        return Boolean
    if known.str.contains(r"^\d{4}-\d{2}-\d{2}").all() and not columns.parse_times(known).has_nulls():
        return Time
    return Category
