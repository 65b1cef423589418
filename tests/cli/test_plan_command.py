"""`parafit plan` and `parafit machine`, and `find_plan` for Keras models."""

import dataclasses
import json

import keras
import numpy as np
import pytest

import parafit
from parafit import planning
from parafit.calibration import history
from parafit.errors import MachineError, ModelError
from parafit.planner.machine.machine import Machine
from parafit.planner.plan import Plan
from parafit.planner.search.space import Candidates

GPT = "gpt:layers=4,hidden=256,heads=8,sequence=128,vocabulary=1024"


def dense(loss="sparse_categorical_crossentropy", **options):
    model = keras.Sequential([keras.Input((20,)), keras.layers.Dense(64, "relu"), keras.layers.Dense(4, "softmax")])
    model.compile("adam", loss, **options)
    return model


def test_plan_prints_and_writes(run, tmp_path):
    code, out, err = run("plan", GPT, "--batch-size", 64, "--machine", "a100x8", "--hosts", 2, "--network", "400Gb",
        "--instead", "tensor=8,precision=bfloat16", "--out", "plan.json", "--report", "plan.html")  # fmt: skip
    assert (code, err) == (0, "")
    plan = Plan.load(tmp_path / "plan.json")
    for words in (f"plan    {plan.short()} (", "step    ", "memory  ", "why not", " is faster: ", "difference", "written  plan.json"):
        assert words in out
    html = (tmp_path / "plan.html").read_text(encoding="utf-8")
    assert html.count("<svg") == 3
    assert "http" not in html.replace("http://www.w3.org", "")
    assert "Time against memory" in html


def test_the_timeline_of_a_pipeline_is_written(run, tmp_path):
    allowed = (GPT, "--batch-size", 64, "--machine", "a100x8", "--allow", "pipeline,microbatches")
    code, out, err = run("plan", *allowed, "--trace", "trace.json", "--report", "plan.html")
    assert (code, err) == (0, "")
    assert "written  trace.json" in out
    assert "runs    this version only prices pipeline" in out or "pipeline" in planning.RUNS
    events = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    assert {event["name"] for event in events if event["ph"] == "X"} >= {"F0", "B0"}
    assert "When each task runs" in (tmp_path / "plan.html").read_text(encoding="utf-8")


def test_a_plan_without_a_pipeline_has_no_timeline(run, tmp_path):
    code, _, err = run(
        "plan", GPT, "--batch-size", 64, "--machine", "a100x8", "--allow", "data", "--trace", "trace.json", "--out", "a.json"
    )
    assert code == 2
    assert "has no pipeline, so there is no timeline to write to 'trace.json'" in err
    assert list(tmp_path.iterdir()) == []


def test_goal_memory_and_techniques_can_be_asked_for(run):
    code, out, _ = run("plan", GPT, "--batch-size", 64, "--machine", "a100x8", "--goal", "memory", "--allow", "data, zero", "--max-gib", 30)
    assert code == 0
    assert out.startswith("plan    data=8,zero=3")
    assert "of 30.0 GiB a device" in out


def test_plan_of_a_keras_file(run, tmp_path):
    dense().save(tmp_path / "net.keras")
    code, out, err = run("plan", "net.keras", "--batch-size", 32)
    assert (code, err) == (0, "")
    assert out.startswith("plan    single")


