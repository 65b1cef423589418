"""`parafit plan`, `machine` and `report`: what a plan would take, what a machine's numbers are, and how good predictions were."""

import json
import statistics
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from parafit.calibration import history
from parafit.errors import DataError, MachineError, ModelError, OutputError
from parafit.planner.machine.machine import Machine
from parafit.planner.networks import FAMILIES, MODELS
from parafit.planner.search.explain import explain
from parafit.planner.search.ranking import Ranking
from parafit.planning import find_plan, this_machine
from parafit.reports.html import Section, code, page, parts_plot, points_plot, scatter_plot, table
from parafit.support.arguments import did_you_mean
from parafit.support.files import write_whole


def plan_text(
    model: str,
    *,
    batch_size: int,
    machine: str | None = None,
    hosts: int | None = None,
    network: str | None = None,
    goal: str = "time",
    max_gib: float | None = None,
    allow: str | None = None,
    instead: str | None = None,
    sizes: tuple[int, int] | None = None,
    out: Path | None = None,
    report: Path | None = None,
) -> str:
    """Find a plan, write the files that were asked for, and give the text to print.

    Args:
        model: a network such as "gpt:39b", or the path of a .keras or .py file.
        batch_size: rows of one step over all devices together.
        machine: a preset, or the path of a machine's JSON file; None: this machine.
        hosts: how many of them.
        network: bandwidth between them for each device.
        goal: what to minimise.
        max_gib: memory that a device may use.
        allow: techniques that may be used, separated by commas.
        instead: a plan to compare with.
        sizes: numbers of inputs and outputs that a .py file's `build_model` is called with.
        out: the plan's JSON file to write.
        report: the page to write.
    """
    if machine is None and (hosts is not None or network is not None):
        raise MachineError("--hosts and --network describe a machine that is not here: name it with --machine, such as --machine h100x8.")
    where = Machine.load(machine, hosts=hosts, network=network) if machine else None
    nbytes = None if max_gib is None else max_gib * 2**30
    names = None if allow is None else [name.strip() for name in allow.split(",")]
    wanted = load_model(model, sizes)
    plan = find_plan(wanted, batch_size=batch_size, machine=where, goal=goal, max_bytes=nbytes, allow=names)
    pieces = [str(plan)] + ([explain(plan, instead)] if instead else [])
    if out:
        _write(out, plan.to_json() + "\n")
        pieces.append(f"written  {out}")
    if report:
        _write(report, plan_page(plan.ranking, instead))
        pieces.append(f"written  {report}")
    return "\n\n".join(pieces)


def load_model(model: str, sizes: tuple[int, int] | None = None) -> Any:
    """A network's name as it is; a file's Keras model, compiled.

    Args:
        model: a network such as "gpt:39b", or the path of a `.keras` or `.py` file.
        sizes: (inputs, outputs), which a `.py` file needs.

    Raises:
        ModelError: no such file, or what is in it is no model.
    """
    if model.partition(":")[0] in FAMILIES and not Path(model).exists():
        return model
    from parafit.tables import networks

    if not Path(model).suffix and (hint := did_you_mean(model, MODELS)):
        raise ModelError(f"there is no network and no file {model!r}.{hint}")
    path = networks.check_model_file(model)
    if path.suffix == ".keras":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an optimizer that never ran has no slots in the file: they do not matter here
            loaded = networks.load_keras_file(path)
    elif sizes is None:
        raise ModelError(f"build_model in {str(path)!r} wants the numbers of inputs and outputs: give them with --sizes INPUTS OUTPUTS.")
    else:
        loaded = networks.call_build_model(path, *sizes)
    if not loaded.compiled:
        loaded.compile("adam", "mse")
    return loaded


def plan_page(ranking: Ranking, instead: str | None = None) -> str:
    """A ranking as one self-contained HTML page: the plan, and plots of time and memory over its rivals.

    Args:
        ranking: the plan that a search found, and its rivals.
        instead: a plan to compare with, as text.

    >>> from parafit.planner.networks import named
    >>> from parafit.planner.search.search import search
    >>> "<svg" in plan_page(search(named("gpt:125m", batch=16), Machine.load("h100x8")))
    True
    """
    choices = {f"{place}": choice for place, choice in enumerate((ranking.best, *ranking.others), 1)}
    rows = [
        [name, choice.plan.short(), choice.cost.seconds * 1e3, choice.cost.peak_bytes / 2**30, choice.reason]
        for name, choice in choices.items()
    ]
    fitting = {name: choice for name, choice in choices.items() if choice.cost.peak_bytes <= ranking.limit_bytes}
    figures = [
        parts_plot("Time of a step", {name: choice.cost.times for name, choice in fitting.items()}, "milliseconds", 1e3),
        parts_plot("Memory of the fullest device", {name: choice.cost.memory for name, choice in fitting.items()}, "GiB", 2**-30),
        points_plot("Time against memory", {name: _point(choice.cost) for name, choice in choices.items()}, ranking.limit_bytes / 2**30),
    ]
    sections = [
        Section(heading="Plan", pieces=[code(str(ranking.plan))]),
        Section(heading="Beside it", pieces=[*figures, table(["", "plan", "step, ms", "memory, GiB", "why not"], rows)]),
    ]
    if instead:
        sections.append(Section(heading=f"Instead: {instead}", pieces=[code(explain(ranking.plan, instead))]))
    return page(
        f"{ranking.program.name}: {ranking.plan.short()}", f"on {ranking.machine.device_count} devices of {ranking.machine.name}", sections
    )


