"""Microbatches mean what their batch means: its random numbers, its sums and means, its weights and masks."""

import functools

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
from flax import nnx
from keras import layers

import parafit
from parafit.errors import PlanError
from parafit.nnx import Trainable
from parafit.techniques.draws import bits_of_rows

ROWS = 22  # batches of 8, and a last one of 6

rng = np.random.default_rng(0)
VECTORS = rng.normal(size=(ROWS, 12))
SEQUENCES = rng.normal(size=(ROWS, 5, 4))
IMAGES = rng.uniform(size=(ROWS, 6, 6, 3))
TOKENS = rng.integers(0, 4, (ROWS, 6)).astype("int32")
LABELS = rng.integers(0, 3, ROWS).astype("int32")


def classifier(x, *hidden, loss="sparse_categorical_crossentropy", dtype=None, **options):
    model = keras.Sequential([keras.Input(x.shape[1:], dtype=dtype), *hidden, layers.Flatten(), layers.Dense(3, "softmax")])
    model.compile(keras.optimizers.Adam(1e-2), loss, metrics=["accuracy"], **options)
    return model, x, LABELS


def attentive():
    inputs = keras.Input((5, 4))
    hidden = layers.MultiHeadAttention(2, 3, dropout=0.3, seed=4)(inputs, inputs)
    model = keras.Model(inputs, layers.Dense(3, "softmax")(layers.GlobalAveragePooling1D()(hidden)))
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model, SEQUENCES, LABELS


RANDOM = {
    "dropout": lambda: classifier(VECTORS, layers.Dense(16, "relu"), layers.Dropout(0.4, seed=1), layers.Dropout(0.2, seed=2)),
    "dropout_shared": lambda: classifier(VECTORS, layers.Dense(16), layers.Dropout(0.4, noise_shape=(1, 16), seed=1)),
    "spatial_dropout": lambda: classifier(SEQUENCES, layers.Conv1D(6, 2), layers.SpatialDropout1D(0.4, seed=1)),
    "gaussian_noise": lambda: classifier(VECTORS, layers.GaussianNoise(0.3, seed=1)),
    "gaussian_dropout": lambda: classifier(VECTORS, layers.Dense(16), layers.GaussianDropout(0.3, seed=1)),
    "alpha_dropout": lambda: classifier(VECTORS, layers.Dense(16), layers.AlphaDropout(0.3, seed=1)),
    "attention": attentive,
    "recurrent": lambda: classifier(SEQUENCES, layers.LSTM(5, dropout=0.3, recurrent_dropout=0.2, seed=1)),
    "flips": lambda: classifier(IMAGES, layers.RandomFlip(seed=1), layers.RandomBrightness(0.3, value_range=(0, 1), seed=2)),
    "turns": lambda: classifier(IMAGES, layers.RandomRotation(0.2, seed=1), layers.RandomTranslation(0.2, 0.2, seed=1), layers.Conv2D(4, 3)),
    "contrast": lambda: classifier(IMAGES, layers.RandomContrast(0.5, value_range=(0, 1), seed=1), layers.RandomZoom(0.3, seed=2)),
}


def trained(make, plan, batch_size=8, **options):
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(3)
    model, x, y = make()
    history = parafit.fit(model, x, y, plan=plan, batch_size=batch_size, epochs=2, verbose=0, **options).history
    variables = (*model.variables, *model.optimizer.variables)
    return [np.asarray(value) for value in history.values()] + [np.asarray(variable) for variable in variables]


@functools.cache
def alone(make, plan="single"):
    return trained(make, plan)


def assert_same(ours, theirs):
    for one, other in zip(theirs, ours, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-12, atol=1e-13)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", RANDOM)
def test_random_layers_draw_the_rows_of_the_whole_batch(name):
    assert_same(trained(RANDOM[name], "microbatches=3"), alone(RANDOM[name]))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("plan", ["data=2", "data=2,tensor=2", "data=2,zero=1", "recompute=blocks", "data=4,zero=2,recompute=blocks"])
def test_random_layers_on_other_layouts(plan):
    assert_same(trained(RANDOM["dropout"], plan + ",microbatches=2"), alone(RANDOM["dropout"]))
