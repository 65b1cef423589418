"""Tables in text files: encoding, separator, header, lines that are no rows, and which line a row stands in."""

import codecs
import csv
import gzip
import io
import re
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from parafit.errors import DataError
from parafit.tables.rows import Rows, Table

if TYPE_CHECKING:
    import polars as pl

TEXT_FORMATS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
MISSING_WORDS = ("", "na", "n/a", "#n/a", "<na>", "nan", "null", "none", "?")
"""What an empty field may say, in any case."""

REPEATED_HEADERS = "repeated header lines left out"
_SEPARATORS = (";", "\t", "|", ",")  # commas stand inside numbers and names more often than the others
_LINES_TO_JUDGE = 50
_BLOCK = 2**20
_MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_BINARY = re.compile(rb"[\x00-\x08\x0e-\x1a]")


def read_text(path: Path, suffix: str, rows: int) -> Iterator[Table]:
    """The table in a text file, at most `rows` rows at a time; every column is text.

    A line without any value is left out where the table has more than one column, and so is a line that repeats the
    header; both are counted.

    Args:
        path: path of the file.
        suffix: its format, such as ".csv".
        rows: number of rows in a part, at most.

    Raises:
        DataError: with the line that cannot be read.
    """
    import polars as pl

    with _as_utf8(path) as (file, encoding):
        form = _find_form(file, suffix, path)
        scan = pl.scan_csv(file, infer_schema=False, separator=form.separator, new_columns=form.names)
        try:
            yield from _tables(scan, file, form, encoding, rows)
        except (pl.exceptions.PolarsError, OSError) as error:
            _blank_records(file, form)
            raise DataError(f"cannot read {str(path)!r} as {suffix[1:]}: {str(error).splitlines()[0]}.") from error


@dataclass(frozen=True, kw_only=True)
class _Form:
    """What a text file's first lines tell: the path in messages, what parts fields, the header as it stands there."""

    path: Path
    separator: str
    header: list[str]

    @property
    def names(self) -> list[str]:
        return [name.strip() or f"unnamed_{index}" for index, name in enumerate(self.header, start=1)]


def check_column_names(names: list[str], where: str) -> None:
    """Raise DataError if two columns have one name.

    Args:
        names: names of the columns, in order.
        where: the table, in words.
    """
    twice = [name for name, count in Counter(name.strip() for name in names).items() if count > 1 and name]
    if twice:
        places = [str(place) for place, name in enumerate(names, start=1) if name.strip() == twice[0]]
        raise DataError(
            f"{where} has more than one column named {twice[0]!r} (columns {', '.join(places)}): give each column its own name."
        )


def clean_text(frame: "pl.DataFrame") -> "pl.DataFrame":
    """`frame` with the blanks around its texts gone, and null for what says that it is missing."""
    import polars as pl
    import polars.selectors as cs

    text = cs.string().str.strip_chars()
    return frame.with_columns(pl.when(says_missing(text)).then(None).otherwise(text).name.keep())


def says_missing(text):
    """Whether texts, stripped of blanks, are empty or a word of `MISSING_WORDS`."""
    return text.str.to_lowercase().is_in(MISSING_WORDS)


def repeated_headers(batch: "pl.DataFrame", header: list[str]) -> np.ndarray:
    """Which rows say the header again, as where files were put one after the other.

    Args:
        batch: some rows of a table.
        header: names of its columns.
    """
    import polars as pl

    named = [place for place, name in enumerate(header) if name.strip()]
    if batch.width < 2 or len(named) < 2:
        return np.zeros(batch.height, bool)
    rows = (batch.to_series(named[0]).str.strip_chars() == header[named[0]].strip()).fill_null(False).arg_true()
    equal = np.zeros(batch.height, bool)
    if len(rows):
        some = batch[rows].select(pl.all().fill_null("").str.strip_chars())
        equal[rows.to_numpy()] = [list(row) == [name.strip() for name in header] for row in some.iter_rows()]
    return equal


