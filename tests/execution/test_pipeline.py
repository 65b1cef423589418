"""Pipelines: the numbers of one device, whatever the model, the schedule and the number of stages; and what each stage keeps."""

import jax
import keras
import numpy as np
import optax
import pytest
from flax import nnx
from keras import layers

from parafit import evaluate, fit, predict
from parafit.errors import NonFiniteLossError, PlanError
from parafit.execution.line import Line
from parafit.nnx import Trainable
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
    return (
        models.compiled(keras.Model(inputs, outputs), keras.optimizers.SGD(0.1, momentum=0.9)),
        rng.normal(size=(ROWS, 6)),
        rng.integers(0, 3, ROWS),
    )


def blocks():
    """A small transformer; its attention is written out, for Keras' own rounds to float32 whatever the dtype."""
    tokens = keras.Input((5,), dtype="int32")
    hidden = layers.Embedding(9, 8)(tokens)
    for _ in range(2):
        normal = layers.LayerNormalization()(hidden)
        query, key, value = (layers.Dense(8, use_bias=False)(normal) for _ in range(3))  # a bias of keys has no gradient but rounding
        hidden = layers.Add()([hidden, layers.Dense(8)(layers.Dot((2, 1))([layers.Softmax()(layers.Dot((2, 2))([query, key])), value]))])
        inner = layers.Dense(16, "gelu")(layers.LayerNormalization()(hidden))
        hidden = layers.Add()([hidden, layers.Dense(8)(inner)])
    model = keras.Model(tokens, layers.Dense(3, "softmax")(layers.GlobalAveragePooling1D()(hidden)))
    rng = np.random.default_rng(0)
    return models.compiled(model), rng.integers(0, 9, (ROWS, 5)).astype("int32"), rng.integers(0, 3, ROWS)


class Residual(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.inner, self.back, self.outer = (nnx.Linear(*ends, param_dtype="float64", rngs=rngs) for ends in ((6, 9), (9, 6), (6, 1)))

    def __call__(self, x):
        return self.outer(x + self.back(nnx.tanh(self.inner(x))))


def module():
    rng = np.random.default_rng(0)
    chain = optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2))
    model = Trainable(Residual(nnx.Rngs(0)), loss=lambda module, batch: ((module(batch[0]) - batch[1]) ** 2).mean(), optimizer=chain)
    return model, rng.normal(size=(ROWS, 6)), rng.normal(size=(ROWS, 1))


def of_zoo(make, **options):
    return lambda: make(rows=ROWS, **options)


MODELS = {
    "adam": of_zoo(models.deep),
    "momentum": lambda: models.mlp(rows=ROWS, optimizer=keras.optimizers.SGD(0.1, momentum=0.9)),
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
    history = fit(model, x, y, plan=plan, verbose=0, **({"batch_size": 8, "epochs": 2} | options))
    scores = evaluate(model, x, y, batch_size=8, verbose=0, return_dict=True, plan=plan)
    outputs = predict(model, x, batch_size=8, verbose=0, plan=plan)
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
        pytest.param("adam", "pipeline=8,microbatches=4,schedule=gpipe", marks=pytest.mark.slow),
        ("momentum", "pipeline=3,microbatches=2,schedule=zb-h1"),
        pytest.param("regularised", "pipeline=4,microbatches=4,schedule=list", marks=pytest.mark.slow),
        pytest.param("skips", "pipeline=4,microbatches=4,schedule=zb-h1", marks=pytest.mark.slow),
        ("skips", "pipeline=2,microbatches=4,schedule=interleaved,interleave=2"),
        ("tied", "pipeline=4,microbatches=2"),
        pytest.param("ends", "pipeline=3,microbatches=4,schedule=gpipe", marks=pytest.mark.slow),
        pytest.param("subclassed", "pipeline=2,microbatches=4,schedule=list", marks=pytest.mark.slow),
        pytest.param("convolutional", "pipeline=4,microbatches=2", marks=pytest.mark.slow),
        pytest.param("lstm", "pipeline=2,microbatches=2,schedule=zb-h1", marks=pytest.mark.slow),
        pytest.param("gru", "pipeline=3,microbatches=4", marks=pytest.mark.slow),
        pytest.param("blocks", "pipeline=4,microbatches=4,schedule=interleaved,interleave=2", marks=pytest.mark.slow),
        ("module", "pipeline=2,microbatches=4,schedule=zb-h1"),
    ],
)
def test_a_pipeline_gives_the_numbers_of_one_device(name, plan):
    same_as_one_device(MODELS[name], plan)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("adam", "pipeline=2,data=2,microbatches=2"),
        pytest.param("adam", "pipeline=2,data=2,microbatches=4,zero=1,schedule=zb-h1", marks=pytest.mark.slow),
        pytest.param("skips", "pipeline=2,data=2,microbatches=2,zero=3,schedule=gpipe", marks=pytest.mark.slow),
        ("adam", "pipeline=2,tensor=2,microbatches=4"),
        pytest.param("blocks", "pipeline=2,data=2,tensor=2,microbatches=2,recompute=blocks", marks=pytest.mark.slow),
        pytest.param("adam", "pipeline=3,microbatches=4,recompute=blocks,schedule=zb-h1", marks=pytest.mark.slow),
    ],
)
def test_other_axes_and_words_inside_stages(name, plan):
    same_as_one_device(MODELS[name], plan)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: keras.optimizers.Adam(1e-2, global_clipnorm=0.05),
        pytest.param(
            lambda: keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.1, 20), use_ema=True, ema_overwrite_frequency=3),
            marks=pytest.mark.slow,
        ),
        pytest.param(lambda: keras.optimizers.Adafactor(1e-2), marks=pytest.mark.slow),
        pytest.param(lambda: keras.optimizers.AdamW(1e-2, weight_decay=0.1, clipnorm=0.05), marks=pytest.mark.slow),
    ],
)
def test_updates_of_all_kinds(optimizer):
    same_as_one_device(lambda: models.deep(rows=ROWS, optimizer=optimizer()), "pipeline=3,microbatches=2")


