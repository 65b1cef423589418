"""Which plan: `find_plan`, the one meaning of "auto", and the way from a plan to devices."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parafit import backends
from parafit.errors import ModelError, PlanError, ProgramError
from parafit.planner.cost.estimator import price
from parafit.planner.layout import lay_out, resolve, split_by_dims
from parafit.planner.machine.machine import Machine
from parafit.planner.networks import named
from parafit.planner.plan import AXES, Plan
from parafit.planner.program import Program, Tensor
from parafit.planner.schedules import make_grid
from parafit.planner.search.search import search
from parafit.planner.search.space import SAME_NUMBERS
from parafit.support.arguments import check_arguments

if TYPE_CHECKING:  # imported where they are needed: planning for another machine needs no JAX
    from parafit.adapters.step import Step
    from parafit.placement import Placement

RUNS = frozenset({"data", "tensor", "pipeline", "interleave", "zero", "store_group", "microbatches", "recompute", "bfloat16"})
"""The techniques that this version runs; it prices others, and plans that have these are marked."""

_ASKED_FOR = frozenset({"pipeline", "interleave"})
"""What "auto" leaves to those who ask for it: where pipelines pay was not measured yet (decision 0018)."""

_MOST_PROCESSES = 2
"""Over which a pipeline runs: four were seen to wait for each other for ever."""

WORTH = 1.1
"""So many times as fast as one device must a plan be predicted to be chosen by itself: about what prices are wrong by."""

AUTO = "auto"


def find_plan(
    model: Any,
    x: Any = None,
    y: Any = None,
    *,
    batch_size: int | None = None,
    machine: Machine | str | None = None,
    goal: str = "time",
    max_bytes: float | None = None,
    allow: Iterable[str] | None = None,
) -> Plan:
    """The best plan to train a model with.

    `print(plan)` shows its price and the runners-up; `explain(plan, instead="data=8")` says why it beats another.

    Args:
        model: a compiled `keras.Model`; a `parafit.nnx.Trainable`; the name of a network such as "gpt:39b"; or a `Program`.
        x: inputs as `fit` takes them, or the shape of one row of them; None: what a Keras model says. A few rows do: they tell shapes.
        y: targets as `fit` takes them; None: what the model's outputs and loss ask for.
        batch_size: rows of one step over all devices together; 32 if not given, or as many as a dataset yields.
        machine: a `Machine`, or the name of a preset such as "h100x8"; None: the machine that this runs on.
        goal: "time", "memory" or "cost", as in `search`.
        max_bytes: what a device may hold; default: its memory.
        allow: techniques that may be used, as in `search`; default: those that leave the numbers as they are, for this
            machine those of them that parafit runs.

    Returns:
        The plan; its `ranking` holds the price and what else was considered.

    Raises:
        ModelError: a model that is not compiled or cannot be traced, or a network that parafit does not know.
        MachineError: no such preset.
        PlanError: an unknown goal or technique, or no plan fits into memory.
        DataError: x and y do not fit the model, as in `fit`.

    >>> plan = find_plan("gpt:1.3b", batch_size=64, machine="h100x8")
    >>> plan.device_count
    8
    """
    check_arguments(batch_size=batch_size)
    program, refused = _program(model, x, y, batch_size, here=machine is None)
    if allow is None:
        allow = (RUNS & SAME_NUMBERS if machine is None else SAME_NUMBERS) - refused
    if machine is None:
        machine = this_machine()
    elif isinstance(machine, str):
        machine = Machine.load(machine)
    return search(program, machine, goal=goal, max_bytes=max_bytes, allow=allow, runs=RUNS).plan


def this_machine() -> Machine:
    """The machine that this runs on, as plans may use it: simulated devices of one processor share its cores, so they count as one.

    >>> this_machine().device_count >= 1
    True
    """

    from parafit.calibration import detect

    machine = detect.here()
    return replace(machine, devices_per_host=1) if backends.current().devices_share_cores else machine


def asked_for(plan: Plan | str | Path) -> Plan | None:
    """The plan meant by a `plan=` argument, None for "auto".

    Args:
        plan: "auto", a `Plan`, a text such as "data=8", or the path of a plan's JSON file.

    Raises:
        PlanError: no plan, or one that cannot run here.

    >>> asked_for("auto") is None, asked_for("single").device_count
    (True, 1)
    """
    if plan == AUTO:
        return None
    read = Plan.read(plan)
    _check_runs(read)
    return read


def plan_for(asked: Plan | None, step: "Step", program: Callable[[], Program], *, tell: Callable[[str], None]) -> Plan:
    """The plan to run: the one that was asked for, else what "auto" means.

    "auto" is the fastest plan of this machine that fits and is predicted to be worth it; else one device.

    Args:
        asked: as `asked_for` gives it.
        step: what is to run.
        program: gives its program.
        tell: is told why no plan could be made.

    Raises:
        PlanError: no plan fits into memory.
    """
    return _best_plan(step, program, tell) if asked is None else asked


def _best_plan(step: "Step", program: Callable[[], Program], tell: Callable[[str], None]) -> Plan:
    from parafit.techniques.program import refused_techniques

    machine = this_machine()
    if machine.device_count == 1 and step.name != "train":
        return Plan()
    try:
        traced = program()
    except (ModelError, ProgramError) as error:
        tell(f"one device, for no plan could be made: {error}")
        return Plan()
    alone = price(traced, Plan(), machine)
    fits = alone.peak_bytes <= machine.device.memory_bytes
    if fits and machine.device_count == 1:
        return Plan()
    try:
        ranking = search(traced, machine, allow=(RUNS & SAME_NUMBERS) - _ASKED_FOR - refused_techniques(step))
    except PlanError as error:
        rest = "runs it on one device all the same, as far as its memory goes."
        raise PlanError.advising(str(error), python=f"plan='single' {rest}", command=f"--plan single {rest}") from error
    return Plan() if fits and alone.seconds < WORTH * ranking.best.cost.seconds else ranking.plan


def plan_to_fit(model: Any, x: Any, y: Any, *, batch_size: int, plan: Plan | str, tell: Callable[[str], None]) -> Plan:
    """The plan that `fit` would run with these arguments, the model built as `fit` would build it.

    Args:
        model, x, y, batch_size, plan: as in `fit`.
        tell: as in `plan_for`.

    Errors are those of `fit`.
    """
    from parafit.adapters import adapter_of, checks
    from parafit.data.source import Source
    from parafit.techniques.program import program_of

    asked = asked_for(plan)
    adapter = adapter_of(model, "fit")
    source = Source(x, y, batch_size=batch_size, shuffle=True)
    checks.build(adapter, source, "fit")
    step = adapter.train_step()
    return plan_for(asked, step, program_of(adapter, step, source.shapes), tell=tell)


def place(plan: Plan, step: "Step", program: Callable[[], Program]) -> "Placement":
    """A plan on this machine's devices, its layout worked out for a model.

    Args:
        plan: to run.
        step: the model's step.
        program: gives the step's program; called where the plan needs the model's dims.

    Raises:
        PlanError: the plan does not fit the model.
    """
    from parafit.placement import Placement

    if "pipeline" in plan.axes:
        inside = place(plan.inside, step, program)
        return Placement(replace(plan, compute={AXES["pipeline"]: "pipeline", **inside.plan.compute}), inside.layout)
    if plan.device_count == 1:
        return Placement(plan)
    if set(plan.compute) <= {AXES["data"]}:
        return Placement(plan, lay_out(_shaped(step), plan))
    traced = program()
    plan = resolve(traced, plan)
    _check_split(traced, plan)
    return Placement(plan, lay_out(traced.tensors.values(), plan))


def _check_split(program: Program, plan: Plan) -> None:
    parameters = program.of_role("parameter")
    for dim, axis in plan.compute.items():
        if dim != AXES["data"] and not any(axis in split_by_dims(tensor, plan) for tensor in parameters if dim in tensor.dims):
            raise PlanError(
                f"the plan maps {dim!r} to {axis!r}, which splits no parameter of {program.name!r}: this version runs splits of the batch "
                "and of dims of parameters, and only prices others."
            )


def _shaped(step: "Step") -> list[Tensor]:
    """The arrays of a step's state, of whose dims nothing needs to be known."""
    import jax

    leaves, arrays = jax.tree.leaves(step.leaves), jax.tree.leaves((step.read_fixed(), step.read()))
    return [Tensor(name=leaf.name, shape=array.shape, dims=("",) * array.ndim, role=leaf.role) for leaf, array in zip(leaves, arrays)]


