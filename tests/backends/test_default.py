"""What GPUs and TPUs run, tested without them: the default backend computes on the CPU, and its programs are lowered for both."""

import functools
import re

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

import parafit
from parafit import backends
from parafit.backends.backend import Backend
from parafit.backends.cpu.backend import CpuBackend
from parafit.execution import compiled
from parafit.placement import Lookup
from tests.models import ZOO

CUDNN = ("sequence",)
"""Keras computes an LSTM on a GPU by cuDNN, which cannot be traced where CUDA is not installed: here it traces the CPU's."""


class Resident(Backend):
    """As on an accelerator with room for all data, which CPU devices do not tell of."""

    name = "resident"

    def resident(self, nbytes, *, one_device, flops, epochs):
        return True


def trained(name, plan):
    """Everything that training, evaluating and predicting give: history, scores, predictions, weights, optimizer state."""
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(11)
    model, x, y = ZOO[name]()
    options = {"batch_size": 16, "verbose": 0, "plan": plan}
    history = parafit.fit(model, x, y, epochs=2, validation_split=0.2, **options)
    scores = parafit.evaluate(model, x, y, return_dict=True, **options)
    outputs = parafit.predict(model, x, **options)
    state = model.get_weights() + [variable.numpy() for variable in model.optimizer.variables]
    return keras.tree.flatten((history.history, scores, outputs, state))


@functools.cache
def on_the_cpu_backend(name):
    return trained(name, "single")


@pytest.fixture
def accelerated(monkeypatch):
    """Trains a model of the zoo as on a GPU, but for the devices; gives the numbers and the programs: (step's name, blocks, program)."""

    def train(name, plan, backend):
        programs, trace = [], compiled.traced_steps

        def remember(step, arrays, placement, *, seldom):
            program, options = trace(step, arrays, placement, seldom=seldom)
            assert not options
            programs.append((step.name, arrays, program))
            return program, options

        with monkeypatch.context() as patch, backends.using(backend):
            patch.setattr(compiled, "traced_steps", remember)
            if name not in CUDNN:  # Keras asks for it, and traces other forms for a GPU
                patch.setattr(jax, "default_backend", lambda: "gpu")
            return trained(name, plan), programs

    return train


def assert_numbers_of_the_cpu_backend(name, numbers):
    for ours, cpu in zip(numbers, on_the_cpu_backend(name), strict=True):
        np.testing.assert_allclose(ours, cpu, rtol=1e-10, atol=1e-10)


def assert_lowers(programs):
    """Every program becomes a text for GPUs and for TPUs, which calls no library of the CPU's."""
    assert {name for name, *_ in programs} == {"train", "test", "predict"}
    for *_, program in programs:
        for platform in ("cuda", "tpu"):
            assert not cpu_calls(program.lower(lowering_platforms=(platform,)).as_text())


def cpu_calls(text):
    """Calls of libraries in a lowered program, but for those of CUDA's: where it is installed, JAX draws random numbers by it."""
    return re.findall(r"custom_call @(?!cu)\w+", text)


PLANS = {
    "data=8": "normalised",
    "data=4,tensor=2": "transformer",
    "data=8,zero=3": "regularised",
    "data=2,microbatches=4": "convolutional",
    "recompute=blocks": "many_inputs_and_outputs",
    "data=4,zero=2,microbatches=2,recompute=blocks": "mlp",
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("name", "plan"), [*((name, "single") for name in ZOO), *((name, plan) for plan, name in PLANS.items())])
def test_it_gives_the_numbers_of_the_cpu_backend_and_lowers_for_accelerators(name, plan, accelerated):
    numbers, programs = accelerated(name, plan, Backend())
    assert_numbers_of_the_cpu_backend(name, numbers)
    assert_lowers(programs)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("name", "plan"),
    [("many_inputs_and_outputs", "single"), ("transformer", "single"), ("own_train_step", "data=8"), ("mlp", "data=4,tensor=2,zero=3")],
)
def test_data_that_stays_on_the_devices_gives_the_same_numbers_and_lowers(name, plan, accelerated):
    numbers, programs = accelerated(name, plan, Resident())
    assert_numbers_of_the_cpu_backend(name, numbers)
    assert all(isinstance(arrays, Lookup) for step, arrays, _ in programs if step == "train")
    assert_lowers(programs)


@pytest.mark.parametrize("plan", ["precision=bfloat16", "data=8,zero=3,precision=bfloat16"])
def test_plans_that_round_lower_too(plan, accelerated):
    numbers, programs = accelerated("mlp", plan, Backend())
    assert all(np.isfinite(number).all() for number in numbers)
    assert_lowers(programs)
    texts = [program.lower(lowering_platforms=("cuda",)).as_text() for _, _, program in programs]
    assert all(re.search(r"dot_general .*bf16", text) for text in texts)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("plan", ["single", "data=4,tensor=2"])
def test_flax_modules_give_the_numbers_of_the_cpu_backend(plan):
    nnx, optax = pytest.importorskip("flax.nnx"), pytest.importorskip("optax")
    from parafit.nnx import Trainable

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(28, 12)), rng.integers(0, 3, 28)

    def loss(module, batch):
        return optax.softmax_cross_entropy_with_integer_labels(module(batch[0]), batch[1]).mean()

    def run(backend):
        linear = functools.partial(nnx.Linear, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        module = nnx.Sequential(linear(12, 16), nnx.tanh, linear(16, 3))
        model = Trainable(module, loss=loss, optimizer=nnx.Optimizer(module, optax.adam(1e-2), wrt=nnx.Param))
        with backends.using(backend):
            history = parafit.fit(model, x, y, plan=plan, batch_size=16, epochs=2, verbose=0).history["loss"]
            return [history, parafit.predict(module, x, plan=plan, verbose=0)]

    keras.utils.set_random_seed(0)
    expected = run(CpuBackend())
    for backend in (Backend(), Resident()):
        keras.utils.set_random_seed(0)
        for ours, cpu in zip(run(backend), expected, strict=True):
            np.testing.assert_allclose(ours, cpu, rtol=1e-10)


def test_a_call_of_a_library_of_the_cpu_is_found():
    """The eigenvalues of a matrix, which JAX computes on CPUs by LAPACK."""
    traced = jax.jit(jnp.linalg.eigvalsh).trace(jax.ShapeDtypeStruct((3, 3), np.float32))
    assert cpu_calls(traced.lower(lowering_platforms=("cpu",)).as_text())
