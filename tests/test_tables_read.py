"""Reading tables: every format gives the same frame, and what cannot be read is named with its line."""

import gzip

import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from parafit.errors import DataError
from parafit.tables.read import read_batches, read_table, table_format

TABLE = pl.DataFrame({"size": [1.5, None, 3.0], "colour": ["red", None, "blue"], "new": [True, False, None]})
TEXT = {"size": ["1.5", None, "3.0"], "colour": ["red", None, "blue"], "new": ["true", "false", None]}


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".csv.gz", ".tsv.gz"])
def test_text_formats_give_text(tmp_path, ending):
    separator = "\t" if ".tsv" in ending else ","
    content = TABLE.write_csv(separator=separator).encode()
    path = write(tmp_path / f"table{ending}", gzip.compress(content) if ending.endswith(".gz") else content)
    assert read_table(path).to_dict(as_series=False) == TEXT


@pytest.mark.parametrize("ending", [".parquet", ".arrow", ".feather"])
def test_binary_formats_keep_types(tmp_path, ending):
    path = tmp_path / f"table{ending}"
    TABLE.write_parquet(path) if ending == ".parquet" else TABLE.write_ipc(path)
    assert read_table(str(path)).equals(TABLE)


@pytest.mark.parametrize("convert", [pl.DataFrame.clone, pl.DataFrame.to_pandas, pl.DataFrame.to_arrow])
def test_frames_in_memory(convert):
    assert read_table(convert(TABLE)).to_dict(as_series=False) == TABLE.to_dict(as_series=False)


def test_missing_words_blanks_nan_and_categoricals():
    frame = pl.DataFrame({"a": [" x ", "NA", "n/a", "", "?", "None"], "b": [1.0, float("nan"), 2, 3, 4, 5]})
    read = read_table(frame.with_columns(c=pl.col("a").cast(pl.Categorical)))
    assert read["a"].to_list() == read["c"].to_list() == ["x", None, None, None, None, None]
    assert read["c"].dtype == pl.String
    assert read["b"].to_list() == [1.0, None, 2, 3, 4, 5]


def test_separators_quotes_byte_order_mark_and_blank_lines(tmp_path):
    path = write(tmp_path / "a.csv", '\ufeff"a;b";c\r\n1,5;"x\n""y"""\r\n\r\n2;z\r\n\r\n')
    assert read_table(path).to_dict(as_series=False) == {"a;b": ["1,5", "2"], "c": ['x\n"y"', "z"]}


def test_a_column_without_a_name(tmp_path):
    assert read_table(write(tmp_path / "a.csv", ",b\n0,1\n")).columns == ["unnamed_1", "b"]


def test_missing_last_field_is_not_a_short_line(tmp_path):
    assert read_table(write(tmp_path / "a.csv", "a,b\n1,\n2,3\n"))["b"].to_list() == [None, "3"]


def test_header_alone_is_a_table_without_rows(tmp_path):
    assert read_table(write(tmp_path / "a.csv", "a,b\n")).shape == (0, 2)


def test_batches_keep_order_and_count(tmp_path):
    path = write(tmp_path / "a.csv", "n\n" + "".join(f"{n}\n" for n in range(10_000)))
    batches = list(read_batches(path, rows=999))
    assert max(batch.height for batch in batches) <= 999
    assert pl.concat(batches)["n"].to_list() == [str(n) for n in range(10_000)]


BAD_CONTENT = {
    "too many fields": ("a,b\n1,2\n1,2,3\n", "line 3 of .* has 3 fields, but the first line names 2 columns"),
    "too few fields": ("a,b\n1,2\n\n1\n", "line 4 of .* has 1 fields, but the first line names 2 columns"),
    "quotation mark": ('a,b\n1,2\n1,"x\n3,4\n', "line 3 of .* Look for a quotation mark"),
    "latin-1": (b"a,b\n1,2\n3,caf\xe9\n", "line 3 of .* is not UTF-8 text .byte 0xe9 at position 5"),
    "utf-16": ("a,b\n1,2\n".encode("utf-16"), "line 1 of .* is not UTF-8"),
    "empty": ("", "is empty: expected a first line with the columns' names"),
    "same name twice": ("a,b,a\n1,2,3\n", "more than one column named 'a'"),
}


@pytest.mark.parametrize("name", BAD_CONTENT)
def test_bad_text_names_the_line(tmp_path, name):
    content, message = BAD_CONTENT[name]
    with pytest.raises(DataError, match=message):
        read_table(write(tmp_path / "a.csv", content))


def test_ragged_line_far_down(tmp_path):
    path = write(tmp_path / "a.csv", "a,b\n" + "1,2\n" * 40_000 + "1\n" + "1,2\n" * 40_000)
    with pytest.raises(DataError, match="line 40002 of"):
        read_table(path)


@pytest.mark.parametrize("content", [gzip.compress(b"a,b\n" + b"1,2\n" * 100)[:-10], b"\x1f\x8bxxxx"], ids=["cut short", "not gzip"])
def test_damaged_gzip(tmp_path, content):
    with pytest.raises(DataError, match="is damaged after line"):
        read_table(write(tmp_path / "a.csv.gz", content))


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
def test_damaged_binary(tmp_path, ending):
    with pytest.raises(DataError, match=f"cannot read .* as {ending[1:]}"):
        read_table(write(tmp_path / f"a{ending}", b"PAR1"))


def test_missing_file_names_its_neighbours(tmp_path):
    write(tmp_path / "houses.csv", "a\n1\n")
    with pytest.raises(DataError, match=r"there is no file .*house\.csv.*Beside it there is houses\.csv"):
        read_table(tmp_path / "house.csv")


def test_folder_instead_of_file(tmp_path):
    with pytest.raises(DataError, match="is a folder"):
        read_table(tmp_path)


def test_unknown_ending(tmp_path):
    with pytest.raises(DataError, match=r"cannot tell the format of .* '.xlsx': expected one of .csv"):
        read_table(write(tmp_path / "a.xlsx", "x"))
    with pytest.raises(DataError, match="cannot tell the format"):
        table_format("a.parquet.gz")


@pytest.mark.parametrize("thing", [[1, 2], {"a": [1]}, pa.array([1]), pd.Series([1])])
def test_not_a_table(thing):
    with pytest.raises(DataError, match=r"cannot read a table from \w+: expected a path"):
        read_table(thing)


def test_same_name_twice_in_memory():
    with pytest.raises(DataError, match="more than one column named 'a'"):
        read_table(pl.DataFrame({"a": [1], "a ": [2]}))
