"""Prices: parts add up, shares and collectives follow from the layouts, memory follows from liveness."""

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parafit.errors import ModelError, PlanError
from parafit.planner.cost.estimator import Estimator, price
from parafit.planner.cost.framework import Software
from parafit.planner.cost.stages import cut_program, places_to_cut
from parafit.planner.layout import pieces, undivided
from parafit.planner.machine.machine import Machine
from parafit.planner.networks import named
from parafit.planner.networks.transformer import Transformer, transformer_program
from parafit.planner.partition import Partition
from parafit.planner.plan import STORED, Plan
from parafit.planner.program import Operation, Program, Tensor
from parafit.planner.schedules import make_grid
from parafit.planner.schedules.times import TaskTimes
from parafit.planner.search.memo import Prices

WIDTHS = {"heads": "tensor", "ffn": "tensor", "vocabulary": "tensor"}
SMALL = Transformer(layers=8, hidden=1024, heads=16, sequence=512, vocabulary=32000, batch=64, gradient_itemsize=4)
PROGRAM = transformer_program(SMALL)


def plan(*, data=1, tensor=1, pipeline=1, zero=0, sequence=False, **more):
    axes = {axis: size for axis, size in (("pipeline", pipeline), ("data", data), ("tensor", tensor)) if size > 1}
    compute = {"batch": "data", **WIDTHS, "blocks": "pipeline"} | ({"sequence": "tensor"} if sequence else {})
    store = dict.fromkeys(STORED[:zero], "data")
    return Plan(axes=axes, compute={dim: axis for dim, axis in compute.items() if axis in axes}, store=store, precision="bfloat16", **more)


def cost(chosen, program=PROGRAM, machine="a100x8", **software):
    return price(program, chosen, Machine.load(machine).of(chosen.device_count), software=Software(**software))


PLANS = st.builds(
    plan,
    data=st.sampled_from([2, 4, 8]),
    tensor=st.sampled_from([1, 2, 4]),
    pipeline=st.sampled_from([1, 2, 4]),
    zero=st.sampled_from([0, 1, 2, 3]),
    sequence=st.booleans(),
    microbatches=st.sampled_from([1, 2, 4, 8]),
    recompute=st.sampled_from(["none", "blocks"]),
    schedule=st.sampled_from(["gpipe", "1f1b", "zb-h1", "list"]),
).filter(lambda chosen: chosen.device_count > 1)


@given(PLANS)
def test_parts_sum_to_the_whole_and_none_is_negative(chosen):
    found = cost(chosen)
    assert found.seconds == pytest.approx(sum(found.times.values()), rel=1e-12)
    assert found.peak_bytes == pytest.approx(sum(found.memory.values()), abs=1)
    assert all(value >= 0 for value in (*found.times.values(), *found.memory.values()))
    assert all(name.split()[0] in str(found) for name, value in found.times.items() if value)


def test_what_a_loop_exchanges_is_counted_in_every_turn():
    turned = dataclasses.replace(PROGRAM, operations=tuple(dataclasses.replace(operation, steps=3) for operation in PROGRAM.operations))
    chosen, once, often = plan(tensor=4), cost(plan(tensor=4)), cost(plan(tensor=4), turned)
    assert once.times["all-reduce tensor"] > 0
    assert often.times["all-reduce tensor"] == pytest.approx(3 * once.times["all-reduce tensor"])
    loops = [dataclasses.replace(operation, kind="loop") for operation in PROGRAM.operations]
    assert not any(Partition(PROGRAM, chosen).of(loop).exchanges for loop in loops)


@given(PLANS)
def test_a_slower_machine_takes_no_less_time(chosen):
    fast = Machine.load("a100x8").of(chosen.device_count)
    device = dataclasses.replace(fast.device, memory_bytes_per_second=fast.device.memory_bytes_per_second / 2)
    slow = dataclasses.replace(fast, device=device, inner=dataclasses.replace(fast.inner, bytes_per_second=fast.inner.bytes_per_second / 2))
    assert price(PROGRAM, chosen, slow).seconds >= price(PROGRAM, chosen, fast).seconds


