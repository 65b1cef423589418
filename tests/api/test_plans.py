"""Every plan gives the numbers of one device: weights, optimizer state, history, scores and predictions, in float64 to 1e-12."""

import functools
import math

import jax
import keras
import numpy as np
import pytest
from keras import layers

import parafit
from parafit.adapters import adapter_of
from parafit.errors import PlanError
from parafit.execution.runner import settle
from parafit.planner.partition import Partition
from parafit.planning import step_program
from tests.zoo import own_train_step, programs

ROWS = 28  # a batch of 16 and a short one of 12, which 8 devices do not divide

ADAM = functools.partial(keras.optimizers.Adam, 1e-2)


def mlp():
    return _classifier([layers.Dense(16, "relu"), layers.Dense(24, "tanh"), layers.Dense(8)], (12,))


def normalised():
    # No bias before a normalisation: its gradient is zero but for rounding, which Adam would blow up into an update.
    hidden = [layers.Dense(16, use_bias=False), layers.BatchNormalization(), layers.Activation("relu"), layers.Dropout(0.3, seed=3)]
    return _classifier([*hidden, layers.Dense(8)], (12,), keras.optimizers.RMSprop(1e-2, momentum=0.5))


def regularised():
    dense = layers.Dense(16, "tanh", kernel_regularizer=keras.regularizers.L2(1e-2), kernel_constraint=keras.constraints.MaxNorm(1.0))
    return _classifier([dense, layers.Dense(8, bias_regularizer="l1")], (12,), keras.optimizers.SGD(1e-1, momentum=0.9, nesterov=True))


def averaged():
    return _classifier([layers.Dense(16, "relu"), layers.Dense(8)], (12,), ADAM(use_ema=True, ema_momentum=0.9, global_clipnorm=0.5))


def convolutional():
    hidden = [layers.Conv2D(8, 3, activation="relu"), layers.MaxPooling2D(), layers.Conv2D(16, 2), layers.GlobalAveragePooling2D()]
    return _classifier([*hidden, layers.Dense(8)], (8, 8, 2))


def lstm():
    return _classifier([layers.LSTM(6, return_sequences=True), layers.LSTM(4), layers.Dense(16, "relu")], (5, 3))


def gru():
    return _classifier([layers.GRU(6), layers.Dense(16, "relu")], (5, 3), keras.optimizers.AdamW(1e-2, clipnorm=1.0))


def embedded():
    hidden = [layers.Embedding(24, 8), layers.GlobalAveragePooling1D(), layers.Dense(16, "relu")]
    model = keras.Sequential([keras.Input((6,), dtype="int32"), *hidden, layers.Dense(3, "softmax")])
    return _compiled(model, keras.optimizers.SGD(0.1)), _tokens(6, 24), _labels()


def transformer(attention=lambda: layers.MultiHeadAttention(8, 2, dropout=0.1, seed=4)):
    tokens = keras.Input((6,), dtype="int32")
    hidden = layers.Embedding(20, 8)(tokens)
    normal = layers.LayerNormalization()(hidden)
    hidden = layers.Add()([hidden, attention()(normal, normal)])
    inner = layers.Dense(16, "gelu")(layers.LayerNormalization()(hidden))
    hidden = layers.Add()([hidden, layers.Dense(8)(inner)])
    outputs = layers.Dense(3, "softmax")(layers.GlobalAveragePooling1D()(hidden))
    return _compiled(keras.Model(tokens, outputs)), _tokens(6, 20), _labels()


def grouped_queries():
    # Without dropout Keras calls jax.nn.dot_product_attention, which rounds to float32 whatever the dtype.
    return transformer(lambda: layers.GroupQueryAttention(2, 8, 4, dropout=0.1, seed=4))


