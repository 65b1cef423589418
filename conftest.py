"""Every test runs on 8 simulated CPU devices, with Keras' global state put back afterwards."""

import parafit  # noqa: F401  # isort: skip  (chooses Keras' backend, so it comes first)


import jax
import keras
import numpy as np
import pytest
from keras.src.backend.common.dtypes import BIT64_TO_BIT32_DTYPE

from parafit import calibrate, residuals

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(autouse=True)
def _same_start():
    keras.utils.set_random_seed(1)
    yield
    keras.backend.clear_session(free_memory=False)


@pytest.fixture(autouse=True)
def _own_residuals(monkeypatch, tmp_path_factory):
    """Scores of the tests' fits stay out of the user's, and the user's calibration out of the tests."""
    path = tmp_path_factory.mktemp("residuals") / "residuals.jsonl"
    monkeypatch.setattr(residuals, "residuals_path", lambda: path)
    monkeypatch.setattr(calibrate, "is_calibrated", lambda: False)


@pytest.fixture
def float64(monkeypatch):
    """Keras and JAX in float64 for one test.

    On JAX, Keras 3.15 promotes float64 with float32 to float32, so that normalisation and attention round to float32
    even where floatx is float64; here they do not.
    """
    monkeypatch.setitem(BIT64_TO_BIT32_DTYPE, "float64", "float64")
    before = keras.config.floatx()
    keras.config.set_floatx("float64")
    with jax.enable_x64(True):
        yield
    keras.config.set_floatx(before)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
