"""Pipeline schedules: every one runs each task once in an order that ends, keeps what theory says, and idles as long as papers say."""

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parafit.errors import PlanError
from parafit.planner.schedules import SCHEDULES, knows_interleave, make_forward_grid, make_grid
from parafit.planner.schedules.bounds import kept, least_makespan
from parafit.planner.schedules.check import check_schedule
from parafit.planner.schedules.grid import FORWARD, WHOLE_BACKWARD, Grid, Task
from parafit.planner.schedules.simulate import simulate
from parafit.planner.schedules.times import TaskTimes

seconds = st.floats(0, 100, allow_subnormal=False)


def some_times(draw, stages):
    """Times of uneven stages."""
    each = st.lists(seconds, min_size=stages, max_size=stages).map(tuple)
    sends = st.lists(seconds, min_size=stages - 1, max_size=stages - 1).map(tuple)
    return TaskTimes(forward=draw(each), backward=draw(each), weights=draw(each), send=draw(sends), host=draw(st.sampled_from([0.0, 0.5])))


@st.composite
def grids(draw):
    """A grid of any schedule, or a forward one, with times of its stages."""
    name = draw(st.sampled_from([*SCHEDULES, "forward"]))
    devices, interleave, microbatches = draw(st.integers(1, 6)), 1, draw(st.integers(1, 13))
    if name == "forward" or knows_interleave(name):
        interleave = draw(st.integers(1, 3))
        microbatches = devices * draw(st.integers(1, 3))
    times = some_times(draw, devices * interleave)
    shape = {"devices": devices, "microbatches": microbatches, "interleave": interleave}
    return make_forward_grid(**shape) if name == "forward" else make_grid(name, **shape, times=times), times


PEAKS = {
    "forward": lambda p, m, v: [1] * p,
    "gpipe": lambda p, m, v: [m] * p,
    "1f1b": lambda p, m, v: [min(m, p - d) for d in range(p)],
    "zb-h1": lambda p, m, v: [min(m, p)] * p,
    "interleaved": lambda p, m, v: [min(m * v, (v - 1) * p + 2 * (p - 1 - d) + 1) for d in range(p)],
}
"""Results of stages that each device keeps at most, as the schedules' papers have it."""


@given(grids())
def test_every_schedule_runs_each_task_once_in_an_order_that_ends(case):
    grid, _ = case
    kept, interleave = check_schedule(grid), grid.stages // grid.devices
    if grid.schedule in PEAKS:
        assert list(kept) == PEAKS[grid.schedule](grid.devices, grid.microbatches, interleave)
    if grid.schedule == "list":
        most = PEAKS["interleaved" if interleave > 1 else "1f1b"](grid.devices, grid.microbatches, interleave)
        assert all(held <= limit for held, limit in zip(kept, most))


@given(grids())
def test_gradients_are_summed_in_the_order_of_the_microbatches(case):
    """So every schedule gives the same bits."""
    grid, _ = case
    for kind, stage in itertools.product(grid.kinds, range(grid.stages)):
        row = grid.tasks[grid.device_of[stage]]
        assert [task.microbatch for task in row if task[:2] == (kind, stage)] == list(range(grid.microbatches))


@given(grids(), st.booleans())
def test_tasks_start_after_what_they_need(case, one_process):
    grid, times = case
    timeline = simulate(grid, times, processes=[0] * grid.devices if one_process else None)
    spans = {
        task: (start, end)
        for row, starts, ends in zip(grid.tasks, timeline.start, timeline.end)
        for task, start, end in zip(row, starts, ends)
    }
    lasts = times.of(grid)
    for task, (start, end) in spans.items():
        assert end == start + lasts[task.kind][task.stage]
        source = grid.source(task)
        if source:
            apart = grid.device_of[source.stage] != grid.device_of[task.stage]
            assert start >= spans[source][1] + (times.send[min(source.stage, task.stage)] if apart else 0)
        before = {"B": "F", "W": "B"}.get(task.kind)
        assert not before or start >= spans[task._replace(kind=before)][1]
    for starts, ends in zip(timeline.start, timeline.end):
        assert all(end <= start for end, start in zip(ends, starts[1:]))
    assert timeline.makespan == max(end for _, end in spans.values())
    work = sum(end - start for start, end in spans.values())
    assert all(0 <= share <= 1 for share in timeline.idle_shares)
    assert timeline.makespan * (1 - timeline.idle_share) * grid.devices == pytest.approx(work)


