"""What a model cannot take is refused before anything is compiled: what it is, which values, what was expected, how to mend it."""

import keras
import numpy as np
import pandas as pd
import pytest
from keras import layers

import parafit
from parafit import backends
from parafit.backends.cpu.backend import CpuBackend
from parafit.data.source import Source
from parafit.errors import DataError, ModelError
from parafit.support.arguments import check_arguments

ROWS = 24
X = np.random.default_rng(0).normal(size=(ROWS, 4)).astype("float32")
CLASSES = np.arange(ROWS) % 3
SPARSE = "sparse_categorical_crossentropy"


def network(*inner, loss="mse", shape=(4,), **options):
    model = keras.Sequential([keras.Input(shape), *inner])
    model.compile("sgd", loss, **options)
    return model


def classifier(classes=3, loss=SPARSE):
    return network(layers.Dense(classes, "softmax"), loss=loss)


def sequence(last, loss="mse"):
    return network(layers.SimpleRNN(2, return_sequences=True), last, loss=loss, shape=(5, 2))


class Called(keras.Model):
    """Tells what it gives when it is called."""

    def __init__(self, outputs):
        super().__init__()
        self.out = layers.Dense(outputs)

    def call(self, x):
        return self.out(x)


def called(outputs, loss):
    model = Called(outputs)
    model.compile("sgd", loss)
    return model


class Idle(CpuBackend):
    """Prepares no program for the compiler."""

    def rewrite(self, closed):
        raise AssertionError("a program was compiled")


@pytest.fixture
def nothing_compiled():
    with backends.using(Idle()):
        yield


def fit(model, *data, **options):
    return parafit.fit(model, *data, **({"batch_size": 8, "verbose": 0} | options))