@given(PLANS, st.integers(2, 4))
def test_a_larger_batch_takes_no_less_time_or_memory(chosen, times):
    larger = transformer_program(dataclasses.replace(SMALL, batch=SMALL.batch * times))
    before, after = cost(chosen), cost(chosen, larger)
    assert after.seconds >= before.seconds
    assert after.peak_bytes >= before.peak_bytes


def exchanges(chosen, phase="forward"):
    partition = Partition(PROGRAM, chosen)
    blocks = [operation for operation in PROGRAM.operations if operation.phase == phase and operation.count > 1]
    return [exchange.kind for operation in blocks for exchange in partition.of(operation).exchanges if exchange.axis == "tensor"]


def test_tensor_parallel_blocks_need_the_collectives_of_megatron():
    assert exchanges(plan(tensor=4)) == ["all-reduce"] * 2
    assert exchanges(plan(tensor=4, sequence=True)) == ["all-gather", "reduce-scatter"] * 2


def test_tensor_parallel_products_are_whole_over_all_devices():
    for operation in (operation for operation in PROGRAM.operations if operation.kind == "matmul"):
        share = Partition(PROGRAM, plan(tensor=4, data=2, microbatches=4)).of(operation)
        assert share.flops * 4 * 2 * 4 == pytest.approx(operation.flops)


def test_activations_are_those_of_korthikanti():
    """34 sbh + 5 as²b bytes a layer with dropout and stored scores (arXiv 2205.05198, equation 1)."""
    shape = Transformer(layers=12, hidden=1024, heads=16, sequence=512, vocabulary=64, batch=4, fused=False, dropout=True)
    found = cost(Plan(precision="bfloat16"), transformer_program(shape))
    formula = shape.layers * shape.sequence * shape.batch * shape.hidden * (34 + 5 * shape.heads * shape.sequence / shape.hidden)
    assert found.memory["activations"] == pytest.approx(formula, rel=0.03)


def test_recomputation_keeps_what_passes_between_blocks():
    kept, again = cost(Plan(precision="bfloat16")), cost(Plan(precision="bfloat16", recompute="blocks"))
    passed = SMALL.layers * SMALL.batch * SMALL.sequence * SMALL.hidden * 2
    assert passed <= again.memory["activations"] < 0.2 * kept.memory["activations"] + 3e9
    forward = sum(value for name, value in kept.times.items() if name.startswith("forward"))
    assert 0.5 * forward < again.seconds - kept.seconds < forward


def test_recomputation_leaves_out_what_backward_does_not_read():
    chosen = Plan(precision="bfloat16", recompute="blocks")
    assert cost(chosen).seconds < cost(chosen, recomputes_all=True).seconds


def test_zero_stages_split_what_they_say():
    parts = [cost(plan(data=8, zero=zero)).memory for zero in range(4)]
    for stage, name in ((1, "slots"), (2, "gradients"), (3, "parameters")):
        assert parts[stage][name] == pytest.approx(parts[stage - 1][name] / 8, rel=0.01)


def test_pipelines_idle_for_their_depth_over_microbatches():
    """(p - 1) / m of the busy time for equal stages, divided by the chunks of an interleaved schedule (Narayanan et al. 2021)."""
    deep = named("gpt:layers=32,hidden=1024,heads=16,vocabulary=256", batch=64)
    found = cost(plan(pipeline=4, microbatches=16), deep)
    busy = sum(value for name, value in found.times.items() if name.startswith(("forward", "backward")))
    assert found.times["bubble"] == pytest.approx(busy * 3 / 16, rel=0.15)
    twice = cost(plan(pipeline=4, microbatches=16, schedule="interleaved", interleave=2), deep)
    assert twice.times["bubble"] == pytest.approx(found.times["bubble"] / 2, rel=0.2)


