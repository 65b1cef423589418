"""When the tasks of a pipeline run: its schedule, simulated with what stages take and send. Plain Python.

The grid is the one that runs. Parts of a price are those of the device that computes longest; how much longer the last one takes is the
"bubble", and what of it is due to sending and to starting tasks is listed apart.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

from parafit.planner.cost.collectives import SEND, Group, seconds
from parafit.planner.cost.framework import Software
from parafit.planner.cost.memory import boundary
from parafit.planner.machine.machine import Machine
from parafit.planner.partition import Partition
from parafit.planner.plan import Plan
from parafit.planner.program import Program
from parafit.planner.schedules import make_grid
from parafit.planner.schedules.bounds import kept, least_makespan
from parafit.planner.schedules.grid import SPLIT_BACKWARD
from parafit.planner.schedules.simulate import Timeline, simulate
from parafit.planner.schedules.times import TaskTimes

Tasks = Mapping[str, Mapping[str, float]]
"""Seconds of one microbatch by kind of task ("F", "B", "W"), then by part."""


class Pipeline:
    """The stages that a plan puts the blocks of a program on: how long each takes, what it sends, and how long it waits.

    Args:
        program: what one step computes.
        plan: who does it.
        machine: what computes.
        software: what the framework does.
        partition: what each device holds and exchanges.
    """

    def __init__(self, program: Program, plan: Plan, machine: Machine, software: Software, partition: Partition):
        self.program, self.plan, self.machine, self.software, self.partition = program, plan, machine, software, partition
        self.devices = plan.axes.get("pipeline", 1)
        self.stages = self.devices * plan.interleave if self.devices > 1 else 1
        self.blocks = max((operation.count for operation in program.operations), default=1)

    def tasks(self, place: str) -> Tasks:
        """One microbatch in the operations before the blocks ("first"), in one of the "blocks", or after them ("last")."""
        raise NotImplementedError

    def sums(self, place: str) -> dict[str, float]:
        """The same by kind of task."""
        return {kind: sum(part.values()) for kind, part in self.tasks(place).items()}

    def stage_tasks(self, stage: int) -> Tasks:
        """One microbatch on a stage."""
        found: dict[str, dict[str, float]] = {kind: {} for kind in SPLIT_BACKWARD}
        for place, count in self.stage_places(stage):
            for kind, part in self.tasks(place).items():
                merge(found[kind], {name: value * count for name, value in part.items()})
        return found

    def stage_sums(self, stage: int) -> dict[str, float]:
        """The same by kind of task."""
        found: dict[str, float] = dict.fromkeys(SPLIT_BACKWARD, 0.0)
        for place, count in self.stage_places(stage):
            merge(found, {kind: value * count for kind, value in self.sums(place).items()})
        return found

    def stage_places(self, stage: int) -> list[tuple[str, int]]:
        """Where the operations of a stage are, and how often."""
        ends = [("first", 1)] * (stage == 0) + [("last", 1)] * (stage == self.stages - 1)
        return [("blocks", self.counts[stage]), *ends]

    def pipelined(self, *, simulated: bool = True) -> tuple[dict[str, float], Timeline | None]:
        """Seconds of all microbatches on the busiest device, what it sends, and the time it waits; and when every task runs.

        Args:
            simulated: by the schedule's grid; else what it takes at least.
        """
        if self.devices == 1:
            return self.device_parts(0), None
        busy = self.busy_seconds()
        busiest = max(range(self.devices), key=busy.__getitem__)
        parts, computing = self.device_parts(busiest), self.partition.turns * busy[busiest]
        if not simulated:
            return parts | {"bubble": max(0.0, self.makespan_at_least() - computing)}, None
        whole, quiet, still = self.timelines(self.task_times)
        merge(parts, {"send pipeline": quiet.makespan - still.makespan, "dispatch": whole.makespan - quiet.makespan})
        return parts | {"bubble": max(0.0, still.makespan - computing)}, whole

    def busy_seconds(self) -> list[float]:
        """What one microbatch takes on each device."""
        times = self.task_times
        each = list(map(sum, zip(times.forward, times.backward, times.weights)))
        return [sum(each[device :: self.devices]) for device in range(self.devices)]

    def makespan_at_least(self) -> float:
        """Seconds of all microbatches, if there are so many equal ones, by what the schedule takes at least."""
        return least_makespan(self.plan.schedule, self.task_times, devices=self.devices, microbatches=self.partition.turns)

    def least_seconds(self) -> float:
        """The same with microbatches as they are."""
        return self.makespan_at_least() + max(self.busy_seconds()) * (self.partition.rounds - self.partition.turns)

    def timelines(self, times: TaskTimes) -> tuple[Timeline, Timeline, Timeline]:
        """When the tasks of the plan's grid run; the same if starting them took nothing; and if sending took nothing either."""
        grid = make_grid(
            self.plan.schedule,
            devices=self.devices,
            microbatches=self.partition.turns,
            interleave=self.plan.interleave,
            times=times,
        )
        quiet = simulate(grid, replace(times, host=0.0))
        still = simulate(grid, replace(times, host=0.0, send=(0.0,) * len(times.send))) if any(times.send) else quiet
        hosts = [device // self.devices_inside for device in range(self.devices)]
        return simulate(grid, times, processes=hosts) if times.host else quiet, quiet, still

    def device_parts(self, device: int) -> dict[str, float]:
        """Seconds of all microbatches on a device by part."""
        parts: dict[str, float] = {}
        for stage in range(device, self.stages, self.devices):
            for part in self.stage_tasks(stage).values():
                merge(parts, part)
            merge(parts, {"send pipeline": 2 * self.blocked(stage)} if self.devices > 1 else {})
        return {name: value * self.partition.rounds for name, value in parts.items()}

    @cached_property
    def task_times(self) -> TaskTimes:
        """What each stage's tasks take."""
        return self.timed()

    def timed(self) -> TaskTimes:
        """The same, worked out."""
        sums = [self.stage_sums(stage) for stage in range(self.stages)]
        return TaskTimes(
            forward=tuple(each["F"] + self.blocked(stage) for stage, each in enumerate(sums)),
            backward=tuple(each["B"] + self.blocked(stage) for stage, each in enumerate(sums)),
            weights=tuple(each["W"] for each in sums),
            send=tuple(travels for _, travels in self.hops),
            host=self.machine.device.dispatch_seconds,
        )

    def blocked(self, stage: int) -> float:
        """Seconds in which handing a microbatch on, and again its gradient back, keeps a stage from computing.

        Where sender and receiver wait for each other, a stage waits for what it exchanges with the next; the last one with that before it.
        """
        return self.hops[min(stage, self.stages - 2)][0]

    @cached_property
    def hops(self) -> list[tuple[float, float]]:
        """Seconds at each boundary between stages that keep from computing, and that do not: in a host, or between two where one ends."""
        inside, found, remembered = self.devices_inside, [], {}
        for stage in range(self.stages - 1):
            one, other = stage % self.devices, (stage + 1) % self.devices
            key = one // inside != other // inside, self.passed_bytes(stage)
            if key not in remembered:
                remembered[key] = self.hop(*key)
            found.append(remembered[key])
        return found

    def hop(self, across: bool, nbytes: float) -> tuple[float, float]:
        """Seconds of one activation from one stage to the next in which the processor cannot compute, and the others.

        Args:
            across: from one host to another.
            nbytes: bytes of a device's part of it.
        """
        taken = self.send_seconds(across, nbytes)
        link = self.machine.network if across else self.machine.inner
        blocked = taken * (link.processor_share if self.software.overlap_sends else 1.0)
        return blocked, taken - blocked

    @property
    def devices_inside(self) -> int:
        """Devices of a pipeline in one host."""
        return max(1, self.machine.devices_per_host // self.partition.group("pipeline").stride)

    @cached_property
    def counts(self) -> list[int]:
        """Blocks of each stage, so that the slowest is as quick as can be. Where times depend on memory, stages are taken to be equal."""
        if self.stages == 1:
            return [self.blocks]
        if self.software.equal_stages:
            most = math.ceil(self.blocks / self.stages)
            return [max(0, min(most, self.blocks - stage * most)) for stage in range(self.stages)]
        if self.machine.device.curves:
            return _spread(self.blocks, self.stages)
        first, _, last = self.cut({place: sum(self.sums(place).values()) for place in ("first", "blocks", "last")})
        return [first, *_spread(self.blocks - first - last, self.stages - 2), last]

    def cut(self, totals: Mapping[str, float]) -> tuple[int, int, int]:
        """Blocks of the first, of the fullest middle and of the last stage, so that the slowest is as quick as can be."""
        best = (math.inf, 0, 0, 0)
        for last in range(math.ceil(self.blocks / self.stages) + 1):
            rest = self.blocks - last
            for middle in range(math.ceil(rest / (self.stages - 1)), rest + 1) if self.stages > 2 else (0,):
                first = max(0, rest - middle * (self.stages - 2))
                ends = totals["first"] + first * totals["blocks"], totals["last"] + last * totals["blocks"]
                best = min(best, (max(*ends, middle * totals["blocks"]), first, middle, last))
                if middle * totals["blocks"] >= best[0]:
                    break
        return best[1:]

    def passed_bytes(self, stage: int) -> float:
        """Bytes of a microbatch that a stage hands on."""
        return self._boundary_bytes

    @cached_property
    def _boundary_bytes(self) -> float:
        return sum(self.partition.local_bytes(tensor) for tensor in boundary(self.program, self.program.operations))

    def send_seconds(self, across: bool, nbytes: float) -> float:
        """One activation from one stage to the next, in a host or to another.

        Args:
            across: from one host to another.
            nbytes: bytes of a device's part of it.
        """
        tensor = self.plan.axes.get("tensor", 1)
        if self.software.send_split and self.plan.compute.get("sequence") != "tensor":
            nbytes /= tensor
        return seconds(SEND, nbytes, self.partition.group("pipeline") if across else Group(2), self.machine)

    def in_flight(self) -> list[float]:
        """Microbatches whose activations each device keeps at once, of all its stages."""
        plan, turns = self.plan, self.partition.turns
        results = kept(plan.schedule, devices=self.devices, microbatches=turns, interleave=plan.interleave)
        return [count / plan.interleave for count in results]

    def copies(self, count: int) -> int:
        """How many of `count` equal operations the fullest device has."""
        return math.ceil(count / self.devices) if count > 1 else 1


def merge(times: dict[str, float], more: Mapping[str, float]) -> dict[str, float]:
    """`times` with `more` added to it, in place.

    Args:
        times: seconds by part; changed.
        more: seconds by part.
    """
    for name, value in more.items():
        times[name] = times.get(name, 0.0) + value
    return times


def _spread(count: int, over: int) -> list[int]:
    """So many as evenly as can be.

    >>> _spread(5, 3)
    [1, 2, 2]
    """
    return [count * (place + 1) // over - count * place // over for place in range(over)]
