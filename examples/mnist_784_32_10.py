"""784-32-10: ReLU and softmax, SGD with momentum, categorical cross-entropy, batches of 32, trained data parallel.

    python examples/mnist_784_32_10.py [--epochs 10]

The articles load MNIST over the network. This example downloads nothing: its 28×28 images are the 8×8 digits that
scikit-learn brings along, each pixel drawn as 3×3 with a margin of 2; the 1500 to train on are used nine times, shifted
by −1, 0 or 1 pixel either way. The article's way is `model.fit`.

What is often wrong in the articles that teach this network, and is right here:
- an image (28, 28) is laid out as 784 numbers and scaled to 0 … 1; Dense on (28, 28) works on each row of pixels alone.
- the categorical cross-entropy takes one-hot rows (n, 10); for labels (n,) there is sparse_categorical_crossentropy.
- the loss takes probabilities because the last layer is a softmax; from_logits=True would apply the softmax twice.
- `predict` returns 10 probabilities a row: the digit is their argmax.
- the accuracy is measured on images that training has not seen.
"""

import argparse
import time

import parafit  # before keras: it chooses the JAX backend

# isort: split
import jax
import keras
import numpy as np
from sklearn.datasets import load_digits

jax.config.update("jax_num_cpu_devices", 8)  # simulates 8 devices on the CPU: they show that the numbers agree, not speed


def main(epochs: int) -> None:
    images, digits = load_images()
    x, x_test, digits_test = shifted(images[:1500]).reshape(-1, 784), images[1500:].reshape(-1, 784), digits[1500:]
    y = keras.utils.to_categorical(np.tile(digits[:1500], 9), 10)
    ways = {
        "model.fit": lambda model, **options: model.fit(x, y, **options),
        "parafit.fit, plan single": lambda model, **options: parafit.fit(model, x, y, plan="single", **options),
        "parafit.fit, plan data=8": lambda model, **options: parafit.fit(model, x, y, plan="data=8", **options),
    }
    seconds, weights = {}, {}
    for name, fit in ways.items():
        model = make_model()
        began = time.perf_counter()
        history = fit(model, batch_size=32, epochs=epochs, verbose=0)
        with_compiling = time.perf_counter() - began
        weights[name] = model.get_weights()
        plan = "data=8" if "data" in name else "single"
        accuracy = np.mean(parafit.predict(model, x_test, verbose=0, plan=plan).argmax(axis=1) == digits_test)
        loss = history.history["loss"][-1]

        began = time.perf_counter()
        fit(model, batch_size=32, epochs=epochs, verbose=0)
        seconds[name] = time.perf_counter() - began
        gain = "simulated devices share the cores" if "data" in name else f"{seconds['model.fit'] / seconds[name]:.1f} times as fast"
        print(f"{name:<26} {with_compiling:6.2f} s, again {seconds[name]:6.3f} s   loss {loss:.5f}   test accuracy {accuracy:.4f}   {gain}")

    difference = max(np.abs(a - b).max() for other in weights.values() for a, b in zip(weights["model.fit"], other))
    print(f"largest difference between the three sets of weights: {difference:.1e}")


def load_images():
    """Images (1797, 28, 28) from 0 to 1, and the digits (1797,), in an order of their own."""
    images, digits = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8).repeat(3, axis=1).repeat(3, axis=2).astype("float32") / 16
    order = np.random.default_rng(0).permutation(len(images))
    return np.pad(images, ((0, 0), (2, 2), (2, 2)))[order], digits[order]


def shifted(images):
    """Nine copies (9 n, 28, 28), each shifted by another −1, 0 or 1 pixel down and across."""
    return np.concatenate([np.roll(images, (down, across), axis=(1, 2)) for down in (-1, 0, 1) for across in (-1, 0, 1)])


def make_model():
    """784-32-10, the same initial weights and the same shuffling every time."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((784,)), keras.layers.Dense(32, "relu"), keras.layers.Dense(10, "softmax")])
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), loss="categorical_crossentropy", metrics=["accuracy"])
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    main(parser.parse_args().epochs)
