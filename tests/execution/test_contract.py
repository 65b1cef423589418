"""The contract: what a compiled program communicates is what its plan says, and a program that does otherwise is found out."""

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import layers

import parafit
from parafit import planning
from parafit.adapters.keras import KerasModel
from parafit.errors import ProgramError
from parafit.execution import contract
from parafit.execution.contract import check, compare_memory
from parafit.execution.hlo import Collective, read
from parafit.execution.runner import Runner
from parafit.planner.layout import Layout, lay_out
from parafit.planner.plan import Plan
from parafit.planner.program import Tensor
from parafit.planning import place
from parafit.techniques.program import step_program
from tests.models import programs

MESH = {"data": 2, "tensor": 4}


def program(line, rest=""):
    return f"{rest}\nENTRY %main.1 (x: f32[8]) -> f32[8] {{\n  {line}\n}}\n"


GROUPS = {
    "replica_groups={{0,1,2,3},{4,5,6,7}}": "tensor",
    "replica_groups={{0,4},{1,5},{2,6},{3,7}}": "data",
    "replica_groups=[2,4]<=[8]": "tensor",
    "replica_groups=[4,2]<=[2,4]T(1,0)": "data",
    "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}": "tensor",
    "replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}": "tensor",
    "replica_groups=mesh['axis_0'=1,'axis_1'=8] {'axis_1'}": "data+tensor",
    "replica_groups={}": "data+tensor",
    "replica_groups={{0,5},{1,4},{2,6},{3,7}}": "an unknown group",
}


@pytest.mark.parametrize("groups", GROUPS)
def test_reads_which_axis_a_collective_runs_along(groups):
    (found,) = read(program(f"%r = f32[8]{{0}} all-reduce(%x), channel_id=1, {groups}, to_apply=%add"), MESH)
    assert (found.axis, found.bytes) == (GROUPS[groups], 32)


FORMS = {
    "%r = (f32[2,3]{1,0}, /*index=1*/bf16[4]{0}, pred[]) all-reduce(%a, %b, %c), replica_groups=[1,8]<=[8]": ("all-reduce", 33),
    "%r = f32[8]{0} all-gather(%x), replica_groups=[1,8]<=[8], dimensions={0}": ("all-gather", 32),
    "%r = (f32[1]{0}, f32[8]{0}) all-gather-start(%x), replica_groups=[1,8]<=[8], dimensions={0}": ("all-gather", 32),
    "%r = f64[2]{0} reduce-scatter(%x), replica_groups=[1,8]<=[8], dimensions={0}": ("reduce-scatter", 128),
    "%r = s32[8]{0} all-to-all(%x), replica_groups=[1,8]<=[8], dimensions={0}": ("all-to-all", 32),
    "%r = (u8[5]{0}, u8[5]{0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}": ("collective-permute", 5),
}


@pytest.mark.parametrize("line", FORMS)
def test_reads_every_kind_of_collective(line):
    (found,) = read(program(line), MESH)
    assert (found.kind, found.bytes) == FORMS[line]


def test_the_axes_of_a_permutation_are_those_along_which_its_pairs_differ():
    for pairs, axis in (("{{0,1},{1,0}}", "tensor"), ("{{0,4},{4,0}}", "data"), ("{{0,5}}", "data+tensor")):
        assert read(program(f"%r = f32[] collective-permute(%x), source_target_pairs={pairs}"), MESH)[0].axis == axis


