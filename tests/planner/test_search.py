"""The search: exact, deterministic, within memory, and able to say why."""

import dataclasses
import itertools
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parafit.errors import PlanError
from parafit.planner.cost.estimator import price
from parafit.planner.cost.framework import Software
from parafit.planner.layout import undivided
from parafit.planner.machine.machine import Machine
from parafit.planner.networks import named
from parafit.planner.plan import STORED, Plan
from parafit.planner.program import Operation, Program, Tensor
from parafit.planner.search.explain import explain
from parafit.planner.search.memo import Prices
from parafit.planner.search.ranking import GOALS, Choice, Ranking, value
from parafit.planner.search.search import search
from parafit.planner.search.space import SAME_NUMBERS, TECHNIQUES, Candidates, techniques

SMALL = "gpt:layers=4,hidden=256,heads=8,sequence=128,vocabulary=1024"
H100 = Machine.load("h100x8")

machines = st.builds(
    lambda hosts, inside, network: dataclasses.replace(Machine.load("a100x8", hosts=hosts, network=network), devices_per_host=inside),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from(["10Gb", "400Gb"]),
)
programs = st.builds(lambda batch, wide: named(SMALL, batch=batch, ffn=2048 if wide else 0), st.sampled_from([1, 6, 16]), st.booleans())
allowed = st.sets(st.sampled_from(sorted(SAME_NUMBERS)))


def best_by_hand(program, machine, goal, limit, allow):
    """The best of all candidates: no floors, nothing left out."""
    prices = Prices(program, machine)
    choices = [Choice(plan=plan, cost=prices.of(plan)) for plan in Candidates(program, machine, allow)]
    return min((value(one, goal) for one in choices if one.cost.peak_bytes <= limit), default=None)


@settings(deadline=None, max_examples=12)
@given(programs, machines, st.sampled_from(sorted(GOALS)), allowed, st.sampled_from([1.0, 0.5, 0.1]))
def test_the_best_is_the_least_of_all_candidates_that_fit(program, machine, goal, allow, share):
    ample = search(program, machine, goal=goal, allow=allow)
    assert value(ample.best, goal) == pytest.approx(best_by_hand(program, machine, goal, machine.device.memory_bytes, allow), rel=1e-12)
    free = ample.best.cost.peak_bytes - machine.device.context_bytes
    limit = machine.device.context_bytes + share * free
    expected = best_by_hand(program, machine, goal, limit, allow)
    if expected is not None:
        found = search(program, machine, goal=goal, allow=allow, max_bytes=limit)
        assert value(found.best, goal) == pytest.approx(expected, rel=1e-12)
        assert found.best.cost.peak_bytes <= limit


@settings(deadline=None, max_examples=8)
@given(programs, machines, allowed, st.randoms(use_true_random=False))
def test_the_order_of_candidates_changes_nothing(program, machine, allow, shuffler):
    class Shuffled(Candidates):
        def _mixed(self, plans):
            plans = list(plans)
            shuffler.shuffle(plans)
            return iter(plans)

        def meshes(self):
            return self._mixed(super().meshes())

        def schedules(self, mesh):
            return self._mixed(super().schedules(mesh))

        def stores(self, schedule):
            return self._mixed(super().stores(schedule))

    straight = search(program, machine, allow=allow)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("parafit.planner.search.search.Candidates", Shuffled)
        mixed = search(program, machine, allow=allow)
    assert mixed.best == straight.best
    fitting = [[one for one in ranking.others if "fit" not in one.reason] for ranking in (straight, mixed)]
    assert fitting[0] == fitting[1]


@settings(deadline=None, max_examples=25)
@given(programs, machines, st.data())
def test_prices_are_the_price_and_nothing_beats_a_floor(program, machine, data):
    prices = Prices(program, machine)
    plans = list(Candidates(program, machine, TECHNIQUES))
    for plan in data.draw(st.lists(st.sampled_from(plans), min_size=1, max_size=12)):
        cost = price(program, plan, machine)
        assert prices.of(plan) == cost
        assert prices.peak_bytes(plan) == cost.peak_bytes
        assert prices.least_seconds(plan) <= cost.seconds * (1 + 1e-9)
        assert prices.arithmetic_seconds(["bfloat16"]) / plan.device_count <= cost.seconds * (1 + 1e-9)
        assert prices.state_bytes / plan.device_count <= cost.peak_bytes
        assert sum(cost.times.values()) == pytest.approx(cost.seconds, rel=1e-12)


