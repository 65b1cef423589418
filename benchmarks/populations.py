"""Many models at once against `parafit.fit` one after another, alternately.

`python -m benchmarks.populations [--rounds 3] [--members 32]`. Prints seconds of each round, and the median of their ratios; both make
their models anew in every round, and the first round, which compiles, does not count.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import parafit  # first, so that Keras runs on JAX

# isort: split
import keras
import numpy as np
from keras import layers
from sklearn.model_selection import StratifiedKFold


def main() -> None:
    """Run both cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--members", type=int, default=32)
    arguments = parser.parse_args()
    for name, at_once, alone in (_copies(arguments.members), _folds()):
        compare(name, at_once, alone, arguments.rounds)


def compare(name: str, at_once: Callable[[], object], alone: Callable[[], object], rounds: int) -> float:
    """The median ratio of rounds in which one runs after the other.

    Args:
        name: of the case.
        at_once, alone: what is timed.
        rounds: that count.
    """
    ratios = []
    for number in range(rounds + 1):
        seconds = [_seconds(run) for run in (at_once, alone)]
        print(f"{name}: {seconds[0]:.2f} s at once, {seconds[1]:.2f} s one after another{'' if number else ' (compiling)'}", flush=True)
        ratios += [seconds[1] / seconds[0]] if number else []
    print(f"{name}: {statistics.median(ratios):.2f} times as fast")
    return statistics.median(ratios)


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _copies(members: int, rows: int = 20_000, epochs: int = 3) -> tuple[str, Callable, Callable]:
    """Copies of 784-32-10 on the same images, in batches of 32."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(rows, 784)).astype("float32"), rng.integers(0, 10, rows)
    options = {"epochs": epochs, "batch_size": 32, "verbose": 0}

    def build():
        return _compiled([keras.Input((784,)), layers.Dense(32, "relu"), layers.Dense(10, "softmax")])

    def alone():
        for seed in range(members):
            keras.utils.set_random_seed(seed)
            parafit.fit(build(), x, y, **options)

    return f"{members} copies of 784-32-10", lambda: parafit.fit_many(build, x, y, seeds=range(members), **options), alone


def _folds(rows: int = 600, epochs: int = 50) -> tuple[str, Callable, Callable]:
    """Eight folds of a table, validated after every epoch, the best weights kept."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(rows, 20)).astype("float32"), rng.integers(0, 3, rows)
    folds = StratifiedKFold(8, shuffle=True, random_state=0)
    options = {"epochs": epochs, "batch_size": 32, "verbose": 0}

    def callbacks(number):
        return [keras.callbacks.EarlyStopping(patience=10, restore_best_weights=True)]

    def build():
        hidden = [layers.Dense(64, "relu"), layers.Dropout(0.2), layers.Dense(64, "relu")]
        return _compiled([keras.Input((20,)), *hidden, layers.Dense(3, "softmax")])

    def alone():
        for seed, (train, test) in enumerate(folds.split(x, y)):
            keras.utils.set_random_seed(seed)
            parafit.fit(build(), x[train], y[train], validation_data=(x[test], y[test]), callbacks=callbacks(seed), **options)

    at_once = lambda: parafit.fit_many(build, x, y, seeds=range(8), folds=folds, callbacks=callbacks, **options)  # noqa: E731
    return "8 folds of 600 rows", at_once, alone


def _compiled(parts: list) -> keras.Model:
    model = keras.Sequential(parts)
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


if __name__ == "__main__":
    main()
