"""Traced programs: FLOPs and bytes against XLA's own count, dims of networks that can be checked by hand, blocks, what cannot be split."""

import functools

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import ClosedJaxpr, Primitive
from jax.interpreters import ad, mlir
from keras import layers

import parafit
from parafit.adapters.keras import KerasModel
from parafit.backends.cpu.arrays import arrays_of
from parafit.backends.cpu.stored import stored
from parafit.errors import ModelError
from parafit.planner.program import KINDS, PHASES, ROLES, Leaf
from parafit.tracing.blocks import fold_blocks
from parafit.tracing.dims import Dims
from parafit.tracing.graph import Graph
from parafit.tracing.trace import jaxpr_of, trace, trace_loss, trace_step
from tests.models import ZOO

ROWS = 16
as_traced = functools.partial(stored, lower=lambda closed: closed)


def shape(*sizes, dtype="float32"):
    return jax.ShapeDtypeStruct(sizes, dtype)


def traced(model, batch):
    """The program of a model's training step, and the step with its arguments."""
    adapted = KerasModel(model, "fit")
    adapted.build(lambda: batch)
    step = adapted.train_step()
    arguments = jax.tree.map(lambda leaf: shape(*leaf.shape, dtype=leaf.dtype), (step.read_fixed(), step.read(), batch))
    return trace_step(step, *arguments[1:], fixed=arguments[0], name=model.name), step.function, arguments


@functools.cache
def from_zoo(name):
    model, x, y = ZOO[name]()
    return traced(model, jax.tree.map(lambda array: array[:ROWS].astype("float32" if array.dtype == float else array.dtype), (x, y)))


def compiled(inputs, outputs, loss="mse"):
    model = keras.Model(inputs, outputs)
    model.compile("sgd", loss)
    return model


def dims(program):
    return {tensor.name: tensor.dims for tensor in program.tensors.values()}


@pytest.mark.parametrize("name", ZOO)
def test_every_network_is_described_in_full(name):
    program = from_zoo(name)[0]
    assert not program.unknown
    assert program.sizes["batch"] == ROWS
    for tensor in program.tensors.values():
        assert tensor.role in ROLES
        assert [dim == "" for dim in tensor.dims] == [size == 1 for size in tensor.shape]
        for size, dim in zip(tensor.shape, tensor.dims):
            assert not dim or size % program.sizes[dim] == 0, (tensor, program.sizes)
    for operation in program.operations:
        assert operation.kind in KINDS
        assert operation.phase in PHASES
        assert {*operation.inputs, *operation.outputs} <= set(program.tensors)
    assert program.fixed <= set(program.sizes)


@pytest.mark.parametrize("name", ZOO)
def test_nearly_all_work_is_attributed_to_a_layer(name):
    program = from_zoo(name)[0]
    nameless = sum(operation.flops * operation.steps for operation in program.operations if not operation.name)
    assert nameless < 0.01 * program.flops


@pytest.mark.parametrize("name", ZOO)
def test_parameters_slots_and_gradients_share_their_dims(name):
    program = from_zoo(name)[0]
    parameters = program.of_role("parameter")
    gradients = {tensor.name: tensor for tensor in program.of_role("gradient")}
    assert parameters
    for parameter in parameters:
        gradient = gradients[f"{parameter.name}/gradient"]
        assert (gradient.shape, gradient.dims) == (parameter.shape, parameter.dims)
        slots = [slot for slot in program.of_role("slot") if parameter.name.replace("/", "_") + "_" in slot.name]
        assert [slot.dims for slot in slots if slot.shape == parameter.shape] == [parameter.dims] * 2


# Random numbers and loops are left out: XLA counts one pass of a loop.
@pytest.mark.parametrize("name", ["mlp", "subclassed", "own_train_step"])
def test_bytes_agree_with_the_compiler(name):
    program, function, arguments = from_zoo(name)
    cost = jax.jit(function).lower(*arguments).compile().cost_analysis()
    assert sum(operation.bytes for operation in program.operations) == pytest.approx(cost["bytes accessed"], rel=0.1)


