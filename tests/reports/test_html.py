"""The HTML page: complete, self-contained, and safe against what a table's texts may hold."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from parafit.reports import html, plots
from parafit.reports.html import Section

VOID = {"meta"}


class Checker(HTMLParser):
    """Collects ids and text and fails where tags do not nest."""

    def __init__(self, content):
        super().__init__()
        self.open, self.ids, self.words, self.resources = [], [], [], []
        self.feed(content)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.open += [] if tag in VOID else [tag]
        self.ids += [value for name, value in attrs if name == "id"]
        self.resources += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def whole_page():
    drawn = [
        plots.line_plot("loss", {"train": [3.0, 2.0], "validation": [3.0, 2.5]}, "epoch", marked=2),
        plots.line_plot("accuracy", {"train": [0.1, 0.5]}, "epoch"),
        plots.confusion_plot(["cat", "dog"], [[5, 1], [0, 3]]),
        plots.scatter_plot(np.arange(9.0), np.arange(9.0) ** 2, "price"),
    ]
    pieces = [*drawn, html.table(["name", "rows"], [["a", 1]]), html.text("words"), html.warning("careful"), html.code("x = 1")]
    return html.page("A title", "a lead", [Section(heading="All", pieces=pieces), Section(heading="None", pieces=[])])


def test_a_page_is_well_formed_and_needs_nothing_else():
    page = Checker(whole_page())
    assert len(page.ids) == len(set(page.ids))
    assert all(value.startswith(("#", "data:")) for value in page.resources)
    assert {value[1:] for value in page.resources if value.startswith("#")} <= set(page.ids)
    assert {"A title", "a lead", "words", "careful", "x = 1", "predicted price"} <= set(page.words)
    assert not re.search(r"@import|url\((?!#)|<script|<link", whole_page())


def test_plots_take_the_pages_ink():
    plot = plots.line_plot("loss", {"train": [1.0, 2.0]}, "epoch")
    assert "currentColor" in plot
    assert "#010203" not in plot
    assert "#000000" not in plot


def test_the_same_page_twice_is_the_same_text():
    assert whole_page() == whole_page()


def test_texts_cannot_break_the_page():
    nasty = "<script>alert(1)</script> & 'more'"
    content = html.page(nasty, nasty, [Section(heading=nasty, pieces=[html.table([nasty], [[nasty]]), html.text(nasty), html.code(nasty)])])
    assert "<script>" not in content
    assert Checker(content).words.count(nasty) == 8
    drawn = plots.confusion_plot(["<b>", "$\\wrong$ $"], [[1, 0], [0, 1]]) + plots.scatter_plot(np.arange(3.0), np.arange(3.0), "a <b> $c")
    assert "<b>" not in drawn


def test_large_confusions_have_no_numbers():
    labels = [str(number) for number in range(30)]
    plot = plots.confusion_plot(labels, (77 * np.eye(30, dtype=int)).tolist())
    assert "<image" in plot
    assert ">77<" not in plot
    assert ">77<" in plots.confusion_plot(labels[:3], (77 * np.eye(3, dtype=int)).tolist())


def test_large_scatters_are_thinned():
    many = np.arange(100_000.0)
    assert len(plots.scatter_plot(many, many, "x")) < 500_000


@pytest.mark.parametrize(
    ("value", "words"), [(0.0, "0"), (12345.678, "12,346"), (1234, "1,234"), (1e-7, "1e-07"), (None, "–"), (float("nan"), "nan")]
)
def test_numbers_for_people(value, words):
    assert html.number(value) == words


def test_number_columns_stand_on_the_right():
    written = html.table(["name", "value"], [["a", 1.5], ["b", None]])
    assert written.count('class="number"') == 3
    assert "–" in written


def test_shorten():
    assert html.shorten("abcdef", most=4) == "abc…"
    assert html.shorten("abcd", most=4) == "abcd"