def test_plan_of_a_python_file(run, tmp_path):
    (tmp_path / "net.py").write_text(
        "import keras\ndef build_model(input_shape, output_size):\n"
        "    return keras.Sequential([keras.Input(input_shape), keras.layers.Dense(output_size)])\n"
    )
    assert run("plan", "net.py", "--batch-size", 8, "--sizes", 5, 2)[0] == 0
    code, _, err = run("plan", "net.py", "--batch-size", 8)
    assert code == 2
    assert "--sizes INPUTS OUTPUTS" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpt:huge", "--batch-size", 8, "--machine", "h100x8"], "cannot read 'gpt:huge'"),
        (["gpt:125m", "--batch-size", 8, "--machine", "h1000"], "Presets are"),
        (["gpt:125m", "--batch-size", 8, "--machine", "h100x9"], "there is no machine 'h100x9'. Did you mean 'h100x8'?"),
        (["gtp:125m", "--batch-size", 8], "there is no network and no file 'gtp:125m'. Did you mean 'gpt:125m'?"),
        (["gpt:125b", "--batch-size", 8, "--machine", "h100x8"], "cannot read 'gpt:125b'. Did you mean 'gpt:175b'?"),
        (["gpt:125m", "--batch-size", 8, "--machine", "h100x8", "--allow", "tensr"], "Did you mean 'tensor'?"),
        (["gpt:125m", "--batch-size", 8, "--machine", "h100x8", "--instead", "tensr=8"], "Did you mean 'tensor'?"),
        (["gpt:125m", "--batch-size", 8, "--machine", "h100x8", "--max-gib", 0], "x>0"),
        (["gpt:125m", "--batch-size", 8, "--hosts", 4], "name it with --machine"),
        (["gpt:125m", "--batch-size", 8, "--machine", "h100x8", "--allow", "magic"], "allow names 'magic'"),
        (["gpt:125m", "--batch-size", 8, "--machine", "h100x8", "--max-gib", 0.1], "The smallest is"),
        (["gpt:125m", "--batch-size", 8, "--machine", "h100x8", "--instead", "data=9"], "wants 9 devices"),
        (["gpt:125m", "--batch-size", 8, "--machine", "h100x8", "--out", "no/plan.json"], "cannot write 'no/plan.json'"),
        (["absent.keras", "--batch-size", 8], "there is no file"),
    ],
)
def test_what_cannot_be_planned(run, arguments, message):
    code, _, err = run("plan", *arguments)
    assert code == 2
    assert message in err


def test_machine_prints_numbers_with_sources(run):
    code, out, err = run("machine", "h100x8", "--hosts", 4)
    assert (code, err) == (0, "")
    assert out.startswith("h100x8\n")
    lines = {line.split()[0]: line for line in out.splitlines()[1:]}
    assert "asked for" in lines["hosts"]
    assert "datasheet" in lines["device.peak_flops.bfloat16"]


def test_this_machine_counts_its_processor_once(run):
    code, out, _ = run("machine")
    assert code == 0
    assert "device.memory_bytes" in out
    assert planning.this_machine().devices_per_host == 1


def test_machines_that_cannot_be_shown(run):
    for arguments, message in ((["h100x8", "--calibrate"], "can be calibrated"), (["--hosts", 2], "go with the name of a machine")):
        code, _, err = run("machine", *arguments)
        assert code == 2
        assert message in err


def test_report_of_past_fits(run, tmp_path):
    code, _, err = run("report")
    assert code == 2
    assert "no fit was scored yet" in err
    fit = history.Residual(machine="m", model="net<1>", batch=32, plan="single", predicted_seconds=1.1e-3, measured_seconds=1e-3,
        predicted_bytes=2e6, measured_bytes=2.2e6, date="2026-01-01T00:00:00")  # fmt: skip
    for factor in (1, 2, 3):
        history.append(dataclasses.replace(fit, measured_seconds=factor * 1e-3))
    code, out, err = run("report", "--out", "page.html")
    assert (code, err) == (0, "")
    assert out.startswith("3 fits: step time off by 45 % (median), 63 % (most)")
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert html.count("<svg") == 2
    assert "net&lt;1&gt;" in html


def test_a_fit_is_remembered_for_the_report(run, calibrated):
    x, y = np.ones((100, 20), "float32"), np.zeros(100, "int32")
    parafit.fit(dense(), x, y, batch_size=16, epochs=2, verbose=0)
    assert history.load() == []
    parafit.fit(dense(), x, y, batch_size=16, epochs=2, verbose=2)
    assert history.load() == []  # timed, not predicted
    calibrated()
    parafit.fit(dense(), x, y, batch_size=16, epochs=2, verbose=2)
    (fit,) = history.load()
    assert (fit.batch, fit.plan) == (16, "single")
    assert min(fit.predicted_seconds, fit.measured_seconds, fit.predicted_bytes) > 0
    assert run("report")[0] == 0