@pytest.mark.parametrize("make", ["wide", "convolutional", "attentive"])
def test_flops_of_larger_networks_agree_with_the_compiler(make):
    program, function, arguments = LARGER[make]()
    cost = jax.jit(function).lower(*arguments).compile().cost_analysis()
    assert program.flops == pytest.approx(cost["flops"] + cost.get("transcendentals", 0), rel=0.1)


def wide():
    model = keras.Sequential([keras.Input((64,)), layers.Dense(96, "relu"), layers.Dense(48, "tanh"), layers.Dense(10)])
    model.compile("adam", "mse")
    return traced(model, (np.zeros((64, 64), "float32"), np.zeros((64, 10), "float32")))


def convolutional():
    image = keras.Input((12, 12, 3))
    hidden = layers.Conv2D(8, 3, padding="same", activation="relu")(image)
    hidden = layers.Conv2D(8, 3, strides=2)(layers.AveragePooling2D(2)(hidden))
    model = compiled(image, layers.Dense(4)(layers.Flatten()(hidden)))
    return traced(model, (np.zeros((8, 12, 12, 3), "float32"), np.zeros((8, 4), "float32")))


def attentive():
    tokens = keras.Input((16,), dtype="int32")
    hidden = layers.Embedding(50, 32)(tokens)
    hidden = layers.LayerNormalization()(hidden + layers.MultiHeadAttention(4, 8)(hidden, hidden))
    model = compiled(tokens, layers.Dense(50)(hidden))
    return traced(model, (np.zeros((8, 16), "int32"), np.zeros((8, 16, 50), "float32")))


LARGER = {make.__name__: functools.cache(make) for make in (wide, convolutional, attentive)}


def test_dims_of_a_classifier_are_those_worked_out_by_hand():
    model = keras.Sequential([keras.Input((784,)), layers.Dense(32, "relu", name="one"), layers.Dense(10, "softmax", name="two")])
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    program = traced(model, (np.zeros((64, 784), "float32"), np.zeros((64,), "int32")))[0]
    found = dims(program)
    prefix = model.name
    assert found["x"] == ("batch", "x/features")
    assert found[f"{prefix}/one/kernel"] == ("x/features", "one/units")
    assert found[f"{prefix}/one/bias"] == ("one/units",)
    assert found[f"{prefix}/two/kernel"] == ("one/units", "two/units")
    assert found[f"{prefix}/two/bias"] == ("two/units",)
    assert program.sizes == {"batch": 64, "x/features": 784, "one/units": 32, "two/units": 10}
    assert not program.fixed
    products = [operation for operation in program.operations if operation.kind == "matmul"]
    assert [(product.phase, product.shape, product.contracted) for product in products] == [
        ("forward", (1, 64, 784, 32), ("x/features",)),
        ("forward", (1, 64, 32, 10), ("one/units",)),
        ("backward", (1, 10, 64, 32), ("batch",)),
        ("backward", (1, 64, 10, 32), ("two/units",)),
        ("backward", (1, 32, 64, 784), ("batch",)),
    ]


def test_dims_of_attention():
    program = LARGER["attentive"]()[0]
    found = {name.rpartition("multi_head_attention")[2].partition("/")[2]: value for name, value in dims(program).items()}
    heads, size = found["query/kernel"][1:]
    stream = found["query/kernel"][0]
    assert heads.endswith("/heads")
    assert size.endswith("/head_size")
    assert (program.sizes[heads], program.sizes[size]) == (4, 8)
    assert found["key/kernel"] == (stream, heads, size)
    assert found["value/kernel"][:2] == (stream, heads)
    assert found["attention_output/kernel"] == (heads, found["value/kernel"][2], stream)
    table = next(tensor for tensor in program.of_role("parameter") if "embedding" in tensor.name)
    assert table.dims[1] == stream
    (lookup,) = [operation for operation in program.operations if operation.kind == "gather"]
    assert lookup.contracted == table.dims[:1]
    (update,) = [operation for operation in program.operations if operation.kind == "scatter"]
    assert update.contracted == ("batch", "sequence")


