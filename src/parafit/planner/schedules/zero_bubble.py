"""ZB-H1: the gradients of weights fill the gaps. Plain Python."""

from collections.abc import Iterator

from parafit.planner.schedules.grid import SPLIT_BACKWARD, Grid, Task, cyclic


def zero_bubble_h1(*, devices: int, microbatches: int) -> Grid:
    """1F1B with the backward pass split: stage s puts off the gradients of its weights by s microbatches.

    On p equal stages each device idles (p - 1) (F + B - W) seconds where 1F1B idles (p - 1) (F + B + W). Stage s keeps min(m, p - s)
    microbatches from F until B and min(m, s) more from B until W, so that no device keeps more than the first one does under 1F1B
    (Qi, Wan, Huang, Lin 2023, "Zero Bubble Pipeline Parallelism", section 2.1).

    Args are those of `make_grid`.

    >>> grid = zero_bubble_h1(devices=2, microbatches=3)
    >>> for row in grid.tasks:
    ...     print(*(f"{task.kind}{task.microbatch}" for task in row))
    F0 F1 B0 W0 F2 B1 W1 B2 W2
    F0 B0 F1 B1 W0 F2 B2 W1 W2
    >>> grid.in_flight
    (2, 2)
    """
    return Grid(
        schedule="zb-h1",
        microbatches=microbatches,
        kinds=SPLIT_BACKWARD,
        device_of=cyclic(devices, 1),
        tasks=tuple(tuple(_row(stage, min(microbatches, devices - stage), microbatches)) for stage in range(devices)),
    )


def _row(stage: int, ahead: int, microbatches: int) -> Iterator[Task]:
    late = min(stage, microbatches)
    yield from (Task("F", stage, microbatch) for microbatch in range(ahead))
    for microbatch in range(microbatches):
        yield Task("B", stage, microbatch)
        if microbatch >= late:
            yield Task("W", stage, microbatch - late)
        if microbatch + ahead < microbatches:
            yield Task("F", stage, microbatch + ahead)
    yield from (Task("W", stage, microbatch) for microbatch in range(microbatches - late, microbatches))
