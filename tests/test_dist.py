"""What `make dist` makes, installed into an empty environment, runs README's example."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

from tests.test_readme import example

ROOT = Path(__file__).parent.parent
CONSTRAINTS = ROOT / ("constraints.txt" if sys.version_info < (3, 12) else "constraints-newest.txt")


def run(*command, **options):
    """A command's output; its complaints where it fails."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The folder that `make dist` fills."""
    if not shutil.which("make"):
        pytest.skip("needs make")
    folder = tmp_path_factory.mktemp("dist")
    ask = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder / "asked", "setuptools>=77"]
    asked = subprocess.run(ask, capture_output=True, text=True)
    if asked.returncode:
        pytest.skip(f"no package index can be reached: {asked.stderr.strip().splitlines()[-1]}")
    run("make", "dist", f"DIST={folder / 'dist'}", f"VENV={sys.prefix}", cwd=ROOT)
    return folder / "dist"


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-newest.txt"])
def test_constraints_pin_all_that_is_asked_for(name):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked = [re.match(r"[\w-]+", each)[0] for each in (*project["dependencies"], *extras["nnx"], *extras["test"], *extras["dev"])]
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in (ROOT / name).read_text(encoding="utf-8").split()}
    assert set(asked) <= pinned


@pytest.mark.slow
def test_the_wheel_runs_the_readme_in_an_empty_environment(dist, tmp_path):
    wheel, source = sorted(dist.iterdir(), key=lambda path: path.suffix != ".whl")
    assert (wheel.suffix, source.suffixes[-2:]) == (".whl", [".tar", ".gz"])
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--constraint", CONSTRAINTS, wheel)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "JAX_", "KERAS_", "XLA_"))}
    script = f"{example()}\nprint(parafit.__file__)"
    said = run(python, "-c", script, cwd=tmp_path, env={**environment, "XDG_CACHE_HOME": str(tmp_path)})
    assert "parafit: predicted" in said
    assert str(tmp_path / "env") in said.splitlines()[-1]
    for command in (["parafit", "machine", "h100x8"], ["parafit", "plan", "gpt:1.3b", "--batch-size", "64", "--machine", "h100x8"]):
        assert run(python.with_name(command[0]), *command[1:], cwd=tmp_path), "its presets and commands are there"
