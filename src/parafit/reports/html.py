"""One self-contained HTML page: headings, tables and plots, readable on light and dark screens, nothing loaded from elsewhere."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

_PAGE_STYLE = """
:root { color-scheme: light dark; --ink: #1c2126; --paper: #ffffff; --faint: #69727d; --line: #d9dee4; --band: #f4f6f8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --paper: #15191e; --faint: #98a2ae; --line: #323a44; --band: #1d232a; } }
body { color: var(--ink); background: var(--paper); font: 15px/1.5 system-ui, sans-serif; max-width: 62rem;
  margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--line); }
.lead { color: var(--faint); margin-top: .2rem; } .figures { display: flex; flex-wrap: wrap; gap: 1rem; } .wide { overflow-x: auto; }
svg { max-width: 100%; height: auto; color: var(--ink); }
table { border-collapse: collapse; margin: .4rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { color: var(--faint); font-weight: 600; } td.number, th.number { text-align: right; }
pre { background: var(--band); padding: .7rem; overflow-x: auto; }
.warning { border-left: 4px solid #e0822f; padding: .3rem .8rem; background: var(--band); }
"""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page: pieces of HTML, as `table`, `text`, `code`, `warning` and the plots make them, under a heading."""

    heading: str
    pieces: Sequence[str]


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The whole page as HTML text.

    Args:
        title: heading of the page.
        lead: a line below it.
        sections: the rest, in order.

    >>> "<h2>Scores</h2>" in page("digits", "a run", [Section(heading="Scores", pieces=[text("good")])])
    True
    """
    parts = [f"<section><h2>{html.escape(section.heading)}</h2>\n{_arrange(section.pieces)}</section>" for section in sections]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_PAGE_STYLE}</style></head>\n<body><h1>{html.escape(title)}</h1>"
        f'<p class="lead">{html.escape(lead)}</p>\n' + "\n".join(parts) + "\n</body></html>\n"
    )


def text(words: str) -> str:
    """A paragraph."""
    return f"<p>{html.escape(words)}</p>"


def warning(words: str) -> str:
    """A paragraph that stands out."""
    return f'<p class="warning">{html.escape(words)}</p>'


def code(words: str) -> str:
    """Text as it is, in a fixed-width font."""
    return f"<pre>{html.escape(words)}</pre>"


def table(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A table; columns that hold numbers stand on the right.

    Args:
        header: one word a column.
        rows: cells, as many in each as there are columns; None for an empty number.

    >>> table(["name", "rows"], [["a<b", 3]]).count("&lt;")
    1
    """
    numeric = [all(isinstance(row[place], int | float) or row[place] is None for row in rows) for place in range(len(header))]
    cells = [_cells("th", header, numeric), *(_cells("td", row, numeric) for row in rows)]
    return '<div class="wide"><table>' + "\n".join(f"<tr>{line}</tr>" for line in cells) + "</table></div>"


def number(value: float | int | None) -> str:
    """A number as people read it: four significant digits, whole numbers in groups of three.

    >>> number(0.123456), number(1234567), number(None)
    ('0.1235', '1,234,567', '–')
    """
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def shorten(words: str, most: int = 16) -> str:
    """`words` cut to at most so many characters.

    Args:
        words: a text.
        most: characters.
    """
    return words if len(words) <= most else words[: most - 1] + "…"


def _arrange(pieces: Sequence[str]) -> str:
    figures = [piece for piece in pieces if piece.startswith("<svg")]
    others = "\n".join(piece for piece in pieces if not piece.startswith("<svg"))
    return (f'<div class="figures">{"".join(figures)}</div>' if figures else "") + others


def _cells(tag: str, values: Sequence, numeric: Sequence[bool]) -> str:
    written = [number(value) if is_number and tag == "td" else html.escape(str(value)) for value, is_number in zip(values, numeric)]
    kinds = [' class="number"' if is_number else "" for is_number in numeric]
    return "".join(f"<{tag}{kind}>{value}</{tag}>" for kind, value in zip(kinds, written))
