"""What a pipeline's stages take, send and wait for. Plain Python.

A pipeline of p stages, m microbatches and v chunks a stage idles (p - 1) / v microbatches (1F1B, Narayanan et al. 2021).
"""

import math
from collections.abc import Mapping, Sequence

from parafit.planner.cost.collectives import SEND, Group, seconds
from parafit.planner.cost.framework import Software
from parafit.planner.cost.memory import boundary
from parafit.planner.machine.machine import Machine
from parafit.planner.partition import Partition
from parafit.planner.plan import Plan
from parafit.planner.program import Program


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
        self.stages = plan.axes.get("pipeline", 1)
        self.blocks = max((operation.count for operation in program.operations), default=1)

    def pipelined(self, parts: dict[str, dict[str, float]]) -> dict[str, float]:
        """Seconds of all microbatches on the busiest stage, what it sends, and the time it waits."""
        count = self.partition.rounds
        hops = self.hops()
        stages = self.stage_times(parts, hops)
        busiest = max(stages, key=lambda times: sum(times.values()))
        times = {name: value * count for name, value in busiest.items()}
        if self.stages > 1:
            longest = sum(busiest.values()) - busiest["send pipeline"]
            rest = sum(parts["first"].values()) + sum(parts["last"].values()) + self.blocks * sum(parts["blocks"].values()) - longest
            times["bubble"] = (max(0.0, rest) + sum(hops)) / self.plan.interleave
        return times

    def stage_times(self, parts: dict[str, dict[str, float]], hops: Sequence[float]) -> list[dict[str, float]]:
        """Seconds by part of one microbatch on the first, the last and a middle stage.

        Args:
            parts: seconds of a microbatch by place ("first", "blocks", "last") and by part; those in "blocks" are of one block.
            hops: seconds that a microbatch takes from each stage to the next.
        """
        totals = {place: sum(times.values()) for place, times in parts.items()}
        if self.stages == 1:
            return [merge(merge(_times(parts["blocks"], self.blocks), parts["first"]), parts["last"])]
        first, middle, last = self.cut(totals)
        ends = [merge(_times(parts["blocks"], count), parts[place]) for place, count in (("first", first), ("last", last))]
        stages = [*ends, _times(parts["blocks"], middle)]
        return [stage | {"send pipeline": sent} for stage, sent in zip(stages, (hops[0], hops[-1], max(hops)))]

    def hops(self) -> list[float]:
        """Seconds to hand one microbatch over each boundary between stages, and its gradient back: in a host, or between hosts where one
        ends there (the chunks of an interleaved schedule go round, so that every stage waits for the slowest)."""
        inside = max(1, self.machine.devices_per_host // self.partition.group("pipeline").stride) if self.stages > 1 else 1
        round_trip = self.plan.interleave > 1 and self.stages > inside
        across = [round_trip or (index + 1) % inside == 0 for index in range(self.stages - 1)]
        one = {kind: 2 * self.plan.interleave * self.send_seconds(kind) for kind in set(across)}
        return [one[kind] for kind in across]

    def cut(self, totals: Mapping[str, float]) -> tuple[int, int, int]:
        """Blocks of the first, of the fullest middle and of the last stage, so that the slowest is as quick as can be."""
        each = math.ceil(self.blocks / self.stages)
        if self.software.equal_stages:
            return each, each, each
        best = (math.inf, each, each, each)
        for last in range(each + 1):
            rest = self.blocks - last
            for middle in range(math.ceil(rest / (self.stages - 1)), rest + 1) if self.stages > 2 else (0,):
                first = max(0, rest - middle * (self.stages - 2))
                ends = totals["first"] + first * totals["blocks"], totals["last"] + last * totals["blocks"]
                best = min(best, (max(*ends, middle * totals["blocks"]), first, middle, last))
                if middle * totals["blocks"] >= best[0]:
                    break
        return best[1:]

    def send_seconds(self, across: bool) -> float:
        """One activation from one stage to the next, in a host or to another."""
        nbytes = sum(self.partition.local_bytes(tensor) for tensor in boundary(self.program, self.program.operations))
        tensor = self.plan.axes.get("tensor", 1)
        if self.software.send_split and not any(self.plan.compute.get(dim) == "tensor" for dim in ("sequence",)):
            nbytes /= tensor
        return seconds(SEND, nbytes, self.partition.group("pipeline") if across else Group(2), self.machine)

    def copies(self, count: int) -> int:
        """How many of `count` equal operations the fullest stage has."""
        return math.ceil(count / self.stages) if count > 1 else 1


def merge(times: dict[str, float], more: Mapping[str, float]) -> dict[str, float]:
    """`times` with `more` added to it, in place.

    Args:
        times: seconds by part; changed.
        more: seconds by part.
    """
    for name, value in more.items():
        times[name] = times.get(name, 0.0) + value
    return times


def _times(times: Mapping[str, float], count: float) -> dict[str, float]:
    return {name: value * count for name, value in times.items()}
