"""Two rows of zeros in the form that a Keras model reads and its losses want, made of what the model says of itself."""

from typing import Any

import jax
import numpy as np

from parafit.errors import ModelError

_FIXED = "build it with an input of fixed shape, such as keras.Input((784,))"


def example_rows(model: Any, shape: tuple[int, ...] | None) -> tuple[Any, Any]:
    """Two rows of zeros, as inputs and targets.

    Args:
        model: a compiled `keras.Model`.
        shape: of one row of x, None where the model says it.

    Raises:
        ModelError: neither it nor the model says what a row looks like.
    """
    if not hasattr(model, "compute_output_shape"):
        raise ModelError(f"model {model.name!r} does not say what its data looks like: pass x and y themselves.")
    if shape is not None:
        if not model.built:
            model.build((None, *shape))
        x = np.zeros((2, *shape), "float32")
    elif getattr(model, "inputs", None):
        inputs = _input_structure(model)
        _check_known(model, inputs)
        x = jax.tree.map(lambda spec: np.zeros((2, *spec.shape[1:]), spec.dtype), inputs)
    else:
        raise ModelError.advising(
            f"model {model.name!r} does not say what it reads:",
            python="pass the shape of one row of x such as (784,), or x and y themselves.",
            command=f"{_FIXED}.",
        )
    outputs = model.compute_output_shape(jax.tree.map(np.shape, x, is_leaf=lambda part: isinstance(part, np.ndarray)))
    return x, _targets(outputs, model.loss)


def _input_structure(model: Any) -> Any:
    structure = getattr(model, "_inputs_struct", model.inputs)
    return structure if isinstance(structure, dict) else model.inputs if len(model.inputs) > 1 else model.inputs[0]


def _check_known(model: Any, inputs: Any) -> None:
    for spec in inputs.values() if isinstance(inputs, dict) else inputs if isinstance(inputs, list) else [inputs]:
        if None in spec.shape[1:]:
            raise ModelError.advising(
                f"model {model.name!r} reads rows of any length {tuple(spec.shape)}:",
                python="pass the shape of one row of x, or x and y themselves.",
                command=f"{_FIXED}.",
            )


def _targets(outputs: Any, loss: Any) -> Any:
    """Zeros in the form that a loss wants for outputs of these shapes."""
    if isinstance(outputs, dict):
        return {name: _targets(shape, loss[name] if isinstance(loss, dict) else loss) for name, shape in outputs.items()}
    if isinstance(outputs, list):
        losses = loss if isinstance(loss, (list, tuple)) else [loss] * len(outputs)
        return [_targets(shape, each) for shape, each in zip(outputs, losses)]
    sparse = "sparse" in (loss if isinstance(loss, str) else getattr(loss, "name", getattr(loss, "__name__", "")))
    return np.zeros((2, *outputs[1:-1]), "int32") if sparse else np.zeros((2, *outputs[1:]), "float32")
