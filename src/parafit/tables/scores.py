"""How good predictions are: numbers for `scores.json` and the report."""

import numpy as np

from parafit.tables.target import Classes, Target


def score(target: Target, codes: np.ndarray, predictions: np.ndarray) -> dict:
    """The scores of some rows, as plain values.

    Args:
        target: what is predicted.
        codes: the truth as `target.encode` gives it.
        predictions: probabilities of shape (rows, classes), or standardised quantities of shape (rows, 1).

    Returns:
        For classes: loss (cross-entropy), accuracy, precision, recall and f1 (means over the classes), the same for each
        class, and the confusion matrix (a row for each true class). For quantities, in the target's units: loss (mean
        squared error), mean_absolute_error, root_mean_squared_error and r2.
    """
    if isinstance(target, Classes):
        return _score_classes(target, codes, predictions)
    return _score_quantity(target.scale * codes[:, 0].astype(float), target.scale * predictions[:, 0].astype(float))


def _score_classes(target: Classes, codes: np.ndarray, probabilities: np.ndarray) -> dict:
    from sklearn import metrics

    chosen = probabilities.argmax(axis=1)
    places = np.arange(len(target.labels))
    precision, recall, f1, rows = metrics.precision_recall_fscore_support(codes, chosen, labels=places, zero_division=0.0)  # type: ignore[arg-type]
    present = rows > 0  # type: ignore[operator]
    classes = [
        {"class": label, "precision": float(p), "recall": float(r), "f1": float(f), "rows": int(n)}
        for label, p, r, f, n in zip(target.labels, precision, recall, f1, rows)  # type: ignore[arg-type]
    ]
    return {
        "rows": len(codes),
        "loss": float(-np.log(np.maximum(probabilities[np.arange(len(codes)), codes], 1e-15)).mean()),
        "accuracy": float((chosen == codes).mean()),
        "precision": float(precision[present].mean()),  # type: ignore[index]
        "recall": float(recall[present].mean()),  # type: ignore[index]
        "f1": float(f1[present].mean()),  # type: ignore[index]
        "classes": classes,
        "confusion": metrics.confusion_matrix(codes, chosen, labels=places).tolist(),
    }


def _score_quantity(truth: np.ndarray, predicted: np.ndarray) -> dict:
    error = predicted - truth
    spread = ((truth - truth.mean()) ** 2).mean()
    squared = float((error**2).mean())
    return {
        "rows": len(truth),
        "loss": squared,
        "mean_absolute_error": float(np.abs(error).mean()),
        "root_mean_squared_error": squared**0.5,
        "r2": float(1 - squared / spread) if spread > 0 else None,
    }
