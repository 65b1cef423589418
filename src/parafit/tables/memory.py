"""Tables in memory, as polars frames."""

from typing import TYPE_CHECKING, Any

from parafit.errors import DataError
from parafit.tables.rows import Rows, Table
from parafit.tables.text import check_column_names

if TYPE_CHECKING:
    import polars as pl


def from_memory(table: Any, *, name: str | None = None, first_row: int = 1) -> Table:
    """A pandas, polars or Arrow frame; a text in it is a value, whatever it says.

    Args:
        table: the frame.
        name: what to call it in messages; its type if not given.
        first_row: the number of its first row.

    Raises:
        DataError: no such frame, two columns of one name, or values that no polars frame can hold.

    >>> import polars as pl
    >>> from_memory(pl.DataFrame({"a": ["None", None]})).frame["a"].to_list()
    ['None', None]
    """
    import polars as pl
    import polars.selectors as cs

    frame = _to_polars(table)
    check_column_names(frame.columns, "the table")
    labels = (cs.categorical() | cs.enum()).cast(pl.String)
    return Table(frame=frame.with_columns(cs.float().fill_nan(None), labels), name=name or type(table).__name__, rows=Rows(first=first_row))


def _to_polars(table: Any) -> "pl.DataFrame":
    import narwhals as nw
    import polars as pl

    if nw.dependencies.is_pandas_dataframe(table):
        return _from_pandas(table)
    try:
        return nw.from_native(table, eager_only=True).to_polars()
    except TypeError as error:
        raise DataError(
            f"cannot read a table from {type(table).__name__}: expected a path to a file, or a pandas, polars or Arrow frame."
        ) from error
    except (ValueError, pl.exceptions.PolarsError, nw.exceptions.NarwhalsError) as error:
        raise DataError(f"cannot read the table: {str(error).splitlines()[0]}.") from error


def _from_pandas(table: Any) -> "pl.DataFrame":
    import polars as pl

    check_column_names([str(name) for name in table.columns], "the table")
    columns = []
    for place, name in enumerate(table.columns):
        try:
            columns.append(pl.from_pandas(_plain_pandas(table.iloc[:, place])).alias(str(name)))
        except Exception as error:  # pandas, Arrow and polars raise many kinds
            kind = table.dtypes.iloc[place]
            raise DataError(f"cannot read column {str(name)!r} of type {kind}: {str(error).splitlines()[0]}.") from error
    return pl.DataFrame(columns)


def _plain_pandas(column: Any) -> Any:
    """The column with sparse values spread out, periods as their start, and values of several types as text."""
    import pandas

    if isinstance(column.dtype, pandas.SparseDtype):
        column = column.sparse.to_dense()
    if isinstance(column.dtype, pandas.CategoricalDtype):
        column = column.astype(column.cat.categories.dtype if column.notna().all() else object)
    if isinstance(column.dtype, pandas.PeriodDtype):
        column = column.dt.to_timestamp()
    kind = pandas.api.types.infer_dtype(column, skipna=True) if column.dtype == object else ""
    if kind == "mixed-integer-float":
        return column.astype(float)
    return column.map(str, na_action="ignore").astype(object) if kind.startswith("mixed") else column
