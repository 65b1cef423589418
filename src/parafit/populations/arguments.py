"""What `fit_many` is asked for: how many members, and what each is given. Refused before any work where it does not fit together.

Args:
    n, models, seeds, callbacks: as in `fit_many`.
    count: how many members there are.
    build: the function that makes a model.
    seed: of one member.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

from parafit.errors import DataError, ModelError, PlanError
from parafit.planner.plan import Plan
from parafit.planning import asked_for


def is_build(models: Any) -> bool:
    """Whether this is a function that makes models, rather than models."""
    return inspect.isroutine(models) or inspect.isclass(models) or (callable(models) and not hasattr(models, "optimizer"))


def models_of(models: Any) -> list | None:
    """The models of a list, None for a function that makes them.

    Raises:
        ModelError: neither, or the same model twice.
    """
    if is_build(models):
        return None
    if not isinstance(models, (list, tuple)):
        raise ModelError(
            f"expected a list of models or a function that makes one, got one {type(models).__name__}. Pass a function, as in "
            "fit_many(build, x, y, n=8), where build() gives a compiled model; a single model is trained by parafit.fit."
        )
    if not models:
        raise ModelError("the list of models is empty. Pass at least one, or a function that makes one and n=.")
    seen: dict[int, int] = {}
    for number, model in enumerate(models):
        if id(model) in seen:
            raise ModelError(f"models {seen[id(model)]} and {number} are the same object. Build each of them: [build() for _ in range(n)].")
        seen[id(model)] = number
    return list(models)


def list_of(models: Any) -> list:
    """The models of a list.

    Raises:
        ModelError: no list, or none in it.
    """
    if not isinstance(models, (list, tuple)) or not models:
        raise ModelError(f"expected a list of at least one model, got {type(models).__name__}: {models!r:.80}.")
    return list(models)


def count_members(**counts: int | None) -> int:
    """How many members there are.

    Args:
        **counts: by the name of the argument that says so, None where it does not.

    Raises:
        DataError: the arguments disagree, or none says it.

    >>> count_members(models=None, n=4, seeds=4)
    4
    >>> count_members(n=4, seeds=3)
    Traceback (most recent call last):
    parafit.errors.DataError: the arguments are for different numbers of members: n: 4, seeds: 3. Each needs one value a member.
    """
    given = {name: count for name, count in counts.items() if count is not None}
    if not given:
        raise DataError("how many models are to be trained? Pass n=, or seeds=, learning_rates= or folds= with as many values.")
    if len(set(given.values())) > 1:
        told = ", ".join(f"{name}: {count}" for name, count in given.items())
        raise DataError(f"the arguments are for different numbers of members: {told}. Each needs one value a member.")
    return next(iter(given.values()))


def check_n(n: Any, models: list | None) -> None:
    """Refuse a number of members that is none, or that a list of models has already told."""
    if n is None:
        return
    if not _is_whole(n) or n < 1:
        raise DataError(f"n={n!r}: expected a whole number of at least 1, or None where other arguments say how many.")
    if models is not None and n != len(models):
        raise DataError(f"n={n} is for a function that makes models, but {len(models)} models were passed. Leave n out.")


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_plan(plan: Any) -> None:
    """Refuse plans of several devices."""
    asked = asked_for(plan)
    if asked not in (None, Plan()):
        raise PlanError(f"plan {asked.short()!r}: this version trains many models on one device. Use plan='single', or 'auto'.")


def settings_of(learning_rates: Any) -> dict[str, list[float]]:
    """Numbers for the optimizer by name, one a member each."""
    named = learning_rates if isinstance(learning_rates, Mapping) else {} if learning_rates is None else {"learning_rate": learning_rates}
    settings = {}
    for name, values in named.items():
        values = list(values) if isinstance(values, Iterable) and not isinstance(values, str) else None
        if values is None or not all(map(_is_finite, values)):
            raise DataError(f"{name}: expected a list of finite numbers, one a member, got {named[name]!r:.80}.")
        settings[name] = [float(value) for value in values]
    return settings


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def seeds_of(seeds: Any, count: int) -> list[int]:
    """Each member's seed; drawn from NumPy's global generator where none are given."""
    if seeds is None:
        return [int(seed) for seed in np.random.randint(0, 2**31 - 1, count)]
    for seed in seeds:
        if not _is_whole(seed) or not 0 <= seed < 2**32:
            raise DataError(
                f"seeds holds {seed!r}: expected whole numbers from 0 to {2**32 - 1}, as keras.utils.set_random_seed takes them."
            )
    return [int(seed) for seed in seeds]


def check_callbacks(callbacks: Any) -> None:
    """Refuse one list for all members, and one callback for several: a callback belongs to one model."""
    if callbacks is None or callable(callbacks):
        return
    if not isinstance(callbacks, (list, tuple)) or not all(isinstance(each, (list, tuple, type(None))) for each in callbacks):
        raise DataError(
            "callbacks: expected a list of callbacks for each member, or a function from a member's number to its list, for a callback "
            "belongs to one model. Pass callbacks=lambda number: [keras.callbacks.EarlyStopping()]."
        )
    seen: dict[int, int] = {}
    for number, listed in enumerate(callbacks):
        for callback in listed or ():
            if seen.setdefault(id(callback), number) != number:
                raise DataError(
                    f"members {seen[id(callback)]} and {number} have the same {type(callback).__name__}. A callback belongs to one model: "
                    "make one for each."
                )


def callbacks_of(callbacks: Any, count: int) -> list:
    """Each member's callbacks."""
    if callable(callbacks):
        callbacks = [callbacks(number) for number in range(count)]
        check_callbacks(callbacks)
    return [listed and list(listed) for listed in callbacks or [None] * count]