def _check_runs(plan: Plan) -> None:
    """Refuse what this version does not run, and more devices than there are."""
    import jax

    if "pipeline" in plan.axes:
        if plan.statistics != "batch":
            raise PlanError(f"plan {plan.short()!r}: statistics={plan.statistics} does not run in a pipeline yet. Leave one of them out.")
        if jax.process_count() > _MOST_PROCESSES:
            raise PlanError(
                f"plan {plan.short()!r}: a pipeline over {jax.process_count()} processes does not run yet, only over {_MOST_PROCESSES}."
            )
        make_grid(plan.schedule, devices=plan.axes["pipeline"], microbatches=plan.microbatches, interleave=plan.interleave)
    elif plan.interleave > 1:
        raise PlanError(f"plan {plan.short()!r}: interleave={plan.interleave} is of pipelines, and the plan has none. Add pipeline=.")
    wanted, there = plan.device_count, jax.device_count()
    if wanted > there:
        raise PlanError.advising(
            f"plan {plan.short()!r} wants {wanted} devices, but there are {there} ({jax.devices()[0].platform}). "
            "Choose a smaller plan, or, to simulate devices on CPU,",
            python=f"call jax.config.update('jax_num_cpu_devices', {wanted}) first.",
            command=f"set JAX_NUM_CPU_DEVICES={wanted} in the environment.",
        )


