"""The architecture: imports run downward only, and what may import Keras, JAX and the environment is known."""

import ast
import os
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import parafit

PACKAGE = Path(parafit.__file__).parent


def module_name(path):
    return "parafit." + str(path.relative_to(PACKAGE).with_suffix("")).replace("/", ".").removesuffix(".__init__")


ROOMS = [
    {"__main__"},
    {"cli"},
    {"tables", "sklearn", "nnx"},
    {"populations"},
    {"api"},
    {"forecast"},
    {"planning"},
    {"execution", "calibration"},
    {"data", "techniques"},
    {"adapters", "placement"},
    {"backends"},
    {"tracing", "reports"},
    {"planner"},
    {"support"},
    {"errors"},
]
"""Rooms from the roof down: each may import those below it."""
RANK = {name: rank for rank, floor in enumerate(ROOMS) for name in floor}
FILES = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
MODULES = {module_name(path) for path in FILES}


def imports(path):
    """Every module a file imports, wherever in the file it does so: as a module of parafit where it is one."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            for name in node.names:
                full = f"{node.module}.{name.name}"
                yield full if full in MODULES or node.module not in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def room_of(module):
    return module.split(".")[1]


def test_there_are_few_rooms():
    assert {room_of(module) for module in MODULES} == set(RANK)
    assert len(RANK) <= 22


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downward(path):
    own = room_of(module_name(path))
    for module in imports(path):
        if module in MODULES and room_of(module) != own:
            assert RANK[room_of(module)] > RANK[own], f"{own} imports {module}, which is not below it"


def test_no_circles_inside_rooms():
    """Modules can be put in an order in which each imports only those before it."""
    needs = {module_name(path): {other for other in imports(path) if other in MODULES and other != module_name(path)} for path in FILES}
    for package in {name for name in needs if any(other.startswith(name + ".") for other in needs)}:
        needs[package] -= {name for name in needs if name == package}
    TopologicalSorter(needs).prepare()


@pytest.mark.parametrize("module", sorted(name for name in MODULES if room_of(name) == "planner"))
def test_the_planner_needs_neither_jax_nor_keras(module):
    script = f"import sys, {module}; print([name for name in ('jax', 'keras') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def importers(package):
    """Rooms that import a package from outside, by its name."""
    return {room_of(module_name(path)) for path in FILES if any(name.split(".")[0] == package for name in imports(path))}


def test_who_imports_keras():
    assert importers("keras") <= {"adapters", "support", "tables"}


def test_only_support_uses_what_keras_and_jax_do_not_document():
    """`compat`, and `programs`, which is there before Keras is imported."""
    for path in FILES:
        if module_name(path) not in ("parafit.support.compat", "parafit.support.programs"):
            assert not [name for name in imports(path) if name.startswith(("keras.src", "jax._src"))], path


def test_only_the_console_prints():
    for path in FILES:
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        prints = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
        assert len(prints) == (module_name(path) == "parafit.execution.events"), path


PLATFORM = re.compile(r"(?<![\w-])(cpu|gpu|tpu|cuda|rocm)(?![\w-])|default_backend")  # not in the name of a machine, as in tpu-v5p
NAMED_OTHERWISE = {"parafit.support.processor": {"cpu family", "cpu"}}
"""Fields of /proc/cpuinfo, which have nothing to do with what JAX computes on."""


def platforms_named(source):
    """What a module's code, docstrings left out, says of platforms: strings and names."""
    tree = ast.parse(source)
    documented = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        words = [getattr(node, field, None) for field in ("id", "attr", "arg", "name", "module")]
        words += [node.value] if isinstance(node, ast.Constant) and id(node) not in documented else []
        yield from (word for word in words if isinstance(word, str) and PLATFORM.search(word))


@pytest.mark.parametrize("path", [path for path in FILES if room_of(module_name(path)) != "backends"], ids=module_name)
def test_only_backends_know_what_jax_computes_on(path):
    """They are the one door: `backends.current()`."""
    named = set(platforms_named(path.read_text(encoding="utf-8")))
    assert named <= NAMED_OTHERWISE.get(module_name(path), set())


@pytest.mark.parametrize(
    "source",
    [
        'if jax.devices()[0].platform == "cpu": pass',
        "jax.default_backend()",
        "from jax import default_backend as where",
        "from parafit.backends.cpu import options",
        "import parafit.backends.cpu.options",
        'f"{count} cpu devices"',
        'def choose(platform="cuda"): pass',
    ],
)
def test_what_names_a_platform_is_found(source):
    assert list(platforms_named(source))
    assert not list(platforms_named(f'"""A docstring: {source.replace(chr(34), "")}"""\nscpu = "jax_num_cpu_devices"'))


def test_only_one_module_knows_the_environment():
    for path in FILES:
        if module_name(path) != "parafit.support.environment":
            assert not any(word in path.read_text(encoding="utf-8") for word in ("os.environ", "getenv")), path


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
