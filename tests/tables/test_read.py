"""Reading tables: every format gives the same frame, and what cannot be read is named with its line."""

import gzip
import sys
from datetime import datetime

import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from parafit.errors import DataError
from parafit.tables.read import read_batches, read_table, table_format

TABLE = pl.DataFrame({"size": [1.5, None, 3.0], "colour": ["red", None, "blue"], "new": [True, False, None]})
TEXT = {"size": ["1.5", None, "3.0"], "colour": ["red", None, "blue"], "new": ["true", "false", None]}


def read(table):
    return read_table(table).frame


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".csv.gz", ".tsv.gz"])
def test_text_formats_give_text(tmp_path, ending):
    separator = "\t" if ".tsv" in ending else ","
    content = TABLE.write_csv(separator=separator).encode()
    path = write(tmp_path / f"table{ending}", gzip.compress(content) if ending.endswith(".gz") else content)
    assert read(path).to_dict(as_series=False) == TEXT


@pytest.mark.parametrize("ending", [".parquet", ".arrow", ".feather"])
def test_binary_formats_keep_types(tmp_path, ending):
    path = tmp_path / f"table{ending}"
    TABLE.write_parquet(path) if ending == ".parquet" else TABLE.write_ipc(path)
    assert read(str(path)).equals(TABLE)


@pytest.mark.parametrize("convert", [pl.DataFrame.clone, pl.DataFrame.to_pandas, pl.DataFrame.to_arrow])
def test_frames_in_memory(convert):
    assert read(convert(TABLE)).to_dict(as_series=False) == TABLE.to_dict(as_series=False)


WORDS = [" x ", "NA", "n/a", "", "?", "None", "#N/A"]


def test_words_that_say_missing_in_a_text_file(tmp_path):
    path = write(tmp_path / "a.csv", "a,b\n" + "".join(f"{word},1\n" for word in WORDS))
    assert read(path)["a"].to_list() == ["x", None, None, None, None, None, None]


@pytest.mark.parametrize("convert", [pl.DataFrame.clone, pl.DataFrame.to_pandas, pl.DataFrame.to_arrow])
def test_a_text_in_a_frame_is_a_value(convert):
    assert read(convert(pl.DataFrame({"a": [*WORDS, None]})))["a"].to_list() == [*WORDS, None]


def test_a_text_in_parquet_is_a_value(tmp_path):
    pl.DataFrame({"a": WORDS}).write_parquet(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet")["a"].to_list() == WORDS


def test_nan_is_missing_and_categoricals_are_text():
    frame = read(pl.DataFrame({"a": ["x", None], "b": [1.0, float("nan")]}).with_columns(pl.col("a").cast(pl.Categorical)))
    assert frame["a"].dtype == pl.String
    assert frame["b"].to_list() == [1.0, None]


def test_pandas_columns_of_every_make():
    frame = pd.DataFrame(
        {
            "sparse": pd.arrays.SparseArray([0.0, 0.0, 1.5]),
            "mixed": ["007", 7, None],
            "numbers": pd.Series([1, 2.5, None], dtype=object),
            "levels": pd.Categorical(["a", None, "b"]),
            "month": pd.period_range("2024-01", periods=3, freq="M"),
            7: [True, None, False],
        }
    )
    columns = read(frame).to_dict(as_series=False)
    assert columns["sparse"] == [0.0, 0.0, 1.5]
    assert columns["mixed"] == ["007", "7", None]
    assert columns["numbers"] == [1.0, 2.5, None]
    assert columns["levels"] == ["a", None, "b"]
    assert columns["month"][2].isoformat() == "2024-03-01T00:00:00"
    assert columns["7"] == [True, None, False]


def test_a_pandas_column_that_cannot_be_read():
    with pytest.raises(DataError, match="cannot read column 'z' of type complex128"):
        read(pd.DataFrame({"a": [1], "z": [1j]}))


def test_the_same_name_twice_in_pandas():
    with pytest.raises(DataError, match=r"more than one column named 'a' \(columns 1, 3\)"):
        read(pd.DataFrame([[1, 2, 3]], columns=["a", "b", "a"]))


def test_separators_quotes_byte_order_mark_and_blank_lines(tmp_path):
    path = write(tmp_path / "a.csv", '\ufeff"a;b";c\r\n1,5;"x\n""y"""\r\n\r\n2;z\r\n\r\n')
    assert read(path).to_dict(as_series=False) == {"a;b": ["1,5", "2"], "c": ['x\n"y"', "z"]}


def test_a_column_without_a_name(tmp_path):
    assert read(write(tmp_path / "a.csv", ",b\n0,1\n")).columns == ["unnamed_1", "b"]


def test_missing_last_field_is_not_a_short_line(tmp_path):
    assert read(write(tmp_path / "a.csv", "a,b\n1,\n2,3\n"))["b"].to_list() == [None, "3"]


def test_header_alone_is_a_table_without_rows(tmp_path):
    assert read(write(tmp_path / "a.csv", "a,b\n")).shape == (0, 2)


def test_batches_keep_order_and_count(tmp_path):
    path = write(tmp_path / "a.csv", "n\n" + "".join(f"{n}\n" for n in range(10_000)))
    batches = [part.frame for part in read_batches(path, rows=999)]
    assert max(batch.height for batch in batches) <= 999
    assert pl.concat(batches)["n"].to_list() == [str(n) for n in range(10_000)]


BAD_CONTENT = {
    "too many fields": ("a,b\n1,2\n1,2,3\n", "line 3 of .* has 3 fields, but the first line names 2 columns"),
    "too few fields": ("a,b\n1,2\n\n1\n", "line 4 of .* has 1 fields, but the first line names 2 columns"),
    "quotation mark": ('a,b\n1,2\n1,"x\n3,4\n', "line 3 of .* Look for a quotation mark"),
    "damaged UTF-8": ("a,b\n1,é\n".encode() + b"3,caf\xe9\n2,\xc3\xbc", "line 3 of .* is not UTF-8 text, though others are"),
    "damaged UTF-16": ("a,b\n1,2\n".encode("utf-16") + b"\x00\xd8", "begins as utf-16 text, but does not go on as such"),
    "no text": (b"\x89PNG\r\n\x1a\n\x00", "line 2 of .* holds the byte 0x1a: this is no text"),
    "blank lines only": ("\n\n", "is empty"),
    "byte order mark only": ("\ufeff", "is empty"),
    "blank first line": ("\na,b\n1,2\n", "line 1 of .* is blank: expected the columns' names"),
    "empty": ("", "is empty: expected a first line with the columns' names"),
    "same name twice": ("a,b,a\n1,2,3\n", r"line 1 of .* has more than one column named 'a' \(columns 1, 3\)"),
}


@pytest.mark.parametrize("name", BAD_CONTENT)
def test_bad_text_names_the_line(tmp_path, name):
    content, message = BAD_CONTENT[name]
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / "a.csv", content))


