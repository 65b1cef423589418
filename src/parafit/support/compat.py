"""What JAX and Keras do not document, in one place. Each piece: why it is needed, and the versions it was read in.

Keras 3.15, JAX 0.10.

Args:
    model: a Keras model.
    weights, state: arrays in the groups and order of `parafit.adapters.step.State`.
    batch: `(x, y, sample_weight)`, as Keras packs it.
"""

import itertools
import json
import random
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import keras
import numpy as np
from keras.src.backend.common import global_state
from keras.src.losses.losses import LossFunctionWrapper
from keras.src.random.seed_generator import GLOBAL_SEED_GENERATOR
from keras.src.trainers.compile_utils import CompileLoss
from keras.src.trainers.data_adapters import data_adapter_utils
from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter
from keras.src.trainers.epoch_iterator import EpochIterator
from keras.src.utils.python_utils import pythonify_logs
from keras.src.utils.rng_utils import GLOBAL_RANDOM_SEED

_TRAINER = next(base for base in keras.Model.__mro__ if "train_step" in vars(base))

# Documented; here so that few files import Keras.
floatx = keras.config.floatx
unpack = keras.utils.unpack_x_y_sample_weight


def symbolic_build(model, batch) -> None:
    """Create metric, loss and optimizer variables without running anything, as `model.fit` does.

    Keras 3.15: private, and the same in 3.10-3.14; the public `build` and `compile` leave metric variables to the first call.
    """
    model._symbolic_build(data_batch=jax.tree.map(_as_computed, batch))


def _as_computed(array: Any) -> Any:
    """An array in the dtype that JAX computes in: Keras 3.15 asks for the array's own, and JAX 0.12 warns where that has 64 bits."""
    known = isinstance(array, np.ndarray) and array.dtype.kind in "iufc"
    return array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False) if known else array


def flatten_metrics(model, logs: dict) -> Any:
    """Logs as the list `evaluate` returns. Keras 3.15: the order is defined nowhere else.

    Args:
        logs: numbers by name.
    """
    return model._flatten_metrics_in_order(logs)


def log_values(logs: dict) -> dict:
    """Logs as Keras shows them: flat, sorted by name, numbers as Python's. Keras 3.15: private."""
    return pythonify_logs(logs)


def limited_epochs(epochs: int) -> int:
    """The epochs that `keras.config.set_max_epochs` or KERAS_MAX_EPOCHS leave. Keras 3.15: every backend's `fit` does this itself."""
    most = keras.config.max_epochs()
    if most and most < epochs:
        warnings.warn(f"Limiting epochs to {most}, as keras.config.set_max_epochs or KERAS_MAX_EPOCHS say.", stacklevel=3)
        return most
    return epochs


def should_validate(model, epoch: int, frequency) -> bool:
    """Whether `validation_freq` asks for validation. Keras 3.15: private; an int, a list, or Keras' own error.

    Args:
        epoch: number of the epoch, from 0.
        frequency: number of epochs from one validation to the next, or a list of epochs' numbers, from 1.
    """
    return keras.Model._should_eval(model, epoch, frequency)


def restored_epoch(model) -> int | None:
    """The epoch to go on with. Keras 3.15: BackupAndRestore tells `fit` in this attribute."""
    return getattr(model, "_initial_epoch", None)


def times_batches(callback) -> bool:
    """Whether a TensorBoard callback looks at single batches although it writes once an epoch. Keras 3.15: private."""
    return callback._should_trace or callback.write_steps_per_second


def read_variable(variable) -> Any:
    """A variable's array. Keras 3.15: `value` and `assign` convert, check and look up scopes at every call.

    For all variables together that costs more than a small network's step; these two read and set the pointer.
    """
    return variable._value


def write_variable(variable, value) -> None:
    """Let a variable hold this array; see `read_variable`.

    Args:
        variable: a Keras variable.
        value: an array of its shape and dtype.
    """
    variable._direct_assign(value)


def compiled_parts(model) -> tuple:
    """What `compile` makes anew: while these objects and the variables are the same, a compiled program stays right."""
    # Keras 3.15: no public handle; a model that was never compiled has no optimizer attribute.
    return getattr(model, "optimizer", None), model._compile_loss, model._compile_metrics


def is_model(model) -> bool:
    """Whether Keras can train it: a `keras.Model`, or a layer of the user's with Keras' trainer. Keras 3.15: the trainer is private."""
    return isinstance(model, keras.Layer) and isinstance(model, _TRAINER)