def many_inputs_and_outputs():
    left, right = keras.Input((6,), name="left"), keras.Input((5,), name="right")
    hidden = layers.Concatenate()([layers.Dense(8, "relu")(left), layers.Dense(8, "relu")(right)])
    hidden = layers.Dense(16, "relu")(hidden)
    kind, size = layers.Dense(3, "softmax", name="kind")(hidden), layers.Dense(1, name="size")(hidden)
    model = keras.Model({"left": left, "right": right}, {"kind": kind, "size": size})
    model.compile(
        ADAM(),
        {"kind": "sparse_categorical_crossentropy", "size": "mse"},
        loss_weights={"kind": 1.0, "size": 0.5},
        metrics={"kind": ["accuracy"], "size": ["mae"]},
    )
    rng = np.random.default_rng(0)
    x = {"left": rng.normal(size=(ROWS, 6)), "right": rng.normal(size=(ROWS, 5))}
    return model, x, {"kind": _labels(), "size": rng.normal(size=(ROWS, 1))}


def skipping():
    inputs = keras.Input((12,))
    hidden = layers.Dense(16, "relu")(inputs)
    hidden = layers.Add()([layers.Dense(12)(hidden), inputs])
    model = keras.Model(inputs, layers.Dense(3, "softmax")(layers.Dense(8, "relu")(hidden)))
    return _compiled(model, keras.optimizers.Adagrad(1e-1)), _numbers((12,)), _labels()


class _Block(keras.Model):
    def __init__(self):
        super().__init__()
        self.inner, self.back, self.outer = layers.Dense(16, "relu"), layers.Dense(12), layers.Dense(3, "softmax")

    def call(self, x):
        hidden = x + self.back(self.inner(x))
        self.add_loss(1e-3 * keras.ops.mean(hidden**2))
        return self.outer(hidden)


def subclassed():
    return _compiled(_Block()), _numbers((12,)), _labels()


MODELS = {
    make.__name__: make
    for make in (
        mlp,
        normalised,
        regularised,
        averaged,
        convolutional,
        lstm,
        gru,
        embedded,
        transformer,
        grouped_queries,
        many_inputs_and_outputs,
        skipping,
        subclassed,
        own_train_step,
    )
}
LAYOUTS = (
    "data=8",
    "tensor=8",
    "data=2,tensor=4",
    "data=4,tensor=2",
    "data=8,zero=1",
    "data=8,zero=2",
    "data=8,zero=3",
    "data=2,tensor=4,zero=3",
    "data=8,zero=3,store_group=4",
)
INSIDE = ("microbatches=4", "data=2,tensor=2,microbatches=3", "recompute=blocks", "data=4,zero=2,microbatches=2,recompute=blocks")
COUPLED = {
    "normalised": "layer 'batch_normalization' normalises by the statistics of the batch",
    "transformer": "it draws random numbers for all rows of a batch",
    "grouped_queries": "it draws random numbers for all rows of a batch",
    "own_train_step": "this model's class has its own 'train_step'",
}
QUICK = {
    ("mlp", "data=8"),
    ("mlp", "tensor=8"),
    ("transformer", "data=2,tensor=4"),
    ("convolutional", "data=4,tensor=2"),
    ("averaged", "data=8,zero=1"),
    ("normalised", "data=8,zero=2"),
    ("skipping", "data=8,zero=3"),
    ("regularised", "data=2,tensor=4,zero=3"),
    ("embedded", "data=8,zero=3,store_group=4"),
    ("many_inputs_and_outputs", "microbatches=4"),
    ("subclassed", "data=2,tensor=2,microbatches=3"),
    ("gru", "recompute=blocks"),
    ("mlp", "data=4,zero=2,microbatches=2,recompute=blocks"),
    ("own_train_step", "data=8,zero=2"),
}


def cases():
    for name in MODELS:
        for plan in (*LAYOUTS, *INSIDE):
            refused = name in COUPLED and ("microbatches" in plan or (name == "own_train_step" and "recompute" in plan))
            if not refused:
                yield pytest.param(name, plan, marks=() if (name, plan) in QUICK else pytest.mark.slow, id=f"{name}-{plan}")


def trained(make, plan, batch_size=16, **options):
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(11)
    model, x, y = make()
    history = parafit.fit(model, x, y, plan=plan, verbose=0, batch_size=batch_size, epochs=2, **options)
    scores = parafit.evaluate(model, x, y, batch_size=ROWS, verbose=0, return_dict=True, plan=plan)
    outputs = parafit.predict(model, x, batch_size=ROWS, verbose=0, plan=plan)
    state = model.get_weights() + [variable.numpy() for variable in model.optimizer.variables]
    return keras.tree.flatten((history.history, scores, outputs, state))


