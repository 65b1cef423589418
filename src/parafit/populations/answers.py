"""evaluate_many and predict_many: what many models make of the same data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from parafit import api, backends
from parafit.adapters import adapter_of, checks
from parafit.adapters.step import Adapter, State, Step
from parafit.data import inputs
from parafit.planning import this_machine
from parafit.populations import arguments
from parafit.populations.lockstep import Lockstep
from parafit.populations.room import room
from parafit.populations.rows import Rows, Table
from parafit.populations.stack import Stack
from parafit.populations.tracing import TracedStep, traced_step
from parafit.support import compat
from parafit.support.arguments import check_arguments


def evaluate_many(
    models, x, y=None, *, batch_size: int | None = None, verbose: str | int = "auto", sample_weight=None, return_dict: bool = False
) -> list:
    """The loss and metrics of many models on the same data: `evaluate` of each, those of one shape in one program.

    Args:
        models: a list of compiled models.
        x, y, sample_weight: arrays of shape (rows, ...).
        batch_size, verbose, return_dict: as in `evaluate`.

    Returns:
        For each model what `evaluate` gives.

    Errors are those of `fit_many`.

    >>> import parafit, keras, numpy as np
    >>> models = [keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, kernel_initializer=how)]) for how in ("zeros", "ones")]
    >>> for model in models:
    ...     model.compile(loss="mse")
    >>> [float(loss) for loss in parafit.evaluate_many(models, np.ones((8, 2)), np.ones((8, 1)), verbose=0)]
    [1.0, 1.0]
    """
    check_arguments(batch_size=batch_size, verbose=verbose)
    given = arguments.list_of(models)
    options = {"batch_size": batch_size, "sample_weight": sample_weight, "verbose": 0, "return_dict": return_dict}
    found = _answers("evaluate", given, (x, y, sample_weight), batch_size)
    return [
        api.evaluate(model, x, y, **options) if logs is None else _scores(model, logs, return_dict) for model, logs in zip(given, found)
    ]


def predict_many(models, x, *, batch_size: int | None = None, verbose: str | int = "auto") -> Any:
    """The outputs of many models for the same data: `predict` of each, those of one shape in one program.

    Args:
        models: a list of models.
        x: arrays of shape (rows, ...).
        batch_size, verbose: as in `predict`.

    Returns:
        NumPy arrays of shape (members, rows, ...) in the structure of the models' outputs; a list of each model's outputs where their
        shapes differ.

    Errors are those of `fit_many`.

    >>> import parafit, keras, numpy as np
    >>> models = [keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, kernel_initializer=how)]) for how in ("zeros", "ones")]
    >>> parafit.predict_many(models, np.ones((3, 2)), verbose=0)[:, :, 0].tolist()
    [[0.0, 0.0, 0.0], [2.0, 2.0, 2.0]]
    """
    check_arguments(batch_size=batch_size, verbose=verbose)
    given = arguments.list_of(models)
    found = _answers("predict", given, (x,), batch_size)
    outputs = [api.predict(model, x, batch_size=batch_size, verbose=0) if answer is None else answer for model, answer in zip(given, found)]
    alike = {(jax.tree.structure(each), tuple(leaf.shape for leaf in jax.tree.leaves(each))) for each in outputs}
    return jax.tree.map(lambda *arrays: np.stack(arrays), *outputs) if len(alike) == 1 else outputs


def _scores(model: Any, logs: dict, return_dict: bool) -> Any:
    logs = compat.log_values(logs)
    return logs if return_dict else adapter_of(model, "evaluate").scores(logs)


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """A model that is asked together with others."""

    number: int
    adapter: Adapter
    step: Step
    traced: TracedStep
    rows: Rows


def _answers(verb: str, models: Sequence[Any], data: tuple, batch_size: int | None) -> list:
    """For each model its logs or outputs, None where it must be asked alone."""
    found: list = [None] * len(models)
    adapters = [adapter_of(model, verb) for model in models]
    if inputs.is_sparse(*data):
        return found
    data = inputs.plain(*data)
    if len(data) == 3:
        inputs.check_lengths(*data)
    table = Table(*data, memory_bytes=this_machine().device.memory_bytes)
    groups: dict[tuple, list[_Asked]] = {}
    for number, adapter in enumerate(adapters):
        if not adapter.why_stepwise():
            asked = _asked(verb, number, adapter, table, batch_size)
            groups.setdefault((asked.traced.digest, len(asked.traced.names)), []).append(asked)
    for group in groups.values():
        lead = group[0]
        most = room(lead.step, lead.traced) if backends.current().stacks(lead.traced.closed) else 1
        for first in range(0, len(group), most):
            _ask(verb, group[first : first + most], found)
    return found


def _asked(verb: str, number: int, adapter: Adapter, table: Table, batch_size: int | None) -> _Asked:
    rows = Rows(table, np.arange(table.row_count, dtype=np.int32), batch_size=batch_size, shuffle=False, steps_per_execution=1)
    checks.build(adapter, rows, verb)
    if verb == "evaluate":
        adapter.model.reset_metrics()
    step = adapter.predict_step() if verb == "predict" else adapter.test_step()
    with compat.attention_to_be_stacked(adapter.model):
        traced = traced_step(step, rows.shapes(), adapter.config())
    return _Asked(number=number, adapter=adapter, step=step, traced=traced, rows=rows)


def _ask(verb: str, group: Sequence[_Asked], found: list) -> None:
    """Ask models of one shape, and write down the answers."""
    lead = group[0]
    stack = Stack([each.step.read()._replace(weights=each.step.read_fixed()) for each in group])
    weights = stack.state.weights
    batches = list(lead.rows.batches())
    lockstep = Lockstep(lead.step, lead.traced, lead.rows.table, longest=len(batches), shared=True)

    def take(state: State) -> None:
        stack.state = state._replace(weights=weights)

    with backends.current().running(), compat.attention_to_be_stacked(lead.adapter.model):
        prepared = lockstep.prepare([batches] * len(group))
        state = stack.state._replace(weights=[])
        if verb == "predict":
            answers = lockstep.predict(prepared, weights, state, take)
        else:
            answers = lockstep.evaluate(prepared, weights, state, take)
    for lane, each in enumerate(group):
        if verb == "predict":
            found[each.number] = jax.tree.map(lambda array, lane=lane: array[lane], answers)
        else:
            found[each.number] = dict(zip(each.traced.names, (log[lane] for log in answers)))
        each.step.write(stack.read(lane)._replace(weights=[]))
