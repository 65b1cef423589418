"""Memory of one step is used again by the next."""

import subprocess
import sys

import pytest

from parafit.backends.backend import Backend
from parafit.backends.cpu import malloc
from parafit.support import environment

SCRIPT = """
import resource
import parafit, jax, keras, numpy as np
keras.utils.set_random_seed(0)
model = keras.Sequential([keras.Input((64, 64, 4)), keras.layers.Conv2D(32, 3, padding="same"), keras.layers.GlobalAveragePooling2D()])
model.compile("sgd", "mse")
x, y = np.ones((128, 64, 64, 4), np.float32), np.ones((128, 32), np.float32)
faults = []
class Count(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
parafit.fit(model, x, y, batch_size=128, epochs=12, verbose=0, plan="single", callbacks=[Count()])
print(int(np.median(np.diff(faults))), len(parafit.backends.cpu.malloc._taken))
"""

needs_glibc = pytest.mark.skipif(malloc._library() is None, reason="needs glibc")


@needs_glibc
def test_a_step_takes_no_new_pages():
    """Steps of 64 MiB of activations: without it, each maps more than 16,384 pages of 4 KiB. The heap may still grow once or twice."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    pages, taken = map(int, done.stdout.split())
    assert pages < 4096
    assert taken, "the gaps that compiling left are not taken up"


@needs_glibc
def test_gaps_are_taken_up_but_while_something_is_compiled():
    library, size = malloc._library(), 1 << 15
    blocks = [library.malloc(size) for _ in range(400)]
    gaps = set(blocks[::2])
    for block in gaps:
        library.free(block)

    def found() -> bool:
        again = [library.malloc(size) for _ in range(400)]
        for block in again:
            library.free(block)
        return not gaps.isdisjoint(again)

    assert found()
    with malloc.takes_up_gaps():
        with malloc.takes_up_gaps():
            assert found()
        assert found(), "another program is still being compiled"
    assert not found()
    with malloc.takes_up_gaps():
        assert found()
    for block in blocks[1::2]:
        library.free(block)


def test_memory_is_given_back_after_the_last_run(monkeypatch):
    calls = []

    class Library:
        def mallopt(self, option, value):
            calls.append((option, value))

    monkeypatch.setattr(malloc, "_library", Library)
    with malloc.keeps_memory():
        kept = list(calls)
        with malloc.keeps_memory():
            pass
        assert calls == kept, "a run inside another changes nothing"
    assert kept == [(malloc._MMAP_MAX, 0), (malloc._TRIM_THRESHOLD, malloc._MOST), (malloc._MMAP_THRESHOLD, 1 << 25)]
    assert calls[3:] == [(malloc._MMAP_MAX, 65536), (malloc._TRIM_THRESHOLD, 1 << 26), (malloc._MMAP_THRESHOLD, 1 << 25)]


def test_where_jax_computes_elsewhere_the_heap_is_left_alone(monkeypatch):
    monkeypatch.setattr(malloc, "_library", lambda: pytest.fail("the heap was asked for"))
    with Backend().running(), Backend().compiling():
        pass


@pytest.mark.parametrize(
    ("platforms", "plugin", "expected"),
    [("", "", "cpu"), ("", "jax_plugins", ""), ("", "libtpu", ""), ("cpu", "jax_plugins", "cpu"), ("cuda,cpu", "", "cuda")],
)
def test_where_jax_will_compute(monkeypatch, platforms, plugin, expected):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name == plugin else None)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.delitem(sys.modules, "jax")
    assert environment.jax_platform(otherwise="cpu") == expected


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_other_systems_are_left_alone(monkeypatch, platform):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(malloc, "_library", malloc._library.__wrapped__)
    assert malloc._library() is None
    malloc.use_one_arena()
    with malloc.keeps_memory(), malloc.takes_up_gaps():
        pass