@settings(deadline=None, max_examples=15)
@given(st.data())
def test_prices_of_programs_that_are_cut_anywhere_are_the_price(data):
    program, machine = uncounted(), dataclasses.replace(Machine.load("a100x8", hosts=2), devices_per_host=3)
    prices = Prices(program, machine)
    plans = [plan for plan in Candidates(program, machine, TECHNIQUES) if "pipeline" in plan.axes]
    for plan in data.draw(st.lists(st.sampled_from(plans), min_size=1, max_size=6)):
        cost = price(program, plan, machine)
        assert prices.of(plan) == cost
        assert prices.peak_bytes(plan) == cost.peak_bytes
        least = prices.at_least(plan).seconds
        assert prices.even_seconds(plan) <= prices.least_seconds(plan) * (1 + 1e-9) <= least * (1 + 1e-8) <= cost.seconds * (1 + 1e-7)


def uncounted():
    """The small network as traces of models are: each block's operations and tensors written out."""
    program = named("gpt:layers=3,hidden=256,heads=8,sequence=128,vocabulary=1024", batch=12)
    operations, tensors = [], {}
    for phase in ("forward", "backward", "update"):
        some = [operation for operation in program.operations if operation.phase == phase]
        first = next(index for index, operation in enumerate(some) if operation.count > 1)
        last = max(index for index, operation in enumerate(some) if operation.count > 1)
        blocks = range(3) if phase == "forward" else range(2, -1, -1)
        numbered = [(operation, block) for block in blocks for operation in some[first : last + 1]]
        for operation, block in [*((one, 0) for one in some[:first]), *numbered, *((one, 0) for one in some[last + 1 :])]:
            names = {
                name: f"{name}@{block}" if program.tensors[name].count > 1 else name for name in (*operation.inputs, *operation.outputs)
            }
            tensors |= {new: dataclasses.replace(program.tensors[old], name=new, count=1) for old, new in names.items()}
            inputs, outputs = (tuple(names[name] for name in each) for each in (operation.inputs, operation.outputs))
            operations.append(dataclasses.replace(operation, inputs=inputs, outputs=outputs, count=1))
    return dataclasses.replace(program, operations=tuple(operations), tensors=tensors)


def test_prices_know_programs_whose_devices_wait_for_each_other():
    """A sum over rows that is no gradient (a loss's mean, statistics of the batch) is exchanged along the data axis."""
    tensors = [
        Tensor(name="x", shape=(64, 32), dims=("batch", "f"), role="input"),
        Tensor(name="w", shape=(32, 16), dims=("f", "h"), role="parameter"),
        Tensor(name="y", shape=(64, 16), dims=("batch", "h")),
        Tensor(name="mean", shape=(16,), dims=("h",)),
    ]
    dot = Operation(name="dot", kind="matmul", phase="forward", inputs=("x", "w"), outputs=("y",), flops=65536, shape=(1, 64, 32, 16))
    mean = Operation(name="mean", kind="reduction", phase="forward", inputs=("y",), outputs=("mean",), contracted=("batch",), bytes=4160)
    program = Program(
        name="means",
        operations=(dataclasses.replace(dot, contracted=("f",)), mean),
        tensors={tensor.name: tensor for tensor in tensors},
        sizes={"batch": 64, "f": 32, "h": 16},
    )
    prices = Prices(program, H100)
    for data, microbatches in itertools.product((2, 4, 8), (1, 2, 4)):
        plan = Plan(axes={"data": data}, compute={"batch": "data"}, microbatches=microbatches)
        assert prices.of(plan) == price(program, plan, H100)


def test_candidates_keep_their_constraints():
    machine = Machine.load("a100x8", hosts=2)
    program = named(SMALL, batch=24)
    plans = list(Candidates(program, machine))
    assert len(plans) == len(set(plans)) > 500
    for plan in plans:
        assert plan.device_count <= machine.device_count
        assert 24 % plan.axes.get("data", 1) or not undivided(24, plan)
        assert plan.axes.get("tensor", 1) in (1, 2, 4, 8, 16)
        assert plan.axes.get("pipeline", 1) * plan.interleave <= 4
        assert techniques(plan) <= SAME_NUMBERS
    for name in ("data", "tensor", "pipeline", "sequence", "zero", "store_group", "microbatches", "recompute"):
        without = list(Candidates(program, machine, SAME_NUMBERS - {name}))
        assert 0 < len(without) < len(plans)
        assert not any(name in techniques(plan) for plan in without)


