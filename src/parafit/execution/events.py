"""What a run tells, as typed records, and who listens: the console, Python's `logging`, a file of JSON lines, a page.

Nothing in parafit prints but `Console`. Of many processes only the first speaks to people; each writes its own JSON lines.
"""

import datetime
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from parafit.errors import OutputError

_LOGGER = logging.getLogger("parafit.run")
_LOGGER.addHandler(logging.NullHandler())  # the console speaks; unless the user asks for it, nothing is told twice


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that a run tells.

    Attributes:
        kind: the event's name in JSON lines.
        level: of `logging`.
    """

    kind: ClassVar[str] = ""
    level: ClassVar[int] = logging.INFO

    @property
    def words(self) -> str:
        """What people are told, "" where they see it elsewhere: progress bars show groups and epochs."""
        return ""


@dataclass(frozen=True, kw_only=True)
class Planned(Event):
    """The plan that runs.

    Attributes:
        plan: as text.
        ranking: what else was considered, "" where the plan was given.
    """

    kind = "planned"
    plan: str
    ranking: str = ""

    @property
    def words(self) -> str:
        return self.ranking


@dataclass(frozen=True, kw_only=True)
class Notice(Event):
    """Something worth knowing of a run, in `text`."""

    kind = "notice"
    text: str

    @property
    def words(self) -> str:
        return f"parafit: {self.text}"


@dataclass(frozen=True, kw_only=True)
class Breach(Notice):
    """Something that the compiled program does and the plan does not say, in `text`."""

    kind = "breach"
    level = logging.WARNING

    @property
    def words(self) -> str:
        return f"parafit: not in the plan: {self.text}"


@dataclass(frozen=True, kw_only=True)
class Compiling(Event):
    """A program of up to `steps` steps is waited for."""

    kind = "compiling"
    steps: int


@dataclass(frozen=True, kw_only=True)
class Compiled(Event):
    """The program of up to `steps` steps is there; tracing it and waiting for it took `seconds`."""

    kind = "compiled"
    steps: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Priced(Event):
    """What a step will take.

    Attributes:
        seconds_per_step, peak_bytes: as predicted.
        announcement: the same in words.
    """

    kind = "priced"
    seconds_per_step: float
    peak_bytes: float
    announcement: str

    @property
    def words(self) -> str:
        return self.announcement


@dataclass(frozen=True, kw_only=True)
class GroupEnded(Event):
    """Steps `first` to `last` of an epoch ran between two callbacks and took `seconds`."""

    kind = "group"
    first: int
    last: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class EpochEnded(Event):
    """Epoch number `epoch`, from 0, ended with these `logs`."""

    kind = "epoch"
    epoch: int
    logs: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Scored(Event):
    """What a step took.

    Attributes:
        predicted_seconds, measured_seconds: of a step.
        verdict: both in words.
    """

    kind = "score"
    predicted_seconds: float
    measured_seconds: float
    verdict: str

    @property
    def words(self) -> str:
        return self.verdict


@dataclass(frozen=True, kw_only=True)
class Ended(Event):
    """The run ended after so many `steps` of `seconds` in all; `error` is "" where it ended well."""

    kind = "ended"
    steps: int
    seconds: float
    error: str = ""


Listener = Callable[[Event], None]


def log(event: Event) -> None:
    """A listener: Python's `logging`, under "parafit.run". It always listens."""
    if _LOGGER.isEnabledFor(event.level) and jax.process_index() == 0:
        _LOGGER.log(event.level, "%s", event.words or _told(event))


_listeners: list[Listener] = [log]


def emit(event: Event) -> None:
    """Tell all who listen."""
    for listener in _listeners:
        listener(event)


@contextmanager
def listening(*listeners: Listener) -> Iterator[None]:
    """While it lasts, these listen too.

    Args:
        listeners: functions of an `Event`.

    >>> heard = []
    >>> with listening(heard.append):
    ...     emit(Notice(text="it rains"))
    >>> heard[0].words
    'parafit: it rains'
    """
    _listeners.extend(listeners)
    try:
        yield
    finally:
        for listener in listeners:
            _listeners.remove(listener)


class Console:
    """A listener: what people should know, printed by the first process.

    >>> Console()(Notice(text="it rains"))
    parafit: it rains
    """

    def __call__(self, event: Event) -> None:
        if event.words:
            self.say(event.words)

    def say(self, words: str) -> None:
        """Print a line or more."""
        if jax.process_index() == 0:
            print(words)


class JsonLines:
    """A listener: one line of JSON an event, added to a file as they come.

    Args:
        path: of the file; it is made, or lines are added to what it holds.

    Raises:
        OutputError: it cannot be written.
    """

    def __init__(self, path: str | Path):
        try:
            self._file = Path(path).open("a", encoding="utf-8")  # noqa: SIM115  (open for as long as the run lasts)
        except OSError as error:
            raise OutputError(
                f"log={str(path)!r} cannot be written: {error.strerror}. Pass the path of a file in a folder that is there."
            ) from error

    def __call__(self, event: Event) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        self._file.write(json.dumps({"event": event.kind, "time": now, **_fields(event)}, default=_plain) + "\n")
        self._file.flush()

    def close(self) -> None:
        """No more lines."""
        self._file.close()


def _fields(event: Event) -> dict[str, Any]:
    return {field.name: getattr(event, field.name) for field in fields(event)}


def _told(event: Event) -> str:
    return f"{event.kind} " + ", ".join(f"{name}={value}" for name, value in _fields(event).items())


def _plain(value: Any) -> Any:
    """Arrays and NumPy's numbers as JSON has them."""
    return np.asarray(value).tolist()
