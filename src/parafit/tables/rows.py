"""A table that was read: its frame, where its rows stand, and what reading it had to do."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import polars as pl

MOST_SHOWN = 5
"""So many cells are named in a message."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Where the rows of a frame stand, to name them in messages.

    Args:
        numbers: the place of each row, counted from `first`; None for one after the other.
        first: what the first place is called.
        lines: gives the lines of a file that records (counted from 0) begin in; without it places are rows.
    """

    numbers: np.ndarray | None = None
    first: int = 1
    lines: Callable[[list[int]], list[int]] | None = None

    def take(self, rows: np.ndarray) -> "Rows":
        """The same for some of the rows."""
        return Rows(numbers=rows if self.numbers is None else self.numbers[rows], first=self.first, lines=self.lines)

    def name(self, rows: Iterable[int]) -> list[str]:
        """Words for each of these rows.

        >>> Rows().name([0, 4])
        ['row 1', 'row 5']
        """
        places = [int(row if self.numbers is None else self.numbers[row]) for row in rows]
        if self.lines:
            return [f"line {line}" for line in self.lines(places)]
        return [f"row {place + self.first}" for place in places]

    def cells(self, series: "pl.Series", rows) -> list[str]:
        """Some of these cells of a column with their places, in words.

        Args:
            series: a column.
            rows: indices of its cells.

        >>> import polars as pl
        >>> Rows().cells(pl.Series(["x", "1", "y"]), [0, 2])
        ["'x' in row 1", "'y' in row 3"]
        """
        shown = [int(row) for row in rows[:MOST_SHOWN]]
        return [f"{series[row]!r} in {place}" for row, place in zip(shown, self.name(shown))]


def some_of(words: list[str], count: int) -> str:
    """The first of `count` things, and how many more there are.

    Args:
        words: the first of them, at least as many as are shown.
        count: number of all of them.

    >>> some_of(["'x' in row 1", "'y' in row 3"], 12)
    "'x' in row 1, 'y' in row 3, and 10 more"
    """
    shown = words[:MOST_SHOWN]
    return ", ".join(shown) + (f", and {count - len(shown):,} more" if count > len(shown) else "")


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table, or a part of one.

    Args:
        frame: its columns. Text from text files is stripped, and null where the field is empty or says that it is missing.
        name: what to call it in messages.
        rows: where the frame's rows stand.
        notes: what reading had to do, and how many times (0 where that says nothing).
    """

    frame: "pl.DataFrame"
    name: str
    rows: Rows = Rows()
    notes: Mapping[str, int] = field(default_factory=dict, hash=False)

    def take(self, rows: np.ndarray) -> "Table":
        """The table of some of the rows (indices)."""
        return Table(frame=self.frame[rows], name=self.name, rows=self.rows.take(rows), notes=self.notes)


def add_notes(total: dict[str, int], more: Mapping[str, int]) -> None:
    """Count the notes of another part in.

    Args:
        total: how many times each note applies; changed.
        more: the same of the other part.
    """
    for words, count in more.items():
        total[words] = total.get(words, 0) + count


def note_words(notes: Mapping[str, int]) -> list[str]:
    """A line for each note.

    >>> note_words({"blank lines left out": 2, "read as cp1252": 0})
    ['blank lines left out: 2', 'read as cp1252']
    """
    return [f"{words}: {count:,}" if count else words for words, count in notes.items()]


def bad_words(cells: Mapping[str, tuple[list[str], int]]) -> list[str]:
    """A line for each column with bad cells: some of them in words, and how many there are."""
    return [
        f"column {name}: cells that cannot be read, taken as missing: {some_of(words, count)}" for name, (words, count) in cells.items()
    ]
