"""The driver: measure contenders side by side and write what was measured as JSON.

`python -m benchmarks.run --quick` for a first look, `python -m benchmarks.run --out benchmarks/results/NAME.json` for everything.
One process per contender and workload; all stay alive and only the one that is asked works, so that rounds alternate.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import estimators, surroundings, table
from benchmarks.contenders import CONTENDERS
from benchmarks.processes import Worker, WorkerError
from benchmarks.workloads import WORKLOADS, Workload, make_arrays, with_steps

ESTIMATORS = "estimators"
QUICK_WORKLOADS = ("mlp-small", "mlp-medium", "cnn", ESTIMATORS)
WARM_UP_EPOCHS = 2
FRESH_EPOCHS = 2
IMPORT_ROUNDS = 5
BUSY = (
    "Other work keeps this machine busy (load {load_at_start:.1f} on {cores} cores). It slows PyTorch, TensorFlow and scikit-learn, whose "
    "threads wait for each other, much more than JAX: do not publish these numbers."
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure. `rounds` of warm processes, `fresh_rounds` of new ones; `steps` replaces the workloads' own."""

    workloads: tuple[str, ...]
    contenders: tuple[str, ...]
    rounds: int
    fresh_rounds: int
    steps: int | None
    quick: bool
    out: str


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for, write it after each workload, print the tables."""
    options, start = parse(arguments), time.perf_counter()
    out = Path(options.out)
    try:
        _require_writable(out)
    except OSError as error:
        raise SystemExit(f"--out {out} cannot be written: {error}. Name a file in a folder you may write to.") from None
    document = {**surroundings.describe(), "options": asdict(replace(options, out=out.name)), "workloads": {}, ESTIMATORS: {}}
    if document["machine"]["load_at_start"] > document["machine"]["cores"] / 4:
        print(BUSY.format(**document["machine"]), file=sys.stderr)
    document["import"] = measure_import() if options.fresh_rounds else None
    for name in options.workloads:
        if name == ESTIMATORS:
            document[ESTIMATORS] = estimators.measure(options.rounds)
        else:
            workload = with_steps(WORKLOADS[name], options.steps, quick=options.quick)
            document["workloads"][name] = {**asdict(workload), "contenders": measure(workload, options)}
        document["duration_seconds"] = time.perf_counter() - start
        write_json(out, document)
    print(table.render(document))


def parse(arguments: Sequence[str] | None = None) -> Options:
    """The command line as `Options`; what `--quick` changes is what was not given."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="Measure parafit beside what people use today.")
    known = (*WORKLOADS, ESTIMATORS)
    parser.add_argument("--workloads", type=_names_of(known), help=f"comma-separated, of {', '.join(known)}")
    parser.add_argument("--contenders", type=_names_of(CONTENDERS), help=f"comma-separated, of {', '.join(CONTENDERS)}")
    parser.add_argument("--rounds", type=_whole_from(1), help="rounds in warm processes (7; quick: 3)")
    parser.add_argument("--fresh-rounds", type=_whole_from(0), help="rounds in fresh processes (3; quick: 1; 0 for none)")
    parser.add_argument("--steps", type=_whole_from(1), help="steps in an epoch, instead of the workload's own")
    parser.add_argument("--quick", action="store_true", help="fewer workloads, contenders, rounds and steps unless given: a few minutes")
    parser.add_argument("--out", default="out/benchmarks.json", help="the JSON file to write (%(default)s)")
    given = parser.parse_args(arguments)
    wanted: dict[str, Any] = {name: value for name, value in vars(given).items() if value is not None}
    return Options(**{**_defaults(quick=given.quick), **wanted})


def measure(workload: Workload, options: Options) -> dict[str, dict]:
    """Everything measured about `workload`, by contender; `{"skipped": reason}` or `{"failed": reason}` for who has no numbers."""
    results = {name: {"skipped": CONTENDERS[name].reason_to_skip(workload)} for name in options.contenders}
    present = [name for name, result in results.items() if result["skipped"] is None]
    results |= {name: {} for name in present}
    with tempfile.TemporaryDirectory(prefix="parafit-bench-") as folder:
        _measure_warm(workload, {name: results[name] for name in present}, options.rounds, Path(folder))
        measured = {name: results[name] for name in present if CONTENDERS[name].fresh and "failed" not in results[name]}
        _measure_fresh(workload, measured, options.fresh_rounds, Path(folder))
    return results


def measure_import() -> dict[str, list[float]]:
    """Seconds to import Keras and JAX, and seconds parafit and its `fit` then add, each in fresh processes."""
    code = (
        "import time; start = time.perf_counter(); import jax, keras; between = time.perf_counter(); "
        "import parafit; parafit.fit; print(between - start, time.perf_counter() - between)"
    )
    pairs = []
    for _ in range(IMPORT_ROUNDS):
        environment = {**os.environ, "KERAS_BACKEND": "jax"}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        pairs.append([float(word) for word in done.stdout.split()])
    return {name: [pair[position] for pair in pairs] for position, name in enumerate(("keras_and_jax_seconds", "parafit_seconds"))}


