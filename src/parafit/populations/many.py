"""fit_many: what it is asked for, as members and groups of them."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import jax
import numpy as np

from parafit import api
from parafit.adapters import checks
from parafit.data import inputs
from parafit.errors import DataError, ModelError, NonFiniteLossError
from parafit.execution.events import Console, Notice, emit, listening
from parafit.planner.plan import Plan
from parafit.planning import this_machine
from parafit.populations import arguments
from parafit.populations.members import Member, Order
from parafit.populations.room import room
from parafit.populations.rows import Rows, Table
from parafit.populations.training import train_together
from parafit.support import compat
from parafit.support.arguments import check_arguments


def fit_many(
    models,
    x,
    y=None,
    *,
    n: int | None = None,
    seeds: Sequence[int] | None = None,
    learning_rates=None,
    folds=None,
    batch_size: int | None = None,
    epochs: int = 1,
    verbose: str | int = "auto",
    callbacks=None,
    validation_split: float = 0.0,
    validation_data=None,
    shuffle: bool | str = True,
    class_weight: dict | None = None,
    sample_weight=None,
    validation_batch_size: int | None = None,
    validation_freq: int | list[int] = 1,
    stack: int | None = None,
    plan: Plan | str = "auto",
) -> list:
    """Train many models at once, each as if it were alone: ensembles, folds of a cross-validation, settings, repeated seeds.

    Member k ends with the history, weights and random states of `keras.utils.set_random_seed(seeds[k])`, building the model, and its own
    `parafit.fit`, to rounding. Members whose steps compute the same on arrays of the same shapes are stacked and run in one program, which
    reads the rows of one copy of the data; other shapes follow one after another. A member that stops early gives its place to one that
    waits, and one whose loss becomes NaN stops alone. Models are updated in place.

    Args:
        models: a list of compiled `keras.Model`s or `parafit.nnx.Trainable`s, or a function `build(seed)` or `build()` that makes one.
        x, y, sample_weight: arrays of shape (rows, ...), as in `fit`.
        n: how many models a function is to make; None: as many as the other arguments have values.
        seeds: each member's seed; None: drawn from NumPy's global generator, so that `keras.utils.set_random_seed` decides.
        learning_rates: each member's learning rate; or a dict from names of the optimizer's numbers to each member's.
        folds: a scikit-learn splitter, a number of folds, or pairs of row numbers: member k trains on the rows that fold k leaves and is
            validated on fold k.
        callbacks: each member's list of `keras.callbacks.Callback`s, or a function from a member's number to its list. Where one must be
            called between batches, its member is trained alone.
        batch_size, epochs, validation_split, validation_data, shuffle, class_weight, validation_batch_size, validation_freq: as in `fit`.
        verbose: 0: nothing is told; else which members train together and which stop.
        stack: how many members train at once; None: as many as memory has room for.
        plan: "auto" or "single": one device.

    Returns:
        Each member's `keras.callbacks.History`. Its `model` is the member's model, `seed` its seed, and `error` None, or the
        `NonFiniteLossError` with which it stopped. If the run is interrupted, the exception has them as `histories`.

    Raises:
        DataError: arguments for different numbers of members, folds that leave a class out, data that is not arrays.
        ModelError: a model that cannot be trained, the same one twice, or a function that gives other weights for the same seed.
        PlanError: a plan of several devices.

    >>> import parafit, keras, numpy as np
    >>> x = np.linspace(-1, 1, 256, dtype="float32")[:, None]
    >>> def build():
    ...     model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    ...     model.compile(keras.optimizers.SGD(0.1), "mse")
    ...     return model
    >>> histories = parafit.fit_many(build, x, 3 * x + 1, seeds=[0, 1, 2], epochs=20, verbose=0)
    >>> [bool(history.history["loss"][-1] < 1e-3) for history in histories]
    [True, True, True]
    """
    check_arguments(
        **{"batch_size": batch_size, "epochs": epochs, "verbose": verbose, "validation_split": validation_split, "shuffle": shuffle},
        **{"class_weight": class_weight, "validation_batch_size": validation_batch_size, "validation_freq": validation_freq},
    )
    arguments.check_plan(plan)
    given: Any = arguments.models_of(models)
    arguments.check_n(n, given)
    arguments.check_callbacks(callbacks)
    settings = arguments.settings_of(learning_rates)
    x, y, sample_weight = inputs.plain(x, y, sample_weight)
    inputs.check_lengths(x, y, sample_weight)
    data = _Data(x, y, sample_weight, class_weight, folds=folds, split=validation_split, validation_data=validation_data)
    count = arguments.count_members(
        models=arguments.length(given),
        n=n,
        seeds=arguments.length(seeds),
        **{name: len(values) for name, values in settings.items()},
        folds=arguments.length(data.splits),
        callbacks=arguments.length(callbacks),
    )
    options = {"batch_size": batch_size, "validation_batch_size": validation_batch_size, "shuffle": shuffle}
    epochs = compat.limited_epochs(epochs)
    drawn, made = arguments.seeds_of(seeds, count), arguments.callbacks_of(callbacks, count)
    with listening(Console()) if verbose else nullcontext(), compat.random_states():
        members = [
            Member(
                number,
                seed,
                (lambda number=number: given[number]) if given else arguments.make_by(models, seed),
                {name: values[number] for name, values in settings.items()},
                listed,
                data.order(number, epochs=epochs, validation_freq=validation_freq, **options),
            )
            for number, (seed, listed) in enumerate(zip(drawn, made, strict=True))
        ]
        _check_apart(members)
        if data.splits:
            arguments.check_classes(data.splits, y, getattr(members[0].model, "loss", None))
        if not given:
            _check_deterministic(models, members[0], {name: values[0] for name, values in settings.items()})
        try:
            _train(members, stack, data, options)
        except BaseException as error:
            error.histories = [_history(member) for member in members]  # type: ignore[attr-defined]
            error.add_note("parafit: every model holds its state; `histories` of this exception has them as .model")
            raise
    return [_history(member) for member in members]


class _Data:
    """The rows of all members."""

    def __init__(self, x, y, sample_weight, class_weight, *, folds, split: float, validation_data):
        if folds is not None and (split or validation_data is not None):
            raise DataError("folds= says what each member is validated on: leave validation_split and validation_data out.")
        memory_bytes = this_machine().device.memory_bytes
        self.table = Table(x, y, sample_weight, class_weight=class_weight, memory_bytes=memory_bytes)
        rows = self.table.row_count
        self.splits = arguments.splits_of(folds, y, rows)
        self._train, self._test = np.arange(rows, dtype=np.int32), None
        # A class's weight counts in training only, as in Keras.
        self._test_table = self.table if class_weight is None else Table(x, y, sample_weight, memory_bytes=memory_bytes)
        if validation_data is not None:
            self._test_table = Table(*compat.unpack(validation_data), memory_bytes=memory_bytes)
            self._test = np.arange(self._test_table.row_count, dtype=np.int32)
        elif split:
            checks.check_split(x, split)
            first = int(np.floor(rows * (1 - split)))
            self._train, self._test = self._train[:first], self._train[first:]
        self._tests: dict[int, Rows] = {}

    def order(self, number: int, *, epochs: int, validation_freq, batch_size, validation_batch_size, shuffle) -> Order:
        """What a member trains on, and is validated on."""
        train, test = self.splits[number] if self.splits else (self._train, self._test)
        key = number if self.splits else 0
        if test is not None and key not in self._tests:
            size = validation_batch_size or batch_size
            self._tests[key] = Rows(self._test_table, test, batch_size=size, shuffle=False, steps_per_execution=1)
        return Order(
            train=lambda execution: Rows(self.table, train, batch_size=batch_size, shuffle=shuffle, steps_per_execution=execution),
            validation=self._tests.get(key),
            epochs=epochs,
            validation_freq=validation_freq,
        )


def _train(members: list[Member], stack: int | None, data: _Data, options: dict) -> None:
    groups: dict[tuple, list[Member]] = {}
    alone = [member for member in members if member.why_alone]
    for member in members:
        if not member.why_alone:
            groups.setdefault(member.traces.digest, []).append(member)
    for group in groups.values():
        most = stack or room(group[0].step, group[0].traces.train)
        together = f"{min(len(group), most)} at a time" if most < len(group) else "together"
        others = "" if len(groups) == 1 else "; members of other shapes, or whose steps compute something else, have their own turn"
        emit(Notice(text=f"{len(group)} of {len(members)} members train {together} (members {_numbers(group)}){others}"))
        train_together(group, most)
    for member in alone:
        emit(Notice(text=f"member {member.number} trains alone: {member.why_alone}"))
        _train_alone(member, options)


def _numbers(members: list[Member]) -> str:
    shown = [str(member.number) for member in members]
    return ", ".join(shown if len(shown) <= 8 else [*shown[:6], "…", shown[-1]])


def _train_alone(member: Member, options: dict) -> None:
    """What no stack runs: callbacks between batches, models that Keras runs step by step."""
    order = member.order
    rows = order.train(1)
    x, y, sample_weight = compat.unpack(rows.taken())
    validation = None if order.validation is None else order.validation.taken()
    member.random.enter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="parafit leaves this run to Keras")  # it was told
        try:
            api.fit(
                member.given,
                x,
                y,
                sample_weight=sample_weight,
                validation_data=validation,
                epochs=order.epochs,
                validation_freq=order.validation_freq,
                callbacks=member.user_callbacks,
                verbose=0,
                plan="single",
                **options,
            )
        except NonFiniteLossError as error:
            member.error = error
            emit(Notice(text=f"member {member.number} (seed {member.seed}) stopped: {error}"))


def _history(member: Member) -> Any:
    history = member.history
    if history is not None:
        history.seed, history.error = member.seed, member.error
    return history


def _check_apart(members: list[Member]) -> None:
    seen: dict[int, int] = {}
    for member in members:
        for variable in member.variables():
            if seen.setdefault(id(variable), member.number) != member.number:
                raise ModelError(
                    f"members {seen[id(variable)]} and {member.number} share the variable {getattr(variable, 'path', variable)!r}. Each "
                    "needs layers and an optimizer of its own: make them inside the function that builds the model."
                )


def _check_deterministic(build: Callable, member: Member, settings: dict[str, float]) -> None:
    """Build the first member once more: its seed must decide all of its state."""
    if member.why_alone:
        return
    again = Member(member.number, member.seed, arguments.make_by(build, member.seed), settings, None, member.order)
    if any(variable is other for variable, other in zip(member.variables(), again.variables())):
        raise ModelError("build gave the same model, or the same layers, twice. Make layers, optimizer and model inside it.")
    one, other = (jax.tree.leaves(each.step.read()) for each in (member, again))
    if len(one) != len(other) or not all(map(np.array_equal, one, other)):
        raise ModelError(
            f"build gave two different models for the same seed, {member.seed}: their shapes or initial weights differ. Members must be "
            "reproducible: draw from the global generators of Keras, NumPy or Python, which the seed sets, or from the seed that "
            "build(seed) is given."
        )
