"""The benchmarks: the driver on small work, the hand-written ceiling against Keras, the tables."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import parafit  # noqa: F401  (chooses Keras' JAX backend)

ROOT = Path(__file__).resolve().parent.parent

from benchmarks import estimators, run, table, targets, workloads  # noqa: E402
from benchmarks.contenders import CONTENDERS, jax_scan, keras_fit, plain_mlp, scikit  # noqa: E402
from benchmarks.processes import Worker, WorkerError  # noqa: E402
from benchmarks.series import Spread, fastest, significant, values  # noqa: E402

SMALL = replace(workloads.WORKLOADS["mlp-bn"], steps=3, batch_size=8)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """A run of four contenders in processes of their own, and what it printed."""
    out = tmp_path_factory.mktemp("benchmarks") / "small.json"
    arguments = ["--workloads", "mlp-small", "--contenders", "parafit,keras-jax,scan-gather,sklearn", "--rounds", "2", "--steps", "3"]
    command = [sys.executable, "-m", "benchmarks.run", *arguments, "--fresh-rounds", "0", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(out.read_text()), done.stdout, list(out.parent.iterdir())


def test_driver_measures_each_contender_in_each_round(small_run):
    document, _, _ = small_run
    results = document["workloads"]["mlp-small"]["contenders"]
    assert list(results) == ["parafit", "keras-jax", "scan-gather", "sklearn"]
    for result in results.values():
        assert len(result["step_seconds"]) == len(result["call_step_seconds"]) == 2
        assert min(result["step_seconds"]) > 0
        assert result["peak_bytes"] > 10e6
    assert len(results["sklearn"]["predict_rows_per_second"]) == 2
    assert "predict_rows_per_second" not in results["scan-gather"]


def test_driver_says_on_what_it_measured_and_leaves_one_file(small_run):
    document, _, files = small_run
    assert document["machine"]["cores"] >= 1
    assert document["versions"]["keras"]
    assert document["options"]["out"] == "small.json"
    assert str(ROOT) not in json.dumps(document)
    assert [file.name for file in files] == ["small.json"]


def test_driver_prints_the_tables_that_table_prints(small_run, tmp_path, capsys):
    document, printed, _ = small_run
    (tmp_path / "result.json").write_text(json.dumps(document))
    table.main([str(tmp_path / "result.json")])
    assert capsys.readouterr().out == printed
    table.main([str(tmp_path / "result.json"), "--baseline", "sklearn"])
    assert "times as fast as sklearn" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        table.main([str(tmp_path / "result.json"), "--baseline", "torch"])
    assert "--baseline torch: result.json has parafit, keras-jax, scan-gather, sklearn" in capsys.readouterr().err


@pytest.mark.slow
def test_fresh_processes_start_cold_then_warm(tmp_path):
    options = run.parse(["--contenders", "parafit,keras-jax", "--rounds", "1", "--fresh-rounds", "1", "--out", str(tmp_path / "x.json")])
    results = run.measure(replace(workloads.WORKLOADS["mlp-small"], steps=2), options)
    assert len(results["parafit"]["fresh_cold"]["total_seconds"]) == len(results["parafit"]["fresh_warm"]["first_step_seconds"]) == 1
    assert "fresh_warm" not in results["keras-jax"]


def test_worker_that_fails_says_why(tmp_path):
    with pytest.raises(WorkerError, match=r"the process ended: FileNotFoundError: .*x\.npy"):
        Worker("sklearn", SMALL, arrays=tmp_path, scratch=tmp_path / "scratch")


def test_contender_that_fails_does_not_stop_the_others(monkeypatch, tmp_path):
    results = {"sklearn": {}, "scan": {}}

    def what(name):
        if name == "sklearn":
            raise WorkerError("the process ended: out of memory")
        results[name]["done"] = results[name].get("done", 0) + 1

    run._in_turn(what, results, 2, "test")
    assert results == {"sklearn": {"failed": "the process ended: out of memory"}, "scan": {"done": 2}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workloads", "mlp-smal"], "unknown: mlp-smal; there are mlp-small, mlp-medium"),
        (["--contenders", "parafit,pytorch"], "unknown: pytorch; there are parafit, keras-jax"),
        (["--steps", "0"], "'0' is not a whole number of at least 1"),
        (["--fresh-rounds", "few"], "'few' is not a whole number of at least 0"),
    ],
)
def test_options_that_mean_nothing_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        run.parse(arguments)
    assert message in capsys.readouterr().err


def test_unwritable_output_is_found_before_any_work(tmp_path):
    with pytest.raises(SystemExit, match=r"cannot be written: .* is a folder\. Name a file"):
        run.main(["--out", str(tmp_path)])


@pytest.mark.parametrize(("load", "said"), [(0.1, False), (3.0, True)])
def test_busy_machine_is_pointed_out(load, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1})
    monkeypatch.setattr(run, "measure", lambda workload, options: {})
    run.main(["--workloads", "cnn", "--fresh-rounds", "0", "--out", str(tmp_path / "result.json")])
    printed = capsys.readouterr()
    assert ("busy (load 3.0 on 2 cores)" in printed.err) is said
    assert f"load {load} before the run" in printed.out


def test_quick_changes_only_what_was_not_given():
    options = run.parse(["--quick", "--rounds", "5"])
    assert (options.rounds, options.fresh_rounds, options.workloads) == (5, 1, run.QUICK_WORKLOADS)
    assert "torch-ddp" not in options.contenders
    assert run.parse([]).contenders == tuple(CONTENDERS)


def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    run.write_json(path, {"value": 1})
    with pytest.raises(TypeError):
        run.write_json(path, {"value": object()})
    assert json.loads(path.read_text()) == {"value": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_contenders_say_why_they_do_not_take_part(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torch" else object())
    assert CONTENDERS["torch"].reason_to_skip(SMALL) == "torch is not installed"
    assert CONTENDERS["sklearn"].reason_to_skip(SMALL) == "MLPClassifier has dense layers only"
    assert CONTENDERS["sklearn"].reason_to_skip(workloads.WORKLOADS["table"]) is None
    assert "several times slower" in str(CONTENDERS["scan"].reason_to_skip(workloads.WORKLOADS["cnn"]))


@pytest.mark.parametrize("name", ["mlp-small", "mlp-bn"])
def test_hand_written_mlp_is_the_keras_model(name):
    from benchmarks.contenders import keras_models

    workload = replace(workloads.WORKLOADS[name], batch_size=16, steps=4)
    x, y = workloads.make_arrays(workload, workload.rows)
    model = keras_models.build(workload)
    state, step, measure = plain_mlp.program(workload)
    state["params"] = _layers_of(model, state["params"])
    history = model.fit(x, y, batch_size=16, shuffle=False, verbose=0).history
    for start in range(0, workload.rows, 16):
        state = step(state, (x[start : start + 16], y[start : start + 16]))
    (loss, correct, rows), state = measure(state)
    assert rows == workload.rows
    np.testing.assert_allclose(float(loss / rows), history["loss"][0], rtol=1e-5)
    np.testing.assert_allclose(float(correct / rows), history["accuracy"][0], rtol=1e-6)
    for ours, theirs in zip(state["params"], _layers_of(model, state["params"])):
        for part in ours:
            np.testing.assert_allclose(ours[part], theirs[part], rtol=1e-4, atol=2e-5)


def _layers_of(model, like):
    """The model's weights, laid out as `like`: a dictionary for each Dense layer and the normalisation after it."""
    import keras

    dense = [layer for layer in model.layers if isinstance(layer, keras.layers.Dense)]
    norms = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    layers = [{"kernel": np.array(layer.kernel.value), "bias": np.array(layer.bias.value)} for layer in dense]
    for layer, norm in zip(layers, norms):
        layer |= {"scale": np.array(norm.gamma.value), "shift": np.array(norm.beta.value)}
    assert [set(layer) for layer in layers] == [set(layer) for layer in like]
    return layers


