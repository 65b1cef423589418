"""Flax modules, many at once."""

import keras
import numpy as np
import optax
import pytest
from flax import nnx

import parafit
from parafit.errors import ModelError
from parafit.nnx import Trainable


class Net(nnx.Module):
    def __init__(self, seed):
        rngs = nnx.Rngs(seed)
        self.inner = nnx.Linear(6, 8, use_bias=False, rngs=rngs, param_dtype=float)
        self.norm = nnx.BatchNorm(8, rngs=rngs, param_dtype=float)
        for statistics in (self.norm.mean, self.norm.var):
            statistics.set_raw_value(statistics.get_raw_value().astype(float))
        self.drop = nnx.Dropout(0.3, rngs=rngs)
        self.outer = nnx.Linear(8, 1, rngs=rngs, param_dtype=float)

    def __call__(self, x):
        return self.outer(self.drop(nnx.tanh(self.norm(self.inner(x)))))


def loss(module, batch):
    error = module(batch[0]) - batch[1]
    return (error**2).mean(), {"mae": abs(error).mean()}


def build(seed, rate=1e-2):
    return Trainable(Net(seed), loss=loss, optimizer=optax.inject_hyperparams(optax.adam)(learning_rate=rate))


def data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(75, 6)), rng.normal(size=(75, 1))


def variables(model):
    return [np.asarray(leaf) for leaf in (*model.get_weights(), *_leaves(model))]


def _leaves(model):
    import jax

    arrays = jax.tree.leaves(nnx.state(model.module, nnx.RngState)) + jax.tree.leaves(nnx.state(model.optimizer))
    return [jax.random.key_data(array) if jax.numpy.issubdtype(array.dtype, jax.dtypes.prng_key) else array for array in arrays]


@pytest.mark.usefixtures("float64")
def test_each_module_ends_as_if_it_were_alone():
    x, y = data()
    options = {"batch_size": 16, "epochs": 2, "validation_split": 0.2, "verbose": 0}
    histories = parafit.fit_many(build, x, y, seeds=[1, 2, 3], learning_rates=[1e-2, 1e-3, 1e-1], **options)
    for history, rate in zip(histories, [1e-2, 1e-3, 1e-1]):
        keras.utils.set_random_seed(history.seed)
        model = build(history.seed, rate)
        alone = parafit.fit(model, x, y, **options)
        assert list(alone.history) == list(history.history)
        for name, values in alone.history.items():
            np.testing.assert_allclose(history.history[name], values, rtol=1e-12)
        for theirs, ours in zip(variables(model), variables(history.model), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-13)
    models = [history.model for history in histories]
    together = parafit.predict_many(models, x, verbose=0)
    for ours, model in zip(together, models):
        np.testing.assert_allclose(ours, parafit.predict(model, x, verbose=0), rtol=1e-12)
    scores = parafit.evaluate_many(models, x, y, verbose=0, return_dict=True)
    assert scores[1] == pytest.approx(parafit.evaluate(models[1], x, y, verbose=0, return_dict=True), rel=1e-12)


def test_a_learning_rate_that_is_no_variable():
    x, y = data()
    make = lambda seed: Trainable(Net(seed), loss=loss, optimizer=optax.adam(1e-2))  # noqa: E731
    with pytest.raises(ModelError, match=r"holds no variable 'learning_rate'.*inject_hyperparams"):
        parafit.fit_many(make, x, y, learning_rates=[0.1, 0.2], verbose=0)
