"""A fixed small draw of the fuzzer's cases, and what it is for: that it finds what is wrong."""

import dataclasses

import numpy as np
import pytest

import parafit
from tests.fuzz.compare import judge
from tests.fuzz.draw import draw
from tests.fuzz.run import run

DRAWN = (2, 3, 6, 16)

pytestmark = pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types:FutureWarning")  # Flax's BatchNorm in float64


def verdict(case):
    return run(definition=case.definition, plan=case.plan, batch_size=case.batch_size, single=case.single)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("seed", DRAWN)
def test_a_drawn_network_has_the_numbers_of_one_device(seed):
    found = verdict(draw(seed))
    assert found.kind == "same", found.told


@pytest.mark.usefixtures("float64")
def test_a_case_is_drawn_the_same_every_time_and_can_be_made_smaller():
    case = draw(DRAWN[0])
    assert draw(DRAWN[0]) == case
    smaller = list(case.smaller())
    assert smaller
    assert all(len(each.script) < len(case.script) or each.plan != case.plan or each.batch_size < case.batch_size for each in smaller)


@pytest.mark.usefixtures("float64")
def test_a_layout_that_is_broken_on_purpose_is_found(monkeypatch):
    whole = parafit.placement.Placement.bring_home
    monkeypatch.setattr(
        parafit.placement.Placement, "bring_home", lambda self, array: whole(self, array) * (1 + 1e-9 * (self.mesh is not None))
    )
    case = dataclasses.replace(draw(3), plan="data=2", batch_size=8)
    assert verdict(case).kind == "different"


def test_only_what_a_nudge_does_as_well_is_forgiven():
    one = {"a": np.ones(3)}
    assert judge(one, {"a": np.ones(3) + 1e-13}, {"a": np.ones(3)}).kind == "same"
    assert judge(one, {"a": np.ones(3) + 1e-9}, {"a": np.ones(3)}).kind == "different"
    assert judge(one, {"a": np.ones(3) + 1e-9}, {"a": np.ones(3) + 1e-11}).kind == "same"
    assert judge(one, {"a": np.full(3, np.nan)}, {"a": np.ones(3)}).kind == "different"
    assert judge(one, {"a": np.ones(3)}, {"a": np.ones(3) + 1e-3}).kind == "chaotic"
