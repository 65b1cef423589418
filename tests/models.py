"""Small networks of every kind, each with data that fits it: `ZOO[name]() -> (model, x, y)`, and the parts they are made of.

Every network takes how many rows of data it comes with, and its optimizer (Adam where none is given).
"""

import keras
import numpy as np
from keras import layers

from parafit.adapters import step
from parafit.execution.compiled import CompiledSteps

ROWS = 75  # batches of 16 leave a short last one, and 8 devices do not divide it


def mlp(**options):
    return classifier([layers.Dense(16, "relu")], (12,), **options)


def deep(**options):
    return classifier([layers.Dense(16, "relu"), layers.Dense(24, "tanh"), layers.Dense(8)], (12,), **options)


def normalised(**options):
    # No bias before a normalisation: its gradient is zero but for rounding, which Adam would blow up into an update.
    hidden = [layers.Dense(16, use_bias=False), layers.BatchNormalization(), layers.Activation("relu"), layers.Dropout(0.3, seed=3)]
    return classifier([*hidden, layers.Dense(8)], (12,), **options)


def regularised(**options):
    dense = layers.Dense(
        16,
        "tanh",
        kernel_regularizer=keras.regularizers.L2(1e-2),
        activity_regularizer=keras.regularizers.L1(1e-3),
        kernel_constraint=keras.constraints.MaxNorm(1.0),
    )
    return classifier([dense, layers.GaussianNoise(0.1, seed=5)], (12,), **options)


def constrained(**options):
    """Regularised by weights alone, so that its batches may be cut."""
    dense = layers.Dense(16, "tanh", kernel_regularizer=keras.regularizers.L2(1e-2), kernel_constraint=keras.constraints.MaxNorm(1.0))
    return classifier([dense, layers.Dense(8, bias_regularizer="l1")], (12,), **options)


def convolutional(**options):
    hidden = [layers.Conv2D(8, 3, activation="relu"), layers.MaxPooling2D(), layers.DepthwiseConv2D(2), layers.Conv2D(16, 2)]
    return classifier([*hidden, layers.GlobalAveragePooling2D(), layers.Dense(8)], (10, 10, 2), **options)


def sequence(**options):
    return classifier([layers.Conv1D(6, 3, padding="causal"), layers.LSTM(6, return_sequences=True), layers.GRU(5)], (9, 3), **options)


def lstm(**options):
    return classifier([layers.LSTM(6, return_sequences=True), layers.LSTM(4), layers.Dense(16, "relu")], (5, 3), **options)


def gru(**options):
    return classifier([layers.GRU(6), layers.Dense(16, "relu")], (5, 3), **options)


def embedded(rows=ROWS, optimizer=None):
    hidden = [layers.Embedding(24, 8), layers.GlobalAveragePooling1D(), layers.Dense(16, "relu")]
    model = keras.Sequential([keras.Input((6,), dtype="int32"), *hidden, layers.Dense(3, "softmax")])
    return compiled(model, optimizer), _tokens(rows, 6, 24), _labels(rows)


def transformer(rows=ROWS, optimizer=None):
    tokens = keras.Input((8,), dtype="int32")
    hidden = layers.Embedding(20, 8)(tokens)
    attended = layers.MultiHeadAttention(2, 4, dropout=0.1, seed=4)(hidden, hidden)
    hidden = layers.LayerNormalization()(layers.Add()([hidden, attended]))
    outputs = layers.Dense(3, "softmax")(layers.GlobalAveragePooling1D()(hidden))
    return compiled(keras.Model(tokens, outputs), optimizer), _tokens(rows, 8, 20), _labels(rows)


def transformer_block(rows=ROWS, optimizer=None, attention=lambda: layers.MultiHeadAttention(8, 2, dropout=0.1, seed=4)):
    """A whole block: attention by as many heads as there are devices, and two dense layers."""
    tokens = keras.Input((6,), dtype="int32")
    hidden = layers.Embedding(20, 8)(tokens)
    normal = layers.LayerNormalization()(hidden)
    hidden = layers.Add()([hidden, attention()(normal, normal)])
    inner = layers.Dense(16, "gelu")(layers.LayerNormalization()(hidden))
    hidden = layers.Add()([hidden, layers.Dense(8)(inner)])
    outputs = layers.Dense(3, "softmax")(layers.GlobalAveragePooling1D()(hidden))
    return compiled(keras.Model(tokens, outputs), optimizer), _tokens(rows, 6, 20), _labels(rows)