STEPS = np.zeros((ROWS, 5, 2), "float32")
ONE_HOT = np.eye(3, dtype="float32")[CLASSES]
GIVEN = {
    # labels that are no class
    "counted from 1": (
        lambda: (classifier(), X, CLASSES + 1),
        r"y holds 3 in 8 of 24 labels, first in row 2, .*0 to 2\. Count from 0: pass y - 1",
    ),
    "too few outputs": (lambda: (classifier(2), X, CLASSES), r"holds 2 in 8 of 24 .* 2 classes .*0 to 1.*end the network with 3 outputs"),
    "negative": (lambda: (classifier(), X, CLASSES - 1), r"holds -1 in 8 of 24 labels, first in row 0.*ignore_class=-1"),
    "a column": (lambda: (classifier(2), X, CLASSES[:, None]), "holds 2 in 8 of 24"),
    "floats": (lambda: (classifier(2), X, CLASSES.astype("float64")), r"holds 2\.0 in 8 of 24"),
    "halves": (lambda: (classifier(), X, CLASSES / 2), r"holds 0\.5 in 8 of 24 .*whole numbers from 0 to 2.*such as mse"),
    "not a number": (lambda: (classifier(), X, np.where(CLASSES == 1, np.nan, CLASSES)), "holds nan in 8 of 24"),
    "one output": (lambda: (classifier(1), X, CLASSES % 2), r"1 class apart.*0 to 0\..*'binary_crossentropy'"),
    "logits": (
        lambda: (classifier(2, keras.losses.SparseCategoricalCrossentropy(from_logits=True)), X, CLASSES),
        "holds 2 in 8 of 24",
    ),
    "not the ignored": (
        lambda: (classifier(2, keras.losses.SparseCategoricalCrossentropy(ignore_class=255)), X, np.where(CLASSES == 0, 255, CLASSES)),
        "holds 2 in 8 of 24",
    ),
    "each step": (lambda: (sequence(layers.Dense(2, "softmax"), SPARSE), STEPS, np.full((ROWS, 5), 2)), "holds 2 in 120 of 120"),
    "pixels": (
        lambda: (network(layers.Conv2D(2, 1), loss=SPARSE, shape=(3, 3, 1)), np.zeros((ROWS, 3, 3, 1)), np.full((ROWS, 3, 3, 1), 2)),
        "holds 2 in 216 of 216",
    ),
    "of a model that is called": (lambda: (called(2, SPARSE), X, CLASSES), "holds 2 in 8 of 24"),
    "crossentropy of one": (lambda: (network(layers.Dense(1), loss="binary_crossentropy"), X, CLASSES % 2 + 1), r"holds 2 in .*\(y == 2\)"),
    "binary, three": (lambda: (network(layers.Dense(1), loss="binary_crossentropy"), X, CLASSES), "For 3 classes end the network"),
    "binary, pixels": (lambda: (network(layers.Dense(4), loss="binary_crossentropy"), X, abs(X) * 255), "y / 255"),
    # targets of another form
    "one-hot, sparse": (
        lambda: (classifier(), X, ONE_HOT),
        r"\(rows, 3\).* targets of shape \(rows,\).*'categorical_crossentropy'.*argmax",
    ),
    "sparse, one-hot": (lambda: (classifier(loss="categorical_crossentropy"), X, CLASSES), r"'sparse_categorical.*to_categorical\(y, 3\)"),
    "sparse column, one-hot": (lambda: (classifier(loss="categorical_crossentropy"), X, CLASSES[:, None]), r"to_categorical\(y, 3\)"),
    "one-hot of fewer": (lambda: (classifier(2, "categorical_crossentropy"), X, ONE_HOT), r"\(rows, 3\).*\(rows, 2\).*with 3 outputs"),
    "called, one-hot": (lambda: (called(3, SPARSE), X, ONE_HOT), "look like one-hot"),
    "binary, two outputs": (lambda: (network(layers.Dense(2), loss="binary_crossentropy"), X, CLASSES % 2), r"Dense\(1, 'sigmoid'\)"),
    # targets that would be broadcast
    "a target a row, steps": (lambda: (sequence(layers.Dense(1)), STEPS, X[:, 0]), r"\(rows,\).*\(rows, 5, 1\).*return_sequences=False"),
    "a column, steps": (lambda: (sequence(layers.Dense(1)), STEPS, X[:, :1]), r"\(rows, 1\).*\(rows, 5, 1\)"),
    "one target, three outputs": (lambda: (network(layers.Dense(3)), X, X[:, :1]), r"\(rows, 1\).*\(rows, 3\).*with 1 output\."),
    "rows, three outputs": (lambda: (network(layers.Dense(3)), X, X[:, 0]), r"\(rows,\).*\(rows, 3\).*with 1 output\."),
    "four targets, one output": (lambda: (network(layers.Dense(1)), X, X), r"\(rows, 4\).*\(rows, 1\).*with 4 outputs"),
    "called, broadcast": (lambda: (called(3, "mae"), X, X[:, 0]), r"\(rows,\).*\(rows, 3\)"),
    # nothing to learn from
    "no y": (lambda: (network(layers.Dense(1)), X), r"y is missing: .*fit\(model, x, y\)"),
    "called, no y": (lambda: (called(1, "mse"), X), "y is missing"),
    # inputs
    "narrow": (lambda: (network(layers.Dense(1)), X[:, :3], X[:, 0]), r"takes arrays of shape \(rows, 4\), but x has shape \(rows, 3\)"),
    "two arrays": (lambda: (network(layers.Dense(1)), [X, X], X[:, 0]), r"x holds 2 arrays, but model .* takes 1"),
    "no such word": (
        lambda: (network(layers.Embedding(10, 2), layers.Flatten(), layers.Dense(1)), np.arange(ROWS * 4).reshape(-1, 4) % 11, X[:, 0]),
        r"tokens from 0 to 10, but layer 'embedding.*Embedding\(11",
    ),
}


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("name", GIVEN)
def test_refuses(name):
    make, message = GIVEN[name]
    with pytest.raises(DataError, match=message):
        fit(*make())


