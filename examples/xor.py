"""XOR by a multilayer perceptron with Adam and the categorical cross-entropy, to 100 % accuracy.

    python examples/xor.py [--epochs 100]

The four rows of the truth table, 64 times over, in batches of 32; a 2-8-2 network. The article's way is `model.fit`.

What is often wrong in the articles that teach this network, and is right here:
- softmax over one output is always 1: two classes take two outputs, or one sigmoid with the binary cross-entropy.
- the categorical cross-entropy compares probabilities with one-hot rows: y (rows,) of 0 and 1 has to become (rows, 2).
- accuracy is counted on all four rows of the table; with random or held-out rows one of the four may be missing.
- without a hidden layer, or with a linear one, 3 of 4 is the best that can be reached.
"""

import argparse
import time

import parafit  # before keras: it chooses the JAX backend

# isort: split
import jax
import keras
import numpy as np

jax.config.update("jax_num_cpu_devices", 8)  # simulates 8 devices on the CPU: they show that the numbers agree, not speed

TABLE = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], "float32")
XOR = np.array([0, 1, 1, 0])


def main(epochs: int) -> None:
    x, y = np.tile(TABLE, (64, 1)), np.tile(keras.utils.to_categorical(XOR, 2), (64, 1))
    start = make_model().get_weights()
    ways = {
        "model.fit": lambda model, **options: model.fit(x, y, **options),
        "parafit.fit, plan single": lambda model, **options: parafit.fit(model, x, y, plan="single", **options),
        "parafit.fit, plan data=8": lambda model, **options: parafit.fit(model, x, y, plan="data=8", **options),
    }
    seconds, weights = {}, {}
    for name, fit in ways.items():
        model = make_model()
        fit(model, batch_size=32, epochs=2, verbose=0)  # compiles
        restart(model, start)
        began = time.perf_counter()
        history = fit(model, batch_size=32, epochs=epochs, shuffle=False, verbose=0)
        seconds[name] = time.perf_counter() - began
        weights[name] = model.get_weights()
        correct = np.mean(parafit.predict(model, TABLE, verbose=0).argmax(axis=1) == XOR)
        gain = "simulated devices share the cores" if "data" in name else f"{seconds['model.fit'] / seconds[name]:.1f} times as fast"
        print(f"{name:<26} {seconds[name]:8.3f} s   loss {history.history['loss'][-1]:.6f}   accuracy {correct:.0%}   {gain}")

    difference = max(np.abs(a - b).max() for other in weights.values() for a, b in zip(weights["model.fit"], other))
    print(f"largest difference between the three sets of weights: {difference:.1e}")


def make_model():
    """2-8-2: one output for each class."""
    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(8, "tanh"), keras.layers.Dense(2, "softmax")])
    model.compile(keras.optimizers.Adam(0.02), loss="categorical_crossentropy", metrics=["accuracy"])
    return model


def restart(model, weights: list) -> None:
    """Initial weights, and an optimizer that has seen nothing."""
    model.set_weights(weights)
    for variable in model.optimizer.variables:
        if variable is not model.optimizer.learning_rate:
            variable.assign(np.zeros(variable.shape))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=100)
    main(parser.parse_args().epochs)
