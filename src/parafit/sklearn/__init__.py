"""Scikit-learn's estimators, trained by parafit: what users import as `parafit.sklearn`."""

from parafit.sklearn.estimators import MLPClassifier, MLPRegressor

__all__ = ["MLPClassifier", "MLPRegressor"]