@pytest.mark.usefixtures("nothing_compiled")
def test_evaluation_and_prediction_refuse_the_same():
    with pytest.raises(DataError, match="y holds 2 in 8 of 24"):
        parafit.evaluate(classifier(2), X, CLASSES, verbose=0)
    with pytest.raises(DataError, match=r"y is missing.*evaluate\(model, x, y\)"):
        parafit.evaluate(classifier(), X, verbose=0)
    with pytest.raises(DataError, match=r"takes arrays of shape \(rows, 4\), but x has shape \(rows,\)\. For one row pass x\[None\]"):
        parafit.predict(classifier(), X[0], verbose=0)
    with pytest.raises(DataError, match="y holds 2 in 8 of 24"):
        parafit.find_plan(classifier(2), X, CLASSES, batch_size=8, machine="h100x8")


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize(
    ("validation", "message"),
    [
        ({"validation_data": (X, CLASSES + 1)}, "validation_data holds 3 in 8 of 24"),
        ({"validation_data": (X, ONE_HOT)}, "validation_data has shape"),
        ({"validation_data": X}, "validation_data has no targets"),
    ],
)
def test_validation_data_is_looked_at_before_training(validation, message):
    with pytest.raises(DataError, match=message):
        fit(classifier(), X, CLASSES, **validation)


def test_labels_that_weights_leave_out_may_be_anything():
    labels = np.where(CLASSES == 0, -1, CLASSES)
    fit(classifier(), X, labels, sample_weight=(CLASSES > 0).astype("float32"))
    fit(classifier(), X, labels, class_weight={-1: 0.0})
    fit(classifier(loss=keras.losses.SparseCategoricalCrossentropy(ignore_class=-1)), X, labels)
    with pytest.raises(DataError, match="holds -1 in 1 of 24 labels, first in row 3"):
        fit(classifier(), X, labels, sample_weight=((CLASSES > 0) | (np.arange(ROWS) == 3)).astype("float32"))


def test_labels_that_a_mask_leaves_out_may_be_anything():
    tokens = np.tile([1, 2, 0], (ROWS, 1))
    inner = layers.Embedding(3, 2, mask_zero=True), layers.Dense(2, "softmax")
    fit(network(*inner, loss=SPARSE, shape=(3,)), tokens, np.tile([0, 1, -1], (ROWS, 1)))
    with pytest.raises(DataError, match="holds 2 in 24 of 72 labels, first in row 0"):
        fit(network(*inner, loss=SPARSE, shape=(3,)), tokens, np.tile([2, 1, -1], (ROWS, 1)))


@pytest.mark.parametrize("weights", [np.ones(ROWS), np.ones((ROWS, 4))])
def test_sample_weights_of_another_shape(weights):
    labels = np.zeros((ROWS, 5), "int32")
    with pytest.raises(DataError, match=r"sample weights of y have shape \(rows,.*losses have shape \(rows, 5\)"):
        fit(sequence(layers.Dense(2, "softmax"), SPARSE), STEPS, labels, sample_weight=weights)


def two_headed(losses, **options):
    given = keras.Input((4,), name="given")
    kind, size = layers.Dense(2, "softmax", name="kind")(given), layers.Dense(1, name="size")(given)
    model = keras.Model(given, {"kind": kind, "size": size})
    model.compile("sgd", losses, **options)
    return model


def test_each_output_has_its_own_loss_and_target():
    losses = {"kind": SPARSE, "size": "mse"}
    with pytest.raises(DataError, match="y for output 'kind' holds 2 in 8 of 24"):
        fit(two_headed(losses), X, {"kind": CLASSES, "size": X[:, 0]})
    with pytest.raises(DataError, match=r"y for output 'size' has shape \(rows, 4\)"):
        fit(two_headed(losses), X, {"kind": CLASSES % 2, "size": X})
    fit(two_headed(losses), X, {"kind": CLASSES % 2, "size": X[:, 0]})
    fit(two_headed(losses, loss_weights={"kind": 0.0, "size": 1.0}), X, {"kind": CLASSES, "size": X[:, 0]})
    fit(two_headed({"size": "mse"}), X, {"kind": CLASSES, "size": X[:, 0]})
    with pytest.raises(DataError, match=r"x has no 'given': model .* takes 'given', and x holds 'taken'"):
        fit(two_headed(losses), {"taken": X}, {"kind": CLASSES, "size": X[:, 0]})


def batches(labels, size=8):
    for start in range(0, ROWS, size):
        yield X[start : start + size], labels[start : start + size]


