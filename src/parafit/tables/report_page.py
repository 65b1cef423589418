"""The HTML report of a training run."""

from typing import TYPE_CHECKING

import numpy as np

from parafit.reports import html, plots
from parafit.reports.html import Section
from parafit.tables.console import layer_widths, score_rows
from parafit.tables.networks import Settings
from parafit.tables.preprocessing import Inputs
from parafit.tables.target import Classes

if TYPE_CHECKING:
    from parafit.tables.model_folder import TableModel

_COLUMN_WORDS = (
    "Missing: training rows without a value. Unseen: rows whose category is not among the training rows; it counts as missing. "
    "Means, medians and categories come from the training rows only."
)


def page_for(
    result: "TableModel", name: str, inputs: Inputs, settings: Settings, told: list[str], codes: np.ndarray, predictions: np.ndarray
) -> str:
    """The report as one HTML text.

    Args:
        result: what training gave.
        name: the table's name.
        inputs: the table as the network saw it.
        settings: how the network was trained.
        told: what the run said: its price, the score of that, notices.
        codes: the truth of the test rows, encoded.
        predictions: what the network says of them: probabilities, or standardised quantities.
    """
    target = result.preparation.target
    lead = f"{target.task} of {target.name} from {name} ({len(inputs.values):,} rows), because {target.reason}{_target_read(target)}"
    sections = [
        Section(heading="Scores", pieces=_scores(result)),
        Section(heading="Predictions of the test rows", pieces=_test_pieces(result, codes, predictions)),
        Section(heading="Training", pieces=_curves(result)),
        Section(heading="Columns", pieces=[*_columns(result, inputs), *map(html.text, result.notes)]),
        Section(heading="Network and plan", pieces=[*_network(result, settings), *map(html.text, told)]),
    ]
    return html.page(f"{target.name} in {name}", lead, sections)


def _target_read(target) -> str:
    words = target.writing.words() if target.task == "regression" else ""
    return f"; read with {words}" if words else ""


def _scores(result: "TableModel") -> list[str]:
    header, *rows = score_rows(result.scores)
    pieces = [html.warning(f"Training stopped early: {result.stopped}.")] if result.stopped else []
    return [*pieces, html.table(header, rows)]


def _test_pieces(result: "TableModel", codes: np.ndarray, predictions: np.ndarray) -> list[str]:
    target, test = result.preparation.target, result.scores["test"]
    if isinstance(target, Classes):
        each = [[one["class"], one["precision"], one["recall"], one["f1"], one["rows"]] for one in test["classes"]]
        return [plots.confusion_plot(target.labels, test["confusion"]), html.table(["class", "precision", "recall", "f1", "rows"], each)]
    truth, predicted = (part[:, 0] * target.scale + target.mean for part in (codes, predictions))
    return [plots.scatter_plot(truth, predicted, target.name)]


def _curves(result: "TableModel") -> list[str]:
    history = result.history
    names = sorted((name for name in history if f"val_{name}" in history), key=lambda name: name != "loss")
    if not names:
        return [html.text("No epoch was finished.")]
    kept = int(np.argmin(history["val_loss"])) + 1
    return [
        plots.line_plot(name.replace("_", " "), {"train": history[name], "validation": history[f"val_{name}"]}, "epoch", kept)
        for name in names
    ] + [html.text(f"The weights kept are those of epoch {kept}, where the validation loss is lowest.{_units(result)}")]


def _units(result: "TableModel") -> str:
    target = result.preparation.target
    if isinstance(target, Classes):
        return " This is the loss that was trained on; the loss under Scores is the plain cross-entropy."
    return f" The curves are in units of the target's deviation, {html.number(target.scale)}."


def _columns(result: "TableModel", inputs: Inputs) -> list[str]:
    used = [
        [one.name, one.kind, len(one.inputs), one.missing, inputs.unseen[one.name], one.describe()] for one in result.preparation.treatments
    ]
    dropped = [[name, "dropped", 0, None, None, reason] for name, reason in result.preparation.dropped.items()]
    return [html.table(["column", "kind", "inputs", "missing", "unseen", "treatment"], [*used, *dropped]), html.text(_COLUMN_WORDS)]


def _network(result: "TableModel", settings: Settings) -> list[str]:
    layers = [[layer.name, type(layer).__name__, str(layer.output.shape), layer.count_params()] for layer in result.model.layers]
    widths = " → ".join(map(str, layer_widths(result.model)))
    words = (
        f"{widths}; {result.model.count_params():,} parameters; batches of {settings.batch_size} rows, at most {settings.epochs} epochs."
    )
    return [html.text(words), html.table(["layer", "kind", "output", "parameters"], layers), html.code(str(result.plan))]