@given(st.integers(1, 50), st.integers(1, 50))
def test_collectives_in_loops_count_as_often_as_they_run(outer, inner):
    loop = '  %w = f32[] while(%a), condition=%c, body=%{}, backend_config={{"known_trip_count":{{"n":"{}"}}}}'
    bodies = {
        "inner": "  %r = f32[4]{0} all-reduce(%a), replica_groups=[1,8]<=[8], to_apply=%add",
        "outer": loop.format("inner", inner),
        "steps": loop.format("outer", outer),
    }
    rest = "\n".join(f"%{name} (a: f32[]) -> f32[] {{\n{line}\n}}" for name, line in bodies.items())
    (found,) = read(program("%w = f32[] while(%x), condition=%c, body=%steps", rest), MESH)
    assert found.count == outer * inner


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("HloModule nothing", "no ENTRY in its text"),
        (program("%r = f32[8]{0} all-reduce(%x), replica_groups=everyone"), "cannot read which devices a collective joins"),
        (program("%r = f32[8]{0} all-reduce(%x), replica_groups=mesh['a'=8] {'a':(2)4}"), "over a part of a mesh axis"),
    ],
)
def test_says_what_it_cannot_read(text, message):
    with pytest.raises(ProgramError, match=message):
        read(text, MESH)


def reduced(size, **fields):
    return Collective(**({"kind": "all-reduce", "axis": "data", "bytes": size, "source": "dense/dot"} | fields))


def test_one_percent_is_forgiven_and_no_more():
    assert not check([reduced(101_000)], [reduced(100_000)]).broken
    assert check([reduced(101_100)], [reduced(100_000)]).broken
    assert check([reduced(98_000)], [reduced(100_000)]).broken


def test_an_unplanned_collective_is_named():
    (row,) = check([reduced(4096, axis="tensor")], []).broken
    assert str(row) == "all-reduce over tensor: planned 0 bytes a step, found 4096 (NOT PLANNED: dense/dot)"


def test_differences_that_have_a_reason_are_explained():
    scattered = check([reduced(4096)], [reduced(4096, kind="reduce-scatter")])
    assert not scattered.broken
    assert "summed whole and sliced" in str(scattered)
    again = [reduced(4096), reduced(4096, again=True)]
    assert not check([reduced(8192)], again).broken
    assert not check([reduced(4096)], again).broken
    assert check([reduced(9000)], again).broken


def test_holding_more_than_planned_breaks_the_contract_and_less_does_not():
    assert compare_memory(planned_bytes=10_000, found_bytes=9_000).reason
    held = compare_memory(planned_bytes=10_000, found_bytes=20_000)
    assert not held.agrees
    assert not held.reason


# What Keras models compile to ------------------------------------------------------------------------------------------------------------


def mlp():
    return _compiled([keras.Input((32,)), layers.Dense(64, "relu"), layers.Dense(48, "relu"), layers.Dense(64, "relu"), layers.Dense(10)])


def convolutional():
    return _compiled(
        [keras.Input((8, 8, 2)), layers.Conv2D(8, 3), layers.BatchNormalization(), layers.GlobalAveragePooling2D(), layers.Dense(10)]
    )


def transformer():
    inputs = keras.Input((8, 16))
    hidden = layers.Add()([inputs, layers.MultiHeadAttention(4, 4)(inputs, inputs)])
    hidden = layers.LayerNormalization()(hidden)
    hidden = layers.Add()([hidden, layers.Dense(16)(layers.Dense(64, "gelu")(hidden))])
    return _compiled(keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling1D()(hidden))))


def recurrent():
    return _compiled([keras.Input((6, 4)), layers.GRU(8), layers.Dense(16), layers.Dense(10)])


def report(make, plan, rows=32):
    """The contract's report on a compiled training step of one batch."""
    model = make()
    x, y = np.ones((1, rows, *model.input_shape[1:]), "float32"), np.ones((1, rows, 10), "float32")
    adapter = KerasModel(model, "fit")
    adapter.build(lambda: (x[0], y[0]))
    step = adapter.train_step()
    program = step_program(step, (x[0], y[0]), model.name)
    placement = place(Plan.parse(plan), step, lambda: program)
    return Runner(adapter, step, placement).check((x, y), program)


