"""Where is a network cut into the stages of a pipeline? Plain Python.

    minimise    the time of the longest stage; of cuts that tie, the bytes that pass between stages; then, about, how unequal stages are
    over        cuts of a chain of units into n stages, each of one unit or more           `_positions`
    subject to  a stage's state and the activations it keeps fit its device                `_Chain.first_by_memory`

For a given longest time, a stage that ends at a place may start at any place of a window, and windows move only forward. So a walk over
stages tells whether a longest time can be had, bisection finds the least, and a walk that sums bytes finds the cut.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from parafit.errors import PlanError
from parafit.support.units import gibibytes

SAME = 1e-9
"""Times whose relative difference is not larger count as equal."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A piece of a network that is not cut, priced. All times and activations are of one microbatch.

    Args:
        name: what it is called in messages.
        forward: seconds of its forward pass.
        backward: seconds of its backward pass.
        state_bytes: what a device keeps of it through the whole step: parameters, their gradients, optimiser slots.
        kept_bytes: activations it keeps from its forward to its backward pass.
        passed_bytes: activations that pass from it and from those before it to those behind; None where the network can't be cut after it.
    """

    name: str
    forward: float
    backward: float
    state_bytes: float = 0
    kept_bytes: float = 0
    passed_bytes: float | None = 0


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A chain of units, cut into stages.

    Attributes:
        starts: the first unit of each stage.
        seconds: forward and backward pass of each stage with one microbatch.
        nbytes: what each stage keeps at most: its state, and activations of the microbatches in flight.
        passed_bytes: activations of one microbatch that pass from each stage to the next.
    """

    starts: tuple[int, ...]
    seconds: tuple[float, ...]
    nbytes: tuple[float, ...]
    passed_bytes: tuple[float, ...]


def balance(units: Sequence[Unit], *, stages: int, limits: Sequence[float] | None = None, in_flight: Sequence[int] | None = None) -> Cut:
    """The cut whose longest stage is shortest; of those, one that passes the fewest bytes; of those, one with about equal stages.

    Exact, but that times which differ by no more than `SAME` of them count as equal.

    Args:
        units: the chain, in the order in which the network runs it.
        stages: how many to cut it into.
        limits: bytes that each stage may keep; no limit by default.
        in_flight: microbatches of which each stage keeps activations (`Grid.in_flight`); one by default.

    Raises:
        PlanError: the chain has fewer places to cut; no cut fits the limits (the stage, and by how much); or a number means nothing.

    >>> chain = [Unit(name=name, forward=1, backward=2, passed_bytes=size) for name, size in zip("abcde", (8, 2, 8, 8, 0))]
    >>> balance(chain, stages=2)
    Cut(starts=(0, 2), seconds=(6.0, 9.0), nbytes=(0.0, 0.0), passed_bytes=(2,))
    """
    _check_stages(stages)
    limits = (math.inf,) * stages if limits is None else limits
    in_flight = (1,) * stages if in_flight is None else in_flight
    _check_numbers(units, stages, limits, in_flight)
    chain = _Chain(units, _positions(units, stages), in_flight)
    fits = chain.first_by_memory(limits)
    if not chain.reaches(fits):
        raise _too_large(chain, limits)
    return chain.cut(np.maximum(fits, chain.first_by_time(chain.least_time(fits) * (1 + SAME))))


def _check_stages(stages: int) -> None:
    if not isinstance(stages, int) or isinstance(stages, bool) or stages < 1:
        raise PlanError(f"stages={stages!r}: expected a whole number of at least 1.")


def _check_numbers(units: Sequence[Unit], stages: int, limits: Sequence[float], in_flight: Sequence[int]) -> None:
    for name, numbers in (("limits", limits), ("in_flight", in_flight)):
        if len(numbers) != stages or not all(number >= 0 for number in numbers):
            raise PlanError(f"{name}={tuple(numbers)}: expected a number for each of the {stages} stages, none negative.")
    for unit in units:
        numbers = (unit.forward, unit.backward, unit.state_bytes, unit.kept_bytes, unit.passed_bytes or 0)
        if not all(number >= 0 and math.isfinite(number) for number in numbers):
            raise PlanError(f"{unit}: expected seconds and bytes, finite and not negative.")


def _positions(units: Sequence[Unit], stages: int) -> list[int]:
    """Where stages may start, and the end of the chain."""
    positions = [0, *(index for index in range(1, len(units)) if units[index - 1].passed_bytes is not None), len(units)]
    most = len(positions) - 1 if units else 0
    if stages > most:
        raise PlanError(
            f"a pipeline of {stages} stages needs {stages - 1} places to cut, and the network has {max(0, most - 1)}. Choose at most "
            f"{most} stage{'s' * (most != 1)}."
        )
    return positions