def machine_text(name: str | None, *, hosts: int | None = None, network: str | None = None, calibrate: bool = False) -> str:
    """A machine's numbers, each with its source.

    Args:
        name: a preset, or the path of a machine's JSON file; None: this machine.
        hosts: how many of them.
        network: bandwidth between them for each device.
        calibrate: measure this machine first.
    """
    if name is None:
        if hosts is not None or network is not None:
            raise MachineError("--hosts and --network go with the name of a machine, such as: parafit machine h100x8 --hosts 4.")
        machine = _calibrated() if calibrate else this_machine()
    elif calibrate:
        raise MachineError(f"only the machine that this runs on can be calibrated, not {name!r}: leave the name out.")
    else:
        machine = Machine.load(name, hosts=hosts, network=network)
    rows = list(_numbers(machine))
    width = max(len(path) for path, _, _ in rows)
    amounts = max(len(amount) for _, amount, _ in rows)
    return "\n".join([machine.name, *(f"  {path:{width}}  {amount:>{amounts}}  {source}" for path, amount, source in rows)])


def report_text(out: Path) -> str:
    """Write a page of predicted against measured over the fits that this machine remembers, and give the text to print.

    Raises:
        DataError: nothing was fitted yet.
    """
    fits = history.load()
    if not fits:
        where = history.residuals_path()
        raise DataError(f"no fit was scored yet ({where} holds none): run `parafit machine --calibrate`, and then `parafit train`, first.")
    _write(out, residuals_page(fits))
    errors = sorted(abs(_error(fit)) for fit in fits)
    words = f"step time off by {statistics.median(errors):.0%} (median), {errors[-1]:.0%} (most)".replace("%", " %")
    return f"{len(fits)} fits: {words}\nwritten  {out}"


def residuals_page(fits: list[history.Residual]) -> str:
    """Predicted against measured seconds and bytes of past fits, as one self-contained HTML page."""
    pieces = [_predictions([(fit.measured_seconds * 1e3, fit.predicted_seconds * 1e3) for fit in fits], "step, ms")]
    sized = [(fit.measured_bytes / 2**20, fit.predicted_bytes / 2**20) for fit in fits if fit.measured_bytes and fit.predicted_bytes]
    if sized:
        pieces.append(_predictions(sized, "peak, MiB"))
    rows = [[fit.date[:16], fit.model, fit.batch, fit.plan, *_times(fit), 100 * _error(fit)] for fit in fits]
    header = ["ended", "model", "batch", "plan", "predicted, ms", "measured, ms", "off by, %"]
    return page("Predicted against measured", f"{len(fits)} fits", [Section(heading="Fits", pieces=[*pieces, table(header, rows[::-1])])])


def _predictions(pairs: list[tuple[float, float]], name: str) -> str:
    measured, predicted = np.array(pairs).T
    return scatter_plot(measured, predicted, name, known="measured", scale="log")


def _times(fit: history.Residual) -> tuple[float, float]:
    return fit.predicted_seconds * 1e3, fit.measured_seconds * 1e3


def _error(fit: history.Residual) -> float:
    return fit.predicted_seconds / fit.measured_seconds - 1


def _point(cost) -> tuple[float, float]:
    return cost.peak_bytes / 2**30, cost.seconds * 1e3


def _calibrated() -> Machine:
    from parafit.calibration import calibrate

    return calibrate.calibrate()


def _numbers(machine: Machine) -> Iterator[tuple[str, str, str]]:
    """Place, value and source of every number that has one or is not 0."""

    def walk(content: Any, path: str) -> Iterator[tuple[str, str, str]]:
        if isinstance(content, dict) and set(content) == {"value", "source"}:
            value = content["value"]
            if content["source"] != "default" or value not in (0, 1, [], {}):
                yield path, f"{len(value)} rows" if isinstance(value, list) else f"{value:,.5g}", content["source"]
        elif isinstance(content, dict):
            for name, part in content.items():
                yield from walk(part, f"{path}.{name}".lstrip("."))

    yield from walk({name: part for name, part in json.loads(machine.to_json()).items() if name != "format"}, "")


def _write(path: Path, text: str) -> None:
    try:
        write_whole(path, text)
    except OSError as error:
        raise OutputError(f"cannot write {str(path)!r}: {error.strerror or error}. Choose a place that can be written to.") from error
