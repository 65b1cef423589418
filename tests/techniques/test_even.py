"""No compiled program holds an uneven split; what an axis does not divide is whole, and right."""

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from keras import layers

import parafit
from parafit import backends
from parafit.execution import compiled
from parafit.nnx import Trainable
from tests import models
from tests.evenness import read_splits, uneven_lines

MESH = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def splits_of(function, *arguments, left=None):
    """The uneven splits in the program of `function` of arguments given as (array, axes of its dimensions), made even first."""
    arrays = [array for array, _ in arguments]
    given = [NamedSharding(MESH, PartitionSpec(*axes)) for _, axes in arguments]
    closed = compiled.evenly(jax.make_jaxpr(function)(*arrays), MESH, given=given, left=[left])
    even = jax.jit(jax.extend.core.jaxpr_as_fun(closed), in_shardings=given, out_shardings=[left])
    with read_splits() as splits:
        program = backends.current().compile(even.lower(*arrays), {})
    np.testing.assert_allclose(program(*jax.device_put(arrays, given))[0], function(*arrays), rtol=1e-6, atol=1e-6)
    return splits


def numbers(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


CUT = {
    "slice": (lambda x: x[:, 1:] * 2, (numbers(4, 16), ("data", "tensor"))),
    "every other": (lambda x: x[:, :6:2] + 1, (numbers(4, 8), ("data", "tensor"))),
    "join": (lambda x: jnp.concatenate([x, x[:, :3]], 1) * 2, (numbers(4, 8), ("data", "tensor"))),
    "pad": (lambda x: jnp.tanh(jnp.pad(x, ((0, 1), (1, 0)))), (numbers(4, 8), ("data", "tensor"))),
    "window": (lambda x: jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2), (1, 1), "VALID"), (numbers(4, 8), ("data", "tensor"))),
    "rows": (lambda x: x[1:] - x[:-1], (numbers(4, 8), ("data", "tensor"))),
    "reshape": (lambda x: jnp.tanh(x.reshape(4, 6, 2)).sum(2) * 2, (numbers(4, 12), ("data", "tensor"))),
    "scan": (lambda x: jax.lax.scan(lambda c, row: (c + row[1:].sum(), row[1:] * c), 0.0, x)[1], (numbers(6, 16), (None, "tensor"))),
    "cumulative sum": (lambda x: jnp.cumsum(x, axis=1), (numbers(4, 8), ("data", "tensor"))),
    "sort": (lambda x: jnp.sort(x, axis=1)[:, :5], (numbers(4, 8), ("data", "tensor"))),
    "scatter": (
        lambda x: jnp.zeros(5).at[(x[:, 1:] > 0).astype(int).reshape(-1)].add(x[:, 1:].reshape(-1)),
        (numbers(4, 8), ("data", "tensor")),
    ),
    "stack": (lambda x: jnp.tanh(x) * jnp.stack([x[0] * k for k in range(4)]), (numbers(4, 8), ("data", "tensor"))),
    "unstack": (lambda x: jnp.tanh(sum(jnp.unstack(x, axis=1))), (numbers(4, 8), ("data", "tensor"))),
    "first": (lambda x: jnp.pad(x.reshape(-1)[:1] * 2, (0, 15)) + 1, (numbers(4, 8), ("data", "tensor"))),
    "window of a gather": (lambda x: jax.lax.dynamic_slice(x, (0, 1), (4, 7)) * 2, (numbers(4, 8), ("data", "tensor"))),
}


@pytest.mark.parametrize("name", CUT)
def test_dimensions_that_are_cut_are_kept_whole(name):
    splits = splits_of(CUT[name][0], *CUT[name][1:])
    assert splits.programs == 1
    assert not splits.uneven


ZERO = np.float32(0)
MADE_WHOLE = {
    "padding between": lambda x: jax.lax.pad(x[:, :4], ZERO, ((0, 0, 0), (1, 0, 1))),
    "padding that shifts": lambda x: jax.lax.pad(x, ZERO, ((0, 0, 0), (2, -2, 0))),
    "window of dilated rows": lambda x: jax.lax.reduce_window(x, ZERO, jax.lax.add, (1, 3), (1, 1), ((0, 0), (1, 2)), (1, 2)),
    "associative scan": lambda x: jax.lax.associative_scan(jnp.add, x[:, :4], axis=1),
    "gradient of an associative scan": jax.grad(lambda x: (jax.lax.associative_scan(jnp.add, x[:, :6], axis=1) ** 2).sum()),
}


@pytest.mark.parametrize("name", MADE_WHOLE)
def test_what_cannot_be_made_in_parts_is_made_whole(name):
    """The operand is whole and the result split: XLA alone computes other numbers, or aborts the process."""
    split = NamedSharding(MESH, PartitionSpec(None, "tensor"))
    assert not splits_of(MADE_WHOLE[name], (numbers(4, 8), (None, None)), left=split).uneven


def test_even_programs_are_left_as_they_are():
    closed = jax.make_jaxpr(lambda x, w: jnp.tanh(x @ w).reshape(4, 4, 4).sum(1))(numbers(4, 8), numbers(8, 16))
    given = [NamedSharding(MESH, PartitionSpec(*axes)) for axes in (("data", None), (None, "tensor"))]
    assert compiled.evenly(closed, MESH, given=given, left=[None]) is closed