def _program(model: Any, x: Any, y: Any, batch_size: int | None, *, here: bool) -> tuple[Program, frozenset[str]]:
    """What is to be planned, and the techniques that this model cannot run."""
    if isinstance(model, Program):
        return model, frozenset()
    if isinstance(model, str):
        if batch_size is None:
            raise ModelError(f"network {model!r} needs batch_size=: the rows of one step over all devices together.")
        return named(model, batch=batch_size), frozenset()
    return keras_program(model, x, y, batch_size=batch_size, here=here)


def keras_program(
    model: Any, x: Any = None, y: Any = None, *, batch_size: int | None = None, here: bool = False
) -> tuple[Program, frozenset[str]]:
    """The program of a model's training step, and the techniques that this model cannot run.

    Args and errors are those of `find_plan`.

    Args:
        here: whether the program is to run on this machine, whose compiler is known.
    """
    import jax

    from parafit.adapters import adapter_of, checks
    from parafit.adapters.examples import example_rows
    from parafit.data.source import Source
    from parafit.techniques.program import refused_techniques, step_program

    adapter = adapter_of(model, "fit")
    model = adapter.model
    if x is None or _is_shape(x):
        x, y = example_rows(model, x)
    source = Source(x, y)
    checks.build(adapter, source, "fit")
    shapes, rows = source.shapes(), batch_size or (32 if source.known_rows else None)
    if rows:
        shapes = jax.tree.map(lambda spec: jax.ShapeDtypeStruct((rows, *spec.shape[1:]), spec.dtype), shapes)
    step = adapter.train_step()
    return step_program(step, shapes, model.name, here=here), refused_techniques(step)


def _is_shape(x: Any) -> bool:
    return isinstance(x, tuple) and all(isinstance(size, int) for size in x)
