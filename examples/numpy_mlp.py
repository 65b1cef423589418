"""A multilayer perceptron of any depth in NumPy, then the same training by parafit on one and on 8 devices.

    python examples/numpy_mlp.py [--epochs 50]

Five functions (`initialize_weights`, `forward_pass`, `backward_pass`, `train`, `test`) learn y = sin(3 x₁) x₂ from 4000
samples: sigmoid hidden layers, a linear output, the mean squared error (MSE), batches of 40. The three ways start from
the same weights and end, in float64, with the same weights.

What is often wrong in the articles that teach this network, and is right here:
- a weight matrix is (inputs, outputs) and a batch (rows, inputs), so that z = a w + b fits; (outputs, inputs) does not.
- the output of a regression is linear: behind a sigmoid it never leaves 0 … 1.
- the gradient of the MSE is 2 (a − y) / (rows · outputs); without the division the step grows with the batch.
- `backward_pass` needs the activations that `forward_pass` made: both names appear in the code that calls it.
- all gradients are computed before any weight moves.
- `test` measures on rows that `train` has not seen.
"""

import argparse
import itertools
import time

import parafit  # before keras: it chooses the JAX backend

# isort: split
import jax
import keras
import numpy as np

jax.config.update("jax_num_cpu_devices", 8)  # simulates 8 devices on the CPU: they show that the numbers agree, not speed
jax.config.update("jax_enable_x64", True)
keras.config.set_floatx("float64")

WIDTHS = (2, 32, 16, 1)
ETA = 0.2
BATCH_SIZE = 40


def main(epochs: int) -> None:
    x, y = make_samples(5000)
    x, y, x_test, y_test = x[:4000], y[:4000], x[4000:], y[4000:]
    start = initialize_weights(WIDTHS, np.random.default_rng(1))

    began = time.perf_counter()
    by_numpy = train(start, x, y, epochs)
    numpy_seconds = time.perf_counter() - began
    print(f"NumPy                        {numpy_seconds:8.3f} s   MSE on new rows {test(by_numpy, x_test, y_test):.6f}")

    results = [by_numpy]
    for plan in ("single", "data=8"):
        weights, seconds = train_by_parafit(start, x, y, epochs, plan)
        results.append(weights)
        gain = f"{numpy_seconds / seconds:.1f} times as fast" if plan == "single" else "simulated devices share the cores"
        print(f"parafit.fit, plan {plan:<10} {seconds:8.3f} s   MSE on new rows {test(weights, x_test, y_test):.6f}   {gain}")

    difference = max(np.abs(a - b).max() for other in results[1:] for a, b in zip(by_numpy, other))
    print(f"largest difference between the three sets of weights: {difference:.1e}")


def make_samples(count: int):
    """x (count, 2) and y (count, 1)."""
    x = np.random.default_rng(0).uniform(-1, 1, (count, 2))
    return x, np.sin(3 * x[:, :1]) * x[:, 1:]


def initialize_weights(widths: tuple, rng) -> list:
    """[w (inputs, outputs), b (outputs,)] of one layer after the other; w has the variance 1 / inputs."""
    weights = []
    for inputs, outputs in itertools.pairwise(widths):
        weights += [rng.normal(size=(inputs, outputs)) / np.sqrt(inputs), np.zeros(outputs)]
    return weights


def forward_pass(weights: list, x) -> list:
    """The activations of every layer, x (rows, inputs) first: a ← f(a w + b), the last one without f."""
    activations = [x]
    for w, b in zip(weights[::2], weights[1::2]):
        z = activations[-1] @ w + b
        is_last = len(activations) == len(weights) // 2
        activations.append(z if is_last else 1 / (1 + np.exp(-z)))
    return activations


def backward_pass(weights: list, activations: list, y) -> list:
    """The gradient of the MSE by every weight, in the order of the weights."""
    delta = 2 * (activations[-1] - y) / y.size  # δ = ∂MSE/∂z of the linear output
    gradient = []
    for layer in reversed(range(len(weights) // 2)):
        a = activations[layer]
        gradient = [a.T @ delta, delta.sum(axis=0), *gradient]  # ∂MSE/∂w = aᵀ δ, ∂MSE/∂b = Σ δ
        delta = (delta @ weights[2 * layer].T) * a * (1 - a)  # δ of the layer before = (δ wᵀ) f'(z), f'(z) = a (1 − a)
    return gradient


def train(start: list, x, y, epochs: int) -> list:
    """w ← w − η ∂MSE/∂w, batch by batch."""
    weights = [part.copy() for part in start]
    for _ in range(epochs):
        for first in range(0, len(x), BATCH_SIZE):
            rows = slice(first, first + BATCH_SIZE)
            gradient = backward_pass(weights, forward_pass(weights, x[rows]), y[rows])
            for part, slope in zip(weights, gradient):
                part -= ETA * slope
    return weights


def test(weights: list, x, y) -> float:
    """The MSE on these rows."""
    return float(np.mean((forward_pass(weights, x)[-1] - y) ** 2))


def train_by_parafit(start: list, x, y, epochs: int, plan: str):
    """The same network as a Keras model, trained by `parafit.fit`: its weights, and the seconds without compiling."""
    hidden = [keras.layers.Dense(width, "sigmoid") for width in WIDTHS[1:-1]]
    model = keras.Sequential([keras.Input(WIDTHS[:1]), *hidden, keras.layers.Dense(WIDTHS[-1])])
    # Not "mean_squared_error": Keras 3.15 on JAX takes means in float32 even where all else is float64.
    model.compile(keras.optimizers.SGD(ETA), loss=lambda y, a: keras.ops.sum((a - y) ** 2, axis=-1) / WIDTHS[-1])
    options = {"batch_size": BATCH_SIZE, "shuffle": False, "verbose": 0, "plan": plan}
    parafit.fit(model, x, y, epochs=2, **options)  # compiles
    model.set_weights(start)
    began = time.perf_counter()
    parafit.fit(model, x, y, epochs=epochs, **options)
    return model.get_weights(), time.perf_counter() - began


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=50)
    main(parser.parse_args().epochs)
