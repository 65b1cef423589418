"""What Keras does beside training steps, parafit does: when hooks are called and data is drawn, what logs hold, which layers run."""

import functools
import warnings
from typing import Any

import jax
import keras
import numpy as np
import pytest
from keras import layers

import parafit
from parafit.adapters.keras import KerasModel
from parafit.errors import PlanError
from tests import models

ROWS = 52  # seven batches of 8, the last of 4
X = np.random.default_rng(0).normal(size=(ROWS, 4)).astype("float32")
Y = X[:, :1]
QUIET: Any = {"verbose": 0}


linear: Any = functools.partial(models.linear, metrics=["mae"])


def both(use):
    """What `use` gives with Keras, which must be what it gives with parafit."""
    theirs, ours = use(keras.Model), use(parafit)
    jax.tree.map(np.testing.assert_allclose, ours, theirs)
    assert str(jax.tree.structure(ours)) == str(jax.tree.structure(theirs))
    return ours


# When hooks are called ------------------------------------------------------------------------------------------------------------


class Hooks(keras.callbacks.Callback):
    """Writes down every batch hook, and how many rows of predictions it sees."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def _note(name):  # noqa: N805
        return lambda self, batch, logs=None: self.seen.append((name, batch, len((logs or {}).get("outputs", ()))))

    for _phase in ("train", "test", "predict"):
        for _moment in ("begin", "end"):
            locals()[f"on_{_phase}_batch_{_moment}"] = _note(f"{_phase} {_moment}")


@pytest.mark.parametrize("steps", [1, 3, 7, 101])
def test_hooks_are_called_once_an_execution_of_every_epoch(steps):
    def use(run):
        model, hooks = linear(steps_per_execution=steps), Hooks()
        run.fit(model, X, Y, batch_size=8, epochs=3, validation_data=(X, Y), callbacks=[hooks], **QUIET)
        run.evaluate(model, X, Y, batch_size=8, callbacks=[hooks], **QUIET)
        run.predict(model, X, batch_size=8, callbacks=[hooks], **QUIET)
        return [f"{name} {batch} {rows}" for name, batch, rows in hooks.seen]

    assert use(parafit) == use(keras.Model)


def test_slow_steps_change_nothing_in_when_hooks_are_called(monkeypatch):
    monkeypatch.setattr("parafit.execution.pace.CONTROL_SECONDS", 1e-9)
    hooks = Hooks()
    parafit.fit(linear(steps_per_execution=6), X, Y, batch_size=4, epochs=2, callbacks=[hooks], **QUIET)
    assert [batch for name, batch, _ in hooks.seen if name == "train end"] == [5, 11, 17] * 2


@pytest.mark.parametrize("steps", [1, 3])
def test_a_callback_sees_every_row_that_predict_returns(steps):
    model, parts = linear(steps_per_execution=steps), []
    collect = keras.callbacks.LambdaCallback(on_predict_batch_end=lambda batch, logs: parts.append(logs["outputs"]))
    outputs = parafit.predict(model, X, batch_size=8, callbacks=[collect], **QUIET)
    np.testing.assert_array_equal(np.concatenate(parts), outputs)


@pytest.mark.parametrize("frequency", [5, 8])
def test_checkpoints_that_count_batches_count_executions(frequency, tmp_path):
    def use(run):
        folder = tmp_path / run.__name__
        saves = keras.callbacks.ModelCheckpoint(folder / "{epoch}-{batch}.weights.h5", save_freq=frequency, save_weights_only=True)
        run.fit(linear(steps_per_execution=3), X, Y, batch_size=8, epochs=3, callbacks=[saves], **QUIET)
        return sorted(path.name for path in folder.iterdir())

    assert use(parafit) == use(keras.Model)


@pytest.mark.parametrize("steps_per_epoch", [2, 4])
def test_an_epoch_of_steps_that_executions_do_not_divide_is_as_long_as_in_keras(steps_per_epoch):
    def use(run):
        def endless(drawn):
            while True:
                drawn.append(1)
                yield X[:8] * len(drawn), Y[:8]

        drawn = []
        history = run.fit(
            linear(steps_per_execution=3), endless(drawn), epochs=2, steps_per_epoch=steps_per_epoch, shuffle=False, **QUIET
        ).history
        return {"drawn": len(drawn), **history}

    both(use)


# When data is drawn ---------------------------------------------------------------------------------------------------------------


class Shuffled(keras.utils.PyDataset):
    """Rows in another order after every epoch; writes down what is called."""

    def __init__(self, calls):
        super().__init__()
        self.calls, self.order, self.epoch = calls, np.arange(ROWS), 0

    def __len__(self):
        return 6

    def __getitem__(self, index):
        self.calls.append(str(index))
        rows = self.order[index * 8 : index * 8 + 8]
        return X[rows], Y[rows]

    def on_epoch_begin(self):
        self.calls.append("begin")

    def on_epoch_end(self):
        self.calls.append("end")
        self.epoch += 1
        self.order = np.random.default_rng(self.epoch).permutation(ROWS)


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("verb", ["predict", "evaluate", "fit"])
def test_a_dataset_that_shuffles_itself_gives_keras_rows_in_keras_order(verb, built):
    def use(run):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([*([keras.Input((4,))] if built else []), layers.Dense(1)])
        model.compile("sgd", "mse")
        calls, validation = [], []
        options = {"epochs": 2, "shuffle": False, "validation_data": Shuffled(validation)} if verb == "fit" else {}
        given = getattr(run, verb)(model, Shuffled(calls), **options, **QUIET)
        return calls, validation, given.history if verb == "fit" else given

    (calls, validation, given), (our_calls, our_validation, ours) = use(keras.Model), use(parafit)
    assert (our_calls, our_validation) == (calls, validation)
    jax.tree.map(np.testing.assert_allclose, ours, given)


def test_a_validation_generator_is_drawn_from_when_validation_starts():
    def use(run):
        drawn = []

        def batches(name):
            while True:
                drawn.append(name)
                yield X[:8], Y[:8]

        options = {"epochs": 2, "steps_per_epoch": 3, "validation_steps": 2, "shuffle": False, **QUIET}
        run.fit(linear(), batches("train"), validation_data=batches("test"), **options)
        return drawn

    assert use(parafit) == use(keras.Model)


# Logs -----------------------------------------------------------------------------------------------------------------------------


class Nested(keras.Model):
    """Logs as Keras' guide for JAX writes them: one entry a metric, that of the compiled metrics a dict; and one of the user's own."""

    def train_step(self, state, data):
        logs, state = super().train_step(state, data)
        return {"loss": logs["loss"], "compile_metrics": {"mae": logs["mae"], "deeper": {"twice": logs["mae"] * 2}}}, state

    def test_step(self, state, data):
        logs, state = super().test_step(state, data)
        return {"loss": logs["loss"], "compile_metrics": {"mae": logs["mae"]}, "rows": jax.numpy.ones(3)}, state


class NoLoss(keras.Model):
    """Logs without a single number named loss."""

    def train_step(self, state, data):
        logs, state = super().train_step(state, data)
        return {"loss": {"all": logs["loss"]}, "mae": logs["mae"]}, state


@pytest.mark.parametrize("cls", [Nested, NoLoss, keras.Model])
def test_logs_are_flat_and_in_keras_order(cls):
    def use(run):
        model, ended = linear(cls), []
        end = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: ended.append(list(logs)))
        history = run.fit(model, X, Y, batch_size=8, epochs=2, validation_data=(X, Y), callbacks=[end], **QUIET).history
        scores = run.evaluate(model, X, Y, return_dict=True, **QUIET)
        return [*ended, list(history), list(scores)], [history, scores, run.evaluate(model, X, Y, **QUIET)]

    (names, values), (our_names, ours) = use(keras.Model), use(parafit)
    assert our_names == names
    jax.tree.map(lambda mine, theirs: np.testing.assert_allclose(mine, theirs, rtol=1e-5), ours, values)


def test_a_list_of_scores_and_a_dict_of_them_agree():
    scores = parafit.evaluate(linear(), X, Y, return_dict=True, **QUIET)
    assert list(scores) == sorted(scores)
    assert parafit.evaluate(linear(), X, Y, **QUIET) == [scores["loss"], scores["mae"]]


# Limits ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def limits():
    keras.config.set_max_epochs(2)
    keras.config.set_max_steps_per_epoch(3)
    yield
    keras.config.set_max_epochs(None)
    keras.config.set_max_steps_per_epoch(None)


def test_limits_for_trying_a_script_hold(limits):
    model, hooks = linear(), Hooks()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = parafit.fit(model, X, Y, batch_size=8, epochs=5, callbacks=[hooks], **QUIET)
    assert history.epoch == [0, 1]
    assert [batch for name, batch, _ in hooks.seen if name == "train end"] == [0, 1, 2] * 2
    assert [str(each.message).split(",")[0] for each in caught] == ["Limiting epochs to 2", "Limiting steps_per_epoch to 3"]
    with pytest.warns(UserWarning, match="Limiting steps_per_epoch to 3"):
        assert len(parafit.predict(model, X, batch_size=8, **QUIET)) == 24


# Models ---------------------------------------------------------------------------------------------------------------------------


def test_a_layer_with_keras_trainer_is_a_model():
    class Trained(keras.Model.__mro__[1], layers.Layer):
        def __init__(self):
            layers.Layer.__init__(self)
            keras.Model.__mro__[1].__init__(self)
            self.dense = layers.Dense(1)

        def call(self, x):
            return self.dense(x)

    model = Trained()
    model.compile("sgd", "mse")
    assert np.isfinite(parafit.fit(model, X, Y, **QUIET).history["loss"]).all()


@pytest.mark.parametrize("verbose", [0, 2])
def test_a_batch_of_one_row_stays_whole(verbose):
    history = parafit.fit(linear(), X, Y, batch_size=1, verbose=verbose, plan="data=8").history
    expected = linear().fit(X, Y, batch_size=1, **QUIET).history
    np.testing.assert_allclose(history["loss"], expected["loss"], rtol=1e-5)


# Layers that keep a state ---------------------------------------------------------------------------------------------------------

SEQUENCES = np.random.default_rng(0).normal(size=(48, 5, 3)).astype("float32")
STATEFUL = {
    "lstm": lambda: layers.LSTM(8, stateful=True),
    "stacked cells": lambda: layers.RNN([layers.GRUCell(3), layers.LSTMCell(4)], stateful=True),
    "both ways": lambda: layers.Bidirectional(layers.SimpleRNN(4, stateful=True)),
}


def stateful(name) -> Any:
    keras.utils.set_random_seed(0)
    inputs = keras.Input(batch_shape=(8, 5, 3))
    model = keras.Model(inputs, layers.Dense(1)(STATEFUL[name]()(inputs)))
    model.compile("sgd", "mse")
    return model


def one_by_one(model):
    """Outputs batch by batch, called as a function, which keeps states on every backend."""
    return np.concatenate([model(SEQUENCES[start : start + 8], training=False) for start in range(0, 48, 8)])


@pytest.mark.parametrize("plan", ["single", "data=8"])
@pytest.mark.parametrize("name", STATEFUL)
def test_recurrent_states_go_on_over_batches_chunks_and_calls(name, plan):
    model, reference = stateful(name), stateful(name)
    weights = [weight.path for weight in model.weights]
    for _ in range(2):
        np.testing.assert_allclose(parafit.predict(model, SEQUENCES, batch_size=8, plan=plan, **QUIET), one_by_one(reference), atol=1e-6)
    for state in keras.tree.flatten([[layer.states for layer in each.layers if hasattr(layer, "states")] for each in (model, reference)]):
        state.assign(np.zeros(state.shape))  # as reset_state does, which Keras 3.15 has wrong for stacked cells
    np.testing.assert_allclose(parafit.predict(model, SEQUENCES, batch_size=8, plan=plan, **QUIET), one_by_one(reference), atol=1e-6)
    assert [weight.path for weight in model.weights] == weights
    assert not any("rnn_state" in variable.path for variable in model.variables)


@pytest.mark.parametrize("plan", ["single", "recompute=blocks", "data=8,zero=3"])
def test_recurrent_states_go_on_in_training(plan):
    """At a learning rate of zero the losses of two epochs are those of twice as long sequences."""
    model, reference = stateful("lstm"), stateful("lstm")
    model.optimizer.learning_rate = 0.0
    history = parafit.fit(model, SEQUENCES, SEQUENCES[:, :1, 0], batch_size=8, epochs=2, shuffle=False, plan=plan, **QUIET).history
    expected = [np.mean((one_by_one(reference) - SEQUENCES[:, :1, 0]) ** 2) for _ in range(2)]
    np.testing.assert_allclose(history["loss"], expected, rtol=1e-5)
    assert abs(expected[0] - expected[1]) > 1e-4


def test_a_stateful_layer_is_not_cut_into_microbatches():
    with pytest.raises(PlanError, match=r"microbatches.*'lstm.*' is stateful"):
        parafit.fit(stateful("lstm"), SEQUENCES, SEQUENCES[:, :1, 0], batch_size=8, shuffle=False, plan="microbatches=2", **QUIET)


# Layers that Keras does not compile -----------------------------------------------------------------------------------------------

AUGMENTATIONS = {
    "RandomPerspective": (),
    "RandomRotation": (0.1,),
    "RandomShear": (0.1, 0.1),
    "RandomTranslation": (0.1, 0.1),
    "RandomZoom": (0.1,),
}
IMAGES = np.random.default_rng(0).random((24, 8, 8, 3), dtype="float32")


def augmented(layer) -> Any:
    model = keras.Sequential([keras.Input((8, 8, 3)), layer, layers.GlobalAveragePooling2D(), layers.Dense(1)])
    model.compile("sgd", "mse")
    return model


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentation_runs_compiled_on_every_plan_with_keras_numbers(name):
    losses = []
    for plan in (None, "single", "data=8"):
        keras.utils.set_random_seed(1)
        model = augmented(getattr(layers, name)(*AUGMENTATIONS[name]))
        run, options = (keras.Model, {}) if plan is None else (parafit, {"plan": plan})
        losses.append(run.fit(model, IMAGES, IMAGES[:, 0, 0, :1], batch_size=8, epochs=2, **options, **QUIET).history["loss"])
    np.testing.assert_allclose(losses[1:], [losses[0]] * 2, rtol=2e-5)


def test_layers_within_layers_compile_too():
    assert KerasModel(augmented(layers.RandAugment()), "fit").why_stepwise() is None
    assert KerasModel(augmented(layers.AugMix()), "fit").why_stepwise() is None


def test_what_cannot_be_compiled_is_named():
    class OnTheHost(layers.Layer):
        def __init__(self):
            super().__init__(name="host")
            self.supports_jit = False

        def call(self, x):
            return x

    with pytest.warns(UserWarning, match=r"layer 'host' \(OnTheHost\) cannot be compiled: its supports_jit is False.*supports_jit=True"):
        parafit.predict(augmented(OnTheHost()), IMAGES, **QUIET)
    with pytest.raises(PlanError, match=r"layer 'host' \(OnTheHost\)"):
        parafit.predict(augmented(OnTheHost()), IMAGES, plan="data=2", **QUIET)

    class Lookup(layers.Layer):
        __module__ = "keras.src.layers.preprocessing.string_lookup"  # the real one needs TensorFlow

    lookup = Lookup()
    lookup.supports_jit = False
    assert "it needs its numbers on the host. Apply it to the data" in str(KerasModel(augmented(lookup), "fit").why_stepwise())
    assert KerasModel(linear(jit_compile=False), "fit").why_stepwise() == "it was compiled with jit_compile=False"
