"""What a run tells, and to whom."""

import json
import logging

import jax
import keras
import numpy as np
import pytest

import parafit
from parafit.errors import NonFiniteLossError, OutputError
from parafit.execution.events import Breach, Console, Ended, EpochEnded, GroupEnded, Planned, emit, listening


def network():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    return model


X, Y = np.ones((24, 3), "float32"), np.ones((24, 2), "float32")


def heard(**options):
    events = []
    with listening(events.append):
        parafit.fit(network(), X, Y, batch_size=8, **options)
    return events


def test_a_run_tells_what_it_does_in_order():
    kinds = [event.kind for event in heard(epochs=2, verbose=2)]
    assert kinds[0] == "planned"
    assert kinds.index("compiling") < kinds.index("compiled") < kinds.index("priced") < kinds.index("group") < kinds.index("epoch")
    assert kinds[-2:] == ["ended", "score"]
    assert kinds.count("epoch") == 2


def test_a_silent_run_tells_listeners_all_the_same():
    events = heard(epochs=2, verbose=0)
    groups = [event for event in events if isinstance(event, GroupEnded)]
    assert sum(group.last - group.first + 1 for group in groups) == 6
    assert all(group.seconds > 0 for group in groups)
    epochs = [event for event in events if isinstance(event, EpochEnded)]
    assert [event.epoch for event in epochs] == [0, 1]
    assert set(epochs[0].logs) == {"loss"}
    assert [event.plan for event in events if isinstance(event, Planned)] == ["single"]
    assert [(event.steps, event.error) for event in events if isinstance(event, Ended)] == [(6, "")]


def test_a_run_that_fails_says_how_it_ended():
    events = []
    with listening(events.append), pytest.raises(NonFiniteLossError):
        parafit.fit(network(), X * np.nan, Y, batch_size=8, verbose=0)
    assert events[-1].kind == "ended"
    assert events[-1].error.startswith("NonFiniteLossError: the loss became nan")


def test_a_log_has_a_line_of_json_for_each_event(tmp_path):
    path = tmp_path / "run.jsonl"
    for _ in range(2):
        parafit.fit(network(), X, Y, batch_size=8, epochs=2, verbose=0, log=path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    runs = [line for line in lines if line["event"] == "planned"]
    assert len(runs) == 2, "a second run adds to the file"
    assert runs[0]["plan"] == "single"
    assert [line["logs"]["loss"] for line in lines if line["event"] == "epoch"][:2] == pytest.approx(
        network().fit(X, Y, batch_size=8, epochs=2, verbose=0, shuffle=False).history["loss"], rel=1e-5
    )
    assert all(line["time"] for line in lines)


def test_a_log_that_cannot_be_written_is_refused_before_the_run(tmp_path):
    model = network()
    with pytest.raises(OutputError, match=r"log='.*none.run.jsonl' cannot be written: No such file or directory"):
        parafit.fit(model, X, Y, batch_size=8, verbose=0, log=tmp_path / "none" / "run.jsonl")
    assert not model.built or not model.optimizer.iterations.numpy()


def test_logging_hears_of_a_run_and_warns_of_breaches(caplog):
    with caplog.at_level(logging.INFO, logger="parafit"):
        heard(verbose=0)
        emit(Breach(text="all-reduce over data"))
    assert any(record.message.startswith("planned plan=single") for record in caplog.records)
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        "parafit: not in the plan: all-reduce over data"
    ]


def test_only_the_first_process_speaks(monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    Console()(Breach(text="all-reduce over data"))
    heard(verbose=2)
    assert "parafit" not in capsys.readouterr().out


def test_a_listener_hears_no_more_when_it_left():
    events = []
    with pytest.raises(RuntimeError), listening(events.append):
        raise RuntimeError
    emit(Breach(text="late"))
    assert not events
