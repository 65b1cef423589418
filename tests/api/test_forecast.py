"""What is known before a run: the plan that "auto" chooses, and the price."""

import dataclasses

import keras
import numpy as np
import pytest

import parafit
from parafit import planning
from parafit.calibration import history
from parafit.errors import PlanError, ProgramError
from parafit.execution.events import Planned, listening
from parafit.planner.machine.machine import Machine
from parafit.planner.machine.matmul import Matmul
from parafit.planner.plan import Plan
from parafit.techniques import program


def network(width):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((20,)), keras.layers.Dense(width, "relu"), keras.layers.Dense(4)])
    model.compile("sgd", "mse")
    return model


def data(rows):
    random = np.random.default_rng(0)
    return random.normal(size=(rows, 20)).astype("float32"), random.normal(size=(rows, 4)).astype("float32")


@pytest.fixture
def eight_devices(monkeypatch):
    """As many devices as are simulated here, but each a processor of its own, so that several are worth it."""
    machine = Machine.load("h100x8")
    slow = dataclasses.replace(machine.device, peak_flops={"float32": 1e9}, memory_bytes_per_second=1e9, matmul=Matmul())
    monkeypatch.setattr(planning, "this_machine", lambda: dataclasses.replace(machine, device=slow))


@pytest.fixture
def plans():
    """The plans that ran."""
    seen = []
    with listening(lambda event: seen.append(event.plan) if isinstance(event, Planned) else None):
        yield seen


def test_auto_spreads_what_is_worth_it(eight_devices, plans, capsys):
    x, y = data(512)
    expected = parafit.fit(network(256), x, y, batch_size=256, epochs=2, verbose=0, plan="single").history["loss"]
    history = parafit.fit(network(256), x, y, batch_size=256, epochs=2, verbose=2).history["loss"]
    np.testing.assert_allclose(history, expected, rtol=1e-6)
    assert [Plan.parse(plan).device_count for plan in plans] == [1, 8]
    printed = capsys.readouterr().out
    assert "instead of it" in printed  # the runners-up
    assert f"parafit: plan {plans[1]}, a trial took " in printed
    assert "not in the plan" not in printed


def test_auto_leaves_pipelines_to_those_who_ask(monkeypatch, eight_devices):
    allowed, search = [], planning.search

    def searched(*arguments, allow, **options):
        allowed.append(allow)
        return search(*arguments, allow=allow, **options)

    monkeypatch.setattr(planning, "search", searched)
    parafit.fit(network(256), *data(512), batch_size=256, verbose=0)
    (allow,) = allowed
    assert "data" in allow
    assert not {"pipeline", "interleave"} & allow


def test_auto_changes_no_numbers(monkeypatch, plans):
    """Not even where products of bfloat16 are a thousand times as fast."""
    machine = Machine.load("h100x8")
    device = dataclasses.replace(
        machine.device, peak_flops={"float32": 1e9, "bfloat16": 1e12}, memory_bytes_per_second=1e9, matmul=Matmul()
    )
    monkeypatch.setattr(planning, "this_machine", lambda: dataclasses.replace(machine, device=device))
    parafit.fit(network(256), *data(512), batch_size=256, verbose=0)
    assert Plan.parse(plans[0]).device_count == 8
    assert Plan.parse(plans[0]).precision == "float32"


def test_auto_spreads_evaluation_and_prediction(eight_devices, plans):
    x, y = data(512)
    model = network(256)
    alone = parafit.evaluate(model, x, y, batch_size=256, verbose=0, plan="single")
    assert parafit.evaluate(model, x, y, batch_size=256, verbose=0) == pytest.approx(alone, rel=1e-5)
    np.testing.assert_allclose(parafit.predict(model, x, batch_size=256, verbose=0), model.predict(x, verbose=0), rtol=1e-4, atol=1e-5)
    assert [Plan.parse(plan).device_count for plan in plans] == [1, 8, 8]


def test_auto_stays_on_one_device_where_others_gain_little(monkeypatch, plans):
    monkeypatch.setattr(planning, "this_machine", lambda: Machine.load("h100x8"))
    x, y = data(64)
    parafit.fit(network(8), x, y, verbose=0)
    assert plans == ["single"]


def test_auto_saves_memory_where_one_device_has_too_little(monkeypatch, plans):
    machine = Machine.load("h100x8").of(1)

    def with_memory(mebibytes):
        device = dataclasses.replace(machine.device, memory_bytes=mebibytes * 2**20, context_bytes=0)
        monkeypatch.setattr(planning, "this_machine", lambda: dataclasses.replace(machine, device=device))

    x, y = data(4096)
    with_memory(3)
    parafit.fit(network(256), x, y, batch_size=4096, verbose=0)
    assert "microbatches=" in plans[-1]
    with_memory(0.01)
    with pytest.raises(PlanError, match=r"no plan of .* The smallest is .* plan='single' runs it"):
        parafit.fit(network(256), x, y, batch_size=4096, verbose=0)


def test_a_step_that_cannot_be_planned_runs_on_one_device(monkeypatch, eight_devices, plans, capsys):
    def fails(*arguments):
        raise ProgramError("no such operation")

    monkeypatch.setattr(program, "step_program", fails)
    parafit.fit(network(256), *data(512), batch_size=256, verbose=2)
    assert plans == ["single"]
    assert "one device, for no plan could be made: no such operation" in capsys.readouterr().out


def test_a_second_fit_traces_nothing(monkeypatch):
    traced = []
    step_program = program.step_program
    monkeypatch.setattr(program, "step_program", lambda *arguments: traced.append(1) or step_program(*arguments))
    model, (x, y) = network(8), data(64)
    for _ in range(3):
        parafit.fit(model, x, y, verbose=2)
    assert len(traced) == 1
    parafit.fit(model, x, y, batch_size=16, verbose=2)
    assert len(traced) == 2


def test_a_calibrated_machine_predicts_and_learns_from_what_it_said(calibrated, capsys):
    calibrated()
    model, (x, y) = network(8), data(64)
    parafit.fit(model, x, y, verbose=2)
    (first,) = history.load()
    assert "predicted " in capsys.readouterr().out
    slow = dataclasses.replace(first, measured_seconds=1000 * first.predicted_seconds)
    for _ in range(history.RECENT):
        history.append(slow)
    parafit.fit(model, x, y, verbose=2)
    assert f"predicted {1e6 * first.predicted_seconds:.3f} ms/step" in capsys.readouterr().out
    assert history.load()[-1].predicted_seconds == first.predicted_seconds
