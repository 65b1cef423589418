"""What keeps the best plan from using more of a machine: the batch, heads and widths, layers. Plain Python."""

import math
from dataclasses import replace

from parafit.planner.cost.estimator import estimator
from parafit.planner.cost.framework import Software
from parafit.planner.cost.stages import is_counted
from parafit.planner.layout import Piece, kernel_dims, undivided
from parafit.planner.plan import AXES, Plan
from parafit.planner.search.space import Candidates
from parafit.support.units import milliseconds


def limits(candidates: Candidates, software: Software, plan: Plan, seconds: float) -> tuple[str, ...]:
    """Sentences for what a plan leaves whole or idle, each with the sizes that would not.

    Args:
        candidates: that the plan was chosen from.
        software: that runs it.
        plan: the best.
        seconds: what it takes.
    """
    program, count = candidates.program, candidates.machine.device_count
    found = [undivided(candidates.batch, plan), _whole_dims(candidates, plan), _uneven_stages(candidates, plan)]
    if idle := count - plan.device_count:
        reasons = [reason for reason in (_batch(candidates, software, plan, seconds), _layers(candidates, plan)) if reason]
        found.append(
            f"{idle} of {count} devices stay idle: " + ("; ".join(reasons) or f"no other plan of {program.name!r} is faster on them")
        )
    return tuple(filter(None, found))


def _batch(candidates: Candidates, software: Software, plan: Plan, seconds: float) -> str:
    """Whether the devices would be of use if they divided the batch."""
    size, batch = plan.axes.get("data", 1), candidates.batch
    most = candidates.machine.device_count // (plan.device_count // size)
    if "data" not in candidates.allow or most <= size:
        return ""
    if batch < most:
        return f"a batch of {batch} rows has none for {most} devices of a data axis"
    axes = {axis: {**plan.axes, "data": most}.get(axis, 1) for axis in ("pipeline", "data", "tensor")}
    wider = replace(
        plan, axes={axis: each for axis, each in axes.items() if each > 1}, compute={AXES["data"]: "data", **plan.compute}, store_group=0
    )
    rows = batch / plan.microbatches
    even = estimator(
        candidates.program, wider, candidates.machine, software, cut=(Piece(count=plan.microbatches, rows=rows, devices=most),)
    )
    faster = even.cost().seconds
    step = most * plan.microbatches
    if batch % step == 0 or faster >= seconds:
        return ""
    sizes = " or ".join(str(each) for each in (batch // step * step, (batch // step + 1) * step) if each)
    would = f"else a step would take {milliseconds(faster)} ({sizes} rows would be divided)"
    return f"data={most} does not divide a batch of {batch} rows, {would}"


def _layers(candidates: Candidates, plan: Plan) -> str:
    stages = plan.axes.get("pipeline", 1)
    if stages == candidates.blocks > 1 and is_counted(candidates.program):
        return f"a pipeline has no more stages than the {stages} blocks"
    return ""


def _uneven_stages(candidates: Candidates, plan: Plan) -> str:
    stages = plan.axes.get("pipeline", 1) * plan.interleave
    if candidates.blocks % stages == 0 or stages == 1 or not is_counted(candidates.program):
        return ""
    parts = "stages" if plan.interleave == 1 else "chunks of stages"
    most = math.ceil(candidates.blocks / stages)
    return f"{stages} {parts} do not divide {candidates.blocks} blocks: some have {most}, some fewer"


def _whole_dims(candidates: Candidates, plan: Plan) -> str:
    """Dims of kernels that the tensor axis does not divide."""
    size, sizes = plan.axes.get("tensor", 1), candidates.program.sizes
    whole = [dim for dim in kernel_dims(candidates.program) if sizes[dim] % size]
    if size == 1 or not whole:
        return ""
    return f"tensor={size} leaves {', '.join(f'{dim} ({sizes[dim]})' for dim in whole)} whole, which it does not divide"