@given(grids())
def test_one_process_dispatches_tasks_after_what_they_need(case):
    grid, times = case
    place = {task: index for index, task in enumerate(simulate(grid, times).dispatch_order())}
    assert len(place) == sum(map(len, grid.tasks))
    for task, index in place.items():
        assert grid.source(task) is None or place[grid.source(task)] < index
        assert task.kind == "F" or place[task._replace(kind={"B": "F", "W": "B"}[task.kind])] < index
    assert all(place[task] < place[after] for row in grid.tasks for task, after in itertools.pairwise(row))


@given(grids(), st.sampled_from(["forward", "backward", "weights", "send"]), st.data())
def test_longer_tasks_never_end_sooner(case, name, data):
    grid, times = case
    slower = dataclasses.replace(times, host=0.0, **{name: tuple(time + data.draw(seconds) for time in getattr(times, name))})
    assert simulate(grid, slower).makespan >= simulate(grid, dataclasses.replace(times, host=0.0)).makespan


@pytest.mark.parametrize(
    ("schedule", "interleave", "share"),
    [("gpipe", 1, 3 / 19), ("1f1b", 1, 3 / 19), ("interleaved", 2, 3 / 35), ("interleaved", 4, 3 / 67), ("zb-h1", 1, 3 / 51)],
)
def test_equal_stages_idle_as_formulas_say(schedule, interleave, share):
    """4 devices, 16 microbatches, F = B = W: 15.8 % of GPipe and 1F1B, 8.6 % interleaved, 5.9 % of ZB-H1."""
    grid = make_grid(schedule, devices=4, microbatches=16, interleave=interleave)
    timeline = simulate(grid, TaskTimes.equal(4 * interleave, forward=0.3, backward=0.3, weights=0.3))
    assert timeline.idle_shares == pytest.approx([share] * 4)
    assert timeline.idle_share == pytest.approx(share)


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 3), st.integers(1, 9), st.integers(0, 9))
def test_equal_stages_idle_as_formulas_say_for_all_sizes(devices, rounds, interleave, forward, backward):
    """As many microbatches as devices, or some times as many; whole-numbered times, so that sums are exact."""
    microbatches = devices * rounds
    ticks = forward + backward
    times = TaskTimes.equal(devices, forward=forward, backward=backward, weights=0)
    for name in ("gpipe", "1f1b"):
        assert simulate(make_grid(name, devices=devices, microbatches=microbatches), times).makespan == (microbatches + devices - 1) * ticks
    chunks = TaskTimes.equal(devices * interleave, forward=forward, backward=backward, weights=0)
    shape = {"devices": devices, "microbatches": microbatches, "interleave": interleave}
    assert simulate(make_grid("interleaved", **shape), chunks).makespan == (interleave * microbatches + devices - 1) * ticks
    assert simulate(make_forward_grid(**shape), chunks).makespan == (interleave * microbatches + devices - 1) * forward
    thirds = TaskTimes.equal(devices, forward=forward, backward=forward, weights=forward)
    zero = simulate(make_grid("zb-h1", devices=devices, microbatches=microbatches), thirds)
    assert zero.makespan == (3 * microbatches + devices - 1) * forward


# Stage times in milliseconds and bubble rates of four GPT networks on A100s, from "Zero Bubble Pipeline Parallelism" (Qi, Wan, Huang, Lin,
# ICLR 2024; arXiv 2401.10241): devices, microbatches, F, B, W, send, rate of 1F1B, rate of ZB-H1.
ZERO_BUBBLE = [
    (8, 24, 18.522, 18.086, 9.337, 0.601, 0.2431, 0.1585),
    (8, 32, 18.513, 18.086, 9.331, 0.626, 0.1985, 0.1242),
    (8, 64, 18.546, 18.097, 9.321, 0.762, 0.1240, 0.0674),
    (8, 24, 29.718, 29.444, 19.927, 0.527, 0.2347, 0.1323),
    (8, 32, 29.802, 29.428, 19.530, 0.577, 0.1898, 0.1045),
    (8, 64, 29.935, 29.621, 19.388, 0.535, 0.1091, 0.0554),
    (16, 48, 11.347, 11.248, 8.132, 0.377, 0.2552, 0.1397),
    (16, 64, 11.307, 11.254, 8.101, 0.379, 0.2082, 0.1088),
    (16, 128, 11.325, 11.308, 8.109, 0.378, 0.1251, 0.0576),
    (32, 96, 10.419, 10.207, 7.715, 0.408, 0.2646, 0.1421),
    (32, 128, 10.408, 10.204, 7.703, 0.408, 0.2168, 0.1106),
    (32, 256, 10.402, 10.248, 7.698, 0.460, 0.1352, 0.0594),
]


