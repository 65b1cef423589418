"""Predicted against measured: step time and peak memory of many small networks on this machine.

`python -m benchmarks.predictions [--case TEXT] [--seconds 1] [--calibrate] [--memory-only] [--to FILE]`. Each case is traced and priced
for one device of the calibrated machine, then fitted by `parafit.fit`; its step time is the median over short epochs, as probes are timed,
and of four such fits, minutes apart, the median: shared machines are slower for tens of seconds now and then.
"corrected" is the prediction times the load that the fits before it met (`residuals.correction`), known before the fit. No case was
used to choose a constant of time; what XLA stores was read from the compiled programs of about half of them (docs/cost.md).
"""

import argparse
import datetime
import json
import math
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import parafit  # first, so that Keras runs on JAX

# isort: split
import jax
import keras
import numpy as np
from keras import layers

from benchmarks import surroundings
from parafit.adapters.keras import KerasModel
from parafit.calibration.calibrate import calibrate
from parafit.calibration.detect import here
from parafit.calibration.history import Residual, correction
from parafit.data.feed import Feed
from parafit.data.source import Source
from parafit.execution.compiled import compiled_steps
from parafit.placement import Placement
from parafit.planner.cost.cost import Cost
from parafit.planner.cost.estimator import price
from parafit.planner.cost.framework import Software
from parafit.planner.machine.machine import Machine
from parafit.planner.plan import Plan
from parafit.techniques.program import step_program

EPOCHS = 12
"""Epochs timed after one that is not; their median counts."""

PASSES = 4
"""Times that all cases are fitted, one after the other."""

BLOCK_STEPS = 8
"""Batches of an epoch where only memory is asked for."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network and a batch size: `make()` gives the compiled model, and one row of x (as an array) with its number of classes."""

    name: str
    batch: int
    make: Callable


@dataclass(frozen=True, kw_only=True)
class Score:
    """What was said about a case, and what it took."""

    name: str
    batch: int
    predicted_seconds: float
    corrected_seconds: float
    measured_seconds: float
    predicted_bytes: float
    measured_bytes: float
    times: Mapping[str, float]
    memory: Mapping[str, float]

    @property
    def time_error(self) -> float:
        """Relative error of the predicted step time."""
        return self.predicted_seconds / self.measured_seconds - 1

    @property
    def corrected_error(self) -> float:
        """The same, with the load of the machine taken into account."""
        return self.corrected_seconds / self.measured_seconds - 1

    @property
    def memory_error(self) -> float:
        """Relative error of the predicted peak memory."""
        return self.predicted_bytes / self.measured_bytes - 1


def mlp(inputs: int, widths: tuple[int, ...], classes: int, *, normalised=False, dropout=0.0, optimizer="adam", activation="relu"):
    hidden = []
    for width in widths:
        hidden.append(layers.Dense(width, None if normalised else activation))
        hidden += [layers.BatchNormalization(), layers.Activation(activation)] if normalised else []
        hidden += [layers.Dropout(dropout)] if dropout else []
    return _classifier((inputs,), [*hidden, layers.Dense(classes, "softmax")], optimizer), classes


def convolutional(side: int, channels: int, filters: tuple[int, ...], *, dense=0, stride=1, pooled=True, optimizer="adam"):
    hidden = []
    for number in filters:
        hidden.append(layers.Conv2D(number, 3, strides=stride, padding="same", activation="relu"))
        hidden += [layers.MaxPooling2D()] if pooled else []
    hidden += [layers.Flatten(), layers.Dense(dense, "relu")] if dense else [layers.GlobalAveragePooling2D()]
    return _classifier((side, side, channels), [*hidden, layers.Dense(10, "softmax")], optimizer), 10


def recurrent(layer, steps: int, features: int, widths: tuple[int, ...]):
    hidden = [layer(width, return_sequences=place + 1 < len(widths)) for place, width in enumerate(widths)]
    return _classifier((steps, features), [*hidden, layers.Dense(10, "softmax")], "adam"), 10


