"""Small networks of every kind, each with data that fits it: `ZOO[name]() -> (model, x, y)`."""

import keras
import numpy as np
from keras import layers

from parafit.adapters import step
from parafit.execution.compiled import CompiledSteps

ROWS = 75  # batches of 16 leave a short last one, and 8 devices do not divide it


def mlp():
    return _classifier([layers.Dense(16, "relu")], (12,))


def normalised():
    # No bias before a normalisation: its gradient is zero but for rounding, which Adam would blow up into an update.
    hidden = [layers.Dense(16, use_bias=False), layers.BatchNormalization(), layers.Activation("relu"), layers.Dropout(0.3, seed=3)]
    return _classifier(hidden, (12,))


def regularised():
    dense = layers.Dense(
        16,
        "tanh",
        kernel_regularizer=keras.regularizers.L2(1e-2),
        activity_regularizer=keras.regularizers.L1(1e-3),
        kernel_constraint=keras.constraints.MaxNorm(1.0),
    )
    return _classifier([dense, layers.GaussianNoise(0.1, seed=5)], (12,))


def convolutional():
    hidden = [layers.Conv2D(4, 3, activation="relu"), layers.MaxPooling2D(), layers.DepthwiseConv2D(2), layers.GlobalAveragePooling2D()]
    return _classifier(hidden, (10, 10, 2))


def sequence():
    return _classifier([layers.Conv1D(6, 3, padding="causal"), layers.LSTM(6, return_sequences=True), layers.GRU(5)], (9, 3))


def transformer():
    tokens = keras.Input((8,), dtype="int32")
    hidden = layers.Embedding(20, 8)(tokens)
    attended = layers.MultiHeadAttention(2, 4, dropout=0.1, seed=4)(hidden, hidden)
    hidden = layers.LayerNormalization()(layers.Add()([hidden, attended]))
    outputs = layers.Dense(3, "softmax")(layers.GlobalAveragePooling1D()(hidden))
    x = np.random.default_rng(0).integers(0, 20, (ROWS, 8)).astype("int32")
    return _compiled(keras.Model(tokens, outputs)), x, _labels()


def many_inputs_and_outputs():
    left, right = keras.Input((6,), name="left"), keras.Input((5,), name="right")
    hidden = layers.Concatenate()([layers.Dense(8, "relu")(left), layers.Dense(8, "relu")(right)])
    kind, size = layers.Dense(3, "softmax", name="kind")(hidden), layers.Dense(1, name="size")(hidden)
    model = keras.Model({"left": left, "right": right}, {"kind": kind, "size": size})
    model.compile(
        keras.optimizers.Adam(1e-2),
        {"kind": "sparse_categorical_crossentropy", "size": "mse"},
        loss_weights={"kind": 1.0, "size": 0.5},
        metrics={"kind": ["accuracy"], "size": ["mae"]},
    )
    rng = np.random.default_rng(0)
    x = {"left": rng.normal(size=(ROWS, 6)), "right": rng.normal(size=(ROWS, 5))}
    return model, x, {"kind": _labels(), "size": rng.normal(size=(ROWS, 1))}


class _Residual(keras.Model):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = layers.Dense(12, "relu"), layers.Dense(3, "softmax")

    def call(self, x):
        hidden = x + self.inner(x)
        self.add_loss(1e-3 * keras.ops.mean(hidden**2))
        return self.outer(hidden)


def subclassed():
    """A subclassed model, not built yet, with a loss of its own."""
    return _compiled(_Residual()), _numbers((12,)), _labels()


class _OwnStep(keras.Model):
    def train_step(self, state, data):
        logs, state = super().train_step(state, data)
        return {"loss": logs["loss"], "twice": 2 * logs["loss"]}, state


def own_train_step():
    """A model whose train_step returns logs of its own."""
    inputs = keras.Input((12,))
    outputs = layers.Dense(3, "softmax")(layers.Dense(8, "relu")(inputs))
    return _compiled(_OwnStep(inputs, outputs)), _numbers((12,)), _labels()


ZOO = {
    make.__name__: make
    for make in (
        mlp,
        normalised,
        regularised,
        convolutional,
        sequence,
        transformer,
        many_inputs_and_outputs,
        subclassed,
        own_train_step,
    )
}


def _classifier(hidden, shape):
    model = keras.Sequential([keras.Input(shape), *hidden, layers.Dense(3, "softmax")])
    return _compiled(model), _numbers(shape), _labels()


def _compiled(model):
    model.compile(keras.optimizers.Adam(1e-2), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def _numbers(shape):
    return np.random.default_rng(0).normal(size=(ROWS, *shape))


def _labels():
    return np.random.default_rng(1).integers(0, 3, ROWS).astype("int32")


def programs(keeper):
    """The compiled programs that are kept for a model (of Flax: for its module)."""
    return [made for _, made in step._KEPT[keeper].values() if isinstance(made, CompiledSteps)]
