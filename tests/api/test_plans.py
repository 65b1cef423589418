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
from parafit.planner.partition import Partition
from parafit.planning import place
from parafit.techniques.program import step_program
from tests import models
from tests.models import programs

ROWS = 28  # a batch of 16 and a short one of 12, which 8 devices do not divide

ADAM = functools.partial(keras.optimizers.Adam, 1e-2)
NETWORKS = {
    "deep": (models.deep, ADAM),
    "normalised": (models.normalised, functools.partial(keras.optimizers.RMSprop, 1e-2, momentum=0.5)),
    "constrained": (models.constrained, functools.partial(keras.optimizers.SGD, 1e-1, momentum=0.9, nesterov=True)),
    "averaged": (models.deep, functools.partial(ADAM, use_ema=True, ema_momentum=0.9, global_clipnorm=0.5)),
    "convolutional": (models.convolutional, ADAM),
    "lstm": (models.lstm, ADAM),
    "gru": (models.gru, functools.partial(keras.optimizers.AdamW, 1e-2, clipnorm=1.0)),
    "embedded": (models.embedded, functools.partial(keras.optimizers.SGD, 0.1)),
    "transformer": (models.transformer_block, ADAM),
    "grouped_queries": (models.grouped_queries, ADAM),
    "many_inputs_and_outputs": (models.many_inputs_and_outputs, ADAM),
    "skipping": (models.skipping, functools.partial(keras.optimizers.Adagrad, 1e-1)),
    "subclassed": (models.subclassed, ADAM),
    "own_train_step": (models.own_train_step, ADAM),
}
"""By name: how a network is made, and its optimizer."""
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
    "own_train_step": "this model's class has its own 'train_step'",
}
QUICK = {
    ("deep", "data=8"),
    ("deep", "tensor=8"),
    ("transformer", "data=2,tensor=4"),
    ("convolutional", "data=4,tensor=2"),
    ("averaged", "data=8,zero=1"),
    ("normalised", "data=8,zero=2"),
    ("skipping", "data=8,zero=3"),
    ("constrained", "data=2,tensor=4,zero=3"),
    ("embedded", "data=8,zero=3,store_group=4"),
    ("many_inputs_and_outputs", "microbatches=4"),
    ("subclassed", "data=2,tensor=2,microbatches=3"),
    ("gru", "recompute=blocks"),
    ("deep", "data=4,zero=2,microbatches=2,recompute=blocks"),
    ("own_train_step", "data=8,zero=2"),
}


def cases():
    for name in NETWORKS:
        for plan in (*LAYOUTS, *INSIDE):
            refused = name in COUPLED and ("microbatches" in plan or (name == "own_train_step" and "recompute" in plan))
            if not refused:
                yield pytest.param(name, plan, marks=() if (name, plan) in QUICK else pytest.mark.slow, id=f"{name}-{plan}")


def made(name):
    build, optimizer = NETWORKS[name]
    return build(rows=ROWS, optimizer=optimizer())


def trained(name, plan, batch_size=16, **options):
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(11)
    model, x, y = made(name)
    history = parafit.fit(model, x, y, plan=plan, verbose=0, batch_size=batch_size, epochs=2, **options)
    scores = parafit.evaluate(model, x, y, batch_size=ROWS, verbose=0, return_dict=True, plan=plan)
    outputs = parafit.predict(model, x, batch_size=ROWS, verbose=0, plan=plan)
    state = model.get_weights() + [variable.numpy() for variable in model.optimizer.variables]
    return keras.tree.flatten((history.history, scores, outputs, state))


@functools.cache
def on_one_device(name):
    return trained(name, "single")


def assert_same(ours, theirs):
    # The floor is for numbers that are zero but for rounding, such as the bias of an attention's keys.
    for one, many in zip(theirs, ours, strict=True):
        np.testing.assert_allclose(many, one, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("name", "plan"), list(cases()))
