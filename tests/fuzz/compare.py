"""One network on one device and under a plan: the same numbers, to what follows from rounding; and no array split unevenly."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import keras
import numpy as np

import parafit
from parafit.nnx import Trainable
from tests.evenness import read_splits

NUDGE = 1e-15
"""Relative change of initial weights that stands for rounding: what it does to a run, another order of summation may do as well."""
SINGLE_NUDGE = 1e-7
"""The same for networks part of which computes in float32 whatever the dtype."""
AMPLIFIED = 1e3
"""Layouts may differ from one device by this many times what the nudge does."""
ROUNDING = 1e-12
CHAOTIC = 1e-5
"""From this relative change on a network says nothing: it turns rounding into other numbers by itself."""


@dataclass(frozen=True)
class Verdict:
    """What a comparison found.

    Attributes:
        kind: "same", "refused" (an error of parafit's that says so), "chaotic", or a failure: "different", "uneven" or "error".
        told: of what is not the same: the arrays, splits or error.
    """

    kind: str
    told: str = ""

    @property
    def failed(self) -> bool:
        return self.kind in ("different", "uneven", "error")


def compare(make: Callable[[], Any], x, y, *, plan: str, batch_size: int, single: bool = False) -> Verdict:
    """Train, evaluate and predict under a plan and on one device.

    Args:
        make: makes the model, alike every time.
        x, y: data as `parafit.fit` takes it.
        plan, batch_size: of the run to check.
        single: whether part of the network computes in float32.
    """
    try:
        with read_splits() as splits:
            many = outcome(make, x, y, plan=plan, batch_size=batch_size)
    except (parafit.errors.PlanError, parafit.errors.ModelError) as error:
        return Verdict("refused", str(error))
    except Exception as error:
        return Verdict("error", f"{type(error).__name__}: {error}")
    if splits.uneven:
        return Verdict("uneven", "\n".join(splits.uneven[:5]))
    alone = on_one_device(plan)
    one = outcome(make, x, y, plan=alone, batch_size=batch_size)
    nudged = outcome(make, x, y, plan=alone, batch_size=batch_size, nudge=SINGLE_NUDGE if single else NUDGE)
    return judge(one, many, nudged)


def on_one_device(plan: str) -> str:
    """The plan of one device that has the same numbers: cut alike where microbatches have statistics of their own.

    >>> on_one_device("data=2,zero=1"), on_one_device("data=2,microbatches=3,recompute=blocks,statistics=microbatch")
    ('single', 'microbatches=3,statistics=microbatch')
    """
    words = [word for word in plan.split(",") if word.startswith(("microbatches", "statistics"))]
    return ",".join(words) if "statistics=microbatch" in words and len(words) > 1 else "single"


def judge(one: dict[str, np.ndarray], many: dict[str, np.ndarray], nudged: dict[str, np.ndarray]) -> Verdict:
    """Whether `many` is `one`, given what a nudge makes of it."""
    if one.keys() != many.keys():
        return Verdict("different", f"{sorted(one)} and {sorted(many)}")
    told = []
    for name, array in one.items():
        size = max(1.0, float(np.max(np.abs(array), initial=0)))
        by_nudge, by_plan = _distance(array, nudged[name]), _distance(array, many[name])
        if by_nudge > CHAOTIC * size:
            return Verdict("chaotic", name)
        if not by_plan <= ROUNDING * size + AMPLIFIED * by_nudge:
            told.append(f"{name} {array.shape}: {by_plan:.2g} apart; a nudge makes {by_nudge:.2g}")
    return Verdict("different", "\n".join(told[:5])) if told else Verdict("same")


def outcome(make: Callable[[], Any], x, y, *, plan: str, batch_size: int, nudge: float = 0.0) -> dict[str, np.ndarray]:
    """All numbers of a run, by name."""
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(7)
    model = make()
    _nudge(model, nudge)
    fitted = parafit.fit(model, x, y, batch_size=batch_size, verbose=0, plan=plan).history
    options: dict[str, Any] = {"batch_size": batch_size, "verbose": 0, "plan": plan}
    scores = {} if isinstance(model, Trainable) else parafit.evaluate(model, x, y, return_dict=True, **options)
    outputs = parafit.predict(model, x, **options)
    named = {"fit": fitted, "evaluate": scores, "predict": outputs, "state": _state(model)}
    found, _ = jax.tree_util.tree_flatten_with_path(named)
    return {jax.tree_util.keystr(path): np.asarray(leaf, np.float64) for path, leaf in found}


def _nudge(model, nudge: float) -> None:
    if nudge and isinstance(model, Trainable):
        signs = np.random.default_rng(0)
        state = jax.tree.map(lambda leaf: leaf * (1 + nudge * signs.choice([-1, 1], leaf.shape)), _numbers(model))
        _set_numbers(model, state)
    elif nudge:
        signs = np.random.default_rng(0)
        for weight in model.trainable_variables:
            weight.assign(weight.numpy() * (1 + nudge * signs.choice([-1, 1], weight.shape)))


def _numbers(model: Trainable):
    from flax import nnx

    return nnx.to_pure_dict(nnx.state(model.module, nnx.Param))


def _set_numbers(model: Trainable, numbers) -> None:
    from flax import nnx

    state = nnx.state(model.module, nnx.Param)
    nnx.replace_by_pure_dict(state, numbers)
    nnx.update(model.module, state)


def _state(model) -> Any:
    if isinstance(model, Trainable):
        return _numbers(model)
    return [variable.numpy() for variable in (*model.weights, *model.optimizer.variables) if variable.dtype.startswith(("float", "int"))]


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    """The largest distance of two numbers; NaN where one is a number and the other is not."""
    if one.shape != other.shape or not np.array_equal(np.isnan(one), np.isnan(other)):
        return float("nan")
    return float(np.max(np.abs(np.nan_to_num(one) - np.nan_to_num(other)), initial=0))
