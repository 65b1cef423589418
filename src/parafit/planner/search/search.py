"""`search`: the best plan of a program on a machine. Plain Python.

    minimise    seconds of a step                          (goal "time"; `price`)
                bytes on the fullest device                (goal "memory")
                seconds of a step × devices                (goal "cost")

    over        mesh shapes pipeline × data × tensor       Candidates.meshes
                compute layouts: the dims split over tensor, and the sequence between blocks
                                                           Candidates.meshes, schedules
                store layouts: ZeRO 0 to 3, over the axis or inside a host
                                                           Candidates.stores
                microbatches, recomputation, precision     Candidates.schedules
                the order of a pipeline's tasks, and stages a device
                                                           Candidates.orders

    subject to  pipeline × data × tensor ≤ the devices of the machine (fewer devices may be fastest)
                                                           Candidates.meshes
                tensor takes a part of a host or whole hosts, and divides the dims that it splits
                                                           Candidates.meshes, layout.resolve
                microbatches are split over data where it divides them, else whole on each device; a batch whose rows depend
                on each other is not cut                   layout.pieces, Candidates.schedules
                a pipeline has no more stages than blocks or places to cut; its devices divide its microbatches where each has
                several stages                             Candidates.meshes, orders
                bytes on the fullest device ≤ its memory, and ≤ max_bytes
                                                           memory.peak
                only techniques that are allowed           Candidates

The optimum is exact. A mesh is expanded into schedules, a schedule into orders and plans, always the one first whose floor is lowest; a
floor is what no plan under it can beat (`_Floors`). What is left when the lowest floor is above the best prices is dropped unseen. The grid
of a pipeline is simulated last: before, it goes by what its schedule takes at least (`schedules.bounds`).
"""

import heapq
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import replace

from parafit.errors import PlanError
from parafit.planner.cost.framework import Software
from parafit.planner.machine.machine import Machine
from parafit.planner.plan import Plan
from parafit.planner.program import Program
from parafit.planner.search.limits import limits
from parafit.planner.search.memo import Prices
from parafit.planner.search.ranking import GOALS, Choice, Ranking, value, why_not
from parafit.planner.search.space import SAME_NUMBERS, TECHNIQUES, Candidates, is_half, techniques
from parafit.support.arguments import did_you_mean
from parafit.support.units import gibibytes

SHOWN = 4
"""Meshes that are searched to the end: the best and three runners-up."""

WORTH_SHOWING = 2.0
"""A runner-up that is more than so many times worse than the best is not looked for."""


def search(
    program: Program,
    machine: Machine,
    *,
    goal: str = "time",
    max_bytes: float | None = None,
    allow: Iterable[str] | None = None,
    software: Software | None = None,
    runs: frozenset[str] | None = None,
) -> Ranking:
    """The best plan, the runners-up, and why each lost.

    Args:
        program: what one step computes.
        machine: what computes.
        goal: "time" (seconds of a step), "memory" (bytes on the fullest device) or "cost" (device-seconds of a step).
        max_bytes: what a device may hold; default: its memory.
        allow: names of `space.TECHNIQUES` that may be used; default: all that leave the numbers as they are.
        software: what the framework does, where it is not parafit.
        runs: techniques that are run and not only priced: plans that have others are marked, and the best that has none is named.

    Raises:
        PlanError: an unknown goal or technique, or no plan fits into memory: the smallest plan, and what it needs.

    >>> from parafit.planner.networks import named
    >>> ranking = search(named("gpt:1.3b", batch=64), Machine.load("h100x8"))
    >>> ranking.plan.device_count
    8
    >>> ranking.best.cost.seconds < min(other.cost.seconds for other in ranking.others if "fit" not in other.reason)
    True
    """
    allowed = _check(goal, max_bytes, allow)
    limit = min(machine.device.memory_bytes, max_bytes or math.inf)
    software = _software(program, machine, software)
    prices = Prices(program, machine, software)
    candidates = Candidates(program, machine, allowed)
    found = _Search(candidates, prices, goal, limit).run()
    if not found.best:
        raise _nothing_fits(candidates, prices, limit)
    best, *others = sorted(found.best.values(), key=found.rank)
    refused = _refused(program, machine, prices, found, best) if allow is not None else []
    chosen = [*others[: SHOWN - 1], *found.too_big(best), *refused]
    return Ranking(
        best=best,
        others=tuple(replace(other, reason=why_not(other, best, goal, limit, allowed)) for other in chosen),
        goal=goal,
        limit_bytes=limit,
        program=program,
        machine=machine,
        software=software,
        priced=found.priced,
        limits=limits(candidates, software, best.plan, best.cost.seconds),
        runs=runs,
        runnable=_runnable(prices, found, best, runs),
    )


