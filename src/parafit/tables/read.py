"""Tables from files and from memory, as polars frames; text files arrive as text, types are recognised in `prepare`."""

import csv
import gzip
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from parafit.errors import DataError

if TYPE_CHECKING:
    import polars as pl

TEXT_FORMATS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
BINARY_FORMATS = {".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow", ".ipc": "arrow"}
MISSING_WORDS = ("", "na", "n/a", "nan", "null", "none", "?")
"""What an empty field may say, in any case."""

_SEPARATORS = (",", ";", "\t", "|")


def read_table(table) -> "pl.DataFrame":
    """A whole table: a path, or a pandas, polars or Arrow frame.

    Every text column comes stripped of blanks around its values, with empty fields and the words of
    `MISSING_WORDS` as null. In CSV and TSV files every column is text.

    Raises:
        DataError: no such file, an ending parafit does not know, or content that cannot be read; for text files the
            message names the line.
    """
    import polars as pl

    if isinstance(table, str | Path):
        frame = pl.concat(list(read_batches(table, rows=1_000_000)))
    else:
        frame = clean_text(_from_memory(table))
    _check_column_names(frame.columns, "the table")
    return frame


def read_batches(path: "str | Path", rows: int) -> "Iterator[pl.DataFrame]":
    """The table in a file, at most `rows` rows at a time, in order; a table without rows is one empty batch.

    In text files with more than one column, a line without any value counts as blank and is left out.

    Raises:
        DataError: as `read_table` does, at the batch where it shows.
    """
    import polars as pl

    path = Path(path)
    _check_is_file(path)
    suffix = table_format(path)
    try:
        scan = _scan_text(path, suffix) if suffix in TEXT_FORMATS else _scan_binary(path, suffix)
        batches = scan.collect_batches(chunk_size=rows, maintain_order=True)
        yield from _clean_batches(batches, scan.collect_schema(), path, suffix)
    except (pl.exceptions.PolarsError, OSError, UnicodeDecodeError) as error:
        if suffix in TEXT_FORMATS:
            _check_lines(path, suffix)
        raise DataError(f"cannot read {str(path)!r} as {suffix[1:]}: {str(error).splitlines()[0]}.") from error


def table_format(path: "str | Path") -> str:
    """The ending that says how a table's file is written, without `.gz`.

    Raises:
        DataError: an ending parafit does not know.

    >>> table_format("houses.CSV.gz")
    '.csv'
    """
    path = Path(path)
    compressed = path.suffix.lower() == ".gz"
    suffix = (path.with_suffix("") if compressed else path).suffix.lower()
    if suffix in TEXT_FORMATS or (suffix in BINARY_FORMATS and not compressed):
        return suffix
    known = ", ".join([*TEXT_FORMATS, *(f"{ending}.gz" for ending in TEXT_FORMATS), *BINARY_FORMATS])
    raise DataError(f"cannot tell the format of {str(path)!r} from its ending {''.join(path.suffixes)!r}: expected one of {known}.")


def clean_text(frame: "pl.DataFrame") -> "pl.DataFrame":
    """`frame` with text stripped, missing words and NaN as null; categorical columns become text."""
    import polars as pl
    import polars.selectors as cs

    text = (cs.string() | cs.categorical() | cs.enum()).cast(pl.String).str.strip_chars()
    return frame.with_columns(
        cs.float().fill_nan(None), pl.when(text.str.to_lowercase().is_in(MISSING_WORDS)).then(None).otherwise(text).name.keep()
    )


def _from_memory(table) -> "pl.DataFrame":
    import narwhals as nw

    try:
        return nw.from_native(table, eager_only=True).to_polars()
    except TypeError as error:
        raise DataError(
            f"cannot read a table from {type(table).__name__}: expected a path to a file, or a pandas, polars or Arrow frame."
        ) from error