def sequences(steps: int, features: int, filters: int):
    hidden = [layers.Conv1D(filters, 5, activation="relu"), layers.Conv1D(filters, 5, activation="relu"), layers.GlobalMaxPooling1D()]
    return _classifier((steps, features), [*hidden, layers.Dense(10, "softmax")], "adam"), 10


def transformer(tokens: int, width: int, heads: int, depth: int, *, vocabulary=1000, dropout=0.0):
    inputs = keras.Input((tokens,), dtype="int32")
    hidden = layers.Embedding(vocabulary, width)(inputs)
    for _ in range(depth):
        normal = layers.LayerNormalization()(hidden)
        hidden = hidden + layers.MultiHeadAttention(heads, width // heads, dropout=dropout)(normal, normal)
        wide = layers.Dense(4 * width, "gelu")(layers.LayerNormalization()(hidden))
        hidden = hidden + layers.Dense(width)(wide)
    outputs = layers.Dense(10, "softmax")(layers.GlobalAveragePooling1D()(hidden))
    return _compiled(keras.Model(inputs, outputs), "adam"), 10


def embedded(tokens: int, vocabulary: int, width: int, hidden: int):
    parts = [
        layers.Embedding(vocabulary, width),
        layers.GlobalAveragePooling1D(),
        layers.Dense(hidden, "relu"),
        layers.Dense(10, "softmax"),
    ]
    return _compiled(keras.Sequential([keras.Input((tokens,), dtype="int32"), *parts]), "adam"), 10


def autoencoder(inputs: int, widths: tuple[int, ...]):
    both = [*widths, *widths[-2::-1]]
    model = keras.Sequential([keras.Input((inputs,)), *(layers.Dense(width, "tanh") for width in both), layers.Dense(inputs)])
    model.compile("adam", "mse")
    return model, 0


def _classifier(shape, parts, optimizer):
    return _compiled(keras.Sequential([keras.Input(shape), *parts]), optimizer)


def _compiled(model, optimizer):
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def _cases() -> tuple[Case, ...]:
    made = [
        *_batches("mlp 784-32-10", (32, 256, 2048), mlp, 784, (32,), 10),
        *_batches("mlp 784-128-10 sgd", (64, 1024), mlp, 784, (128,), 10, optimizer="sgd"),
        *_batches("mlp 784-512-512-10", (32, 128, 1024), mlp, 784, (512, 512), 10),
        *_batches("mlp 64-64x6-10", (16, 512), mlp, 64, (64,) * 6, 10),
        *_batches("mlp 1024-1024x3-100", (64, 256), mlp, 1024, (1024,) * 3, 100),
        *_batches("mlp 256-2048-2048-256", (128,), mlp, 256, (2048, 2048), 256),
        *_batches("mlp 20-100-50-3 tanh", (16, 1000), mlp, 20, (100, 50), 3, activation="tanh"),
        *_batches("mlp-bn-dropout 784-256-128-10", (128, 512), mlp, 784, (256, 128), 10, normalised=True, dropout=0.2),
        *_batches("mlp-bn 128-512x3-10", (64, 1024), mlp, 128, (512,) * 3, 10, normalised=True),
        *_batches("mlp-dropout 300-300x3-5", (100, 1000), mlp, 300, (300,) * 3, 5, dropout=0.5, optimizer="rmsprop"),
        *_batches("autoencoder 784-256-32", (64, 512), autoencoder, 784, (256, 32)),
        *_batches("cnn 28x28 32-64 dense", (32, 128), convolutional, 28, 1, (32, 64), dense=128),
        *_batches("cnn 32x32 16-32-64", (32, 128), convolutional, 32, 3, (16, 32, 64)),
        *_batches("cnn 16x16 64-64 strided", (64,), convolutional, 16, 8, (64, 64), stride=2, pooled=False),
        *_batches("cnn 64x64 8-16 sgd", (32,), convolutional, 64, 3, (8, 16), optimizer="sgd"),
        *_batches("cnn-1d 100x16 64", (32, 128), sequences, 100, 16, 64),
        *_batches("lstm 64 x 50", (32, 128), recurrent, layers.LSTM, 50, 16, (64,)),
        *_batches("lstm 32-32 x 20", (64,), recurrent, layers.LSTM, 20, 8, (32, 32)),
        *_batches("gru 128 x 30", (32, 128), recurrent, layers.GRU, 30, 32, (128,)),
        *_batches("transformer 64 tokens, width 64 x 2", (16, 64), transformer, 64, 64, 4, 2),
        *_batches("transformer 32 tokens, width 128 x 2", (32, 128), transformer, 32, 128, 4, 2),
        *_batches("transformer 128 tokens, width 128 x 1", (16,), transformer, 128, 128, 8, 1),
        *_batches("transformer-dropout 32 tokens, width 96 x 2", (32,), transformer, 32, 96, 6, 2, dropout=0.1),
        *_batches("embedding 5000 x 64", (64, 512), embedded, 40, 5000, 64, 64),
        *_batches("embedding 500 x 128", (256,), embedded, 100, 500, 128, 256),
    ]
    return tuple(made)


def _batches(name: str, sizes: tuple[int, ...], make: Callable, *args, **options) -> list[Case]:
    return [Case(name=name, batch=size, make=partial(make, *args, **options)) for size in sizes]


CASES = _cases()


def score(case: Case, machine: Machine, seconds: float, load: float) -> tuple[Score, Callable[[], float]]:
    """Predict a case, then fit it in `EPOCHS` epochs of about `seconds` together, after some that are not timed.

    Returns:
        Its score, and a function that fits it again and gives the seconds of a step.
    """
    keras.utils.set_random_seed(0)
    model, classes = case.make()
    x, y = arrays_for(model, classes, case.batch * 8)
    trial = typical_seconds(model, x, y, case.batch, 3)
    steps = max(1, min(20000, math.ceil(seconds / EPOCHS / trial)))
    x, y = arrays_for(model, classes, case.batch * steps)
    cost, predicted_bytes, compiled_bytes = _price(case, model, x, y, machine)
    fit = partial(typical_seconds, model, x, y, case.batch, EPOCHS + 1)
    score = Score(
        name=case.name,
        batch=case.batch,
        predicted_seconds=cost.seconds,
        corrected_seconds=cost.seconds * load,
        measured_seconds=fit(),
        predicted_bytes=predicted_bytes,
        measured_bytes=compiled_bytes(),
        times=cost.times,
        memory=cost.memory,
    )
    return score, fit


def weigh(case: Case, machine: Machine) -> float:
    """Print what is predicted of a case's peak memory and what its compiled program takes, of blocks of up to `BLOCK_STEPS` batches.

    Returns:
        The relative error.
    """
    keras.utils.set_random_seed(0)
    model, classes = case.make()
    _, predicted, compiled_bytes = _price(case, model, *arrays_for(model, classes, case.batch * BLOCK_STEPS), machine)
    measured = compiled_bytes()
    error = predicted / measured - 1
    print(f"{case.name:44} {case.batch:6} {predicted / 2**20:7.2f} MiB {measured / 2**20:7.2f} MiB {error:+6.1%}", flush=True)
    return error


def _price(case: Case, model, x, y, machine: Machine) -> tuple[Cost, float, Callable[[], int]]:
    """What a case is said to take, its bytes with the block of batches, and a function that compiles it and gives those it takes."""
    source = Source(x, y, batch_size=case.batch, shuffle=True)
    adapter = KerasModel(model, "fit")
    adapter.build(source.example)
    step, arrays = adapter.train_step(), Feed(source).foreseen()[0].arrays
    capacity = jax.tree.leaves(arrays)[0].shape[0]
    program = step_program(step, source.shapes(), case.name)
    cost = price(program, Plan(), machine, software=Software(steps_per_dispatch=capacity))
    block_bytes = sum(array.nbytes for array in jax.tree.leaves(arrays))
    copied_bytes = 0 if capacity > 1 else cost.memory["inputs"]  # a block of one batch is used as it is
    return cost, cost.peak_bytes + block_bytes - copied_bytes, lambda: compiled_steps(model, step, arrays, Placement(Plan())).peak_bytes


def arrays_for(model, classes: int, rows: int):
    """Rows for a case's model."""
    random = np.random.default_rng(0)
    shape = (rows, *model.input_shape[1:])
    whole = model.inputs[0].dtype == "int32"
    x = random.integers(0, 500, shape, dtype=np.int32) if whole else random.standard_normal(shape, dtype=np.float32)
    return x, random.integers(0, classes, rows, dtype=np.int32) if classes else x


class _Clock(keras.callbacks.Callback):
    """Notes what each epoch takes."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        self._started = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(time.perf_counter() - self._started)


def typical_seconds(model, x, y, batch: int, epochs: int, *, plan: str = "single") -> float:
    """Seconds of a step: the median over all epochs but the first."""
    clock = _Clock()
    parafit.fit(model, x, y, batch_size=batch, epochs=epochs, callbacks=[clock], verbose=0, plan=plan)
    return statistics.median(clock.seconds[1:]) / (len(x) // batch)


def main(arguments: list[str] | None = None) -> None:
    """Score every case, print the table, and write it as JSON."""
    options = _options(arguments)
    machine = calibrate() if options.calibrate else Machine.load(options.machine) if options.machine else here()
    cases = [case for case in CASES if re.search(options.case, case.name)]
    if options.memory_only:
        print(f"memory     {_spread([weigh(case, machine) for case in cases])}")
        return
    scores: list[Score] = []
    fits: list[Callable[[], float]] = []
    for case in cases:
        one, fit = score(case, machine, options.seconds, correction(map(_residual, scores)))
        scores.append(one)
        fits.append(fit)
    rounds = [[each.measured_seconds for each in scores], *([fit() for fit in fits] for _ in range(PASSES - 1))]
    scores = [replace(one, measured_seconds=statistics.median(times)) for one, times in zip(scores, zip(*rounds))]
    print(f"{'case':44} {'batch':>6} {'predicted':>11} {'corrected':>11} {'measured':>11} {'predicted':>11} {'measured':>11}")
    print("\n".join(map(_line, scores)))
    print(_summary(scores))
    if options.to:
        document = surroundings.describe() | {"machine_numbers": json.loads(machine.to_json()), "scores": [asdict(each) for each in scores]}
        Path(options.to).write_text(json.dumps(document, indent=1), encoding="utf-8")


def _residual(score: Score) -> Residual:
    numbers = {name: getattr(score, name) for name in ("predicted_seconds", "measured_seconds", "predicted_bytes", "measured_bytes")}
    now = datetime.datetime.now(datetime.UTC).isoformat()
    return Residual(machine="here", model=score.name, batch=score.batch, plan="single", date=now, **numbers)


def _line(score: Score) -> str:
    times = f"{score.predicted_seconds * 1e3:8.3f} ms {score.corrected_seconds * 1e3:8.3f} ms {score.measured_seconds * 1e3:8.3f} ms"
    memory = f"{score.predicted_bytes / 2**20:7.2f} MiB {score.measured_bytes / 2**20:7.2f} MiB"
    errors = f"{score.time_error:+6.0%} {score.corrected_error:+6.0%} {score.memory_error:+6.1%}"
    return f"{score.name:44} {score.batch:6} {times} {memory} {errors}"


def _summary(scores: list[Score]) -> str:
    lines = [f"{len(scores)} cases"]
    for what in ("time", "corrected", "memory"):
        lines.append(f"{what:10} {_spread([getattr(each, f'{what}_error') for each in scores])}")
    return "\n".join(lines)


def _spread(errors: list[float]) -> str:
    sizes = np.abs(errors)
    return f"median |error| {np.median(sizes):.1%}, 90th percentile {np.quantile(sizes, 0.9):.1%}, largest {sizes.max():.1%}"


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", default="", help="only cases whose name has this regular expression")
    parser.add_argument("--seconds", type=float, default=1.0, help="to spend on the timed epochs of a fit")
    parser.add_argument("--machine", default="", help="a preset or a machine's JSON file; default: this machine as it was calibrated")
    parser.add_argument("--calibrate", action="store_true", help="measure the machine first")
    parser.add_argument("--memory-only", action="store_true", help="compile each case, but run and time none")
    parser.add_argument("--to", default="", help="a JSON file for the results")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
