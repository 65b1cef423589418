"""Recomputation is planned as it runs: where it saves nothing it is not recommended, where it does its price is the compiled program's."""

import dataclasses

import jax
import keras
import numpy as np
import optax
import pytest
from flax import nnx
from keras import layers

import parafit
from parafit.adapters import adapter_of
from parafit.backends.cpu.versions import knows_memory
from parafit.execution.compiled import compiled_steps
from parafit.nnx import Trainable
from parafit.placement import Placement
from parafit.planner.cost.estimator import price
from parafit.planner.cost.memory import recomputing_saves
from parafit.planner.machine.machine import Machine
from parafit.planner.plan import Plan
from parafit.planner.search.space import Candidates
from parafit.planning import this_machine
from parafit.techniques.program import step_program

AGAIN = Plan(recompute="blocks")


def small_cnn():
    hidden = [layers.Conv2D(8, 3, activation="relu"), layers.MaxPooling2D(), layers.Conv2D(16, 3, activation="relu"), layers.MaxPooling2D()]
    return _keras([keras.Input((14, 14, 1)), *hidden, layers.Flatten(), layers.Dense(10)]), np.zeros((64, 14, 14, 1)), np.zeros((64, 10))


def deep_cnn():
    hidden = [layers.Conv2D(8, 3, padding="same", activation="relu") for _ in range(6)]
    return _keras([keras.Input((12, 12, 3)), *hidden, layers.Flatten(), layers.Dense(8)]), np.zeros((64, 12, 12, 3)), np.zeros((64, 8))


def deep_mlp():
    hidden = [layers.Dense(32, "gelu") for _ in range(8)]
    return _keras([keras.Input((16,)), *hidden, layers.Dense(1)]), np.zeros((512, 16)), np.zeros((512, 1))


class Perceptron(nnx.Module):
    def __init__(self, rngs):
        self.inner, self.outer = nnx.Linear(64, 128, rngs=rngs), nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        return self.outer(nnx.relu(self.inner(x)))


def two_layers():
    def loss(module, batch):
        x, y = batch
        return ((module(x) - y) ** 2).mean()

    return Trainable(Perceptron(nnx.Rngs(0)), loss=loss, optimizer=optax.adam(1e-3)), np.zeros((64, 64)), np.zeros((64, 10))


@pytest.mark.parametrize("make", [small_cnn, two_layers])
@pytest.mark.parametrize("goal", ["time", "memory", "cost"])
def test_it_is_not_recommended_where_it_changes_nothing(make, goal):
    model, x, y = make()
    plan = parafit.find_plan(model, x, y, batch_size=64, goal=goal, allow={"recompute"})
    assert plan.recompute == "none"
    assert all(choice.plan.recompute == "none" for choice in plan.ranking.others)


@pytest.mark.skipif(not knows_memory(), reason="what this jaxlib's programs hold is estimated from the operations")
@pytest.mark.parametrize("make", [small_cnn, deep_mlp, two_layers])
def test_what_is_promised_is_what_the_compiled_program_has(make):
    model, x, y = make()
    adapter, step, batch = _step(model, x, y)
    program = step_program(step, batch, "network")
    blocks = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), batch)
    compiled = {plan: compiled_steps(adapter.keeper, step, blocks, Placement(plan)).peak_bytes for plan in (Plan(), AGAIN)}
    for plan, found in compiled.items():
        cost = price(program, plan, this_machine())
        assert found < 1.1 * (cost.peak_bytes - cost.memory["context"])
    assert recomputing_saves(program) == (compiled[AGAIN] < 0.9 * compiled[Plan()])


def test_it_is_recommended_where_it_saves_memory_and_takes_a_row_of_its_own():
    model, x, y = deep_mlp()
    plan = parafit.find_plan(model, x, y, batch_size=512, goal="memory", allow={"recompute"})
    assert plan.recompute == "blocks"
    text = parafit.explain(plan, "single")
    (row,) = [line.split() for line in text.splitlines() if line.startswith("  recomputation ")]
    assert float(row[1]) > 0
    assert row[3] == "0.000", "the plain plan repeats nothing"
    program = plan.ranking.program
    again, plain = (price(program, each, this_machine()) for each in (AGAIN, Plan()))
    repeated = sum(seconds for name, seconds in again.times.items() if name.startswith("recompute "))
    assert again.seconds == pytest.approx(plain.seconds + repeated, rel=0.1)


@pytest.mark.parametrize("make", [deep_cnn, deep_mlp])
def test_both_forms_of_a_step_have_the_same_dims(make):
    model, x, y = make()
    program = step_program(*_step(model, x, y)[1:], "network", here=False)
    again = program.recomputed
    assert again is not None
    assert recomputing_saves(program)
    held = [tensor for tensor in program.tensors.values() if tensor.role in ("parameter", "slot", "input")]
    assert [again.tensors[tensor.name].dims for tensor in held] == [tensor.dims for tensor in held]
    machine = Machine.load("h100x8")
    plans = [plan for plan in Candidates(program, machine, {"data", "tensor", "recompute"}) if plan.recompute == "blocks"]
    assert any("tensor" in plan.axes for plan in plans)
    for plan in plans:
        assert price(program, plan, machine).seconds > price(program, dataclasses.replace(plan, recompute="none"), machine).seconds


def _keras(parts):
    model = keras.Sequential(parts)
    model.compile("adam", "mse")
    return model


def _step(model, x, y):
    adapter = adapter_of(model, "fit")
    x, y = x.astype("float32"), y.astype("float32")
    adapter.build(lambda: (x[:2], y[:2]))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (x, y))
    return adapter, adapter.train_step(), shapes
