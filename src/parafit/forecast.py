"""What is known of a run before it starts, its price, and the score when it has ended."""

import datetime
from collections.abc import Callable
from typing import Any

from parafit.calibration import detect, history
from parafit.errors import MachineError, ModelError, PlanError, ProgramError
from parafit.execution.events import Breach, Notice, Priced, Scored, emit
from parafit.execution.runner import Runner
from parafit.execution.trial import trial_seconds
from parafit.planner.cost.estimator import price as price_of
from parafit.planner.cost.framework import Software
from parafit.planner.layout import undivided
from parafit.planner.plan import Plan
from parafit.planner.price import Price
from parafit.planner.program import Program
from parafit.planning import this_machine


def foresee(runner: Runner, arrays: Any, program: Callable[[], Program], *, steps: int, epochs: int) -> Price:
    """The price of a step on blocks like this one, told to all who listen, and what the compiled program does beside the plan.

    Seconds come from the cost model, corrected by what fits took before, where this machine was calibrated and the plan's
    devices are its own; else a few steps are timed.

    Args:
        runner: of the step.
        arrays: a block, of arrays of shape (capacity, batch, ...).
        program: gives the step's program.
        steps: in an epoch.
        epochs: that will run.
    """
    plan = runner.placement.plan
    price = _price(runner, plan, arrays, program)
    announcement = price.announce(plan, steps=steps, epochs=epochs)
    emit(Priced(seconds_per_step=price.seconds_per_step, peak_bytes=price.peak_bytes, announcement=announcement))
    try:
        for row in runner.check(arrays, program()).broken:
            emit(Breach(text=str(row)))
    except (ModelError, ProgramError) as error:
        emit(Notice(text=f"the compiled program was not compared with the plan: {error}"))
    return price


def _price(runner: Runner, plan: Plan, arrays: Any, program: Callable[[], Program]) -> Price:
    compiled = runner.find(arrays)
    peak_bytes, seconds = compiled.peak_bytes, 0.0
    try:
        if text := undivided(program().sizes.get("batch", 1), plan):
            emit(Notice(text=text))
        cost = price_of(program(), plan, this_machine(), software=Software(steps_per_dispatch=compiled.capacity))
        copied = cost.memory.get("inputs", 0.0) if compiled.capacity == 1 else 0.0  # one batch is used where it lies
        peak_bytes = cost.peak_bytes - cost.memory["context"] + runner.block_bytes(arrays) - copied
        seconds = cost.seconds if detect.is_calibrated() and plan.device_count <= this_machine().device_count else 0.0
    except (ModelError, ProgramError, PlanError, MachineError) as error:
        emit(Notice(text=f"the cost model does not know this step: {error}"))
    past = history.load(machine=detect.machine_id())
    return Price(
        seconds_per_step=seconds * history.correction(past, seconds)
        if seconds
        else trial_seconds(runner.step, runner.placement, compiled, arrays),
        peak_bytes=peak_bytes,
        compiled_bytes=compiled.peak_bytes,
        modelled_seconds=seconds,
    )


def settle_up(name: str, plan: Plan, batch: int, price: Price, seconds_per_step: float) -> None:
    """Tell what the run took beside what was said, and keep both: they correct the next price, and `parafit report` shows them.

    Args:
        name: of the model.
        plan: that ran.
        batch: rows of a step.
        price: what was said.
        seconds_per_step: what it took.
    """
    verdict = price.score(seconds_per_step)
    emit(Scored(predicted_seconds=price.seconds_per_step, measured_seconds=seconds_per_step, verdict=verdict))
    if not price.modelled_seconds:
        return
    residual = history.Residual(
        machine=detect.machine_id(),
        model=name,
        batch=batch,
        plan=plan.short(),
        predicted_seconds=price.modelled_seconds,
        measured_seconds=seconds_per_step,
        predicted_bytes=price.peak_bytes,
        measured_bytes=price.compiled_bytes,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    try:
        history.append(residual)
    except OSError as error:
        emit(Notice(text=f"this run's score could not be kept for `parafit report`: {error}"))