KEPT = [
    ("mlp", "data=8"),
    ("mlp", "tensor=8"),
    ("mlp", "data=2,tensor=4,zero=1"),
    ("mlp", "data=4,zero=3"),
    ("mlp", "data=2,microbatches=4"),
    ("mlp", "data=2,tensor=2,recompute=blocks"),
    ("convolutional", "data=4,tensor=2"),
    ("transformer", "data=2,tensor=4"),
    ("transformer", "data=4,tensor=2,zero=2"),
    ("recurrent", "data=4,tensor=2"),
]


@pytest.mark.parametrize(("name", "plan"), KEPT)
def test_what_runs_is_what_the_plan_says(name, plan):
    found = report(globals()[name], plan)
    assert not found.broken, str(found)
    assert any(row.planned_bytes for row in found.rows)


def test_gradients_are_reduced_in_one_collective():
    model = mlp()
    x, y = np.ones((64, 32), "float32"), np.ones((64, 10), "float32")
    parafit.fit(model, x, y, batch_size=32, plan="data=4,tensor=2", verbose=0)
    (program,) = programs(model)
    along_data = [each for each in read(program.text, {"data": 4, "tensor": 2}) if each.axis == "data"]
    assert len(along_data) == 1


WRONG = {
    "no split": lambda tensors, plan: lay_out(tensors, Plan(axes={"data": 4}, compute={"batch": "data"}, store=plan.store)),
    "columns only": lambda tensors, plan: Layout(
        compute={each.name: (None,) * (len(each.shape) - 1) + ("tensor",) for each in tensors if _splits(each)}
    ),
    "whole state": lambda tensors, plan: Layout(compute=lay_out(tensors, plan).compute),
}


def _splits(tensor: Tensor) -> bool:
    return tensor.role == "parameter" and tensor.shape[-1] % 2 == 0


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_layout_is_found_out(monkeypatch, wrong):
    monkeypatch.setattr(planning, "lay_out", lambda tensors, plan: WRONG[wrong](list(tensors), plan))
    assert report(mlp, "data=4,tensor=2,zero=1").broken


def test_the_user_is_told(monkeypatch, capsys):
    model = mlp()
    x, y = np.ones((32, 32), "float32"), np.ones((32, 10), "float32")
    parafit.fit(model, x, y, plan="data=4,tensor=2", verbose=2)
    assert "not in the plan" not in capsys.readouterr().out
    keras.backend.clear_session(free_memory=False)
    monkeypatch.setattr(planning, "lay_out", lambda tensors, plan: WRONG["columns only"](list(tensors), plan))
    parafit.fit(mlp(), x, y, plan="data=4,tensor=2", verbose=2)
    assert "parafit: not in the plan: all-gather over tensor: planned 0 bytes a step" in capsys.readouterr().out


def test_a_report_without_collectives_says_so():
    assert str(contract.Report(rows=())) == "no collectives, as planned"


def _compiled(parts):
    model = parts if isinstance(parts, keras.Model) else keras.Sequential(parts, name="sequential")
    model.compile("adam", "mse")
    return model


@pytest.mark.parametrize(("heads", "size", "width"), [(2, 16, 16), (2, 8, 18), (6, 4, 24)])
def test_heads_that_the_axis_does_not_divide_stay_whole_as_planned(capsys, heads, size, width):
    """Their size is not split instead: products take heads and size as one, so that XLA would gather it again."""
    tokens = keras.Input((8,), dtype="int32")
    hidden = layers.Embedding(20, width, mask_zero=True)(tokens)
    hidden = layers.Add()([hidden, layers.MultiHeadAttention(heads, size)(hidden, hidden)])
    hidden = layers.Dense(width)(layers.Dense(4 * width, "relu")(hidden))
    model = keras.Model(tokens, layers.Dense(3, "softmax")(layers.GlobalAveragePooling1D()(hidden)))
    model.compile("adam", "sparse_categorical_crossentropy")
    x = np.random.default_rng(0).integers(0, 20, (32, 8)).astype("int32")
    parafit.fit(model, x, np.zeros(32, "int32"), batch_size=16, plan="data=2,tensor=4", verbose=2)
    assert "not in the plan" not in capsys.readouterr().out