def _check(goal: str, max_bytes: float | None, allow: Iterable[str] | None) -> frozenset[str]:
    if goal not in GOALS:
        raise PlanError(f"goal={goal!r}: choose one of {', '.join(GOALS)}." + did_you_mean(goal, GOALS))
    if max_bytes is not None and not max_bytes > 0:
        raise PlanError(f"max_bytes={max_bytes!r}: expected a number of bytes above 0.")
    allowed = SAME_NUMBERS if allow is None else frozenset([allow] if isinstance(allow, str) else allow)
    if unknown := sorted(allowed - set(TECHNIQUES)):
        raise PlanError(
            f"allow names {unknown[0]!r}, which parafit does not know: choose from {', '.join(TECHNIQUES)}."
            + did_you_mean(unknown[0], TECHNIQUES)
        )
    return allowed


def _software(program: Program, machine: Machine, software: Software | None) -> Software:
    """Programs of two-byte numbers are priced at float16 where the device multiplies no bfloat16."""
    peaks = machine.device.peak_flops
    if software is None and is_half(program) and "bfloat16" not in peaks and "float16" in peaks:
        return Software(precision="float16")
    return software or Software()


class _Search:
    """Best first: `run` expands meshes into schedules and schedules into plans until no floor is below what was found.

    Attributes:
        best: the best plan that fits of each mesh.
        unfit: plans that do not fit, in the order of their floors, which is that of how fast they would be.
        priced: how many plans were looked at.
    """

    def __init__(self, candidates: Candidates, prices: Prices, goal: str, limit: float, shown: int = SHOWN):
        self.candidates, self.prices, self.goal, self.limit, self.shown = candidates, prices, goal, limit, shown
        self.floors = _Floors(candidates, prices, goal)
        self.best: dict[tuple, Choice] = {}
        self.unfit: dict[tuple, Plan] = {}
        self.priced = 0
        self.threshold = (math.inf,)

    def run(self) -> "_Search":
        order = itertools.count()
        heap: list[tuple[float, int, Callable, Plan]] = []

        def push(floor: Callable, expand: Callable, plans: Iterable[Plan]) -> None:
            for plan in plans:
                if (lowest := floor(plan)) <= self.threshold[0]:
                    heapq.heappush(heap, (lowest, next(order), expand, plan))

        def schedules(mesh: Plan) -> None:
            push(self.floors.schedule, orders if "pipeline" in mesh.axes else stores, self.candidates.schedules(mesh))

        def orders(schedule: Plan) -> None:
            push(self.floors.order, stores, self.candidates.orders(schedule))

        def stores(schedule: Plan) -> None:
            push(self.least, self.keep, filter(self.fits, self.candidates.stores(schedule)))

        push(self.floors.mesh, schedules, self.candidates.meshes())
        while heap and heap[0][0] <= self.threshold[0]:
            *_, expand, plan = heapq.heappop(heap)
            expand(plan)
        return self

    def fits(self, plan: Plan) -> bool:
        """Whether a plan fits; the first of a mesh that does not is noted."""
        self.priced += 1
        fits = self.prices.peak_bytes(plan) <= self.limit
        if not fits:
            self.unfit.setdefault(tuple(plan.axes.items()), plan)
        return fits

    def least(self, plan: Plan) -> float:
        """What a plan takes at least: of a pipeline before its schedule is simulated, of others what it takes."""
        return (1 - 1e-9) * value(Choice(plan=plan, cost=self.prices.at_least(plan)), self.goal)[0]

    def keep(self, plan: Plan) -> None:
        """Price a plan, and keep it if it is its mesh's best."""
        mesh = tuple(plan.axes.items())
        if mesh in self.best and self.least(plan) > self.rank(self.best[mesh])[0]:
            return
        choice = Choice(plan=plan, cost=self.prices.of(plan))
        if mesh not in self.best or self.rank(choice) < self.rank(self.best[mesh]):
            self.best[mesh] = choice
            values = sorted(value(choice, self.goal) for choice in self.best.values())
            most = values[min(self.shown, len(values)) - 1] if len(values) >= self.shown else (math.inf,)
            self.threshold = min(most, (values[0][0] * (WORTH_SHOWING if self.shown > 1 else 1),))

    def rank(self, choice: Choice) -> tuple:
        """What the best has least of: the goal, then devices, then techniques."""
        return (*value(choice, self.goal), choice.plan.device_count, len(choice.plan.short()), choice.plan.to_json())

    def too_big(self, best: Choice) -> list[Choice]:
        """The plan that would be fastest if it fitted, and one device."""
        single = [plan for mesh, plan in self.unfit.items() if not mesh]
        plans = dict.fromkeys([*list(self.unfit.values())[:1], *single])
        choices = [Choice(plan=plan, cost=self.prices.of(plan)) for plan in plans]
        return [choice for choice in choices if value(choice, self.goal) < value(best, self.goal) or not choice.plan.axes]