def _check_is_file(path: Path) -> None:
    if path.is_file():
        return
    if path.is_dir():
        raise DataError(f"{str(path)!r} is a folder: expected a table's file.")
    beside = sorted(other.name for other in path.parent.glob("*") if other.name.startswith(path.stem[:3])) if path.parent.is_dir() else []
    hint = f" Beside it there is {', '.join(beside[:5])}." if beside else ""
    raise DataError(f"there is no file {str(path)!r}.{hint}")


def _scan_binary(path: Path, suffix: str) -> "pl.LazyFrame":
    import polars as pl

    scan = pl.scan_parquet if BINARY_FORMATS[suffix] == "parquet" else pl.scan_ipc
    return scan(path)


def _scan_text(path: Path, suffix: str) -> "pl.LazyFrame":
    import polars as pl

    header = _read_header(path, suffix)
    _check_column_names(header, repr(str(path)))
    names = [name.strip() or f"unnamed_{index}" for index, name in enumerate(header, start=1)]
    return pl.scan_csv(path, infer_schema=False, separator=_separator(path, suffix), new_columns=names)


def _clean_batches(batches, schema, path: Path, suffix: str) -> "Iterator[pl.DataFrame]":
    import polars as pl

    checked = suffix not in TEXT_FORMATS
    empty = True
    for batch in batches:
        if suffix in TEXT_FORMATS and batch.width > 1:
            batch = batch.filter(~pl.all_horizontal(pl.all().is_null()))
        if not checked and batch.get_column(batch.columns[-1]).has_nulls():  # a line too short reads as a missing last field
            _check_lines(path, suffix)
            checked = True
        if batch.height:
            empty = False
            yield clean_text(batch)
    if empty:
        yield clean_text(pl.DataFrame(schema=schema))


def _separator(path: Path, suffix: str) -> str:
    if suffix != ".csv":
        return TEXT_FORMATS[suffix]
    with _Lines(path) as lines:
        first = next(lines, "")
    return max(_SEPARATORS, key=first.count)


def _read_header(path: Path, suffix: str) -> list[str]:
    with _Lines(path) as lines:
        header = next(csv.reader(lines, delimiter=_separator(path, suffix)), [])
    if not header:
        raise DataError(f"{str(path)!r} is empty: expected a first line with the columns' names.")
    return header


def _check_column_names(names: list[str], where: str) -> None:
    twice = [name for name, count in Counter(name.strip() for name in names).items() if count > 1 and name]
    if twice:
        raise DataError(f"{where} has more than one column named {twice[0]!r}: give each column its own name.")


def _check_lines(path: Path, suffix: str) -> None:
    """Raise DataError for the first line that is not UTF-8, has too few or too many fields, or an unclosed quotation mark."""
    with _Lines(path) as lines:
        reader = csv.reader(lines, delimiter=_separator(path, suffix), strict=True)
        width, start = 0, 1
        try:
            for fields in reader:
                width = width or len(fields)
                if fields and len(fields) != width:
                    raise DataError(
                        f"line {start} of {str(path)!r} has {len(fields)} fields, but the first line names {width} columns: mend that line."
                    )
                start = reader.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"line {start} of {str(path)!r} cannot be read: {error}. Look for a quotation mark that is not closed or not doubled."
            ) from error


class _Lines:
    """The lines of a text file, plain or gzip, decoded as UTF-8; says which line is not."""

    def __init__(self, path: Path):
        self.path, self.line = path, 0

    def __enter__(self):
        opener = gzip.open if self.path.suffix.lower() == ".gz" else open
        self.file = opener(self.path, "rb")
        return self

    def __exit__(self, *_):
        self.file.close()

    def __iter__(self):
        return self

    def __next__(self) -> str:
        content = self._next_bytes()
        self.line += 1
        try:
            return content.decode("utf-8-sig" if self.line == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"line {self.line} of {str(self.path)!r} is not UTF-8 text (byte 0x{content[error.start]:02x} at position {error.start}): "
                "save the file with the encoding UTF-8."
            ) from error

    def _next_bytes(self) -> bytes:
        try:
            return next(self.file)
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(f"{str(self.path)!r} is damaged after line {self.line}: {error}. Fetch or compress it again.") from error