def test_equal_sizes_are_not_the_same_dim():
    """A chain of 8 × 8 kernels has a dim between every two layers."""
    parameters = {name: shape(8, 8) for name in "abcd"}
    program = trace_loss(lambda weights, x: (x @ weights["a"] @ weights["b"] @ weights["c"] @ weights["d"]).sum(), parameters, shape(8, 8))
    assert len(program.sizes) == 6
    assert program.tensors["b"].dims == (program.tensors["a"].dims[1], program.tensors["c"].dims[0])


def test_layers_side_by_side_are_not_blocks():
    weights = {name: shape(32, 4, 8) for name in "qkv"}

    def loss(weights, x):
        heads = [jnp.einsum("btd,dhe->bthe", x, weights[name]) for name in "qkv"]
        return (jnp.einsum("bthe,bshe->bhts", *heads[:2])[..., None] * heads[2].swapaxes(1, 2)[:, :, None]).sum()

    program = trace_loss(loss, weights, shape(5, 16, 32))
    assert program.tensors["q"].dims == program.tensors["k"].dims
    assert program.tensors["v"].dims[2] != program.tensors["q"].dims[2]
    assert fold_blocks(program) == program


def test_flattened_and_separated_dims_are_followed():
    def loss(weights, x):
        rows, positions, width = x.shape
        hidden = (x.reshape(rows * positions, width) @ weights["in"]).reshape(rows, positions, 4, 8)
        return (hidden.transpose(0, 2, 1, 3).sum((2, 3)) @ weights["out"]).sum()

    program = trace_loss(loss, {"in": shape(6, 32), "out": shape(4, 3)}, shape(16, 5, 6))
    columns = program.tensors["in"].dims[1]
    assert program.sizes[columns] == 4
    assert program.tensors["out"].dims[0] == columns
    first = next(operation for operation in program.operations if operation.kind == "matmul")
    assert program.tensors[first.outputs[0]].dims == ("batch", columns)


def test_windows_and_cuts_cannot_be_split():
    program = LARGER["convolutional"]()[0]
    assert {"height", "width"} <= program.fixed
    assert "batch" not in program.fixed
    kernel = next(tensor for tensor in program.of_role("parameter") if "conv2d" in tensor.name and len(tensor.shape) == 4)
    assert set(kernel.dims[:2]) <= program.fixed
    assert kernel.dims[3] not in program.fixed
    joined = trace_loss(lambda w, x: (jnp.concatenate([x @ w["a"], x @ w["b"]], -1) @ w["c"]).sum(), JOINED, shape(4, 6))
    assert {joined.tensors["a"].dims[1], joined.tensors["b"].dims[1]} <= joined.fixed


JOINED = {"a": shape(6, 8), "b": shape(6, 8), "c": shape(16, 2)}


def test_what_is_not_known_is_listed_and_not_split():
    def loss(weights, x):
        return jnp.linalg.eigh(x @ weights["a"])[0].sum() + (x @ weights["b"]).sum()

    program = trace_loss(loss, {"a": shape(4, 4), "b": shape(4, 6)}, shape(8, 4, 4))
    assert "eigh" in program.unknown
    assert any(operation.kind == "unknown" for operation in program.operations)
    assert "batch" in program.fixed
    assert program.tensors["b"].dims[1] not in program.fixed


def test_stacked_and_repeated_arrays_keep_their_dims():
    def loss(weights, x):
        stacked = jnp.stack([x @ weights["a"], x @ weights["b"]], axis=1)
        first, second = jnp.unstack(stacked, axis=1)
        return (jnp.tile(first * second, (1, 2)) @ weights["c"]).sum()

    program = trace_loss(loss, JOINED, shape(4, 6))
    assert not program.unknown
    assert program.tensors["a"].dims[1] == program.tensors["b"].dims[1]
    assert program.tensors["a"].dims[1] in program.fixed, "tile repeats it"
    assert "batch" not in program.fixed


MADE_UP = Primitive("made_up")
MADE_UP.def_impl(lambda x: 2 * x)
MADE_UP.def_abstract_eval(lambda x: x)
mlir.register_lowering(MADE_UP, mlir.lower_fun(lambda x: 2 * x, multiple_results=False))
ad.deflinear2(MADE_UP, lambda slope, _: [2 * slope])


