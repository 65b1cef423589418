"""What GPUs and TPUs run, tested without them: the default backend computes on the CPU, and its programs are lowered for both."""

import functools
import re

import keras
import numpy as np
import pytest

import parafit
from parafit import backends
from parafit.backends.backend import Backend
from parafit.backends.cpu.backend import CpuBackend
from parafit.execution import compiled
from parafit.placement import Lookup
from tests.zoo import ZOO


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


def assert_numbers_of_the_cpu_backend(name, plan, backend):
    with backends.using(backend):
        ours = trained(name, plan)
    for default, cpu in zip(ours, on_the_cpu_backend(name), strict=True):
        np.testing.assert_allclose(default, cpu, rtol=1e-10, atol=1e-10)


@pytest.fixture
def traced(monkeypatch):
    """The programs that a test traces for other backends than the CPU's: (name of the step, its blocks, program)."""
    programs, trace = [], compiled.traced_steps

    def remember(step, arrays, placement, *, seldom):
        program, options = trace(step, arrays, placement, seldom=seldom)
        if isinstance(backends.current(), CpuBackend):
            return program, options
        assert not options
        programs.append((step.name, arrays, program))
        return program, options

    monkeypatch.setattr(compiled, "traced_steps", remember)
    return programs


def assert_lowers(programs):
    """Every program becomes a text for GPUs and for TPUs, which calls no library of the CPU's."""
    assert {name for name, *_ in programs} == {"train", "test", "predict"}
    for *_, program in programs:
        for platform in ("cuda", "tpu"):
            text = program.lower(lowering_platforms=(platform,)).as_text()
            assert not re.search(r"custom_call @(?!cu_)", text)  # JAX draws random numbers by cu_threefry where CUDA is installed


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
def test_it_gives_the_numbers_of_the_cpu_backend_and_lowers_for_accelerators(name, plan, traced):
    assert_numbers_of_the_cpu_backend(name, plan, Backend())
    assert_lowers(traced)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("name", "plan"),
    [("many_inputs_and_outputs", "single"), ("transformer", "single"), ("own_train_step", "data=8"), ("mlp", "data=4,tensor=2,zero=3")],
)
def test_data_that_stays_on_the_devices_gives_the_same_numbers_and_lowers(name, plan, traced):
    assert_numbers_of_the_cpu_backend(name, plan, Resident())
    assert all(isinstance(arrays, Lookup) for step, arrays, _ in traced if step == "train")
    assert_lowers(traced)