@pytest.mark.parametrize("row", ZERO_BUBBLE, ids=lambda row: f"{row[0]}x{row[1]}-{row[2]}")
def test_published_stage_times_give_published_bubbles(row):
    devices, microbatches, forward, backward, weights, send, *rates = row
    times = TaskTimes.equal(devices, forward=forward, backward=backward, weights=weights, send=send)
    for schedule, rate in zip(("1f1b", "zb-h1"), rates):
        timeline = simulate(make_grid(schedule, devices=devices, microbatches=microbatches), times)
        assert timeline.idle_share == pytest.approx(rate, abs=1e-4)


@settings(max_examples=50)
@given(st.data(), st.integers(1, 5), st.integers(1, 10))
def test_the_list_scheduler_is_never_slower_than_what_keeps_as_much(data, devices, microbatches):
    times = some_times(data.draw, devices)
    limits = data.draw(st.lists(st.integers(1, 12), min_size=devices, max_size=devices))
    found = make_grid("list", devices=devices, microbatches=microbatches, times=times, in_flight=limits)
    assert all(held <= limit for held, limit in zip(check_schedule(found), limits))
    for name in ("gpipe", "1f1b", "zb-h1"):
        other = make_grid(name, devices=devices, microbatches=microbatches)
        if all(held <= limit for held, limit in zip(other.in_flight, limits)):
            assert simulate(found, times).makespan <= simulate(other, times).makespan


@settings(max_examples=50)
@given(st.data(), st.integers(1, 4), st.integers(1, 8), st.integers(2, 3))
def test_the_list_scheduler_ends_with_the_least_memory(data, devices, microbatches, interleave):
    times = some_times(data.draw, devices * interleave)
    limits = data.draw(st.lists(st.integers(interleave, interleave + 2), min_size=devices, max_size=devices))
    grid = make_grid("list", devices=devices, microbatches=microbatches, interleave=interleave, times=times, in_flight=limits)
    assert all(held <= limit for held, limit in zip(check_schedule(grid), limits))


def test_the_list_scheduler_gains_on_uneven_stages():
    """A last stage three times as long, as a large vocabulary makes it."""
    times = TaskTimes(forward=(1, 1, 1, 3), backward=(1, 1, 1, 3), weights=(1, 1, 1, 3), send=(0, 0, 0))
    found = simulate(make_grid("list", devices=4, microbatches=16, times=times), times)
    assert found.makespan < simulate(make_grid("1f1b", devices=4, microbatches=16), times).makespan - 1


def test_the_list_scheduler_takes_any_seconds():
    """So long that a second more is no difference."""
    times = TaskTimes.equal(3, forward=1e18, backward=1e18, weights=1e18)
    assert check_schedule(make_grid("list", devices=3, microbatches=5, times=times)) == (3, 2, 1)


def test_host_time_is_waited_for():
    """No device computes before its process has started its task; one process for all starts one after the other."""
    grid = make_grid("1f1b", devices=4, microbatches=16)
    times = TaskTimes.equal(4, forward=1e-3, backward=1e-3, weights=1e-3, host=10e-3)
    assert simulate(grid, times).makespan == pytest.approx(32 * 10e-3, rel=0.05)
    assert simulate(grid, times, processes=[0] * 4).makespan == pytest.approx(128 * 10e-3, rel=0.05)
    quick = dataclasses.replace(times, host=1e-6)
    assert simulate(grid, quick, processes=[0] * 4).makespan == pytest.approx(57e-3, rel=0.01)


def test_what_one_device_sends_another_goes_one_after_the_other():
    grid = make_forward_grid(devices=2, microbatches=3)
    assert simulate(grid, TaskTimes.equal(2, forward=1, send=5)).start == ((0, 1, 2), (6, 11, 16))


def test_stages_of_one_device_send_nothing():
    times = TaskTimes.equal(3, forward=1, send=100)
    assert simulate(make_forward_grid(devices=1, microbatches=2, interleave=3), times).makespan == 6


def test_bytes_are_summed_by_stage():
    """ZB-H1 keeps p - s microbatches until B and s until W; what is kept for W may be less."""
    grid = make_grid("zb-h1", devices=4, microbatches=16)
    assert grid.peak((10,) * 4, (0,) * 4) == (40, 30, 20, 10)
    assert grid.peak((10,) * 4, (1,) * 4) == (40, 31, 22, 13)
    assert grid.peak((10, 20, 30, 40), (10, 20, 30, 40)) == (40, 80, 120, 160)
    assert make_grid("1f1b", devices=4, microbatches=16).peak((10, 20, 30, 40), (9, 9, 9, 9)) == (40, 60, 60, 40)