class _Floors:
    """What no plan of a mesh, or under a schedule, can beat."""

    def __init__(self, candidates: Candidates, prices: Prices, goal: str):
        self.prices, self.goal = prices, goal
        precisions = [prices.software.precision] if prices.software.precision else candidates.precisions
        self.arithmetic_seconds = prices.arithmetic_seconds(precisions)

    def mesh(self, plan: Plan) -> float:
        """All products at the best rate, shared out evenly; or all state shared out evenly."""
        return self._floor(plan, self.arithmetic_seconds / plan.device_count)

    def schedule(self, plan: Plan) -> float:
        """Its microbatches on stages that are all equally long and never wait; or all state shared out evenly."""
        return self._floor(plan, self.prices.even_seconds(plan) if self.goal != "memory" else 0.0)

    def order(self, plan: Plan) -> float:
        """What no order of these tasks on its stages can beat; or all state shared out evenly."""
        return self._floor(plan, self.prices.least_seconds(plan) if self.goal != "memory" else 0.0)

    def _floor(self, plan: Plan, seconds: float) -> float:
        if self.goal == "memory":
            return self.prices.state_bytes / plan.device_count
        return (1 - 1e-9) * seconds * (plan.device_count if self.goal == "cost" else 1)  # sums in another order round otherwise


def _runnable(prices: Prices, done: _Search, best: Choice, runs: frozenset[str] | None) -> Choice | None:
    """The best plan that has only techniques that are run, where the best of all has others."""
    if runs is None or techniques(best.plan) <= runs:
        return None
    some = Candidates(prices.program, prices.machine, done.candidates.allow & runs)
    found = _Search(some, prices, done.goal, done.limit, shown=1)
    return min(found.run().best.values(), key=found.rank, default=None)


def _refused(program: Program, machine: Machine, prices: Prices, done: _Search, best: Choice) -> list[Choice]:
    """The plan that would be best if everything were allowed that leaves the numbers as they are."""
    every = Candidates(program, machine, SAME_NUMBERS | done.candidates.allow)
    if every.allow == done.candidates.allow:
        return []
    search_all = _Search(every, prices, done.goal, done.limit, shown=1)
    search_all.threshold = value(best, done.goal)[:1]
    choices = sorted(search_all.run().best.values(), key=done.rank)
    return [choice for choice in choices[:1] if value(choice, done.goal) < value(best, done.goal)]


def _nothing_fits(candidates: Candidates, prices: Prices, limit: float) -> PlanError:
    found = _Search(candidates, prices, "memory", math.inf, shown=1).run().best.values()
    smallest = min(found, key=lambda choice: choice.cost.peak_bytes)
    program, machine = prices.program, prices.machine
    largest = sorted(smallest.cost.memory.items(), key=lambda part: -part[1])[:3]
    refused = SAME_NUMBERS - candidates.allow
    where = f"{gibibytes(limit)} a device on {machine.device_count} devices of {machine.name!r}"
    return PlanError(
        f"no plan of {program.name!r} with a batch of {candidates.batch} fits into {where}. "
        f"The smallest is {smallest.plan.short()!r}, which needs {gibibytes(smallest.cost.peak_bytes)}: "
        + ", ".join(f"{name} {gibibytes(nbytes)}" for name, nbytes in largest)
        + ". Use more devices or devices with more memory, a smaller batch"
        + (f", or allow {', '.join(sorted(refused))}." if refused else ", or a smaller model.")
    )