def chain(layers, *, counted, width=512, rows=4096, tied=False):
    """Products alone, so that F, B and W take the same: as one block that is counted, or as a chain of operations."""
    shape, dims = (rows, width), ("batch", "wide")

    def tensor(name, role, count):
        square = role in ("parameter", "gradient", "slot")
        size, names = ((width, width), ("in", "out")) if square else (shape, dims)
        return Tensor(name=name, shape=size, dims=names, role=role, count=count)

    def product(name, phase, inputs, output, count):
        return Operation(
            name=name, kind="matmul", phase=phase, inputs=inputs, outputs=(output,), flops=2.0 * rows * width * width, count=count
        )

    numbers, count = (range(1), layers) if counted else (range(layers), 1)
    weights = {number: 0 if tied and number == layers - 1 else number for number in numbers}
    forward = [product(f"l{k}", "forward", (f"a{k}", f"w{weights[k]}"), f"a{k + 1}", count) for k in numbers]
    backward, update = [], []
    for k in reversed(numbers):
        backward.append(product(f"l{k}", "backward", (f"d{k + 1}", f"w{weights[k]}"), f"d{k}", count))
        backward.append(product(f"l{k}", "backward", (f"d{k + 1}", f"a{k}"), f"g{k}", count))
        inputs = (f"w{weights[k]}", f"g{k}", f"s{k}")
        update.append(Operation(name=f"l{k}", kind="elementwise", phase="update", inputs=inputs, outputs=(f"w{weights[k]}",), count=count))
    roles = {"a": "activation", "d": "activation", "w": "parameter", "g": "gradient", "s": "slot"}
    operations = (*forward, *backward, *update)
    names = dict.fromkeys(name for operation in operations for name in (*operation.inputs, *operation.outputs))
    tensors = {name: tensor(name, roles[name[0]], count) for name in names}
    return Program(name="chain", operations=operations, tensors=tensors, sizes={"batch": rows, "wide": width, "in": width, "out": width})


QUIET = Machine.load("a100x8").of(4)
QUIET = dataclasses.replace(
    QUIET,
    device=dataclasses.replace(QUIET.device, dispatch_seconds=0.0),
    inner=dataclasses.replace(QUIET.inner, bytes_per_second=1e30, alpha_seconds=0.0, start_seconds=0.0, measured=(), measured_parts=()),
)
"""A machine on which sending and starting take nothing."""


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize(
    ("schedule", "idle"), [("gpipe", 3 / 19), ("1f1b", 3 / 19), ("interleaved", 3 / 35), ("zb-h1", 3 / 51), ("list", None)]
)
def test_equal_stages_idle_as_papers_say(schedule, idle, counted):
    """4 stages, 16 microbatches: 15.8 % (1F1B), 8.6 % with two stages a device, 5.9 % (ZB-H1), by the grid that runs."""
    chosen = plan(pipeline=4, microbatches=16, schedule=schedule, interleave=2 if schedule == "interleaved" else 1)
    program = chain(16, counted=counted)
    found = price(program, chosen, QUIET)
    timeline = found.timeline
    assert timeline.grid == make_grid(schedule, devices=4, microbatches=16, interleave=chosen.interleave, times=TaskTimes.equal(4))
    if idle:
        assert timeline.idle_share == pytest.approx(idle, rel=1e-9)
        assert timeline.idle_shares == pytest.approx([idle] * 4, rel=1e-9)
        assert Prices(program, QUIET).at_least(chosen).seconds == pytest.approx(found.seconds, rel=1e-9), "the closed form"
    assert found.times["bubble"] == pytest.approx(timeline.idle_share * timeline.makespan, rel=1e-9)
    assert found.seconds == pytest.approx(timeline.makespan + found.times["update"] + found.times["dispatch"], rel=1e-9)
    assert sum(found.times.values()) == pytest.approx(found.seconds, rel=1e-12)


@pytest.mark.parametrize("counted", [True, False])
def test_memory_in_flight_is_what_the_schedule_keeps(counted):
    """1F1B keeps p microbatches on the first stage, GPipe all; the last one, with as many layers, keeps one."""
    kept = {
        schedule: price(chain(16, counted=counted), plan(pipeline=4, microbatches=16, schedule=schedule), QUIET).memory["activations"]
        for schedule in ("1f1b", "gpipe", "zb-h1")
    }
    assert kept["gpipe"] == pytest.approx(4 * kept["1f1b"])
    assert kept["zb-h1"] == kept["1f1b"]


