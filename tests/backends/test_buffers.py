"""What a step is said to hold in memory against what XLA:CPU's own analysis says of the compiled program."""

import functools

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from keras import layers

import parafit
from parafit.adapters.keras import KerasModel
from parafit.backends.cpu.stored import stored
from parafit.data.feed import Feed
from parafit.data.source import Source
from parafit.execution.compiled import compiled_steps
from parafit.placement import Placement
from parafit.planner.cost.estimator import price
from parafit.planner.machine.machine import Machine
from parafit.planner.plan import Plan
from parafit.planner.program import BUFFERED
from parafit.planner.search.memo import Prices
from parafit.planning import keras_program
from parafit.tracing.trace import trace, trace_step, tree_leaves
from tests import models

STEPS = 4
as_traced = functools.partial(stored, lower=lambda closed: closed)
TOLERANCE = 0.05
SMALL_BYTES = 2048  # tables of pointers, scalars, alignment


def shape(*sizes, dtype="float32"):
    return jax.ShapeDtypeStruct(sizes, dtype)


def descent(loss):
    """A step that trains weights by gradient descent."""

    def step(weights, x):
        return jax.tree.map(lambda weight, slope: weight - 0.1 * slope, weights, jax.grad(loss)(weights, x))

    return step


def held(step, weights, x):
    """Bytes that a step inside a loop over batches is said to need beside its weights, and those that the compiler gives it."""
    leaves = tree_leaves(weights, "parameter", "weights")
    inputs = tree_leaves(x, "input", "x")
    program = trace(step, (weights, x), [*leaves, *inputs], results=leaves, stored=as_traced)
    memory = price(program, Plan(), Machine.load("h100x8").of(1)).memory

    def steps(weights, batches, count):
        return jax.lax.fori_loop(0, count, lambda index, weights: step(weights, batches[index]), weights)

    many = jax.jit(steps, donate_argnums=0).lower(weights, shape(STEPS, *x.shape, dtype=x.dtype), shape(dtype="int32"))
    return sum(memory[part] for part in BUFFERED), many.compile().memory_analysis().temp_size_in_bytes


def square(size):
    return shape(size, size)


def chain(weights, x):
    for weight in weights:
        x = jnp.maximum(x @ weight, 0)
    return x.sum()


def softmax(weights, x):
    scores = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", x @ weights["query"], x @ weights["key"]), -1)
    return jnp.einsum("bhts,bshd->bthd", scores, x).sum()


def loop(weights, x):
    final, _ = jax.lax.scan(lambda state, row: (jnp.tanh(state @ weights + row), None), jnp.zeros(x.shape[1:]), x)
    return final.sum()


def lookup(weights, x):
    return (weights["table"][x] @ weights["out"]).sum()


def nested(weights, x):
    def turn(state, row):
        inner, rows = jax.lax.scan(lambda state, _: (jnp.tanh(state @ weights), state), state, length=4)
        return jnp.sin(inner) + row, rows.sum(0)

    final, rows = jax.lax.scan(turn, jnp.zeros(x.shape[1:]), x)
    return final.sum() + rows.sum()


def odd(weights, x):
    x = jax.lax.cond(x.sum() > 0, lambda: x @ weights, lambda: x)
    x = jnp.sort(jnp.cumsum(x, 1), 0) + jnp.linalg.cholesky(weights @ weights.T + 100 * jnp.eye(len(weights)))[0]
    return jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x), x).sum()


def normalised(weights, x):
    x = x @ weights
    x = (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-3)
    return jnp.maximum(x, 0).sum()


def joined(weights, x):
    hidden = jnp.tanh(x @ weights["first"])
    return (jnp.concatenate([hidden * 2, hidden + 1, jnp.exp(hidden)], 1) @ weights["second"]).sum()


MECHANISMS = {
    "a weight that only the forward pass reads is not copied": (chain, [square(256)], shape(32, 256)),
    "weights that the backward pass reads are copied, and gradients take their place": (chain, [square(256)] * 4, shape(32, 256)),
    "activations outweigh weights": (chain, [square(32)] * 4, shape(2048, 32)),
    "batched products read transposed copies": (softmax, {"query": square(16), "key": square(16)}, shape(8, 32, 4, 16)),
    "loops keep what they stack": (loop, square(64), shape(20, 64, 64)),
    "a scatter adds in place": (lookup, {"table": shape(2000, 32), "out": square(32)}, shape(16, 8, dtype="int32")),
    "what follows from one array is computed again": (normalised, square(64), shape(512, 64)),
    "parts of a concatenation are stored": (joined, {"first": square(64), "second": shape(192, 8)}, shape(256, 64)),
}


@pytest.mark.parametrize("name", MECHANISMS)
def test_what_xla_does(name):
    loss, weights, x = MECHANISMS[name]
    said, found = held(descent(loss), weights, x)
    assert said == pytest.approx(found, rel=TOLERANCE, abs=SMALL_BYTES)


def test_loops_inside_loops_are_known_to_a_tenth():
    said, found = held(descent(nested), square(32), shape(10, 64, 32))
    assert said == pytest.approx(found, rel=2 * TOLERANCE)


