"""The first sheet of an Excel file, as text."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from parafit.errors import DataError
from parafit.tables.rows import Rows, Table
from parafit.tables.text import REPEATED_HEADERS, check_column_names, clean_text, repeated_headers

if TYPE_CHECKING:
    import polars as pl


def read_sheet(path: Path) -> Table:
    """The first sheet: a row of names, then rows; empty rows at the end are left out.

    Raises:
        DataError: fastexcel is not installed, or the file holds no table.
    """
    cells, notes = _read_cells(path)
    if not cells.height:
        raise DataError(f"the first sheet of {str(path)!r} is empty: expected a first row with the columns' names.")
    header = [name or "" for name in cells.row(0)]
    check_column_names(header, f"row 1 of {str(path)!r}")
    cells.columns = [name.strip() or f"unnamed_{place}" for place, name in enumerate(header, start=1)]
    cells = cells[1 : _last_row(cells) + 1]
    headers = repeated_headers(cells, header)
    if headers.any():
        notes[REPEATED_HEADERS] = int(headers.sum())
    return Table(frame=clean_text(cells), name=path.name, rows=Rows(first=2), notes=notes).take(np.flatnonzero(~headers))


def _read_cells(path: Path) -> "tuple[pl.DataFrame, dict[str, int]]":
    import polars as pl

    try:
        import fastexcel
    except ImportError as error:
        raise DataError(f"reading {str(path)!r} needs fastexcel: `pip install 'parafit[excel]'`, or save the sheet as CSV.") from error
    try:
        book = fastexcel.read_excel(path)
        names = book.sheet_names
        cells = pl.DataFrame(book.load_sheet(0, header_row=None, dtypes="string"))
    except fastexcel.FastExcelError as error:
        raise DataError(f"cannot read {str(path)!r} as xlsx: {str(error).splitlines()[0]}.") from error
    return cells, {f"read the first of {len(names)} sheets, {names[0]!r}": 0} if len(names) > 1 else {}


def _last_row(cells: "pl.DataFrame") -> int:
    import polars as pl

    filled = cells.select(pl.any_horizontal(pl.all().str.strip_chars() != "")).to_series().arg_true()
    return int(filled[-1]) if len(filled) else 0
