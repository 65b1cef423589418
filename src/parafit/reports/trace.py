"""The timeline of a pipeline as a trace that Chrome and Perfetto open. Plain Python."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from parafit.planner.schedules.simulate import Timeline
from parafit.support.files import write_output

_CATEGORIES = {"F": "forward", "B": "backward", "W": "weights"}


def trace(predicted: Timeline, measured: Timeline | None = None) -> str:
    """The trace as JSON: one track a device, what was predicted and what was measured as processes; microseconds.

    Args:
        predicted: as `price` gives it.
        measured: of the same grid.

    >>> from parafit.planner.schedules import TaskTimes, make_grid
    >>> from parafit.planner.schedules.simulate import simulate
    >>> timeline = simulate(make_grid("1f1b", devices=2, microbatches=1), TaskTimes.equal(2, forward=1e-3))
    >>> [event["name"] for event in json.loads(trace(timeline))["traceEvents"] if event["ph"] == "X"]
    ['F0', 'B0', 'F0', 'B0']
    """
    given = {"predicted": predicted} | ({"measured": measured} if measured else {})
    events = [event for place, (name, timeline) in enumerate(given.items()) for event in _events(place, name, timeline)]
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": events})


def write_trace(path: Path, predicted: Timeline, measured: Timeline | None = None) -> None:
    """Write the trace to a file, whole or not at all.

    Args:
        path: where.
        predicted: as `price` gives it.
        measured: of the same grid.

    Raises:
        OutputError: it cannot be written.
    """
    write_output(path, trace(predicted, measured) + "\n")


def _events(process: int, name: str, timeline: Timeline) -> Iterator[dict[str, Any]]:
    grid = timeline.grid
    yield _named("process_name", process, 0, f"{name}: {grid.schedule}")
    for device, (row, starts, ends) in enumerate(zip(grid.tasks, timeline.start, timeline.end)):
        stages = range(device, grid.stages, grid.devices)
        yield _named("thread_name", process, device, f"device {device} (stage{'s' * (len(stages) > 1)} {', '.join(map(str, stages))})")
        yield {"ph": "M", "name": "thread_sort_index", "pid": process, "tid": device, "args": {"sort_index": device}}
        for task, start, end in zip(row, starts, ends):
            yield {
                "ph": "X",
                "name": f"{task.kind}{task.microbatch}",
                "cat": _CATEGORIES[task.kind],
                "pid": process,
                "tid": device,
                "ts": start * 1e6,
                "dur": (end - start) * 1e6,
                "args": {"stage": task.stage, "microbatch": task.microbatch},
            }


def _named(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": {"name": name}}
