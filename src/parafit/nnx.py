"""Flax NNX modules with a loss and an optimizer: what users import as `parafit.nnx`."""

from parafit.adapters.flax import Trainable, trace_nnx

__all__ = ["Trainable", "trace_nnx"]
