"""Each example runs as a user runs it, in a process of its own, and its ways of training agree."""

import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = ["two_three_one", "numpy_mlp", "xor", "mnist_784_32_10"]


@pytest.mark.parametrize(
    ("name", "epochs", "bound"),
    [("two_three_one", 60, 1e-12), ("numpy_mlp", 3, 1e-12), ("xor", 60, 1e-5), ("mnist_784_32_10", 1, 1e-4)],
)
def test_the_three_ways_agree(name, epochs, bound):
    output = run(name, "--epochs", str(epochs))
    assert difference(output) < bound
    assert re.search(r"plan single .* times as fast", output)
    assert "plan data=8" in output


def test_xor_is_learnt():
    assert re.findall(r"accuracy (\d+)%", run("xor", "--epochs", "60")) == ["100"] * 3


def test_digits_are_recognised_on_new_images():
    accuracies = [float(text) for text in re.findall(r"test accuracy ([\d.]+)", run("mnist_784_32_10", "--epochs", "1"))]
    assert len(accuracies) == 3
    assert min(accuracies) > 0.94


def test_the_numpy_ways_learn():
    assert trained_loss("two_three_one", "2") > trained_loss("two_three_one", "60")
    assert trained_loss("numpy_mlp", "1") > trained_loss("numpy_mlp", "3")


def test_every_example_is_named_in_the_readme_and_says_what_was_wrong():
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert sorted(NAMES) == sorted(path.stem for path in EXAMPLES.glob("*.py"))
    for name in NAMES:
        assert f"({name}.py)" in readme
        assert "What is often wrong in the articles" in (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")


@functools.cache
def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def difference(output: str) -> float:
    [text] = re.findall(r"largest difference between the three sets of weights: (\S+)", output)
    return float(text)


def trained_loss(name: str, epochs: str) -> float:
    """The loss that the article's own way prints in the first line."""
    return float(re.findall(r"(?:loss|rows) ([\d.]+)", run(name, "--epochs", epochs))[0])
