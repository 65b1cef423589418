"""What the tasks of a pipeline take. Plain Python."""

import math
from dataclasses import dataclass, fields

from parafit.errors import PlanError
from parafit.planner.schedules.grid import Grid


@dataclass(frozen=True, kw_only=True)
class TaskTimes:
    """Seconds of each stage's tasks for one microbatch.

    Args:
        forward: the forward pass of each stage.
        backward: the gradient of each stage's input.
        weights: the gradient of each stage's weights. A B that is the whole backward pass takes `backward` and `weights`.
        send: from each stage to the next, and for the gradient back: one number fewer than stages. Stages of one device send nothing.
        host: what the process that drives a device needs to start one task.

    Raises:
        PlanError: stages are told of in unequal numbers, or a time is negative or not finite.

    >>> TaskTimes.equal(4, forward=1e-3, backward=1e-3, weights=1e-3).seconds("B", whole=True)[0]
    0.002
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    weights: tuple[float, ...]
    send: tuple[float, ...]
    host: float = 0.0

    def __post_init__(self):
        stages = len(self.forward)
        for field in fields(self)[:-1]:
            seconds = getattr(self, field.name)
            if len(seconds) != stages - (field.name == "send"):
                expected = "one number fewer than stages" if field.name == "send" else "as many as of forward"
                raise PlanError(f"{field.name} has {len(seconds)} times where forward has {stages}: expected {expected}.")
            for second in seconds:
                _check(field.name, second)
        _check("host", self.host)

    @classmethod
    def equal(
        cls, stages: int, *, forward: float = 1.0, backward: float = 1.0, weights: float = 1.0, send: float = 0.0, host: float = 0.0
    ) -> "TaskTimes":
        """The times of stages that are all alike.

        Args:
            stages: how many.
            forward: seconds of each one's forward pass.
            backward: seconds of the gradient of its input.
            weights: seconds of the gradient of its weights.
            send: seconds from one to the next.
            host: seconds to start one task.
        """
        every = {"forward": forward, "backward": backward, "weights": weights}
        return cls(**{name: (seconds,) * stages for name, seconds in every.items()}, send=(send,) * (stages - 1), host=host)

    def seconds(self, kind: str, *, whole: bool) -> tuple[float, ...]:
        """The time of each stage's task of a kind.

        Args:
            kind: "F", "B" or "W".
            whole: B is the whole backward pass.
        """
        if kind == "B" and whole:
            return tuple(backward + weights for backward, weights in zip(self.backward, self.weights))
        return {"F": self.forward, "B": self.backward, "W": self.weights}[kind]

    def of(self, grid: Grid) -> dict[str, tuple[float, ...]]:
        """The time of each stage's tasks by the kinds that a grid has.

        Raises:
            PlanError: the grid has another number of stages.
        """
        if len(self.forward) != grid.stages:
            raise PlanError(f"times are of {len(self.forward)} stages, but schedule {grid.schedule!r} has {grid.stages}.")
        return {kind: self.seconds(kind, whole=not grid.splits_backward) for kind in grid.kinds}


def _check(name: str, seconds: float) -> None:
    if not (math.isfinite(seconds) and seconds >= 0):
        raise PlanError(f"{name}={seconds!r}: expected seconds, finite and not negative.")
