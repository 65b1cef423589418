"""`predict`: a fitted network on new rows, in memory or from file to file."""

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from parafit import api
from parafit.errors import DataError, OutputError
from parafit.tables import networks
from parafit.tables.columns import Treatment
from parafit.tables.kinds import MOST_BAD
from parafit.tables.model_folder import TableModel, read_folder
from parafit.tables.preprocessing import Inputs
from parafit.tables.read import BINARY_FORMATS, read_batches, read_table, table_format
from parafit.tables.rows import MOST_SHOWN, Table, add_notes, bad_words, note_words, some_of
from parafit.tables.text import TEXT_FORMATS

if TYPE_CHECKING:
    import polars as pl

_STEP_ROWS = 1024
_BATCH_BYTES = 128 * 2**20


@dataclass
class Notes:
    """What a table had that training had not, counted over its rows.

    Attributes:
        rows: rows predicted.
        known: for each column, cells that say something.
        unseen: for each column, values that training had not seen and that count as missing.
        missing: for each column without missing values in training, how many are missing.
        bad: for each column, cells that are not of its kind and count as missing.
        cells: some of the bad cells of each column with their places, in words.
        extra: columns that training had not.
        reading: what reading the table had to do, and how many times.
    """

    rows: int = 0
    known: Counter = field(default_factory=Counter)
    unseen: Counter = field(default_factory=Counter)
    missing: Counter = field(default_factory=Counter)
    bad: Counter = field(default_factory=Counter)
    cells: dict[str, list[str]] = field(default_factory=dict)
    extra: tuple[str, ...] = ()
    reading: dict[str, int] = field(default_factory=dict)

    def count(self, table: Table, inputs: Inputs) -> None:
        """Count another part of the table in.

        Args:
            table: the part.
            inputs: what preprocessing made of it.
        """
        self.rows += table.frame.height
        self.known.update(inputs.known)
        self.unseen.update(inputs.unseen)
        self.missing.update(inputs.missing)
        self.bad.update({name: len(rows) for name, rows in inputs.bad.items()})
        self.extra = inputs.extra
        add_notes(self.reading, table.notes)
        for name, rows in inputs.bad.items():
            shown = self.cells.setdefault(name, [])
            if len(shown) < MOST_SHOWN:
                shown += table.rows.cells(table.frame.get_column(name), rows)

    def check(self, treatments: Iterable[Treatment]) -> None:
        """Raise DataError if too many cells of a column are not of its kind."""
        for treatment in treatments:
            count, known = self.bad[treatment.name], self.known[treatment.name]
            if count > MOST_BAD * known:
                raise DataError(
                    f"column {treatment.name!r} holds {some_of(self.cells[treatment.name], count)}: expected {treatment.expected}, "
                    f"as in training ({count:,} of {known:,} cells are none; at most {MOST_BAD:.0%} may be, and count as missing)."
                )

    def words(self) -> list[str]:
        """A line for each thing to tell."""
        return [
            *note_words(self.reading),
            *bad_words({name: (cells, self.bad[name]) for name, cells in self.cells.items()}),
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
    notes = Notes()
    predictions = _predict_part(fitted, read_table(table), notes)
    notes.check(fitted.preparation.treatments)
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
        OutputError: `out` cannot be written, or is the table itself; found before predicting.
    """
    out = Path(out)
    suffix = table_format(out, writing=True)
    _check_other_file(Path(table), out)
    parts = _make_parts_folder(out)
    try:
        fitted = model if isinstance(model, TableModel) else read_folder(model)
        notes = Notes()
        rows = max(_STEP_ROWS, min(2**16, _BATCH_BYTES // (4 * len(fitted.preparation.inputs))))
        for number, part in enumerate(read_batches(table, rows)):
            _predict_part(fitted, part, notes).write_parquet(parts / f"{number:09}.parquet")
        notes.check(fitted.preparation.treatments)
        _join(parts, suffix, "gzip" if out.suffix.lower() == ".gz" else "uncompressed")
        os.replace(parts / "all", out)
    except OSError as error:
        raise OutputError(f"cannot write {str(out)!r}: {error}.") from error
    finally:
        shutil.rmtree(parts, ignore_errors=True)
    return notes


def _predict_part(fitted: TableModel, table: Table, notes: Notes) -> "pl.DataFrame":
    inputs = fitted.preparation.transform(table.frame)
    notes.count(table, inputs)
    return fitted.preparation.target.decode(_outputs(fitted, inputs.values))


def _outputs(fitted: TableModel, values: np.ndarray) -> np.ndarray:
    target = fitted.preparation.target
    if not len(values):
        return np.zeros((0, target.output_size))
    outputs = api.predict(fitted.model, values, batch_size=_STEP_ROWS, verbose=0)
    return networks.to_predictions(fitted.model, target, outputs)


def _check_other_file(table: Path, out: Path) -> None:
    if table.exists() and out.exists() and table.samefile(out):
        raise OutputError(f"the predictions would replace {str(table)!r}, the table they are made from: choose another name.")


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