def _too_large(chain: "_Chain", limits: Sequence[float]) -> PlanError:
    """Which stage is too large, in the cut whose largest excess is least."""

    def raised(excess: float) -> np.ndarray:
        return chain.first_by_memory([limit + excess for limit in limits])

    cut = chain.cut(raised(_least(lambda excess: chain.reaches(raised(excess)), float(chain.memory.max()))))
    excess, stage = max((nbytes - limit, stage) for stage, (nbytes, limit) in enumerate(zip(cut.nbytes, limits)))
    first, last = cut.starts[stage], (*cut.starts[1:], len(chain.units))[stage] - 1
    names = " to ".join(dict.fromkeys([chain.units[first].name, chain.units[last].name]))
    return PlanError(
        f"no cut into {len(limits)} stages fits: at best, stage {stage} ({names}) keeps {gibibytes(cut.nbytes[stage])}, "
        f"{gibibytes(excess)} more than its device may. Use more stages, recompute activations, or split state."
    )


def _least(holds: Callable[[float], bool], high: float) -> float:
    """The least number for which something holds, from above and to a tenth of `SAME` of it; it holds for `high` and all that is larger."""
    low = 0.0
    while high - low > SAME / 10 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


class _Chain:
    """Sums over the chain up to each place where a stage may start, and what follows from them.

    A window is given by `first`: for each stage (rows) and each place it may end at, the first place it may start at.
    """

    def __init__(self, units: Sequence[Unit], positions: Sequence[int], in_flight: Sequence[int]):
        self.units, self.positions, self.stages = units, positions, len(in_flight)
        self.passed = [0, *(units[position - 1].passed_bytes or 0 for position in positions[1:])]
        self.time = self._sums([unit.forward + unit.backward for unit in units])
        state, kept = self._sums([unit.state_bytes for unit in units]), self._sums([unit.kept_bytes for unit in units])
        self.memory = np.array([state + count * kept for count in in_flight])

    def _sums(self, numbers: Sequence[float]) -> np.ndarray:
        return np.concatenate([[0.0], np.cumsum(numbers)])[self.positions]

    def first_by_time(self, longest: float) -> np.ndarray:
        """The windows in which no stage takes longer than `longest`: the same for each stage."""
        return np.searchsorted(self.time, self.time - longest)

    def first_by_memory(self, limits: Sequence[float]) -> np.ndarray:
        """The windows in which stages keep to their limits."""
        return np.array([np.searchsorted(sums, sums - limit) for sums, limit in zip(self.memory, limits)])

    def least_time(self, fits: np.ndarray) -> float:
        """The least time of the longest stage in windows that fit."""
        return _least(lambda longest: self.reaches(np.maximum(fits, self.first_by_time(longest))), float(self.time[-1]))

    def reaches(self, first: np.ndarray) -> bool:
        """Whether stages in these windows can end where the chain ends."""
        reached = np.arange(len(self.positions)) == 0
        for row in first:
            starts = np.concatenate([[0], np.cumsum(reached)])
            reached = starts[:-1] > starts[row]
        return bool(reached[-1])

    def cut(self, first: np.ndarray) -> Cut:
        """The cut that passes the fewest bytes, in windows that reach the end."""
        passed = [[0.0, *[math.inf] * (len(self.positions) - 1)]]
        for row in first[:-1]:
            passed.append(self._with_one_more(passed[-1], row.tolist()))
        places = [len(self.positions) - 1]
        for before, row in zip(passed[::-1], first[::-1]):
            places.append(self._start(int(row[places[-1]]), places[-1], before, self.stages - len(places)))
        return self._described(places[::-1])

    def _with_one_more(self, passed: list[float], first: list[int]) -> list[float]:
        """The fewest bytes passed up to each place with one more stage: the least over a window that moves."""
        best, window = [math.inf] * len(passed), deque[int]()
        for end in range(1, len(passed)):
            while window and passed[window[-1]] >= passed[end - 1]:
                window.pop()
            window.append(end - 1)
            while window and window[0] < first[end]:
                window.popleft()
            if window:
                best[end] = passed[window[0]] + self.passed[end]
        return best

    def _start(self, first: int, end: int, passed: list[float], before: int) -> int:
        """Where the stage that ends at a place starts: at the fewest bytes, then as near as can be to equal stages up to there."""
        least = min(passed[first:end])
        even = self.time[end] * before / (before + 1)
        tied = (place for place in range(first, end) if passed[place] <= least * (1 + SAME))
        return min(tied, key=lambda place: abs(self.time[place] - even))

    def _described(self, places: list[int]) -> Cut:
        return Cut(
            starts=tuple(self.positions[place] for place in places[:-1]),
            seconds=tuple(np.diff(self.time[places]).tolist()),
            nbytes=tuple(float(sums[end] - sums[start]) for sums, start, end in zip(self.memory, places, places[1:])),
            passed_bytes=tuple(self.passed[place] for place in places[1:-1]),
        )