def is_built(model) -> bool:
    """Whether all layers have their variables. Keras 3.15: `_flatten_layers` reaches layers within layers."""
    return all(layer.built for layer in model._flatten_layers())


def needs_batch_to_build(model) -> bool:
    """Whether `model.fit` would draw one batch (and with it one shuffle) to build the model. Keras 3.15."""
    parts = (model._compile_metrics, model._compile_loss)
    return not is_built(model) or any(part is not None and not part.built for part in parts)


def own_step(model) -> str:
    """The part of training that a model's class computes in its own way, "" where all of it is Keras'.

    Keras 3.15: `compute_loss_and_updates` and `_update_metrics_variables` are what `train_step` is made of on JAX.
    """
    names = ("train_step", "compute_loss_and_updates", "_update_metrics_variables")
    return next((name for name in names if getattr(type(model), name) is not getattr(keras.Model, name)), "")


def why_not_compiled(model) -> str:
    """Why Keras' or the user's word keeps a model's steps from being compiled, "" where nothing does.

    Keras 3.15: one layer with `supports_jit=False` turns compiling off for all of a model, and nothing tells that from what was asked of
    `compile`.
    """
    if model.jit_compile:
        return ""
    refusing = [layer for layer in model._flatten_layers() if not layer.supports_jit]
    if not refusing:
        return "it was compiled with jit_compile=False"
    layer = next((layer for layer in refusing if type(layer) not in _COMPILED_ALL_THE_SAME), None)
    if layer is None:
        return ""
    told = f"layer {layer.name!r} ({type(layer).__name__}) cannot be compiled"
    if type(layer).__module__.startswith("keras."):
        return (
            f"{told}: it needs its numbers on the host. Apply it to the data before training, x = layer(x), and leave it out of the model"
        )
    return f"{told}: its supports_jit is False. If it calls only Keras' operations, set supports_jit=True in it before compiling the model"


_COMPILED_ALL_THE_SAME = {getattr(keras.layers, f"Random{name}") for name in ("Perspective", "Rotation", "Shear", "Translation", "Zoom")}
"""Layers that say supports_jit=False for TensorFlow's sake. On JAX they compile, and give the same numbers (Keras 3.15 and 3.16)."""


@contextmanager
def recurrent_states(model) -> Iterator[None]:
    """Count the states of stateful recurrent layers among the model's non-trainable variables.

    Keras 3.15 does not, so that on JAX a step can neither read nor give them (decision 0014).
    """
    tracked = [(layer._non_trainable_variables, keras.tree.flatten(layer.states)) for layer in _stateful_layers(model)]
    for variables, states in tracked:
        list.extend(variables, states)  # Keras' own method refuses once a layer is built
    try:
        yield
    finally:
        for variables, states in tracked:
            list.__delitem__(variables, slice(len(variables) - len(states), None))


def _stateful_layers(model) -> list:
    return [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.RNN) and layer.stateful and layer.built]


def why_rows_follow(model) -> str:
    """Why rows of a batch go on from those of the batch before, "" where they do not. Keras 3.15: private, as in `recurrent_states`."""
    layer = next(iter(_stateful_layers(model)), None)
    return f"layer {layer.name!r} is stateful: the next batch's first row goes on from this one's first" if layer else ""


def why_rows_couple(model) -> str:
    """Why the rows of a batch are not independent, "" where no layer is known for it.

    Keras 3.15: `_flatten_layers` reaches layers within layers.
    """
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable:
            return f"layer {layer.name!r} normalises by the statistics of the batch"
    return ""


def why_rows_weigh(model) -> str:
    """Why parts of a batch may weigh differently in its loss, "" where no layer is known for it."""
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.Masking) or getattr(layer, "mask_zero", False):
            return f"layer {layer.name!r} masks, so that parts of a batch weigh differently"
    return ""


def loss_and_updates(model, weights, state, batch) -> Any:
    """The loss to differentiate, and `(loss, predictions, others, metrics)`; see `own_step`."""
    options = {"training": True, "optimizer_variables": state.slots}
    with recurrent_states(model):
        return model.compute_loss_and_updates(weights, state.others, state.metrics, *unpack(batch), **options)


def update_metrics(model, metrics, loss, predictions, batch) -> Any:
    """The logs and the metrics' variables after a batch; see `own_step`.

    Args:
        metrics: arrays of the metrics' variables.
        loss: the batch's loss.
        predictions: the model's outputs for it.
    """
    x, y, sample_weight = unpack(batch)
    return model._update_metrics_variables(metrics, loss, x, y, predictions, sample_weight)