def write_json(path: Path, document: dict) -> None:
    """Write `document`; an interruption leaves the file as it was."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _require_writable(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder")
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def _names_of(known: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    def names(text: str) -> tuple[str, ...]:
        wanted = tuple(dict.fromkeys(text.split(",")))
        if unknown := [name for name in wanted if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
        return wanted

    return names


def _whole_from(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return number


def _defaults(*, quick: bool) -> dict[str, Any]:
    return {
        "workloads": QUICK_WORKLOADS if quick else (*WORKLOADS, ESTIMATORS),
        "contenders": tuple(name for name, contender in CONTENDERS.items() if contender.quick or not quick),
        "rounds": 3 if quick else 7,
        "fresh_rounds": 1 if quick else 3,
        "steps": None,
    }


def _measure_warm(workload: Workload, results: dict[str, dict], rounds: int, folder: Path) -> None:
    """Start a process for each contender, let each train once, then run rounds of training and of prediction in turn."""
    arrays = _save_arrays(folder / "warm", make_arrays(workload, workload.rows))
    with ExitStack() as stack:
        warm = _Warm(workload, results, arrays, folder, stack)
        for what, times in ((warm.start, 1), (warm.train, rounds), (warm.predict_once, 1), (warm.predict, rounds), (warm.peak, 1)):
            _in_turn(what, results, times, f"{workload.name} {what.__name__}")


class _Warm:
    """The live processes of one workload; each method lets one contender work and notes what came of it."""

    def __init__(self, workload: Workload, results: dict[str, dict], arrays: Path, folder: Path, stack: ExitStack):
        self._workload, self._results, self._arrays, self._folder, self._stack = workload, results, arrays, folder, stack
        self._workers: dict[str, Worker] = {}

    def start(self, name: str) -> None:
        worker = Worker(name, self._workload, arrays=self._arrays, scratch=self._folder / f"warm-{name}")
        self._workers[name] = self._stack.enter_context(worker)
        worker.train(WARM_UP_EPOCHS)

    def train(self, name: str) -> None:
        seconds = self._workers[name].train(1 + self._workload.epochs)
        _append(self._results[name], "step_seconds", sum(seconds[1:]) / (self._workload.epochs * self._workload.steps))
        _append(self._results[name], "call_step_seconds", sum(seconds) / (len(seconds) * self._workload.steps))

    def predict_once(self, name: str) -> None:
        if self._workers[name].predicts:
            self._workers[name].predict_rows_per_second()

    def predict(self, name: str) -> None:
        if self._workers[name].predicts:
            _append(self._results[name], "predict_rows_per_second", self._workers[name].predict_rows_per_second())

    def peak(self, name: str) -> None:
        self._results[name]["peak_bytes"] = self._workers[name].peak_bytes()


def _measure_fresh(workload: Workload, results: dict[str, dict], rounds: int, folder: Path) -> None:
    """Time whole short runs, from the start of a process to the end of its second epoch, with a short last batch."""
    arrays = _save_arrays(folder / "fresh", make_arrays(workload, workload.rows + workload.batch_size // 2))

    def run(name):
        scratch = Path(tempfile.mkdtemp(prefix=f"fresh-{name}-", dir=folder))
        starts = ("cold", "warm") if CONTENDERS[name].keeps_programs else ("cold",)
        for start in starts:
            _time_fresh(name, workload, arrays, scratch, results[name].setdefault(f"fresh_{start}", {}))

    _in_turn(run, results, rounds, f"{workload.name} fresh")


def _time_fresh(name: str, workload: Workload, arrays: Path, scratch: Path, record: dict) -> None:
    start = time.perf_counter()
    with Worker(name, workload, arrays=arrays, scratch=scratch) as worker:
        *_, last_epoch = worker.train(FRESH_EPOCHS)
        total = time.perf_counter() - start
    _append(record, "total_seconds", total)
    _append(record, "first_step_seconds", total - FRESH_EPOCHS * last_epoch)


def _in_turn(what: Callable[[str], None], results: dict[str, dict], times: int, title: str) -> None:
    """Call `what(name)` for every contender that has not failed, `times` times, every other time in reverse order."""
    for number in range(times):
        names = [name for name, result in results.items() if "failed" not in result]
        for name in names if number % 2 == 0 else reversed(names):
            print(f"{title} {number + 1}/{times}: {name}", file=sys.stderr, flush=True)
            try:
                what(name)
            except WorkerError as error:
                results[name]["failed"] = str(error)
                print(f"{title}: {name} failed: {error}", file=sys.stderr, flush=True)


def _append(record: dict, name: str, value: float) -> None:
    record.setdefault(name, []).append(value)


def _save_arrays(folder: Path, arrays: tuple[np.ndarray, np.ndarray]) -> Path:
    folder.mkdir()
    for name, array in zip(("x", "y"), arrays):
        np.save(folder / f"{name}.npy", array)
    return folder


if __name__ == "__main__":
    main()
