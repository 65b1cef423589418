"""fit, evaluate and predict give what their Keras namesakes give."""

import threading

import keras
import numpy as np
import pytest
from keras import layers

import parafit
from parafit import backends
from parafit.backends.cpu.backend import CpuBackend
from tests.models import ZOO, mlp


def run_both(make, *, tolerance, fit=None, before=lambda model: None, evaluates=False):
    """Fit the same model from the same seed by Keras and by parafit, and compare everything that can be seen."""
    options = {"batch_size": 16, "epochs": 3, "verbose": 0} | (fit or {})
    seen = []
    for run in (keras.Model, parafit):
        keras.backend.clear_session(free_memory=False)
        keras.utils.set_random_seed(7)
        model, x, y = make()
        before(model)
        fresh = {name: value(model) if callable(value) else value for name, value in options.items() if name != "callbacks"}
        callbacks = options.get("callbacks", lambda: None)()
        history = run.fit(model, x, y, callbacks=callbacks, **fresh)
        weights = model.get_weights() + [variable.numpy() for variable in model.optimizer.variables]
        scores = run.evaluate(model, x, y, batch_size=16, verbose=0, return_dict=True) if evaluates else {}
        outputs = keras.tree.flatten(run.predict(model, x, batch_size=16, verbose=0)) if evaluates else []
        seen.append((history.history, weights, scores, outputs))
    (history, *others), (our_history, *our_others) = seen
    assert list(history) == list(our_history)
    for name in history:
        np.testing.assert_allclose(our_history[name], history[name], rtol=tolerance, atol=tolerance, err_msg=name)
    for theirs, ours in zip(keras.tree.flatten(others), keras.tree.flatten(our_others), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)
    return our_history


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ZOO)
def test_every_kind_of_model_in_float64(name):
    run_both(ZOO[name], tolerance=1e-10, fit={"validation_split": 0.2, "epochs": 2}, evaluates=True)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("batch_size", "seldom"), [(2, True), (16, False)])
def test_the_short_last_batch_of_many_is_compiled_quickly(batch_size, seldom):
    asked = []

    class Asked(CpuBackend):
        def compiler_options(self, closed, *, seldom):
            asked.append(seldom)
            return super().compiler_options(closed, seldom=seldom)

    with backends.using(Asked()):
        run_both(ZOO["convolutional"], tolerance=1e-10, fit={"batch_size": batch_size, "epochs": 2})
    assert asked == [False, seldom]


@pytest.mark.parametrize("verb", ["evaluate", "predict"])
def test_both_programs_of_a_run_are_compiled_side_by_side(verb):
    class Pair(CpuBackend):
        """Compiles nothing until it was given two programs."""

        both = threading.Barrier(2, timeout=60)

        def compile(self, lowered, options):
            self.both.wait()
            return super().compile(lowered, options)

    model, x, y = mlp()
    with backends.using(Pair()):
        getattr(parafit, verb)(model, *((x, y) if verb == "evaluate" else (x,)), batch_size=16, verbose=0)


@pytest.mark.parametrize("name", ["mlp", "many_inputs_and_outputs", "sequence"])
def test_float32_agrees_to_rounding(name):
    run_both(ZOO[name], tolerance=2e-5)


OPTIMIZERS = {
    "sgd with momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True),
    "rmsprop": lambda: keras.optimizers.RMSprop(1e-2, centered=True),
    "adamw clipped by global norm": lambda: keras.optimizers.AdamW(1e-2, global_clipnorm=0.5),
    "adam clipped by value": lambda: keras.optimizers.Adam(1e-2, clipvalue=0.01, amsgrad=True),
    "nadam clipped by norm": lambda: keras.optimizers.Nadam(1e-2, clipnorm=0.1),
    "adagrad": lambda: keras.optimizers.Adagrad(0.1),
    "adadelta": lambda: keras.optimizers.Adadelta(1.0),
    "adamax": lambda: keras.optimizers.Adamax(1e-2),
    "adafactor": lambda: keras.optimizers.Adafactor(1e-2),
    "ftrl": lambda: keras.optimizers.Ftrl(0.1),
    "lion": lambda: keras.optimizers.Lion(1e-3),
    "lamb": lambda: keras.optimizers.Lamb(1e-2),
    "muon": lambda: keras.optimizers.Muon(1e-2),
    "learning-rate schedule": lambda: keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(1e-2, 12)),
    "averaged weights": lambda: keras.optimizers.Adam(1e-2, use_ema=True, ema_overwrite_frequency=4),
    "weights averaged at the end": lambda: keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5),
    "accumulated gradients": lambda: keras.optimizers.Adam(1e-2, gradient_accumulation_steps=3),
    "scaled loss": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(1e-2), initial_scale=2.0**10, dynamic_growth_steps=5),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer(name):
    def compile_again(model):
        model.compile(OPTIMIZERS[name](), "sparse_categorical_crossentropy", metrics=["accuracy"])

    run_both(mlp, tolerance=1e-10, before=compile_again)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        run_both(mlp, tolerance=2e-2)
    finally:
        keras.config.set_dtype_policy(before)


