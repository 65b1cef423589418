"""The rewritten step computes what the step computes, and nothing slow is left in it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import jaxpr_as_fun

from parafit.backends.cpu.rewrite import rewrite_jaxpr
from parafit.techniques.bfloat16 import in_bfloat16
from parafit.tracing.passes import traced_through

TOLERANCE = {"float32": 3e-6, "float64": 1e-13, "bfloat16": 2e-2}


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


def random(*shape, dtype="float32", seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), dtype)


def names(jaxpr):
    """The primitives of a jaxpr at every depth."""
    found = set()
    for equation in jaxpr.eqns:
        found.add(equation.primitive.name)
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda value: hasattr(value, "eqns") or hasattr(value, "jaxpr")
        ):
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                found |= names(getattr(value, "jaxpr", value))
    return found


def calls(jaxpr):
    """The names of the replacements in a jaxpr, at every depth."""
    text = str(jaxpr)
    return {word.split("=")[1] for word in text.replace("[", " ").split() if word.startswith("name=fast_")}


def close(function, *args, tolerance=None):
    """`function` rewritten agrees with `function`; returns the replacements."""
    closed = jax.make_jaxpr(function)(*args)
    expected, got = jax.tree.leaves(jax.jit(function)(*args)), jax.tree.leaves(jax.jit(traced_through(rewrite_jaxpr, function))(*args))
    for want, have in zip(expected, got, strict=True):
        assert want.shape == have.shape
        assert want.dtype == have.dtype
        limit = TOLERANCE.get(str(want.dtype), 0) if tolerance is None else tolerance
        scale = float(np.max(np.abs(np.nan_to_num(np.asarray(want, "float64"))), initial=1e-30))
        np.testing.assert_allclose(np.asarray(have, "float64"), np.asarray(want, "float64"), rtol=limit, atol=limit * scale)
    return calls(rewrite_jaxpr(closed).jaxpr)


def convolution(strides=1, padding="SAME", dilation=1, base=1, groups=1, layout="last", space=2):
    letters = "DHW"[3 - space :]
    images = f"N{letters}C" if layout == "last" else f"NC{letters}"
    dims = images, f"{letters}IO" if layout == "last" else f"OI{letters}", images

    def apply(images, kernel):
        return lax.conv_general_dilated(
            images,
            kernel,
            (strides,) * space,
            padding,
            lhs_dilation=(base,) * space,
            rhs_dilation=(dilation,) * space,
            dimension_numbers=dims,
            feature_group_count=groups,
        )

    return apply


def gradients(apply, *args):
    """A function of `args` that returns apply(*args) and its gradients for a cotangent that is no constant."""
    shape = jax.eval_shape(apply, *args)

    def both(*args):
        value, pullback = jax.vjp(apply, *args)
        return value, pullback(random(*shape.shape, dtype=shape.dtype, seed=9))

    return both


def operands(layout, space, inputs, outputs, groups, dtype, width=3, size=9):
    images, kernel = random(2, *[size] * space, inputs, dtype=dtype), random(*[width] * space, inputs // groups, outputs, dtype=dtype)
    return (images, kernel) if layout == "last" else (jnp.moveaxis(images, -1, 1), jnp.moveaxis(kernel, (-1, -2), (0, 1)))


@pytest.mark.parametrize("layout", ["last", "first"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": "VALID"},
        {"strides": 2},
        {"strides": 2, "padding": "VALID"},
        {"dilation": 2},
        {"strides": 3, "padding": "VALID", "dilation": 2},
        {"base": 2, "padding": ((1, 2), (2, 2))},
        {"padding": ((2, 0), (0, 3))},
    ],
    ids=str,
)
def test_convolutions_of_two_dims_and_their_gradients(options, layout, dtype):
    found = close(gradients(convolution(layout=layout, **options), *(args := operands(layout, 2, 3, 4, 1, dtype))), *args)
    assert found == {"fast_conv_general_dilated"}


@pytest.mark.parametrize("options", [{}, {"padding": "VALID"}, {"strides": 2}, {"base": 2, "padding": ((1, 2), (2, 2))}], ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(9, 10), (9, 2), (1, 9)])
def test_convolutions_of_few_and_many_channels(inputs, outputs, options):
    function = gradients(convolution(**options), *(args := operands("last", 2, inputs, outputs, 1, "float32")))
    close(function, *args)
    left = "conv_general_dilated" in names(rewrite_jaxpr(jax.make_jaxpr(function)(*args)).jaxpr)
    strided = {(9, 2): "strides", (1, 9): "base"}  # a convolution of few results that goes in strides: forward, or the images' gradient
    assert left == (outputs == 10 or strided[inputs, outputs] in options)


def test_products_per_pixel_hold_little(monkeypatch):
    function = gradients(convolution(strides=2), *(args := operands("last", 2, 9, 10, 1, "float32")))

    def convolutions():
        return str(rewrite_jaxpr(jax.make_jaxpr(function)(*args))).count("conv_general_dilated[")

    before = convolutions()
    monkeypatch.setattr("parafit.backends.cpu.convolutions.BLOCK_BYTES", 64)
    assert convolutions() == before + 1


def test_patches_are_gathered_in_blocks(monkeypatch):
    monkeypatch.setattr("parafit.backends.cpu.convolutions.BLOCK_BYTES", 2 * 9 * 27 * 4 * 4)  # four of nine rows
    args = operands("last", 2, 3, 4, 1, "float32")

    def product_count():
        return str(rewrite_jaxpr(jax.make_jaxpr(gradients(convolution(), *args))(*args))).count("dot_general[")

    blocks = product_count()
    close(gradients(convolution(), *args), *args)
    monkeypatch.undo()
    assert blocks == product_count() + 2


def test_networks_without_gradients_are_left_whole():
    def network(images, kernel):
        return lax.reduce_window(jnp.maximum(convolution()(images, kernel), 0), -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

    args = operands("last", 2, 3, 4, 1, "float32")
    assert not calls(rewrite_jaxpr(jax.make_jaxpr(network)(*args)).jaxpr)
    trained = rewrite_jaxpr(jax.make_jaxpr(gradients(network, *args))(*args)).jaxpr
    assert calls(trained) >= {"fast_conv_general_dilated", "fast_reduce_window_max"}


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize(("start", "join"), [(-jnp.inf, lax.max), (0.0, lax.add)])
def test_pools_side_by_side_in_networks_that_train(window, start, join, dtype):
    def network(images, kernel):
        dims = (1, window, window, 1)
        return lax.reduce_window(jnp.maximum(convolution()(images, kernel), 0), start, join, dims, dims, "VALID")

    args = operands("last", 2, 3, 4, 1, dtype)
    assert f"fast_reduce_window_{join.__name__.replace('add', 'sum')}" in close(gradients(network, *args), *args)


@pytest.mark.parametrize(("strides", "layout"), [(1, "first"), (2, "last")])
@pytest.mark.parametrize("space", [1, 3])
def test_convolutions_of_one_and_three_dims(space, strides, layout, dtype):
    args = operands(layout, space, 3, 4, 1, dtype, size=6)
    assert close(gradients(convolution(strides=strides, layout=layout, space=space), *args), *args) == {"fast_conv_general_dilated"}


@pytest.mark.parametrize(("strides", "layout"), [(1, "last"), (2, "first")])
@pytest.mark.parametrize(
    ("inputs", "outputs", "groups"),
    [(6, 6, 6), (6, 12, 6), (8, 4, 2), (16, 8, 2), (24, 48, 12), (40, 80, 40), (80, 80, 10)],
)
def test_depthwise_and_grouped_convolutions(inputs, outputs, groups, strides, layout, dtype):
    args = operands(layout, 2, inputs, outputs, groups, dtype, size=7)
    assert close(gradients(convolution(groups=groups, strides=strides, layout=layout), *args), *args) == {"fast_conv_general_dilated"}


def test_grouped_convolution_of_one_dim():
    args = operands("last", 1, 6, 6, 6, "float32")
    assert close(gradients(convolution(groups=6, space=1), *args), *args) == {"fast_conv_general_dilated"}


def test_convolutions_in_half_precision():
    args = operands("last", 2, 4, 4, 4, "bfloat16")
    close(gradients(convolution(groups=4), *args), *args)


def test_padding_that_cuts_in_double_precision():  # in single precision XLA itself reads beyond the image (jaxlib 0.10.2)
    with jax.enable_x64(True):
        args = operands("last", 2, 3, 4, 1, "float64")
        close(gradients(convolution(padding=((-1, 1), (0, -2))), *args), *args)


def test_second_derivatives_of_a_convolution():
    args = operands("last", 2, 2, 3, 1, "float32", size=5)
    close(jax.grad(lambda images, kernel: (jax.grad(lambda k: (convolution()(images, k) ** 3).sum())(kernel) ** 2).sum()), *args)


def test_no_convolution_keeps_a_slow_layout():
    args = operands("first", 2, 8, 9, 1, "float32")
    closed = rewrite_jaxpr(jax.make_jaxpr(gradients(convolution(layout="first"), *args))(*args))

    def check(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "conv_general_dilated":
                dims = equation.params["dimension_numbers"]
                assert (dims.lhs_spec, dims.rhs_spec, dims.out_spec) == ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
            for inner in (value.jaxpr for value in equation.params.values() if hasattr(value, "jaxpr")):
                check(inner)

    check(closed.jaxpr)
    assert "conv_general_dilated" in names(closed.jaxpr)


def test_a_canonical_convolution_is_left_alone():
    closed = jax.make_jaxpr(convolution())(*operands("last", 2, 8, 9, 1, "float32"))
    assert rewrite_jaxpr(closed) is closed


@pytest.mark.parametrize(
    ("window", "strides", "padding"),
    [(2, 2, "VALID"), (2, 2, "SAME"), (3, 2, "SAME"), (3, 1, "SAME"), (2, 3, "VALID"), (3, 3, "VALID"), (2, 1, ((1, 0), (0, 1)))],
)
@pytest.mark.parametrize("space", [1, 2])
def test_pooling_and_its_gradients(space, window, strides, padding, dtype):
    images = jnp.round(random(2, *[7] * space, 3, dtype=dtype), 1)  # with ties
    if not isinstance(padding, str):
        padding = ((0, 0), *(padding * space)[:space], (0, 0))
    dims = (1, *[window] * space, 1), (1, *[strides] * space, 1), padding
    most = gradients(lambda images: lax.reduce_window(images, -jnp.inf, lax.max, *dims), images)
    total = gradients(lambda images: lax.reduce_window(images, 0.0, lax.add, *dims), images)
    xlas = window == strides  # no kernel is trained
    assert close(most, images) == {"fast_select_and_scatter_add"} | (set() if xlas else {"fast_reduce_window_max"})
    spared = window**space <= 4 and (xlas or strides == 1)  # the gradient of pools side by side sums over windows that overlap
    assert close(total, images) == (set() if spared else {"fast_reduce_window_sum"})


@pytest.mark.parametrize("channels", [2, 16])
def test_the_maximum_s_gradient_is_identical_where_pools_hold_nans_infinities_and_ties(channels):
    images = random(4, 8, 8, channels).at[0, 1].set(jnp.nan).at[1, :, 2].set(-jnp.inf).at[2].set(1.0).at[3, 3, 3].set(jnp.inf)
    for dims in (((1, 2, 2, 1), (1, 2, 2, 1), "VALID"), ((1, 3, 3, 1), (1, 2, 2, 1), "SAME")):
        pool = gradients(lambda images, dims=dims: lax.reduce_window(images, -jnp.inf, lax.max, *dims), images)
        side_by_side = "concatenate[" in str(rewrite_jaxpr(jax.make_jaxpr(pool)(images)))
        assert side_by_side == (channels < 16 and dims[0] == dims[1])
        for want, have in zip(jax.tree.leaves(pool(images)), jax.tree.leaves(traced_through(rewrite_jaxpr, pool)(images))):
            np.testing.assert_array_equal(have, want)


def test_pools_of_integers_and_large_windows_are_left_alone():
    whole = jax.make_jaxpr(lambda images: lax.reduce_window(images, 0, lax.add, (2, 2), (2, 2), "VALID"))(jnp.ones((4, 4), int))
    large = jax.make_jaxpr(lambda images: lax.reduce_window(images, 0.0, lax.add, (9, 9), (1, 1), "VALID"))(jnp.ones((20, 20)))
    assert rewrite_jaxpr(whole) is whole
    assert rewrite_jaxpr(large) is large


@pytest.mark.parametrize("shape", [(5, 7, 3), (4, 2, 9), (6, 5, 5), (40, 300, 2), (40, 2, 300)])
def test_a_dense_kernel_s_gradient(shape, dtype):
    terms, rows, columns = shape
    left, right = random(2, terms, rows, dtype=dtype), random(2, terms, columns, dtype=dtype)
    deep = lambda left, right: lax.dot_general(left, right, (((0, 1), (0, 1)), ((), ())))  # noqa: E731
    turned = lambda left, right: lax.dot_general(left, right, (((1, 0), (1, 0)), ((), ()))).T  # noqa: E731
    assert close(deep, left, right) == close(turned, left, right) == {"fast_dot_general"}
    close(lambda left, right: lax.dot_general(left[0], right[0], (((0,), (0,)), ((), ()))), left, right)


def test_the_gradient_of_a_wide_kernel_is_left_as_it_is_in_short_sums():
    gradient = lambda columns: lambda left, right: lax.dot_general(left, right[:, :columns], (((0,), (0,)), ((), ())))  # noqa: E731
    left, right = random(256, 128), random(256, 300)
    assert close(gradient(256), left, right) == set()
    assert close(gradient(20), left, right) == {"fast_dot_general"}
    assert close(gradient(256), random(2048, 128), random(2048, 300)) == {"fast_dot_general"}


def test_a_product_over_differently_ordered_dims_is_left_alone():
    closed = jax.make_jaxpr(lambda a, b: lax.dot_general(a, b, (((0, 1), (1, 0)), ((), ()))))(jnp.ones((3, 4, 5)), jnp.ones((4, 3, 6)))
    assert rewrite_jaxpr(closed) is closed


def test_a_product_keeps_its_result_s_dtype():
    operand = random(8, 3, dtype="bfloat16")
    product = lambda a: lax.dot_general(a, a, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)  # noqa: E731
    assert close(product, operand) == {"fast_dot_general"}


def test_products_in_half_precision_are_identical():
    left, right = random(6, 40, dtype="bfloat16"), random(40, 5, dtype="bfloat16")
    assert close(lambda left, right: left @ right, left, right, tolerance=0) == {"fast_dot_general"}


@pytest.mark.parametrize(
    ("product", "columns"),
    [
        (lambda left, right: (left @ right).T, 5),
        (lambda left, right: (left @ right).T @ left, 5),
        (lambda left, right: left.reshape(40, 6).T @ right, 5),
        (lambda left, right: jnp.einsum("amk,kn->nam", left.reshape(2, 3, 40), right), 5),
        (lambda left, right: jnp.einsum("abk,kan->bna", left.reshape(2, 3, 40), right.reshape(40, 2, 5)), 10),
        (lambda left, right: left.T @ jnp.tanh(left) @ right, 5),
    ],
)
def test_transposed_products_in_half_precision_run(product, columns):  # XLA itself fails at some: "Unsupported element type for DotThunk"
    left, right = random(6, 40), random(40, columns)
    closed = rewrite_jaxpr(in_bfloat16(jax.make_jaxpr(product)(left, right)))
    (have,), want = jax.jit(jaxpr_as_fun(closed))(left, right), product(left, right)
    np.testing.assert_allclose(have, want, rtol=0, atol=2e-2 * np.max(np.abs(want)))


def test_the_largest_few_are_identical_with_ties_nans_and_zeros():
    special = [1.0, jnp.nan, 2.0, 2.0, -jnp.inf, jnp.inf, -0.0, 0.0, jnp.nan, -1.0, -jnp.inf, 2.0, -jnp.nan]
    values = jnp.asarray([special, special[::-1], [3.0] * 13, [-jnp.inf] * 13], "float32")
    for count in (1, 3, 9):
        want, have = lax.top_k(values, count), traced_through(rewrite_jaxpr, lambda values, count=count: lax.top_k(values, count))(values)
        np.testing.assert_array_equal(have[1], want[1])
        np.testing.assert_array_equal(np.asarray(have[0]).view("int32") & 0x7FC00000, np.asarray(want[0]).view("int32") & 0x7FC00000)
        np.testing.assert_array_equal(have[0], want[0])


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("shape", "count"), [((9,), 1), ((5, 12), 4), ((2, 3, 7), 7)])
def test_the_largest_few(shape, count, kind):
    assert close(lambda values: lax.top_k(values, count), jnp.round(random(*shape, dtype=kind)), tolerance=0) == {"fast_top_k"}


def test_many_of_many_and_integers_are_left_to_xla():
    for values, count in ((jnp.ones((2, 100)), 5), (jnp.ones((2, 10), int), 2)):
        closed = jax.make_jaxpr(lambda values, count=count: lax.top_k(values, count))(values)
        assert rewrite_jaxpr(closed) is closed


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4, 5)])
def test_random_bits_are_the_same(shape):
    close(lambda key: jax.random.bits(key, shape), jax.random.key(7), tolerance=0)
    found = close(lambda seed: jax.random.bernoulli(jax.random.PRNGKey(seed), 0.3, shape), 11, tolerance=0)
    assert found == {"fast_random_bits"}


def test_other_random_generators_are_left_alone():
    closed = jax.make_jaxpr(lambda key: jax.random.bits(key, (4,)))(jax.random.key(0, impl="rbg"))
    assert rewrite_jaxpr(closed) is closed


def inside_scan(step):
    return lambda *args: lax.scan(lambda carry, _: (carry + 1, step(*args)), 0, None, length=2)


def inside_while(step):
    def run(*args):
        shapes = jax.eval_shape(step, *args)
        empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return lax.while_loop(lambda state: state[0] < 2, lambda state: (state[0] + 1, step(*args)), (0, empty))

    return run


def inside_cond(step):
    return lambda *args: lax.cond(args[0].sum() < 1e9, step, lambda *args: jax.tree.map(jnp.zeros_like, step(*args)), *args)


def inside_custom(step):
    wrapped = jax.custom_vjp(step)
    wrapped.defvjp(lambda *args: (step(*args), None), lambda residual, cotangent: cotangent)
    return wrapped


@pytest.mark.parametrize(
    "inside", [inside_scan, inside_while, inside_cond, inside_custom, jax.jit, jax.checkpoint, lambda step: jax.jit(jax.jit(step))]
)
def test_targets_are_found_at_every_depth(inside):
    args = operands("first", 2, 3, 4, 1, "float32")
    assert "fast_conv_general_dilated" in close(inside(gradients(convolution(layout="first"), *args)), *args)


def test_rematerialised_and_vectorised_steps():
    images, kernels = random(3, 2, 6, 6, 3), random(3, 3, 3, 3, 4)
    loss = jax.checkpoint(lambda images, kernel: (convolution()(images, kernel) ** 2).sum())
    close(jax.grad(loss, argnums=(0, 1)), images[0], kernels[0])
    close(jax.vmap(jax.grad(loss, argnums=(0, 1))), images, kernels)
    step = jax.grad(loss, argnums=1)
    np.testing.assert_allclose(
        jax.vmap(traced_through(rewrite_jaxpr, step))(images, kernels), jax.vmap(step)(images, kernels), rtol=1e-4, atol=1e-4
    )


def test_a_rewritten_function_can_be_differentiated():
    args = operands("first", 2, 3, 4, 1, "float32")
    apply = convolution(layout="first")
    want = jax.grad(lambda *args: apply(*args).sum(), argnums=(0, 1))(*args)
    have = jax.grad(lambda *args: traced_through(rewrite_jaxpr, apply)(*args).sum(), argnums=(0, 1))(*args)
    for left, right in zip(have, want):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-4)


def test_names_constraints_and_untouched_equations_survive():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))

    def step(images, kernel):
        with jax.named_scope("block"):
            images = lax.with_sharding_constraint(jnp.tanh(images), sharding)
            return jax.grad(lambda kernel: convolution()(images, kernel).sum())(kernel)

    closed = jax.make_jaxpr(step)(*operands("last", 2, 8, 9, 1, "float32"))
    rewritten = rewrite_jaxpr(closed)
    pairs = [(old, new) for old, new in zip(closed.jaxpr.eqns, rewritten.jaxpr.eqns, strict=True) if old is not new]
    assert len(pairs) == 1
    assert all(str(old.source_info.name_stack) == str(new.source_info.name_stack) != "" for old, new in pairs)
    assert "sharding_constraint" in names(rewritten.jaxpr)


def test_effects_survive(capsys):
    def step(images, kernel):
        jax.debug.print("here {}", images.shape[0])
        return jax.grad(lambda kernel: convolution()(images, kernel).sum())(kernel)

    args = operands("last", 2, 3, 4, 1, "float32")
    closed = jax.make_jaxpr(step)(*args)
    assert rewrite_jaxpr(closed).effects == closed.effects
    jax.block_until_ready(jax.jit(traced_through(rewrite_jaxpr, step))(*args))
    jax.effects_barrier()
    assert capsys.readouterr().out == "here 2\n"


def test_equal_equations_share_one_replacement():
    args = operands("first", 2, 3, 4, 1, "float32")
    apply = convolution(layout="first")
    closed = rewrite_jaxpr(jax.make_jaxpr(lambda images, kernel: apply(images, kernel) + apply(2 * images, kernel))(*args))
    bodies = {id(equation.params["jaxpr"]) for equation in closed.jaxpr.eqns if "fast" in str(equation.params.get("name"))}
    assert len(bodies) == 1


def test_nothing_to_do_is_the_same_object():
    closed = jax.make_jaxpr(lambda x: lax.fori_loop(0, 3, lambda i, x: jnp.sin(x) @ x, x))(jnp.ones((3, 3)))
    assert rewrite_jaxpr(closed) is closed


def test_trees_of_arguments_and_results():
    doubled = traced_through(rewrite_jaxpr, lambda tree, number: {"sum": tree["a"] + number, "rest": [tree["b"]]})
    assert jax.tree.map(float, doubled({"a": 1.0, "b": 2.0}, 3.0)) == {"sum": 4.0, "rest": [2.0]}


def keras_step(build):
    """A Keras network's train step, its state and a batch of 8."""
    import keras

    keras.utils.set_random_seed(3)
    model, x, y = build(keras)
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.train_on_batch(x, y)
    groups = model.trainable_variables, model.non_trainable_variables, model.optimizer.variables, model.metrics_variables
    return model.train_step, tuple([variable.value for variable in group] for group in groups), (x, y)