@functools.cache
def on_one_device(name):
    return trained(MODELS[name], "single")


def assert_same(ours, theirs):
    # The floor is for numbers that are zero but for rounding, such as the bias of an attention's keys.
    for one, many in zip(theirs, ours, strict=True):
        np.testing.assert_allclose(many, one, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("name", "plan"), list(cases()))
def test_a_plan_gives_the_numbers_of_one_device(name, plan):
    assert_same(trained(MODELS[name], plan), on_one_device(name))


@pytest.mark.usefixtures("float64")
def test_a_layout_that_is_broken_on_purpose_fails_the_comparison(monkeypatch):
    reference, spoiled = on_one_device("mlp"), parafit.placement.Placement.bring_home
    monkeypatch.setattr(parafit.placement.Placement, "bring_home", lambda self, array: spoiled(self, array) * (1 + 1e-9))
    with pytest.raises(AssertionError):
        assert_same(trained(mlp, "data=2,tensor=4"), reference)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("plan", ["data=2,tensor=2", pytest.param("microbatches=3", marks=pytest.mark.slow)])
def test_sample_weights_and_validation(plan):
    weights = np.random.default_rng(5).uniform(size=ROWS)
    one, many = (trained(mlp, each, sample_weight=weights, validation_split=0.25, batch_size=5) for each in ("single", plan))
    assert_same(many, one)


@pytest.mark.parametrize("name", COUPLED)
def test_batches_that_cannot_be_cut_are_refused(name):
    model, x, y = MODELS[name]()
    with pytest.raises(PlanError, match=COUPLED[name]):
        parafit.fit(model, x, y, plan="microbatches=2", verbose=0)


def test_a_loss_that_sums_over_the_batch_is_found_out():
    class Summing(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3)

        def call(self, x):
            hidden = self.dense(x)
            self.add_loss(keras.ops.sum(hidden**2))
            return hidden

    model = Summing()
    model.compile("sgd", "mse")
    with pytest.raises(PlanError, match="it sums over the batch, or ties its rows"):
        parafit.fit(model, np.ones((8, 4)), np.ones((8, 3)), plan="microbatches=2", verbose=0)


@pytest.mark.parametrize("loss", [keras.losses.Tversky(), keras.losses.Dice()], ids=["tversky", "dice"])
def test_a_loss_that_divides_by_sums_over_the_batch_is_found_out(loss):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, "sigmoid")])
    model.compile("sgd", loss)
    labels = np.random.default_rng(0).integers(0, 2, (8, 3))
    with pytest.raises(PlanError, match="it sums over the batch, or ties its rows"):
        parafit.fit(model, _numbers((4,))[:8], labels, plan="microbatches=2", verbose=0)


REFUSED = {
    "pipeline=2": "this version prices pipeline=2 but does not run it",
    "data=2,interleave=2": "this version prices interleave=2 but does not run it",
    "tensor=7": "axis tensor=7 splits nothing in 'sequential': 7 divides none of the dims",
    "data=8,zero=1,store_group=3": "store_group=3",
}


@pytest.mark.parametrize("plan", REFUSED)
def test_refuses(plan):
    model, x, y = mlp()
    with pytest.raises(PlanError, match=REFUSED[plan]):
        parafit.fit(model, x, y, plan=plan, verbose=0)


def test_refuses_a_dim_that_the_model_does_not_have():
    model, x, y = mlp()
    plan = parafit.Plan(axes={"tensor": 2}, compute={"ffn": "tensor"})
    with pytest.raises(PlanError, match="maps 'ffn' to axis 'tensor', but 'sequential' has no such dim: it has"):
        parafit.fit(model, x, y, plan=plan, verbose=0)


def test_stored_state_takes_its_part_of_the_memory():
    held = {}
    for plan in ("data=8", "data=8,zero=1", "data=8,zero=3"):
        model = keras.Sequential([keras.Input((64,)), layers.Dense(512, "relu"), layers.Dense(64)])
        model.compile("adam", "mse")
        parafit.fit(model, np.ones((8, 64), "float32"), np.ones((8, 64), "float32"), plan=plan, batch_size=8, verbose=0)
        held[plan] = programs(model)[0].argument_bytes
    weights = held["data=8"] / 3
    assert held["data=8,zero=1"] == pytest.approx(weights * (1 + 2 / 8), rel=0.02)
    assert held["data=8,zero=3"] == pytest.approx(weights * 3 / 8, rel=0.04)