def computes_loss_itself(model) -> bool:
    """Whether a model's class decides itself what its targets mean. Keras 3.15: `own_step`, and the steps of evaluation."""
    names = ("compute_loss", "_compute_loss", "test_step")
    return bool(own_step(model)) or any(getattr(type(model), name) is not getattr(keras.Model, name) for name in names)


def symbolic_ends(model) -> tuple[Any, Any]:
    """The inputs and outputs of a functional or built sequential model, each in its structure; `(None, None)` of others.

    Keras 3.15: private; the public lists `inputs` and `outputs` are flat. A class with a `call` of its own computes what it likes.
    """
    graph: Any = model._functional if isinstance(model, keras.Sequential) else model
    if type(model).call.__module__.startswith("keras.") and hasattr(graph, "_outputs_struct"):
        return graph._inputs_struct, graph._outputs_struct
    return None, None


def embeddings(model) -> Iterator[tuple[Any, Any]]:
    """Each embedding of a model with each symbolic tensor that it reads. Keras 3.15: private nodes tell."""
    for layer in model._flatten_layers():
        if type(layer) is keras.layers.Embedding:
            yield from ((layer, tensor) for node in layer._inbound_nodes for tensor in node.input_tensors)


def masks(model) -> bool:
    """Whether a layer of the model masks positions. Keras 3.15: `_flatten_layers`."""
    return any(isinstance(layer, keras.layers.Masking) or getattr(layer, "mask_zero", False) for layer in model._flatten_layers())


def mask_of(inputs, output) -> Callable[[Any], Any] | None:
    """From a functional model's inputs to the mask of an output; None where it has none. Keras 3.15: a private attribute.

    Args:
        inputs: symbolic, in the model's structure.
        output: one symbolic output.
    """
    mask = getattr(output, "_keras_mask", None)
    return None if mask is None else keras.Function(inputs, mask)


def has_loss(model) -> bool:
    """Whether a model was compiled with a loss. Keras 3.15: private, as `model.loss` may hold nothing but None."""
    return model._compile_loss is not None


def learns_nothing(model) -> bool:
    """Whether a model has no loss and nothing else to learn from: only layers of Keras, none of them regularised.

    Keras 3.15: `_flatten_layers` reaches layers within layers, the model among them.
    """
    layers = list(model._flatten_layers())
    plain = all(type(layer).__module__.startswith("keras.") and layer.built and not layer.activity_regularizer for layer in layers)
    return not has_loss(model) and plain and not model.losses


def loss_function(loss) -> tuple[str, dict]:
    """The name and options of the function that a loss of Keras' own wraps; `("", {})` for a loss of the user's.

    Keras 3.15: the options are private.
    """
    function: Any = getattr(loss, "fn", None)
    owners = type(loss).call, type(loss).__call__, getattr(function, "__module__", "")
    if owners != (LossFunctionWrapper.call, keras.Loss.__call__, LossFunctionWrapper.__module__):
        return "", {}
    return function.__name__, loss._fn_kwargs


def pair_losses(model, y, outputs, sample_weight) -> list[tuple[str, Any, Any, Any, Any]]:
    """`(name, loss, target, output, sample weight)` for each loss of a compiled model that counts, matched as Keras matches them.

    Args:
        model: compiled with a loss.
        y, outputs, sample_weight: structures of anything that has a shape.

    Raises:
        ValueError, KeyError: they do not match.

    Keras 3.15: only `CompileLoss.call` knows which target belongs to which output.
    """
    given = model._compile_loss
    pairing = _Pairing(given._user_loss, given._user_loss_weights, output_names=given.output_names)
    pairing.call(y, outputs, sample_weight)
    return pairing.pairs


class _Pairing(CompileLoss):
    """Matches targets with outputs and computes nothing."""

    metrics: Any = ()

    def build(self, y_true, y_pred):
        super().build(y_true, y_pred)
        self.pairs: list = []
        counting = [each for each in self._flat_losses if each.loss_weights is None or each.loss_weights]
        self._flat_losses = [each._replace(loss=self._note(each.name, each.loss), loss_weights=None) for each in counting]
        self.metrics = [None] * len(self._flat_losses)

    def _note(self, name: str, loss) -> Callable:
        def note(target, output, sample_weight):
            self.pairs.append((name, loss, target, output, sample_weight))
            return 0.0

        return note


