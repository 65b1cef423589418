"""Microbatches mean what their batch means: its random numbers, its sums and means, its weights and masks."""

import functools
from typing import Any

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
from parafit.techniques.microbatches import PartLoss

ROWS = 22  # batches of 8, and a last one of 6

rng = np.random.default_rng(0)
VECTORS = rng.normal(size=(ROWS, 12))
SEQUENCES = rng.normal(size=(ROWS, 5, 4))
IMAGES = rng.uniform(size=(ROWS, 6, 6, 3))
TOKENS = rng.integers(0, 4, (ROWS, 6)).astype("int32")
LABELS = rng.integers(0, 3, ROWS).astype("int32")


def classifier(x, *hidden, loss: Any = "sparse_categorical_crossentropy"):
    model = keras.Sequential([keras.Input(x.shape[1:]), *hidden, layers.Flatten(), layers.Dense(3, "softmax")])
    model.compile(keras.optimizers.Adam(1e-2), loss, metrics=["accuracy"])
    return model, x, LABELS


def attentive():
    inputs = keras.Input((5, 4))
    hidden = layers.MultiHeadAttention(2, 3, dropout=0.3, seed=4)(inputs, inputs)
    model = keras.Model(inputs, layers.Dense(3, "softmax")(layers.GlobalAveragePooling1D()(hidden)))
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model, SEQUENCES, LABELS


LAYOUTS = ("data=2", "data=2,tensor=2", "data=2,zero=1", "recompute=blocks", "data=4,zero=2,recompute=blocks")

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
    "turns": lambda: classifier(
        IMAGES, layers.RandomRotation(0.2, seed=1), layers.RandomTranslation(0.2, 0.2, seed=1), layers.Conv2D(4, 3)
    ),
    "contrast": lambda: classifier(IMAGES, layers.RandomContrast(0.5, value_range=(0, 1), seed=1), layers.RandomZoom(0.3, seed=2)),
}


def chosen(names, quick):
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


def trained(make, plan, **options: Any):
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(3)
    model, x, y = make()
    history = parafit.fit(model, x, y, plan=plan, batch_size=8, epochs=2, verbose=0, **options).history
    variables = (*model.variables, *model.optimizer.variables)
    return [np.asarray(value) for value in history.values()] + [np.asarray(variable) for variable in variables]


@functools.cache
def alone(make, plan="single"):
    return trained(make, plan)


def assert_same(ours, theirs):
    for one, other in zip(theirs, ours, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-12, atol=1e-13)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", chosen(RANDOM, {"dropout", "attention", "flips"}))
def test_random_layers_draw_the_rows_of_the_whole_batch(name):
    assert_same(trained(RANDOM[name], "microbatches=3"), alone(RANDOM[name]))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("plan", chosen(LAYOUTS, {"data=2", "recompute=blocks"}))
def test_random_layers_on_other_layouts(plan):
    assert_same(trained(RANDOM["dropout"], plan + ",microbatches=2"), alone(RANDOM["dropout"]))


