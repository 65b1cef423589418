"""A 2-3-1 sigmoid network: back propagation written out, then the same training by parafit on one and on 8 devices.

    python examples/two_three_one.py [--epochs 1000]

100 samples of two numbers, learning rate 0.1, 1000 epochs, half the squared error; the weights move once per epoch, by
the mean over the samples. The three ways start from the same weights and end, in float64, with the same weights.

What is often wrong in the articles that teach this network, and is right here:
- f' is taken of z, or is written in terms of a = f(z) as a(1 − a); f'(a), the derivative applied twice, is wrong.
- with δ_k = (a_k − y_k) f'(z_k) the update is w ← w − η δ x; with (y_k − a_k) it would be +. Mixed, the error grows.
- δ of the hidden layer uses the weights from before the update of the output layer.
- the biases are trained too, and y has the shape (100, 1): (100,) against (100, 1) silently makes (100, 100).
"""

import argparse
import time

import parafit  # before keras: it chooses the JAX backend

# isort: split
import jax
import keras
import numpy as np

jax.config.update("jax_num_cpu_devices", 8)  # simulates 8 devices on the CPU: they show that the numbers agree, not speed
jax.config.update("jax_enable_x64", True)
keras.config.set_floatx("float64")

ETA = 0.1
"""η, the learning rate."""


def main(epochs: int) -> None:
    x, y = make_samples(100)
    start = initial_weights()

    began = time.perf_counter()
    by_formulas = train_by_formulas(start, x, y, epochs)
    formula_seconds = time.perf_counter() - began
    print(f"formulas, sample by sample   {formula_seconds:8.3f} s   loss {loss(by_formulas, x, y):.6f}")

    results = [by_formulas]
    for plan in ("single", "data=8"):
        weights, seconds = train_by_parafit(start, x, y, epochs, plan)
        results.append(weights)
        gain = f"{formula_seconds / seconds:.1f} times as fast" if plan == "single" else "simulated devices share the cores"
        print(f"parafit.fit, plan {plan:<10} {seconds:8.3f} s   loss {loss(weights, x, y):.6f}   {gain}")

    difference = max(np.abs(a - b).max() for other in results[1:] for a, b in zip(by_formulas, other))
    print(f"largest difference between the three sets of weights: {difference:.1e}")


def make_samples(count: int):
    """x (count, 2) and y (count, 1): whether the two numbers add up to more than 1, as 0 or 1."""
    x = np.random.default_rng(0).uniform(0, 1, (count, 2))
    return x, (x.sum(axis=1, keepdims=True) > 1).astype(float)


def initial_weights() -> list:
    """w1 (2, 3), b1 (3,), w2 (3, 1), b2 (1,)."""
    rng = np.random.default_rng(1)
    return [rng.normal(size=(2, 3)), np.zeros(3), rng.normal(size=(3, 1)), np.zeros(1)]


def f(z):
    """f(z) = 1 / (1 + e^−z)"""
    return 1 / (1 + np.exp(-z))


def train_by_formulas(start: list, x, y, epochs: int) -> list:
    """Gradient descent, every formula on its own line, one sample after the other."""
    w1, b1, w2, b2 = (part.copy() for part in start)
    for _ in range(epochs):
        gradient = [np.zeros_like(part) for part in (w1, b1, w2, b2)]
        for x_i, y_k in zip(x, y):
            z_j = x_i @ w1 + b1  # z_j = Σ_i w_ij x_i + b_j
            a_j = f(z_j)  # a_j = f(z_j)
            z_k = a_j @ w2 + b2  # z_k = Σ_j w_jk a_j + b_k
            a_k = f(z_k)  # a_k = f(z_k)

            delta_k = (a_k - y_k) * a_k * (1 - a_k)  # δ_k = (a_k − y_k) f'(z_k), f'(z_k) = a_k (1 − a_k)
            delta_j = a_j * (1 - a_j) * (w2 @ delta_k)  # δ_j = f'(z_j) Σ_k w_jk δ_k

            gradient[0] += np.outer(x_i, delta_j)  # ∂E/∂w_ij = δ_j x_i
            gradient[1] += delta_j  # ∂E/∂b_j = δ_j
            gradient[2] += np.outer(a_j, delta_k)  # ∂E/∂w_jk = δ_k a_j
            gradient[3] += delta_k  # ∂E/∂b_k = δ_k
        for part, slope in zip((w1, b1, w2, b2), gradient):
            part -= ETA * slope / len(x)  # w ← w − η · mean of δ x
    return [w1, b1, w2, b2]


def loss(weights: list, x, y) -> float:
    """E = mean of ½ (a_k − y_k)²"""
    w1, b1, w2, b2 = weights
    return float(np.mean((f(f(x @ w1 + b1) @ w2 + b2) - y) ** 2) / 2)


def train_by_parafit(start: list, x, y, epochs: int, plan: str):
    """The same network as a Keras model, trained by `parafit.fit`: its weights, and the seconds without compiling.

    All 100 samples are one batch.
    """
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, "sigmoid"), keras.layers.Dense(1, "sigmoid")])
    model.compile(keras.optimizers.SGD(ETA), loss=lambda y, a: keras.ops.sum((a - y) ** 2, axis=-1) / 2)
    options = {"batch_size": len(x), "shuffle": False, "verbose": 0, "plan": plan}
    parafit.fit(model, x, y, epochs=2, **options)  # compiles
    model.set_weights(start)
    began = time.perf_counter()
    parafit.fit(model, x, y, epochs=epochs, **options)
    return model.get_weights(), time.perf_counter() - began


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=1000)
    main(parser.parse_args().epochs)
