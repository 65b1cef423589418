"""What a stage does with a microbatch, as traced functions: F, the forward pass; B and W, the backward pass."""

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Var, jaxpr_as_fun

from parafit.techniques.stages import Stage
from parafit.techniques.whole import Whole
from parafit.tracing.inline import REMATERIALISED, Inlined, inlined, needed_by, read

_OPENED = frozenset({"jit", "pjit", "closed_call", "core_call"}) | REMATERIALISED


@dataclass(frozen=True, kw_only=True)
class Function:
    """A traced function of some of the values that a stage has.

    Attributes:
        takes: the numbers of the values that it takes.
        closed: the function.
    """

    takes: tuple[int, ...]
    closed: ClosedJaxpr


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """The tasks of a stage on a microbatch.

    All values that a stage has are numbered: what it reads, what it receives, residuals of F, gradients of what it sends (one for each
    taker), the share of the microbatch's loss in the batch's, and what B leaves for W.

    Attributes:
        forward: gives what is sent, results, and residuals.
        backward: gives the gradients of what is received, then those of weights; or what it leaves for W in their place.
        weights: gives the gradients of weights, None where B does.
        given: how many values are read.
        received: how many are received.
        residuals: how many residuals there are.
        sends: for each gradient that comes back, which value was sent.
        returns: for each gradient of what is received, which value that is.
        trained: which of the values read have gradients.
        left: how many values B leaves for W.
    """

    forward: Function
    backward: Function | None
    weights: Function | None
    given: int
    received: int
    residuals: int
    sends: tuple[int, ...]
    returns: tuple[int, ...]
    trained: tuple[int, ...]
    left: int


def tasks_of(stage: Stage, whole: Whole, *, split: bool, recompute: bool) -> Tasks:
    """The tasks of a stage.

    Args:
        stage: of the step.
        whole: the step.
        split: whether gradients of weights are a task of their own.
        recompute: whether B computes the stage again instead of keeping residuals.
    """
    return _Derivation(stage, whole, recompute).tasks(split)


class _Derivation:
    def __init__(self, stage: Stage, whole: Whole, recompute: bool):
        self.stage, self.whole = stage, whole
        self.inputs = [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in stage.closed.jaxpr.invars[len(stage.constants) :]]
        self.outputs = [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in stage.closed.jaxpr.outvars]
        self.given = len(stage.reads)
        self.trained = tuple(
            place for place, argument in enumerate(stage.reads) if argument < whole.weights and _learns(self.inputs[place])
        )
        self.returns = tuple(place for place in range(len(stage.received)) if _learns(self.inputs[self.given + place]))
        self.differentiable = [place for place in range(len(stage.takers)) if _learns(self.outputs[place])]
        self.sends = tuple(place for place in self.differentiable for _ in stage.takers[place])
        self.loss = len(stage.takers) + stage.results.index(0) if whole.trains and 0 in stage.results else None
        run = jaxpr_as_fun(stage.closed)
        plain = lambda *values: run(*stage.constants, *values)  # noqa: E731
        self.run: Callable = jax.checkpoint(plain) if recompute else plain

    def tasks(self, split: bool) -> Tasks:
        trains = self.whole.trains and (self.sends or self.loss is not None) and (self.trained or self.returns)
        flat = inlined(jax.make_jaxpr(lambda *values: self._differentiated(values) if trains else self.run(*values))(*self.inputs))
        outputs, residuals = flat.outputs[: len(self.outputs)], flat.outputs[len(self.outputs) :]
        kept = self._kept(flat, residuals)
        backward, weights, left = self._backward(flat, residuals, kept, split) if trains else (None, None, 0)
        return Tasks(
            forward=function_of(flat, [*outputs, *kept]),
            backward=backward,
            weights=weights,
            given=self.given,
            received=len(self.stage.received),
            residuals=len(kept),
            sends=self.sends,
            returns=self.returns,
            trained=self.trained,
            left=left,
        )

    def _differentiated(self, values: Sequence[Any]) -> list:
        """The stage's outputs, then the residuals of its differentiation."""
        places = [*self.trained, *(self.given + place for place in self.returns)]

        def function(*moving):
            all_values = list(values)
            for place, value in zip(places, moving):
                all_values[place] = value
            outputs = self.run(*all_values)
            learns = [outputs[place] for place in self.differentiable] + ([outputs[self.loss]] if self.loss is not None else [])
            return learns, outputs

        _, backward, outputs = jax.vjp(function, *(values[place] for place in places), has_aux=True)
        residuals, self.structure = jax.tree.flatten(backward)
        return [*outputs, *residuals]

    def _kept(self, flat: Inlined, residuals: Sequence[Any]) -> list[Var]:
        """The residuals that differ from microbatch to microbatch and are none of the stage's inputs; B makes the others again."""
        start = self.whole.weights
        differs = {var for place, var in enumerate(flat.inputs) if place >= self.given or self.stage.reads[place] >= start}
        inputs = set(flat.inputs)
        for equation in flat.equations:
            if any(var in differs for var in read(equation)):
                differs.update(equation.outvars)
        return list(dict.fromkeys(var for var in residuals if isinstance(var, Var) and var in differs and var not in inputs))

    def _backward(self, flat: Inlined, residuals: Sequence[Any], kept: list[Var], split: bool) -> tuple[Function, Function | None, int]:
        others = [var for var in residuals if not (isinstance(var, Var) and var in kept)]
        again = function_of(flat, others)
        make_again = jaxpr_as_fun(again.closed)
        places = {var: place for place, var in enumerate(kept)}

        def pulled_back(*values):
            inputs, rest = values[: len(self.inputs)], values[len(self.inputs) :]
            saved, coming, share = rest[: len(kept)], rest[len(kept) : -1], rest[-1]
            remade = iter(make_again(*(inputs[place] for place in again.takes)))
            leaves = [saved[places[var]] if isinstance(var, Var) and var in places else next(remade) for var in residuals]
            sums = [
                functools.reduce(operator.add, (value for value, at in zip(coming, self.sends) if at == place))
                for place in self.differentiable
            ]
            pulled = jax.tree.unflatten(self.structure, leaves)(sums + ([share] if self.loss is not None else []))
            return [*pulled[len(self.trained) :], *pulled[: len(self.trained)]]

        saved = [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in kept]
        share = jax.ShapeDtypeStruct((), self.outputs[self.loss].dtype if self.loss is not None else jnp.float32)
        closed = jax.make_jaxpr(pulled_back)(*self.inputs, *saved, *(self.outputs[place] for place in self.sends), share)
        if split:
            return _halves(inlined(closed, calls=_OPENED), len(self.returns))
        whole = inlined(closed)
        return function_of(whole, whole.outputs), None, 0


