"""parafit.sklearn.MLPClassifier beside scikit-learn's: whole calls of `fit` with the same parameters, and the accuracy they reach.

Each library has a process of its own; the two take turns. The first fit, which compiles, is kept apart.
"""

import importlib
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split

from benchmarks.workloads import WORKLOADS, make_arrays

LIBRARIES = {"sklearn": "sklearn.neural_network", "parafit": "parafit.sklearn"}
TABLE_ROWS = 100_000


@dataclass(frozen=True, kw_only=True)
class Case:
    """A data set by name, and the parameters of `MLPClassifier` that differ from its defaults."""

    title: str
    parameters: dict


CASES = {
    "digits": Case(title="1,797 digits of 64 pixels, default parameters", parameters={}),
    "table": Case(
        title="table 100k × 50, 256-128, batch 256, 5 epochs",
        parameters={"hidden_layer_sizes": (256, 128), "batch_size": 256, "max_iter": 5},
    ),
}


def measure(rounds: int) -> dict[str, dict]:
    """By case and library: `first_fit_seconds` in a new process, `fit_seconds` of each round, `accuracy` on a quarter held out."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="parafit-bench-"))
        processes = {name: stack.enter_context(_process(folder)) for name in LIBRARIES}
        return {case: _measure_case(case, processes, rounds) for case in CASES}


def fit_once(library: str, case: str) -> tuple[float, float]:
    """Seconds one `fit` of `case` takes with the MLPClassifier of `library`, and the accuracy on the held-out quarter."""
    classifier = importlib.import_module(LIBRARIES[library]).MLPClassifier(random_state=0, **CASES[case].parameters)
    x, x_held_out, y, y_held_out = train_test_split(*_rows(case), test_size=0.25, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        start = time.perf_counter()
        classifier.fit(x, y)
        seconds = time.perf_counter() - start
    return seconds, float(classifier.score(x_held_out, y_held_out))


def _process(folder: str) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_keep_programs_in, initargs=(folder,))


def _keep_programs_in(folder: str) -> None:
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    os.environ["XDG_CACHE_HOME"] = folder


def _measure_case(case: str, processes: dict[str, ProcessPoolExecutor], rounds: int) -> dict[str, dict]:
    results: dict[str, dict[str, Any]] = {name: {"fit_seconds": []} for name in processes}
    for number in range(1 + rounds):
        for name in processes if number % 2 else reversed(processes):
            print(f"estimators {case} {number}/{rounds}: {name}", file=sys.stderr, flush=True)
            seconds, accuracy = processes[name].submit(fit_once, name, case).result()
            if number == 0:
                results[name] |= {"first_fit_seconds": seconds, "accuracy": accuracy}
            else:
                results[name]["fit_seconds"].append(seconds)
    return results


def _rows(case: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows and classes in float64, which is what readers of tables hand over."""
    if case == "digits":
        x, y = load_digits(return_X_y=True)
        return x / 16, y
    x, y = make_arrays(WORKLOADS["table"], TABLE_ROWS)
    return x.astype(np.float64), y