def grouped_queries(**options):
    # Without dropout Keras calls jax.nn.dot_product_attention, which rounds to float32 whatever the dtype.
    return transformer_block(attention=lambda: layers.GroupQueryAttention(2, 8, 4, dropout=0.1, seed=4), **options)


def many_inputs_and_outputs(rows=ROWS, optimizer=None):
    left, right = keras.Input((6,), name="left"), keras.Input((5,), name="right")
    hidden = layers.Concatenate()([layers.Dense(8, "relu")(left), layers.Dense(8, "relu")(right)])
    hidden = layers.Dense(16, "relu")(hidden)
    kind, size = layers.Dense(3, "softmax", name="kind")(hidden), layers.Dense(1, name="size")(hidden)
    model = keras.Model({"left": left, "right": right}, {"kind": kind, "size": size})
    model.compile(
        optimizer or keras.optimizers.Adam(1e-2),
        {"kind": "sparse_categorical_crossentropy", "size": "mse"},
        loss_weights={"kind": 1.0, "size": 0.5},
        metrics={"kind": ["accuracy"], "size": ["mae"]},
    )
    rng = np.random.default_rng(0)
    x = {"left": rng.normal(size=(rows, 6)), "right": rng.normal(size=(rows, 5))}
    return model, x, {"kind": _labels(rows), "size": rng.normal(size=(rows, 1))}


def skipping(rows=ROWS, optimizer=None):
    inputs = keras.Input((12,))
    hidden = layers.Dense(16, "relu")(inputs)
    hidden = layers.Add()([layers.Dense(12)(hidden), inputs])
    model = keras.Model(inputs, layers.Dense(3, "softmax")(layers.Dense(8, "relu")(hidden)))
    return compiled(model, optimizer), _numbers(rows, 12), _labels(rows)


class _Residual(keras.Model):
    def __init__(self):
        super().__init__()
        self.inner, self.back, self.outer = layers.Dense(16, "relu"), layers.Dense(12), layers.Dense(3, "softmax")

    def call(self, x):
        hidden = x + self.back(self.inner(x))
        self.add_loss(1e-3 * keras.ops.mean(hidden**2))
        return self.outer(hidden)


def subclassed(rows=ROWS, optimizer=None):
    """A subclassed model, not built yet, with a loss of its own."""
    return compiled(_Residual(), optimizer), _numbers(rows, 12), _labels(rows)


class _OwnStep(keras.Model):
    def train_step(self, state, data):
        logs, state = super().train_step(state, data)
        return {"loss": logs["loss"], "twice": 2 * logs["loss"]}, state


def own_train_step(rows=ROWS, optimizer=None):
    """A model whose train_step returns logs of its own."""
    inputs = keras.Input((12,))
    outputs = layers.Dense(3, "softmax")(layers.Dense(8, "relu")(inputs))
    return compiled(_OwnStep(inputs, outputs), optimizer), _numbers(rows, 12), _labels(rows)


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


def linear(cls=keras.Model, **options):
    """A compiled model of four inputs and one output, with the same weights every time."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    model = cls(inputs, layers.Dense(1)(inputs))
    model.compile("sgd", "mse", **options)
    return model


def classifier(hidden, shape, rows=ROWS, optimizer=None):
    """Layers between inputs of a shape and three classes, with data."""
    model = keras.Sequential([keras.Input(shape), *hidden, layers.Dense(3, "softmax")], name="sequential")
    return compiled(model, optimizer), _numbers(rows, *shape), _labels(rows)


def compiled(model, optimizer=None):
    model.compile(optimizer or keras.optimizers.Adam(1e-2), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def _numbers(*shape):
    return np.random.default_rng(0).normal(size=shape)


def _tokens(rows, length, vocabulary):
    return np.random.default_rng(0).integers(0, vocabulary, (rows, length)).astype("int32")


def _labels(rows):
    return np.random.default_rng(1).integers(0, 3, rows).astype("int32")


def programs(keeper):
    """The compiled programs that are kept for a model (of Flax: for its module)."""
    return [made for _, made in step._KEPT[keeper].values() if isinstance(made, CompiledSteps)]
