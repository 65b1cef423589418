"""Which rows a network learns from, which decide when to stop, and which it never sees."""

from dataclasses import dataclass

import numpy as np

from parafit.errors import DataError

_TEST_SHARE, _VALIDATION_SHARE = 0.2, 0.15


@dataclass(frozen=True, kw_only=True)
class Split:
    """Which rows (indices) the network learns from, which decide when to stop, and which it never sees."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def split_rows(classes: np.ndarray, seed: int) -> Split:
    """Rows for training, validation and test, each class shared out in the same proportion.

    Args:
        classes: the class of each row, of shape (rows,).
        seed: another seed, another split.

    Raises:
        DataError: every class is too small to be shared out.
    """
    random = np.random.default_rng(seed)
    parts: dict[str, list[np.ndarray]] = {"train": [], "validation": [], "test": []}
    for one in np.unique(classes):
        rows = random.permutation(np.flatnonzero(classes == one))
        tests = round(len(rows) * _TEST_SHARE)
        validations = round((len(rows) - tests) * _VALIDATION_SHARE)
        for part, share in zip(("test", "validation", "train"), np.split(rows, [tests, tests + validations])):
            parts[part].append(share)
    split = {part: np.sort(np.concatenate(shares)) for part, shares in parts.items()}
    if any(not len(rows) for rows in split.values()):
        raise DataError(
            f"{len(classes)} rows in {len(np.unique(classes))} classes are too few to test on: expected at least 5 rows of some class."
        )
    return Split(**split)