def test_ragged_line_far_down(tmp_path):
    path = write(tmp_path / "a.csv", "a,b\n" + "1,2\n" * 40_000 + "1\n" + "1,2\n" * 40_000)
    with pytest.raises(DataError, match="line 40002 of"):
        read(path)


@pytest.mark.parametrize("content", [gzip.compress(b"a,b\n" + b"1,2\n" * 100)[:-10], b"\x1f\x8bxxxx"], ids=["cut short", "not gzip"])
def test_damaged_gzip(tmp_path, content):
    with pytest.raises(DataError, match="is damaged after line"):
        read(write(tmp_path / "a.csv.gz", content))


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
def test_damaged_binary(tmp_path, ending):
    with pytest.raises(DataError, match=f"cannot read .* as {ending[1:]}"):
        read(write(tmp_path / f"a{ending}", b"PAR1"))


def test_missing_file_names_its_neighbours(tmp_path):
    write(tmp_path / "houses.csv", "a\n1\n")
    with pytest.raises(DataError, match=r"there is no file .*house\.csv.*Beside it there is houses\.csv"):
        read(tmp_path / "house.csv")


def test_folder_instead_of_file(tmp_path):
    with pytest.raises(DataError, match="is a folder"):
        read(tmp_path)


def test_unknown_ending(tmp_path):
    with pytest.raises(DataError, match=r"cannot tell the format of .* '.doc': expected one of .csv"):
        read(write(tmp_path / "a.doc", "x"))
    with pytest.raises(DataError, match="cannot tell the format"):
        table_format("a.parquet.gz")


@pytest.mark.parametrize("thing", [[1, 2], {"a": [1]}, pa.array([1]), pd.Series([1])])
def test_not_a_table(thing):
    with pytest.raises(DataError, match=r"cannot read a table from \w+: expected a path"):
        read(thing)


def test_same_name_twice_in_memory():
    with pytest.raises(DataError, match="more than one column named 'a'"):
        read(pl.DataFrame({"a": [1], "a ": [2]}))


