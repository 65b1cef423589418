"""What fit_many refuses, before any work."""

import itertools

import keras
import numpy as np
import pytest
from keras import callbacks as kc
from keras import layers
from sklearn.model_selection import KFold

import parafit
from parafit.errors import DataError, ModelError, PlanError
from tests.models import compiled


def build():
    return compiled(keras.Sequential([keras.Input((4,)), layers.Dense(3, "softmax")]))


X = np.random.default_rng(0).normal(size=(30, 4))
Y = np.repeat([0, 1, 2], 10)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "how many models are to be trained"),
        ({"n": 3, "seeds": [1, 2]}, "n: 3, seeds: 2"),
        ({"seeds": [1, 2], "learning_rates": [0.1, 0.2, 0.3]}, "seeds: 2, learning_rate: 3"),
        ({"n": 2, "learning_rates": {"beta_1": [0.9]}}, "n: 2, beta_1: 1"),
        ({"n": 4, "folds": KFold(3)}, "n: 4, folds: 3"),
        ({"n": 3, "callbacks": [[], []]}, "n: 3, callbacks: 2"),
        ({"n": 0}, "n=0: expected a whole number of at least 1"),
        ({"n": 2.0}, "n=2.0: expected"),
        ({"seeds": [1, -1]}, "seeds holds -1"),
        ({"seeds": [1, 2.5]}, "seeds holds 2.5"),
        ({"learning_rates": [0.1, float("nan")]}, "learning_rate: expected a list of finite numbers"),
        ({"learning_rates": 0.1}, "learning_rate: expected a list"),
        ({"n": 2, "callbacks": [kc.TerminateOnNaN()]}, "a callback belongs to one model"),
        ({"folds": KFold(3)}, "fold 0 trains on no row of class 0.*StratifiedKFold"),
        ({"folds": KFold(31)}, "cannot split 30 rows"),
        ({"folds": 3.5}, "expected a scikit-learn splitter"),
        ({"folds": [([0, 1], [30])]}, "fold 0 does not name rows"),
        ({"folds": KFold(3, shuffle=True), "validation_split": 0.2}, "leave validation_split and validation_data out"),
        ({"n": 2, "batch_size": 0}, "batch_size=0"),
        ({"n": 2, "validation_split": 0.99}, "expected at least one of each"),
    ],
)
def test_arguments_that_do_not_fit_together(options, words):
    with pytest.raises(DataError, match=words):
        parafit.fit_many(build, X, Y, **options, verbose=0)


def test_one_callback_for_two_members():
    callback = kc.EarlyStopping()
    with pytest.raises(DataError, match="members 0 and 1 have the same EarlyStopping"):
        parafit.fit_many(build, X, Y, callbacks=[[callback], [callback]], verbose=0)


def test_models_that_are_none():
    model = build()
    with pytest.raises(ModelError, match="one Sequential"):
        parafit.fit_many(model, X, Y, n=2)
    with pytest.raises(ModelError, match="list of models is empty"):
        parafit.fit_many([], X, Y)
    with pytest.raises(ModelError, match="models 0 and 2 are the same"):
        parafit.fit_many([model, build(), model], X, Y)
    with pytest.raises(DataError, match="n=3 is for a function"):
        parafit.fit_many([model, build()], X, Y, n=3)
    with pytest.raises(ModelError, match="is not compiled"):
        parafit.fit_many([keras.Sequential([keras.Input((4,)), layers.Dense(3)])], X, Y, verbose=0)


def test_members_that_share_a_layer():
    shared = layers.Dense(4)
    models = [compiled(keras.Sequential([keras.Input((4,)), shared, layers.Dense(3, "softmax")])) for _ in range(2)]
    with pytest.raises(ModelError, match="members 0 and 1 share the variable"):
        parafit.fit_many(models, X, Y, verbose=0)


def test_a_build_function_that_its_seed_does_not_decide():
    numbers = itertools.count()
    rng = np.random.default_rng()

    def drawing():
        model = build()
        model.set_weights([rng.normal(size=weight.shape) for weight in model.get_weights()])
        return model

    def growing():
        return compiled(keras.Sequential([keras.Input((4,)), layers.Dense(3 + next(numbers)), layers.Dense(3, "softmax")]))

    for make in (drawing, growing):
        with pytest.raises(ModelError, match="two different models for the same seed"):
            parafit.fit_many(make, X, Y, n=2, verbose=0)
    model = build()
    with pytest.raises(ModelError, match=r"twice|share the variable"):
        parafit.fit_many(lambda: model, X, Y, n=1, verbose=0)


def test_data_that_cannot_be_held():
    with pytest.raises(DataError, match="must be arrays"):
        parafit.fit_many(build, ((X, Y) for _ in range(2)), n=2, verbose=0)
    with pytest.raises(DataError, match="different numbers of rows"):
        parafit.fit_many(build, X, Y[:-1], n=2, verbose=0)
    with pytest.raises(DataError, match="Count from 0: pass y - 5"):
        parafit.fit_many(build, X, Y + 5, n=2, verbose=0)


def test_plans_of_several_devices():
    with pytest.raises(PlanError, match="trains many models on one device"):
        parafit.fit_many(build, X, Y, n=2, plan="data=2", verbose=0)


def test_numbers_that_an_optimizer_does_not_have():
    with pytest.raises(ModelError, match="no number called 'beta_9'"):
        parafit.fit_many(build, X, Y, learning_rates={"beta_9": [0.1]}, verbose=0)
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)

    def scheduled():
        model = build()
        model.compile(keras.optimizers.SGD(schedule), "sparse_categorical_crossentropy")
        return model

    with pytest.raises(ModelError, match=r"learning_rate=0\.1 cannot be given"):
        parafit.fit_many(scheduled, X, Y, learning_rates=[0.1], verbose=0)
