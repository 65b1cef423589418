"""The architecture: imports run downward only, and what may import Keras, JAX and the environment is known."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import parafit

PACKAGE = Path(parafit.__file__).parent
LAYERS = [
    {"__main__"},
    {"cli"},
    {"plan_command"},
    {"tables", "sklearn"},
    {"api"},
    {"forecast"},
    {"run", "perceptron", "planner"},
    {"progress"},
    {"checks", "chunk", "data", "safeguard", "report"},
    {"techniques", "contract", "even"},
    {"calibrate", "models"},
    {"probes", "nnx"},
    {"adapt", "callbacks", "mesh", "rewrite", "price", "segments"},
    {"search"},
    {"compare", "limits"},
    {"ranking"},
    {"candidates", "prices"},
    {"cost"},
    {"memory", "measured"},
    {"shares"},
    {"layout"},
    {"plan", "trace", "collectives", "networks", "residuals"},
    {"describe", "copies"},
    {"kernels", "fold", "buffers"},
    {"arrays"},
    {"program", "walk", "machine"},
    {"operations"},
    {"ties"},
    {"arguments", "nnx_checks", "programs", "targets"},
    {"dims", "errors", "compat", "cluster", "files", "heap", "imports", "jaxprs", "processor", "rates", "schedule", "software", "versions"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
FILES = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]


def imports(path):
    """Every module a file imports, as (top package, second part), wherever in the file it does so."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            for name in node.names:
                yield tuple(f"{node.module}.{name.name}".split(".")[:2])
        elif isinstance(node, ast.Import):
            for name in node.names:
                yield (*name.name.split("."), "")[:2]


def part_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downward(path):
    own = part_of(path)
    assert own in RANK, f"{own} has no layer: add it to LAYERS"
    for top, second in imports(path):
        if top == "parafit" and second in RANK and second != own:
            assert RANK[second] > RANK[own], f"{own} imports {second}, which is not below it"


def test_who_imports_keras():
    importers = {part_of(path) for path in FILES if any(top == "keras" for top, _ in imports(path))}
    assert importers <= {"compat", "adapt", "callbacks", "tables"}


def test_only_compat_uses_what_keras_and_jax_do_not_document():
    """And `programs`, which is there before Keras is imported."""
    for path in FILES:
        if part_of(path) not in ("compat", "programs"):
            assert not {("keras", "src"), ("jax", "_src")} & set(imports(path)), path


def test_only_cluster_knows_the_environment():
    for path in FILES:
        if part_of(path) != "cluster":
            assert not any(word in path.read_text(encoding="utf-8") for word in ("os.environ", "getenv")), path


def test_planning_needs_neither_jax_nor_keras():
    script = "import sys, parafit.plan, parafit.price, parafit.errors; print([name for name in ('jax', 'keras') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_importing_parafit_is_quick_and_chooses_jax():
    script = """
import os, sys
os.environ.pop("KERAS_BACKEND", None)
import parafit
assert not {"jax", "keras", "sklearn", "matplotlib", "polars"} & set(sys.modules), "import parafit loads heavy packages"
print(os.environ["KERAS_BACKEND"], parafit.fit.__name__)
"""
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split() == ["jax", "fit"]


def test_a_chosen_backend_is_left_alone():
    script = "import os; os.environ['KERAS_BACKEND'] = 'numpy'; import parafit; print(os.environ['KERAS_BACKEND'])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "numpy"


def test_a_second_start_compiles_nothing(tmp_path):
    """The programs of a first start are found on disk by a second, which adds none."""
    script = """
import parafit, keras, numpy as np
keras.utils.set_random_seed(0)
model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
model.compile("adam", "mse")
parafit.fit(model, np.ones((20, 3)), np.ones((20, 2)), batch_size=8, verbose=0)
"""
    found = []
    for _ in range(2):
        environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path), "PATH": "", "KERAS_BACKEND": "jax"}
        subprocess.run([sys.executable, "-c", script], check=True, env=environment)
        found.append(set((tmp_path / "parafit" / "programs").rglob("*.program")))
    assert found[0]
    assert found[1] == found[0]


def test_keras_loads_its_plots_and_wrappers_when_they_are_used():
    script = """
import pickle, sys, parafit, keras
slow = {"sklearn", "matplotlib"} | ({"scipy.stats"} if keras.__version__ < "3.16" else set())  # Keras 3.16 reads sound with scipy.signal
assert not slow & set(sys.modules), "importing keras loads packages it does not need yet"
assert issubclass(keras.wrappers.SKLearnClassifier, __import__("sklearn.base").base.BaseEstimator)
estimator = keras.wrappers.SKLearnClassifier(print)
assert type(pickle.loads(pickle.dumps(estimator))) is keras.src.wrappers.SKLearnClassifier is keras.wrappers.SKLearnClassifier
assert "SKLearnClassifier" in dir(keras.wrappers) and not hasattr(keras.wrappers, "SKLearnNothing")
assert callable(keras.visualization.plot_image_gallery) and "matplotlib.pyplot" in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
