"""The Plan noun: what it refuses, and that it survives JSON, pickling and hashing."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parafit.errors import PlanError
from parafit.planner.plan import PRECISIONS, RECOMPUTE, Plan


@given(
    st.integers(2, 10**6),
    st.integers(2, 64),
    st.integers(0, 3),
    st.integers(1, 64),
    st.sampled_from(RECOMPUTE),
    st.sampled_from(PRECISIONS),
)
def test_round_trips(data, tensor, zero, microbatches, recompute, precision):
    plan = Plan.parse(f"data={data},tensor={tensor},zero={zero},microbatches={microbatches},recompute={recompute},precision={precision}")
    assert plan.device_count == data * tensor
    assert plan.zero_stage == zero
    for copy in (Plan.from_json(plan.to_json()), pickle.loads(pickle.dumps(plan)), Plan.parse(plan.short())):
        assert copy == plan
        assert hash(copy) == hash(plan)


def test_is_frozen():
    plan = Plan.parse("data=2")
    with pytest.raises(AttributeError):
        plan.axes = {}
    with pytest.raises(TypeError):
        plan.axes["data"] = 4


def test_single_prints():
    assert str(Plan()).startswith("plan    single (one device)")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"axes": {"data": 2}}, "axis 'data' splits nothing: no dim is mapped to it"),
        ({"compute": {"batch": "data"}}, "'batch' is mapped to axis 'data', but the plan's axes are none"),
        ({"axes": {"data": 2.0}, "compute": {"batch": "data"}}, "a whole number of at least 2"),
        ({"axes": {"row": 2}, "compute": {"layer": "row"}}, "unknown axis 'row'"),
        ({"axes": {"dta": 2}}, "runs the axes 'data', 'pipeline', 'tensor'. Did you mean 'data'"),
        ({"recompute": "block"}, "choose one of 'blocks', 'none'. Did you mean 'blocks'"),
        ({"axes": {"data": 2}, "store": {"parameter": "data"}}, "gradients are split only where slots are"),
        ({"axes": {"data": 2}, "store": {"weights": "data"}}, "store maps 'weights'"),
        ({"microbatches": 0}, "microbatches=0: expected a whole number of at least 1"),
        ({"recompute": "some"}, "recompute='some': choose one of 'blocks', 'none'"),
        (
            {"axes": {"data": 8}, "compute": {"batch": "data"}, "store": {"slot": "data"}, "store_group": 3},
            "store_group=3 does not divide axis data=8",
        ),
        ({"precision": "int8"}, "choose one of 'bfloat16', 'float32'"),
    ],
)
def test_refuses(fields, message):
    with pytest.raises(PlanError, match=message):
        Plan(**fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "not a plan's JSON"),
        ("[1]", "not a parafit plan of format 1"),
        ('{"format": 2}', "not a parafit plan of format 1"),
        ('{"format": 1, "colour": "red"}', "fields parafit does not know: 'colour'"),
    ],
)
def test_refuses_json(text, message):
    with pytest.raises(PlanError, match=message):
        Plan.from_json(text)


def test_refuses_a_file_that_is_not_text(tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="cannot read a plan"):
        Plan.load(path)
