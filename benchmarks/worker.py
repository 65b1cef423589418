"""One contender in a process of its own, doing only what the driver asks for, when it asks.

Started as `python -m benchmarks.worker`. Each line on stdin is a JSON request `[verb, argument]`, each line on stdout its JSON
reply: `["make", {contender, workload, arrays}]` first, then `["train", epochs]`, `["predict", null]` and `["peak", null]`.
It ends when stdin does. What libraries print goes to stderr.
"""

import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contenders import CONTENDERS
from benchmarks.workloads import Workload


def main() -> None:
    """Answer requests until there are no more."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    contender = None
    for line in sys.stdin:
        verb, argument = json.loads(line)
        if verb == "make":
            contender = _make(**argument)
            reply = {"predicts": hasattr(contender, "predict")}
        else:
            reply = {"train": _train, "predict": _predict, "peak": _peak}[verb](contender, argument)
        print(json.dumps(reply), file=replies, flush=True)


def _make(*, contender: str, workload: dict[str, Any], arrays: str):
    described = Workload(**{**workload, "input_shape": tuple(workload["input_shape"]), "hidden": tuple(workload["hidden"])})
    entry = CONTENDERS[contender]
    x, y = (np.load(Path(arrays) / f"{name}.npy") for name in ("x", "y"))
    return importlib.import_module(f"benchmarks.contenders.{entry.module}").make(described, x, y, **entry.options)


def _train(contender, epochs: int) -> list[float]:
    return contender.train(epochs)


def _predict(contender, _) -> dict:
    start = time.perf_counter()
    rows = len(contender.predict())
    return {"rows": rows, "seconds": time.perf_counter() - start}


def _peak(contender, _) -> int:
    """Most bytes of memory that were ever resident, summed over the contender's processes."""
    return sum(peak_bytes(process) for process in ("self", *getattr(contender, "other_processes", ())))


def peak_bytes(process: str | int = "self") -> int:
    """Most bytes of memory that `process` ever had resident.

    Linux keeps it in /proc; elsewhere it is known for the process itself only. (On Linux `getrusage` counts the parent's, too.)
    """
    status = Path(f"/proc/{process}/status")
    if status.exists():
        return 1024 * int(_field(status.read_text().splitlines(), "VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _field(lines: Iterable[str], name: str) -> str:
    return next(line for line in lines if line.startswith(name)).split()[1]


if __name__ == "__main__":
    main()