GOOD = make_grid("zb-h1", devices=2, microbatches=2)


def edited(device, change):
    """The good grid with one device's list changed."""
    rows = [list(row) for row in GOOD.tasks]
    change(rows[device])
    return dataclasses.replace(GOOD, tasks=tuple(map(tuple, rows)))


def swapped(one, other):
    def change(row):
        first, second = row.index(one), row.index(other)
        row[first], row[second] = row[second], row[first]

    return change


F, B, W = (lambda stage, microbatch, kind=kind: Task(kind, stage, microbatch) for kind in "FBW")


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (edited(0, lambda row: row.remove(W(0, 1))), "W of microbatch 1 on stage 0 never runs"),
        (edited(1, lambda row: row.append(F(1, 0))), "F of microbatch 0 on stage 1 runs 2 times"),
        (edited(0, lambda row: row.append(F(1, 0))), "device 0 runs F of microbatch 0 on stage 1, but that stage is on device 1"),
        (edited(0, lambda row: row.append(F(2, 0))), "device 0 runs F of microbatch 0 on stage 2, but there are 2 stages"),
        (edited(0, lambda row: row.append(F(0, -1))), "F of microbatch -1 on stage 0, but there are 2 stages, 2 microbatches"),
        (edited(0, lambda row: row.append(Task("X", 0, 0))), "X of microbatch 0 on stage 0, but .* kinds F, B, W"),
        (edited(0, swapped(W(0, 0), B(0, 0))), "device 0 waits with W of microbatch 0 on stage 0 for B of microbatch 0 on stage 0"),
        (edited(1, swapped(F(1, 0), B(1, 0))), "device 1 waits with B of microbatch 0 on stage 1 for F of microbatch 0 on stage 1"),
        (
            edited(0, lambda row: row.insert(0, row.pop(row.index(B(0, 0))))),
            "never ends: device 0 waits with B of microbatch 0 on stage 0 for B of .* stage 1; device 1 waits with F",
        ),
        (dataclasses.replace(GOOD, kinds=WHOLE_BACKWARD), "device 0 runs W of microbatch 0 on stage 0, but"),
        (dataclasses.replace(GOOD, kinds=FORWARD), "device 0 runs B of microbatch 0 on stage 0, but"),
        (dataclasses.replace(GOOD, device_of=(0, 2)), "device 1 runs F of microbatch 0 on stage 1, but that stage is on device 2"),
        (dataclasses.replace(GOOD, microbatches=3), "F of microbatch 2 on stage 0 never runs"),
        (dataclasses.replace(GOOD, tasks=((), ())), "F of microbatch 0 on stage 0 never runs"),
    ],
)
def test_faults_are_found(grid, message):
    assert check_schedule(GOOD)
    with pytest.raises(PlanError, match=f"schedule 'zb-h1'.*{message}"):
        check_schedule(grid)