def test_a_plan_gives_the_numbers_of_one_device(name, plan):
    assert_same(trained(name, plan), on_one_device(name))


@pytest.mark.usefixtures("float64")
def test_a_layout_that_is_broken_on_purpose_fails_the_comparison(monkeypatch):
    reference, spoiled = on_one_device("deep"), parafit.placement.Placement.bring_home
    monkeypatch.setattr(parafit.placement.Placement, "bring_home", lambda self, array: spoiled(self, array) * (1 + 1e-9))
    with pytest.raises(AssertionError):
        assert_same(trained("deep", "data=2,tensor=4"), reference)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("plan", ["data=2,tensor=2", pytest.param("microbatches=3", marks=pytest.mark.slow)])
def test_sample_weights_and_validation(plan):
    weights = np.random.default_rng(5).uniform(size=ROWS)
    one, many = (trained("deep", each, sample_weight=weights, validation_split=0.25, batch_size=5) for each in ("single", plan))
    assert_same(many, one)


@pytest.mark.parametrize("name", COUPLED)
def test_batches_that_cannot_be_cut_are_refused(name):
    model, x, y = made(name)
    with pytest.raises(PlanError, match=COUPLED[name]):
        parafit.fit(model, x, y, plan="microbatches=2", verbose=0)


@pytest.mark.parametrize("loss", [keras.losses.Tversky(), keras.losses.Dice()], ids=["tversky", "dice"])
def test_a_loss_that_divides_by_sums_over_the_batch_is_found_out(loss):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, "sigmoid")])
    model.compile("sgd", loss)
    labels = np.random.default_rng(0).integers(0, 2, (8, 3))
    with pytest.raises(PlanError, match=r"it ties its rows; .* uses a sum over all rows"):
        parafit.fit(model, np.random.default_rng(0).normal(size=(8, 4)), labels, plan="microbatches=2", verbose=0)


REFUSED = {
    "data=2,interleave=2": "interleave=2 is of pipelines, and the plan has none",
    "tensor=7": "axis tensor=7 splits nothing in 'sequential': 7 divides none of the dims",
    "data=8,zero=1,store_group=3": "store_group=3",
}


@pytest.mark.parametrize("plan", REFUSED)
def test_refuses(plan):
    model, x, y = made("deep")
    with pytest.raises(PlanError, match=REFUSED[plan]):
        parafit.fit(model, x, y, plan=plan, verbose=0)


def test_refuses_a_dim_that_the_model_does_not_have():
    model, x, y = made("deep")
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
        assert_same(trained("deep", plan, batch_size=14), trained("deep", "single", batch_size=14))


def test_a_batch_that_is_not_split_is_said(capsys):
    model, x, y = made("deep")
    parafit.fit(model, x, y, plan="data=8", batch_size=14, verbose=2)
    text = "data=8 does not divide a batch of 14 rows: every device computes all of them, 8 times its part (8 or 16 rows would be split)"
    assert text in capsys.readouterr().out


def test_the_model_is_left_whole_on_one_device():
    model, x, y = made("deep")
    parafit.fit(model, x, y, plan="data=2,tensor=2,zero=3", verbose=0)
    assert {device for variable in model.variables for device in variable.value.devices()} == {jax.devices()[0]}
    model.fit(x, y, verbose=0)


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
    placement = place(parafit.Plan.parse(plan), step, lambda: program)
    held = list(zip(jax.tree.leaves(step.leaves[1]), jax.tree.leaves(step.read())))
    for role in ("parameter", "slot", "state"):
        placed = sum(_bytes_on_a_device(placement.stored(leaf, array), array) for leaf, array in held if leaf.role == role)
        partition = Partition(program, placement.plan)
        assert sum(partition.stored_bytes(tensor) * tensor.count for tensor in program.of_role(role)) == placed, role


def _bytes_on_a_device(sharding, array):
    return math.prod(sharding.shard_shape(array.shape)) * array.dtype.itemsize