@pytest.mark.usefixtures("float64")
def test_whole_batches_may_tie_their_rows():
    """BatchNorm and Dropout: without microbatches a stage sees the batch as one device does."""
    same_as_one_device(lambda: models.normalised(rows=ROWS), "pipeline=3")


@pytest.mark.usefixtures("float64")
def test_validation_callbacks_and_generators():
    class Halved(keras.callbacks.Callback):
        model: keras.Model

        def on_epoch_end(self, epoch, logs=None):
            self.model.optimizer.learning_rate = float(self.model.optimizer.learning_rate) / 2

        def on_train_batch_end(self, batch, logs=None):
            self.model.layers[0].bias.assign(self.model.layers[0].bias * 0.9)

    callbacks = [Halved(), keras.callbacks.EarlyStopping("loss", restore_best_weights=True)]
    same_as_one_device(lambda: models.deep(rows=ROWS), "pipeline=3,microbatches=4", callbacks=callbacks, validation_split=0.3)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1"])
def test_stages_keep_what_the_schedule_says(schedule, monkeypatch):
    most: dict[int, int] = {}

    class Counted(dict):
        def __setitem__(self, key, value):
            super().__setitem__(key, value)
            most[key[0]] = max(most.get(key[0], 0), sum(stage == key[0] for stage, _ in self))

    def counted(self, *arguments, make=Line.__init__):
        make(self, *arguments)
        self.kept = Counted()

    monkeypatch.setattr(Line, "__init__", counted)
    model, x, y = models.deep(rows=16)
    fit(model, x, y, batch_size=16, plan=f"pipeline=4,microbatches=8,schedule={schedule}", verbose=0)
    assert tuple(most[stage] for stage in range(4)) == make_grid(schedule, devices=4, microbatches=8).in_flight


def test_losses_that_are_not_finite_end_training():
    model, x, y = models.deep(rows=32, optimizer=keras.optimizers.SGD(1e30))
    before = model.get_weights()
    with pytest.raises(NonFiniteLossError):
        fit(model, x, y, batch_size=8, epochs=3, plan="pipeline=2,microbatches=2", verbose=0)
    assert all(np.isfinite(weight).all() for weight in model.get_weights())
    assert len(before) == len(model.get_weights())


REFUSED = {
    "pipeline=8,interleave=4,schedule=list,microbatches=8": (
        "linear",
        "a pipeline of 32 stages needs 31 places to cut, and the network has",
    ),
    "pipeline=2,microbatches=2": ("own_train_step", "has its own 'train_step"),
    "pipeline=2,interleave=2,microbatches=4": ("deep", "schedule '1f1b' has one stage a device, so interleave=2 is not for it"),
    "pipeline=2,interleave=2,microbatches=3,schedule=interleaved": ("deep", "microbatches"),
    "pipeline=2,microbatches=4,schedule=gpipe": ("normalised", "normalises by the statistics of the batch"),
    "pipeline=3,microbatches=4": ("dropped", "it draws random numbers for all rows of a batch at a time"),
    "pipeline=2,microbatches=4": ("masked", "layer 'embedding.*' masks, so that parts of a batch weigh differently"),
    "pipeline=2,microbatches=4,statistics=microbatch": ("deep", "statistics=microbatch does not run in a pipeline yet"),
    "interleave=2": ("deep", "is of pipelines, and the plan has none"),
    "pipeline=16": ("deep", "wants 16 devices, but there are 8"),
}


@pytest.mark.parametrize("plan", REFUSED)
def test_refused(plan):
    name, reason = REFUSED[plan]
    if name == "linear":
        model, x, y = models.linear(), np.ones((8, 4)), np.ones((8, 1))
    elif name == "dropped":
        network = [keras.Input((4,)), *(layers.Dense(8, "relu") for _ in range(4)), layers.Dropout(0.5), layers.Dense(3, "softmax")]
        model, x, y = models.compiled(keras.Sequential(network)), np.ones((8, 4)), np.ones((8, 1))
    elif name == "masked":
        network = [
            keras.Input((4,), dtype="int32"),
            layers.Embedding(5, 4, mask_zero=True),
            layers.GRU(4),
            layers.Dense(4),
            layers.Dense(3, "softmax"),
        ]
        model, x, y = models.compiled(keras.Sequential(network)), np.ones((8, 4), "int32"), np.ones((8, 1))
    else:
        model, x, y = getattr(models, name)(rows=8)
    with pytest.raises(PlanError, match=reason):
        fit(model, x, y, plan=plan, verbose=0)


@pytest.mark.parametrize(
    "optimizer", [keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam()), keras.optimizers.Adam(gradient_accumulation_steps=2)]
)
def test_updates_that_cannot_be_cut_are_refused(optimizer):
    model, x, y = models.deep(rows=16, optimizer=optimizer)
    with pytest.raises(PlanError, match="ties weights of several stages in one operation"):
        fit(model, x, y, plan="pipeline=2,microbatches=2", verbose=0)
