"""Plots as inline SVG, in the colours of the page that they become part of."""

import io
import re
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from parafit.reports.html import number, shorten

BLUE, ORANGE = "#3f83d6", "#e0822f"
_SHADES = (BLUE, ORANGE, "#4fa35a", "#c2566b", "#8b6cc7", "#9a7b4f", "#3aa6a6", "#98a2ae")

_INK = "#010203"  # stands for the page's text colour until the plot is part of the page
_FIGURE_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "svg.hashsalt": "parafit",
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), _INK),
}


def line_plot(title: str, curves: Mapping[str, Sequence[float]], x_label: str, marked: int | None = None) -> str:
    """Curves over 1, 2, 3, …, as inline SVG; `marked` draws a vertical line there.

    Args:
        title: of the plot.
        curves: values by name, at most two curves.
        x_label: what 1, 2, 3, … count.
        marked: where the vertical line stands; None: nowhere.
    """

    def draw(axes):
        for (name, values), colour in zip(curves.items(), (BLUE, ORANGE)):
            axes.plot(range(1, len(values) + 1), values, color=colour, label=name, linewidth=1.6)
        if marked is not None:
            axes.axvline(marked, color=_INK, linewidth=0.8, linestyle=":", label=f"kept: {marked}")
        axes.set(title=title, xlabel=x_label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False)

    return _figure(draw, (4.6, 3.2))


def confusion_plot(labels: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """How often each true class (row) was taken for each class (column), as inline SVG; shades are shares of the row.

    Args:
        labels: names of the classes.
        counts: rows of each class (first index) that were taken for each class (second).
    """
    shares = np.array(counts) / np.maximum(np.sum(counts, axis=1, keepdims=True), 1)
    few = len(labels) <= 20

    def draw(axes):
        shades = np.zeros((*shares.shape, 4))
        shades[..., :3] = [int(BLUE[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        shades[..., 3] = np.sqrt(shares)  # a rare mistake stays visible
        axes.imshow(shades, interpolation="none")
        axes.set(xlabel="predicted", ylabel="true", title="Confusion matrix")
        axes.spines[:].set_visible(False)
        if not few:
            return
        axes.set_xticks(range(len(labels)), [shorten(label) for label in labels], rotation=45 if max(map(len, labels)) > 3 else 0)
        axes.set_yticks(range(len(labels)), [shorten(label) for label in labels])
        for (row, column), share in np.ndenumerate(shares):
            if counts[row][column]:
                axes.text(column, row, number(counts[row][column]), ha="center", va="center", color="#ffffff" if share > 0.3 else _INK)

    side = min(7.0, 2.6 + 0.32 * len(labels))
    return _figure(draw, (side, side))


def scatter_plot(truth: np.ndarray, predicted: np.ndarray, name: str, *, known: str = "true", scale: str = "linear") -> str:
    """Predicted against true values, with the line on which they are equal, as inline SVG (at most 2,000 points).

    Args:
        truth: true values.
        predicted: predicted values, as many.
        name: what they are.
        known: another word for "true", such as "measured".
        scale: of both axes, "linear" or "log".
    """
    step = max(1, len(truth) // 2000)
    truth, predicted = truth[::step], predicted[::step]

    def draw(axes):
        ends = [min(truth.min(), predicted.min()), max(truth.max(), predicted.max())]
        axes.plot(ends, ends, color=_INK, linewidth=0.8, linestyle=":")
        axes.scatter(truth, predicted, s=12, color=BLUE, alpha=0.6, linewidths=0)
        axes.set(title=f"Predicted against {known}", xlabel=f"{known} {name}", ylabel=f"predicted {name}", xscale=scale, yscale=scale)

    return _figure(draw, (4.6, 4.2))


def parts_plot(title: str, bars: Mapping[str, Mapping[str, float]], unit: str, scale: float = 1.0) -> str:
    """One bar for each name, cut into its parts, as inline SVG; all but the seven largest parts are one.

    Args:
        title: of the plot.
        bars: values by part, by name.
        unit: what the axis says.
        scale: factor from values to that unit.
    """
    totals: dict[str, float] = {}
    for parts in bars.values():
        for name, value in parts.items():
            totals[name] = max(totals.get(name, 0.0), value)
    largest = sorted((name for name in totals if totals[name]), key=lambda name: -totals[name])[:7]

    def draw(axes):
        ends = np.zeros(len(bars))
        others = [sum(value for name, value in parts.items() if name not in largest) for parts in bars.values()]
        pieces = [(name, [parts.get(name, 0.0) for parts in bars.values()]) for name in largest] + [("other", others)]
        for place, (name, values) in enumerate(pieces):
            widths = np.array(values) * scale
            if widths.any():
                axes.barh(list(bars), widths, left=ends, color=_SHADES[place], label=name, height=0.7)
            ends += widths
        axes.invert_yaxis()
        axes.set(title=title, xlabel=unit)
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))

    return _figure(draw, (6.2, 1.5 + 0.4 * max(3, len(bars))))


def points_plot(title: str, points: Mapping[str, tuple[float, float]], limit: float) -> str:
    """Named points of (memory in GiB, step in ms), a line through those that nothing beats in both, and its end, as inline SVG.

    Args:
        title: of the plot.
        points: (GiB, ms) by name.
        limit: GiB that a device has.
    """
    front = [point for point in sorted(points.values()) if not any(_beats(other, point) for other in points.values())]

    def draw(axes):
        axes.step(*zip(*front), where="post", color=ORANGE, linewidth=1.2, label="not beaten in both")
        axes.scatter(*zip(*points.values()), s=24, color=BLUE, zorder=3)
        for name, point in points.items():
            axes.annotate(name, point, xytext=(4, 4), textcoords="offset points")
        axes.axvline(limit, color=_INK, linewidth=0.8, linestyle=":", label="memory of a device")
        axes.set(title=title, xlabel="memory, GiB a device", ylabel="step, ms", xscale="log", yscale="log")
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.18))

    return _figure(draw, (4.6, 4.2))


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] <= other[0] and one[1] <= other[1]


def _figure(draw, size_inches: tuple[float, float]) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_FIGURE_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=size_inches, layout="constrained")
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    return _inline(buffer.getvalue())


def _inline(svg: str) -> str:
    """The <svg> element alone, in the page's text colour, with ids no other plot of the page has."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL).replace(_INK, "currentColor")
    own = f"f{zlib.crc32(svg.encode()):08x}-"
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{own}", svg)
