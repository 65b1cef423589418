"""Flax NNX modules train as in a loop written by hand, and give the same numbers on every plan."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

import parafit
from parafit.errors import DataError, ModelError, NonFiniteLossError, PlanError

nnx, optax = pytest.importorskip("flax.nnx"), pytest.importorskip("optax")

from parafit.nnx import Trainable  # noqa: E402
from tests.models import programs  # noqa: E402

ROWS, BATCH = 28, 16  # a batch of 16 and a short one of 12, which 8 devices do not divide


class Plain(nnx.Module):
    """Rows do not meet; one layer is held, and used, twice."""

    def __init__(self, rngs, dtype):
        linear = functools.partial(nnx.Linear, param_dtype=dtype, rngs=rngs)
        self.hidden = nnx.List([linear(12, 16), linear(16, 24)])
        self.norm, self.out = nnx.LayerNorm(24, param_dtype=dtype, rngs=rngs), linear(24, 3)
        self.again = self.hidden[0]

    def __call__(self, x):
        hidden = nnx.tanh(self.hidden[0](x)) + self.again(2 * x)
        return self.out(self.norm(nnx.tanh(self.hidden[1](hidden))))


class Coupled(nnx.Module):
    """Batch statistics and dropout."""

    def __init__(self, rngs, dtype):
        linear = functools.partial(nnx.Linear, param_dtype=dtype, rngs=rngs)
        self.inner, self.out = linear(12, 16, use_bias=False), linear(16, 3)
        self.norm, self.dropout = nnx.BatchNorm(16, param_dtype=dtype, rngs=rngs), nnx.Dropout(0.3, rngs=rngs)
        for statistic in (self.norm.mean, self.norm.var):  # Flax keeps them in float32
            statistic.set_value(statistic.get_value().astype(dtype))

    def __call__(self, x):
        hidden = nnx.relu(self.norm(self.inner(x)))
        return self.out(self.dropout(hidden))


def loss(module, batch):
    x, y, *_ = batch
    logits = module(x)
    value = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return value, {"accuracy": jnp.mean(logits.argmax(axis=-1) == y, dtype=logits.dtype)}


def made(kind, dtype="float32"):
    module = kind(nnx.Rngs(0), jnp.dtype(dtype))
    return module, nnx.Optimizer(module, optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)), wrt=nnx.Param)


def data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(ROWS, 12)).astype(keras.config.floatx()), rng.integers(0, 3, ROWS).astype("int32")


def by_hand(kind, dtype, epochs):
    """As Flax' documentation writes it: history, final variables."""
    (module, optimizer), (x, y) = made(kind, dtype), data()

    @nnx.jit
    def step(module, optimizer, batch):
        (value, measures), gradients = nnx.value_and_grad(loss, has_aux=True)(module, batch)
        optimizer.update(module, gradients)
        return value, measures["accuracy"]

    history = []
    module.train()
    for _ in range(epochs):
        batches = [(x[start : start + BATCH], y[start : start + BATCH]) for start in range(0, ROWS, BATCH)]
        found = [np.array(step(module, optimizer, batch)) * len(batch[0]) for batch in batches]
        history.append(sum(found) / ROWS)
    return history, numbers(module, optimizer)


def numbers(*modules):
    """All arrays of modules and optimizers, random states as numbers."""
    found = [leaf for module in modules for leaf in jax.tree.leaves(nnx.state(module))]
    return [np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf) for leaf in found]


def fitted(kind, dtype, plan="single", epochs=2):
    (module, optimizer), (x, y) = made(kind, dtype), data()
    model = Trainable(module, loss=loss, optimizer=optimizer)
    history = parafit.fit(model, x, y, plan=plan, batch_size=BATCH, epochs=epochs, shuffle=False, verbose=0).history
    scores = parafit.evaluate(model, x, y, batch_size=ROWS, verbose=0, plan=plan)
    outputs = parafit.predict(module, x, batch_size=ROWS, verbose=0, plan=plan)
    return history, [*history["loss"], *history["accuracy"], *scores, outputs, *numbers(module, optimizer)]


@functools.cache
def on_one_device(kind):
    return fitted(kind, "float64")[1]