def test_rows_that_depend_on_each_other_are_not_cut():
    program = dataclasses.replace(named(SMALL, batch=16), couples_batch="batch statistics in 'norm'")
    assert all(plan.microbatches == 1 for plan in Candidates(program, H100))


def test_lower_precision_only_where_it_is_allowed():
    program = named(SMALL, batch=16, itemsize=4)
    assert search(program, H100).plan.precision == "float32"
    assert search(program, H100, allow=TECHNIQUES).plan.precision == "bfloat16"
    assert search(named(SMALL, batch=16), H100).plan.precision == "bfloat16"


def test_a_device_without_bfloat16_is_priced_at_float16():
    ranking = search(named(SMALL, batch=16), Machine.load("v100x8"))
    assert ranking.software == Software(precision="float16")


def test_one_device_may_be_fastest():
    slow = dataclasses.replace(H100.inner, alpha_seconds=1.0, start_seconds=1.0)
    ranking = search(named(SMALL, batch=16), dataclasses.replace(H100, inner=slow))
    assert ranking.plan.device_count == 1
    assert "single" in str(ranking) or "one device" in str(ranking)


def test_the_tensor_axis_leaves_a_host_where_nothing_else_fits():
    lone = dataclasses.replace(Machine.load("a100x8", hosts=8), devices_per_host=1)
    program = named("gpt:1.3b", batch=8)
    allow = {"data", "tensor"}
    least = search(program, lone, allow={"data"}, goal="memory").best.cost.peak_bytes
    assert search(program, lone, allow=allow, max_bytes=0.9 * least).plan.axes["tensor"] > 1


shapes = st.builds(
    lambda layers, heads, batch, ffn: named(f"gpt:layers={layers},hidden={32 * heads},heads={heads},vocabulary=1024", batch=batch, ffn=ffn),
    st.sampled_from([3, 4, 6]),
    st.sampled_from([4, 6, 7]),
    st.sampled_from([1, 7, 12, 13, 16]),
    st.sampled_from([0, 1000]),
)


@settings(deadline=None, max_examples=6)
@given(
    shapes, st.integers(1, 5), st.integers(1, 4), st.sampled_from([1, 2, 3, 4]), st.sampled_from([1.0, 2.0]), st.sampled_from([1.0, 0.3])
)
def test_more_hosts_links_or_memory_never_make_the_best_plan_slower(program, hosts, more, inside, quicker, tight):
    machine = dataclasses.replace(Machine.load("a100x8", hosts=hosts, network="100Gb"), devices_per_host=inside)
    device = machine.device
    limit = device.context_bytes + tight * (search(program, machine).best.cost.peak_bytes - device.context_bytes)
    links = {name: getattr(machine, name) for name in ("inner", "network")}
    faster = {
        name: dataclasses.replace(link, bytes_per_second=link.bytes_per_second * quicker, measured=(), measured_parts=())
        for name, link in links.items()
    }
    plain = {name: dataclasses.replace(link, measured=(), measured_parts=()) for name, link in links.items()}
    try:
        least = search(program, dataclasses.replace(machine, **plain), max_bytes=limit).best.cost.seconds
    except PlanError:
        return
    assert search(program, dataclasses.replace(machine, **plain, hosts=hosts + more), max_bytes=limit).best.cost.seconds <= least
    assert search(program, dataclasses.replace(machine, **faster), max_bytes=limit).best.cost.seconds <= least
    assert search(program, dataclasses.replace(machine, **plain), max_bytes=1.5 * limit).best.cost.seconds <= least


def test_a_prime_number_of_hosts_is_no_worse_than_fewer():
    program = named("gpt:7.5b", batch=96)
    fewer, more = (search(program, Machine.load("a100x8", hosts=hosts), allow={"data", "zero", "tensor", "recompute"}) for hosts in (4, 5))
    assert more.best.cost.seconds <= fewer.best.cost.seconds


def test_a_batch_that_nothing_divides_finds_a_plan_and_is_said():
    found = {batch: search(named("gpt:7.5b", batch=batch), Machine.load("a100x8")) for batch in (126, 127, 128)}
    assert found[127].best.cost.seconds < 1.3 * found[128].best.cost.seconds
    whole = search(named("gpt:125m", batch=127), H100, allow={"data", "microbatches"})
    assert "does not divide a batch of 127 rows" in str(whole)
    assert "128 rows would be" in str(whole)
    seven = search(named("gpt:125m", batch=7), H100, allow={"data"})
    assert seven.plan.axes == {"data": 7}
    assert "1 of 8 devices stay idle: a batch of 7 rows has none for 8 devices" in str(seven)


