"""A schedule invented for the stages at hand, from what their tasks take. Plain Python."""

import dataclasses
import heapq
import math
from collections.abc import Iterator, Sequence

from parafit.errors import PlanError
from parafit.planner.schedules.gpipe import gpipe
from parafit.planner.schedules.grid import SPLIT_BACKWARD, WHOLE_BACKWARD, Grid, Kind, Task, cyclic
from parafit.planner.schedules.interleaved import interleaved, most_in_flight
from parafit.planner.schedules.one_f_one_b import one_f_one_b
from parafit.planner.schedules.simulate import simulate
from parafit.planner.schedules.times import TaskTimes
from parafit.planner.schedules.zero_bubble import zero_bubble_h1


def list_schedule(
    *, devices: int, microbatches: int, interleave: int, times: TaskTimes | None = None, in_flight: Sequence[int] | None = None
) -> Grid:
    """The fastest of the orders known and of two that are made here, by `simulate`, among those that keep to a memory limit.

    The two, with the backward pass whole and split, are list schedules (Graham 1969, "Bounds on Multiprocessing Timing Anomalies"):
    whenever a device is free it runs what is ready, B before F before W, and of one kind the earliest microbatch, on its last stage.

    Args:
        devices: how many.
        microbatches: how many.
        interleave: stages a device.
        times: what each stage's tasks take; equal stages by default.
        in_flight: results of stages that each device may keep; by default as many as 1F1B keeps, interleaved if there are several stages.

    Raises:
        PlanError: a device may keep less than one result of each of its stages.

    >>> uneven = TaskTimes(forward=(1, 1, 3), backward=(1, 1, 3), weights=(1, 1, 3), send=(0, 0))
    >>> grid = list_schedule(devices=3, microbatches=8, interleave=1, times=uneven)
    >>> grid.in_flight, simulate(grid, uneven).makespan, simulate(one_f_one_b(devices=3, microbatches=8), uneven).makespan
    ((3, 2, 1), 74.0, 78.0)
    """
    times = times or TaskTimes.equal(devices * interleave)
    limits = _limits(devices, microbatches, interleave, in_flight)
    invented = [
        _Rows(devices=devices, microbatches=microbatches, interleave=interleave, kinds=kinds, times=times, limits=limits).grid()
        for kinds in (WHOLE_BACKWARD, SPLIT_BACKWARD)
    ]
    fitting = [grid for grid in (*_known(devices, microbatches, interleave), *invented) if _fits(grid, limits)]
    return dataclasses.replace(min(fitting, key=lambda grid: simulate(grid, times).makespan), schedule="list")


def _limits(devices: int, microbatches: int, interleave: int, in_flight: Sequence[int] | None) -> tuple[int, ...]:
    if in_flight is None:
        most = most_in_flight(devices, interleave) if interleave > 1 else range(devices, 0, -1)
        return tuple(min(microbatches * interleave, limit) for limit in most)
    if len(in_flight) != devices or min(in_flight) < interleave:
        raise PlanError(
            f"in_flight={tuple(in_flight)}: expected a number for each of the {devices} devices, of at least {interleave}, so that a "
            "microbatch can pass."
        )
    return tuple(in_flight)


def _known(devices: int, microbatches: int, interleave: int) -> Iterator[Grid]:
    if interleave == 1:
        yield from (known(devices=devices, microbatches=microbatches) for known in (one_f_one_b, zero_bubble_h1, gpipe))
    elif microbatches % devices == 0:
        yield interleaved(devices=devices, microbatches=microbatches, interleave=interleave)


def _fits(grid: Grid, limits: tuple[int, ...]) -> bool:
    return all(held <= limit for held, limit in zip(grid.in_flight, limits))


class _Rows:
    """The rows of a grid while they grow, event by event."""

    def __init__(
        self, *, devices: int, microbatches: int, interleave: int, kinds: tuple[Kind, ...], times: TaskTimes, limits: tuple[int, ...]
    ):
        self._empty = Grid(
            schedule="list", microbatches=microbatches, kinds=kinds, device_of=cyclic(devices, interleave), tasks=((),) * devices
        )
        self._seconds, self._send, self._limits = times.of(self._empty), times.send, limits
        self._rows: list[list[Task]] = [[] for _ in range(devices)]
        self._next = {kind: [0] * self._empty.stages for kind in kinds}
        self._arrived: dict[Task | None, float] = {None: 0.0}
        self._free, self._held = [0.0] * devices, [0] * devices

    def grid(self) -> Grid:
        """Run every task as soon as its device is free and it is ready; devices look whenever something may have become so."""
        events = [(0.0, device) for device in range(self._empty.devices)]
        while events:
            now, device = heapq.heappop(events)
            task = self._choose(device, now) if self._free[device] <= now else None
            if task:
                for event in self._run(task, device, now):
                    heapq.heappush(events, event)
        return dataclasses.replace(self._empty, tasks=tuple(map(tuple, self._rows)))

    def _choose(self, device: int, now: float) -> Task | None:
        for kind in sorted(self._empty.kinds):  # B, F, W
            tasks = [
                task for task in self._following(kind, device) if self._ready(task, now) and (kind != "F" or self._has_room(task, device))
            ]
            if tasks:
                return min(tasks, key=lambda task: (task.microbatch, -task.stage))
        return None

    def _following(self, kind: Kind, device: int) -> Iterator[Task]:
        """The next task of a kind on each of a device's stages, microbatches in order."""
        for stage in range(device, self._empty.stages, self._empty.devices):
            microbatch = self._next[kind][stage]
            before = {"F": self._empty.microbatches, "B": self._next["F"][stage], "W": self._next["B"][stage]}[kind]
            if microbatch < before:
                yield Task(kind, stage, microbatch)

    def _ready(self, task: Task, now: float) -> bool:
        return self._arrived.get(self._empty.source(task), math.inf) <= now

    def _has_room(self, task: Task, device: int) -> bool:
        """Whether all microbatches under way can still pass the device's stages, the earliest first, once one more result is kept.

        Each needs room for the results to come of it and gives back all that are kept of it, so none waits for another for ever
        (Dijkstra 1965, the banker's algorithm).
        """
        stages = range(device, self._empty.stages, self._empty.devices)
        forward, released = self._next["F"], self._next[self._empty.kinds[-1]]
        room = self._limits[device] - self._held[device] - 1
        for microbatch in range(min(released[stage] for stage in stages), max(forward[device], task.microbatch + 1)):
            if room >= len(stages):
                return True
            passed = sum(forward[stage] > microbatch for stage in stages) + (microbatch == task.microbatch)
            if room < len(stages) - passed:
                return False
            room += passed - sum(released[stage] > microbatch for stage in stages)
        return True

    def _run(self, task: Task, device: int, now: float) -> Iterator[tuple[float, int]]:
        """Put a task into its row; when which devices shall look for what to do next."""
        kind, stage, _ = task
        self._rows[device].append(task)
        self._next[kind][stage] += 1
        self._held[device] += (kind == "F") - (kind == self._empty.kinds[-1])
        self._free[device] = end = now + self._seconds[kind][stage]
        yield end, device
        to = self._empty.receiver(task)
        if to is not None:
            neighbour = self._empty.device_of[to]
            self._arrived[task] = end + (self._send[min(stage, to)] if neighbour != device else 0.0)
            yield self._arrived[task], neighbour