def test_uneven_splits_are_found(monkeypatch):
    """Without the constraints the compiler spreads a split to what it does not divide, and the tests see it."""
    monkeypatch.setattr(compiled, "evenly", lambda closed, *args, **options: closed)
    splits = splits_of(*CUT["slice"])
    assert splits.uneven
    assert uneven_lines("  %a = (f32[8]{0}, f32[7,4]{1,0}) while(%x), sharding={{devices=[2]<=[2]}, {devices=[2,1]<=[2]}}")


# Networks ---------------------------------------------------------------------------------------------------------------------------------

PLANS = ("data=4", "data=2,tensor=2")


def test_only_the_rows_that_were_looked_up_change():
    for plan in PLANS:
        keras.utils.set_random_seed(0)
        tokens = keras.Input((4,), dtype="int32")
        model = keras.Model(tokens, layers.Dense(1)(layers.GlobalAveragePooling1D()(layers.Embedding(5, 8)(tokens))))
        model.compile(keras.optimizers.SGD(1.0), "mse")
        before = model.get_weights()[0]
        parafit.fit(model, np.full((7, 4), 3), np.ones((7, 1)), batch_size=7, verbose=0, plan=plan)
        assert np.flatnonzero(np.abs(model.get_weights()[0] - before).max(1)).tolist() == [3]


COUNTING = {
    "AUC": lambda: keras.metrics.AUC(20),
    "AUC of labels": lambda: keras.metrics.AUC(20, multi_label=True),
    "BinaryIoU": lambda: keras.metrics.BinaryIoU(),
    "OneHotMeanIoU": lambda: keras.metrics.OneHotMeanIoU(3),
    "PrecisionAtRecall": lambda: keras.metrics.PrecisionAtRecall(0.5),
    "F1Score": lambda: keras.metrics.F1Score(average="macro"),
}


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype int64")  # Keras' IoU, on JAX without 64 bits
@pytest.mark.parametrize("name", COUNTING)
def test_metrics_that_count_rows(name):
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(14, 12)).astype("float32"), np.eye(3, dtype="float32")[rng.integers(0, 3, 14)]
    told = {}
    for plan in ("single", "data=2,tensor=2"):
        keras.utils.set_random_seed(5)
        model = keras.Sequential([keras.Input((12,)), layers.Dense(16, "tanh"), layers.Dense(3, "sigmoid")])
        model.compile("sgd", "binary_crossentropy", metrics=[COUNTING[name]()])
        fitted = parafit.fit(model, x, y, batch_size=7, shuffle=False, verbose=0, plan=plan).history
        told[plan] = [*(values[0] for values in fitted.values()), *parafit.evaluate(model, x, y, batch_size=7, verbose=0, plan=plan)]
    np.testing.assert_allclose(told["data=2,tensor=2"], told["single"], rtol=1e-5)


class Tokens(nnx.Module):
    def __init__(self, read, rngs):
        self.read, self.table, self.out = read, nnx.Embed(11, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, tokens):
        return self.out(self.read(self.table, tokens))


def _entropy(module, batch):
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(module(x), y).mean()


READS = {
    "embed": lambda table, tokens: table(tokens).mean(1),
    "take": lambda table, tokens: jnp.take(table.embedding[...], tokens, axis=0).mean(1),
    "sort": lambda table, tokens: jnp.sort(table(tokens), axis=1)[:, 1],
    "median": lambda table, tokens: jnp.median(table(tokens), axis=1),
}


@pytest.mark.parametrize(
    ("read", "dtype"), [("embed", "uint8"), ("take", "int16"), ("take", "uint32"), ("sort", "int32"), ("median", "uint8")]
)
def test_gradients_of_sorting_and_looking_up(read, dtype):
    """These ended the process where the rows were split unevenly."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 11, (13, 5)).astype(dtype), rng.integers(0, 3, 13)
    told = {}
    for plan in ("single", "data=4"):
        module = Tokens(READS[read], nnx.Rngs(0))
        parafit.fit(Trainable(module, loss=_entropy, optimizer=optax.sgd(0.1)), x, y, batch_size=13, shuffle=False, verbose=0, plan=plan)
        told[plan] = jax.tree.leaves(nnx.state(module, nnx.Param))
    for many, one in zip(told["data=4"], told["single"], strict=True):
        np.testing.assert_allclose(many, one, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("plan", ["data=2,tensor=2", "data=2,tensor=2,zero=3", "data=4,microbatches=2"])
def test_batches_of_one_row(plan, capsys):
    told = {}
    for each in ("single", plan):
        keras.utils.set_random_seed(5)
        model, x, y = models.mlp(rows=3, optimizer="sgd")
        parafit.fit(model, x, y, batch_size=1, verbose=2, plan=each)
        told[each] = model.get_weights()
    assert "does not divide a batch of 1 row" in capsys.readouterr().out
    for many, one in zip(told[plan], told["single"], strict=True):
        np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("plan", ["data=3,microbatches=2", "data=8,microbatches=2", "data=4,zero=2,microbatches=3"])
def test_microbatches_that_do_not_divide(plan):
    told = {}
    with read_splits() as splits:
        for each in ("single", plan):
            keras.utils.set_random_seed(5)
            model, x, y = models.mlp(rows=13)
            parafit.fit(model, x, y, batch_size=13, epochs=2, verbose=0, plan=each)
            told[each] = model.get_weights()
    assert splits.programs
    assert not splits.uneven
    for many, one in zip(told[plan], told["single"], strict=True):
        np.testing.assert_allclose(many, one, rtol=1e-12, atol=1e-12)
