"""Interleaved 1F1B: each device has several stages. Plain Python."""

from collections.abc import Iterator

from parafit.errors import PlanError
from parafit.planner.schedules.grid import WHOLE_BACKWARD, Grid, Kind, Task, cyclic


def interleaved(*, devices: int, microbatches: int, interleave: int) -> Grid:
    """1F1B over v chunks a device, each chunk a stage of 1 / v the length, groups of p microbatches taken through chunk after chunk.

    On equal stages each device idles (p - 1) / (v m + p - 1) of the time and keeps min(v m, `most_in_flight`) results of stages
    (Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", section 2.2). With one chunk
    it is 1F1B that runs ahead twice as far.

    Args are those of `make_grid`.

    Raises:
        PlanError: the devices do not divide the microbatches.

    >>> grid = interleaved(devices=2, microbatches=2, interleave=2)
    >>> for row in grid.tasks:
    ...     print(*(f"{task.kind}{task.stage}.{task.microbatch}" for task in row))
    F0.0 F0.1 F2.0 F2.1 B2.0 B2.1 B0.0 B0.1
    F1.0 F1.1 F3.0 B3.0 F3.1 B3.1 B1.0 B1.1
    >>> grid.in_flight, most_in_flight(2, 2)
    ((4, 3), (5, 3))
    """
    check_divides(devices, microbatches)
    total = microbatches * interleave
    return Grid(
        schedule="interleaved",
        microbatches=microbatches,
        kinds=WHOLE_BACKWARD,
        device_of=cyclic(devices, interleave),
        tasks=tuple(
            tuple(_row(device, devices, interleave, total, min(total, most)))
            for device, most in enumerate(most_in_flight(devices, interleave))
        ),
    )


def check_divides(devices: int, microbatches: int) -> None:
    """Refuse microbatches that do not fill groups as large as the pipeline.

    Args are those of `make_grid`.

    Raises:
        PlanError: the devices do not divide the microbatches; the nearest numbers that they do.
    """
    if rest := microbatches % devices:
        near = [number for number in (microbatches - rest, microbatches - rest + devices) if number]
        raise PlanError(
            f"schedule 'interleaved' takes microbatches in groups of the pipeline's {devices} devices, and microbatches={microbatches} is "
            f"no multiple. Nearest that {'are' if len(near) > 1 else 'is'}: {' and '.join(map(str, near))}."
        )


def most_in_flight(devices: int, interleave: int) -> tuple[int, ...]:
    """Results of stages that each device keeps, however many microbatches: (v - 1) p + 2 (p - 1 - d) + 1 on device d.

    Args are those of `make_grid`.

    >>> most_in_flight(4, 2)
    (11, 9, 7, 5)
    """
    return tuple((interleave - 1) * devices + 2 * (devices - 1 - device) + 1 for device in range(devices))


def _row(device: int, devices: int, interleave: int, total: int, ahead: int) -> Iterator[Task]:
    def nth(kind: Kind, index: int) -> Task:
        group, place = divmod(index, devices * interleave)
        chunk = place // devices
        stage = device + devices * (chunk if kind == "F" else interleave - 1 - chunk)
        return Task(kind, stage, group * devices + place % devices)

    yield from (nth("F", index) for index in range(ahead))
    for index in range(total):
        yield nth("B", index)
        if index + ahead < total:
            yield nth("F", index + ahead)
