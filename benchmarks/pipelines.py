"""What a pipeline costs the host: `python -m benchmarks.pipelines`.

Host microseconds to start one task, at 64 tasks a step; and seconds until a transformer's first step is done, on one device and cut into
four stages. On simulated devices of one processor: tasks are tiny, so that only starting them takes time.
"""

import argparse
import time

import parafit  # noqa: F401  # isort: skip  (chooses Keras' backend, so it comes first)

import jax
import keras
import numpy as np
from keras import layers

from parafit.adapters import adapter_of, checks
from parafit.data.feed import Feed
from parafit.data.source import Source
from parafit.execution.pipeline import runner_for
from parafit.planner.plan import Plan
from parafit.planning import place
from parafit.techniques.program import program_of


def main() -> None:
    """Print both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=12, help="of the transformer")
    blocks = parser.parse_args().blocks
    jax.config.update("jax_num_cpu_devices", 4)
    print(f"host time of a task: {1e6 * host_seconds():.0f} µs")
    single, cut = (first_step_seconds(plan, blocks) for plan in ("single", "pipeline=4,microbatches=4"))
    print(f"first step of {blocks} blocks: {single:.1f} s on one device, {cut:.1f} s on 4 stages ({cut / single:.2f} times)")


def host_seconds(steps: int = 40) -> float:
    """Seconds of the process to start a task, where 4 stages have 8 microbatches: 64 tasks a step, and the update."""
    model = keras.Sequential([keras.Input((16,)), *(layers.Dense(16, "relu") for _ in range(8)), layers.Dense(1)])
    model.compile("adam", "mse")
    x = np.random.default_rng(0).normal(size=(64 * steps, 16)).astype("float32")
    runner, feed = _prepared(model, x, x[:, :1], 64, "pipeline=4,microbatches=8")
    block = feed.epoch().take(steps)
    assert block is not None
    runner.enter()
    runner.run(block)
    runner.rest()
    started, cpu = time.perf_counter(), time.thread_time()
    runner.run(block)
    host = time.thread_time() - cpu
    runner.rest()
    whole = time.perf_counter() - started
    print(f"a step: {1e3 * host / block.steps:.2f} ms of the first thread, {1e3 * whole / block.steps:.2f} ms in all")
    return host / block.steps / 64


def first_step_seconds(plan: str, blocks: int) -> float:
    """Seconds from a model to the end of its first step."""
    model = _transformer(blocks)
    x = np.zeros((32, 64), "int32")
    started = time.perf_counter()
    runner, feed = _prepared(model, x, x[:, 0], 32, plan)
    block = feed.epoch().take(1)
    assert block is not None
    runner.enter()
    runner.run(block)
    runner.rest()
    return time.perf_counter() - started


def _prepared(model, x, y, batch_size: int, plan: str):
    adapter = adapter_of(model, "fit")
    source = Source(x, y, batch_size=batch_size, shuffle=False)
    checks.build(adapter, source, "fit")
    step = adapter.train_step()
    program = program_of(adapter, step, source.shapes)
    feed = Feed(source)
    return runner_for(adapter, step, place(Plan.parse(plan), step, program), feed.foreseen()), feed


def _transformer(blocks: int) -> keras.Model:
    tokens = keras.Input((64,), dtype="int32")
    hidden = layers.Embedding(100, 64)(tokens)
    for _ in range(blocks):
        normal = layers.LayerNormalization()(hidden)
        hidden = layers.Add()([hidden, layers.MultiHeadAttention(4, 16)(normal, normal)])
        inner = layers.Dense(256, "gelu")(layers.LayerNormalization()(hidden))
        hidden = layers.Add()([hidden, layers.Dense(64)(inner)])
    model = keras.Model(tokens, layers.Dense(10, "softmax")(layers.GlobalAveragePooling1D()(hidden)))
    model.compile("adam", "sparse_categorical_crossentropy")
    return model


if __name__ == "__main__":
    main()
