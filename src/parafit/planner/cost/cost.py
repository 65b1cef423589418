"""`Cost`: what a plan takes on a machine, in named parts that add up. Plain Python."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from parafit.planner.schedules.simulate import Timeline


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one step takes.

    Attributes:
        times: seconds of the busiest device by part.
        memory: bytes of the fullest device by part.
        timeline: of a pipeline, when each task of a step runs.

    >>> cost = Cost(times={"forward matmul": 0.5, "all-reduce tensor": 0.25}, memory={"parameters": 100.0})
    >>> cost.seconds, cost.peak_bytes
    (0.75, 100)
    >>> print(cost)
    step    750.000 ms
      forward matmul          500.000 ms   67 %
      all-reduce tensor       250.000 ms   33 %
    memory  0.0 MiB a device
      parameters                  0.0 MiB 100 %
    """

    times: Mapping[str, float]
    memory: Mapping[str, float]
    timeline: Timeline | None = field(default=None, compare=False, repr=False)

    @property
    def seconds(self) -> float:
        """Seconds of one step: the sum of `times`."""
        return math.fsum(self.times.values())

    @property
    def peak_bytes(self) -> int:
        """Most bytes on one device at any time: the sum of `memory`."""
        return math.ceil(math.fsum(self.memory.values()))

    def __str__(self):
        lines = [f"step    {self.seconds * 1e3:.3f} ms", *_rows(self.times, self.seconds, 1e3, "ms ", 3)]
        lines += [f"idle    {self.timeline.idle_share:.1%} of its devices' time".replace("%", " %")] if self.timeline else []
        return "\n".join(
            [*lines, f"memory  {self.peak_bytes / 2**20:.1f} MiB a device", *_rows(self.memory, self.peak_bytes, 2**-20, "MiB", 1)]
        )


def _rows(parts: Mapping[str, float], whole: float, scale: float, unit: str, digits: int) -> list[str]:
    ordered = sorted((part for part in parts.items() if part[1]), key=lambda part: -part[1])
    return [f"  {name:20} {value * scale:10.{digits}f} {unit} {value / (whole or 1):4.0%}".replace("%", " %") for name, value in ordered]
