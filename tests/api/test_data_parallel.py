"""The numbers do not change with the layout: one device against several, and the contract of what is compiled."""

import re

import jax
import keras
import numpy as np
import pytest
from keras import layers

import parafit
from parafit.planning import asked_for
from tests.models import ZOO, mlp, programs


def trained(make, plan, **options):
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(11)
    model, x, y = make()
    history = parafit.fit(model, x, y, plan=plan, verbose=0, **({"batch_size": 16, "epochs": 2, "validation_split": 0.2} | options))
    scores = parafit.evaluate(model, x, y, batch_size=16, verbose=0, return_dict=True, plan=plan)
    outputs = parafit.predict(model, x, batch_size=16, verbose=0, plan=plan)
    state = model.get_weights() + [variable.numpy() for variable in model.optimizer.variables]
    return keras.tree.flatten((history.history, scores, outputs, state))


QUICK = ("sequence", "many_inputs_and_outputs")
"""The others' batches are split in test_plans too, together with weights or state: here they are slow tests."""


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in ZOO])
def test_eight_devices_give_the_numbers_of_one(name):
    for one, eight in zip(trained(ZOO[name], "single"), trained(ZOO[name], "data=8"), strict=True):
        np.testing.assert_allclose(eight, one, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("plan", "batch_size"), [("data=2", 16), ("data=3", 16), ("data=8", 13), ("data=8", 5), ("data=8", 75)])
def test_batches_the_axis_does_not_divide(plan, batch_size):
    one, many = (trained(ZOO["normalised"], each, batch_size=batch_size) for each in ("single", plan))
    for single, parallel in zip(one, many, strict=True):
        np.testing.assert_allclose(parallel, single, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_a_plan_that_is_broken_on_purpose_fails_the_comparison(monkeypatch):
    one = trained(mlp, "single")
    monkeypatch.setattr(parafit.placement.Placement, "bring_home", lambda self, array: array * 1.0001)
    broken = trained(mlp, "data=8")
    assert any(not np.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(one, broken))


def test_gradients_are_reduced_in_one_collective():
    model, x, y = mlp()
    parafit.fit(model, x[:64], y[:64], batch_size=16, plan="data=8", verbose=0)
    assert [len(re.findall(r" all-reduce(?:-start)?\(", program.text)) for program in programs(model)] == [1]


def test_dropout_masks_and_weights_are_bitwise_the_same():
    class Masks(keras.Model):
        def __init__(self):
            super().__init__()
            self.dropout, self.dense = layers.Dropout(0.5, seed=9), layers.Dense(2)

        def call(self, x):
            return self.dense(self.dropout(x, training=True))

    outputs = []
    for plan in ("single", "data=8", "data=2"):
        keras.utils.set_random_seed(4)
        outputs.append(parafit.predict(Masks(), np.eye(64, dtype="float32"), batch_size=32, verbose=0, plan=plan))
    np.testing.assert_array_equal(outputs[0] == 0, outputs[1] == 0)
    np.testing.assert_allclose(outputs[1], outputs[0], rtol=1e-6)
    np.testing.assert_allclose(outputs[2], outputs[0], rtol=1e-6)


def test_the_model_is_left_on_one_device():
    model, x, y = mlp()
    parafit.fit(model, x, y, plan="data=8", verbose=0)
    assert {device for variable in model.variables for device in variable.value.devices()} == {jax.devices()[0]}
    model.fit(x, y, verbose=0)


def test_callbacks_see_and_set_weights_on_many_devices():
    class Halve(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.set_weights([weight / 2 for weight in self.model.get_weights()])

    weights = []
    for plan in ("single", "data=8"):
        keras.utils.set_random_seed(0)
        model, x, y = mlp()
        parafit.fit(model, x, y, plan=plan, callbacks=[Halve()], verbose=0)
        weights.append(model.get_weights())
    for one, eight in zip(*weights):
        np.testing.assert_allclose(eight, one, rtol=1e-4, atol=1e-6)


BAD_PLANS = {
    "data=9": "wants 9 devices, but there are 8",
    "row=2": "unknown axis 'row'",
    "data=1": "splits nothing",
    "data=-2": "splits nothing",
    "data": "expected AXIS=SIZE",
    "data=2,data=4": "names 'data' twice",
    "no_such_file.json": "cannot read a plan",
}


@pytest.mark.parametrize("plan", BAD_PLANS)
def test_a_plan_that_cannot_run_is_refused_before_anything_is_built(plan):
    model = keras.Sequential([layers.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(parafit.errors.PlanError, match=re.escape(BAD_PLANS[plan])):
        parafit.fit(model, np.ones((4, 2)), np.ones((4, 1)), plan=plan)
    assert not model.built


def test_a_pipeline_over_many_processes_is_refused(monkeypatch):
    """Four were seen to wait for each other for ever."""
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(parafit.errors.PlanError, match="a pipeline over 4 processes does not run yet, only over 2"):
        asked_for("pipeline=2,microbatches=2")


def test_a_plan_is_no_number():
    model, x, y = mlp()
    with pytest.raises(parafit.errors.PlanError, match="plan=8 is a int"):
        parafit.fit(model, x, y, plan=8)


def test_a_plan_can_come_from_a_file(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(parafit.Plan.parse("data=2").to_json())
    model, x, y = mlp()
    parafit.fit(model, x, y, plan=path, verbose=0)
    parafit.fit(model, x, y, plan=str(path), verbose=0)
    parafit.fit(model, x, y, plan=parafit.Plan.load(path), verbose=0)
