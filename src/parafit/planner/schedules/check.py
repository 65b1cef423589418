"""Is a grid a schedule? What every one of them has to be. Plain Python."""

from collections import Counter

from parafit.errors import PlanError
from parafit.planner.schedules.grid import Grid, Task


def check_schedule(grid: Grid) -> tuple[int, ...]:
    """Check that a grid runs every task once, in an order that ends.

    Each stage's F follows that of the stage before, its B follows its F and the B of the stage behind, its W follows its B; devices run
    their lists in order and wait for nothing that comes later.

    Args:
        grid: what each device runs.

    Returns:
        Results of stages that each device keeps at most for the backward pass.

    Raises:
        PlanError: the first fault found, by its task and device.

    >>> from parafit.planner.schedules.one_f_one_b import one_f_one_b
    >>> check_schedule(one_f_one_b(devices=4, microbatches=16))
    (4, 3, 2, 1)
    """
    _check_devices(grid)
    _check_once(grid)
    _ = grid.order
    return grid.in_flight


def _check_devices(grid: Grid) -> None:
    for device, row in enumerate(grid.tasks):
        for task in row:
            if not (task.kind in grid.kinds and 0 <= task.stage < grid.stages and 0 <= task.microbatch < grid.microbatches):
                raise _fault(
                    grid,
                    f"device {device} runs {task}, but there are {grid.stages} stages, {grid.microbatches} microbatches and the kinds "
                    f"{', '.join(grid.kinds)}",
                )
            if grid.device_of[task.stage] != device:
                raise _fault(grid, f"device {device} runs {task}, but that stage is on device {grid.device_of[task.stage]}")


def _check_once(grid: Grid) -> None:
    times = Counter(task for row in grid.tasks for task in row)
    for task, count in times.items():
        if count > 1:
            raise _fault(grid, f"{task} runs {count} times")
    for stage in range(grid.stages):
        for task in (Task(kind, stage, microbatch) for kind in grid.kinds for microbatch in range(grid.microbatches)):
            if task not in times:
                raise _fault(grid, f"{task} never runs")


def _fault(grid: Grid, what: str) -> PlanError:
    return PlanError(f"schedule {grid.schedule!r}: {what}.")