def _tables(scan: "pl.LazyFrame", file: Path, form: _Form, encoding: str, rows: int) -> Iterator[Table]:
    blank, start, batches = None, 0, 0
    first = {f"read as {encoding}, as it is not UTF-8": 0} if encoding != "utf-8" else {}
    lines = partial(_lines_of, form.path, form.separator)
    for batch in scan.collect_batches(chunk_size=rows, maintain_order=True):
        if blank is None and batch.width > 1 and batch.get_column(batch.columns[-1]).has_nulls():  # as a line too short is read
            blank = _blank_records(file, form)
        records = np.arange(start, start + batch.height)
        blanks = np.isin(records, [] if blank is None else blank)
        headers = repeated_headers(batch, form.header)
        kept = ~(blanks | headers)
        start += batch.height
        if kept.any() or (not batches and batch.height == 0):
            notes = {"blank lines left out": int(blanks.sum()), REPEATED_HEADERS: int(headers.sum())}
            counted = {words: count for words, count in notes.items() if count}
            frame = batch if kept.all() else batch.filter(kept)
            yield Table(frame=clean_text(frame), name=form.path.name, rows=Rows(numbers=records[kept], lines=lines), notes=first | counted)
            batches, first = batches + 1, {}
    if not batches:
        yield Table(frame=scan.head(0).collect(), name=form.path.name, rows=Rows(numbers=np.arange(0), lines=lines), notes=first)


def _find_form(file: Path, suffix: str, path: Path) -> _Form:
    with _open(file) as binary:
        first = list(islice(binary, _LINES_TO_JUDGE))
    lines = [line.decode("utf-8-sig" if place == 0 else "utf-8") for place, line in enumerate(first)]
    if not "".join(lines).strip():
        raise DataError(f"{str(path)!r} is empty: expected a first line with the columns' names.")
    separator = TEXT_FORMATS[suffix] if suffix != ".csv" else _separator(lines)
    header = next(csv.reader(lines, delimiter=separator))
    if not any(name.strip() for name in header):
        raise DataError(f"line 1 of {str(path)!r} is blank: expected the columns' names.")
    check_column_names(header, f"line 1 of {str(path)!r}")
    return _Form(path=path, separator=separator, header=header)


def _separator(lines: list[str]) -> str:
    """What parts the header into columns: best what parts the other lines into as many."""

    def worth(separator: str) -> tuple:
        records = [fields for fields in csv.reader(lines, delimiter=separator) if fields]
        widths = [len(fields) for fields in (records if len(lines) < _LINES_TO_JUDGE else records[:-1])]  # the last may be cut
        consistent = len(set(widths)) == 1
        return widths[0] > 1, consistent, widths[0]

    return max(_SEPARATORS, key=worth)


def _blank_records(file: Path, form: _Form) -> np.ndarray:
    """The records (counted from 0 after the header) that are blank lines.

    Raises:
        DataError: for the first line with too few or too many fields, or an unclosed quotation mark.
    """
    width, start, blank = len(form.header), 1, []
    with _open(file) as binary:
        reader = csv.reader(codecs.iterdecode(binary, "utf-8-sig"), delimiter=form.separator, strict=True)
        try:
            for record, fields in enumerate(reader):
                if len(fields) != width:
                    if "".join(fields).strip() or len(fields) > 1:
                        raise DataError(
                            f"line {start} of {str(form.path)!r} has {len(fields)} fields, but the first line names {width} columns: "
                            "mend that line."
                        )
                    blank.append(record - 1)
                start = reader.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"line {start} of {str(form.path)!r} cannot be read: {error}. Look for a quotation mark that is not closed or not doubled."
            ) from error
    return np.array(blank, int)


