"""What training state takes on its way: gradients that are reduced, parameters that are gathered. Plain Python."""

import math
from collections.abc import Mapping

from parafit.planner.cost.collectives import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, Group, seconds
from parafit.planner.cost.pipeline import Pipeline


class Exchanges(Pipeline):
    """The collectives of a step that are of no microbatch.

    Attributes:
        places: where each operation is: "first", before the blocks; in one of the "blocks"; "last", after them.
        pipelines: whether the plan has a pipeline, which sums the gradients of microbatches before it reduces them.
    """

    places: list[str]
    pipelines: bool

    def reduced(self, times: Mapping[str, float]) -> dict[str, float]:
        """Gradients that are partial sums, reduced over the axes that split what they sum over; hidden behind the backward pass."""
        sums: dict[str, float] = {}
        for operation, place in zip(self.program.operations, self.places):
            if operation.phase == "backward" and (place != "first" or self.devices == 1):
                for exchange in self.partition.of(operation).exchanges:
                    if exchange.tensor.role == "gradient":
                        nbytes = exchange.bytes * operation.steps * self.copies(operation.count)
                        sums[exchange.axis] = sums.get(exchange.axis, 0.0) + nbytes
        return {f"gradients {axis}": self.gradient_seconds(axis, nbytes, times) for axis, nbytes in sums.items()}

    def gradient_seconds(self, axis: str, nbytes: float, times: Mapping[str, float]) -> float:
        """Exposed seconds of reducing all gradients along an axis.

        Args:
            axis: name of a mesh axis.
            nbytes: bytes of all gradients on a device.
            times: seconds of a step by part; backward ones hide the reduction.
        """
        summed = self.pipelines or self.software.sums_microbatches
        each_time = not summed or (self.plan.zero_stage >= 2 and axis == "data")
        rounds = self.partition.turns if each_time else 1
        buckets = self.buckets(nbytes)
        one = self.state_seconds(axis, nbytes / buckets)
        if self.software.overlap_gradients and axis == "data":
            beside = _sum(times, "backward") / self.partition.turns * rounds
            return self.hidden(one * buckets * rounds, one * rounds, beside * (1 - 1 / buckets), axis)
        return one * buckets * rounds

    def buckets(self, nbytes: float) -> int:
        """Parts in which gradients are reduced or parameters gathered."""
        if self.software.bucket_bytes:
            return max(1, math.ceil(nbytes / self.software.bucket_bytes))
        return self.copies(self.blocks)

    def state_seconds(self, axis: str, nbytes: float) -> float:
        """One reduction of gradients: whole where state is not split, else scattered and, over groups, reduced across them.

        Args:
            axis: name of a mesh axis.
            nbytes: bytes of the gradients on a device.
        """
        group = self.partition.group(axis)
        if axis not in self.plan.store.values() or self.software.reduces_whole:
            return seconds(ALL_REDUCE, nbytes, group, self.machine)
        shards = self.partition.shards(axis)
        across = Group(group.size // shards, group.stride * shards)
        scattered = seconds(REDUCE_SCATTER, nbytes, Group(shards, group.stride), self.machine)
        return scattered + seconds(ALL_REDUCE, nbytes / shards, across, self.machine)

    def gathered(self, times: Mapping[str, float]) -> dict[str, float]:
        """Parameters that rest split: gathered after the update (ZeRO 1 and 2), or before each use (ZeRO 3)."""
        axis = self.plan.store.get("slot")
        if not axis:
            return {}
        parameters = [tensor for tensor in self.program.of_role("parameter") if self.partition.stored_parts(tensor, "slot") > 1]
        nbytes = sum(self.partition.local_bytes(tensor) * self.copies(tensor.count) for tensor in parameters)
        group = Group(self.partition.shards(axis), self.partition.group(axis).stride)
        if self.plan.zero_stage < 3:
            buckets = self.buckets(nbytes)
            return {f"parameters {axis}": seconds(ALL_GATHER, nbytes / buckets, group, self.machine) * buckets}
        blocks = self.copies(self.blocks)
        one = seconds(ALL_GATHER, nbytes / blocks, group, self.machine)
        return {f"parameters {axis}": sum(self.prefetched(one, blocks, phase, times) for phase in ("forward", "backward"))}

    def prefetched(self, one: float, blocks: int, phase: str, times: Mapping[str, float]) -> float:
        """Exposed seconds of gathering the parameters of all blocks, in every turn of a step.

        Args:
            one: seconds that gathering one block takes.
            blocks: number of blocks that a device runs.
            phase: "forward" or "backward": what the gathering runs beside, if the software does so.
            times: seconds of a step by part.
        """
        count = self.partition.turns
        whole = one * blocks * count
        return self.hidden(whole, one * count, _sum(times, phase), "data") if phase in self.software.prefetch else whole

    def hidden(self, taken: float, least: float, beside: float, axis: str) -> float:
        """What is left of a collective that runs beside computation: its first or last part, what outlasts the computation, and the
        processor time that it takes from it.

        Args:
            taken: seconds of the collective by itself.
            least: seconds of the part that nothing runs beside.
            beside: seconds of the computation.
            axis: name of a mesh axis.
        """
        inside, hosts = self.partition.group(axis).split(self.machine.devices_per_host)
        share = max(self.machine.inner.processor_share * (inside > 1), self.machine.network.processor_share * (hosts > 1))
        left = max(least, taken - beside)
        return left + (taken - left) * share


def _sum(times: Mapping[str, float], phase: str) -> float:
    words = ("backward", "recompute") if phase == "backward" else (phase,)
    return sum(value for name, value in times.items() if name.startswith(words))
