"""In which order does each device of a pipeline work? Schedules by name, each a function that gives a `Grid` of tasks. Plain Python."""

import inspect
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any

from parafit.errors import PlanError
from parafit.planner.schedules.forward import forward_only
from parafit.planner.schedules.gpipe import gpipe
from parafit.planner.schedules.grid import Grid
from parafit.planner.schedules.interleaved import interleaved
from parafit.planner.schedules.list_scheduler import list_schedule
from parafit.planner.schedules.one_f_one_b import one_f_one_b
from parafit.planner.schedules.times import TaskTimes
from parafit.planner.schedules.zero_bubble import zero_bubble_h1
from parafit.support.arguments import did_you_mean

SCHEDULES = MappingProxyType(
    {
        "gpipe": gpipe,
        "1f1b": one_f_one_b,
        "interleaved": interleaved,
        "zb-h1": zero_bubble_h1,
        "list": list_schedule,
    }
)
"""Every schedule by its name. Its function takes what it goes by: `devices` and `microbatches`; `interleave` if it knows several stages a
device; `times` and `in_flight` if it goes by what tasks take and devices may keep."""


def make_grid(
    schedule: str,
    *,
    devices: int,
    microbatches: int,
    interleave: int = 1,
    times: TaskTimes | None = None,
    in_flight: Sequence[int] | None = None,
) -> Grid:
    """What each device of a training pipeline runs, in its order.

    Args:
        schedule: its name in `SCHEDULES`.
        devices: how many the pipeline has.
        microbatches: how many go through it.
        interleave: stages a device.
        times: what each stage's tasks take, for a schedule that goes by it.
        in_flight: results of stages that each device may keep for the backward pass, for a schedule that goes by it.

    Raises:
        PlanError: the schedule is unknown, has one stage a device, or cannot take that many microbatches; or a number means nothing.

    >>> make_grid("1f1b", devices=4, microbatches=16).in_flight
    (4, 3, 2, 1)
    >>> make_grid("zb-h2", devices=4, microbatches=16)
    Traceback (most recent call last):
    parafit.errors.PlanError: schedule='zb-h2': choose one of 'gpipe', '1f1b', 'interleaved', 'zb-h1', 'list'. Did you mean 'zb-h1'?
    """
    if schedule not in SCHEDULES:
        raise PlanError(f"schedule={schedule!r}: choose one of {_names(SCHEDULES)}." + did_you_mean(str(schedule), SCHEDULES))
    _check_numbers(devices=devices, microbatches=microbatches, interleave=interleave)
    if interleave > 1 and not knows_interleave(schedule):
        raise PlanError(
            f"schedule {schedule!r} has one stage a device, so interleave={interleave} is not for it. Leave interleave out, or choose "
            f"{_names(filter(knows_interleave, SCHEDULES), ' or ')}."
        )
    asked = {"devices": devices, "microbatches": microbatches, "interleave": interleave, "times": times, "in_flight": in_flight}
    return SCHEDULES[schedule](**{name: asked[name] for name in _parameters(schedule)})


def make_forward_grid(*, devices: int, microbatches: int, interleave: int = 1) -> Grid:
    """What each device of a forward pipeline runs (`evaluate`, `predict`), on stages cut for any training schedule.

    Args:
        devices: how many the pipeline has.
        microbatches: how many go through it.
        interleave: stages a device.

    Raises:
        PlanError: a number means nothing.

    >>> make_forward_grid(devices=4, microbatches=16, interleave=2).in_flight
    (1, 1, 1, 1)
    """
    _check_numbers(devices=devices, microbatches=microbatches, interleave=interleave)
    return forward_only(devices=devices, microbatches=microbatches, interleave=interleave)


def knows_interleave(schedule: str) -> bool:
    """Whether a schedule can give a device several stages.

    >>> [name for name in SCHEDULES if knows_interleave(name)]
    ['interleaved', 'list']
    """
    return "interleave" in _parameters(schedule)


def _parameters(schedule: str) -> tuple[str, ...]:
    function: Callable[..., Grid] = SCHEDULES[schedule]
    return tuple(inspect.signature(function).parameters)


def _check_numbers(**numbers: Any) -> None:
    for name, number in numbers.items():
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise PlanError(f"{name}={number!r}: expected a whole number of at least 1.")


def _names(names, between: str = ", ") -> str:
    return between.join(map(repr, names))
