"""The workloads as compiled Keras models, on whichever backend the process has."""

import random

import keras
import numpy as np
from keras import layers

from benchmarks.workloads import Workload


def build(workload: Workload, *, steps_per_execution: int = 1) -> keras.Model:
    """The compiled model of `workload`: Adam, sparse categorical cross-entropy, accuracy."""
    random.seed(0)  # what keras.utils.set_random_seed does, but that it also imports TensorFlow where that is installed
    np.random.seed(0)
    inputs = keras.Input(workload.input_shape, dtype="int32" if workload.vocabulary else "float32")
    features = {"mlp": _mlp, "cnn": _cnn, "lstm": _lstm, "transformer": _transformer}[workload.family](workload, inputs)
    model = keras.Model(inputs, layers.Dense(workload.classes, activation="softmax")(features))
    model.compile(
        optimizer=keras.optimizers.Adam(1e-3),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
        steps_per_execution=steps_per_execution,
    )
    return model


def _mlp(workload: Workload, x):
    for number, width in enumerate(workload.hidden):
        x = layers.Dense(width)(x)
        if workload.batch_norm:
            x = layers.BatchNormalization()(x)
        x = layers.Activation("relu")(x)
        if workload.dropout:
            x = layers.Dropout(workload.dropout, seed=number)(x)
    return x


def _cnn(workload: Workload, x):
    for channels in (32, 64):
        x = layers.Conv2D(channels, 3, activation="relu")(x)
        x = layers.MaxPooling2D()(x)
    return layers.Dropout(workload.dropout, seed=0)(layers.Flatten()(x))


def _lstm(workload: Workload, x):
    return layers.LSTM(64)(x)


def _transformer(workload: Workload, tokens):
    """Layers as `torch.nn.TransformerEncoderLayer` has them: normalisation after each part, four dropouts."""
    x = layers.Embedding(workload.vocabulary, 128)(tokens)
    for number in range(2):
        seeds = iter(range(10 * number, 10 * number + 4))
        attended = layers.MultiHeadAttention(4, 32, dropout=workload.dropout, seed=next(seeds))(x, x)
        attended = layers.Dropout(workload.dropout, seed=next(seeds))(attended)
        x = layers.LayerNormalization(epsilon=1e-5)(layers.Add()([x, attended]))
        wide = layers.Dropout(workload.dropout, seed=next(seeds))(layers.Dense(512, activation="gelu")(x))
        narrow = layers.Dropout(workload.dropout, seed=next(seeds))(layers.Dense(128)(wide))
        x = layers.LayerNormalization(epsilon=1e-5)(layers.Add()([x, narrow]))
    return layers.GlobalAveragePooling1D()(x)