@pytest.mark.parametrize("plan", ["single", "data=2", "data=2,zero=3", "tensor=2", "microbatches=2", "recompute=blocks", "auto"])
def test_a_primitive_that_nobody_knows_costs_no_run(plan, capsys):
    class Doubles(keras.layers.Layer):
        def call(self, x):
            return MADE_UP.bind(x)

    def fitted(plan):
        keras.utils.set_random_seed(0)
        hidden = [keras.layers.Dense(8, "tanh"), Doubles(), keras.layers.Dense(8, "tanh")]
        model = keras.Sequential([keras.Input((6,)), *hidden, keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        history = parafit.fit(model, np.ones((32, 6), "float32"), np.ones((32, 1), "float32"), epochs=2, plan=plan, verbose=2)
        return history.history["loss"]

    np.testing.assert_allclose(fitted(plan), fitted("single"), rtol=1e-5)
    assert "predicted" in capsys.readouterr().out


@pytest.mark.parametrize("loop", ["scan", "while", "cond"])
def test_a_loop_in_a_form_that_nobody_knows_costs_no_run(loop):
    """As JAX 0.11 changed the parameters of `scan`, another JAX may change those of others."""

    def step(w, x):
        w = jax.lax.scan(lambda w, row: (w * row.sum(), row), w, x)[0]
        w = jax.lax.while_loop(lambda w: w.sum() < 0, lambda w: w * 2, w)
        return jax.lax.cond(w.sum() > 0, lambda w: w, lambda w: w + 1, w)

    closed = jax.make_jaxpr(step)(shape(3), shape(4, 3))
    names = {"scan": {"num_carry", "ft_in"}, "while": {"cond_nconsts"}, "cond": {"branches"}}[loop]
    other = [
        equation.replace(params={name: value for name, value in equation.params.items() if name not in names})
        if equation.primitive.name == loop
        else equation
        for equation in closed.jaxpr.eqns
    ]
    graph = Graph(ClosedJaxpr(closed.jaxpr.replace(eqns=other), closed.consts), _inputs("w", "x"), [])
    assert list(graph.unknown) == [loop]
    assert arrays_of(graph)[0]


@pytest.mark.parametrize(
    ("name", "reason"),
    [("mlp", ""), ("normalised", "batch statistics in 'batch_normalization"), ("transformer", ""), ("sequence", "")],
)
def test_why_rows_depend_on_each_other(name, reason):
    found = from_zoo(name)[0].couples_batch
    assert reason in found
    assert bool(found) == bool(reason)


def test_a_loop_counts_each_of_its_steps():
    def loss(weights, x):
        final, _ = jax.lax.scan(lambda state, row: (jnp.tanh(state @ weights["w"] + row), None), jnp.zeros((4, 8)), x.swapaxes(0, 1))
        return final.sum()

    program = trace_loss(loss, {"w": shape(8, 8)}, shape(4, 10, 8))
    products = [operation for operation in program.operations if operation.kind == "matmul"]
    assert {product.steps for product in products} == {10}
    assert sum(product.flops * product.steps for product in products if product.phase == "forward") == 10 * 2 * 4 * 8 * 8
    assert any(operation.kind == "loop" and operation.steps == 10 for operation in program.operations)
    assert "sequence" in program.fixed


def test_a_condition_costs_its_dearest_branch():
    def loss(weights, x):
        return jax.lax.cond(x.sum() > 0, lambda: (x @ weights["w"]).sum(), lambda: x.sum())

    program = trace_loss(loss, {"w": shape(8, 8)}, shape(4, 8))
    forward = [operation for operation in program.operations if operation.kind == "matmul" and operation.phase == "forward"]
    assert [operation.shape for operation in forward] == [(1, 4, 8, 8)]


def block(x, weights):
    heads = [jnp.einsum("btd,dhe->bthe", x, weights[name]) for name in "qkv"]
    scores = jax.nn.softmax(jnp.einsum("bthe,bshe->bhts", *heads[:2]), -1)
    x = x + jnp.einsum("bhts,bshe,hed->btd", scores, heads[2], weights["o"])
    return x + jax.nn.gelu(x @ weights["up"]) @ weights["down"]


def gpt(count, width, heads, *, stacked):
    """Shapes of the weights of a GPT, and its loss."""
    lead = (count,) if stacked else ()
    one = {name: shape(*lead, width, heads, width // heads) for name in "qkv"} | {"o": shape(*lead, heads, width // heads, width)}
    one |= {"up": shape(*lead, width, 4 * width), "down": shape(*lead, 4 * width, width)}
    weights = {"table": shape(512, width), "blocks": one if stacked else [one] * count}

    def loss(weights, batch):
        x = weights["table"][batch["x"]]
        if stacked:
            x, _ = jax.lax.scan(lambda x, part: (block(x, part), None), x, weights["blocks"])
        for part in () if stacked else weights["blocks"]:
            x = block(x, part)
        return -jax.nn.log_softmax(x @ weights["table"].T)[..., 0].mean()

    return loss, weights


TOKENS = {"x": shape(64, 32, dtype="int32")}


def test_equal_blocks_are_written_once():
    program = trace_loss(*gpt(6, 64, 4, stacked=False), TOKENS)
    folded = fold_blocks(program)
    assert folded.flops == pytest.approx(program.flops)
    assert folded.bytes_of("parameter") == program.bytes_of("parameter")
    assert folded.bytes_of("gradient") == program.bytes_of("gradient")
    assert len(folded.operations) < len(program.operations) / 3
    assert {tensor.count for tensor in folded.of_role("parameter")} == {1, 6}
    products = [operation for operation in folded.operations if operation.kind == "matmul" and operation.count > 1]
    assert sum(operation.phase == "forward" for operation in products) >= 8
    kept = {tensor.dims for tensor in program.of_role("parameter")}
    assert kept == {tensor.dims for tensor in folded.of_role("parameter")}  # what is decided for one block holds for all


def test_blocks_in_a_loop_and_one_after_the_other_do_the_same_work():
    apart, looped = (trace_loss(*gpt(3, 64, 4, stacked=stacked), TOKENS) for stacked in (False, True))
    of_products = [
        sum(operation.flops * operation.steps for operation in program.operations if operation.kind == "matmul")
        for program in (apart, looped)
    ]
    assert of_products[0] == of_products[1]
    assert looped.bytes_of("parameter") == apart.bytes_of("parameter")
    assert looped.tensors["blocks/up"].dims[1:] == (looped.tensors["table"].dims[1], looped.tensors["blocks/down"].dims[1])


def test_a_trillion_parameters_are_traced_from_shapes_alone():
    program = trace_loss(*gpt(128, 25600, 160, stacked=True), TOKENS, optimizer=(momentum_init, momentum_update))
    assert program.bytes_of("parameter") > 4e12
    assert program.bytes_of("slot") == program.bytes_of("parameter") == program.bytes_of("gradient")
    assert not program.unknown


def momentum_init(weights):
    return jax.tree.map(jnp.zeros_like, weights)


def momentum_update(gradients, slots, weights):
    slots = jax.tree.map(lambda slot, gradient: 0.9 * slot + gradient, slots, gradients)
    return jax.tree.map(lambda slot: -0.1 * slot, slots), slots


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(2, 40), width=st.integers(2, 40), depth=st.integers(1, 3))
def test_twice_the_rows_are_twice_the_work(rows, width, depth):
    def loss(weights, x):
        for index in range(depth):
            x = jnp.tanh(x @ weights[str(index)])
        return (x**2).sum()

    weights = {str(index): shape(width, width) for index in range(depth)}
    once, twice = (trace_loss(loss, weights, shape(size, width)) for size in (rows, 2 * rows))
    assert twice.flops == pytest.approx(2 * once.flops, rel=1e-9, abs=16)  # the loss itself is a few numbers


@settings(deadline=None)
@given(st.data())
def test_reshapes_there_and_back_lose_nothing(data):
    sizes = data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=5))
    known = Dims()
    before = [known.new(size) for size in sizes]
    (flat,) = known.reshape(before, [int(np.prod(sizes))])
    after = known.reshape([flat], sizes)
    assert [known.factors(dim) for dim in after] == [known.factors(dim) for dim in before]
    assert not known.fixed()


def test_dims_that_cannot_be_matched_are_fixed_and_not_tied():
    known = Dims()
    one, other = known.new(12), known.new(12)
    known.reshape([one], [3, 4])
    known.reshape([other], [4, 3])
    assert not known.tie(one, other)
    assert {known.major(one), known.major(other)} <= known.fixed()


def test_a_model_that_cannot_be_traced_names_the_layer():
    class Peeking(layers.Layer):
        looks = False

        def call(self, x):
            return x if not self.looks or float(x[0, 0]) > 0 else -x

    model = keras.Sequential([keras.Input((3,)), layers.Dense(4), Peeking(name="peeking")])
    model.compile("sgd", "mse")
    adapted = KerasModel(model, "fit")
    adapted.build(lambda: (np.zeros((2, 3)), np.zeros((2, 4))))
    step = adapted.train_step()
    model.layers[-1].looks = True
    with pytest.raises(ModelError, match=r"model 'mine' cannot be traced in layer 'peeking': ConcretizationTypeError.*values of arrays"):
        trace_step(step, step.read(), (shape(2, 3), shape(2, 4)), name="mine")


def test_flax_modules_and_optax():
    nnx, optax = pytest.importorskip("flax.nnx"), pytest.importorskip("optax")
    from parafit.nnx import trace_nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.inner, self.norm, self.outer = nnx.Linear(12, 16, rngs=rngs), nnx.BatchNorm(16, rngs=rngs), nnx.Linear(16, 3, rngs=rngs)

        def __call__(self, x):
            return self.outer(nnx.relu(self.norm(self.inner(x))))

    def loss(model, batch):
        return optax.softmax_cross_entropy_with_integer_labels(model(batch["x"]), batch["y"]).mean()

    model = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    program = trace_nnx(model, loss, {"x": shape(32, 12), "y": shape(32, dtype="int32")}, optimizer=optax.adam(1e-3), name="net")
    inner, outer = program.tensors["inner/kernel"], program.tensors["outer/kernel"]
    assert inner.dims[1] == outer.dims[0] == program.tensors["norm/scale"].dims[0]
    assert {tensor.dims for tensor in program.of_role("slot") if tensor.shape == (12, 16)} == {inner.dims}
    assert program.tensors["norm/mean"].role == "state"
    assert len(program.of_role("gradient")) == len(program.of_role("parameter")) == 6
    assert "batch statistics" in program.couples_batch
    assert not program.unknown


def test_products_that_ask_for_another_order_of_dims_read_copies():
    """The heads of attention lie between tokens and features; a dense layer reads its rows as they lie."""
    one, heads = (jax.ShapeDtypeStruct(shape, "float32") for shape in ((8, 16), (2, 8, 4, 16)))
    scores = trace(lambda q, k: jnp.einsum("btnh,bsnh->bnts", q, k), (heads, heads), _inputs("q", "k"), stored=as_traced)
    copies = [operation for operation in scores.operations if operation.kind == "move"]
    assert [operation.bytes for operation in copies] == [2 * 4 * 1024] * 2
    plain = trace(lambda x, w: x @ w, (one, jax.ShapeDtypeStruct((16, 4), "float32")), _inputs("x", "w"), stored=as_traced)
    assert not any(operation.kind == "move" for operation in plain.operations)


def test_functions_are_counted_among_the_flops():
    program = trace(lambda x: jnp.tanh(x) * 2 + 1, (jax.ShapeDtypeStruct((8, 16), "float32"),), _inputs("x"))
    (operation,) = program.operations
    assert (operation.flops, operation.functions) == (3 * 128, 128)


def _inputs(*names):
    return [Leaf(name=name, role="input") for name in names]


def test_the_gradient_of_a_softmax_is_computed_from_its_result():
    """JAX's default form divides by the square of the sum, and moves about twice as much."""

    def gradient(x):
        return jax.grad(lambda x: jnp.sum(jax.nn.softmax(x) * x))(x)

    x = jnp.linspace(-2, 2, 12).reshape(3, 4)
    closed, shape = jaxpr_of(gradient, x)
    assert "integer_pow" in str(jax.make_jaxpr(gradient)(x))
    assert "integer_pow" not in str(closed)
    assert shape.shape == x.shape
    np.testing.assert_allclose(jax.core.eval_jaxpr(closed.jaxpr, closed.consts, x)[0], gradient(x), rtol=1e-5, atol=1e-7)