LOSSES_AND_METRICS = {
    "categorical": (
        "categorical_crossentropy",
        ["accuracy", keras.metrics.TopKCategoricalAccuracy(2), "auc"],
        np.eye(3)[np.arange(75) % 3],
    ),
    "hinge": ("categorical_hinge", ["mae"], np.eye(3)[np.arange(75) % 3]),
    "regression": (keras.losses.Huber(), ["mae", keras.metrics.R2Score()], np.random.default_rng(2).normal(size=(75, 3))),
    "divergence": ("kl_divergence", ["mse"], np.full((75, 3), 1 / 3)),
    "binary": (
        "binary_crossentropy",
        [keras.metrics.Precision(), keras.metrics.Recall(), keras.metrics.F1Score()],
        np.eye(3)[np.arange(75) % 3],
    ),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", LOSSES_AND_METRICS)
def test_losses_and_metrics(name):
    loss, metrics, y = LOSSES_AND_METRICS[name]

    def make():
        model, x, _ = mlp()
        fresh = [metric if isinstance(metric, str) else type(metric).from_config(metric.get_config()) for metric in metrics]
        model.compile("adam", loss, metrics=fresh, weighted_metrics=["mse"])
        return model, x, y

    run_both(make, tolerance=1e-10, fit={"sample_weight": np.linspace(0.1, 2, 75)})


FIT_OPTIONS = {
    "no shuffling": {"shuffle": False},
    "shuffling within batches": {"shuffle": "batch"},
    "batch size not given": {"batch_size": None},
    "one batch for all": {"batch_size": 1000},
    "sample weights": {"sample_weight": np.linspace(0, 2, 75)},
    "class weights": {"class_weight": {0: 1.0, 1: 3.0, 2: 0.5}},
    "validation data": {"validation_data": (np.ones((9, 12)), np.zeros(9, "int32")), "validation_batch_size": 4},
    "weighted validation data": {"validation_data": (np.ones((9, 12)), np.zeros(9, "int32"), np.linspace(0, 1, 9))},
    "validation every second epoch": {"validation_split": 0.3, "validation_freq": 2},
    "validation at some epochs": {"validation_split": 0.3, "validation_freq": [1, 3]},
    "validation steps": {"validation_split": 0.4, "validation_steps": 1},
    "fewer steps than data": {"steps_per_epoch": 2, "epochs": 2},
    "started at a later epoch": {"initial_epoch": 1},
    "nothing to do": {"epochs": 1, "initial_epoch": 1},
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", FIT_OPTIONS)
def test_every_option_of_fit(name):
    run_both(mlp, tolerance=1e-10, fit=FIT_OPTIONS[name])


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_running_out_of_steps_is_told_as_in_keras():
    run_both(mlp, tolerance=2e-5, fit={"steps_per_epoch": 4, "epochs": 3})


def test_a_second_fit_goes_on_where_the_first_stopped():
    def twice(run):
        keras.utils.set_random_seed(3)
        model, x, y = mlp()
        run.fit(model, x, y, verbose=0, epochs=2)
        history = run.fit(model, x, y, verbose=0, epochs=2)
        return history.history["loss"], model.get_weights()

    (theirs, their_weights), (ours, our_weights) = twice(keras.Model), twice(parafit)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    for mine, other in zip(our_weights, their_weights):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-6)


def test_freezing_and_compiling_again_is_seen():
    model, x, y = mlp()
    parafit.fit(model, x, y, verbose=0)
    model.layers[0].trainable = False
    model.compile("sgd", "sparse_categorical_crossentropy")
    frozen, free = model.layers[0].kernel.numpy(), model.layers[1].kernel.numpy()
    parafit.fit(model, x, y, verbose=0)
    np.testing.assert_array_equal(model.layers[0].kernel.numpy(), frozen)
    assert np.abs(model.layers[1].kernel.numpy() - free).max() > 0


def test_keras_and_parafit_can_take_turns():
    model, x, y = mlp()
    parafit.fit(model, x, y, verbose=0)
    model.fit(x, y, verbose=0)
    parafit.fit(model, x, y, verbose=0)
    assert int(model.optimizer.iterations) == 9


def test_ten_fits_trace_once():
    traces = 0

    class Counted(keras.Model):
        def call(self, x):
            nonlocal traces
            traces += 1
            return self.inner(x)

    model = Counted()
    model.inner = layers.Dense(1)
    model.compile("sgd", "mse")
    x, y = np.ones((32, 2)), np.ones((32, 1))
    parafit.fit(model, x, y, batch_size=8, epochs=3, verbose=0)
    after_first = traces
    for _ in range(10):
        parafit.fit(model, x, y, batch_size=8, epochs=3, verbose=0)
    assert traces == after_first


def test_evaluate_returns_a_list_in_keras_order():
    model, x, y = mlp()
    theirs, ours = model.evaluate(x, y, verbose=0), parafit.evaluate(model, x, y, verbose=0)
    assert isinstance(ours, list)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_predict_needs_no_compiled_or_built_model():
    model = keras.Sequential([layers.Dense(3)])
    x = np.random.default_rng(0).normal(size=(75, 4))
    ours = parafit.predict(model, x, verbose=0)
    np.testing.assert_allclose(ours, model.predict(x, verbose=0), rtol=1e-6)
    assert parafit.predict(model, x, batch_size=10, steps=2, verbose=0).shape == (20, 3)


def test_price_is_told_before_and_scored_after(capsys):
    model, x, y = mlp()
    parafit.fit(model, x, y, verbose=2, epochs=2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("parafit: plan single, ")
    assert "for 2 epochs of 3 steps, peak memory" in lines[0]
    assert lines[-1].startswith("parafit: predicted ")


def test_timing_a_step_leaves_no_trace():
    weights = []
    for verbose in (0, 2):
        keras.utils.set_random_seed(5)
        model, x, y = mlp()
        parafit.fit(model, x, y, verbose=verbose)
        weights.append(model.get_weights())
    for quiet, told in zip(*weights):
        np.testing.assert_array_equal(quiet, told)
