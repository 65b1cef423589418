"""1F1B: one forward, one backward, in turn. Plain Python."""

from collections.abc import Iterator

from parafit.planner.schedules.grid import WHOLE_BACKWARD, Grid, Task, cyclic


def one_f_one_b(*, devices: int, microbatches: int) -> Grid:
    """As many forward as fill the devices behind, then one forward and one backward in turn.

    It idles as long as GPipe, (p - 1) / (m + p - 1) of the time on p equal stages with m microbatches, but stage s keeps no more than
    min(m, p - s) of them (Narayanan et al. 2019, "PipeDream"; with a flush at the end of the batch, Narayanan et al. 2021, "Efficient
    Large-Scale Language Model Training on GPU Clusters Using Megatron-LM").

    Args are those of `make_grid`.

    >>> grid = one_f_one_b(devices=2, microbatches=3)
    >>> [f"{task.kind}{task.microbatch}" for task in grid.tasks[0]]
    ['F0', 'F1', 'B0', 'F2', 'B1', 'B2']
    >>> grid.in_flight
    (2, 1)
    """
    return Grid(
        schedule="1f1b",
        microbatches=microbatches,
        kinds=WHOLE_BACKWARD,
        device_of=cyclic(devices, 1),
        tasks=tuple(tuple(_row(stage, min(microbatches, devices - stage), microbatches)) for stage in range(devices)),
    )


def _row(stage: int, ahead: int, microbatches: int) -> Iterator[Task]:
    yield from (Task("F", stage, microbatch) for microbatch in range(ahead))
    for microbatch in range(microbatches):
        yield Task("B", stage, microbatch)
        if microbatch + ahead < microbatches:
            yield Task("F", stage, microbatch + ahead)