def test_recomputation_saves_memory_and_leaves_the_numbers():
    temporary, weights = [], []
    for plan in ("single", "recompute=blocks"):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((16,)), *[layers.Dense(16, "gelu") for _ in range(12)], layers.Dense(1)])
        model.compile("sgd", "mse")
        x = np.random.default_rng(0).normal(size=(1024, 16)).astype("float32")
        parafit.fit(model, x, x[:, :1], plan=plan, batch_size=1024, verbose=0)
        temporary.append(programs(model)[0]._compiling.result().memory_analysis().temp_size_in_bytes)
        weights.append(model.get_weights())
    assert temporary[1] < 0.6 * temporary[0]
    for one, again in zip(*weights):
        np.testing.assert_allclose(again, one, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("float64")
def test_a_plan_may_leave_devices_idle():
    """Seven of eight, which divide both batches, and say so; five of eight, which divide neither."""
    for plan in ("data=7", "data=5"):
        assert_same(trained(mlp, plan, batch_size=14), trained(mlp, "single", batch_size=14))


def test_a_batch_that_is_not_split_is_said(capsys):
    model, x, y = mlp()
    parafit.fit(model, x, y, plan="data=8", batch_size=14, verbose=2)
    text = "data=8 does not divide a batch of 14 rows: every device computes all of them, 8 times its part (8 or 16 rows would be split)"
    assert text in capsys.readouterr().out


def test_the_model_is_left_whole_on_one_device():
    model, x, y = mlp()
    parafit.fit(model, x, y, plan="data=2,tensor=2,zero=3", verbose=0)
    assert {device for variable in model.variables for device in variable.value.devices()} == {jax.devices()[0]}
    model.fit(x, y, verbose=0)


def _classifier(hidden, shape, optimizer=None):
    model = keras.Sequential([keras.Input(shape), *hidden, layers.Dense(3, "softmax")], name="sequential")
    return _compiled(model, optimizer), _numbers(shape), _labels()


def _compiled(model, optimizer=None):
    model.compile(optimizer or ADAM(), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def _numbers(shape):
    return np.random.default_rng(0).normal(size=(ROWS, *shape))


def _tokens(length, vocabulary):
    return np.random.default_rng(0).integers(0, vocabulary, (ROWS, length)).astype("int32")


def _labels():
    return np.random.default_rng(1).integers(0, 3, ROWS).astype("int32")


@pytest.mark.parametrize("plan", ["data=8,zero=1", "data=8,zero=3", "data=4,tensor=2,zero=1", "data=8,zero=1,store_group=4"])
@pytest.mark.parametrize("optimizer", ["adafactor", "adam", "ftrl", "sgd"])
def test_state_is_priced_as_it_is_placed(optimizer, plan):
    """Adafactor's row and column means are not like their parameters: they stay whole, as do dimensions that the axis does not divide."""
    model = keras.Sequential([keras.Input((24,)), layers.Dense(40, "relu"), layers.Dense(36, "relu"), layers.Dense(9)])
    model.compile(optimizer, "mse")
    batch = np.ones((16, 24), "float32"), np.ones((16, 9), "float32")
    adapter = adapter_of(model, "fit")
    adapter.build(lambda: batch)
    step = adapter.train_step()
    program = step_program(step, batch, "network")
    placement = settle(parafit.placement.Placement(parafit.Plan.parse(plan)), step, lambda: program)
    held = [(owner, array) for owners, arrays in zip(step.owners[1], step.read()) for owner, array in zip(owners, arrays)]
    for role in ("parameter", "slot", "state"):
        placed = sum(_bytes_on_a_device(placement.stored(owner, array), array) for owner, array in held if owner.role == role)
        partition = Partition(program, placement.plan)
        assert sum(partition.stored_bytes(tensor) * tensor.count for tensor in program.of_role(role)) == placed, role


def _bytes_on_a_device(sharding, array):
    return math.prod(sharding.shard_shape(array.shape)) * array.dtype.itemsize