def test_layers_and_heads_that_do_not_divide_are_cut_all_the_same_and_said():
    program = named("gpt:layers=126,hidden=1024,heads=16,vocabulary=1024", batch=2048)
    machine = Machine.load("a100x8", hosts=2)
    plans = [plan for plan in Candidates(program, machine, {"pipeline", "microbatches", "interleave"}) if plan.axes == {"pipeline": 16}]
    assert {plan.interleave for plan in plans} == {1, 2, 4}
    text = str(search(program, machine, allow={"pipeline", "microbatches", "interleave"}))
    assert "do not divide 126 blocks" in text
    odd = search(named("gpt:layers=2,hidden=1600,heads=25,vocabulary=1024", batch=1), H100.of(2), allow={"tensor"})
    assert "tensor=2 leaves heads (25) whole" in str(odd)


def test_pipelines_are_searched_in_every_order():
    program = named(SMALL, batch=16)
    plans = {plan.schedule for plan in Candidates(program, H100, {"pipeline", "microbatches"})}
    assert plans == {"1f1b", "gpipe", "zb-h1", "list"}
    more = list(Candidates(program, H100, {"pipeline", "microbatches", "interleave"}))
    assert {plan.schedule for plan in more} == {*plans, "interleaved"}
    assert all((plan.schedule == "interleaved") == (plan.interleave > 1) for plan in more)
    best = search(program, H100, allow={"pipeline", "microbatches"})
    assert best.plan.schedule in ("zb-h1", "list"), "the gradients of weights fill gaps"
    assert f"schedule={best.plan.schedule}" in best.plan.short()
    assert f"({best.plan.schedule}), each device " in str(best)
    timeline = best.best.cost.timeline
    assert timeline.grid.devices == best.plan.axes["pipeline"]


def test_what_is_only_priced_is_marked_and_the_best_that_runs_is_named():
    program, machine = named("gpt:39b", batch=1536), Machine.load("a100x8", hosts=8)
    runs = frozenset({"data", "tensor", "zero", "microbatches", "recompute"})
    ranking = search(program, machine, runs=runs)
    assert techniques(ranking.plan) - runs
    assert ranking.runnable.plan == search(program, machine, allow=runs).plan
    text = str(ranking)
    assert f"runs    this version only prices {', '.join(sorted(techniques(ranking.plan) - runs))}. The best plan that it runs is " in text
    for other in ranking.others:
        line = next(line for line in text.splitlines() if other.reason in line)
        assert line.endswith("; only priced") == bool(techniques(other.plan) - runs)
    everything = search(program, machine, runs=frozenset(TECHNIQUES))
    assert everything.runnable is None
    assert "only price" not in str(everything)
    assert everything.plan == ranking.plan
    small = search(named("gpt:39b", batch=64), Machine.load("a100x8", hosts=8), runs=frozenset({"data"}))
    assert "No plan that it runs fits." in str(small)


def test_goals_differ():
    program, machine = named("gpt:1.3b", batch=64), Machine.load("a100x8", hosts=2)
    found = {goal: search(program, machine, goal=goal).best for goal in GOALS}
    assert found["time"].cost.seconds < found["cost"].cost.seconds
    assert found["memory"].cost.peak_bytes < found["time"].cost.peak_bytes
    assert found["cost"].plan.device_count < found["time"].plan.device_count


def test_runners_up_say_why_they_lost():
    ranking = search(named("gpt:39b", batch=256), Machine.load("a100x8", hosts=8), allow={"data", "tensor", "zero", "microbatches"})
    reasons = [other.reason for other in ranking.others]
    assert any("slower: " in reason and " +" in reason for reason in reasons)
    assert any("does not fit: " in reason and "too much" in reason for reason in reasons)
    assert any(reason.startswith("not allowed: ") for reason in reasons)
    assert len({tuple(other.plan.axes.items()) for other in ranking.others if "slower" in other.reason}) == 3
    text = str(ranking)
    assert text == str(ranking.plan)
    assert text.startswith(f"plan    {ranking.plan.short()} (")
    assert all(reason in text for reason in reasons)


def test_a_found_plan_is_a_plan():
    ranking = search(named(SMALL, batch=16), H100)
    plan = ranking.plan
    assert isinstance(ranking, Ranking)
    assert plan.ranking is ranking
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert hash(again) == hash(plan)
    assert again.ranking is None


