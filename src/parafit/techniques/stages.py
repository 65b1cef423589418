"""A step cut into the stages of a pipeline, anywhere in its traced program: any model, no marks.

Equations fall into four kinds. What depends on the batch and on weights, or costs much, *moves*: a chain in the order of the program, and
each stage is a stretch of it. A small number made of weights alone (a regulariser's) is *pinned* to the stage that has the weights. What is
left, made of weights alone (a transposed kernel) or of the batch and state alone (a mask, dropout's random numbers), is computed again in
each stage that needs it, and never sent. A value goes from the stage that makes it straight to each stage that takes it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from jax.extend.core import ClosedJaxpr, JaxprEqn, Var

from parafit.errors import PlanError
from parafit.planner.cut import Unit, balance
from parafit.support.jaxprs import opened, read_scan
from parafit.techniques.whole import Whole
from parafit.tracing.inline import read
from parafit.tracing.primitives import primitive_named
from parafit.tracing.scopes import layer_of

_FLOPS_PER_SECOND = 1e12
_BYTES_PER_SECOND = 1e11
"""Only their ratio matters: it says which operations wait for memory."""

_COSTLY = ("matmul", "convolution", "sort")
_OPAQUE = ("scan", "while", "cond", "custom_vjp_call", "checkpoint", "remat", "remat2")
_STATE_BYTES = 4
"""Bytes of training state for each byte of a weight: itself, its gradient and two slots."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a step, as a function of the arguments it reads and of what it receives.

    Attributes:
        reads: which of the step's arguments it takes, in order.
        received: for each value that it takes from before: the stage that makes it, and its place among what that stage sends.
        takers: for each value that it sends, the stages that take it.
        results: which of the step's results it gives.
        closed: `(constants, reads, received) -> (sent, results)`.
        constants: arrays that the traced program held.
        name: its layers, in words.
        seconds: of its forward pass; only ratios of stages mean anything.
    """

    reads: tuple[int, ...]
    received: tuple[tuple[int, int], ...]
    takers: tuple[tuple[int, ...], ...]
    results: tuple[int, ...]
    closed: ClosedJaxpr
    constants: tuple[Any, ...]
    name: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Stages:
    """A step cut into stages.

    Attributes:
        stages: in the order of the program.
        owners: the stage of each weight, which keeps and updates it.
        advancing: arguments that are state which changes once a batch, not with each microbatch.
        changing: arguments that are state which changes with each microbatch, each at one stage.
    """

    stages: tuple[Stage, ...]
    owners: tuple[int, ...]
    advancing: frozenset[int]
    changing: frozenset[int]


def cut(whole: Whole, count: int, *, owners: Sequence[int] = (), limits: Sequence[float] | None = None) -> Stages:
    """A step cut into stages whose times are as equal as its places to cut allow.

    Args:
        whole: the step, traced for a microbatch.
        count: how many stages.
        owners: of a cut of the same step for another microbatch: weights stay where they are.
        limits: bytes that each stage may keep.

    Raises:
        PlanError: the program has fewer places to cut, or a piece of state is written in one stage and read in another.
    """
    flow = _Flow(whole)
    starts = flow.starts_like(owners, count) if owners else flow.starts(count, limits)
    return _Assignment(flow, starts).stages()


class _Flow:
    """The kinds of a step's equations, and its chain of moving ones."""

    def __init__(self, whole: Whole):
        self.whole, flat = whole, whole.flat
        self.weights = {var: index for index, var in enumerate(flat.inputs[: whole.weights])}
        self.made_by = {var: index for index, equation in enumerate(flat.equations) for var in equation.outvars}
        self.of_batch = {flat.inputs[index] for index in (*whole.measures, *whole.batch)}  # metrics count rows
        self.moving: list[int] = []
        self.pinned: set[int] = set()
        self.roots: dict[Var, frozenset[int]] = {var: frozenset([index]) for var, index in self.weights.items()}
        self._moves: set[Var] = set()
        of_weights: set[Var] = set(self.weights)
        for index, equation in enumerate(flat.equations):
            self._classify(index, equation, of_weights)

    def _classify(self, index: int, equation: JaxprEqn, of_weights: set[Var]) -> None:
        operands = read(equation)
        weighty, batchy = (any(var in known for var in operands) for known in (of_weights, self.of_batch))
        moves = any(var in self._moves for var in operands) or (batchy and (weighty or is_costly(equation)))
        if moves:
            self.moving.append(index)
            self._moves.update(equation.outvars)
        elif weighty:
            small = all(_size(var) <= 1 for var in equation.outvars)
            if small and any(self.made_by.get(var) in self.pinned or (var in of_weights and _size(var) > 1) for var in operands):
                self.pinned.add(index)
            roots = frozenset().union(*(self.roots.get(var, frozenset()) for var in operands))
            self.roots.update(dict.fromkeys(equation.outvars, roots))
        of_weights.update(equation.outvars if weighty or moves else ())
        self.of_batch.update(equation.outvars if batchy or moves else ())

    @cached_property
    def first_use(self) -> dict[int, int]:
        """For each weight that the chain reads, its first place there; what is pinned does not count."""
        first: dict[int, int] = {}
        for place, index in enumerate(self.moving):
            for var in read(self.whole.flat.equations[index]):
                if self.made_by.get(var) not in self.pinned:
                    for weight in self.roots.get(var, ()):
                        first.setdefault(weight, place)
        return first

    @cached_property
    def last_place(self) -> int:
        """The last place of the chain where a stage may start: all from the loss, or from the first metric on, is of the last stage."""
        loss = self.made_by.get(self.whole.flat.outputs[0]) if self.whole.trains else None
        last = self.moving.index(loss) if loss in self.moving else len(self.moving) - 1
        measured = {self.whole.flat.inputs[argument] for argument in self.whole.measures}
        for index, equation in enumerate(self.whole.flat.equations):
            if any(var in measured for var in read(equation)):
                measured.update(equation.outvars)
                if index in self._place_of:
                    return min(last, self._place_of[index])
        return last

    @cached_property
    def _place_of(self) -> dict[int, int]:
        return {index: place for place, index in enumerate(self.moving)}

    def starts_like(self, owners: Sequence[int], count: int) -> list[int]:
        """Where stages start so that each weight is first read where it is kept."""
        return [
            0,
            *(
                min([self.last_place, *(place for weight, place in self.first_use.items() if owners[weight] >= stage)])
                for stage in range(1, count)
            ),
        ]

    def starts(self, count: int, limits: Sequence[float] | None) -> list[int]:
        """Where balanced stages start: between layers if there are enough, else between operations that cost much, else anywhere.

        A step that only goes forward may leave stages empty: it has fewer operations than the training step that the plan is made for.
        """
        stages, count = count, count if self.whole.trains else min(count, self.last_place + 1)
        for places in (self._narrow, self._gaps):
            if len(places) >= count - 1:
                break
        else:
            places = list(range(1, self.last_place + 1))
        bounds = [0, *places, len(self.moving)]
        units = [self._unit(first, end) for first, end in pairwise(bounds)]
        starts = [bounds[index] for index in balance(units, stages=count, limits=limits).starts]
        return starts + [len(self.moving)] * (stages - count)

    @cached_property
    def _gaps(self) -> list[int]:
        """Between two operations of the chain that cost much, the place where the fewest values pass, the last of such places."""
        costly = [place for place in range(len(self.moving)) if self._costs_much(place)]
        gaps = (range(before + 1, min(after, self.last_place) + 1) for before, after in pairwise(costly))
        return [min(gap, key=lambda place: (self._passing[place][0], -place)) for gap in gaps if gap]

    @cached_property
    def _narrow(self) -> list[int]:
        """The gaps at which no more values pass than at those beside them: between blocks rather than inside."""
        counts = [self._passing[place][0] for place in self._gaps]
        around = zip([math.inf, *counts], counts, [*counts[1:], math.inf])
        return [place for place, (before, here, after) in zip(self._gaps, around) if here <= min(before, after)]

    def _costs_much(self, place: int) -> bool:
        equation = self.whole.flat.equations[self.moving[place]]
        return is_costly(equation) or any(_size(var) > 1 and len(var.aval.shape) > 1 and var in self.roots for var in read(equation))

    @cached_property
    def _passing(self) -> list[tuple[int, float]]:
        """How many values pass each place of the chain, and their bytes; single numbers do not count."""
        equations = [self.whole.flat.equations[index] for index in self.moving]
        last = {var: place for place, equation in enumerate(equations) for var in read(equation)}
        last |= {var: len(equations) for var in self.whole.flat.outputs if isinstance(var, Var)}
        changes = [[0, 0.0] for _ in range(len(equations) + 2)]
        for place, equation in enumerate(equations):
            for var in equation.outvars:
                if var in last and _size(var) > 1:
                    for at, sign in ((place + 1, 1), (last[var] + 1, -1)):
                        changes[at][0] += sign
                        changes[at][1] += sign * _nbytes(var)
        passing, count, nbytes = [], 0, 0.0
        for more, further in changes[:-1]:
            count, nbytes = count + more, nbytes + further
            passing.append((count, nbytes))
        return passing

    def _unit(self, first: int, end: int) -> Unit:
        """A stretch of the chain, priced."""
        equations = [self.whole.flat.equations[index] for index in self.moving[first:end]]
        forward = sum(map(_seconds, equations))
        weights = [var for var, index in self.weights.items() if first <= self.first_use.get(index, -1) < end]
        return Unit(
            name=self.layer(first, end),
            forward=forward,
            backward=2 * forward,
            state_bytes=_STATE_BYTES * sum(map(_nbytes, weights)),
            kept_bytes=sum(_nbytes(var) for equation in equations for var in equation.outvars),
            passed_bytes=self._passing[end][1],
        )

    def layer(self, first: int, end: int) -> str:
        """The layers of a stretch of the chain, in words."""
        scopes = [layer_of(self.whole.flat.scopes[index]) for index in self.moving[first:end]]
        names = [name for name in dict.fromkeys(scopes) if name]
        if names:
            return " to ".join(dict.fromkeys([names[0], names[-1]]))
        return self.whole.flat.equations[self.moving[first]].primitive.name if first < end else "nothing"


