"""The numbers and words that `fit`, `evaluate`, `predict` and `find_plan` are called with, checked before any work. Plain Python."""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any

from parafit.errors import DataError


def check_arguments(**arguments: Any) -> None:
    """Refuse what means nothing.

    Args:
        **arguments: by their names in `fit`, `evaluate` and `predict`.

    Raises:
        DataError: the first that means nothing, and what was expected.

    >>> check_arguments(batch_size=32, epochs=10, verbose="auto", validation_split=0.2)
    >>> check_arguments(batch_size=0)
    Traceback (most recent call last):
    parafit.errors.DataError: batch_size=0: expected a whole number of at least 1, or None for the default.
    """
    for name, value in arguments.items():
        if wanted := _CHECKS[name](value):
            raise DataError(f"{name}={value!r}: expected {wanted}.")
    first, end = arguments.get("initial_epoch", 0), arguments.get("epochs", math.inf)
    if first > end:
        raise DataError(
            f"initial_epoch={first} is past the last epoch: epochs={end} is the number of the epoch to stop before, not how many more to "
            f"train. Pass epochs={first + end} to train {end} more."
        )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint to what was meant, to be added to a message; "" where nothing is close.

    Args:
        word: the word that was written.
        known: the words that could have been meant.

    >>> did_you_mean("h100x9", ["a100x8", "h100x8"])
    " Did you mean 'h100x8'?"
    """
    by_case = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), by_case, n=1)
    return f" Did you mean {by_case[close[0]]!r}?" if close else ""


def _whole(least: int, *, optional: str = "") -> Callable[[Any], str]:
    """A check that gives what was expected, "" where all is well."""

    def check(value: Any) -> str:
        if (_is_whole(value) and value >= least) if value is not None else optional:
            return ""
        return f"a whole number of at least {least}" + (f", or None for {optional}" if optional else "")

    return check


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _share(value: Any) -> str:
    good = _is_number(value) and 0 <= value < 1
    return "" if good else "a share of the rows from 0 up to, but not, 1, such as 0.2"


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _verbose(value: Any) -> str:
    good = value == "auto" if isinstance(value, str) else (_is_whole(value) or isinstance(value, bool)) and 0 <= value <= 2
    return "" if good else "'auto', 0 (silent), 1 (a progress bar) or 2 (a line an epoch)"


def _frequency(value: Any) -> str:
    epochs = value if isinstance(value, list) else [value]
    good = all(isinstance(epoch, int) and not isinstance(epoch, bool) and epoch >= 1 for epoch in epochs)
    return "" if good else "a whole number of epochs of at least 1, or a list of the epochs after which to validate, counted from 1"


def _shuffle(value: Any) -> str:
    return "True or False" if isinstance(value, str) and value != "batch" else ""


def _class_weight(value: Any) -> str:
    good = isinstance(value, Mapping) and all(_is_number(key) and key % 1 == 0 for key in value)
    return "" if value is None or good else "a dict from class numbers to weights, such as {0: 1.0, 1: 5.0}"


_CHECKS: dict[str, Callable[[Any], str]] = {
    "batch_size": _whole(1, optional="the default"),
    "validation_batch_size": _whole(1, optional="batch_size"),
    "epochs": _whole(0),
    "initial_epoch": _whole(0),
    "steps_per_epoch": _whole(1, optional="all of the data"),
    "validation_steps": _whole(1, optional="all of the data"),
    "steps": _whole(1, optional="all of the data"),
    "validation_split": _share,
    "validation_freq": _frequency,
    "verbose": _verbose,
    "shuffle": _shuffle,
    "class_weight": _class_weight,
}
