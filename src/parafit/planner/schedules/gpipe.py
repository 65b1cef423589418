"""GPipe: all forward, then all backward. Plain Python."""

from parafit.planner.schedules.grid import WHOLE_BACKWARD, Grid, Task, cyclic


def gpipe(*, devices: int, microbatches: int) -> Grid:
    """All microbatches forward, then all backward.

    With p devices and m microbatches on equal stages, each device idles (p - 1) / (m + p - 1) of the time and keeps all m microbatches
    (Huang et al. 2019, "GPipe"). Backward runs in the order of the microbatches, so that gradients are summed as by every other schedule.

    Args are those of `make_grid`.

    >>> [f"{task.kind}{task.microbatch}" for task in gpipe(devices=2, microbatches=3).tasks[0]]
    ['F0', 'F1', 'F2', 'B0', 'B1', 'B2']
    >>> gpipe(devices=2, microbatches=3).in_flight
    (3, 3)
    """
    return Grid(
        schedule="gpipe",
        microbatches=microbatches,
        kinds=WHOLE_BACKWARD,
        device_of=cyclic(devices, 1),
        tasks=tuple(
            tuple(Task(kind, stage, microbatch) for kind in WHOLE_BACKWARD for microbatch in range(microbatches))
            for stage in range(devices)
        ),
    )
