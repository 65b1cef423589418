"""`find_plan`: where a model, a machine and the search meet."""

import functools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from parafit import backends
from parafit.errors import ModelError
from parafit.planner.machine.machine import Machine
from parafit.planner.networks import named
from parafit.planner.plan import Plan
from parafit.planner.program import Program
from parafit.planner.search.search import search
from parafit.planner.search.space import SAME_NUMBERS
from parafit.support.arguments import check_arguments

RUNS = frozenset({"data", "tensor", "zero", "store_group", "microbatches", "recompute", "bfloat16"})
"""The techniques that this version runs; it prices others."""

_FIXED = "build it with an input of fixed shape, such as keras.Input((784,))"

_WHOLE_STEP = frozenset({"microbatches", "recompute"})  # need a step that can be taken apart


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
    return search(program, machine, goal=goal, max_bytes=max_bytes, allow=allow).plan


def this_machine() -> Machine:
    """The machine that this runs on, as plans may use it: simulated devices of one processor share its cores, so they count as one.

    >>> this_machine().device_count >= 1
    True
    """

    from parafit.calibration import detect

    machine = detect.here()
    return replace(machine, devices_per_host=1) if backends.current().devices_share_cores else machine


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

    Args and errors are those of `find_plan`; `here`: the program is to run on this machine, whose compiler is known.
    """
    import jax

    from parafit.adapters import adapter_of, checks
    from parafit.data.feed import Feed

    adapter = adapter_of(model, "fit")
    model = adapter.model
    if x is None or _is_shape(x):
        x, y = _example(model, x)
    feed = Feed(x, y)
    checks.build(adapter, feed, "fit")
    shapes, rows = feed.shapes(), batch_size or (32 if feed.known_rows else None)
    if rows:
        shapes = jax.tree.map(lambda spec: jax.ShapeDtypeStruct((rows, *spec.shape[1:]), spec.dtype), shapes)
    step = adapter.train_step()
    return step_program(step, shapes, model.name, here=here), refused_techniques(step)


def step_program(step: Any, batch: Any, name: str, *, here: bool = True) -> Program:
    """The program of an adapted model's step, with what is known of its layers.

    Args:
        step: a `parafit.adapters.step.Step`.
        batch: one global batch, packed as the step takes it: arrays or shapes.
        name: of the model.
        here: whether it is to run on this machine, whose compiler is known.
    """
    import jax

    from parafit.tracing.trace import trace_step

    backend = backends.current()
    stored = backend.stored if here and backend.knows_storage() else None
    state, fixed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (step.read(), step.read_fixed()))
    program = trace_step(step, state, batch, fixed=fixed, name=name, stored=stored)
    if not step.parts:
        return program

    @functools.cache
    def recomputing() -> Program | None:
        from parafit.placement import Placement
        from parafit.techniques import planned_function

        function = planned_function(step, Placement(Plan(recompute="blocks")), batch)
        try:
            return trace_step(replace(step, function=function), state, batch, fixed=fixed, name=name, stored=stored, like=program)
        except ModelError:
            return None

    return replace(program, couples_batch=program.couples_batch or step.parts.couples, recomputing=recomputing)


def refused_techniques(step: Any) -> frozenset[str]:
    """The techniques that a step cannot run: those that take a training step apart, or store what only training has."""
    if step.name != "train":
        return _WHOLE_STEP | {"zero", "store_group"}
    return frozenset() if step.parts else _WHOLE_STEP


def _is_shape(x: Any) -> bool:
    return isinstance(x, tuple) and all(isinstance(size, int) for size in x)


def _example(model: Any, shape: tuple[int, ...] | None) -> tuple[Any, Any]:
    """Two rows of zeros, as inputs and targets."""
    import jax
    import numpy as np

    if not hasattr(model, "compute_output_shape"):
        raise ModelError(f"model {model.name!r} does not say what its data looks like: pass x and y themselves.")
    if shape is not None:
        if not model.built:
            model.build((None, *shape))
        x = np.zeros((2, *shape), "float32")
    elif getattr(model, "inputs", None):
        inputs = _input_structure(model)
        _check_known(model, inputs)
        x = jax.tree.map(lambda spec: np.zeros((2, *spec.shape[1:]), spec.dtype), inputs)
    else:
        raise ModelError.advising(
            f"model {model.name!r} does not say what it reads:",
            python="pass the shape of one row of x such as (784,), or x and y themselves.",
            command=f"{_FIXED}.",
        )
    outputs = model.compute_output_shape(jax.tree.map(np.shape, x, is_leaf=lambda part: isinstance(part, np.ndarray)))
    return x, _targets(outputs, model.loss)


def _input_structure(model: Any) -> Any:
    structure = getattr(model, "_inputs_struct", model.inputs)
    return structure if isinstance(structure, dict) else model.inputs if len(model.inputs) > 1 else model.inputs[0]


def _check_known(model: Any, inputs: Any) -> None:
    for spec in inputs.values() if isinstance(inputs, dict) else inputs if isinstance(inputs, list) else [inputs]:
        if None in spec.shape[1:]:
            raise ModelError.advising(
                f"model {model.name!r} reads rows of any length {tuple(spec.shape)}:",
                python="pass the shape of one row of x, or x and y themselves.",
                command=f"{_FIXED}.",
            )


def _targets(outputs: Any, loss: Any) -> Any:
    """Zeros in the form that a loss wants for outputs of these shapes."""
    import numpy as np

    if isinstance(outputs, dict):
        return {name: _targets(shape, loss[name] if isinstance(loss, dict) else loss) for name, shape in outputs.items()}
    if isinstance(outputs, list):
        losses = loss if isinstance(loss, (list, tuple)) else [loss] * len(outputs)
        return [_targets(shape, each) for shape, each in zip(outputs, losses)]
    sparse = "sparse" in (loss if isinstance(loss, str) else getattr(loss, "name", getattr(loss, "__name__", "")))
    return np.zeros((2, *outputs[1:-1]), "int32") if sparse else np.zeros((2, *outputs[1:]), "float32")
