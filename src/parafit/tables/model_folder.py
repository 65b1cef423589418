"""The folder that training leaves and prediction reads. It is there as a whole or not at all."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parafit.errors import DataError, OutputError
from parafit.planner.plan import Plan
from parafit.tables.networks import load_keras_file
from parafit.tables.preprocessing import Preparation

FILES = ("model.keras", "preprocessing.json", "plan.json", "history.json", "scores.json", "report.html", "manifest.json")

_READ = FILES[:5]
_FORMAT = 1
_MEND = "Copy the whole folder again, or train again."


@dataclass(frozen=True, kw_only=True)
class TableModel:
    """A network fitted to a table, and all that is needed to use it on another.

    Args:
        model: the Keras model.
        preparation: how a table becomes its inputs, and its outputs predictions.
        plan: what training ran on.
        history: loss and metrics of each epoch, as Keras names them.
        scores: of the rows "train", "validation" and "test".
        stopped: why training ended before its time; None if it did not.
        notes: what reading the table had to do: rows left out, cells that could not be read, encodings.
    """

    model: Any
    preparation: Preparation
    plan: Plan
    history: Mapping[str, list[float]] = field(hash=False)
    scores: Mapping[str, Any] = field(hash=False)
    stopped: str | None = None
    notes: tuple[str, ...] = ()


def check_folder(folder: "str | Path", *, force: bool = False) -> None:
    """Find out, before any work, whether `write_folder` will be able to write here.

    Args:
        folder: place of the model.
        force: whether it may replace a model.

    Raises:
        OutputError: a model or something else is in the way, or the place cannot be written.
    """
    folder = Path(folder)
    if folder.exists():
        _check_replaceable(folder)
    if not force and _holds_model(folder):
        raise OutputError(f"{str(folder)!r} holds a model already: choose another folder, or replace it with --force (force=True).")
    with _beside(folder):
        pass


def write_folder(folder: "str | Path", result: TableModel, report_html: str, *, force: bool = False) -> Path:
    """Write the files of `FILES` into a temporary folder beside `folder`, then give it that name.

    Without `force`, a model that came there during training stays, and the folder gets the next free name.

    Args:
        folder: place of the model.
        result: the model with all that was learnt and measured.
        report_html: the report, as text.
        force: whether it may replace a model.

    Returns:
        The folder that was written.

    Raises:
        OutputError: the place cannot be written.
    """
    folder = Path(folder) if force else _free_name(Path(folder))
    with _beside(folder) as temporary:
        result.model.save(temporary / "model.keras")
        texts = {
            "preprocessing.json": result.preparation.to_json(),
            "plan.json": result.plan.to_json(),
            "history.json": json.dumps(
                {"stopped": result.stopped, "notes": result.notes, "epochs": result.history}, indent=2, ensure_ascii=False
            ),
            "scores.json": json.dumps(result.scores, indent=2, ensure_ascii=False),
            "report.html": report_html,
        }
        for name, content in texts.items():
            (temporary / name).write_text(content, encoding="utf-8")
        manifest = {"format": _FORMAT, "sha256": {name: _fingerprint(temporary / name) for name in _READ}}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        _swap(temporary, folder)
    return folder


def read_folder(folder: "str | Path") -> TableModel:
    """What `write_folder` wrote.

    Raises:
        DataError: not such a folder, or one whose files are damaged, or of more than one run.
    """
    folder = Path(folder)
    absent = [name for name in (*_READ, "manifest.json") if not (folder / name).is_file()]
    if absent:
        what = "there is no folder" if not folder.is_dir() else f"there is no {absent[0]} in"
        raise DataError(f"{what} {str(folder)!r}: expected a folder that `parafit train` wrote.")
    model = load_keras_file(folder / "model.keras")
    _check_whole(folder)
    texts = {name: (folder / name).read_text(encoding="utf-8") for name in _READ[1:]}
    history = json.loads(texts["history.json"])
    return TableModel(
        model=model,
        preparation=Preparation.from_json(texts["preprocessing.json"]),
        plan=Plan.from_json(texts["plan.json"]),
        history=history["epochs"],
        scores=json.loads(texts["scores.json"]),
        stopped=history["stopped"],
        notes=tuple(history["notes"]),
    )


def _check_whole(folder: Path) -> None:
    """Refuse a folder whose files are not those that were written together."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        written = {name: manifest["sha256"][name] for name in _READ} if manifest["format"] == _FORMAT else {}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{str(folder / 'manifest.json')!r} is damaged. {_MEND}") from error
    if not written:
        raise DataError(f"folder {str(folder)!r} is of format {manifest['format']!r}, and this parafit reads {_FORMAT}. {_MEND}")
    if changed := [name for name in _READ if _fingerprint(folder / name) != written[name]]:
        raise DataError(
            f"in {str(folder)!r}, {' and '.join(changed)} {'is' if len(changed) == 1 else 'are'} not what training wrote there: damaged, "
            f"changed, or from another run, so that predictions would be wrong. {_MEND}"
        )


def _fingerprint(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _holds_model(folder: Path) -> bool:
    return folder.is_dir() and any((folder / name).exists() for name in FILES)


def _free_name(folder: Path) -> Path:
    names = (folder, *(folder.with_name(f"{folder.name}-{number}") for number in range(2, 1000)))
    return next(name for name in names if not _holds_model(name))


def _check_replaceable(folder: Path) -> None:
    if not folder.is_dir():
        raise OutputError(f"{str(folder)!r} is a file: expected the name of a folder to write to.")
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in FILES)
    if foreign:
        raise OutputError(
            f"folder {str(folder)!r} holds {foreign[0]!r}, which parafit did not write; it would be lost. "
            "Choose another folder, or move it away."
        )


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A temporary folder next to `folder`, gone at the end unless it was renamed."""
    try:
        temporary = folder.absolute().with_name(f".{folder.name}-{uuid.uuid4().hex}")
        temporary.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"cannot write to {str(folder)!r}: {error.strerror} ({error.filename}). Choose another folder.") from error
    try:
        yield temporary
    except OSError as error:
        raise OutputError(f"cannot write {str(folder)!r}: {error}. Nothing was replaced.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(temporary: Path, folder: Path) -> None:
    if not folder.exists():
        os.rename(temporary, folder)
        return
    _check_replaceable(folder)
    with _beside(folder) as graveyard:
        os.rename(folder, graveyard / "old")
        try:
            os.rename(temporary, folder)
        except OSError:
            os.rename(graveyard / "old", folder)
            raise
