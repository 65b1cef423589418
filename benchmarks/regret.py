"""How much longer a step takes under the plan that "auto" chooses than under the best of the plans that this machine runs.

`python -m benchmarks.regret [--case TEXT] [--rounds 3] [--to FILE]`. Each network of `benchmarks.predictions` that fits the text is trained
under every plan below on as many simulated devices as there are cores, in turns; a plan counts with its median.
"""

import argparse
import json
import re
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import parafit  # noqa: F401  # first, so that Keras runs on JAX

# isort: split
import jax
import keras
import numpy as np

from benchmarks import surroundings
from benchmarks.predictions import CASES, Case, arrays_for, typical_seconds
from parafit.calibration.detect import core_count
from parafit.errors import PlanError
from parafit.planning import plan_to_fit

STEPS, EPOCHS = 40, 6
"""Of a fit: epochs enough for data that steps look up themselves where that is faster (`parafit.placement.LOOKED_UP_EPOCHS`)."""


@dataclass(frozen=True, kw_only=True)
class Regret:
    """What one network's step takes, by plan, and how much longer than the best and than one device it takes under the chosen one."""

    name: str
    batch: int
    chosen: str
    seconds: dict[str, float]

    @property
    def regret(self) -> float:
        return self.seconds[self.chosen] / min(self.seconds.values()) - 1

    @property
    def slower_than_single(self) -> float:
        return self.seconds[self.chosen] / self.seconds["single"] - 1


def measure(case: Case, rounds: int) -> Regret:
    """Train under each plan in turn; plans that the network cannot run are left out."""
    count = core_count()
    keras.utils.set_random_seed(0)
    model, classes = case.make()
    x, y = arrays_for(model, classes, case.batch * STEPS)
    chosen = _chosen(model, x, y, case.batch)
    plans = (chosen, "single", "microbatches=2", "recompute=blocks", f"data={count}", f"tensor={count}", f"data={count},zero=1")
    seconds: dict[str, list[float]] = {plan: [] for plan in plans}
    for _ in range(rounds):
        for plan in list(seconds):
            try:
                seconds[plan].append(typical_seconds(model, x, y, case.batch, EPOCHS, plan=plan))
            except PlanError:
                del seconds[plan]
    medians = {plan: statistics.median(each) for plan, each in seconds.items()}
    return Regret(name=case.name, batch=case.batch, chosen=chosen, seconds=medians)


def _chosen(model, x, y, batch: int) -> str:
    """The plan that "auto" runs."""
    return plan_to_fit(model, x, y, batch_size=batch, plan="auto", tell=print).short()


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", default="", help="only networks whose name has this regular expression")
    parser.add_argument("--rounds", type=int, default=3, help="times that every plan is run")
    parser.add_argument("--to", default="", help="a JSON file for the results")
    options = parser.parse_args(arguments)
    jax.config.update("jax_num_cpu_devices", core_count())
    found = []
    for case in CASES:
        if re.search(options.case, case.name):
            found.append(measure(case, options.rounds))
            print(_line(found[-1]), flush=True)
    regrets, slower = ([getattr(one, name) for one in found] for name in ("regret", "slower_than_single"))
    print(f"regret median {np.median(regrets):.1%}, largest {max(regrets):.1%}; slower than one device: largest {max(slower):.1%}")
    if options.to:
        rows = [asdict(one) | {"regret": one.regret, "slower_than_single": one.slower_than_single} for one in found]
        Path(options.to).write_text(json.dumps(surroundings.describe() | {"regrets": rows}, indent=1), encoding="utf-8")


def _line(one: Regret) -> str:
    times = ", ".join(f"{plan} {seconds * 1e3:.3f}" for plan, seconds in sorted(one.seconds.items(), key=lambda part: part[1]))
    return f"{one.name:44} {one.batch:6} {one.chosen}: regret {one.regret:6.1%}  ms: {times}"


if __name__ == "__main__":
    main()