class Batches:
    """The batches of `fit`, `evaluate` and `predict`, epoch by epoch, as Keras itself would draw them.

    Keras 3.15's EpochIterator and data adapters are private, but they define what `steps_per_epoch`, `shuffle`,
    `class_weight` and every kind of input mean. Arrays are not sliced by them: for arrays this yields row numbers.

    Attributes:
        arrays: for array input the arrays as `(x, y, sample_weight)` packed by Keras, else None.
        batch_size: for array input the rows of a full batch, else None.
    """

    def __init__(self, x, y, sample_weight, *, batch_size, steps_per_epoch, shuffle, class_weight, steps_per_execution):
        options = {"batch_size": batch_size, "shuffle": shuffle, "steps_per_execution": steps_per_execution}
        # The checks, messages, limits and weights of Keras; `_inputs` holds what it packed.
        source = _HostIterator(x, y, sample_weight, steps_per_epoch=steps_per_epoch, class_weight=class_weight, **options)
        adapter = source.data_adapter
        self.arrays: Any = None
        self.batch_size: Any = None
        if isinstance(adapter, ArrayDataAdapter):
            self.arrays, self.batch_size = adapter._inputs, adapter.batch_size
            source = _HostIterator(np.arange(adapter._num_samples, dtype=np.int32), steps_per_epoch=source.steps_per_epoch, **options)
        self._iterator = source

    @property
    def steps_per_epoch(self) -> Any:
        """Steps in an epoch, None where the source does not tell."""
        return self._iterator.num_batches

    def epoch(self) -> Iterator[Any]:
        """One epoch's batches: row numbers (int32) for arrays, else tuples of arrays."""
        with self._iterator.catch_stop_iteration():
            for _, _, batches in self._iterator:
                yield next(batches)
                yield from itertools.islice(batches, self._iterator.steps_per_execution - 1)

    def first(self, *, in_epoch: bool) -> Any:
        """A batch to build a model on. Keras 3.15 begins an epoch for it; 3.16 only where `in_epoch`, as in `predict`."""
        apart = hasattr(keras.Model, "_maybe_symbolic_build") and not in_epoch
        return next(iter(self._iterator._get_iterator()) if apart else self.epoch())

    def restart(self) -> None:
        """Start again from the source's beginning, as Keras does before the first epoch and before every evaluation."""
        self._iterator.reset()


class _HostIterator(EpochIterator):
    """Keras' iterator over host batches for JAX; it counts in executions, and their batches are drawn one at a time."""

    def _get_iterator(self):
        return self.data_adapter.get_jax_iterator()

    def __next__(self):
        return next(self._epoch_iterator)  # type: ignore[arg-type]


def is_sparse(leaf) -> bool:
    """Whether Keras would hand this array to the model in a sparse or ragged form. Keras 3.15: private helpers."""
    tests = ("is_scipy_sparse", "is_jax_sparse", "is_tensorflow_sparse", "is_tensorflow_ragged")
    return any(getattr(data_adapter_utils, test)(leaf) for test in tests)


def split_validation(arrays, validation_split: float) -> Any:
    """Keras' own split of `(x, y, sample_weight)` into training and validation rows. Keras 3.15: private.

    Args:
        arrays: each of shape (rows, ...), or None.
        validation_split: the share of the last rows.
    """
    from keras.src.trainers.data_adapters.array_slicing import train_validation_split

    parts = train_validation_split(arrays, validation_split)
    return keras.tree.map_structure(lambda leaf: getattr(leaf, "array", leaf), parts)


def jaxpr_as_function(closed_jaxpr) -> Callable[..., list]:
    """A traced program as a function of its flat inputs. JAX 0.10 exports it in `jax.extend.core`."""
    from jax.extend.core import jaxpr_as_fun

    return jaxpr_as_fun(closed_jaxpr)


class RandomState:
    """The global random generators of Python, NumPy and Keras, as somebody who works alone would find them.

    Args:
        seed: as `keras.utils.set_random_seed` takes it.

    Keras 3.15: its seed and its generator lie in a private global state.
    """

    _present: "RandomState | None" = None

    def __init__(self, seed: int):
        self._seed = seed
        self._left: tuple | None = None

    def enter(self) -> None:
        """Let the generators go on where this state was left, until another one is entered. Call it inside `random_states`."""
        present = RandomState._present
        if present is self:
            return
        if present is not None:
            present._left = _random_state()
        RandomState._present = self
        if self._left is None:
            keras.utils.set_random_seed(self._seed)
        else:
            _set_random_state(self._left)


@contextmanager
def random_states() -> Iterator[None]:
    """While it lasts, each `RandomState` may be entered; afterwards the generators are as they were before."""
    before, present = _random_state(), RandomState._present
    RandomState._present = None
    try:
        yield
    finally:
        if RandomState._present is not None:
            RandomState._present._left = _random_state()
        RandomState._present = present
        _set_random_state(before)


