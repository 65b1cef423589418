"""Every test runs on 8 simulated CPU devices, in code that is compiled quickly, with Keras' global state put back afterwards."""

# ruff: noqa: E402  (the flags come before the packages that read them)
import os

import jaxlib

# What tests compare does not depend on how well the compiler optimises, and most of their time is compiling.
_QUICK = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if jaxlib.__version__ < "0.11":  # newer ones end the process at a flag that they no longer have
    _QUICK.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(_QUICK))

import parafit  # noqa: F401  # isort: skip  (chooses Keras' backend, so it comes first)

import hypothesis
import jax
import keras
import numpy as np
import pytest
from keras.src.backend.common.dtypes import BIT64_TO_BIT32_DTYPE

from parafit import backends
from parafit.backends.cpu.backend import CpuBackend
from parafit.calibration import detect
from parafit.support.environment import cache_directory

jax.config.update("jax_num_cpu_devices", 8)
hypothesis.settings.register_profile("shared", deadline=None)  # other work on the machine is no failure
hypothesis.settings.load_profile("shared")
_CACHE = cache_directory().parent


@pytest.fixture(autouse=True)
def _same_start():
    keras.utils.set_random_seed(1)
    yield
    keras.backend.clear_session(free_memory=False)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    """Tests neither see nor change the user's calibration and scores. What takes long to make, they share with the user."""
    own = tmp_path_factory.mktemp("cache")
    for name in ("matplotlib", "parafit/programs"):
        (_CACHE / name).mkdir(parents=True, exist_ok=True)
        (own / name).parent.mkdir(exist_ok=True)
        (own / name).symlink_to(_CACHE / name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(own))


@pytest.fixture
def calibrated():
    """A function that makes this machine count as calibrated, with the numbers that were found out without measuring."""

    def write():
        detect.machine_path().parent.mkdir()
        detect.machine_path().write_text(detect.detect().to_json())

    return write


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


class AsUsers(CpuBackend):
    """Compiles as thoroughly as JAX does by itself."""

    def compile(self, lowered, options):
        thorough = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False, "xla_cpu_use_fusion_emitters": True}
        return super().compile(lowered, thorough | options)


@pytest.fixture
def optimised():
    """Programs compiled as users get them, for a test of what the compiler makes of them."""
    with backends.using(AsUsers()):
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(0)
