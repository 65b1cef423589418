"""A chain is cut into the stages that brute force finds best, within memory; what cannot be cut is said."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parafit.errors import PlanError
from parafit.planner.cut import Unit, balance
from parafit.support.units import gibibytes

whole = st.integers(0, 9)
units = st.builds(
    Unit,
    name=st.just("layer"),
    forward=whole,
    backward=whole,
    state_bytes=whole,
    kept_bytes=whole,
    passed_bytes=st.one_of(st.none(), whole, whole),
)
chains = st.lists(units, min_size=1, max_size=9)


def cuts(chain, stages):
    """Every cut: the first unit of each stage, and the end of the chain."""
    places = [index for index in range(1, len(chain)) if chain[index - 1].passed_bytes is not None]
    for chosen in itertools.combinations(places, stages - 1):
        yield (0, *chosen, len(chain))


def sums(chain, bounds, worth):
    return [sum(worth(unit) for unit in chain[start:end]) for start, end in itertools.pairwise(bounds)]


def kept(chain, bounds, in_flight):
    state = sums(chain, bounds, lambda unit: unit.state_bytes)
    activations = sums(chain, bounds, lambda unit: unit.kept_bytes)
    return [stays + count * activation for stays, count, activation in zip(state, in_flight, activations)]


def goal(chain, bounds):
    longest = max(sums(chain, bounds, lambda unit: unit.forward + unit.backward))
    return longest, sum(chain[start - 1].passed_bytes for start in bounds[1:-1])


@given(chains, st.integers(1, 5), st.data())
def test_the_best_cut_of_all_is_found(chain, stages, data):
    every = list(cuts(chain, stages))
    limits = data.draw(st.lists(st.integers(0, 80), min_size=stages, max_size=stages))
    in_flight = data.draw(st.lists(st.integers(0, 4), min_size=stages, max_size=stages))
    fitting = [bounds for bounds in every if all(size <= limit for size, limit in zip(kept(chain, bounds, in_flight), limits))]
    if not fitting:
        least = min((max(size - limit for size, limit in zip(kept(chain, bounds, in_flight), limits)) for bounds in every), default=None)
        with pytest.raises(
            PlanError, match=f" {gibibytes(least)} more than its device may" if every else "places to cut, and the network has"
        ):
            balance(chain, stages=stages, limits=limits, in_flight=in_flight)
        return
    cut = balance(chain, stages=stages, limits=limits, in_flight=in_flight)
    bounds = (*cut.starts, len(chain))
    assert bounds in fitting
    assert goal(chain, bounds) == min(goal(chain, bounds) for bounds in fitting)
    assert list(cut.seconds) == sums(chain, bounds, lambda unit: unit.forward + unit.backward)
    assert list(cut.nbytes) == kept(chain, bounds, in_flight)
    assert cut.passed_bytes == tuple(chain[start - 1].passed_bytes for start in bounds[1:-1])


@given(chains, st.integers(1, 5))
def test_without_limits_everything_that_can_be_cut_is(chain, stages):
    every = list(cuts(chain, stages))
    if every:
        best = min(goal(chain, bounds) for bounds in every)
        assert goal(chain, (*balance(chain, stages=stages).starts, len(chain))) == best


def test_sums_that_differ_by_rounding_tie():
    """Three stages of 0.1 + 0.2 + 0.3 in any order take the same, so that the bytes decide."""
    seconds = [0.1, 0.2, 0.3, 0.3, 0.2, 0.1, 0.2, 0.1, 0.3]
    chain = [Unit(name="layer", forward=each, backward=0, passed_bytes=1) for each in seconds]
    assert balance(chain, stages=3).starts == (0, 3, 6)
    sizes = [9, 9, 9, 1, 9, 9, 9, 1, 9, 9]
    equal = [Unit(name="layer", forward=0.1, backward=0.2, passed_bytes=size) for size in sizes]
    assert balance(equal, stages=3).starts == (0, 4, 8)


@given(st.integers(1, 8), st.integers(0, 40))
def test_alike_units_make_alike_stages(stages, more):
    chain = [Unit(name="layer", forward=0.1, backward=0.3, passed_bytes=1)] * (stages + more)
    starts = balance(chain, stages=stages).starts
    sizes = [end - start for start, end in itertools.pairwise((*starts, len(chain)))]
    assert max(sizes) - min(sizes) <= 1


def test_memory_moves_the_cut():
    """The first stage keeps four microbatches, so it has to be shorter than its time alone would have it."""
    chain = [Unit(name="layer", forward=1, backward=2, kept_bytes=10)] * 8
    free, tight = (balance(chain, stages=4, limits=[limit] * 4, in_flight=(4, 3, 2, 1)) for limit in (100, 60))
    assert free.starts == (0, 2, 4, 6)
    assert tight.starts == (0, 1, 3, 6)
    assert tight.nbytes == (40, 60, 60, 20)


def test_a_long_chain_is_cut_well():
    """2,000 units into 64 stages: no stage is longer than the mean by more than a unit."""
    draw = random.Random(0).random
    chain = [Unit(name="layer", forward=draw(), backward=2 * draw(), passed_bytes=draw()) for _ in range(2000)]
    cut = balance(chain, stages=64)
    assert max(cut.seconds) < sum(cut.seconds) / 64 + 3


@pytest.mark.parametrize(
    ("chain", "stages", "message"),
    [
        ("abc", 4, "a pipeline of 4 stages needs 3 places to cut, and the network has 2. Choose at most 3 stages."),
        ("a", 2, "2 stages needs 1 places to cut, and the network has 0. Choose at most 1 stage."),
        ("ab-c-d", 4, "the network has 1. Choose at most 2 stages"),
        ("", 1, "Choose at most 0 stages"),
        ("abc", 0, "stages=0: expected a whole number of at least 1"),
        ("abc", 2.0, "stages=2.0: expected"),
        ("abc", True, "stages=True: expected"),
    ],
)
def test_more_stages_than_places_are_refused(chain, stages, message):
    """A "-" ties the units on both sides of it."""
    names = [(name, behind) for name, behind in zip(chain, chain[1:] + " ") if name != "-"]
    units = [Unit(name=name, forward=1, backward=1, passed_bytes=None if behind == "-" else 1) for name, behind in names]
    with pytest.raises(PlanError, match=message):
        balance(units, stages=stages)


def test_the_stage_that_is_too_large_is_named():
    chain = [Unit(name=name, forward=1, backward=1, state_bytes=size) for name, size in zip("abcdef", (1, 2, 9000, 1, 1, 1))]
    with pytest.raises(PlanError, match=r"no cut into 3 stages fits: at best, stage 1 .*c.* keeps 8\.8 KiB, 8\.7 KiB more than its"):
        balance(chain, stages=3, limits=[100] * 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limits": (1, 2)}, "limits=(1, 2): expected a number for each of the 3 stages"),
        ({"limits": (1, 2, -3)}, "none negative"),
        ({"limits": (1, 2, float("nan"))}, "none negative"),
        ({"in_flight": (3, 2)}, "in_flight=(3, 2): expected"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(arguments, message):
    chain = [Unit(name="layer", forward=1, backward=1)] * 3
    with pytest.raises(PlanError) as error:
        balance(chain, stages=3, **arguments)
    assert message in str(error.value)
    for change in ({"forward": -1}, {"backward": float("nan")}, {"passed_bytes": float("inf")}):
        with pytest.raises(PlanError, match=r"name='loss', .* expected seconds and bytes, finite and not negative"):
            balance([*chain, Unit(**{"name": "loss", "forward": 1, "backward": 1} | change)], stages=3)
