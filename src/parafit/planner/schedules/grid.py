"""A pipeline schedule as data: which task each device runs, in which order. Plain Python.

A network is cut into stages, a batch into microbatches. Each stage has up to three tasks for each microbatch: F, the forward pass; B, the
gradient of the stage's input; W, the gradient of its weights. A schedule that does not split the backward pass has F and B alone, and its
B computes both gradients.
"""

from collections import deque
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from parafit.errors import PlanError

Kind = Literal["F", "B", "W"]

FORWARD: tuple[Kind, ...] = ("F",)
WHOLE_BACKWARD: tuple[Kind, ...] = ("F", "B")
SPLIT_BACKWARD: tuple[Kind, ...] = ("F", "B", "W")


class Task(NamedTuple):
    """One pass of one microbatch through one stage. A tuple, since a grid has a hundred thousand of them.

    Attributes:
        kind: "F", "B" or "W".
        stage: counted from the network's input, through all devices and chunks.
        microbatch: counted in the order of the batch's rows.

    >>> print(Task("B", 2, 5))
    B of microbatch 5 on stage 2
    """

    kind: Kind
    stage: int
    microbatch: int

    def __str__(self):
        return f"{self.kind} of microbatch {self.microbatch} on stage {self.stage}"


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What each device of a pipeline runs, in its order.

    Args:
        schedule: the schedule's name.
        microbatches: how many go through the pipeline.
        kinds: ("F",) of a forward pipeline, ("F", "B"), or ("F", "B", "W") where the backward pass is split.
        device_of: the device of each stage.
        tasks: those of each device, in the order in which it runs them.

    >>> tasks = tuple(Task(kind, 0, microbatch) for microbatch in (0, 1) for kind in ("F", "B"))
    >>> grid = Grid(schedule="one by one", microbatches=2, kinds=WHOLE_BACKWARD, device_of=(0,), tasks=(tasks,))
    >>> grid.devices, grid.stages, grid.splits_backward
    (1, 1, False)
    """

    schedule: str
    microbatches: int
    kinds: tuple[Kind, ...]
    device_of: tuple[int, ...]
    tasks: tuple[tuple[Task, ...], ...]

    @property
    def devices(self) -> int:
        """How many devices the pipeline has."""
        return len(self.tasks)

    @property
    def stages(self) -> int:
        """How many stages the network is cut into: devices × chunks."""
        return len(self.device_of)

    @property
    def splits_backward(self) -> bool:
        """Whether the gradients of a stage's input and of its weights are tasks of their own."""
        return "W" in self.kinds

    def source(self, task: Task) -> Task | None:
        """The task of a neighbouring stage whose result this one takes; None where there is none.

        >>> grid = Grid(schedule="", microbatches=1, kinds=FORWARD, device_of=(0, 1), tasks=((Task("F", 0, 0),), (Task("F", 1, 0),)))
        >>> grid.source(Task("F", 1, 0))
        Task(kind='F', stage=0, microbatch=0)
        """
        kind, stage, microbatch = task
        if kind == "F" and stage > 0:
            return Task("F", stage - 1, microbatch)
        if kind == "B" and stage < self.stages - 1:
            return Task("B", stage + 1, microbatch)
        return None

    def receiver(self, task: Task) -> int | None:
        """The neighbouring stage that takes a task's result; None where there is none.

        >>> grid = Grid(schedule="", microbatches=1, kinds=FORWARD, device_of=(0, 1), tasks=((Task("F", 0, 0),), (Task("F", 1, 0),)))
        >>> grid.receiver(Task("F", 0, 0))
        1
        """
        stage = task.stage + {"F": 1, "B": -1, "W": self.stages}[task.kind]
        return stage if 0 <= stage < self.stages else None

    @cached_property
    def order(self) -> tuple[tuple[int, Task], ...]:
        """Every task with its device, each after all it needs and after those before it on its device.

        It needs the result of its `source`; B needs F, and W needs B, of the same stage and microbatch.

        Raises:
            PlanError: no such order exists: devices that run their lists in order wait for each other for ever.
        """
        rows = [iter(row) for row in self.tasks]
        heads = [next(row, None) for row in rows]
        order, done, able = list[tuple[int, Task]](), set[Task | None]([None]), deque(range(self.devices))
        waiting: dict[Task | None, list[int]] = {}
        while able:
            device = able.popleft()
            while (task := heads[device]) is not None:
                needed = self.source(task)
                if needed in done and task.kind != "F":
                    needed = Task("F" if task.kind == "B" else "B", task.stage, task.microbatch)
                if needed not in done:
                    waiting.setdefault(needed, []).append(device)
                    break
                heads[device] = next(rows[device], None)
                done.add(task)
                order.append((device, task))
                if task in waiting:
                    able.extend(waiting.pop(task))
        if waiting:
            waits = sorted((device, str(needed)) for needed, devices in waiting.items() for device in devices)
            told = "; ".join(f"device {device} waits with {heads[device]} for {needed}" for device, needed in waits)
            raise PlanError(f"schedule {self.schedule!r} never ends: {told}.")
        return tuple(order)

    @cached_property
    def in_flight(self) -> tuple[int, ...]:
        """Results of stages that each device keeps at most for the backward pass, from F until B, or W where that is a task of its own.

        A device with one stage keeps as many microbatches; one with v chunks keeps v results of each microbatch.
        """
        ones = (1,) * self.stages
        return tuple(int(most) for most in self.peak(ones, ones))

    def peak(self, activations: tuple[float, ...], for_weights: tuple[float, ...]) -> tuple[float, ...]:
        """What each device keeps at most for the backward pass, its order alone deciding.

        Args:
            activations: what each stage keeps of a microbatch from F until B, in any unit (bytes).
            for_weights: what each stage keeps of it from B until W, where W is a task of its own.
        """
        return tuple(self._peak(row, activations, for_weights) for row in self.tasks)

    def _peak(self, row: tuple[Task, ...], activations: tuple[float, ...], for_weights: tuple[float, ...]) -> float:
        kept = for_weights if self.splits_backward else (0.0,) * self.stages
        held = most = 0.0
        for kind, stage, _ in row:
            held += {"F": activations[stage], "B": kept[stage] - activations[stage], "W": -kept[stage]}[kind]
            most = max(most, held)
            if self.kinds == FORWARD:
                held = 0.0
        return most


def cyclic(devices: int, interleave: int) -> tuple[int, ...]:
    """The device of each stage where each device has a stage in turn, as often as `interleave` says.

    Args are those of `make_grid`.

    >>> cyclic(2, 3)
    (0, 1, 0, 1, 0, 1)
    """
    return tuple(range(devices)) * interleave