@pytest.mark.parametrize("feed", ["cut", "gather", "take"])
def test_scans_meet_every_row_once_an_epoch(feed):
    workload = replace(workloads.WORKLOADS["mlp-small"], batch_size=8)
    x, y = workloads.make_arrays(workload, 20)
    contender = jax_scan.make(workload, x, y, feed=feed)
    met = []
    measure = contender._measure

    def noting(state):
        sums, state = measure(state)
        met.append(float(sums[2]))
        return sums, state

    contender._measure = noting
    seconds = contender.train(2)
    assert met == [20.0, 20.0]
    assert len(seconds) == 2
    assert int(contender._state["steps"]) == 2 * 3


def test_scanned_keras_step_learns():
    workload = replace(workloads.WORKLOADS["lstm"], batch_size=4, input_shape=(3, 2))
    x, y = workloads.make_arrays(workload, 10)
    contender = jax_scan.make(workload, x, y, feed="gather")
    before = [np.array(value) for value in contender._state[0]]
    contender.train(1)
    assert all(np.abs(np.array(after) - old).max() > 1e-4 for after, old in zip(contender._state[0], before))


@pytest.mark.parametrize("parafits", [True, False])
def test_fit_contenders_train_and_predict(parafits):
    x, y = workloads.make_arrays(SMALL, 20)
    contender = keras_fit.make(SMALL, x, y, parafit=parafits)
    assert len(contender.train(2)) == 2
    np.testing.assert_allclose(contender.predict().sum(axis=1), 1.0, rtol=1e-5)