def test_batches_of_a_generator_are_looked_at_as_they_come():
    with pytest.raises(DataError, match="holds 2 in 3 of 8 labels, first in row 1"):
        parafit.fit(classifier(2), batches(np.where(np.arange(ROWS) < 16, 0, CLASSES)), verbose=0, shuffle=False)
    with pytest.raises(DataError, match="look like one-hot"):
        parafit.fit(classifier(), batches(ONE_HOT), verbose=0, shuffle=False)
    with pytest.raises(DataError, match="y is missing"):
        parafit.evaluate(classifier(), ((x,) for x, _ in batches(CLASSES)), verbose=0)


def test_arrays_are_looked_at_once(monkeypatch):
    looks = []
    monkeypatch.setattr(parafit.adapters.targets.Pair, "check", lambda self, leaves: looks.append(len(leaves[0])))
    fit(classifier(), X, CLASSES, epochs=3, validation_data=(X[:7], CLASSES[:7]))
    assert looks == [ROWS, 7]


def anything(targets, outputs):
    return keras.ops.mean(outputs, axis=-1)


class Alone(keras.Model):
    """Learns from inputs alone, by a step of its own."""

    def __init__(self):
        super().__init__()
        self.out = layers.Dense(4)

    def call(self, x):
        return self.out(x)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return keras.ops.mean((x - y_pred) ** 2)


def alone():
    model = Alone()
    model.compile("sgd")
    return model


def regularised():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(1, kernel_regularizer="l2")])
    model.compile("sgd")
    return model


GOOD = {
    "column of classes": lambda: (classifier(), X, CLASSES[:, None]),
    "classes as floats": lambda: (classifier(), X, CLASSES.astype("float32")),
    "booleans": lambda: (classifier(2), X, CLASSES == 1),
    "bytes": lambda: (classifier(), X, CLASSES.astype("uint8")),
    "pandas": lambda: (classifier(), pd.DataFrame(X), pd.Series(CLASSES)),
    "rows against a column": lambda: (network(layers.Dense(1)), X, X[:, 0]),
    "a column against rows": lambda: (network(layers.Dense(1), layers.Reshape(())), X, X[:, :1]),
    "images without channels": lambda: (network(layers.Reshape((2, 2, 1))), X, X.reshape(ROWS, 2, 2)),
    "steps in rows": lambda: (sequence(layers.Dense(1)), STEPS, np.zeros((ROWS, 5))),
    "a row of its own rank": lambda: (network(layers.Reshape((4, 1)), layers.Flatten(), layers.Dense(1), shape=(4, 1)), X, X[:, 0]),
    "probabilities": lambda: (network(layers.Dense(4), loss="binary_crossentropy"), X, np.clip(X, 0, 1)),
    "interpolated pixels": lambda: (network(layers.Dense(4), loss="binary_crossentropy"), X, np.clip(X, -0.05, 1.05)),
    "rewards times one-hot": lambda: (classifier(loss="categorical_crossentropy"), X, -3 * ONE_HOT),
    "a loss of one's own": lambda: (network(layers.Dense(3), loss=anything), X, X[:, 0]),
    "a loss of the model's own": lambda: (alone(), X),
    "regularisers alone": lambda: (regularised(), X, X[:, 0]),
    "a row's weight": lambda: (
        sequence(layers.Dense(2, "softmax"), SPARSE),
        STEPS,
        np.zeros((ROWS, 5)),
        {"sample_weight": np.ones((ROWS, 1))},
    ),
    "a step's weight": lambda: (
        sequence(layers.Dense(2, "softmax"), SPARSE),
        STEPS,
        np.zeros((ROWS, 5)),
        {"sample_weight": np.ones((ROWS, 5))},
    ),
    "no epochs": lambda: (network(layers.Dense(1)), X, X[:, 0], {"epochs": 0}),
    "numpy's numbers": lambda: (network(layers.Dense(1)), X, X[:, 0], {"batch_size": np.int64(8), "epochs": np.int32(1)}),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_keras_takes_passes(name):
    *given, last = GOOD[name]()
    given, options = (given, last) if isinstance(last, dict) else ([*given, last], {})
    fit(*given, **options)


def test_a_model_without_a_loss():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(1)])
    model.compile("sgd")
    with pytest.raises(ModelError, match=r"compiled without a loss, so fit has nothing to learn from\. Call model.compile"):
        fit(model, X, X[:, 0])
    parafit.evaluate(model, X, X[:, 0], verbose=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: expected a whole number of at least 1, or None"),
        ({"batch_size": -8}, "batch_size=-8"),
        ({"batch_size": 8.0}, r"batch_size=8\.0"),
        ({"batch_size": True}, "batch_size=True"),
        ({"epochs": -1}, "epochs=-1: expected a whole number of at least 0"),
        ({"epochs": 1.5}, r"epochs=1\.5"),
        ({"epochs": 5, "initial_epoch": 6}, r"initial_epoch=6 is past the last epoch: epochs=5 .* Pass epochs=11 to train 5 more"),
        ({"steps_per_epoch": 0}, "steps_per_epoch=0: .*None for all of the data"),
        ({"validation_steps": "all"}, "validation_steps='all'"),
        ({"steps": -1}, "steps=-1"),
        ({"validation_batch_size": 0}, "validation_batch_size=0"),
        ({"validation_split": 1.0}, r"validation_split=1\.0: expected a share of the rows"),
        ({"validation_split": -0.1}, r"validation_split=-0\.1"),
        ({"validation_split": 20}, "validation_split=20"),
        ({"validation_split": float("nan")}, "validation_split=nan"),
        ({"validation_freq": 0}, "validation_freq=0: expected a whole number of epochs"),
        ({"validation_freq": (1, 2)}, r"validation_freq=\(1, 2\)"),
        ({"validation_freq": [0, 5]}, r"validation_freq=\[0, 5\]"),
        ({"verbose": 3}, r"verbose=3: expected 'auto', 0 \(silent\)"),
        ({"verbose": "yes"}, "verbose='yes'"),
        ({"shuffle": "no"}, "shuffle='no': expected True or False"),
        ({"class_weight": [1, 2]}, r"class_weight=\[1, 2\]: expected a dict"),
        ({"class_weight": {"cat": 2.0}}, "class_weight={'cat': 2.0}"),
    ],
)
def test_arguments_that_mean_nothing(arguments, message):
    with pytest.raises(DataError, match=message):
        check_arguments(**arguments)