def test_a_place_that_cannot_be_written_costs_no_fit(calibrated, capsys):
    calibrated()
    history.residuals_path().with_name(".residuals.jsonl.lock").mkdir()
    parafit.fit(dense(), np.ones((100, 20), "float32"), np.zeros(100, "int32"), verbose=2)
    assert "could not be kept for `parafit report`" in capsys.readouterr().out


def test_find_plan_of_a_keras_model():
    plan = parafit.find_plan(dense(), batch_size=64)
    assert plan.device_count == 1
    assert plan.ranking.program.sizes["batch"] == 64
    there = parafit.find_plan(dense(), batch_size=1 << 20, machine="h100x8", allow=["data"])
    assert there.axes == {"data": 8}
    assert "is faster: " in parafit.explain(there, "single")


def test_find_plan_reads_data_shapes_and_models_alike():
    x, y = np.zeros((100, 20), "float32"), np.zeros(100, "int32")
    programs = [planning.keras_program(dense(), *data, batch_size=16)[0] for data in ((x, y), ((20,),), ())]
    sizes = [sorted((tensor.shape, tensor.itemsize) for tensor in program.of_role("input")) for program in programs]
    assert sizes[0] == sizes[1] == sizes[2]
    assert programs[0].flops == programs[1].flops == programs[2].flops


def test_rows_tell_shapes_and_the_batch_is_what_was_asked_for():
    x, y = np.zeros((24, 20), "float32"), np.zeros(24, "int32")
    for size in (8, 65536):
        plan = parafit.find_plan(dense(), x, y, batch_size=size, machine="h100x8")
        assert plan.ranking.program.sizes["batch"] == size
    assert parafit.find_plan(dense(), x, y, machine="h100x8").ranking.program.sizes["batch"] == 32


def test_find_plan_of_several_inputs_and_outputs():
    inputs = {"a": keras.Input((3,), name="a"), "b": keras.Input((4,), name="b")}
    joined = keras.layers.Concatenate()(list(inputs.values()))
    model = keras.Model(inputs, [keras.layers.Dense(2)(joined), keras.layers.Dense(3, "softmax")(joined)])
    model.compile("sgd", ["mse", "sparse_categorical_crossentropy"])
    program, refused = planning.keras_program(model, batch_size=8)
    assert not refused
    assert sorted(tensor.shape for tensor in program.of_role("input")) == [(8,), (8, 2), (8, 3), (8, 4)]


def test_batch_statistics_and_own_steps_limit_the_search():
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8), keras.layers.BatchNormalization(), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    assert planning.keras_program(model, batch_size=8)[0].couples_batch

    class Own(keras.Sequential):
        def train_step(self, state, data):
            return super().train_step(state, data)

    own = Own([keras.Input((8,)), keras.layers.Dense(1)])
    own.compile("sgd", "mse")
    assert planning.keras_program(own, batch_size=8)[1] == {"microbatches", "recompute"}


def test_a_search_may_cut_batches_of_random_layers_and_masks():
    hidden = keras.layers.Embedding(9, 8, mask_zero=True), keras.layers.Dropout(0.2), keras.layers.LSTM(8, return_sequences=True)
    model = keras.Sequential([keras.Input((5,), dtype="int32"), *hidden, keras.layers.Dense(3)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    program, refused = planning.keras_program(model, batch_size=8)
    assert not program.couples_batch
    assert not refused
    assert any(plan.microbatches > 1 for plan in Candidates(program, Machine.load("h100x8")))


def test_models_that_cannot_be_planned():
    with pytest.raises(ModelError, match="not compiled"):
        parafit.find_plan(keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]), batch_size=4)
    with pytest.raises(ModelError, match="needs batch_size="):
        parafit.find_plan("gpt:125m", machine="h100x8")
    with pytest.raises(MachineError, match="Presets are"):
        parafit.find_plan("gpt:125m", batch_size=8, machine="nothing")
    free = keras.Sequential([keras.Input((None, 4)), keras.layers.LSTM(3)])
    free.compile("sgd", "mse")
    with pytest.raises(ModelError, match="reads rows of any length"):
        parafit.find_plan(free, batch_size=4)
    assert parafit.find_plan(free, (10, 4), batch_size=4, machine=Machine.load("h100x8").of(1)).device_count == 1
