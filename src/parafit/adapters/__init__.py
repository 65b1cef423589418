"""Which adapter runs a model."""

from typing import Any

from parafit.adapters.keras import KerasModel
from parafit.adapters.step import Adapter


def adapter_of(model: Any, verb: str) -> Adapter:
    """The adapter of a Keras model, of a `parafit.nnx.Trainable`, or of a bare Flax NNX module, which can predict.

    Args:
        model: the model.
        verb: "fit", "evaluate" or "predict": what it is to be used for.

    Raises:
        BackendError: Keras runs on another backend than JAX.
        ModelError: not a model, or one that lacks what the verb needs.
    """
    if any(base.__module__ == "parafit.adapters.flax" or base.__module__.startswith("flax.nnx") for base in type(model).__mro__):
        from parafit.adapters.flax import FlaxModel  # Flax is optional: imported once a model of it is there

        return FlaxModel(model, verb)
    return KerasModel(model, verb)