def _lines_of(path: Path, separator: str, records: list[int]) -> list[int]:
    """The lines in which these records (counted from 0 after the header) begin."""
    wanted, starts = set(records), {}
    with _as_utf8(path) as (file, _), _open(file) as binary:
        reader = csv.reader(codecs.iterdecode(binary, "utf-8-sig"), delimiter=separator)
        start = 1
        for record, _ in enumerate(islice(reader, max(records, default=0) + 2), start=-1):
            if record in wanted:
                starts[record] = start
            start = reader.line_num + 1
    return [starts[record] for record in records]


@contextmanager
def _as_utf8(path: Path) -> Iterator[tuple[Path, str]]:
    """The file, or a copy of it in UTF-8 with usual line ends, and the encoding that the file has."""
    encoding, usual_ends = _judge_bytes(path)
    if encoding == "utf-8" and usual_ends:
        yield path, encoding
        return
    with tempfile.NamedTemporaryFile(suffix=".csv") as copy:
        try:
            with _open(path) as binary, io.TextIOWrapper(binary, encoding=encoding, newline=None) as text:
                for block in iter(partial(text.read, _BLOCK), ""):
                    copy.write(block.encode())
        except UnicodeError as error:
            raise DataError(f"{str(path)!r} begins as {encoding} text, but does not go on as such ({error}). Save it as UTF-8.") from error
        copy.flush()
        yield Path(copy.name), encoding


def _judge_bytes(path: Path) -> tuple[str, bool]:
    """The encoding of a text file, and whether its lines end with a line feed.

    Raises:
        DataError: no text, or damaged.
    """
    try:
        with _open(path) as binary:
            head = binary.read(_BLOCK)
        return _find_encoding(path, head), b"\n" in head or b"\r" not in head
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{str(path)!r} is damaged after line {_whole_lines(path)}: {error}. Fetch or compress it again.") from error


def _find_encoding(path: Path, head: bytes) -> str:
    for mark, encoding in _MARKS.items():
        if head.startswith(mark):
            return encoding
    if wide := _without_mark(head):
        return wide
    if found := _BINARY.search(head):
        line = head.count(b"\n", 0, found.start()) + 1
        raise DataError(f"line {line} of {str(path)!r} holds the byte 0x{found[0].hex()}: this is no text. Is the file's ending right?")
    wrong = _first_wrong(path, "utf-8")
    if wrong is None:
        return "utf-8"
    if _is_mostly_utf8(path):
        raise DataError(f"line {wrong} of {str(path)!r} is not UTF-8 text, though others are: mend that line, or save the file as UTF-8.")
    return "latin-1" if _first_wrong(path, "cp1252") else "cp1252"


def _without_mark(head: bytes) -> str | None:
    """UTF-16 without a byte order mark: every other byte of Western text is zero."""
    for encoding, zeros in (("utf-16-le", head[1:1000:2]), ("utf-16-be", head[0:1000:2])):
        if zeros.count(0) > len(zeros) / 2:
            return encoding
    return None


def _first_wrong(path: Path, encoding: str) -> int | None:
    """The first line that is not text in this encoding."""
    decoder, line = codecs.getincrementaldecoder(encoding)(), 1
    with _open(path) as binary:
        try:
            for block in iter(partial(binary.read, _BLOCK), b""):
                decoder.decode(block)
                line += block.count(b"\n")
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            return line + error.object.count(b"\n", 0, error.start)
    return None


def _is_mostly_utf8(path: Path) -> bool:
    """Whether more of the letters beyond ASCII are UTF-8 than are not: a damaged file, not another encoding."""
    good = bad = 0
    with _open(path) as binary:
        for block in iter(partial(binary.read, _BLOCK), b""):
            beyond = [letter for letter in block.decode("utf-8", errors="replace") if letter > "\x7f"]
            wrong = beyond.count("\ufffd")
            good, bad = good + len(beyond) - wrong, bad + wrong
    return good > bad


def _whole_lines(path: Path) -> int:
    count = 0
    try:
        with _open(path) as binary:
            for _ in binary:
                count += 1
    except (EOFError, OSError, zlib.error):
        pass
    return count


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else open(path, "rb")  # type: ignore[return-value]
