"""`train`: from a table to a fitted network with its scores."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from parafit import api
from parafit.errors import DataError, NonFiniteLossError
from parafit.execution.events import Event, listening
from parafit.planner.plan import Plan
from parafit.planning import asked_for, plan_to_fit
from parafit.tables import console, networks, report_page
from parafit.tables.model_folder import TableModel, check_folder, write_folder
from parafit.tables.networks import Settings, choose_settings
from parafit.tables.preprocessing import Preparation, check_columns, fit_preparation
from parafit.tables.read import read_table
from parafit.tables.rows import Table, bad_words, note_words
from parafit.tables.scores import score
from parafit.tables.split import Split, split_rows
from parafit.tables.target import Judgement, fit_target, judge_target

_LEAST_ROWS = 20
_PREDICT_BATCH_SIZE = 1024


def train(
    table,
    *,
    target: str,
    task: str | None = None,
    model: "str | Path | None" = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    plan: Plan | str = "auto",
    out: "str | Path | None" = None,
    force: bool = False,
    verbose: bool = True,
) -> TableModel:
    """Fit a network that predicts one column of a table from the others, and score it on rows it has not seen.

    A fifth of the rows is kept for the test; 15 % of the others decide when to stop. Ctrl-C ends training, not the work:
    the best weights so far are scored, written and returned, and `stopped` says so. Rows without a target are left out. What
    reading the table had to do stands in `notes`.

    Args:
        table: a path to a CSV, TSV (also .gz), Parquet, Arrow or Excel file, or a pandas, polars or Arrow frame.
        target: the column to predict.
        task: "classification" or "regression"; inferred from the target if not given.
        model: the network: a `.keras` file, or a `.py` file with `build_model(input_shape, output_size)`; see
            `parafit.tables.networks.load_network`. A default for the data's size if not given.
        epochs: the most there will be.
        batch_size: rows of one step over all devices together.
        seed: of the split, the initial weights, dropout and shuffling; sets Python's, NumPy's and Keras' global seeds.
        plan: "auto", a `Plan`, a text such as "data=8", or the path of a plan's JSON file.
        out: a folder for the model, preprocessing, plan, history, scores and an HTML report; nothing is written if None.
        force: whether a model that `out` holds already may be replaced.
        verbose: print what was read, the network, progress and scores.

    Raises:
        DataError: the table or its target cannot be used; the message says which column and row.
        ModelError: `model` cannot be used for this table.
        OutputError: `out` cannot be written, or holds a model; found before training.
        PlanError: the plan cannot run here.
        NonFiniteLossError: the loss became NaN or infinite; the last good weights are in `out`.

    >>> import polars as pl
    >>> table = pl.DataFrame({"size": [n**2 for n in range(100)], "price": [3.5 * n for n in range(100)]})
    >>> result = train(table, target="price", epochs=1, verbose=False)
    >>> result.preparation.target.task, result.preparation.inputs
    ('regression', ['size'])
    """
    import keras

    if out is not None:
        check_folder(out, force=force)
    if model is not None:
        networks.check_model_file(model)
    asked_for(plan)  # refuses what cannot run here
    screen = console.Screen(verbose)
    read, judged, notes = _read_training_table(table, target, task)
    frame = read.frame
    goal, split, preparation = _prepare(read, target, judged, seed)
    prepared = preparation.transform(frame)
    notes += bad_words({name: (read.rows.cells(frame[name], rows), len(rows)) for name, rows in prepared.bad.items()})
    inputs = prepared.values
    settings = choose_settings(len(split.train), goal.task, epochs=epochs, batch_size=batch_size)
    screen.table_read(read.name, frame, preparation, notes)
    keras.utils.set_random_seed(seed)
    net = _network(model, inputs.shape[1], preparation, settings, len(split.train))
    codes = goal.encode(frame.get_column(target))
    labels = networks.encode_labels(net, goal, codes)
    rows = inputs[split.train], labels[split.train]
    found = plan_to_fit(net, *rows, batch_size=settings.batch_size, plan=plan, tell=screen.note)
    screen.network(net, settings, found, split)
    chosen_plan = replace(found)  # without its ranking, which was shown
    run = _fit(net, inputs, labels, split, settings, chosen_plan, screen)
    outputs = api.predict(net, inputs, batch_size=_PREDICT_BATCH_SIZE, verbose=0, plan=chosen_plan)
    predictions = networks.to_predictions(net, goal, outputs)
    scores = {part: score(goal, codes[rows], predictions[rows]) for part, rows in vars(split).items()}
    told = {"history": run.history, "scores": scores, "stopped": run.stopped, "notes": tuple(notes)}
    result = TableModel(model=net, preparation=preparation, plan=chosen_plan, **told)
    screen.scores(result, run.seconds)
    if out is not None:
        report = report_page.page_for(result, read.name, prepared, settings, run.told, codes[split.test], predictions[split.test])
        screen.written(write_folder(out, result, report, force=force))
    if run.error:
        raise run.error
    return result


@dataclass(frozen=True, kw_only=True)
class _Run:
    history: Mapping[str, list[float]]
    seconds: float
    told: list[str]
    stopped: str | None
    error: NonFiniteLossError | None


def _read_training_table(table, target: str, task: str | None) -> tuple[Table, Judgement, list[str]]:
    """The rows that have a target, what it asks for, and what there is to tell about reading them."""
    read = read_table(table)
    check_columns(read.frame, [target])
    _check_enough(read.name, read.frame.height, "")
    series = read.frame.get_column(target)
    judged = judge_target(series, task, read.rows, read.frame)
    notes = note_words(read.notes) + bad_words({target: (read.rows.cells(series, judged.bad), len(judged.bad))} if len(judged.bad) else {})
    without = read.frame.height - len(judged.rows)
    if without:
        notes.append(f"rows without a target, left out: {without:,}")
        _check_enough(read.name, len(judged.rows), " with a target")
    return read.take(judged.rows), judged, notes


def _check_enough(name: str, rows: int, which: str) -> None:
    if rows < _LEAST_ROWS:
        raise DataError(f"{name} has {rows} rows{which}: expected at least {_LEAST_ROWS} to train, validate and test on.")


def _prepare(table: Table, target: str, judged: Judgement, seed: int):
    series = table.frame.get_column(target)
    split = split_rows(series.rank("dense").to_numpy() if judged.task == "classification" else np.zeros(len(series)), seed)
    goal = fit_target(series, judged, split.train)
    return goal, split, fit_preparation(table.frame, goal, split.train, table.rows)


def _network(model, input_size: int, preparation: Preparation, settings: Settings, rows: int):
    if model is None:
        return networks.default_network(input_size, preparation.target, settings, rows)
    return networks.load_network(model, input_size, preparation.target, settings, rows)


def _fit(net, inputs: np.ndarray, labels: np.ndarray, split: Split, settings: Settings, plan: Plan, screen: console.Screen) -> _Run:
    import keras

    record = keras.callbacks.History()  # first, so that an epoch that is shown has been recorded
    best = keras.callbacks.EarlyStopping("val_loss", mode="min", patience=settings.patience, restore_best_weights=True)
    events: list[Event] = []
    stopped = error = None
    started = time.perf_counter()
    try:
        with screen.progress(settings.epochs) as progress, listening(events.append):
            api.fit(
                net,
                inputs[split.train],
                labels[split.train],
                validation_data=(inputs[split.validation], labels[split.validation]),
                batch_size=settings.batch_size,
                epochs=settings.epochs,
                callbacks=keras.callbacks.CallbackList([record, best, *progress], model=net, epochs=settings.epochs),
                verbose=int(screen.verbose),  # prints the price; a CallbackList has no progress bar but ours
                plan=plan,
            )
    except KeyboardInterrupt:
        stopped = "interrupted by Ctrl-C"
    except NonFiniteLossError as caught:
        stopped, error = caught.command_line, caught
    if stopped and best.best_weights is not None:
        net.set_weights(best.best_weights)
    history = {name: [float(value) for value in values] for name, values in record.history.items()}
    told = [event.words for event in events if event.words]
    return _Run(history=history, seconds=time.perf_counter() - started, told=told, stopped=stopped, error=error)