class _Assignment:
    """What each stage computes, reads, receives and gives."""

    def __init__(self, flow: _Flow, starts: Sequence[int]):
        self.flow, self.starts, self.count = flow, starts, len(starts)
        self.whole, self.equations = flow.whole, flow.whole.flat.equations
        self._inputs = {var: index for index, var in enumerate(self.whole.flat.inputs)}
        self.stage_of: dict[int, int] = {}
        bounds = [*starts, len(flow.moving)]
        for stage, (first, end) in enumerate(pairwise(bounds)):
            self.stage_of.update(dict.fromkeys(flow.moving[first:end], stage))
        self.owners = [
            self._stage_at(flow.first_use[weight]) if weight in flow.first_use else self.count - 1 for weight in range(self.whole.weights)
        ]
        for index in sorted(flow.pinned):
            self.stage_of[index] = max(map(self._known_stage, read(self.equations[index])), default=0)

    def _stage_at(self, place: int) -> int:
        return self.stage_of[self.flow.moving[place]]

    def _known_stage(self, var: Var) -> int:
        """The stage that a value made of weights is of."""
        made = self.stage_of.get(self.flow.made_by.get(var, -1))
        return max((self.owners[weight] for weight in self.flow.roots.get(var, ())), default=0) if made is None else made

    def stages(self) -> Stages:
        """All of it."""
        results = [self._results_of(stage) for stage in range(self.count)]
        found = [self._with_advances(stage, results[stage]) for stage in range(self.count)]
        self._check_state(found)
        sent: list[dict[Var, list[int]]] = [{} for _ in range(self.count)]
        for stage, part in enumerate(found):
            for var in part.received:
                sent[self.stage_of[self.flow.made_by[var]]].setdefault(var, []).append(stage)
        places = {var: (stage, place) for stage, values in enumerate(sent) for place, var in enumerate(values)}
        owners = list(self.owners)
        for weight in range(self.whole.weights):  # of those that only pinned equations read, none of the chain
            readers = [stage for stage, part in enumerate(found) if weight in part.reads]
            owners[weight] = owners[weight] if owners[weight] in readers or not readers else readers[0]
        return Stages(
            stages=tuple(self._stage(stage, part, sent[stage], places) for stage, part in enumerate(found)),
            owners=tuple(owners),
            advancing=frozenset(
                argument for result, argument in self.whole.replaces.items() if self._changes(result) and not self._by_batch(result)
            ),
            changing=frozenset(
                argument for result, argument in self.whole.replaces.items() if self._changes(result) and self._by_batch(result)
            ),
        )

    def _changes(self, result: int) -> bool:
        return self.whole.flat.outputs[result] is not self.whole.flat.inputs[self.whole.replaces[result]]

    def _by_batch(self, result: int) -> bool:
        return self.whole.flat.outputs[result] in self.flow.of_batch if isinstance(self.whole.flat.outputs[result], Var) else False

    def _home(self, result: int) -> int | None:
        """The stage that gives a result; None of state that each stage which reads it advances for itself."""
        var = self.whole.flat.outputs[result]
        made = self.flow.made_by.get(var) if isinstance(var, Var) else None
        if made in self.stage_of:
            return self.stage_of[made]
        if result in self.whole.replaces and isinstance(var, Var):
            if self.flow.roots.get(var):
                return self._known_stage(var)
            if var not in self.flow.of_batch:
                return None
        return self.count - 1

    def _results_of(self, stage: int) -> list[int]:
        changed = (result for result in range(len(self.whole.flat.outputs)) if result not in self.whole.replaces or self._changes(result))
        return [result for result in changed if self._home(result) == stage]

    def _with_advances(self, stage: int, results: list[int]) -> "_Part":
        """The part of a stage, with the new values of all it reads that each reader advances for itself."""
        while True:
            part = self._part(stage, results)
            more = [
                result
                for result, argument in self.whole.replaces.items()
                if result not in results and self._changes(result) and self._home(result) is None
                if argument in part.reads or (stage == self.count - 1 and not self._is_read(argument))
            ]
            if not more:
                return part
            results = sorted([*results, *more])

    def _is_read(self, argument: int) -> bool:
        """Whether anything but its own advance reads a piece of state."""
        return any(argument in self._part(stage, self._results_of(stage)).reads for stage in range(self.count))

    def _part(self, stage: int, results: Sequence[int]) -> "_Part":
        """What a stage needs in order to give results and what later stages take."""
        own = [index for index, at in self.stage_of.items() if at == stage]
        outputs = [self.whole.flat.outputs[result] for result in results]
        waiting = [var for index in own for var in read(self.equations[index])] + [var for var in outputs if isinstance(var, Var)]
        equations, seen, reads, received, constants = set(own), set(), set(), {}, {}
        while waiting:
            var = waiting.pop()
            if var in seen:
                continue
            seen.add(var)
            index = self.flow.made_by.get(var)
            if index is None:
                (reads.add(self._inputs[var]) if var in self._inputs else constants.setdefault(var))
            elif index in equations:
                continue
            elif self.stage_of.get(index, stage) < stage:
                received[var] = None
            else:
                equations.add(index)
                waiting += read(self.equations[index])
        order = sorted(received, key=lambda var: self.flow.made_by[var])
        return _Part(sorted(equations), tuple(sorted(reads)), order, list(constants), tuple(results))

    def _check_state(self, found: Sequence["_Part"]) -> None:
        for result, argument in self.whole.replaces.items():
            home = self._home(result)
            readers = {stage for stage, part in enumerate(found) if argument in part.reads}
            if self._changes(result) and home is not None and readers - {home}:
                name = self.whole.leaves[argument].name
                raise PlanError(
                    f"this model cannot be cut into {self.count} stages: stage {home} changes {name!r}, and stage "
                    f"{min(readers - {home})} reads it too. Choose fewer stages."
                )

    def _stage(self, stage: int, part: "_Part", sent: dict[Var, list[int]], places: dict[Var, tuple[int, int]]) -> Stage:
        flat = self.whole.flat
        inputs = [*part.constants, *(flat.inputs[index] for index in part.reads), *part.received]
        outputs = [*sent, *(flat.outputs[result] for result in part.results)]
        bounds = [*self.starts, len(self.flow.moving)]
        return Stage(
            reads=part.reads,
            received=tuple(places[var] for var in part.received),
            takers=tuple(tuple(takers) for takers in sent.values()),
            results=part.results,
            closed=flat.part([self.equations[index] for index in part.equations], inputs, outputs),
            constants=tuple(flat.constants[var] for var in part.constants),
            name=self.flow.layer(bounds[stage], bounds[stage + 1]),
            seconds=sum(_seconds(self.equations[index]) for index in part.equations),
        )