def test_it_is_the_loop_written_by_hand():
    history, found = fitted(Plain, "float32", epochs=3)
    by_epoch, expected = by_hand(Plain, "float32", 3)
    np.testing.assert_allclose(np.transpose([history["loss"], history["accuracy"]]), by_epoch, rtol=2e-6)
    for ours, theirs in zip(found[-len(expected) :], expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", [Plain, Coupled])
def test_it_is_the_loop_written_by_hand_in_float64(kind):
    _, expected = by_hand(kind, "float64", 2)
    for ours, theirs in zip(on_one_device(kind)[-len(expected) :], expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-13)


PLANS = ("data=8", "data=4,tensor=2", "data=8,zero=3", "recompute=blocks", "microbatches=4")
CASES = [(Plain, plan) for plan in PLANS] + [(Coupled, "data=8,zero=3"), (Coupled, "data=4,tensor=2")]
CASES += [pytest.param(Plain, plan, marks=pytest.mark.slow) for plan in ("tensor=8", "data=8,zero=1")]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("kind", "plan"), CASES)
def test_a_plan_gives_the_numbers_of_one_device(kind, plan):
    for one, many in zip(on_one_device(kind), fitted(kind, "float64", plan)[1], strict=True):
        np.testing.assert_allclose(many, one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("plan", ["data=4", "data=2,tensor=2", "data=4,zero=3"])
def test_what_it_communicates_is_what_the_plan_says(plan, capsys):
    (module, optimizer), (x, y) = made(Plain), data()
    parafit.fit(Trainable(module, loss=loss, optimizer=optimizer), x, y, plan=plan, batch_size=BATCH, verbose=2)
    assert "not in the plan" not in capsys.readouterr().out


def test_stored_state_is_split():
    model, x = Trainable(nnx.Linear(64, 512, rngs=nnx.Rngs(0)), loss=squares, optimizer=optax.adam(1e-3)), np.ones((8, 64), "float32")
    for plan in ("data=8", "data=8,zero=1"):
        parafit.fit(model, x, plan=plan, batch_size=8, verbose=0)
    whole, split = (program.argument_bytes for program in programs(model.module))
    assert split == pytest.approx(whole / 3 * (1 + 2 / 8), rel=0.02)


def squares(module, batch):
    return jnp.mean(module(batch) ** 2)


def test_batches_that_cannot_be_cut_are_refused():
    (module, optimizer), (x, y) = made(Coupled), data()
    with pytest.raises(PlanError, match="module 'norm' normalises by the statistics of the batch"):
        parafit.fit(Trainable(module, loss=loss, optimizer=optimizer), x, y, plan="microbatches=2", verbose=0)


def test_only_what_the_optimizer_is_for_is_trained():
    module = nnx.LoRALinear(4, 2, lora_rank=2, rngs=nnx.Rngs(0))
    frozen, low = np.asarray(module.kernel.get_value()), np.asarray(module.lora.lora_b.get_value())
    x = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
    distance = lambda module, batch: jnp.mean((module(batch[0]) - batch[1]) ** 2)  # noqa: E731
    optimizer = nnx.Optimizer(module, optax.sgd(0.1), wrt=nnx.LoRAParam)
    parafit.fit(Trainable(module, loss=distance, optimizer=optimizer), x, x[:, :2], verbose=0, plan="data=2")
    np.testing.assert_array_equal(module.kernel.get_value(), frozen)
    assert not np.array_equal(module.lora.lora_b.get_value(), low)


def test_modes_and_arrays_of_the_user_s_stay_as_they_are():
    (module, optimizer), (x, y) = made(Coupled), data()
    module.eval()
    kernel, mean = module.out.kernel.get_value(), module.norm.mean.get_value()
    parafit.fit(Trainable(module, loss=loss, optimizer=optimizer), x, y, verbose=0)
    assert module.dropout.deterministic
    assert not np.array_equal(kernel, module.out.kernel.get_value())
    assert not np.array_equal(mean, module.norm.mean.get_value())
    before = parafit.predict(module, x, verbose=0)
    np.testing.assert_allclose(before, module(x), rtol=1e-5, atol=1e-6)


def test_a_second_fit_goes_on_and_compiles_nothing():
    (module, optimizer), (x, y) = made(Plain), data()
    model = Trainable(module, loss=loss, optimizer=optimizer)
    first = parafit.fit(model, x, y, verbose=0, epochs=2).history["loss"]
    compiled = programs(module)
    second = parafit.fit(model, x, y, verbose=0).history["loss"]
    assert second[0] < first[-1] < first[0]
    assert int(optimizer.step.get_value()) == 3
    assert programs(module) == compiled
    module.norm.epsilon = 0.1
    parafit.fit(model, x, y, verbose=0)
    assert programs(module) != compiled


def test_callbacks_that_read_logs_stop_training_and_restore_weights():
    (module, optimizer), (x, y) = made(Plain), data()
    seen = []
    callbacks = [
        keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(sorted(logs))),
        keras.callbacks.EarlyStopping("val_loss", mode="max", patience=1, restore_best_weights=True),
    ]
    model = Trainable(module, loss=loss, optimizer=optimizer)
    history = parafit.fit(model, x, y, epochs=9, validation_data=(x, y), callbacks=callbacks, verbose=0)
    assert history.epoch == [0, 1]
    assert seen[0] == ["accuracy", "loss", "val_accuracy", "val_loss"]
    restored = parafit.evaluate(model, x, y, verbose=0, return_dict=True)
    assert restored["loss"] == pytest.approx(history.history["val_loss"][0], rel=1e-5)