@pytest.mark.parametrize(("layers", "stages"), [(7, 2), (7, 3), (10, 4), (5, 5)])
def test_a_program_is_cut_whether_its_stages_divide_it_or_not(layers, stages):
    found = price(chain(layers, counted=False), plan(pipeline=stages, microbatches=8), dataclasses.replace(QUIET, devices_per_host=8))
    busy = found.timeline.busy
    one = max(busy) / -(-layers // stages)
    assert sum(busy) == pytest.approx(layers * one, rel=0.01)
    assert min(busy) > 0.9 * one


def test_a_tied_weight_is_kept_by_each_stage_that_uses_it():
    parts, _ = cut_program(chain(4, counted=False, tied=True), 2, lambda operation: operation.flops, lambda tensor: tensor.bytes)
    kept = [sorted(tensor.name for tensor in part.of_role("parameter")) for part in parts]
    assert kept == [["w0", "w1"], ["w0", "w2"]]
    assert [sum(operation.phase == "backward" for operation in part.operations) for part in parts] == [4, 4]


def test_what_passes_between_stages_is_what_later_ones_read():
    """A skip over a stage passes through it."""
    program = chain(4, counted=False)
    skip = dataclasses.replace(program.operations[3], inputs=("a3", "w3", "a1"))
    program = dataclasses.replace(program, operations=(*program.operations[:3], skip, *program.operations[4:]))
    _, passed = cut_program(program, 4, lambda operation: operation.flops, lambda tensor: 1.0)
    assert passed == (1.0, 2.0, 2.0)


def test_loops_are_not_cut():
    program = chain(6, counted=False)
    looping = [
        dataclasses.replace(operation, name="lstm", steps=3) if operation.name in ("l1", "l2", "l3") else operation
        for operation in program.operations
    ]
    looped = dataclasses.replace(program, operations=tuple(looping))
    assert (places_to_cut(program), places_to_cut(looped)) == (6, 4)
    with pytest.raises(PlanError, match=r"a pipeline of 5 stages needs 4 places to cut, and the network has 3\. Choose at most 4 stages"):
        price(looped, plan(pipeline=5, microbatches=5), Machine.load("a100x8"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pipeline": 4, "interleave": 2}, "schedule '1f1b' has one stage a device, so interleave=2 is not for it"),
        ({"pipeline": 4, "interleave": 2, "schedule": "interleaved", "microbatches": 6}, "microbatches=6 is no multiple"),
    ],
)
def test_pipelines_that_cannot_be(changes, message):
    with pytest.raises(PlanError, match=message):
        price(chain(8, counted=True), plan(**{"microbatches": 8} | changes), Machine.load("a100x8", hosts=2))


def test_starting_tasks_and_sending_take_time_apart():
    chosen, program = plan(pipeline=4, microbatches=16), chain(16, counted=True)
    slow = dataclasses.replace(QUIET, device=dataclasses.replace(QUIET.device, dispatch_seconds=1e-3))
    started, quiet = price(program, chosen, slow), price(program, chosen, QUIET)
    assert started.times["dispatch"] > 4 * 32 * 1e-3 - quiet.seconds, "one process starts all tasks of four devices, one after the other"
    assert started.times["bubble"] == quiet.times["bubble"]
    far = dataclasses.replace(QUIET, inner=dataclasses.replace(QUIET.inner, bytes_per_second=1e9, processor_share=0.0))
    beside, waits = (price(program, chosen, far, software=Software(overlap_sends=each)) for each in (True, False))
    assert 0 < beside.times["send pipeline"] < waits.times["send pipeline"]
    assert beside.times["bubble"] == quiet.times["bubble"]


def test_stages_hand_over_inside_their_host_where_they_share_one():
    deep = named("gpt:layers=32,hidden=1024,heads=16,vocabulary=256", batch=64)
    machine = Machine.load("a100x8", hosts=4)

    def hops(chosen):
        return [sum(hop) for hop in Estimator(deep, chosen, machine, Software()).hops]

    spread, twice = hops(plan(pipeline=16, data=2)), hops(plan(pipeline=16, data=2, schedule="interleaved", interleave=2))
    across = [index for index, seconds in enumerate(spread) if seconds > min(spread)]
    assert across == [3, 7, 11], "four stages a host"
    assert twice == [*spread, max(spread), *spread], "from the last device chunks go round to the first, over the network"
    assert set(hops(plan(pipeline=4, data=8, microbatches=1))) == {hops(plan(pipeline=16, data=2, microbatches=4))[3]}, "a stage a host"


def test_gradients_hide_behind_backward_only_where_the_software_does_so():
    chosen = plan(data=8)
    hidden, shown = cost(chosen), cost(chosen, overlap_gradients=False)
    assert hidden.times["gradients data"] < 0.5 * shown.times["gradients data"]


def test_gradients_are_reduced_at_each_microbatch_unless_they_are_summed_first():
    def reduced(chosen, **software):
        return cost(chosen, overlap_gradients=False, **software).times["gradients data"]

    once, often = plan(data=8), plan(data=8, microbatches=4)
    assert reduced(often) == pytest.approx(4 * reduced(once)), "what runs, as the contract counts it"
    assert reduced(often, sums_microbatches=True) == reduced(once)
    staged = plan(data=8, pipeline=2, microbatches=4)
    assert reduced(staged) == reduced(staged, sums_microbatches=True), "a pipeline sums them in its stages"
    stored = plan(data=8, zero=2, microbatches=4)
    assert reduced(stored) == reduced(stored, sums_microbatches=True), "whole gradients are stored nowhere"


def test_a_slow_host_sets_the_pace_of_small_networks():
    chosen = plan(data=2, microbatches=32)
    assert cost(chosen, launch_seconds=1e-3).seconds > 2 * cost(chosen).seconds


def test_a_slow_host_pays_for_each_collective():
    chosen = plan(data=2, tensor=4, sequence=True, microbatches=8)
    slow = cost(chosen, collective_seconds=1e-3).times["launch"] - cost(chosen).times["launch"]
    assert slow > 0.5e-3 * 10 * SMALL.layers * 8, "a block gathers and scatters ten times a microbatch"
    assert cost(plan(data=8), collective_seconds=1e-3).seconds == cost(plan(data=8)).seconds


def test_collectives_hide_beside_the_product_that_does_not_wait_for_them():
    chosen = plan(data=2, tensor=4, sequence=True)
    exposed = {
        how: sum(value for name, value in cost(chosen, overlap_tensor=how).times.items() if name.endswith("tensor"))
        for how in ("", "independent", "all")
    }
    assert exposed["all"] < exposed["independent"] < exposed[""]
    assert exposed["independent"] > 0.6 * exposed[""], "forward collectives and gathered gradients stay"


def test_parameters_are_gathered_in_buckets():
    chosen = plan(data=8, zero=1)
    layer_by_layer, at_once = cost(chosen).times["parameters data"], cost(chosen, bucket_bytes=1e12).times["parameters data"]
    assert at_once < layer_by_layer
    assert cost(chosen, bucket_bytes=1e6).times["parameters data"] > layer_by_layer


def test_a_heavy_softmax_moves_blocks_to_the_first_of_two_stages():
    """A softmax as heavy as half of the blocks: the first stage takes more than its half of them, and holds more."""
    heavy = named("gpt:layers=16,hidden=1024,heads=16,vocabulary=50000", batch=64)
    chosen = plan(pipeline=2, microbatches=64)
    balanced, equal = cost(chosen, heavy), cost(chosen, heavy, equal_stages=True)
    assert balanced.seconds < 0.95 * equal.seconds
    whole = sum(
        value for name, value in cost(plan(data=1, microbatches=64), heavy).times.items() if name.startswith(("forward", "backward"))
    )
    busiest = sum(value for name, value in balanced.times.items() if name.startswith(("forward", "backward")))
    assert busiest < 0.58 * whole
    assert balanced.memory["slots"] > equal.memory["slots"]


def test_gradients_that_wait_to_be_added_take_memory_only():
    spare = transformer_program(dataclasses.replace(SMALL, spare_itemsize=2))
    for zero, parts in ((0, 1), (1, 1), (2, 8)):
        chosen = plan(data=8, zero=zero)
        more = cost(chosen, spare).memory["gradients"] - cost(chosen).memory["gradients"]
        assert more == pytest.approx(PROGRAM.bytes_of("parameter") / parts, rel=0.01)
        assert cost(chosen, spare).seconds == cost(chosen).seconds


def test_a_dim_the_program_lacks():
    with pytest.raises(PlanError, match=r"maps dim 'inner'.*has the dims batch, sequence"):
        cost(Plan.parse("tensor=4"))


@pytest.mark.parametrize("name", ["rnn:small", "gpt:huge", "gpt:layers=2", "gpt:layers=2,hidden=64,heads=4,wings=2"])
def test_networks_that_do_not_exist(name):
    with pytest.raises(ModelError, match="gpt"):
        named(name)


def test_named_networks_have_the_parameters_they_are_called_after():
    for name, billions in (("gpt:1.3b", 1.3), ("gpt:175b", 175), ("gpt:1t", 1008), ("llama:8b", 8.0), ("llama:70b", 70.6)):
        assert named(name).bytes_of("parameter") / 2e9 == pytest.approx(billions, rel=0.05)


def test_a_batch_that_its_axis_does_not_divide_is_computed_whole_on_every_device():
    odd, even = (transformer_program(dataclasses.replace(SMALL, batch=batch)) for batch in (63, 64))
    whole, alone = cost(plan(data=8), odd), cost(Plan(precision="bfloat16"), odd)
    assert {name: seconds for name, seconds in whole.times.items() if seconds} == {
        name: seconds for name, seconds in alone.times.items() if seconds
    }, "as on one device: nothing is shared out, nothing reduced"
    assert whole.memory["activations"] == alone.memory["activations"]
    assert whole.seconds > 5 * cost(plan(data=8), even).seconds
    assert Partition(odd, plan(data=8)).of(odd.operations[0]).flops == odd.operations[0].flops


def test_a_last_microbatch_that_is_not_divided_takes_its_rows_whole():
    program = transformer_program(dataclasses.replace(SMALL, batch=127))
    chosen = plan(data=8, microbatches=16)
    found = cost(chosen, program)
    partition = Partition(program, chosen)
    assert (partition.turns, partition.rounds, partition.fullest.piece.rows) == (16, 15 + 7, 7)
    divided = transformer_program(dataclasses.replace(SMALL, batch=120))
    matmul = cost(plan(data=8, microbatches=15), divided).times["forward matmul"]
    assert found.times["forward matmul"] == pytest.approx(matmul * 22 / 15)
    seven = cost(Plan(precision="bfloat16"), transformer_program(dataclasses.replace(SMALL, batch=7)))
    assert found.memory["activations"] == pytest.approx(seven.memory["activations"])
    assert Prices(program, Machine.load("a100x8")).of(chosen) == found


@given(st.integers(1, 200), st.integers(2, 16), st.integers(1, 40))
def test_pieces_hold_every_row_once(rows, data, microbatches):
    cut = pieces(rows, Plan.parse(f"data={data},microbatches={microbatches}"))
    assert sum(piece.count * piece.rows for piece in cut) == rows
    assert all(piece.devices == (data if piece.rows % data == 0 else 1) for piece in cut)
    assert sum(piece.count for piece in cut) <= microbatches
    text = undivided(rows, Plan.parse(f"data={data},microbatches={microbatches}"))
    assert bool(text) == any(piece.devices == 1 for piece in cut)
    for size in map(int, re.findall(r"\d+(?= or \d+ rows)|\d+(?= rows would)", text)):
        assert abs(size - rows) <= data * microbatches
        assert not undivided(size, Plan.parse(f"data={data},microbatches={microbatches}"))
