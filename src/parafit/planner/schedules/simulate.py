"""When does each task of a schedule run, and how long do devices wait? Plain Python.

A task starts when its device has done the one before, its input has arrived, and the process that drives the device has started it. A
device sends and computes at once; what it sends to one other device goes one after the other. The idle share is

    idle share = 1 - seconds of tasks / (devices × makespan),

the bubble rate of Qi et al. 2023 ("Zero Bubble Pipeline Parallelism", section 5) for stages that take unequal times. Narayanan et al. 2021
divide by the seconds of tasks instead: (p - 1) / m where this says (p - 1) / (m + p - 1).
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import sub

from parafit.errors import PlanError
from parafit.planner.schedules.grid import Grid, Task
from parafit.planner.schedules.times import TaskTimes


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """When each task of a grid runs.

    Attributes:
        grid: the schedule.
        start: seconds at which each task starts, as `grid.tasks` has them.
        end: seconds at which each is done.
    """

    grid: Grid
    start: tuple[tuple[float, ...], ...]
    end: tuple[tuple[float, ...], ...]

    @cached_property
    def makespan(self) -> float:
        """Seconds from the start of the first task to the end of the last."""
        return max((ends[-1] for ends in self.end if ends), default=0.0)

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """Seconds in which each device computes."""
        return tuple(sum(map(sub, ends, starts)) for starts, ends in zip(self.start, self.end))

    @property
    def idle_shares(self) -> tuple[float, ...]:
        """The share of the makespan in which each device does not compute."""
        return tuple(max(0.0, 1 - busy / self.makespan) if self.makespan else 0.0 for busy in self.busy)

    @property
    def idle_share(self) -> float:
        """The share of all devices' time in which none of their tasks runs."""
        return sum(self.idle_shares) / len(self.idle_shares)

    def dispatch_order(self) -> list[Task]:
        """All tasks by their starts: the order in which one process dispatches those of its devices. Each comes after all it needs."""
        place = {task: start for row, starts in zip(self.grid.tasks, self.start) for task, start in zip(row, starts)}
        return sorted((task for _, task in self.grid.order), key=place.__getitem__)


def simulate(grid: Grid, times: TaskTimes, *, processes: Sequence[int] | None = None) -> Timeline:
    """When each task of a grid runs.

    Args:
        grid: what each device runs.
        times: what each stage's tasks take.
        processes: the process that drives each device, starting one task after the other in `dispatch_order`; by default each has its own.

    Raises:
        PlanError: times are of another number of stages, processes of another number of devices; or devices would wait for ever.

    >>> from parafit.planner.schedules.one_f_one_b import one_f_one_b
    >>> timeline = simulate(one_f_one_b(devices=4, microbatches=16), TaskTimes.equal(4))
    >>> timeline.makespan, round(timeline.idle_share, 3)
    (57.0, 0.158)
    """
    processes = range(grid.devices) if processes is None else processes
    if len(processes) != grid.devices:
        raise PlanError(f"processes={tuple(processes)}: expected one for each of the {grid.devices} devices.")
    timeline = _run(grid, times, {})
    return _run(grid, times, _started(timeline, times.host, processes)) if times.host else timeline


def _started(timeline: Timeline, host: float, processes: Sequence[int]) -> dict[Task, float]:
    """When the processes have started each task, if nothing makes them wait."""
    count, started = Counter[int](), {}
    for task in timeline.dispatch_order():
        process = processes[timeline.grid.device_of[task.stage]]
        count[process] += 1
        started[task] = count[process] * host
    return started


def _run(grid: Grid, times: TaskTimes, started: Mapping[Task, float]) -> Timeline:
    seconds, device_of = times.of(grid), grid.device_of
    starts, ends = ([[] for _ in grid.tasks] for _ in range(2))
    free, links, arrived = [0.0] * grid.devices, defaultdict[tuple[int, int], float](float), dict[Task | None, float]()
    for device, task in grid.order:
        kind, stage, _ = task
        start = max(free[device], arrived.get(grid.source(task), 0.0), started.get(task, 0.0))
        free[device] = end = start + seconds[kind][stage]
        starts[device].append(start)
        ends[device].append(end)
        to = grid.receiver(task)
        if to is not None and device_of[to] != device:
            link = (device, device_of[to])
            links[link] = end = max(end, links[link]) + times.send[min(stage, to)]
        arrived[task] = end
    return Timeline(grid=grid, start=tuple(map(tuple, starts)), end=tuple(map(tuple, ends)))