class _Adding(keras.Model):
    """Adds a loss that sums over the rows."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = layers.Dense(6), layers.Dense(3, "softmax")

    def call(self, x):
        hidden = self.inner(x)
        self.add_loss(1e-2 * keras.ops.sum(hidden**2))
        return self.outer(hidden)


def adding():
    model = _Adding()
    model.compile(keras.optimizers.Adam(1e-2), "sparse_categorical_crossentropy")
    return model, VECTORS, LABELS


def summing(reduction):
    return lambda: classifier(VECTORS, layers.Dense(8), loss=keras.losses.SparseCategoricalCrossentropy(reduction=reduction))


def masked():
    """A loss over the positions that a mask leaves: some rows have one, others six."""
    model = keras.Sequential([keras.Input((6,), dtype="int32"), layers.Embedding(4, 5, mask_zero=True), layers.Dense(3, "softmax")])
    model.compile(keras.optimizers.Adam(1e-2), "sparse_categorical_crossentropy", weighted_metrics=["accuracy"])
    return model, TOKENS, np.broadcast_to(LABELS[:, None], TOKENS.shape)


def masked_sequences():
    x = SEQUENCES * (np.arange(5) < 1 + LABELS[:, None])[:, :, None]
    model = keras.Sequential([keras.Input((5, 4)), layers.Masking(), layers.LSTM(5, return_sequences=True), layers.Dense(3, "softmax")])
    model.compile(keras.optimizers.Adam(1e-2), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model, x, np.broadcast_to(LABELS[:, None], x.shape[:2])


def several_losses():
    inputs = keras.Input((12,))
    hidden = layers.Dropout(0.3, seed=1)(layers.Dense(8, "relu", kernel_regularizer="l2", activity_regularizer="l1")(inputs))
    model = keras.Model(inputs, {"kind": layers.Dense(3, "softmax")(hidden), "size": layers.Dense(1)(hidden)})
    losses = {"kind": "sparse_categorical_crossentropy", "size": keras.losses.MeanSquaredError(reduction="sum")}
    model.compile(keras.optimizers.Adam(1e-2), losses, loss_weights={"kind": 2.0, "size": 0.1}, metrics={"kind": ["accuracy"]})
    return model, VECTORS, {"kind": LABELS, "size": VECTORS[:, :1]}


def normed():
    return classifier(VECTORS, layers.SpectralNormalization(layers.Dense(8)), layers.LayerNormalization())


WEIGHED = {
    "sum": summing("sum"),
    "weighted_mean": summing("mean_with_sample_weight"),
    "add_loss": adding,
    "activity": lambda: classifier(VECTORS, layers.Dense(8, activity_regularizer="l2", kernel_regularizer="l1")),
    "masked": masked,
    "masked_sequences": masked_sequences,
    "several": several_losses,
    "normed": normed,
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", chosen(WEIGHED, {"masked", "several"}))
def test_sums_masks_and_penalties_weigh_what_they_weigh_in_the_batch(name):
    assert_same(trained(WEIGHED[name], "data=2,microbatches=3"), alone(WEIGHED[name]))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean_with_sample_weight", "sum"])
def test_weights_of_rows_and_classes(reduction):
    make = summing(reduction)
    for options in ({"sample_weight": np.linspace(0, 2, ROWS)}, {"class_weight": {0: 1.0, 1: 5.0, 2: 0.0}}):
        assert_same(trained(make, "microbatches=3", **options), trained(make, "single", **options))


# Flax ---------------------------------------------------------------------------------------------------------------------------------


class Net(nnx.Module):
    def __init__(self, rngs, *, draw):
        self.inner, self.outer = (nnx.Linear(*sizes, param_dtype=float, rngs=rngs) for sizes in ((12, 8), (8, 3)))
        self.drop, self.rngs, self.draw = nnx.Dropout(0.3, rngs=rngs), rngs, draw

    def __call__(self, x):
        return self.outer(self.drop(self.draw(self.rngs, jnp.tanh(self.inner(x)))))


def noisy(rngs, x):
    return x + 0.1 * jax.random.normal(rngs.noise(), x.shape, x.dtype)


def by_row(rngs, x):
    keys = jax.random.split(rngs.noise(), x.shape[0])
    return x * jax.vmap(lambda key: jax.random.uniform(key, (8,), x.dtype))(keys)


def across(rngs, x):
    """Rows in the second dimension, and in the first one with others."""
    turned = x.T * jax.random.bernoulli(rngs.noise(), 0.7, x.T.shape)
    flat = turned.T.reshape(-1)
    return (flat * jax.random.uniform(rngs.noise(), flat.shape, x.dtype)).reshape(x.shape)


def in_checkpoint(rngs, x):
    key = rngs.noise()
    return jax.checkpoint(lambda x: jnp.sin(x) * jax.random.bernoulli(key, 0.7, x.shape))(x)


def in_scan(rngs, x):
    keys = jax.random.split(rngs.noise(), 3)
    return jax.lax.scan(lambda x, key: (jnp.tanh(x * jax.random.uniform(key, x.shape, x.dtype)), None), x, keys)[0]


def in_branch(rngs, x):
    key = rngs.noise()
    drop = lambda x: x * jax.random.bernoulli(key, 0.7, x.shape)  # noqa: E731
    return jax.lax.cond(jax.random.bernoulli(key, 0.5), drop, lambda x: x, x)


DRAWS = (noisy, by_row, across, in_checkpoint, in_scan, in_branch)


def entropy(module, batch):
    x, y = batch
    logits = module(x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), {"largest": logits.max(-1).mean()}


def flax(draw, plan, loss=entropy, batch_size=8):
    keras.utils.set_random_seed(3)
    module = Net(nnx.Rngs(0), draw=draw)
    model = Trainable(module, loss=loss, optimizer=optax.adam(1e-2))
    history = parafit.fit(model, VECTORS, LABELS, plan=plan, batch_size=batch_size, epochs=2, verbose=0).history
    state = nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngKey)))
    return [np.asarray(leaf) for leaf in jax.tree.leaves((history, state))]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("draw", chosen(DRAWS, {across, in_scan}))
def test_flax_modules_draw_the_rows_of_the_whole_batch(draw):
    assert_same(flax(draw, "data=2,microbatches=2"), flax(draw, "single"))


def permuted(rngs, x):
    return 0.5 * x + 0.5 * jax.random.permutation(rngs.noise(), x)


def poisson(rngs, x):
    return x * jax.random.poisson(rngs.noise(), 3.0, x.shape)


def numbered(rngs, x):
    key = rngs.noise()
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(x.shape[0]))
    return x * jax.vmap(lambda key: jax.random.uniform(key, (8,), x.dtype))(keys)


def perplexed(module, batch):
    loss, _ = entropy(module, batch)
    return loss, {"perplexity": jnp.exp(loss)}


def last_row(rngs, x):
    return x - x[-1:]


REFUSED = {
    permuted: "runs along the rows",
    poisson: "again and again until all have what they need",
    numbered: "makes random keys of row numbers",
    last_row: "leaves rows out|reduces all rows|ties its rows",
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("draw", REFUSED)
def test_what_ties_rows_is_refused_with_the_reason(draw):
    with pytest.raises(PlanError, match=REFUSED[draw]):
        flax(draw, "microbatches=2")


@pytest.mark.usefixtures("float64")
def test_a_measure_that_is_no_mean_is_refused():
    with pytest.raises(PlanError, match=r"'perplexity' is no sum or mean over the rows .*exp"):
        flax(noisy, "microbatches=2", loss=perplexed)


# The numbers themselves -----------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("width", [8, 16, 32, 64])
@pytest.mark.parametrize(("shape", "dim"), [((12,), 0), ((12, 5), 0), ((3, 12, 2), 1), ((24, 2), 0), ((2, 12), 1)])
def test_bits_of_rows_are_those_of_the_whole_draw(shape, dim, width):
    numbers = jnp.array([1, 3, 4, 11])
    places = np.concatenate([np.arange(shape[dim]).reshape(12, -1)[number] for number in np.asarray(numbers)])
    for kind in ("threefry2x32", "rbg"):
        key = jax.random.key(5, impl=kind)
        ours = jax.jit(lambda key: bits_of_rows(key, numbers, shape=shape, dim=dim, rows=12, bit_width=width))(key)
        np.testing.assert_array_equal(ours, np.take(np.asarray(jax.random.bits(key, shape, f"uint{width}")), places, dim))


def test_masks_are_bitwise_those_of_the_whole_batch():
    model = keras.Sequential([keras.Input((7,)), layers.Dropout(0.5, seed=1), layers.GaussianNoise(0.5, seed=2)])
    model.compile("sgd", "mse")
    adapter = parafit.adapters.adapter_of(model, "fit")
    batch = jnp.ones((12, 7)), jnp.ones((12, 7))
    adapter.build(lambda: batch)
    step = adapter.train_step()
    state, part = step.read(), PartLoss(step.parts.loss, step.read(), batch, 4)
    _, (_, whole, seeds, _) = step.parts.loss(state.weights, state, batch)
    for numbers in (np.arange(4), np.array([2, 3, 8, 9])):
        rows = jax.tree.map(lambda array: array[numbers], batch)  # noqa: B023  (called at once)
        _, (_, ours, others, _) = part(state.weights, state, rows, jnp.asarray(numbers), part.known(state, batch))
        np.testing.assert_array_equal(ours, whole[numbers])
        jax.tree.map(np.testing.assert_array_equal, list(others), list(seeds))


# Statistics of microbatches -------------------------------------------------------------------------------------------------------------


def batch_normalised(optimizer=None):
    hidden = layers.Dense(8, use_bias=False), layers.BatchNormalization(), layers.ReLU(), layers.Dropout(0.2, seed=1)
    model, x, y = classifier(VECTORS, *hidden)
    model.compile(optimizer or keras.optimizers.Adam(1e-2), model.loss, metrics=["accuracy"])
    return model, x, y


def test_batch_statistics_are_refused_by_default():
    with pytest.raises(PlanError, match=r"normalises by the statistics of the batch.* or add statistics=microbatch"):
        trained(batch_normalised, "microbatches=2")


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("plan", chosen(LAYOUTS, {"data=2"}))
def test_statistics_of_microbatches_do_not_depend_on_the_layout(plan):
    words = ",microbatches=3,statistics=microbatch"
    assert_same(trained(batch_normalised, plan + words), alone(batch_normalised, words[1:]))


@pytest.mark.usefixtures("float64")
def test_microbatches_are_consecutive_rows_that_move_averages_in_turn():
    """With weights that stay as they are, microbatches of 4 leave the averages that batches of 4 leave, and their mean loss."""

    def make():
        return batch_normalised(keras.optimizers.SGD(0.0))

    def averages(plan, batch_size):
        keras.utils.set_random_seed(3)
        model, x, y = make()
        model.layers[3].rate = 0.0
        found = parafit.fit(model, x[:16], y[:16], plan=plan, batch_size=batch_size, shuffle=False, verbose=0).history
        return [*map(np.asarray, found.values()), *(np.asarray(variable) for variable in model.layers[1].non_trainable_variables)]

    for plan in ("microbatches=4,statistics=microbatch", "data=2,microbatches=4,statistics=microbatch"):
        assert_same(averages(plan, 16), averages("single", 4))


@pytest.mark.usefixtures("float64")
def test_rows_compared_with_each_other_are_those_of_a_microbatch():
    def contrast(module, batch):
        x, _ = batch
        z = module(x)
        return optax.softmax_cross_entropy_with_integer_labels(z @ z.T, jnp.arange(z.shape[0])).mean() + (z @ z.T).mean()

    def keep(rngs, x):
        return x

    with pytest.raises(PlanError, match="compares rows with each other"):
        flax(keep, "microbatches=2", contrast)
    one, two = (flax(keep, plan + "microbatches=2,statistics=microbatch", contrast) for plan in ("", "data=2,"))
    assert_same(one, two)
