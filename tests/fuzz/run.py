"""Runs a case in this process."""

import parafit  # noqa: F401  # isort: skip  (chooses Keras' backend, so it comes first)

import jax
import keras
from keras.src.backend.common.dtypes import BIT64_TO_BIT32_DTYPE

from tests.fuzz.compare import Verdict, compare
from tests.fuzz.draw import draw


def prepare() -> None:
    """Eight devices, and float64 where Keras would compute in float32."""
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_enable_x64", True)
    BIT64_TO_BIT32_DTYPE["float64"] = "float64"
    keras.config.set_floatx("float64")


def run_seed(seed: int) -> Verdict:
    """The verdict on the case of a seed."""
    case = draw(seed)
    return run(definition=case.definition, plan=case.plan, batch_size=case.batch_size, single=case.single)


def run(*, definition: str, plan: str, batch_size: int, single: bool) -> Verdict:
    """The verdict on a case, by its statements."""
    space: dict = {}
    try:
        exec(definition, space)
        space["make"]()
    except Exception as error:
        return Verdict("refused", f"no network: {type(error).__name__}: {error}")
    return compare(space["make"], space["x"], space["y"], plan=plan, batch_size=batch_size, single=single)