def test_arguments_that_mean_something():
    check_arguments(batch_size=None, epochs=0, verbose=True, validation_split=0, validation_freq=[1, 5], shuffle="batch")
    check_arguments(class_weight={0: 1, np.float32(1): np.float32(2)}, epochs=5, initial_epoch=5, verbose=np.int64(1))


@pytest.mark.usefixtures("nothing_compiled")
def test_arguments_are_checked_by_all_who_take_them():
    model = network(layers.Dense(1))
    for call in (lambda: fit(model, X, X[:, 0], epochs=-1), lambda: parafit.evaluate(model, X, X[:, 0], verbose=7)):
        with pytest.raises(DataError, match="expected"):
            call()
    with pytest.raises(DataError, match="batch_size=0"):
        parafit.predict(model, X, batch_size=0)
    with pytest.raises(DataError, match="batch_size=-1"):
        parafit.find_plan("gpt:125m", batch_size=-1, machine="h100x8")


def test_splits_that_leave_no_rows():
    with pytest.raises(DataError, match=r"validation_split=0\.5 of 1 rows leaves 0 to train on and 1 to validate on"):
        fit(network(layers.Dense(1)), X[:1], X[:1, 0], validation_split=0.5)
    with pytest.raises(DataError, match=r"needs arrays, and x is a generator\. Pass validation_data="):
        parafit.fit(network(layers.Dense(1)), batches(X[:, 0]), validation_split=0.5, verbose=0)


def test_a_split_of_tables_is_a_split_of_arrays():
    pl = pytest.importorskip("polars")
    losses = []
    for x, y in ((X, X[:, 0]), (pl.DataFrame(X), pl.Series(X[:, 0]))):
        keras.utils.set_random_seed(0)
        losses.append(fit(network(layers.Dense(1)), x, y, validation_split=0.25).history["val_loss"])
    assert losses[0] == losses[1]


def test_what_keras_says_of_data_is_said_in_brief():
    with pytest.raises(DataError, match="the generator must return a tuple") as caught:
        Source(x for x, _ in batches(CLASSES))
    assert len(str(caught.value)) <= 400