def cnn(keras):
    layers = keras.layers
    body = [keras.Input((14, 14, 2)), layers.Conv2D(4, 3, activation="relu"), layers.BatchNormalization(), layers.MaxPooling2D()]
    body += [layers.SeparableConv2D(6, 3, padding="same", activation="relu"), layers.AveragePooling2D(3, 2, padding="same")]
    body += [
        layers.Conv2DTranspose(4, 3, strides=2),
        layers.MaxPooling2D(3, 2),
        layers.Flatten(),
        layers.Dropout(0.3),
        layers.Dense(5, "softmax"),
    ]
    return keras.Sequential(body), np.random.default_rng(0).random((8, 14, 14, 2), "float32"), np.arange(8) % 5


def lstm(keras):
    layers = keras.layers
    body = [keras.Input((7, 3)), layers.LSTM(8, return_sequences=True), layers.Bidirectional(layers.GRU(6)), layers.Dense(5, "softmax")]
    return keras.Sequential(body), np.random.default_rng(0).random((8, 7, 3), "float32"), np.arange(8) % 5


def transformer(keras):
    layers = keras.layers
    tokens = keras.Input((6,), dtype="int32")
    hidden = layers.Embedding(20, 8)(tokens)
    hidden = layers.LayerNormalization()(hidden + layers.MultiHeadAttention(2, 4, dropout=0.1)(hidden, hidden))
    hidden = layers.Dense(8)(layers.Dense(32, "gelu")(hidden))
    output = layers.Dense(5, "softmax")(layers.GlobalAveragePooling1D()(hidden))
    return keras.Model(tokens, output), np.random.default_rng(0).integers(0, 20, (8, 6)), np.arange(8) % 5


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (cnn, {"conv_general_dilated", "dot_general", "random_bits", "reduce_window_sum", "select_and_scatter_add"}),
        (lstm, {"dot_general"}),
        (transformer, {"dot_general", "random_bits"}),
    ],
)
def test_one_step_of_a_keras_network(build, expected):
    step, state, batch = keras_step(build)
    closed, shapes = jax.make_jaxpr(step, return_shape=True)(state, batch)
    rewritten = rewrite_jaxpr(closed)
    assert calls(rewritten.jaxpr) >= {f"fast_{name}" for name in expected}
    assert not names(rewritten.jaxpr) & {"select_and_scatter_add", "random_bits", "top_k"}
    leaves = jax.tree.leaves((state, batch))
    want, have = (
        jax.tree.unflatten(jax.tree.structure(shapes), jax.jit(jax.extend.core.jaxpr_as_fun(it))(*leaves)) for it in (closed, rewritten)
    )
    for left, right in zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(left, "float64"), np.asarray(right, "float64"), rtol=2e-4, atol=2e-6)
    assert math.isfinite(float(jax.tree.leaves(want)[0]))
