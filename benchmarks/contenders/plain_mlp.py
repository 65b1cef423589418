"""An MLP's training step in plain `jax.numpy`, the same computation as the Keras model of the workload.

Dense, BatchNormalization, ReLU and Dropout layers, softmax, sparse categorical cross-entropy on clipped probabilities,
Adam with its epsilon outside the bias correction, and running sums for mean loss and accuracy.
"""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp

from benchmarks.workloads import Workload

EPSILON = 1e-7
LEARNING_RATE, BETA_1, BETA_2 = 1e-3, 0.9, 0.999
NORM_EPSILON, NORM_MOMENTUM = 1e-3, 0.99


def program(workload: Workload):
    """The first state, `step(state, (x, y)) -> state` and `measure(state) -> (sums, state)` of `workload`.

    `sums` is (sum of losses, rows answered correctly, rows); `measure` sets them back to zero.
    """
    return first_state(workload), partial(step, workload), measure


def first_state(workload: Workload) -> dict:
    """Glorot-uniform kernels, zero biases, and everything else a step changes."""
    key = jax.random.key(0)
    params, moving = [], []
    for number, (inputs, outputs) in enumerate(pairwise((*workload.input_shape, *workload.hidden, workload.classes))):
        kernel = jax.nn.initializers.glorot_uniform()(jax.random.fold_in(key, number), (inputs, outputs))
        layer = {"kernel": kernel, "bias": jnp.zeros(outputs)}
        if workload.batch_norm and number < len(workload.hidden):
            layer |= {"scale": jnp.ones(outputs), "shift": jnp.zeros(outputs)}
            moving.append({"mean": jnp.zeros(outputs), "variance": jnp.ones(outputs)})
        params.append(layer)
    zeros = partial(jax.tree.map, jnp.zeros_like)
    return {
        "params": params,
        "moving": moving,
        "first_moments": zeros(params),
        "second_moments": zeros(params),
        "steps": jnp.zeros((), jnp.int32),
        "sums": tuple(jnp.zeros(3)),
    }


def step(workload: Workload, state: dict, batch) -> dict:
    """One step of Adam on `batch` = (x of shape (rows, features), y of shape (rows,))."""
    x, y = batch
    gradients, (loss, probabilities, moving) = jax.grad(partial(_loss, workload), has_aux=True)(
        state["params"], state["moving"], state["steps"], x, y
    )
    rows = jnp.float32(len(y))
    correct = jnp.sum(probabilities.argmax(axis=1) == y, dtype=jnp.float32)
    sums = jax.tree.map(jnp.add, state["sums"], (loss * rows, correct, rows))
    return {**_adam(state, gradients), "moving": moving, "sums": sums}


@partial(jax.jit, donate_argnums=0)
def measure(state: dict):
    """The running sums, and the state with sums of zero."""
    return state["sums"], {**state, "sums": tuple(jnp.zeros(3))}


def _loss(workload: Workload, params, moving, steps, x, y):
    probabilities, moving = _forward(workload, params, moving, steps, x)
    normed = probabilities / probabilities.sum(axis=1, keepdims=True)
    logarithms = jnp.log(jnp.clip(normed, EPSILON, 1 - EPSILON))
    loss = -jnp.mean(jnp.sum(jax.nn.one_hot(y, workload.classes) * logarithms, axis=1))
    return loss, (loss, probabilities, moving)


def _forward(workload: Workload, params, moving, steps, x):
    moved = []
    for number, layer in enumerate(params[:-1]):
        x = x @ layer["kernel"] + layer["bias"]
        if workload.batch_norm:
            x, statistics = _batch_norm(layer, moving[number], x)
            moved.append(statistics)
        x = jax.nn.relu(x)
        if workload.dropout:
            x = _dropout(x, workload.dropout, jnp.stack([jnp.uint32(number), steps.astype(jnp.uint32)]))
    return jax.nn.softmax(x @ params[-1]["kernel"] + params[-1]["bias"]), moved


def _batch_norm(layer, moving, x):
    mean, variance = x.mean(axis=0), x.var(axis=0)
    inverse = jax.lax.rsqrt(variance + NORM_EPSILON) * layer["scale"]
    moved = jax.tree.map(lambda old, new: old * NORM_MOMENTUM + new * (1 - NORM_MOMENTUM), moving, {"mean": mean, "variance": variance})
    return x * inverse + (layer["shift"] - mean * inverse), moved


def _dropout(x, rate: float, key):
    """Keras' own masks: its seed generator hands JAX the pair (seed of the layer, calls so far) as a raw key."""
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0.0)


def _adam(state: dict, gradients) -> dict:
    steps = state["steps"] + 1
    power = steps.astype(jnp.float32)
    rate = LEARNING_RATE * jnp.sqrt(1 - BETA_2**power) / (1 - BETA_1**power)
    first = jax.tree.map(lambda m, g: m + (g - m) * (1 - BETA_1), state["first_moments"], gradients)
    second = jax.tree.map(lambda v, g: v + (g * g - v) * (1 - BETA_2), state["second_moments"], gradients)
    params = jax.tree.map(lambda p, m, v: p - m * rate / (jnp.sqrt(v) + EPSILON), state["params"], first, second)
    return {"params": params, "first_moments": first, "second_moments": second, "steps": steps}
