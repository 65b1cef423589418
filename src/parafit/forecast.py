"""What is known of a run before it starts: its program, the plan it should have, its price; and the score when it has ended."""

import datetime
from collections.abc import Callable
from typing import Any

import jax

from parafit.adapters import adapter_of, checks
from parafit.adapters.step import Adapter, Step, remembered
from parafit.calibration import detect, history
from parafit.data.feed import Feed
from parafit.errors import MachineError, ModelError, PlanError, ProgramError
from parafit.execution.runner import Runner
from parafit.planner.cost.estimator import price as price_of
from parafit.planner.cost.framework import Software
from parafit.planner.layout import undivided
from parafit.planner.plan import Plan
from parafit.planner.price import Price
from parafit.planner.program import Program
from parafit.planner.search.search import search
from parafit.planner.search.space import SAME_NUMBERS
from parafit.planning import RUNS, refused_techniques, step_program, this_machine
from parafit.tracing.trace import shapes_of

_KERNEL_DIMS = 3
"""A convolution's kernel has at least these: places, channels, filters."""

WORTH = 1.1
"""So many times as fast as one device must a plan be predicted to be chosen by itself: about what prices are wrong by."""


def programs(adapter: Adapter, step: Step, shapes: Callable[[], Any]) -> Callable[[], Program]:
    """Gives the program of a model's step, traced when it is first asked for and kept as long as the model stays as it is.

    Args:
        adapter: the model.
        step: its step.
        shapes: gives the arrays of one batch, or their shapes.
    """

    def program() -> Program:
        batch = shapes_of(shapes())
        key = ("program", jax.tree.structure(batch), tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(batch)))
        return remembered(adapter.keeper, step, key, lambda: step_program(step, batch, adapter.model.name))

    return program


def best_plan(step: Step, program: Callable[[], Program], *, tell: Callable[[str], None] = print) -> Plan:
    """What "auto" means: the fastest plan of this machine that fits and is predicted to be worth it; else one device.

    Args:
        step: what is to run.
        program: gives its program.
        tell: is told why no plan could be made.

    Raises:
        PlanError: no plan fits into memory.
    """
    machine = this_machine()
    if machine.device_count == 1 and step.name != "train":
        return Plan()
    try:
        traced = program()
    except (ModelError, ProgramError) as error:
        tell(f"parafit: one device, for no plan could be made: {error}")
        return Plan()
    alone = price_of(traced, Plan(), machine)
    fits = alone.peak_bytes <= machine.device.memory_bytes
    if fits and machine.device_count == 1:
        return Plan()
    try:
        ranking = search(traced, machine, allow=(RUNS & SAME_NUMBERS) - refused_techniques(step))
    except PlanError as error:
        rest = "runs it on one device all the same, as far as its memory goes."
        raise PlanError.advising(str(error), python=f"plan='single' {rest}", command=f"--plan single {rest}") from error
    return Plan() if fits and alone.seconds < WORTH * ranking.best.cost.seconds else ranking.plan


def plan_for(model: Any, x: Any, y: Any, *, batch_size: int, plan: Plan | str) -> Plan:
    """The plan that `fit` would run with these arguments, the model built as `fit` would build it.

    Args and errors are those of `fit`.
    """
    adapter = adapter_of(model, "fit")
    feed = Feed(x, y, batch_size=batch_size, shuffle=True)
    checks.build(adapter, feed, "fit")
    step = adapter.train_step()
    return best_plan(step, programs(adapter, step, feed.shapes)) if plan == "auto" else Plan.read(plan)


def multiply_adds(step: Step, program: Callable[[], Program], rows: int) -> float:
    """Multiply-adds of the forward pass of so many rows: one a weight, but where convolutions use theirs at many places.

    Args:
        step: what is to run.
        program: gives its program, of a batch of `rows`.
    """
    least = float(step.weight_count * rows)
    if all(len(weight.shape) < _KERNEL_DIMS for weight in step.weights):
        return least
    try:
        convolutions = [each for each in program().operations if each.kind == "convolution" and each.phase == "forward"]
    except (ModelError, ProgramError):
        return least
    return max(least, sum(each.flops * each.count * each.steps for each in convolutions) / 2)


def foresee(runner: Runner, plan: Plan, arrays: Any, program: Callable[[], Program]) -> Price:
    """The price of a step on blocks like this one.

    Seconds come from the cost model, corrected by what fits took before, where this machine was calibrated and the plan's
    devices are its own; else a few steps are timed.
    """
    compiled = runner.find(arrays)
    peak_bytes, seconds = compiled.peak_bytes, 0.0
    try:
        _say_undivided(program(), plan)
        cost = price_of(program(), plan, this_machine(), software=Software(steps_per_dispatch=compiled.capacity))
        copied = cost.memory.get("inputs", 0.0) if compiled.capacity == 1 else 0.0  # one batch is used where it lies
        peak_bytes = cost.peak_bytes - cost.memory["context"] + runner.block_bytes(arrays) - copied
        seconds = cost.seconds if detect.is_calibrated() and plan.device_count <= this_machine().device_count else 0.0
    except (ModelError, ProgramError, PlanError, MachineError) as error:
        print(f"parafit: the cost model does not know this step: {error}")
    past = history.load(machine=detect.machine_id())
    return Price(
        seconds_per_step=seconds * history.correction(past, seconds) if seconds else runner.time(arrays),
        peak_bytes=peak_bytes,
        compiled_bytes=compiled.peak_bytes,
        modelled_seconds=seconds,
    )


def _say_undivided(program: Program, plan: Plan) -> None:
    """A line for a batch that the plan does not split."""
    text = undivided(program.sizes.get("batch", 1), plan)
    if text:
        print(f"parafit: {text}")


def print_breaches(runner: Runner, arrays: Any, program: Callable[[], Program]) -> None:
    """A line for whatever the compiled program does and the plan does not say."""
    try:
        for row in runner.check(arrays, program()).broken:
            print(f"parafit: not in the plan: {row}")
    except (ModelError, ProgramError) as error:
        print(f"parafit: the compiled program was not compared with the plan: {error}")


def remember(name: str, plan: Plan, batch: int, price: Price, seconds_per_step: float) -> None:
    """Keep what the cost model said beside what the run took: it corrects the next price, and `parafit report` shows it.

    Args:
        name: of the model.
        plan: that ran.
        batch: rows of a step.
        price: what was said.
        seconds_per_step: what it took.
    """
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
        print(f"parafit: this run's score could not be kept for `parafit report`: {error}")