def _halves(flat: Inlined, returned: int) -> tuple[Function, Function, int]:
    """B and W: W takes from B what both need."""
    first = needed_by(flat.equations, flat.outputs[:returned])
    rest = [equation for equation in flat.equations if id(equation) not in first]
    made = {var for equation in flat.equations if id(equation) in first for var in equation.outvars}
    wanted = [var for equation in rest for var in read(equation)] + [var for var in flat.outputs[returned:] if isinstance(var, Var)]
    left = list(dict.fromkeys(var for var in wanted if var in made))
    backward = function_of(flat, [*flat.outputs[:returned], *left])
    return backward, function_of(replace(flat, equations=rest, inputs=[*flat.inputs, *left]), flat.outputs[returned:]), len(left)


def function_of(flat: Inlined, outputs: Sequence[Any], inputs: Sequence[Var] = ()) -> Function:
    """What gives some values, of those of its inputs that it needs; its constants are bound.

    Args:
        flat: a traced function.
        outputs: variables of it, and literals.
        inputs: variables that it takes; the function's own by default.
    """
    given = list(inputs or flat.inputs)
    known, kept = set(given), []
    live = {var for var in outputs if isinstance(var, Var)} - known
    for equation in reversed(flat.equations):
        if any(var in live for var in equation.outvars):
            kept.append(equation)
            live |= set(read(equation)) - known
    kept.reverse()
    reads = {var for equation in kept for var in read(equation)} | {var for var in outputs if isinstance(var, Var)}
    takes = tuple(place for place, var in enumerate(given) if var in reads)
    constants = [var for var in flat.constants if var in reads]
    taken = [given[place] for place in takes]
    closed = flat.part(kept, [*constants, *taken], outputs)
    if constants:
        run, values = jaxpr_as_fun(closed), [flat.constants[var] for var in constants]
        closed = jax.make_jaxpr(lambda *given: run(*values, *given))(
            *(jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in taken)
        )
    return Function(takes=takes, closed=closed)


def _learns(shape: Any) -> bool:
    return bool(jnp.issubdtype(shape.dtype, jnp.inexact))