def test_planning_is_quick():
    """A hundredth of the half minute that is promised for a trillion parameters, times what a busy machine needs."""
    started = time.process_time()
    ranking = search(named("gpt:1t", batch=3072), Machine.load("a100x8", hosts=512))
    assert time.process_time() - started < 10
    assert ranking.plan.device_count == 4096


def test_what_no_plan_satisfies_names_the_smallest():
    program, machine = named("gpt:145b", batch=8), Machine.load("a100x8")
    with pytest.raises(
        PlanError, match=r"no plan of 'gpt:145b' with a batch of 8 fits into 79\.\d GiB a device on 8 devices of 'a100x8'.*slots "
    ) as error:
        search(program, machine)
    smallest = str(error.value).split("The smallest is '")[1].split("'")[0]
    least = min(price(program, plan, machine).peak_bytes for plan in Candidates(program, machine) if plan.device_count == 8)
    assert f"{smallest}', which needs {least / 2**30:,.1f} GiB" in str(error.value)
    with pytest.raises(PlanError, match=r"or allow data, "):
        search(program, machine, allow={"tensor"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"goal": "speed"}, "goal='speed': choose one of time, memory, cost"),
        ({"max_bytes": 0}, "max_bytes=0: expected a number of bytes above 0"),
        ({"allow": {"data", "model"}}, "allow names 'model', which parafit does not know: choose from data, tensor,"),
        ({"max_bytes": 2**20}, "no plan of .* fits into 1.0 MiB a device"),
    ],
)
def test_bad_questions(options, message):
    with pytest.raises(PlanError, match=message):
        search(named(SMALL, batch=16), H100, **options)


def test_explain_goes_term_by_term():
    plan = search(named("gpt:1.3b", batch=64), H100).plan
    text = explain(plan, instead="data=2,tensor=4,zero=1,precision=bfloat16")
    lines = text.splitlines()
    assert f"{plan.short()} is faster: " in lines[-1]
    assert "It saves " in lines[-1]
    assert next(line for line in lines if line.startswith("  ")).split()[:1] != []
    other = dataclasses.replace(plan)  # a plan that was not found by a search, with its dims named
    cost = price(plan.ranking.program, other, H100)
    assert f"{cost.seconds * 1e3:.3g} ms" in next(line for line in lines if line.startswith("step"))
    steps = [line for line in lines[: lines.index(next(line for line in lines if line.startswith("step")))] if line.startswith("  ")]
    assert len(steps) > 5


def test_explain_knows_what_does_not_fit():
    program, machine = named("gpt:7.5b", batch=64), H100
    plan = search(program, machine).plan
    text = explain(plan, "data=8,precision=bfloat16")
    assert "fits, data=8,precision=bfloat16 does not: it needs " in text
    assert " more of " in text
    both = explain(Plan.parse("data=8"), "data=4", program=program, machine=machine)
    assert both.splitlines()[-1].startswith("neither fits into 79.6 GiB a device")
    same = explain(plan, plan)
    assert same.splitlines()[-1].endswith("take as long as each other.")


def test_explain_says_what_it_needs():
    program = named(SMALL, batch=16)
    with pytest.raises(PlanError, match="was not found by a search: say for which program= and machine="):
        explain(Plan.parse("data=8"), "data=4")
    with pytest.raises(PlanError, match="wants 16 devices, but 'h100x8' has 8"):
        explain(Plan.parse("data=8"), "data=16", program=program, machine=H100)
    with pytest.raises(PlanError, match="no such dim"):
        explain(Plan.parse("data=8"), Plan(axes={"tensor": 2}, compute={"width": "tensor"}), program=program, machine=H100)


def test_every_stage_of_storage_is_tried():
    plans = list(Candidates(named(SMALL, batch=16), Machine.load("h100x8", hosts=2), {"data", "zero", "store_group"}))
    widest = [plan for plan in plans if plan.axes == {"data": 16}]
    assert sorted((plan.zero_stage, plan.store_group) for plan in widest) == [(0, 0), (1, 0), (1, 8), (2, 0), (2, 8), (3, 0), (3, 8)]
    assert all(set(plan.store) <= set(STORED) for plan in plans)


def test_random_plans_of_a_large_network_are_priced_alike():
    program, machine = named("gpt:39b", batch=1536), Machine.load("a100x8", hosts=8)
    prices = Prices(program, machine)
    plans = list(Candidates(program, machine, TECHNIQUES))
    for plan in random.Random(0).sample(plans, 30):
        assert prices.of(plan) == price(program, plan, machine)