def test_callbacks_that_need_a_keras_model_are_told_so(tmp_path):
    (module, optimizer), (x, y) = made(Plain), data()
    model = Trainable(module, loss=loss, optimizer=optimizer)
    with pytest.raises(AttributeError, match=r"a Flax module has no 'save'\. Callbacks that read logs.* need a Keras model"):
        parafit.fit(model, x, y, callbacks=[keras.callbacks.ModelCheckpoint(tmp_path / "a.keras")], verbose=0)
    with pytest.raises(ValueError, match="learning_rate"):
        parafit.fit(model, x, y, callbacks=[keras.callbacks.LearningRateScheduler(lambda epoch: 0.1)], verbose=0)


def test_a_loss_that_is_not_finite_stops_and_good_weights_stay():
    (module, optimizer), (x, y) = made(Coupled), data()
    x[20] = np.nan
    with pytest.raises(NonFiniteLossError, match=r"in 1 rows, the first is row 20"):
        parafit.fit(Trainable(module, loss=loss, optimizer=optimizer), x, y, batch_size=4, shuffle=False, verbose=0)
    assert all(np.isfinite(array).all() for array in numbers(module, optimizer))


def test_the_batch_is_what_fit_was_given():
    module, seen = nnx.Linear(3, 1, rngs=nnx.Rngs(0)), []

    def of_dict(module, batch):
        seen.append(sorted(batch))
        return jnp.mean((module(batch["image"])[:, 0] - batch["label"]) ** 2)

    batch = {"image": np.ones((8, 3), "float32"), "label": np.ones(8, "float32")}
    parafit.fit(Trainable(module, loss=of_dict, optimizer=optax.sgd(0.1)), batch, verbose=0)
    assert seen[0] == ["image", "label"]

    def weighted(module, batch):
        x, y, weight = batch
        return jnp.mean(weight[:, None] * (module(x) - y) ** 2)

    x = np.ones((8, 3), "float32")
    model = Trainable(module, loss=weighted, optimizer=optax.sgd(0.1))
    assert parafit.fit(model, x, x[:, :1], sample_weight=np.zeros(8), verbose=0).history["loss"] == [0.0]


def test_plans_are_found_and_priced():
    (module, optimizer), (x, y) = made(Coupled), data()
    plan = parafit.find_plan(Trainable(module, loss=loss, optimizer=optimizer), x, y, batch_size=16, machine="h100x8")
    assert plan.ranking.best.cost.seconds > 0
    assert plan.microbatches == 1
    with pytest.raises(ModelError, match="pass x and y themselves"):
        parafit.find_plan(Trainable(module, loss=loss, optimizer=optimizer), (12,), batch_size=16)


def distance(module, batch):
    x, y, *weight = batch
    return jnp.mean((module(x) - y) ** 2 * (weight[0] if weight else 1))


def pair(module, batch):
    x, y = batch
    return jnp.mean((module(x) - y) ** 2)


def parts(module, batch):
    return jnp.mean((module(batch[0]) - batch[1]) ** 2)


