"""When each task of a pipeline runs: the timeline of its grid, as a section of a page."""

from collections.abc import Iterator

from parafit.planner.schedules.grid import Task
from parafit.planner.schedules.simulate import Timeline
from parafit.reports.html import Section, table, text
from parafit.reports.plots import BLUE, ORANGE
from parafit.support.units import milliseconds

_COLOURS = {"F": BLUE, "B": ORANGE, "W": "#4fa35a"}
_KINDS = {"F": "forward", "B": "backward", "W": "gradients of weights"}
_WIDTH, _LEFT, _RIGHT, _ROW, _HEAD = 1000.0, 90.0, 60.0, 22.0, 26.0

MOST_DRAWN = 4000
"""Tasks that are drawn of a timeline: those that start first."""


def schedule_section(predicted: Timeline, measured: Timeline | None = None) -> Section:
    """The timeline of a pipeline with the idle share of each device, what was predicted above what was measured.

    Args:
        predicted: as `price` gives it.
        measured: of the same grid.

    >>> from parafit.planner.schedules import TaskTimes, make_grid
    >>> from parafit.planner.schedules.simulate import simulate
    >>> section = schedule_section(simulate(make_grid("1f1b", devices=2, microbatches=4), TaskTimes.equal(2)))
    >>> section.heading, section.pieces[0].count("<rect")
    ('When each task runs', 18)
    """
    given = {"predicted": predicted} | ({"measured": measured} if measured else {})
    grid = predicted.grid
    shown = min(map(_shown_seconds, given.values())) if any(map(_is_large, given.values())) else 0.0
    window = shown or max(timeline.makespan for timeline in given.values())
    words = f"{grid.schedule}, {grid.stages} stages on {grid.devices} devices, {grid.microbatches} microbatches."
    cut = f" Drawn are the first {milliseconds(window)} of {milliseconds(predicted.makespan)}." if shown else ""
    idle = [
        [f"device {device}", ", ".join(map(str, range(device, grid.stages, grid.devices)))]
        + [100 * timeline.idle_shares[device] for timeline in given.values()]
        for device in range(grid.devices)
    ]
    whole = [["all", "", *(100 * timeline.idle_share for timeline in given.values())]]
    header = ["", "stages", *(f"idle {name}, %" for name in given)]
    return Section(heading="When each task runs", pieces=[_drawing(given, window), text(words + cut), table(header, idle + whole)])


def _is_large(timeline: Timeline) -> bool:
    return sum(map(len, timeline.start)) > MOST_DRAWN


def _shown_seconds(timeline: Timeline) -> float:
    """The end of the first tasks that are drawn."""
    ends = sorted(end for row in timeline.end for end in row)
    return ends[min(MOST_DRAWN, len(ends)) - 1]


def _drawing(timelines: dict[str, Timeline], window: float) -> str:
    parts, top = [_legend(next(iter(timelines.values())))], _HEAD
    for name, timeline in timelines.items():
        parts += [_label(0, top + 12, f"{name}: {milliseconds(timeline.makespan)}"), *_rows(timeline, top + 20, window)]
        top += 20 + _ROW * timeline.grid.devices + 14
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH:g} {top:g}" width="{_WIDTH:g}" height="{top:g}" '
        f'font-family="sans-serif" font-size="11">{"".join(parts)}</svg>'
    )


def _legend(timeline: Timeline) -> str:
    words = []
    for place, kind in enumerate(timeline.grid.kinds):
        name = "backward, of inputs" if kind == "B" and timeline.grid.splits_backward else _KINDS[kind]
        left = _LEFT + 170 * place
        words.append(f'<rect x="{left:g}" y="4" width="12" height="12" fill="{_COLOURS[kind]}"/>{_label(left + 18, 14, name)}')
    return "".join(words) + _label(_WIDTH, 14, "idle", end=True)


def _rows(timeline: Timeline, top: float, window: float) -> Iterator[str]:
    for device, (row, starts, ends) in enumerate(zip(timeline.grid.tasks, timeline.start, timeline.end)):
        y = top + _ROW * device
        yield _label(0, y + 14, f"device {device}")
        yield _label(_WIDTH, y + 14, f"{timeline.idle_shares[device]:.0%}".replace("%", " %"), end=True)
        for task, start, end in zip(row, starts, ends):
            if end <= window:
                yield _box(timeline, task, (start, end), y, window)


def _box(timeline: Timeline, task: Task, span: tuple[float, float], y: float, window: float) -> str:
    scale = (_WIDTH - _LEFT - _RIGHT) / (window or 1)
    left, width = _LEFT + span[0] * scale, (span[1] - span[0]) * scale
    chunks = timeline.grid.stages // timeline.grid.devices
    faint = 1 - 0.5 * (task.stage // timeline.grid.devices) / chunks
    told = f"<title>{task}: {milliseconds(span[0])} to {milliseconds(span[1])}</title>"
    box = (
        f'<rect x="{left:.2f}" y="{y:g}" width="{width:.2f}" height="{_ROW - 3:g}" fill="{_COLOURS[task.kind]}" '
        f'fill-opacity="{faint:.2g}" stroke="currentColor" stroke-width="0.3">{told}</rect>'
    )
    number = str(task.microbatch)
    if width < 7 * len(number) + 2:
        return box
    return (
        box + f'<text x="{left + width / 2:.2f}" y="{y + 14:g}" text-anchor="middle" fill="#ffffff" pointer-events="none">{number}</text>'
    )


def _label(x: float, y: float, words: str, *, end: bool = False) -> str:
    anchor = ' text-anchor="end"' if end else ""
    return f'<text x="{x:g}" y="{y:g}" fill="currentColor"{anchor}>{words}</text>'
