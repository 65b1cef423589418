"""What `train` and `predict` print."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from parafit.planner.plan import Plan
from parafit.reports.html import number, shorten
from parafit.tables.networks import Settings
from parafit.tables.preprocessing import Preparation
from parafit.tables.split import Split

if TYPE_CHECKING:
    import polars as pl

    from parafit.tables.model_folder import TableModel

_MOST_LINES = 20
_MOST_CLASSES = 12


class Screen:
    """The terminal, or nothing when `verbose` is false."""

    def __init__(self, verbose: bool):
        from rich.console import Console

        self.verbose = verbose
        self._console = Console(quiet=not verbose, highlight=False, soft_wrap=True)

    def table_read(self, name: str, frame: "pl.DataFrame", preparation: Preparation, notes: list[str]) -> None:
        """Say what was read and what becomes of each column.

        Args:
            name: name of the table.
            frame: the table.
            preparation: what was learnt of it.
            notes: what else there is to say, a line each.
        """
        target = preparation.target
        self._print(f"table    {name}: {frame.height:,} rows, {frame.width} columns")
        self._print(f"target   {target.name}: {target.task}, {_target_words(target)}, because {target.reason}")
        other = "regression" if target.task == "classification" else "classification"
        if any(word in target.reason for word in ("whole number", "codes", "identifier")):
            self._print(f"         for {other}: --task {other}")
        kinds: dict[str, list[str]] = {}
        for treatment in preparation.treatments:
            kinds.setdefault(treatment.kind, []).append(treatment.name)
        for kind, names in kinds.items():
            self._print(f"{kind:8} {_some(names)}")
        for name, reason in list(preparation.dropped.items())[:_MOST_LINES]:
            self._print(f"dropped  {name}: {reason}")
        if len(preparation.dropped) > _MOST_LINES:
            self._print(f"dropped  and {len(preparation.dropped) - _MOST_LINES} more columns; see the report")
        for words in [*written_words(preparation), *notes]:
            self.note(words)

    def note(self, words: str) -> None:
        """Something worth knowing."""
        self._print(f"note     {words}")

    def network(self, model: Any, settings: Settings, plan: Plan, split: Split) -> None:
        """Say what will be trained, on which rows and devices.

        Args:
            model: a built Keras model.
            settings: settings of the training.
            plan: the plan it runs under.
            split: the rows.
        """
        widths = " → ".join(str(width) for width in layer_widths(model))
        steps = math.ceil(len(split.train) / settings.batch_size)
        self._print(f"network  {widths}, {model.count_params():,} parameters")
        self._print(
            f"training {len(split.train):,} rows, {len(split.validation):,} to decide when to stop, {len(split.test):,} for the test; "
            f"at most {settings.epochs} epochs of {steps:,} steps of {settings.batch_size} rows"
        )
        self._print(str(plan))

    @contextmanager
    def progress(self, epochs: int) -> Iterator[list]:
        """The callbacks that show progress: a bar on a terminal, about ten lines elsewhere."""
        if not self.verbose:
            yield []
        elif self._console.is_terminal:
            with _bar(self._console, epochs) as advance:
                yield [_after_epoch(lambda epoch, logs: advance(epoch + 1, _epoch_words(epoch, epochs, logs, only=("loss", "val_loss"))))]
        else:
            every = math.ceil(epochs / 10)

            def tell(epoch: int, logs: dict) -> None:
                if epoch == 0 or (epoch + 1) % every == 0:
                    self._print(_epoch_words(epoch, epochs, logs))

            yield [_after_epoch(tell)]

    def scores(self, result: "TableModel", seconds: float) -> None:
        """Say how well it went.

        Args:
            result: the trained model with its scores.
            seconds: time that training took.
        """
        epochs = len(result.history.get("loss", ()))
        if result.stopped:
            self._print(f"stopped  {result.stopped}", style="bold yellow")
        self._print(f"trained  {epochs} epochs in {seconds:.1f} s, compiling included")
        self._grid(*score_rows(result.scores))
        labels = getattr(result.preparation.target, "labels", ())
        if 0 < len(labels) <= _MOST_CLASSES:
            self._print("confusion matrix of the test rows: a row for each true class, a column for each predicted one")
            self._grid(["", *labels], *([label, *row] for label, row in zip(labels, result.scores["test"]["confusion"])))

    def written(self, place) -> None:
        """Say where the model is."""
        self._print(f"written  {place}")

    def _print(self, words: str, **options) -> None:
        self._console.print(words, markup=False, **options)

    def _grid(self, header, *rows) -> None:
        from rich.table import Column, Table
        from rich.text import Text

        grid = Table(*[Column(Text(shorten(name))) for name in header], box=None, pad_edge=False)
        for row in rows:
            grid.add_row(*[Text(shorten(value, 24) if isinstance(value, str) else number(value)) for value in row])
        self._console.print(grid)


def written_words(preparation: Preparation) -> list[str]:
    """A line for each column whose numbers or dates are written in a way of their own."""
    columns = (*preparation.treatments, preparation.target)
    written = ((one.name, one.writing.words()) for one in columns if hasattr(one, "writing"))
    return [f"column {name}: read with {words}" for name, words in written if words]


def score_rows(scores) -> list[list]:
    """The scores of each part as rows of a table, its header first."""
    names = [name for name, value in scores["test"].items() if not isinstance(value, list)]
    return [["", *scores], *([name.replace("_", " "), *(part[name] for part in scores.values())] for name in names)]


def layer_widths(model: Any) -> list[int]:
    """The sizes along the network: its inputs, then the outputs of each layer with weights."""
    return [model.input_shape[-1], *(layer.output.shape[-1] for layer in model.layers if layer.weights)]


def _target_words(target) -> str:
    if target.task == "regression":
        return f"mean {target.mean:.4g}, deviation {target.scale:.4g}"
    return f"{len(target.labels)} classes ({_some(list(target.labels))})"


def _some(names: list[str]) -> str:
    shown = ", ".join(shorten(name, 24) for name in names[:6])
    return f"{shown}, … ({len(names)} in all)" if len(names) > 6 else shown


def _epoch_words(epoch: int, epochs: int, logs: dict, only=None) -> str:
    return f"epoch {epoch + 1}/{epochs}  " + "  ".join(f"{name} {logs[name]:.4f}" for name in only or logs)


@contextmanager
def _bar(console, epochs: int) -> Iterator[Callable[[int, str], None]]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("", total=epochs)
        yield lambda done, words: bar.update(task, completed=done, description=words)


def _after_epoch(show) -> Any:
    import keras

    class AfterEpoch(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            show(epoch, logs or {})

    return AfterEpoch()
