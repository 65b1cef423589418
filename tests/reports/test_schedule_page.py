"""Timelines: on a page and as a trace."""

import json
import re
from pathlib import Path

import pytest

from parafit.errors import OutputError
from parafit.planner.machine.machine import Machine
from parafit.planner.networks import named
from parafit.planner.schedules import TaskTimes, make_grid
from parafit.planner.schedules.simulate import simulate
from parafit.planner.search.search import search
from parafit.reports import html
from parafit.reports.plan_page import plan_page
from parafit.reports.schedule_page import MOST_DRAWN, schedule_section
from parafit.reports.trace import trace, write_trace
from tests.reports.test_html import Checker

TIMES = TaskTimes.equal(8, forward=1e-3, backward=1e-3, weights=1e-3, send=1e-4)


def timeline(schedule="interleaved", times=TIMES, microbatches=8):
    stages = len(times.forward)
    grid = make_grid(schedule, devices=4, microbatches=microbatches, interleave=stages // 4)
    return simulate(grid, times)


def test_a_timeline_has_a_box_for_each_task_and_the_idle_share_of_each_device():
    drawn = timeline()
    section = schedule_section(drawn)
    figure, words, table = section.pieces
    page = Checker(html.page("A", "b", [section]))
    assert figure.count("<rect") == 2 + 2 * 8 * 8
    assert figure.count("<title>") == 2 * 8 * 8
    assert "B of microbatch 3 on stage 6: " in figure
    assert page.words.count("device 3") == 2, "beside the row, and in the table"
    assert {f"{share:.0%}".replace("%", " %") for share in drawn.idle_shares} <= set(page.words)
    assert "interleaved, 8 stages on 4 devices, 8 microbatches." in words
    assert f">{html.number(100 * drawn.idle_share)}<" in table


def test_what_was_predicted_stands_above_what_was_measured_on_one_scale():
    slow = simulate(timeline().grid, TaskTimes.equal(8, forward=2e-3, backward=2e-3, weights=2e-3))
    figure, _, table = schedule_section(timeline(), slow).pieces
    assert figure.index("predicted: ") < figure.index("measured: ")
    assert figure.count("<title>") == 2 * 2 * 8 * 8
    assert "idle predicted, %" in table
    assert "idle measured, %" in table
    ends = [float(left) + float(width) for left, width in re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', figure)]
    first, second = max(ends[2 : 2 + 128]), max(ends[2 + 128 :])
    assert second == pytest.approx(940, abs=0.1)
    assert (first - 90) / (second - 90) == pytest.approx(timeline().makespan / slow.makespan, rel=1e-3)


def test_gradients_of_weights_have_a_colour_of_their_own():
    figure = schedule_section(timeline("zb-h1", TaskTimes.equal(4))).pieces[0]
    assert len(set(re.findall(r'fill="(#(?!fff)\w+)"', figure))) == 3
    assert "gradients of weights" in figure


def test_of_a_long_timeline_the_first_tasks_are_drawn():
    figure, words, _ = schedule_section(timeline("1f1b", TaskTimes.equal(4), microbatches=1000)).pieces
    assert MOST_DRAWN / 2 < figure.count("<title>") <= MOST_DRAWN + 4
    assert "Drawn are the first " in words


def test_a_trace_has_one_track_a_device():
    drawn = timeline()
    content = json.loads(trace(drawn, drawn))
    events = [event for event in content["traceEvents"] if event["ph"] == "X"]
    assert len(events) == 2 * 2 * 8 * 8
    for process in (0, 1):
        tasks = {(event["tid"], event["name"], event["args"]["stage"]): event for event in events if event["pid"] == process}
        assert len(tasks) == 2 * 8 * 8
        for device, (row, starts, ends) in enumerate(zip(drawn.grid.tasks, drawn.start, drawn.end)):
            for task, start, end in zip(row, starts, ends):
                event = tasks[device, f"{task.kind}{task.microbatch}", task.stage]
                assert (event["ts"], event["ts"] + event["dur"]) == (pytest.approx(start * 1e6), pytest.approx(end * 1e6))
    names = {(event["pid"], event["name"], event["tid"]): event["args"] for event in content["traceEvents"] if event["ph"] == "M"}
    assert names[0, "thread_name", 3] == {"name": "device 3 (stages 3, 7)"}
    assert [names[process, "process_name", 0]["name"] for process in (0, 1)] == ["predicted: interleaved", "measured: interleaved"]


def test_a_trace_is_written_whole(tmp_path):
    write_trace(tmp_path / "trace.json", timeline())
    assert json.loads((tmp_path / "trace.json").read_text())["displayTimeUnit"] == "ms"
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]
    with pytest.raises(OutputError, match="cannot write"):
        write_trace(Path(tmp_path / "absent" / "trace.json"), timeline())


def test_the_page_of_a_pipeline_plan_shows_its_timeline():
    program = named("gpt:layers=4,hidden=256,heads=8,sequence=128,vocabulary=1024", batch=16)
    piped = plan_page(search(program, Machine.load("h100x8"), allow={"pipeline", "microbatches"}))
    assert piped.count("<svg") == 4
    assert "When each task runs" in piped
    Checker(piped)
    assert "When each task runs" not in plan_page(search(program, Machine.load("h100x8"), allow={"data"}))
