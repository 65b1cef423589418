"""Forward pipelines, of `evaluate` and `predict`. Plain Python."""

from parafit.planner.schedules.grid import FORWARD, Grid, Task, cyclic


def forward_only(*, devices: int, microbatches: int, interleave: int) -> Grid:
    """Groups of p microbatches go through chunk after chunk; no result is kept for a backward pass.

    On equal stages, with m a multiple of p, each device idles (p - 1) / (v m + p - 1) of the time.

    Args are those of `make_grid`.

    >>> grid = forward_only(devices=2, microbatches=3, interleave=2)
    >>> [f"{task.stage}.{task.microbatch}" for task in grid.tasks[0]]
    ['0.0', '0.1', '2.0', '2.1', '0.2', '2.2']
    """
    groups = [range(first, min(first + devices, microbatches)) for first in range(0, microbatches, devices)]
    stages = devices * interleave
    return Grid(
        schedule="forward",
        microbatches=microbatches,
        kinds=FORWARD,
        device_of=cyclic(devices, interleave),
        tasks=tuple(
            tuple(Task("F", stage, microbatch) for group in groups for stage in range(device, stages, devices) for microbatch in group)
            for device in range(devices)
        ),
    )