def test_scikit_contender_learns():
    workload = replace(workloads.WORKLOADS["table"], hidden=(16,), batch_size=32)
    x, y = workloads.make_arrays(workload, 640)
    contender = scikit.make(workload, x, y)
    assert len(contender.train(30)) == 30
    assert (contender.predict().argmax(axis=1) == y).mean() > 0.9


def test_arrays_are_the_same_for_the_same_seed():
    for workload in workloads.WORKLOADS.values():
        x, y = workloads.make_arrays(workload, 64)
        again, _ = workloads.make_arrays(workload, 64)
        assert np.array_equal(x, again)
        assert 1 < len(np.unique(y)) <= workload.classes


def test_workload_steps():
    workload = workloads.WORKLOADS["mlp-large"]
    assert workloads.with_steps(workload, None, quick=False) == workload
    assert workloads.with_steps(workload, None, quick=True).steps == 4
    assert workloads.with_steps(workload, 3, quick=True).rows == 3 * 512


def test_series_fastest_needs_every_contender():
    workload = {"contenders": {"a": {"step_seconds": [2.0, 2.0]}, "b": {"step_seconds": [1.0, 9.0, 1.0]}, "c": {"skipped": "no"}}}
    assert fastest(workload, ("a", "b"), "step_seconds") == "b"
    assert fastest(workload, ("a", "b", "c"), "step_seconds") is None
    assert values(workload, "a", "fresh_cold.total_seconds") == []
    assert Spread.of([1, 2, 3, 4, 5]) == Spread(median=3, low=2, high=4)
    assert [significant(value) for value in (0.05, 5.0, 50.0, 5000.0)] == ["0.050", "5.00", "50.0", "5,000"]


def test_targets_are_judged_by_the_median_of_ratios_in_a_round():
    ours = {"step_seconds": [1.0, 1.0, 1.0], "fresh_cold": {"first_step_seconds": [4.0]}, "fresh_warm": {"first_step_seconds": [1.0]}}
    others = {
        "keras-jax": {"step_seconds": [2.0, 3.0, 2.4]},
        "torch": {"step_seconds": [2.0, 2.5, 4.0]},
        "scan": {"step_seconds": [0.5] * 3},
    }
    found = {
        (verdict.target.what, verdict.target.at_least): verdict.word
        for verdict in targets.verdicts({"workloads": {"mlp-small": {"contenders": {"parafit": ours, **others}}}})
    }
    assert found["keras fit on JAX", 1] == "yes"
    assert found["keras fit on JAX", 2.5] == "no (within the quartiles)"
    assert found["PyTorch loop", 3] == "no (within the quartiles)"
    assert found["bare scan over pre-cut batches", 0.7] == "no"
    assert found["keras fit on JAX, best steps_per_execution", 1.3] == "not measured"
    assert found["own first start, from start to first step (second start)", 2] == "yes"


def test_estimators_reach_the_same_accuracy(monkeypatch):
    monkeypatch.setitem(estimators.CASES, "digits", estimators.Case(title="short", parameters={"max_iter": 20}))
    accuracies = [estimators.fit_once(library, "digits")[1] for library in estimators.LIBRARIES]
    assert accuracies[0] == accuracies[1] > 0.9


def test_table_of_estimators_judges_the_ratio():
    results = {"sklearn": {"fit_seconds": [2.0, 2.2], "first_fit_seconds": 2.5, "accuracy": 0.97}}
    results["parafit"] = {"fit_seconds": [1.0, 1.0], "first_fit_seconds": 2.0, "accuracy": 0.97}
    lines = table._estimators({"estimators": {"digits": results}}).splitlines()
    assert lines[2].endswith("| 2.50 | 2.10 [2.05–2.15] | 0.9700 | 2.10 [2.05–2.15] | no |")
    assert lines[3].endswith("| 1.00 [1.00–1.00] |  |")
    assert table._estimators({"estimators": {}}) == ""


def test_peak_memory_is_of_this_process_alone():
    from benchmarks.worker import peak_bytes

    code = "from benchmarks.worker import peak_bytes; print(peak_bytes())"
    ballast = np.ones(25_000_000)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, env=dict(os.environ))
    assert peak_bytes() > ballast.nbytes > int(done.stdout) > 1e6
