"""Tables: `train` fits a network to one, `predict` applies it to another. Read `training` first."""

from parafit.tables.model_folder import TableModel
from parafit.tables.prediction import predict, predict_file
from parafit.tables.training import train

__all__ = ["TableModel", "predict", "predict_file", "train"]