THREE = np.ones((8, 3), "float32")
SHAPES = {
    "targets of other rows": (
        distance,
        (THREE, THREE[:, 0]),
        r"would subtract arrays of shape \(rows, 1\) and \(rows,\).*compare y of every",
    ),
    "weights of other rows": (
        distance,
        (THREE, THREE[:, :1], THREE[:, 0]),
        r"would multiply arrays of shape .*compare sample_weight of every",
    ),
    "y forgotten": (pair, (THREE,), r"from x of shape \(8, 3\): .*unpack.*test_flax.py, line.*x alone: pass y"),
    "rows for parts": (parts, (THREE,), r"reads single rows of its batch, which is x alone.*Pass y as well"),
    "narrow": (
        distance,
        (THREE[:, :2], THREE[:, :1]),
        r"x of shape \(8, 2\), y of shape \(8, 1\): .*Linear \(bias .* kernel of shape \(3, 1\)\)",
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_data_that_does_not_fit(name):
    loss, data, message = SHAPES[name]
    names = ("x", "y", "sample_weight")
    for _ in range(2):  # what JAX traced once it does not warn of again
        model = Trainable(nnx.Linear(3, 1, rngs=nnx.Rngs(0)), loss=loss, optimizer=optax.sgd(0.1))
        with pytest.raises(DataError, match=message):
            parafit.fit(model, **dict(zip(names, data)), verbose=0)
    with pytest.raises(DataError, match=message):
        parafit.evaluate(model, **dict(zip(names, data)), verbose=0)


def test_validation_and_prediction_of_another_shape():
    model = Trainable(nnx.Linear(3, 1, rngs=nnx.Rngs(0)), loss=distance, optimizer=optax.sgd(0.1))
    with pytest.raises(DataError, match="compare y of every row"):
        parafit.fit(model, THREE, THREE[:, :1], validation_data=(THREE, THREE[:, 0]), verbose=0)
    parafit.fit(model, THREE, THREE[:, :1], verbose=0)
    with pytest.raises(DataError, match=r"the output of 'linear' cannot be computed from x of shape \(8, 2\).*kernel of shape \(3, 1\)"):
        parafit.predict(model, THREE[:, :2], verbose=0)


@pytest.mark.parametrize(
    "loss",
    [
        lambda module, batch: jnp.mean((module(batch[0])[:, 0] - batch[1]) ** 2),
        lambda module, batch: (module(batch[0]).mean() - batch[1].mean()) ** 2,
        lambda module, batch: jnp.mean(((lambda s: s[:, None] - s)(module(batch[0])[:, 0]) - (batch[1][:, None] - batch[1])) ** 2),
        lambda module, batch: jnp.mean((module(batch[0]) - batch[1][None, :]) ** 2),
    ],
    ids=["row by row", "moments", "pairs", "meant"],
)
def test_losses_that_compare_rows_on_purpose(loss):
    model = Trainable(nnx.Linear(3, 1, rngs=nnx.Rngs(0)), loss=loss, optimizer=optax.sgd(0.1))
    parafit.fit(model, THREE, THREE[:, 0], verbose=0)


def test_sparse_data_is_refused():
    from scipy.sparse import csr_matrix

    model = Trainable(nnx.Linear(3, 1, rngs=nnx.Rngs(0)), loss=squares, optimizer=optax.sgd(0.1))
    with pytest.raises(ModelError, match="'linear' cannot run, for the data is sparse or ragged: Flax modules run in compiled steps only"):
        parafit.fit(model, csr_matrix(np.ones((8, 3), "float32")), verbose=0)


class Growing(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(jnp.ones((3, 1)))

    def __call__(self, x):
        self.extra = nnx.BatchStat(x.mean())
        return x @ self.kernel


class Sowing(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(jnp.ones((3, 1)))

    def __call__(self, x):
        self.sow(nnx.Intermediate, "seen", x)
        return x @ self.kernel


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
def test_what_a_module_sows_is_dropped():
    module = Sowing()
    parafit.fit(Trainable(module, loss=squares, optimizer=optax.sgd(0.1)), np.ones((8, 3), "float32"), verbose=0)
    assert not hasattr(module, "seen")
    assert float(module.kernel.get_value()[0, 0]) < 1


REFUSED = {
    "has no loss, so fit has nothing": lambda: Trainable(Growing()),
    "has no optimizer, so fit cannot": lambda: Trainable(Growing(), loss=squares),
    "expected a Flax NNX module, got int": lambda: Trainable(3, loss=squares),  # type: ignore[arg-type]
    "optimizer='adam' is a str: expected an Optax": lambda: Trainable(Growing(), loss=squares, optimizer="adam"),
    "makes or drops variables when it is called": lambda: Trainable(Growing(), loss=squares, optimizer=optax.sgd(0.1)),
    r"has shape \(8, 1\), and must be a scalar": lambda: Trainable(
        nnx.Linear(3, 1, rngs=nnx.Rngs(0)), loss=lambda module, batch: module(batch), optimizer=optax.sgd(0.1)
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refuses(message):
    with pytest.raises(ModelError, match=message):
        parafit.fit(REFUSED[message](), np.ones((8, 3), "float32"), verbose=0)


def test_importing_parafit_and_training_keras_models_loads_no_flax():
    script = """
import sys, parafit, keras, numpy as np
model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
model.compile("sgd", "mse")
parafit.fit(model, np.ones((4, 3)), np.ones((4, 2)), verbose=0)
print({"flax", "optax"} & set(sys.modules))
"""
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "set()"