TEXTS = {"a": ["1,5", "ñ"], "b": ["2", "é"]}
ENCODINGS = {
    "utf-8": "",
    "utf-8-sig": "",
    "cp1252": "read as cp1252, as it is not UTF-8",
    "latin-1": "read as cp1252, as it is not UTF-8",
    "utf-16": "read as utf-16, as it is not UTF-8",
    "utf-16-le": "read as utf-16-le, as it is not UTF-8",
    "utf-16-be": "read as utf-16-be, as it is not UTF-8",
}


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_encodings_are_recognised_and_told(tmp_path, encoding, compressed):
    content = "a;b\r\n1,5;2\r\nñ;é\r\n".encode(encoding)
    path = write(tmp_path / f"a.csv{'.gz' if compressed else ''}", gzip.compress(content) if compressed else content)
    table = read_table(path)
    assert table.frame.to_dict(as_series=False) == TEXTS
    assert list(table.notes) == ([ENCODINGS[encoding]] if ENCODINGS[encoding] else [])
    assert table.rows.name([1]) == ["line 3"]


def test_bytes_that_cp1252_has_not_are_latin_1(tmp_path):
    assert read(write(tmp_path / "a.csv", b"a;b\n\x81;\xe9\n"))["b"].to_list() == ["é"]


def test_lines_that_end_with_a_carriage_return(tmp_path):
    assert read(write(tmp_path / "a.csv", b"a,b\r1,2\r3,4\r")).rows() == [("1", "2"), ("3", "4")]


def test_rows_of_missing_cells_are_rows_and_blank_lines_are_counted(tmp_path):
    table = read_table(write(tmp_path / "a.csv", 'a,b\n1,"x\ny"\n,\n\n  \n0,0\n\n'))
    assert table.frame.rows() == [("1", "x\ny"), (None, None), ("0", "0")]
    assert table.notes == {"blank lines left out": 3}
    assert table.rows.name([0, 1, 2]) == ["line 2", "line 4", "line 7"]


def test_blank_lines_of_one_column_are_rows(tmp_path):
    assert read(write(tmp_path / "a.csv", 'a\n1\n\n""\n2\n'))["a"].to_list() == ["1", None, None, "2"]


def test_repeated_headers_are_left_out_and_counted(tmp_path):
    path = write(tmp_path / "a.csv", "a, b\n1,2\na,b\n3,4\na,5\n")
    table = read_table(path)
    assert table.frame.rows() == [("1", "2"), ("3", "4"), ("a", "5")]
    assert table.notes == {"repeated header lines left out": 1}
    assert table.rows.name([1]) == ["line 4"]
    parts = list(read_batches(path, rows=1))
    assert pl.concat([part.frame for part in parts]).rows() == table.frame.rows()
    assert [part.rows.name([0]) for part in parts if part.frame.height] == [["line 2"], ["line 4"], ["line 5"]]


@pytest.mark.parametrize(
    ("content", "columns"),
    [
        ("a\n1,5\n2,5\n", ["a"]),
        ("price, net;b\n1,5;2\n", ["price, net", "b"]),
        ("a|b\n1,5|2\n", ["a", "b"]),
        ("a,b;c\n1,2;3\n4,5\n", ["a", "b;c"]),
    ],
)
def test_the_separator_is_what_parts_all_lines(tmp_path, content, columns):
    assert read(write(tmp_path / "a.csv", content)).columns == columns


SHEET = [
    ["size", "code", "day", None],
    [1.5, "007", datetime(2024, 1, 2), True],
    [None] * 4,
    ["size", "code", "day", None],
    [2, "x", None, None],
]


def test_the_first_sheet_of_an_excel_file(tmp_path):
    pytest.importorskip("fastexcel", reason="fastexcel reads Excel files")
    openpyxl = pytest.importorskip("openpyxl", reason="openpyxl writes the test's Excel file")
    book = openpyxl.Workbook()
    for row in SHEET:
        book.active.append(row)
    book.active["A9"] = " "
    book.create_sheet("other")
    book.save(tmp_path / "a.xlsx")
    table = read_table(tmp_path / "a.xlsx")
    assert table.frame.columns == ["size", "code", "day", "unnamed_4"]
    assert table.frame.rows() == [("1.5", "007", "2024-01-02 00:00:00", "true"), (None,) * 4, ("2", "x", None, None)]
    assert table.notes == {"read the first of 2 sheets, 'Sheet'": 0, "repeated header lines left out": 1}
    assert table.rows.name([0, 2]) == ["row 2", "row 5"]
    with pytest.raises(DataError, match=r"cannot read .*b.xlsx' as xlsx"):
        read(write(tmp_path / "b.xlsx", "x"))
    openpyxl.Workbook().save(tmp_path / "c.xlsx")
    with pytest.raises(DataError, match=r"first sheet of .*c.xlsx' is empty"):
        read(tmp_path / "c.xlsx")


def test_excel_without_its_reader(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastexcel", None)
    with pytest.raises(DataError, match=r"needs fastexcel: `pip install 'parafit\[excel\]'`"):
        read(write(tmp_path / "a.xlsx", "x"))
    with pytest.raises(DataError, match="cannot tell the format"):
        table_format("a.xlsx", writing=True)