_KERAS_RANDOM = (GLOBAL_RANDOM_SEED, GLOBAL_SEED_GENERATOR)


def _random_state() -> tuple:
    return random.getstate(), np.random.get_state(), [global_state.get_global_attribute(name) for name in _KERAS_RANDOM]


def _set_random_state(state: tuple) -> None:
    python, numpy, of_keras = state
    random.setstate(python)
    np.random.set_state(numpy)
    for name, value in zip(_KERAS_RANDOM, of_keras):
        global_state.set_global_attribute(name, value)


_BATCHED_ATTENTION = (0, 11, 1)
"""The version of JAX from which a kernel library's attention can be vmapped together with its gradient."""


@contextmanager
def attention_to_be_stacked(model) -> Iterator[None]:
    """Let attention layers compute in plain operations where JAX cannot vmap a kernel library's (before 0.11.1).

    Keras 3.15: what a layer was asked for is private; only GPUs have such a library.
    """
    asked = [layer for layer in model._flatten_layers() if getattr(layer, "_flash_attention", False)] if is_model(model) else []
    if jax.__version_info__ >= _BATCHED_ATTENTION:
        asked = []
    for layer in asked:
        layer._flash_attention = False
    try:
        yield
    finally:
        for layer in asked:
            layer._flash_attention = True


def plain_config(model) -> str | None:
    """All that tells a model's steps from another's, None where a part of it is not Keras' own and may hold what no config tells.

    Variables are told apart by shape and dtype only, numbers that Keras gives to names are left out, and so is a learning rate, which is
    a variable. Keras 3.15: `_flatten_layers` reaches layers within layers.
    """
    layers = list(model._flatten_layers()) if model.compiled and model.optimizer is not None else []
    if not layers or own_step(model) or len(getattr(model, "outputs", None) or ()) != 1 or any(not _is_of_keras(layer) for layer in layers):
        return None
    try:
        with warnings.catch_warnings(action="ignore"):
            compiled, structure = model.get_compile_config(), model.get_config()
    except Exception:  # a part of the user's that cannot be written down
        return None
    optimizer = compiled["optimizer"]["config"]
    if isinstance(optimizer.get("learning_rate"), float):
        optimizer["learning_rate"] = None
    optimizer.pop("name", None)
    if not _is_told(compiled) or not _is_told(structure):
        return None
    text = json.dumps(structure, default=str)
    numbered = {layer.name for layer in layers if re.search(r"_\d+$", layer.name)}
    for number, name in enumerate(layer.name for layer in layers if layer.name in numbered):
        text = text.replace(f'"{name}"', f'"#{number}"')
    variables = [(variable.shape, variable.dtype, variable.trainable) for variable in model.variables]
    return f"{text} {json.dumps(compiled, default=str)} {variables} {[layer.trainable for layer in layers]}"


def _is_of_keras(part) -> bool:
    return type(part).__module__.startswith("keras.")


def _is_told(config) -> bool:
    """Whether all that a config names is Keras' own, so that the config says all of it."""
    if isinstance(config, dict):
        foreign = "class_name" in config and not str(config.get("module")).startswith("keras")
        return not foreign and config.get("class_name") != "function" and all(map(_is_told, config.values()))
    if isinstance(config, (list, tuple)):
        return all(map(_is_told, config))
    return config is None or isinstance(config, (bool, int, float, str))


def copier(shardings: list) -> Callable[[list], list]:
    """A function that starts copying arrays to other devices, on which they are split as where they are.

    `jax.device_put` takes about 40 microseconds of Python for an array; this is the call that it ends in, at about 5 (JAX 0.10, not
    exported). Where it is missing, or arrays are not of this process alone, `device_put` does it.

    Args:
        shardings: of each array, where it goes.
    """
    from jax._src.lib import xla_client  # pyright: ignore[reportPrivateImportUsage]

    copy = getattr(xla_client, "batched_copy_array_to_devices_with_sharding", None)
    lists = [getattr(getattr(sharding, "_internal_device_list", None), "addressable_device_list", None) for sharding in shardings]
    if copy is None or any(each is None for each in lists) or not all(sharding.is_fully_addressable for sharding in shardings):
        return lambda arrays: jax.device_put(arrays, shardings)
    ways = [xla_client.ArrayCopySemantics.REUSE_INPUT] * len(shardings)
    return lambda arrays: copy(arrays, lists, shardings, ways)