def test_devices_that_wait_for_each_other_are_found():
    """Each task's own order is right; the two devices' lists do not go together."""
    rows = ((F(0, 0), F(0, 1), B(0, 1), B(0, 0)), (F(1, 0), B(1, 0), F(1, 1), B(1, 1)))
    assert check_schedule(Grid(schedule="last first", microbatches=2, kinds=WHOLE_BACKWARD, device_of=(0, 1), tasks=rows)) == (2, 1)
    rows = ((F(0, 0), B(0, 0), F(0, 1), B(0, 1)), (F(1, 0), F(1, 1), B(1, 0), B(1, 1)))
    grid = Grid(schedule="crossed", microbatches=2, kinds=WHOLE_BACKWARD, device_of=(0, 1), tasks=rows)
    for find in (check_schedule, lambda grid: simulate(grid, TaskTimes.equal(2))):
        with pytest.raises(
            PlanError, match=r"'crossed' never ends: device 0 waits with B of microbatch 0 .*; device 1 waits with F of micro"
        ):
            find(grid)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": "1f1bb"}, "schedule='1f1bb': choose one of 'gpipe', '1f1b', .* Did you mean '1f1b'?"),
        ({"schedule": "GPipe"}, "Did you mean 'gpipe'?"),
        ({"schedule": None}, "schedule=None: choose one of"),
        (
            {"schedule": "1f1b", "interleave": 2},
            "'1f1b' has one stage a device, .* Leave interleave out, or choose 'interleaved' or 'list'",
        ),
        ({"schedule": "zb-h1", "interleave": 3}, "'zb-h1' has one stage a device, so interleave=3"),
        ({"schedule": "interleaved", "interleave": 2, "microbatches": 10}, "4 devices, and microbatches=10 is no multiple. .* 8 and 12"),
        ({"schedule": "interleaved", "interleave": 2, "microbatches": 3}, "Nearest that is: 4."),
        ({"schedule": "gpipe", "devices": 0}, "devices=0: expected a whole number of at least 1"),
        ({"schedule": "gpipe", "microbatches": 0}, "microbatches=0: expected"),
        ({"schedule": "gpipe", "microbatches": 2.0}, "microbatches=2.0: expected"),
        ({"schedule": "gpipe", "devices": True}, "devices=True: expected"),
        ({"schedule": "interleaved", "interleave": 0}, "interleave=0: expected"),
        ({"schedule": "list", "in_flight": (1, 1, 1)}, "in_flight=.*: expected a number for each of the 4 devices, of at least 1"),
        ({"schedule": "list", "in_flight": (4, 4, 4, 1), "interleave": 2}, "of at least 2, so that a microbatch can pass"),
        ({"schedule": "list", "times": TaskTimes.equal(3)}, "times are of 3 stages, but schedule 'list' has 4"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(PlanError, match=message):
        make_grid(**{"devices": 4, "microbatches": 8} | arguments)


def test_a_forward_pipeline_needs_whole_numbers():
    with pytest.raises(PlanError, match="microbatches=-1: expected"):
        make_forward_grid(devices=4, microbatches=-1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backward": (1, 1)}, "backward has 2 times where forward has 3: expected as many"),
        ({"send": (0, 0, 0)}, "send has 3 times where forward has 3: expected one number fewer"),
        ({"weights": (1, 1, -1)}, "weights=-1: expected seconds"),
        ({"forward": (1, float("nan"), 1)}, "forward=nan: expected seconds"),
        ({"host": float("inf")}, "host=inf: expected seconds"),
    ],
)
def test_impossible_times_are_refused(changes, message):
    with pytest.raises(PlanError, match=message):
        dataclasses.replace(TaskTimes.equal(3), **changes)


def test_times_of_other_stages_are_refused():
    with pytest.raises(PlanError, match="times are of 8 stages, but schedule '1f1b' has 4"):
        simulate(make_grid("1f1b", devices=4, microbatches=8), TaskTimes.equal(8))


def test_every_device_has_a_process():
    with pytest.raises(PlanError, match=r"processes=\(0, 0\): expected one for each of the 4 devices"):
        simulate(make_grid("1f1b", devices=4, microbatches=8), TaskTimes.equal(4), processes=(0, 0))


SHAPES = [
    (name, devices, microbatches, interleave)
    for name in SCHEDULES
    for devices, microbatches, interleave in itertools.product((1, 2, 4, 7), (1, 4, 14, 28), (1, 2, 3))
    if (interleave == 1 or knows_interleave(name)) and (name != "interleaved" or microbatches % devices == 0)
]


@pytest.mark.parametrize(("name", "devices", "microbatches", "interleave"), SHAPES)
def test_what_a_schedule_takes_and_keeps_is_known_without_its_grid(name, devices, microbatches, interleave):
    """The closed forms: exact for equal stages that send nothing, but of a schedule that is invented, which is no slower than 1F1B."""
    times = TaskTimes.equal(devices * interleave, forward=1.0, backward=1.3, weights=0.9)
    grid = make_grid(name, devices=devices, microbatches=microbatches, interleave=interleave)
    least, found = least_makespan(name, times, devices=devices, microbatches=microbatches), simulate(grid, times).makespan
    most = kept(name, devices=devices, microbatches=microbatches, interleave=interleave)
    if name == "list":
        assert least <= found * (1 + 1e-9)
        assert all(held <= limit for held, limit in zip(grid.in_flight, most))
    else:
        assert found == pytest.approx(least, rel=1e-9)
        assert grid.in_flight == most


@given(grids())
def test_no_schedule_is_faster_than_its_closed_form(drawn):
    grid, times = drawn
    if grid.kinds != FORWARD:
        least = least_makespan(grid.schedule, times, devices=grid.devices, microbatches=grid.microbatches)
        assert least <= simulate(grid, times).makespan * (1 + 1e-9)