@dataclass(frozen=True)
class _Part:
    equations: list[int]
    reads: tuple[int, ...]
    received: list[Var]
    constants: list[Var]
    results: tuple[int, ...]


def is_costly(equation: JaxprEqn) -> bool:
    """Whether an equation is not to be computed twice."""
    return equation.primitive.name in _OPAQUE or primitive_named(equation.primitive.name).kind in _COSTLY


def _seconds(equation: JaxprEqn) -> float:
    """About what an equation takes, of compute or of memory."""
    moved = sum(_nbytes(var) for var in (*read(equation), *equation.outvars))
    return max(_flops(equation) / _FLOPS_PER_SECOND, moved / _BYTES_PER_SECOND)


def _flops(equation: JaxprEqn) -> float:
    scan = read_scan(equation)
    inner = [scan.body] if scan else [value for value in equation.params.values() if hasattr(getattr(value, "jaxpr", value), "eqns")]
    if inner:
        turns = scan.length if scan else 1
        return turns * sum(_flops(each) for jaxpr in inner for each in opened(jaxpr)[0].eqns)
    shapes: list[Any] = [[getattr(var.aval, "shape", ()) for var in side] for side in (equation.invars, equation.outvars)]
    return primitive_named(equation.primitive.name).flops(equation.params, *shapes)


def _size(var: Any) -> int:
    return math.prod(getattr(var.aval, "shape", ()))


def _nbytes(var: Any) -> float:
    return _size(var) * getattr(getattr(var.aval, "dtype", None), "itemsize", 4)
