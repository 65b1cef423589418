"""An optimizer's update, cut by the stages that keep the weights: each updates its own, at the same time.

Most of an update is made of one weight with its gradient and slots: that is of the weight's stage. What is made of the optimizer's own
numbers alone (step counts, learning rates) each stage makes for itself. What ties weights of several stages must be single numbers, as in
clipping by a global norm: they are gathered, what is made of them is made once, on the first stage, and sent to those that take it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var

from parafit.adapters.step import Step
from parafit.errors import PlanError
from parafit.techniques.tasks import function_of
from parafit.tracing.inline import inlined, read
from parafit.tracing.trace import jaxpr_of, shapes_of

_EVERYWHERE, _TIED = -1, -2


@dataclass(frozen=True, kw_only=True)
class Round:
    """What one stage computes of an update between two exchanges.

    Attributes:
        stage: which.
        takes: numbers of the values that it takes.
        gives: numbers of the values that it gives.
        closed: the function.
    """

    stage: int
    takes: tuple[int, ...]
    gives: tuple[int, ...]
    closed: ClosedJaxpr


@dataclass(frozen=True, kw_only=True)
class Update:
    """An update as rounds. Its values are numbered: slots, gradients, weights, then what rounds give.

    Attributes:
        rounds: each after all whose values it takes.
        homes: the stages that keep each slot: one, or all that update.
        new_slots: the number of each slot's new value.
        new_weights: the number of each weight's new value.
        sends: for values, the stages that take or keep them beside those that have or make them.
    """

    rounds: tuple[Round, ...]
    homes: tuple[tuple[int, ...], ...]
    new_slots: tuple[int, ...]
    new_weights: tuple[int, ...]
    sends: dict[int, tuple[int, ...]]


def cut_update(step: Step, owners: Sequence[int]) -> Update:
    """The update of a training step in rounds.

    Args:
        step: of training.
        owners: the stage of each weight.

    Raises:
        PlanError: the optimizer ties weights of several stages by more than single numbers.
    """
    return _Cut(step, owners).update()


class _Cut:
    def __init__(self, step: Step, owners: Sequence[int]):
        state = step.read()
        assert step.parts is not None
        arguments = shapes_of((list(state.slots), list(state.weights), list(state.weights)))
        closed, (weights, slots) = jaxpr_of(step.parts.update, *arguments)
        self.flat, self.owners, self.slots = inlined(closed), list(owners), len(state.slots)
        assert len(weights) == len(owners)
        assert len(slots) == self.slots
        self._inputs = set(self.flat.inputs)
        names = {leaf.name: owner for leaf, owner in zip(step.leaves[1].weights, owners)}
        self.kept_at = [names.get(leaf.like, _EVERYWHERE) if leaf.role == "slot" else _EVERYWHERE for leaf in step.leaves[1].slots]
        self._locate()

    def _locate(self) -> None:
        """Where each variable is made; slots whose owner is not known are of the stage that makes their new value."""
        while True:
            self.at: dict[Any, int] = dict(zip(self.flat.inputs, [*self.kept_at, *self.owners, *self.owners]))
            self.order: dict[Any, int] = dict.fromkeys(self.flat.inputs, 0)
            for equation in self.flat.equations:
                self._place(equation)
            moved = False
            for slot, var in enumerate(self._new_slots):
                at = self.at.get(var, _EVERYWHERE) if isinstance(var, Var) else _EVERYWHERE
                if self.kept_at[slot] == _EVERYWHERE and at >= 0:
                    self.kept_at[slot], moved = at, True
            if not moved:
                return

    @property
    def _new_slots(self) -> list[Any]:
        return self.flat.outputs[len(self.owners) :]

    def _place(self, equation: JaxprEqn) -> None:
        operands = read(equation)
        stages = {self.at[var] for var in operands if self.at.get(var, _EVERYWHERE) >= 0}
        tied = any(self.at.get(var) == _TIED for var in operands)
        single = all(_size(var) <= 1 for var in operands if self.at.get(var, _EVERYWHERE) >= 0)
        if len(stages) > 1 and not single:
            raise PlanError(
                f"this optimizer ties weights of several stages in one operation ({equation.primitive.name}), as loss scaling and "
                "gradient_accumulation_steps do: a pipeline cannot cut it. Use microbatches= in their place, or a plan without pipeline."
            )
        sums = single and not any(var in self._inputs for var in operands if self.at.get(var, _EVERYWHERE) >= 0)
        if len(stages) > 1 or (tied and (not stages or sums)):
            at = _TIED
        else:
            at = next(iter(stages), _EVERYWHERE)
        order = max((self.order.get(var, 0) + (self.at.get(var, _EVERYWHERE) not in (_EVERYWHERE, at)) for var in operands), default=0)
        self.at.update(dict.fromkeys(equation.outvars, at))
        self.order.update(dict.fromkeys(equation.outvars, order if at != _EVERYWHERE else 0))

    def update(self) -> Update:
        """All of it."""
        groups: dict[tuple[int, int], list[JaxprEqn]] = {}
        for equation in self.flat.equations:
            at = self.at[equation.outvars[0]]
            if at != _EVERYWHERE:
                groups.setdefault((self.order[equation.outvars[0]], at), []).append(equation)
        stages = sorted({at for _, at in groups if at >= 0} | ({0} if not groups or any(at == _TIED for _, at in groups) else set()))
        for stage in stages:  # one round at least, to advance what every stage keeps
            if not any(at == stage for _, at in groups):
                groups[0, stage] = []
        last = {stage: max(order for order, at in groups if at == stage) for stage in stages}
        makers = {var: key for key, equations in groups.items() for equation in equations for var in equation.outvars}
        wanted = self._wanted(groups, makers)
        numbers: dict[Any, int] = {var: number for number, var in enumerate(self.flat.inputs)}
        everywhere = [var for var in self._new_slots if isinstance(var, Var) and self.at.get(var) == _EVERYWHERE and var not in numbers]
        for var in (*wanted, *everywhere):
            numbers.setdefault(var, len(numbers))
        constants = self._constant_results(numbers)
        rounds = []
        for order, at in sorted(groups):
            gives = [var for var, key in wanted.items() if key == (order, at)]
            gives += [var for var in (*everywhere, *constants) if at >= 0 and last[at] == order and var not in gives]
            rounds.append(self._round(0 if at == _TIED else at, gives, numbers, makers, (order, at)))
        homes = tuple(tuple(stages) if at == _EVERYWHERE else (at,) for at in self.kept_at)
        weights, slots = self.flat.outputs[: len(self.owners)], self._new_slots
        new_weights, new_slots = (tuple(numbers[var if isinstance(var, Var) else id(var)] for var in group) for group in (weights, slots))
        sends = self._sends(rounds, homes, new_weights, new_slots)
        return Update(rounds=tuple(rounds), homes=homes, new_slots=new_slots, new_weights=new_weights, sends=sends)

    def _wanted(self, groups: dict, makers: dict) -> dict[Var, tuple[int, int]]:
        """What groups make that others take or that is a result, each with its group."""
        taken = {var for key, equations in groups.items() for var in self._reads(equations) if makers.get(var, key) != key}
        taken |= {var for var in self.flat.outputs if isinstance(var, Var)}
        return {var: makers[var] for var in makers if var in taken}

    def _reads(self, equations: Sequence[JaxprEqn]) -> set[Var]:
        return {var for equation in equations for var in read(equation)}

    def _constant_results(self, numbers: dict) -> list[Literal]:
        """Results that are literals; every stage makes them."""
        found = [value for value in self.flat.outputs if isinstance(value, Literal)]
        for value in found:
            numbers.setdefault(id(value), len(numbers))
        return found

    def _round(self, stage: int, gives: Sequence[Any], numbers: dict, makers: dict, key: tuple[int, int]) -> Round:
        """A function of the update's arguments and of what other groups make."""
        outside = [var for var in numbers if isinstance(var, Var) and var not in self.flat.inputs and makers.get(var, key) != key]
        function = function_of(self.flat, gives, [*self.flat.inputs, *outside])
        inputs = [*self.flat.inputs, *outside]
        return Round(
            stage=stage,
            takes=tuple(numbers[inputs[place]] for place in function.takes),
            gives=tuple(numbers[var if isinstance(var, Var) else id(var)] for var in gives),
            closed=function.closed,
        )

    def _sends(
        self, rounds: Sequence[Round], homes: Sequence, new_weights: Sequence[int], new_slots: Sequence[int]
    ) -> dict[int, tuple[int, ...]]:
        homes_of = [*homes, *((owner,) for owner in (*self.owners, *self.owners))]
        made_at = {number: set(stages) for number, stages in enumerate(homes_of)}
        wanted_at: dict[int, set[int]] = {}
        for each in rounds:
            for number in each.gives:
                made_at.setdefault(number, set()).add(each.stage)
            for number in each.takes:
                wanted_at.setdefault(number, set()).add(each.stage)
        for number, owner in zip(new_weights, self.owners):
            wanted_at.setdefault(number, set()).add(owner)
        for number, stages in zip(new_slots, homes):
            wanted_at.setdefault(number, set()).update(stages)
        return {
            number: tuple(sorted(wanted_at.get(number, set()) - stages))
            for number, stages in made_at.items()
            if wanted_at.get(number, set()) - stages
        }


def _size(var: Any) -> int:
    size = 1
    for length in getattr(var.aval, "shape", ()):
        size *= length
    return size
