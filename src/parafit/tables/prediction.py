"""`predict`: a fitted network on new rows, in memory or from file to file."""

import os
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from parafit import api
from parafit.errors import OutputError
from parafit.tables import network
from parafit.tables.folder import TableModel, read_folder
from parafit.tables.read import BINARY_FORMATS, TEXT_FORMATS, read_batches, read_table, table_format

if TYPE_CHECKING:
    import polars as pl

_STEP_ROWS = 1024
_BATCH_BYTES = 128 * 2**20


@dataclass
class Notes:
    """What a table had that training had not, counted over its rows.

    Attributes:
        rows: rows predicted.
        unseen: for each column, values that training had not seen and that count as missing.
        missing: for each column without missing values in training, how many are missing.
        extra: columns that training had not.
    """

    rows: int = 0
    unseen: Counter = field(default_factory=Counter)
    missing: Counter = field(default_factory=Counter)
    extra: tuple[str, ...] = ()

    def words(self) -> list[str]:
        """A line for each thing to tell."""
        return [
            *(
                f"column {name}: rows with a category that training had not, taken as missing: {count:,}"
                for name, count in (+self.unseen).items()
            ),
            *(f"column {name}: rows without a value, though training had none: {count:,}" for name, count in (+self.missing).items()),
            *([f"columns not used, as training had none of that name: {', '.join(self.extra)}"] if self.extra else []),
        ]


def predict(model: "TableModel | str | Path", table) -> Any:
    """Predictions for the rows of a table, in their order.

    Args:
        model: what `train` returned, or the folder it wrote.
        table: a path, or a pandas, polars or Arrow frame, with the columns of the training table; the target may be absent.

    Returns:
        A frame of the kind that came in (polars for a path) with the column `prediction`, and for classification a
        `probability_…` column for each class.

    Raises:
        DataError: the folder or the table cannot be used, a column is absent, or holds values of another type.
    """
    import narwhals as nw

    fitted = model if isinstance(model, TableModel) else read_folder(model)
    predictions = _predict_frame(fitted, read_table(table), Notes())
    if isinstance(table, str | Path):
        return predictions
    backend = nw.from_native(table, eager_only=True).implementation
    return nw.from_dict({series.name: series.to_list() for series in predictions}, backend=backend).to_native()


def predict_file(model: "TableModel | str | Path", table: "str | Path", out: "str | Path") -> Notes:
    """Predict the rows of a file into another, a part of the rows at a time; the file is there at the end as a whole or not at all.

    Args:
        model: what `train` returned, or the folder it wrote.
        table: the file of the rows.
        out: where the predictions go, in the format that its ending says.

    Raises:
        DataError: as `predict`, or an ending of `out` that parafit does not know.
        OutputError: `out` cannot be written; found before predicting.
    """
    out = Path(out)
    suffix = table_format(out)
    parts = _make_parts_folder(out)
    try:
        fitted = model if isinstance(model, TableModel) else read_folder(model)
        notes = Notes()
        rows = max(_STEP_ROWS, min(2**16, _BATCH_BYTES // (4 * len(fitted.preparation.inputs))))
        for number, batch in enumerate(read_batches(table, rows)):
            _predict_frame(fitted, batch, notes).write_parquet(parts / f"{number:09}.parquet")
        _join(parts, suffix, "gzip" if out.suffix.lower() == ".gz" else "uncompressed")
        os.replace(parts / "all", out)
    except OSError as error:
        raise OutputError(f"cannot write {str(out)!r}: {error}.") from error
    finally:
        shutil.rmtree(parts, ignore_errors=True)
    return notes


def _predict_frame(fitted: TableModel, frame: "pl.DataFrame", notes: Notes) -> "pl.DataFrame":
    inputs = fitted.preparation.transform(frame, first_row=notes.rows + 1)
    notes.rows += frame.height
    notes.unseen.update(inputs.unseen)
    notes.missing.update(inputs.missing)
    notes.extra = inputs.extra
    return fitted.preparation.target.decode(_outputs(fitted, inputs.values))


def _outputs(fitted: TableModel, values: np.ndarray) -> np.ndarray:
    target = fitted.preparation.target
    if not len(values):
        return np.zeros((0, target.output_size))
    outputs = api.predict(fitted.model, values, batch_size=_STEP_ROWS, verbose=0)
    return network.to_predictions(fitted.model, target, outputs)


def _make_parts_folder(out: Path) -> Path:
    if out.is_dir():
        raise OutputError(f"{str(out)!r} is a folder: expected the name of a file for the predictions.")
    try:
        return Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.absolute().parent))
    except OSError as error:
        raise OutputError(f"cannot write {str(out)!r}: {error.strerror}.") from error


def _join(parts: Path, suffix: str, compression: Literal["gzip", "uncompressed"]) -> None:
    import polars as pl

    joined = pl.scan_parquet(sorted(parts.glob("*.parquet")))
    if suffix in TEXT_FORMATS:
        joined.sink_csv(parts / "all", separator=TEXT_FORMATS[suffix], compression=compression)
    elif BINARY_FORMATS[suffix] == "parquet":
        joined.sink_parquet(parts / "all")
    else:
        joined.sink_ipc(parts / "all")
