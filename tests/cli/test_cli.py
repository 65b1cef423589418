"""The command line: verbs, exit codes, one readable message for what goes wrong, and Ctrl-C in a real process."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from parafit.tables import model_folder


def write_table(path, rows=100):
    random = np.random.default_rng(0)
    size = random.uniform(0, 1, rows)
    colour = random.choice(["red", "blue"], rows)
    pl.DataFrame({"size": size, "colour": colour, "kind": np.where(size + (colour == "red") > 0.9, "big", "small")}).write_csv(path)
    return path


def test_train_then_predict(run, tmp_path):
    table = write_table(tmp_path / "things.csv")
    code, out, err = run("train", table, "--target", "kind", "--epochs", 30, "--batch-size", 8, "--seed", 1, "--plan", "single")
    assert (code, err) == (0, "")
    for words in (
        "things.csv: 100 rows, 3 columns",
        "2 classes (big, small), because the target is text",
        "parameters",
        "epoch 1/30",
        "confusion matrix of the test rows",
    ):
        assert words in out
    assert sorted(path.name for path in (tmp_path / "things-model").iterdir()) == sorted(model_folder.FILES)

    code, out, err = run("predict", "things-model", table, "-o", "answers.csv")
    assert (code, err) == (0, "")
    assert "written  answers.csv: 100 rows" in out
    answers = pl.read_csv("answers.csv")
    assert answers.columns == ["prediction", "probability_big", "probability_small"]
    assert (answers["prediction"] == pl.read_csv(table)["kind"]).mean() > 0.9


def test_the_task_can_be_settled(run, tmp_path):
    pl.DataFrame({"x": np.arange(100) ** 2, "stars": np.arange(100) % 5}).write_csv("stars.csv")
    _, out, _ = run("train", "stars.csv", "--target", "stars", "--epochs", 1)
    assert "stars: classification, 5 classes" in out
    assert "for regression: --task regression" in out
    code, out, _ = run("train", "stars.csv", "--target", "stars", "--epochs", 1, "--task", "regression", "--out", "other")
    assert code == 0
    assert "stars: regression" in out
    assert json.loads((tmp_path / "other" / "scores.json").read_text())["test"]["r2"] is not None


def test_a_model_is_replaced_by_force_only(run):
    write_table("things.csv")
    assert run("train", "things.csv", "--target", "kind", "--epochs", 1)[0] == 0
    code, out, err = run("train", "things.csv", "--target", "kind", "--epochs", 1)
    assert (code, out) == (2, "")
    assert "'things-model' holds a model already: choose another folder, or replace it with --force" in err
    assert run("train", "things.csv", "--target", "kind", "--epochs", 1, "--force")[0] == 0


def test_notes_are_printed(run):
    write_table("things.csv")
    run("train", "things.csv", "--target", "kind", "--epochs", 1)
    pl.DataFrame({"size": [0.5], "colour": ["green"], "weight": [1]}).write_csv("new.csv")
    _, out, _ = run("predict", "things-model", "new.csv", "-o", "out.parquet")
    assert "note     column colour: rows with a category that training had not, taken as missing: 1" in out
    assert "note     columns not used, as training had none of that name: weight" in out


BAD = {
    "missing file": (["train", "nothing.csv", "--target", "y"], "there is no file 'nothing.csv'"),
    "unknown ending": (["train", "a.doc", "--target", "y"], "cannot tell the format of 'a.doc'"),
    "unknown column": (
        ["train", "things.csv", "--target", "kinds"],
        "no column 'kinds'; it has 'size', 'colour', 'kind'. Did you mean 'kind'?",
    ),
    "no target": (["train", "things.csv"], "Missing option '--target'"),
    "bad epochs": (["train", "things.csv", "--target", "kind", "--epochs", "0"], "0 is not in the range"),
    "ragged": (["train", "ragged.csv", "--target", "a"], "line 3 of 'ragged.csv' has 3 fields"),
    "unknown axis": (["train", "things.csv", "--target", "kind", "--plan", "dta=2"], "Did you mean 'data'?"),
    "too many devices": (
        ["train", "things.csv", "--target", "kind", "--plan", "data=64"],
        "wants 64 devices, but there are 8 (cpu). Choose a smaller plan, or, to simulate devices on CPU, set JAX_NUM_CPU_DEVICES=64 in the",
    ),
    "bad plan": (["train", "things.csv", "--target", "kind", "--plan", "data=0"], "data=0"),
    "foreign folder": (["train", "things.csv", "--target", "kind", "--out", "foreign"], "holds 'thesis.txt', which parafit did not write"),
    "no model file": (["train", "things.csv", "--target", "kind", "--model", "net.keras"], "there is no file 'net.keras'"),
    "no folder": (["predict", "nothing", "things.csv", "-o", "out.csv"], "there is no folder 'nothing'"),
    "no output": (["predict", "nothing", "things.csv"], "Missing option '-o'"),
    "unknown verb": (["fly"], "No such command 'fly'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_with_2_and_one_message(run, tmp_path, name):
    write_table("things.csv")
    (tmp_path / "a.doc").write_text("x")
    (tmp_path / "ragged.csv").write_text("a,b\n1,2\n1,2,3\n")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    arguments, message = BAD[name]
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before


def test_advice_follows_the_caller(run, monkeypatch):
    write_table("things.csv")
    (Path("net.py")).write_text(
        "import keras\n\ndef build_model(shape, size):\n    model = keras.Sequential([keras.Input(shape), keras.layers.Dense(size)])\n"
        "    model.compile(keras.optimizers.SGD(1e30), 'mse')\n    return model\n"
    )
    code, out, err = run("train", "things.csv", "--target", "size", "--model", "net.py", "--epochs", 5)
    assert code == 2
    assert "the loss became" in err
    assert "--model" in err
    assert "keras.callbacks" not in out + err


def test_columns_that_prediction_lacks_or_that_changed(run, tmp_path):
    write_table("things.csv")
    run("train", "things.csv", "--target", "kind", "--epochs", 1)
    (tmp_path / "lacks.csv").write_text("size\n1.0\n")
    (tmp_path / "changed.csv").write_text("size,colour\n1.0,red\nlarge,red\n")
    code, _, err = run("predict", "things-model", "lacks.csv", "-o", "out.csv")
    assert (code, err) == (2, "parafit: the table has no column 'colour'; it has 'size'.\n")
    code, _, err = run("predict", "things-model", "changed.csv", "-o", "out.csv")
    assert code == 2
    assert err.startswith("parafit: column 'size' holds 'large' in line 3: expected a number, as in training (1 of 2 cells are none;")
    assert not (tmp_path / "out.csv").exists()


def test_help_and_version_need_neither_keras_nor_polars():
    program = (
        "import sys; sys.argv = ['parafit', '--help']\nfrom parafit.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "assert not {'keras', 'jax', 'polars', 'sklearn', 'matplotlib', 'rich'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, said(done.stderr)) == (0, "")
    assert "train" in done.stdout
    assert "predict" in done.stdout


def test_it_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "parafit", "--version"], capture_output=True, text=True, check=True)
    assert "parafit" in done.stdout


def said(text):
    """What was written to standard error, but for what TensorFlow logs when Keras finds it installed."""
    return "".join(
        line for line in text.splitlines(keepends=True) if not re.match(r"WARNING: All log messages before absl|[IWE]\d{4} ", line)
    )


def test_ctrl_c_keeps_what_was_learnt(tmp_path):
    table = write_table(tmp_path / "things.csv", rows=2000)
    # A process started in the background may ignore SIGINT: ask for Python's own handling.
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from parafit.cli import main; main()"
    command = [
        sys.executable,
        "-c",
        program,
        "train",
        str(table),
        "--target",
        "kind",
        "--epochs",
        "100000",
        "--out",
        str(tmp_path / "model"),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("epoch 1/"):
                process.send_signal(signal.SIGINT)
                break
        out, err = process.communicate(timeout=120)
    assert (process.returncode, said(err)) == (130, "")
    assert "interrupted by Ctrl-C" in out
    history = json.loads((tmp_path / "model" / "history.json").read_text())
    assert history["stopped"] == "interrupted by Ctrl-C"
    assert 1 <= len(history["epochs"]["loss"]) < 100_000
    assert model_folder.read_folder(tmp_path / "model").model.count_params() > 0
    assert "interrupted by Ctrl-C" in (tmp_path / "model" / "report.html").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "things.csv"]
