"""`Ranking`: what a search found, as people read it. Plain Python."""

from dataclasses import dataclass, replace

from parafit.planner.cost.cost import Cost
from parafit.planner.cost.framework import Software
from parafit.planner.machine.machine import Machine
from parafit.planner.plan import Plan
from parafit.planner.program import Program
from parafit.planner.search.space import techniques
from parafit.support.units import gibibytes, milliseconds

GOALS = {"time": "slower", "memory": "larger", "cost": "dearer"}
"""What a search may minimise, and what one calls a plan that has more of it."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A plan with its price.

    Attributes:
        plan: the plan.
        cost: what it takes.
        reason: why it lost; "" of the best.
    """

    plan: Plan
    cost: Cost
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """What a search found.

    Attributes:
        best: the best plan.
        others: runners-up, each the best of its mesh, then plans that would be better but do not fit or are not allowed.
        goal: what was minimised.
        limit_bytes: bytes that a device may hold.
        program: what was planned.
        machine: for which machine.
        software: of which framework.
        priced: how many plans were priced.
        limits: what keeps the best plan from using more of the machine, in sentences.
        runs: names of the techniques that this version runs; None: nothing is said about it.
        runnable: where the best plan has techniques that this version only prices, the best one that it runs; None if none fits.
    """

    best: Choice
    others: tuple[Choice, ...]
    goal: str
    limit_bytes: float
    program: Program
    machine: Machine
    software: Software
    priced: int
    limits: tuple[str, ...] = ()
    runs: frozenset[str] | None = None
    runnable: Choice | None = None

    def __post_init__(self):
        plan = replace(self.best.plan)
        object.__setattr__(plan, "ranking", self)  # so that the plan prints, and is explained, with what it was chosen from
        object.__setattr__(self, "best", replace(self.best, plan=plan))

    @property
    def plan(self) -> Plan:
        """The best plan."""
        return self.best.plan

    def __str__(self):
        return str(self.plan)

    def table(self) -> str:
        """The price of the best plan and the runners-up, as text."""
        return "\n".join(
            [_price_line(self), *_idle_line(self), *(f"limit   {each}" for each in self.limits), *_runs_line(self), *_table(self)]
        )

    def only_priced(self, plan: Plan) -> list[str]:
        """The techniques of a plan that this version prices and does not run."""
        return [] if self.runs is None else sorted(techniques(plan) - self.runs)


def value(choice: Choice, goal: str) -> tuple[float, float]:
    """What a goal minimises, then what decides between equals.

    Args:
        choice: a plan with its price.
        goal: one of `GOALS`.
    """
    seconds, nbytes = choice.cost.seconds, choice.cost.peak_bytes
    if goal == "memory":
        return nbytes, seconds
    return (seconds * choice.plan.device_count if goal == "cost" else seconds), nbytes


def why_not(other: Choice, best: Choice, goal: str, limit_bytes: float, allowed: frozenset[str]) -> str:
    """Why a plan is not the best.

    Args:
        other: the plan that lost.
        best: the plan that won.
        goal: one of `GOALS`.
        limit_bytes: what a device may hold.
        allowed: names of techniques that may be used.
    """
    if refused := sorted(techniques(other.plan) - allowed):
        return f"not allowed: {', '.join(refused)}"
    if other.cost.peak_bytes > limit_bytes:
        return f"does not fit: {gibibytes(other.cost.peak_bytes - limit_bytes)} a device too much"
    mine, others = (best.cost.memory, other.cost.memory) if goal == "memory" else (best.cost.times, other.cost.times)
    more = {name: others.get(name, 0.0) - mine.get(name, 0.0) for name in sorted({*mine, *others})}
    name = max(more, key=lambda name: more[name])
    amount = gibibytes(more[name]) if goal == "memory" else milliseconds(more[name])
    ratio = value(other, goal)[0] / value(best, goal)[0] - 1
    devices = f" on {other.plan.device_count} devices" if other.plan.device_count != best.plan.device_count else ""
    return f"{times(ratio)} {GOALS[goal]}{devices}: {name} +{amount}"


def label(plan: Plan, beside: Plan | None = None) -> str:
    """A plan in one line: its text with what the text does not say, without the precision where another plan has the same.

    Args:
        plan: the plan.
        beside: the other plan, if it stands beside one.
    """
    shown = replace(plan, precision="float32") if beside and beside.precision == plan.precision else plan
    return shown.short() + (" +sequence" if "sequence" in techniques(plan) else "")


def times(ratio: float) -> str:
    """How much more something is, in words that stay readable.

    >>> times(0.153), times(2.26)
    ('15.3 %', '2.3 times')
    """
    return _percent(ratio) if ratio < 1 else f"{ratio:.1f} times"


def _price_line(ranking: Ranking) -> str:
    cost, plan = ranking.best.cost, ranking.plan
    parts = sorted(((value, name) for name, value in cost.times.items() if value), reverse=True)
    largest = ", ".join(f"{name} {part / (cost.seconds or 1):.0%}" for part, name in parts[:4]).replace("%", " %")
    held = sorted(((value, name) for name, value in cost.memory.items() if value), reverse=True)
    fullest = ", ".join(f"{name} {gibibytes(part)}" for part, name in held[:4])
    return (
        f"machine {plan.device_count} of {ranking.machine.device_count} devices of {ranking.machine.name}\n"
        f"step    {milliseconds(cost.seconds)}: {largest}\n"
        f"memory  {gibibytes(cost.peak_bytes)} of {gibibytes(ranking.limit_bytes)} a device: {fullest}"
    )


def _idle_line(ranking: Ranking) -> list[str]:
    timeline = ranking.best.cost.timeline
    if timeline is None:
        return []
    least, most = (_percent(pick(timeline.idle_shares)) for pick in (min, max))
    each = f"{least} to {most}" if least != most else most
    return [f"idle    {_percent(timeline.idle_share)} of its time ({timeline.grid.schedule}), each device {each}"]


def _runs_line(ranking: Ranking) -> list[str]:
    priced = ranking.only_priced(ranking.plan)
    if not priced:
        return []
    best = ranking.runnable
    if best is None:
        which = "No plan that it runs fits."
    else:
        ratio = value(best, ranking.goal)[0] / value(ranking.best, ranking.goal)[0] - 1
        which = (
            f"The best plan that it runs is {label(best.plan)!r}: {milliseconds(best.cost.seconds)}, {gibibytes(best.cost.peak_bytes)} "
            f"a device, {times(ratio)} {GOALS[ranking.goal]}."
        )
    return [f"runs    this version only prices {', '.join(priced)}. {which}"]


def _percent(share: float) -> str:
    return f"{share:.1%}".replace("%", " %")


def _table(ranking: Ranking) -> list[str]:
    if not ranking.others:
        return [f"instead  nothing of another shape comes near; {ranking.priced} plans were priced"]
    rows = [("instead of it", "step", "memory", "why not")]
    rows += [
        (
            label(one.plan, ranking.plan),
            milliseconds(one.cost.seconds),
            gibibytes(one.cost.peak_bytes),
            one.reason + ("; only priced" if ranking.only_priced(one.plan) else ""),
        )
        for one in ranking.others
    ]
    widths = [max(len(row[place]) for row in rows) for place in range(3)]
    return [f"{row[0]:{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}" for row in rows]
