"""Tables from files and from memory, as polars frames; text files and sheets arrive as text, types are recognised in `kinds`."""

from collections.abc import Iterator
from pathlib import Path

from parafit.errors import DataError
from parafit.tables.memory import from_memory
from parafit.tables.rows import Rows, Table, add_notes
from parafit.tables.sheet import read_sheet
from parafit.tables.text import TEXT_FORMATS, read_text

BINARY_FORMATS = {".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow", ".ipc": "arrow"}
SHEET_FORMATS = (".xlsx",)


def read_table(table) -> Table:
    """A whole table: a path, or a pandas, polars or Arrow frame.

    In CSV and TSV files and in sheets every column is text, stripped of blanks around its values, with empty fields and the
    words of `text.MISSING_WORDS` as null. In other files and in frames a text is a value, whatever it says.

    Raises:
        DataError: no such file, an ending parafit does not know, or content that cannot be read; for text files the
            message names the line.
    """
    import numpy as np
    import polars as pl

    if not isinstance(table, str | Path):
        return from_memory(table)
    parts = list(read_batches(table, rows=1_000_000))
    if len(parts) == 1:
        return parts[0]
    notes: dict[str, int] = {}
    for part in parts:
        add_notes(notes, part.notes)
    numbers = [part.rows.numbers for part in parts]
    rows = Rows() if numbers[0] is None else Rows(numbers=np.concatenate(numbers), lines=parts[0].rows.lines)  # type: ignore[arg-type]
    return Table(frame=pl.concat([part.frame for part in parts]), name=parts[0].name, rows=rows, notes=notes)


def read_batches(path: "str | Path", rows: int) -> Iterator[Table]:
    """The table in a file, at most `rows` rows at a time, in order; a table without rows is one empty part.

    Args:
        path: path of the file.
        rows: number of rows in a part, at most.

    Raises:
        DataError: as `read_table` does, at the part where it shows.
    """
    path = Path(path)
    _check_is_file(path)
    suffix = table_format(path)
    if suffix in TEXT_FORMATS:
        return read_text(path, suffix, rows)
    return _read_binary(path, suffix, rows) if suffix in BINARY_FORMATS else iter([read_sheet(path)])


def table_format(path: "str | Path", *, writing: bool = False) -> str:
    """The ending that says how a table's file is written, without `.gz`.

    Args:
        path: path of the file.
        writing: whether it is to be written rather than read.

    Raises:
        DataError: an ending parafit does not know, or cannot write.

    >>> table_format("houses.CSV.gz")
    '.csv'
    """
    path = Path(path)
    compressed = path.suffix.lower() == ".gz"
    suffix = (path.with_suffix("") if compressed else path).suffix.lower()
    whole = [*BINARY_FORMATS, *(() if writing else SHEET_FORMATS)]
    if suffix in TEXT_FORMATS or (suffix in whole and not compressed):
        return suffix
    known = ", ".join([*TEXT_FORMATS, *(f"{ending}.gz" for ending in TEXT_FORMATS), *whole])
    raise DataError(f"cannot tell the format of {str(path)!r} from its ending {''.join(path.suffixes)!r}: expected one of {known}.")


def _check_is_file(path: Path) -> None:
    if path.is_file():
        return
    if path.is_dir():
        raise DataError(f"{str(path)!r} is a folder: expected a table's file.")
    beside = sorted(other.name for other in path.parent.glob("*") if other.name.startswith(path.stem[:3])) if path.parent.is_dir() else []
    hint = f" Beside it there is {', '.join(beside[:5])}." if beside else ""
    raise DataError(f"there is no file {str(path)!r}.{hint}")


def _read_binary(path: Path, suffix: str, rows: int) -> Iterator[Table]:
    import polars as pl

    try:
        scan = pl.scan_parquet(path) if BINARY_FORMATS[suffix] == "parquet" else pl.scan_ipc(path)
        empty, start = scan.head(0).collect(), 1
        for batch in scan.collect_batches(chunk_size=rows, maintain_order=True):
            if batch.height:
                yield from_memory(batch, name=path.name, first_row=start)
                start += batch.height
        if start == 1:
            yield from_memory(empty, name=path.name)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"cannot read {str(path)!r} as {suffix[1:]}: {str(error).splitlines()[0]}.") from error
