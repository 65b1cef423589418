"""precision=bfloat16: products of bfloat16 operands, everything else in float32, at every depth and on every layout."""

import functools
import re

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from jax import lax
from keras import layers

import parafit
from parafit import backends
from parafit.backends.cpu.backend import CpuBackend
from parafit.errors import PlanError
from parafit.techniques.bfloat16 import in_bfloat16

BOUND = 1e-4
"""By how much of their norm weights of two layouts may differ. Sums in another order may tip an operand to its other neighbour in bfloat16,
a step of 2⁻⁸, but hardly any do; weights in float32 are further away than this."""


def network(rate=1e-3):
    """A network with every kind of product: a convolution, a loop, attention, dense layers."""
    keras.utils.set_random_seed(3)
    image = keras.Input((8, 9))
    hidden = layers.LSTM(8, return_sequences=True)(layers.Conv1D(8, 3, padding="same")(image))
    hidden = layers.Add()([hidden, layers.MultiHeadAttention(2, 4)(hidden, hidden)])
    outputs = layers.Dense(4, "softmax")(layers.Dense(16, "relu")(layers.Flatten()(hidden)))
    model = keras.Model(image, outputs)
    model.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def data(rows=64):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 8, 9)).astype("float32")
    return x, (x[:, :4].sum(axis=2)).argmax(axis=1)


def fit(plan, epochs=1, rate=1e-3):
    model = network(rate)
    x, y = data()
    history = parafit.fit(model, x, y, plan=plan, batch_size=16, epochs=epochs, verbose=0)
    return model, history.history


@functools.cache
def weights(plan):
    return np.concatenate([weight.ravel() for weight in fit(plan, epochs=2)[0].get_weights()])


class Reading(CpuBackend):
    """Keeps the text of every program that it compiles."""

    name = "reading"

    def __init__(self):
        self.texts = []

    def compile(self, lowered, options):
        self.texts.append(lowered.as_text())
        return super().compile(lowered, options)


@pytest.fixture
def lowered():
    """The text of every program that is made."""
    backend = Reading()
    with backends.using(backend):
        yield backend.texts


PRODUCT = re.compile(r"stablehlo\.(dot_general|convolution).*: \(tensor<[\dx]*(\w+)>, tensor<[\dx]*(\w+)>\) -> tensor<[\dx]*(\w+)>")


def products(text):
    """How often a program has which product of which operands: (kind, left, right, result)."""
    found = PRODUCT.findall(text)
    assert len(found) == len(re.findall(r"stablehlo\.(?:dot_general|convolution)\b", text))
    return found


@pytest.mark.parametrize("plan", ["", ",microbatches=2", ",recompute=blocks", ",data=2,tensor=2,zero=2"])
def test_every_product_multiplies_bfloat16_and_gives_float32(plan, lowered):
    model, _ = fit("precision=bfloat16" + plan)
    steps = [text for text in lowered if "tf.aliasing_output" in text or "jax.buffer_donor" in text]  # what trains gives its state away
    found = [product for text in steps for product in products(text)]
    assert {kind for kind, *_ in found} == {"dot_general", "convolution"}
    assert {tuple(types) for _, *types in found} == {("bf16", "bf16", "f32")}
    assert {str(value.dtype) for value in model.trainable_variables} == {"float32"}


def test_without_it_nothing_is_bfloat16(lowered):
    fit("single")
    assert {tuple(types) for text in lowered for _, *types in products(text)} == {("f32", "f32", "f32")}


def test_evaluate_and_predict_round_as_well(lowered):
    model, (x, y) = network(), data()
    exact = parafit.predict(model, x, verbose=0), parafit.evaluate(model, x, y, verbose=0)[0]
    rounded = (
        parafit.predict(model, x, verbose=0, plan="precision=bfloat16"),
        parafit.evaluate(model, x, y, verbose=0, plan="precision=bfloat16")[0],
    )
    assert "bf16" in lowered[-1]
    for one, other in zip(exact, rounded):
        assert 0 < np.max(np.abs(one - other)) < 1e-2


@pytest.mark.parametrize("plan", ["data=8", "tensor=4", "data=2,tensor=4,zero=3", "microbatches=2", "recompute=blocks"])
def test_layouts_agree_to_the_rounding_of_bfloat16(plan):
    many, one, exact = (weights(each) for each in (f"precision=bfloat16,{plan}", "precision=bfloat16", "single"))
    assert np.linalg.norm(many - one) < BOUND * np.linalg.norm(one) < np.linalg.norm(exact - one)


@pytest.mark.parametrize("plan", ["data=4", "data=8,zero=3", "data=4,zero=2,microbatches=2"])
def test_it_communicates_what_the_plan_says(plan, capsys):
    x, y = data()
    parafit.fit(network(), x, y, plan=f"precision=bfloat16,{plan}", batch_size=16, verbose=2)
    assert "not in the plan" not in capsys.readouterr().out


def test_it_learns_as_well_as_float32():
    exact, rounded = (fit(plan, epochs=20, rate=1e-2)[1] for plan in ("single", "precision=bfloat16"))
    assert exact["loss"][-1] < 0.3 * exact["loss"][0]
    assert rounded["loss"][-1] == pytest.approx(exact["loss"][-1], abs=0.05 * exact["loss"][0])
    assert rounded["loss"] != exact["loss"]


def test_what_is_no_product_of_float32_matrices_is_left_alone():
    x = jnp.ones((4, 4))
    own = jax.make_jaxpr(lambda x: (x[0] @ x[1]) + lax.dot(x, x, precision=lax.Precision.HIGHEST) + (x @ x))(x)
    text = str(in_bfloat16(own))
    assert text.count("bf16[4,4] = convert_element_type") == 2
    half = jax.make_jaxpr(lambda x: x @ x)(x.astype("bfloat16"))
    assert in_bfloat16(half) is half


@pytest.mark.usefixtures("float64")
def test_a_float64_model_is_refused():
    with pytest.raises(PlanError, match=r"precision=bfloat16 changes nothing here.*this step multiplies float64\. Leave it out"):
        fit("precision=bfloat16")


def test_a_model_that_runs_step_by_step_is_refused():
    model, (x, y) = network(), data()
    model.run_eagerly = True
    with pytest.raises(PlanError, match="'precision=bfloat16' needs compiled steps"):
        parafit.fit(model, x, y, plan="precision=bfloat16", verbose=0)


def test_a_search_chooses_it_only_where_it_is_allowed():
    model = keras.Sequential([keras.Input((1024,)), layers.Dense(1024, "relu"), layers.Dense(1024)])
    model.compile("sgd", "mse")
    machine = parafit.Machine.load("h100x8").of(1)
    assert parafit.find_plan(model, batch_size=4096, machine=machine).precision == "float32"
    assert parafit.find_plan(model, batch_size=4096, machine=machine, allow={"bfloat16"}).precision == "bfloat16"
    assert parafit.find_plan(model, batch_size=4096).precision == "float32"
