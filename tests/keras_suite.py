"""Keras' own tests with parafit's fit, evaluate and predict in place of Keras': `python -m tests.keras_suite [FOLDER ...]`.

Each file runs twice, in processes of their own; what fails with parafit and not with Keras is printed, and makes the exit code 1.
As a plugin of pytest this module puts parafit's functions in place.
"""

import inspect
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

FOLDERS = ("trainers/trainer_test.py", "callbacks", "models", "optimizers")
EXPECTED = {"test_stop_training_csv", "test_fit_eval_flow_for_jax_model_weights"}
"""Where parafit is not Keras on purpose: decision 0003, 1 and 2."""

_FAILED = re.compile(r"^(?:FAILED|ERROR) \S*?/src/(\S+)", re.MULTILINE)


def main() -> int:
    keras = next(iter(find_spec("keras").submodule_search_locations))
    paths = [str(Path(keras, "src", name)) for name in sys.argv[1:] or FOLDERS]
    theirs, ours = (_failures(paths, environment) for environment in ({}, {"PARAFIT_IN_PLACE": "1"}))
    different = sorted(test for test in ours - theirs if test.split("::")[-1] not in EXPECTED)
    print(f"{len(theirs)} tests fail with Keras itself, {len(ours - theirs)} more with parafit, {len(different)} of them not on purpose")
    print(*different, sep="\n")
    return bool(different)


def _failures(paths: list[str], environment: dict[str, str]) -> set[str]:
    options = ("-q", "-c", os.devnull, "--import-mode=importlib", "--continue-on-collection-errors", "-o", "python_files=*_test.py", "-ra")
    command = [sys.executable, "-m", "pytest", "-p", __spec__.name, "-p", "no:cacheprovider", "--tb=no", *options, *paths]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    print(done.stdout.strip().splitlines()[-1])
    return set(_FAILED.findall(done.stdout))


def pytest_configure(config) -> None:
    config.addinivalue_line("markers", "requires_trainable_backend: a backend that trains")
    config.addinivalue_line("markers", "multi_device: several devices")
    import parafit  # isort: skip  (chooses Keras' backend, so it comes first)
    import keras

    if os.environ.get("PARAFIT_IN_PLACE"):
        trainer = next(base for base in keras.Model.__mro__ if "train_step" in vars(base))
        for name in ("fit", "evaluate", "predict"):
            setattr(trainer, name, _in_place_of(getattr(trainer, name), getattr(parafit, name)))


def _in_place_of(theirs, ours):
    """`ours` with the arguments of `theirs`, which it may itself call for what it leaves to Keras."""
    signature, within = inspect.signature(theirs), []

    def call(*args, **kwargs):
        if within:
            return theirs(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        first = [given.pop(name) for name in ("self", "x", "y") if name in given]
        within.append(True)
        try:
            return ours(*first, **given)
        finally:
            within.pop()

    return call


if __name__ == "__main__":
    sys.exit(main())