def length(values: Any) -> int | None:
    """How many values there are, None where there are none to count."""
    return len(values) if isinstance(values, Sequence | np.ndarray) else None


def make_by(build: Callable, seed: int) -> Callable[[], Any]:
    """`build(seed)` where the function takes a seed, else `build()`."""
    try:
        parameters = inspect.signature(build).parameters.values()
    except (TypeError, ValueError):
        return build
    needed = [each for each in parameters if each.default is each.empty and each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    if any(each.name == "seed" and each.kind is not each.POSITIONAL_ONLY for each in parameters):
        return lambda: build(seed=seed)
    return (lambda: build(seed)) if needed else build


def splits_of(folds: Any, y: Any, rows: int) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """The rows that each member trains on, and those that it is validated on.

    Args:
        folds: a scikit-learn splitter, a number of folds, or pairs of arrays of row numbers.
        y: targets, or None.
        rows: how many there are.

    Raises:
        DataError: no splitter, or row numbers that do not exist.
    """
    if folds is None:
        return None
    labels = y if getattr(y, "ndim", 0) == 1 or (getattr(y, "ndim", 0) == 2 and y.shape[1] == 1) else None
    if labels is None and getattr(y, "ndim", 0) == 2 and np.isin(y, (0, 1)).all() and (y.sum(axis=1) == 1).all():
        labels = y.argmax(axis=1)  # one-hot
    labels = None if labels is None else np.asarray(labels).reshape(-1)
    if _is_whole(folds) or hasattr(folds, "split"):
        from sklearn.model_selection import check_cv

        classes = labels is not None and labels.dtype.kind in "biu"
        try:
            found = list(check_cv(folds, labels if classes else None, classifier=classes).split(np.zeros((rows, 1)), labels))
        except ValueError as error:
            raise DataError(f"folds={folds!r} cannot split {rows} rows: {error}") from error
    else:
        found = _pairs(folds)
    return [(_row_numbers(train, rows, number), _row_numbers(test, rows, number)) for number, (train, test) in enumerate(found)]


def _pairs(folds: Any) -> list:
    try:
        found = [tuple(pair) for pair in folds]
    except TypeError:
        found = []
    if not found or any(len(pair) != 2 for pair in found):
        raise DataError(
            f"folds={folds!r:.80}: expected a scikit-learn splitter such as sklearn.model_selection.KFold(5), a number of folds, or pairs "
            "of arrays: the rows to train on, and those to validate on."
        )
    return found


def _row_numbers(part: Any, rows: int, fold: int) -> np.ndarray:
    numbers = np.asarray(part)
    if numbers.dtype == bool and numbers.shape == (rows,):
        numbers = np.flatnonzero(numbers)
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu" or not len(numbers) or numbers.min() < 0 or numbers.max() >= rows:
        raise DataError(f"fold {fold} does not name rows of the data: expected at least one whole number from 0 to {rows - 1}.")
    return numbers.astype(np.int32)


def check_classes(splits: Sequence[tuple[np.ndarray, np.ndarray]], y: Any, loss: Any) -> None:
    """Refuse folds whose training rows lack a class.

    Args:
        splits: as `splits_of` gives them.
        y: targets.
        loss: what a model was compiled with.
    """
    words = loss if isinstance(loss, str) else getattr(loss, "name", getattr(loss, "__name__", ""))
    y = np.asarray(y) if hasattr(y, "shape") else None
    if y is None or not any(word in str(words) for word in ("crossentropy", "focal")) or (y.dtype.kind not in "biu" and y.ndim < 2):
        return
    labels = y.argmax(axis=1) if y.ndim == 2 and y.shape[1] > 1 else y.reshape(len(y), -1)[:, 0]
    for number, (train, _) in enumerate(splits):
        if len(missing := np.setdiff1d(labels, labels[train])):
            raise DataError(
                f"fold {number} trains on no row of class {', '.join(map(str, missing[:3]))}, so its model cannot learn it. Use "
                "folds=sklearn.model_selection.StratifiedKFold(...), or KFold(..., shuffle=True) where rows are sorted by class."
            )
