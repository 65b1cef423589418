"""Pipelines: the numbers of one device, whatever the model, the schedule and the number of stages; and what each stage keeps."""

import jax
import keras
import numpy as np
import optax
import pytest
from flax import nnx
from keras import layers

import parafit
from parafit.errors import PlanError
from parafit.execution.pipeline import Line
from parafit.planner.schedules import make_grid
from tests import models

ROWS = 22  # batches of 8 leave one of 6, which neither 4 microbatches nor 4 rows divide


def tied():
    """An embedding that also is the last product, and a dense layer that runs twice."""
    embedding, shared, tokens = layers.Embedding(12, 6), layers.Dense(6, "tanh"), keras.Input((4,), dtype="int32")
    hidden = shared(layers.Dense(6, "gelu")(shared(embedding(tokens))))
    scores = layers.Lambda(lambda value: keras.ops.softmax(keras.ops.matmul(value, keras.ops.transpose(embedding.embeddings))))(hidden)
    tokens_of = np.random.default_rng(0).integers(0, 12, (ROWS, 4)).astype("int32")
    return models.compiled(keras.Model(tokens, scores)), tokens_of, np.roll(tokens_of, 1, 1)


def skips():
    """A network whose first values pass several stages by."""
    inputs = keras.Input((6,))
    first = layers.Dense(8, "relu")(inputs)
    hidden = layers.Dense(6, "relu")(layers.Dense(8, "tanh")(first))
    hidden = layers.Dense(8, "relu")(layers.Concatenate()([hidden, inputs]))
    hidden = layers.Dense(8, "tanh")(layers.Add()([hidden, first]))
    outputs = layers.Dense(3, "softmax")(layers.Concatenate()([hidden, first]))
    rng = np.random.default_rng(0)
    return models.compiled(keras.Model(inputs, outputs), keras.optimizers.SGD(0.1, momentum=0.9)), rng.normal(size=(ROWS, 6)), rng.integers(0, 3, ROWS)


def blocks():
    """A small transformer; its attention is written out, for Keras' own rounds to float32 whatever the dtype."""
    tokens = keras.Input((5,), dtype="int32")
    hidden = layers.Embedding(9, 8)(tokens)
    for _ in range(2):
        normal = layers.LayerNormalization()(hidden)
        query, key, value = (layers.Dense(8)(normal) for _ in range(3))
        hidden = layers.Add()([hidden, layers.Dense(8)(layers.Dot((2, 1))([layers.Softmax()(layers.Dot((2, 2))([query, key])), value]))])
        inner = layers.Dense(16, "gelu")(layers.LayerNormalization()(hidden))
        hidden = layers.Add()([hidden, layers.Dense(8)(inner)])
    model = keras.Model(tokens, layers.Dense(3, "softmax")(layers.GlobalAveragePooling1D()(hidden)))
    rng = np.random.default_rng(0)
    return models.compiled(model), rng.integers(0, 9, (ROWS, 5)).astype("int32"), rng.integers(0, 3, ROWS)


class Residual(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.inner, self.back, self.outer = nnx.Linear(6, 9, rngs=rngs), nnx.Linear(9, 6, rngs=rngs), nnx.Linear(6, 1, rngs=rngs)

    def __call__(self, x):
        return self.outer(x + self.back(nnx.tanh(self.inner(x))))


def module():
    rng = np.random.default_rng(0)
    chain = optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2))
    made = Residual(nnx.Rngs(0, params_dtype=None)) if False else Residual(nnx.Rngs(0))
    model = parafit.nnx.Trainable(made, loss=lambda module, batch: ((module(batch[0]) - batch[1]) ** 2).mean(), optimizer=chain)
    return model, rng.normal(size=(ROWS, 6)), rng.normal(size=(ROWS, 1))


def of_zoo(make, **options):
    return lambda: make(rows=ROWS, **options)


MODELS = {
    "adam": of_zoo(models.deep),
    "momentum": of_zoo(models.mlp, optimizer=keras.optimizers.SGD),
    "regularised": of_zoo(models.constrained),
    "skips": skips,
    "tied": tied,
    "ends": of_zoo(models.many_inputs_and_outputs),
    "subclassed": of_zoo(models.subclassed),
    "convolutional": of_zoo(models.convolutional),
    "lstm": of_zoo(models.lstm),
    "gru": of_zoo(models.gru),
    "blocks": blocks,
    "module": module,
}


def trained(make, plan, **options):
    """All that a run leaves: history, scores, predictions, weights and the optimizer's state."""
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(11)
    model, x, y = make()
    history = parafit.fit(model, x, y, plan=plan, verbose=0, **({"batch_size": 8, "epochs": 2} | options))
    scores = parafit.evaluate(model, x, y, batch_size=8, verbose=0, return_dict=True, plan=plan)
    outputs = parafit.predict(model, x, batch_size=8, verbose=0, plan=plan)
    if isinstance(model, keras.Model):
        state = model.get_weights() + [variable.numpy() for variable in model.optimizer.variables]
    else:
        state = [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state((model.module, model.optimizer)))]
    return keras.tree.flatten((history.history, scores, outputs, state))


def same_as_one_device(make, plan, **options):
    words = [word for word in plan.split(",") if word.split("=")[0] in ("microbatches", "recompute", "statistics")]
    one, many = (trained(make, each, **options) for each in (",".join(words) or "single", plan))
    for single, parallel in zip(one, many, strict=True):
        np.testing.assert_allclose(parallel, single, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("adam", "pipeline=2,microbatches=4"),
        ("adam", "pipeline=8,microbatches=4,schedule=gpipe"),
        ("momentum", "pipeline=3,microbatches=2,schedule=zb-h1"),
        ("regularised", "pipeline=4,microbatches=4,schedule=list"),
        ("skips", "pipeline=4,microbatches=4,schedule=zb-h1"),
        ("skips", "pipeline=2,microbatches=4,schedule=interleaved,interleave=2"),
        ("tied", "pipeline=4,microbatches=2"),
        ("ends", "pipeline=3,microbatches=4,schedule=gpipe"),
        ("subclassed", "pipeline=2,microbatches=4,schedule=list"),
        ("convolutional", "pipeline=4,microbatches=2"),
        ("lstm", "pipeline=2,microbatches=2,schedule=zb-h1"),
        ("gru", "pipeline=3,microbatches=4"),
        ("blocks", "pipeline=4,microbatches=4,schedule=interleaved,interleave=2"),
        ("module", "pipeline=2,microbatches=4,schedule=zb-h1"),
    ],
)
def test_a_pipeline_gives_the_numbers_of_one_device(name, plan):
    same_as_one_device(MODELS[name], plan)
