"""The driver's side of a worker: start it, ask it, end it."""

import json
import os
import selectors
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks.contenders import CONTENDERS
from benchmarks.workloads import Workload

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_SECONDS = 900.0


class WorkerError(Exception):
    """A worker ended, or did not answer in time; the message has the last line it printed."""


class Worker:
    """A process in which one contender is ready to work.

    Args:
        contender: its name in `CONTENDERS`.
        workload: what it will work on.
        arrays: a folder with `x.npy` and `y.npy`.
        scratch: a folder for what the contender keeps on disk, such as compiled programs: empty, unless that is to be found again.

    Raises:
        WorkerError: from any method.
    """

    def __init__(self, contender: str, workload: Workload, *, arrays: Path, scratch: Path):
        scratch.mkdir(parents=True, exist_ok=True)
        self._log_path = scratch / "log.txt"
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker"],
                cwd=ROOT,
                env=_environment(contender, scratch),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout
        self._send("make", {"contender": contender, "workload": asdict(workload), "arrays": str(arrays)})
        self.predicts: bool = self._receive()["predicts"]

    def train(self, epochs: int) -> list[float]:
        """Seconds that each of `epochs` epochs took."""
        return self._ask("train", epochs)

    def predict_rows_per_second(self) -> float:
        """Rows predicted in a second, over all rows once."""
        reply = self._ask("predict")
        return reply["rows"] / reply["seconds"]

    def peak_bytes(self) -> int:
        """Most bytes of memory that were ever resident."""
        return self._ask("peak")

    def close(self) -> None:
        """End the process."""
        self._requests.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._replies.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def _ask(self, verb: str, argument=None):
        self._send(verb, argument)
        return self._receive()

    def _send(self, verb: str, argument) -> None:
        try:
            self._requests.write(json.dumps([verb, argument]).encode() + b"\n")
        except BrokenPipeError:
            raise self._failed("ended") from None

    def _receive(self):
        with selectors.DefaultSelector() as selector:
            selector.register(self._replies, selectors.EVENT_READ)
            answered = selector.select(PATIENCE_SECONDS)
        line = self._replies.readline() if answered else b""
        if not line:
            raise self._failed("ended" if answered else f"did not answer within {PATIENCE_SECONDS:.0f} s")
        return json.loads(line)

    def _failed(self, what: str) -> WorkerError:
        self._process.kill()
        self.close()
        lines = self._log_path.read_text(errors="replace").split("\n")
        said = next((line for line in reversed(lines) if line.strip()), "it printed nothing")
        return WorkerError(f"the process {what}: {said.strip()[:300]}")


def _environment(contender: str, scratch: Path) -> dict[str, str]:
    """This process's environment without a compilation cache of its own, every cache under `scratch`."""
    kept = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    places = {
        "XDG_CACHE_HOME": str(scratch / "cache"),
        "KERAS_HOME": str(scratch / "keras"),
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
    }
    return {**kept, **places, "TF_CPP_MIN_LOG_LEVEL": "3", **CONTENDERS[contender].environment}