def test_a_step_of_what_is_rare_has_buffers():
    weights, x = square(16), shape(32, 16)
    arguments = descent(odd), (weights, x), [*tree_leaves(weights, "parameter", "weights"), *tree_leaves(x, "input", "x")]
    program = trace(*arguments, results=arguments[2][:1], stored=stored)
    assert sum(buffer.bytes for buffer in program.buffers) > 5 * 4 * 32 * 16


classifier = functools.partial(models.classifier, rows=32 * STEPS)
NETWORKS = {
    "convolutions and pools": lambda: classifier(
        [layers.Conv2D(16, 3, padding="same", activation="relu"), layers.MaxPooling2D(), layers.Conv2D(8, 3), layers.Flatten()], (16, 16, 3)
    ),
    "sequences": lambda: classifier([layers.Conv1D(32, 5, activation="relu"), layers.GlobalMaxPooling1D()], (40, 8)),
    "recurrent": lambda: classifier([layers.GRU(32)], (20, 8)),
    "dropout": lambda: classifier([layers.Dense(256, "relu"), layers.Dropout(0.5), layers.Dense(256, "gelu"), layers.Dropout(0.2)], (64,)),
    "wide": lambda: classifier([layers.Dense(256, "relu"), layers.Dense(256, "gelu"), layers.BatchNormalization()], (64,)),
    **models.ZOO,
}


def traced(model, x, y):
    """The program of a model's training step, the step, and a block of batches."""
    source = Source(x, y, batch_size=32)
    adapted = KerasModel(model, "fit")
    adapted.build(source.example)
    step = adapted.train_step()
    program = trace_step(step, step.read(), source.shapes(), fixed=step.read_fixed(), name=model.name, stored=stored)
    return program, step, Feed(source).foreseen()[0].arrays


@pytest.mark.parametrize("name", NETWORKS)
def test_peak_memory_is_what_the_compiler_says(name):
    model, *data = NETWORKS[name]()
    program, step, block = traced(model, *data)
    memory = price(program, Plan(), Machine.load("h100x8").of(1)).memory
    said = sum(size for part, size in memory.items() if part != "context") + sum(array.nbytes for array in jax.tree.leaves(block))
    found = compiled_steps(model, step, block, Placement(Plan())).peak_bytes
    assert said == pytest.approx(found, rel=2 * TOLERANCE, abs=SMALL_BYTES)


def test_a_search_prices_a_program_with_buffers_as_price_does():
    program = traced(*NETWORKS["wide"]())[0]
    machine = Machine.load("a100x8")
    prices = Prices(program, machine.of(4))
    data = ("data=4", "data=4,zero=1", "data=4,zero=3", "data=4,recompute=blocks")
    for text in (*data, "data=4,microbatches=2", "data=4,microbatches=2,zero=2"):
        plan = Plan.parse(text)
        assert prices.of(plan) == price(program, plan, machine.of(4)), text


def test_buffers_follow_the_plan():
    program = traced(*NETWORKS["wide"]())[0]
    machine = Machine.load("a100x8")
    single, split, summed = (price(program, Plan.parse(text), machine).memory for text in ("single", "data=8", "microbatches=2"))
    assert split["activations"] < single["activations"]
    assert split["parameters"] == single["parameters"]
    assert single["gradients"] < program.bytes_of("gradient") <= summed["gradients"]


def test_a_program_for_another_machine_knows_no_buffers():
    weights = shape(8, 8)
    leaves = tree_leaves(weights, "parameter", "weights")
    arguments = descent(chain), ([weights], shape(4, 8)), [*leaves, *tree_leaves(shape(4, 8), "input", "x")]
    assert not trace(*arguments, results=leaves).buffers
    assert trace(*arguments, results=leaves, stored=as_traced).buffers


def test_what_a_jaxlib_of_which_nothing_is_known_holds_is_estimated(monkeypatch):
    def buffers(version):
        monkeypatch.setattr("jaxlib.version.__version__", version)
        program, _ = keras_program(NETWORKS["wide"]()[0], here=True)
        return bool(program.buffers), price(program, Plan(), Machine.load("h100x8").of(1)).peak_bytes > 0

    assert [buffers(version) for version in ("0.10.2", "0.12.0.1", "0.99.0.dev1")] == [(True, True), (True, True), (False, True)]


def test_convolutions_are_not_given_to_the_library_that_runs_them_on_one_thread():
    model, x, y = classifier([layers.Conv2D(64, 3, activation="relu"), layers.Flatten()], (24, 24, 32))  # XLA keeps small ones to itself
    _, step, block = traced(model, x, y)
    computations = compiled_steps(model, step, block, Placement(Plan())).text.split("\n}")
    assert any(" convolution(" in each for each in computations)
    assert not any(" convolution(" in each and each.strip().startswith("%fused") for each in computations)


@pytest.mark.usefixtures("optimised")
def test_the_order_that_holds_least_changes_no_value(monkeypatch):
    def fitted(frugal):
        monkeypatch.setattr("parafit.backends.cpu.options.saves_memory", lambda traced: frugal)
        keras.utils.set_random_seed(0)
        model, x, y = NETWORKS["dropout"]()
        _, step, block = traced(model, x, y)
        peak = compiled_steps(model, step, block, Placement(Plan())).peak_bytes
        parafit.fit(model, x, y, batch_size=32, epochs=2, verbose=0)
        return peak, model.get_weights()

    (least, weights), (most, others) = fitted(True), fitted(False)
    assert least < most
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(weights, others, strict=True))
