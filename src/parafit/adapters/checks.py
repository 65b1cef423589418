"""What a model is given, held against what it can take, before anything is compiled: inputs, targets, labels and weights.

Arrays are looked at once, all rows together; batches of a generator as they are drawn. Losses of the user's own are left alone. Here are
Keras models; Flax modules are tried in `flax_checks`.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import jax
import numpy as np

from parafit.adapters.keras import KerasModel
from parafit.adapters.targets import SPARSE, Pair, Shape, same_shape, shape_words
from parafit.errors import DataError, ModelError
from parafit.support import compat


def build(adapter: Any, source: Any, verb: str) -> None:
    """Build a model for what it is to do, once its data is known to fit it.

    Args and errors are those of `check`.
    """
    early = check(adapter, source, verb)
    make = adapter.build_layers if verb == "predict" else adapter.build
    try:
        make(partial(source.example, in_epoch=verb == "predict"))
    except (ValueError, TypeError, KeyError, RuntimeError):
        if not early:
            check(adapter, source, verb)  # says it better, where it knows
        raise
    if not early:
        check(adapter, source, verb)


def check(adapter: Any, source: Any, verb: str, name: str = "") -> bool:
    """Refuse data that a model cannot take; batches that the source draws later are looked at then.

    Args:
        adapter: a `parafit.adapters.step.Adapter`.
        source: a `parafit.data.source.Source`.
        verb: "fit", "evaluate" or "predict".
        name: what the data is called in messages, where it is not x and y.

    Returns:
        Whether all was looked at that the source holds: not before there is a batch, and the model tells what it gives.

    Raises:
        DataError: the data does not fit the model or its losses.
        ModelError: the model has no loss.
    """
    if not isinstance(adapter, KerasModel):
        return adapter.check(source, verb)
    look = _Check(adapter.model, verb, name, source.known_rows)
    source.inspect(look)
    return source.known is not None and look.knows(source.known)


def check_split(x: Any, validation_split: float) -> None:
    """Refuse to hold out a share of what has no rows to count, or of too few.

    Args:
        x: as in `fit`.
        validation_split: the share of the rows to validate on, above 0.
    """
    leaf = jax.tree.leaves(x, is_leaf=lambda part: not isinstance(part, (list, tuple, dict)))[0]
    if not hasattr(leaf, "shape") or not hasattr(leaf, "__getitem__"):
        raise DataError(
            f"validation_split={validation_split} needs arrays, and x is a {type(leaf).__name__}. Pass validation_data= instead."
        )
    training, rows = math.floor(leaf.shape[0] * (1 - validation_split)), leaf.shape[0]
    if training in (0, rows):
        raise DataError(
            f"validation_split={validation_split} of {rows} rows leaves {training} to train on and {rows - training} to validate on: "
            "expected at least one of each. Pass more rows or another share."
        )


class _Check:
    """Refuses batches, or all rows as one, that a model cannot take.

    Args:
        model: a `keras.Model`.
        verb, name: as in `check`.
        rows: of a batch, None where batches may differ.
    """

    def __init__(self, model: Any, verb: str, name: str, rows: int | None):
        self._model, self._verb, self._name, self._rows = model, verb, name, rows
        self._known: dict[Any, list[_Tokens | Pair]] = {}
        self._complete = True

    def __call__(self, data: Any) -> Any:
        """A batch as it came, if it is well."""
        self.knows(data)
        return data

    def knows(self, data: Any) -> bool:
        """Look at a batch, or at all rows as one; gives whether the model told all that it takes to look."""
        leaves, structure = jax.tree.flatten(data)
        key = structure, tuple(np.shape(leaf)[1:] for leaf in leaves)
        if key not in self._known:
            self._known[key] = self._shapes(data)
        for values in self._known[key]:
            values.check(leaves)
        return self._complete

    def _shapes(self, data: Any) -> "list[_Tokens | Pair]":
        """The values to look at in data of these shapes, once the shapes are well."""
        model, parts = self._model, compat.unpack(data)
        numbers = iter(range(len(jax.tree.leaves(parts))))
        x, y, weights = jax.tree.map(lambda leaf: _Leaf(next(numbers), np.shape(leaf)), parts)
        inputs, outputs = compat.symbolic_ends(model)
        matched = [] if inputs is None else _matched_inputs(model, inputs, x)
        for tensor, leaf in matched:
            _check_input(model, tensor, leaf.shape, several=len(matched) > 1)
        tokens: list[_Tokens | Pair] = [
            _Tokens(layer.name, layer.input_dim, leaf.number)
            for layer, read in (compat.embeddings(model) if matched else ())
            for tensor, leaf in matched
            if tensor is read
        ]
        if self._verb == "predict" or compat.computes_loss_itself(model):
            return tokens
        self._check_loss(y)
        if not compat.has_loss(model):
            return tokens
        if outputs is None:
            self._complete = compat.is_built(model)
            outputs = _traced_outputs(model, parts[0], self._rows) if self._complete else None
        return tokens if outputs is None else [*tokens, *self._pairs(y, outputs, weights, matched)]

    def _check_loss(self, y: Any) -> None:
        name, has_loss = self._model.name, compat.has_loss(self._model)
        if self._verb == "fit" and compat.learns_nothing(self._model):
            raise ModelError(
                f"model {name!r} was compiled without a loss, so fit has nothing to learn from. Call model.compile(optimizer, loss), "
                "such as model.compile('adam', 'mse')."
            )
        if has_loss and y is None and self._name:
            raise DataError(f"{self._name} has no targets, and the loss of {name!r} needs them: pass (x, y).")
        if has_loss and y is None:
            raise DataError(
                f"y is missing: the loss of {name!r} compares outputs with targets. Pass {self._verb}(model, x, y), or data that yields "
                "(x, y)."
            )

    def _pairs(self, y: Any, outputs: Any, weights: Any, matched: list) -> "list[Pair]":
        try:
            paired = compat.pair_losses(self._model, y, outputs, weights)
        except Exception:  # Keras says what does not match
            return []
        pairs = []
        for name, loss, target, output, weight in paired:
            function, options = compat.loss_function(loss)
            if not function or not isinstance(target, _Leaf) or not hasattr(output, "shape"):
                continue
            pair = Pair(
                where=(self._name or "y") + (f" for output {name!r}" if len(paired) > 1 else ""),
                model=self._model.name,
                function=function,
                output=tuple(output.shape),
                target=target.shape,
                axis=options.get("axis", -1) if function in SPARSE else -1,
                ignored=options.get("ignore_class"),
                leaf=target.number,
                weights=weight.number if isinstance(weight, _Leaf) else None,
                mask=compat.mask_of([tensor for tensor, _ in matched], output) if matched else None,
                inputs=[leaf.number for _, leaf in matched],
                uncertain=not matched and compat.masks(self._model) and len(target.shape) > 1,
            )
            pair.check_shape()
            if isinstance(weight, _Leaf):
                pair.check_weights(weight.shape)
            pairs.append(pair)
        return pairs


@dataclass(frozen=True)
class _Leaf:
    """Stands for an array: its place among the leaves of a batch, and its shape."""

    number: int
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class _Tokens:
    """An array that an embedding looks up."""

    layer: str
    rows: int
    leaf: int

    def check(self, leaves: list) -> None:
        """Refuse tokens that the embedding has no row for."""
        tokens = np.asarray(leaves[self.leaf])
        if tokens.size and not (tokens.min() >= 0 and tokens.max() < self.rows):
            raise DataError(
                f"x holds tokens from {tokens.min()} to {tokens.max()}, but layer {self.layer!r} has a row for each of 0 to "
                f"{self.rows - 1}. Build it as Embedding({int(tokens.max()) + 1}, ...), or number the tokens from 0."
            )


def _check_input(model: Any, tensor: Any, shape: Shape, *, several: bool) -> None:
    if not _takes(tensor.shape, shape):
        which = f" as input {tensor.name!r}" if several else ""
        alone = " For one row pass x[None]." if same_shape((1, *shape), tensor.shape) else ""
        raise DataError(
            f"model {model.name!r} takes arrays of shape {shape_words(tensor.shape)}{which}, but x has shape {shape_words(shape)}.{alone} "
            f"Reshape x, or build the model for it: keras.Input({shape[1:]})."
        )


def _matched_inputs(model: Any, inputs: Any, x: Any) -> list[tuple[Any, _Leaf]]:
    """Each input of a functional model with what it gets; none where they are nested, or may be left out."""
    tensors = inputs if isinstance(inputs, dict) else {tensor.name: tensor for tensor in jax.tree.leaves(inputs)}
    leaves = x if isinstance(x, (dict, list, tuple)) else [x]
    if not all(hasattr(leaf, "shape") for part in (tensors, leaves) for leaf in (part.values() if isinstance(part, dict) else part)):
        return []
    if isinstance(leaves, dict):
        if missing := [name for name in tensors if name not in leaves]:
            raise DataError(
                f"x has no {missing[0]!r}: model {model.name!r} takes {', '.join(map(repr, tensors))}, and x holds "
                f"{', '.join(map(repr, leaves))}. Name the arrays as the model names its inputs."
            )
        return [(tensor, leaves[name]) for name, tensor in tensors.items()]
    if len(leaves) != len(tensors):
        wanted = ", ".join(f"{name} of shape {shape_words(tensor.shape)}" for name, tensor in tensors.items())
        held = "one array" if len(leaves) == 1 else f"{len(leaves)} arrays"
        raise DataError(f"x holds {held}, but model {model.name!r} takes {len(tensors)}: {wanted}. Pass a list or dict of as many.")
    return list(zip(tensors.values(), leaves)) if isinstance(inputs, (list, tuple)) or len(tensors) == 1 else []


_OUTPUTS: WeakKeyDictionary[Any, dict] = WeakKeyDictionary()
"""By model, and shapes of what it takes: its variables, by which it is known to be as it was, and its outputs."""


def _traced_outputs(model: Any, x: Any, rows: int | None) -> Any:
    """The outputs of a model that only tells when it is called, which it is once; None where it cannot be called so."""
    leaves, structure = jax.tree.flatten(x)
    key = structure, rows, tuple((np.shape(leaf), leaf.dtype) for leaf in leaves)
    variables, outputs = _OUTPUTS.setdefault(model, {}).get(key, ((), None))
    if not variables or len(variables) != len(model.variables) or any(one is not other for one, other in zip(variables, model.variables)):
        outputs = _trace_outputs(model, x, rows)
        _OUTPUTS[model][key] = list(model.variables), outputs
    return outputs


def _trace_outputs(model: Any, x: Any, rows: int | None) -> Any:
    specs = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((rows or len(leaf), *leaf.shape[1:]), jax.dtypes.canonicalize_dtype(leaf.dtype)), x
    )
    state = [[compat.read_variable(each) for each in group] for group in (model.trainable_variables, model.non_trainable_variables)]
    try:
        outputs = jax.eval_shape(lambda x: model.stateless_call(*state, x)[0], specs)
    except ValueError as error:
        shapes = ", ".join(shape_words(leaf.shape) for leaf in jax.tree.leaves(specs))
        raise DataError(f"model {model.name!r} cannot take x of shape {shapes}: {str(error).strip()}") from error
    except Exception:  # whatever the user's code raises: it will again, in its own words
        return None
    return jax.tree.map(lambda leaf: _Leaf(-1, _of_any_length(leaf.shape, known=rows is not None)), outputs)


def _takes(wanted: Shape, given: Shape) -> bool:
    """Whether a functional model takes an array of a shape; it drops or adds a last axis of 1."""
    column = wanted[-1:] == (1,) and same_shape((*given, 1), wanted)
    return same_shape(given, wanted) or column or (given[-1:] == (1,) and same_shape(given[:-1], wanted))


def _of_any_length(shape: Shape, *, known: bool) -> Shape:
    """A shape of any number of rows; where lengths are only those of one batch, of any length too."""
    inner = shape[1:] if known else (*(None for _ in shape[1:-1]), *shape[1:][-1:])
    return (None, *inner) if shape else ()
