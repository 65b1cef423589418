"""`explain`: term by term, why one plan beats another. Plain Python."""

from collections.abc import Mapping

from parafit.errors import PlanError
from parafit.planner.cost.cost import Cost
from parafit.planner.cost.estimator import price
from parafit.planner.cost.framework import Software
from parafit.planner.layout import resolve
from parafit.planner.machine.machine import Machine
from parafit.planner.plan import Plan
from parafit.planner.program import Program
from parafit.planner.search.ranking import label, times
from parafit.support.units import gibibytes, milliseconds

Costs = tuple[Cost, Cost]


def explain(
    plan: Plan,
    instead: Plan | str,
    *,
    program: Program | None = None,
    machine: Machine | None = None,
    software: Software | None = None,
) -> str:
    """Seconds and bytes of two plans, term by term, the largest difference first, and one sentence that says which is better and why.

    Args:
        plan: a plan, as `find_plan` or `search` found it.
        instead: the plan to compare it with, or its text such as "data=8,tensor=8".
        program: what is computed; default: what `plan` was found for.
        machine: what computes; default: what `plan` was found for.
        software: what the framework does, where it is not parafit.

    Raises:
        PlanError: `plan` was not found by a search and `program` or `machine` is missing, or `instead` does not fit the program.

    >>> from parafit.planner.networks import named
    >>> program, machine = named("gpt:1.3b", batch=64), Machine.load("h100x8")
    >>> plan = Plan.parse("data=8,zero=1,precision=bfloat16")
    >>> print(explain(plan, "data=2,tensor=4,zero=1,precision=bfloat16", program=program, machine=machine).splitlines()[-1].split(":")[0])
    data=8,zero=1,precision=bfloat16 is faster
    """
    ranking = plan.ranking
    program, machine = program or (ranking and ranking.program), machine or (ranking and ranking.machine)
    if program is None or machine is None:
        raise PlanError(f"plan {plan.short()!r} was not found by a search: say for which program= and machine= it is to be explained.")
    software = software or (ranking.software if ranking else None)
    other = resolve(program, Plan.read(instead))
    _check_devices(other, machine)
    plans = (resolve(program, plan), other)
    costs = _joined(price(program, plans[0], machine, software=software)), _joined(price(program, other, machine, software=software))
    limit = ranking.limit_bytes if ranking else machine.device.memory_bytes
    names = [label(each) for each in plans]
    names = [f"{name} ({mark})" for name, mark in zip(names, "12")] if names[0] == names[1] else names
    return "\n".join([*(f"{mark}  {name}" for mark, name in zip("12", names)), "", *_terms(costs), "", verdict(costs, names, limit)])


def verdict(costs: Costs, names: list[str], limit_bytes: float) -> str:
    """One sentence: which plan is better, and by which terms.

    Args:
        costs: of two plans.
        names: what the sentence calls them.
        limit_bytes: what a device may hold.
    """
    fits = [cost.peak_bytes <= limit_bytes for cost in costs]
    if not all(fits):
        return _unfit(costs, names, fits, limit_bytes)
    quick, slow = (0, 1) if costs[0].seconds <= costs[1].seconds else (1, 0)
    ratio = costs[slow].seconds / (costs[quick].seconds or 1) - 1
    if ratio < 1e-4:
        return f"{names[0]} and {names[1]} take as long as each other."
    changes = sorted((change, name) for name, change in _changes(costs[quick].times, costs[slow].times).items())
    saves = [f"{milliseconds(change)} of {name}" for change, name in reversed(changes) if change > 0][:2]
    pays = [f"{milliseconds(-change)} of {name}" for change, name in changes if change < 0][:2]
    both = f"{milliseconds(costs[quick].seconds)} against {milliseconds(costs[slow].seconds)}, which is {times(ratio)} slower"
    return f"{names[quick]} is faster: {both}. It saves {' and '.join(saves)}" + (f", and pays {' and '.join(pays)}." if pays else ".")


def _unfit(costs, names, fits, limit_bytes) -> str:
    if not any(fits):
        return f"neither fits into {gibibytes(limit_bytes)} a device: {' and '.join(gibibytes(cost.peak_bytes) for cost in costs)}."
    good, bad = (0, 1) if fits[0] else (1, 0)
    changes = _changes(costs[good].memory, costs[bad].memory)
    name = max(changes, key=lambda name: changes[name])
    return (
        f"{names[good]} fits, {names[bad]} does not: it needs {gibibytes(costs[bad].peak_bytes)} of {gibibytes(limit_bytes)} a device, "
        f"with {gibibytes(changes[name])} more of {name}."
    )


def _check_devices(plan: Plan, machine: Machine) -> None:
    if plan.device_count > machine.device_count:
        raise PlanError(
            f"plan {plan.short()!r} wants {plan.device_count} devices, but {machine.name!r} has {machine.device_count}. "
            "Choose a smaller plan, or a machine with more hosts."
        )


def _joined(cost: Cost) -> Cost:
    """A cost whose repeated operations are one term."""
    times: dict[str, float] = {}
    for name, seconds in cost.times.items():
        term = "recomputation" if name.startswith("recompute ") else name
        times[term] = times.get(term, 0.0) + seconds
    return Cost(times=times, memory=cost.memory)


def _terms(costs: Costs) -> list[str]:
    rows = [("", "1", "2", "difference")]
    for heading, parts, write in (
        ("step", [cost.times for cost in costs], milliseconds),
        ("memory", [cost.memory for cost in costs], gibibytes),
    ):
        changes = _changes(*parts)
        order = sorted(changes, key=lambda name: (-abs(changes[name]), name))
        rows += [
            _row(f"  {name}", [part.get(name, 0.0) for part in parts], write) for name in order if any(part.get(name) for part in parts)
        ]
        rows += [_row(heading, [sum(part.values()) for part in parts], write), ("",) * 4]
    widths = [max(len(row[place]) for row in rows) for place in range(4)]
    return [f"{row[0]:{widths[0]}}  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:])) for row in rows[:-1]]


def _row(name: str, values: list[float], write) -> tuple[str, str, str, str]:
    change = values[1] - values[0]
    return name, write(values[0]), write(values[1]), ("+" if change > 0 else "") + write(change)


def _changes(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {name: other.get(name, 0.0) - one.get(name, 0.0) for name in sorted({*one, *other})}
