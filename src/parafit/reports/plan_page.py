"""The page of `parafit plan`: a plan, and its rivals beside it."""

from parafit.planner.cost.cost import Cost
from parafit.planner.search.explain import explain
from parafit.planner.search.ranking import Ranking
from parafit.reports.html import Section, code, page, table
from parafit.reports.plots import parts_plot, points_plot
from parafit.reports.schedule_page import schedule_section


def plan_page(ranking: Ranking, instead: str | None = None) -> str:
    """A ranking as one self-contained HTML page: the plan, the timeline of its pipeline, and plots of time and memory over its rivals.

    Args:
        ranking: what a search found.
        instead: the text of a plan to compare the best with.

    >>> from parafit.planner.machine.machine import Machine
    >>> from parafit.planner.networks import named
    >>> from parafit.planner.search.search import search
    >>> "<svg" in plan_page(search(named("gpt:125m", batch=16), Machine.load("h100x8")))
    True
    """
    choices = {f"{place}": choice for place, choice in enumerate((ranking.best, *ranking.others), 1)}
    rows = [
        [name, choice.plan.short(), choice.cost.seconds * 1e3, choice.cost.peak_bytes / 2**30, choice.reason]
        for name, choice in choices.items()
    ]
    fitting = {name: choice for name, choice in choices.items() if choice.cost.peak_bytes <= ranking.limit_bytes}
    figures = [
        parts_plot("Time of a step", {name: choice.cost.times for name, choice in fitting.items()}, "milliseconds", 1e3),
        parts_plot("Memory of the fullest device", {name: choice.cost.memory for name, choice in fitting.items()}, "GiB", 2**-30),
        points_plot("Time against memory", {name: _point(choice.cost) for name, choice in choices.items()}, ranking.limit_bytes / 2**30),
    ]
    timeline = ranking.best.cost.timeline
    sections = [
        Section(heading="Plan", pieces=[code(str(ranking.plan))]),
        *([schedule_section(timeline)] if timeline else []),
        Section(heading="Beside it", pieces=[*figures, table(["", "plan", "step, ms", "memory, GiB", "why not"], rows)]),
    ]
    if instead:
        sections.append(Section(heading=f"Instead: {instead}", pieces=[code(explain(ranking.plan, instead))]))
    return page(
        f"{ranking.program.name}: {ranking.plan.short()}", f"on {ranking.machine.device_count} devices of {ranking.machine.name}", sections
    )


def _point(cost: Cost) -> tuple[float, float]:
    return cost.peak_bytes / 2**30, cost.seconds * 1e3
