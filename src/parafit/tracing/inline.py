"""A traced function as one list of equations, and parts of it as functions of their own."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from parafit.support.jaxprs import opened

_CALLS = frozenset({"jit", "pjit", "closed_call", "core_call"})
"""Calls that mean nothing but their equations. Others (`custom_jvp_call`, `checkpoint`) say how to differentiate them: they stay whole."""

REMATERIALISED = frozenset({"checkpoint", "remat", "remat2"})
"""Calls that say what is kept for a backward pass, and nothing once that is traced."""


@dataclass(frozen=True, kw_only=True)
class Inlined:
    """A traced function without calls.

    Attributes:
        equations: those of the function, in order; only those that its results need.
        scopes: the place of each in the model's text: its name stack.
        inputs: what it takes.
        outputs: what it gives: variables and literals.
        constants: values of variables that no equation makes.
        template: the jaxpr it was made of.
    """

    equations: list[JaxprEqn]
    scopes: list[str]
    inputs: list[Var]
    outputs: list[Any]
    constants: dict[Var, Any]
    template: Jaxpr

    def part(self, equations: Sequence[JaxprEqn], inputs: Sequence[Var], outputs: Sequence[Any]) -> ClosedJaxpr:
        """Some of the equations as a function; constants come first among its inputs, with those of `constants_of`.

        Args:
            equations: those of the part, in order.
            inputs: variables that it takes.
            outputs: what it gives.
        """
        debug = self.template.debug_info._replace(arg_names=("",) * len(inputs), result_paths=("",) * len(outputs))
        parts = {"eqns": list(equations), "invars": list(inputs), "outvars": list(outputs), "constvars": (), "debug_info": debug}
        return ClosedJaxpr(self.template.replace(**parts), ())


def inlined(closed: ClosedJaxpr, *, calls: Collection[str] = _CALLS) -> Inlined:
    """A traced function with the equations of calls in the place of the calls, and without those that no result needs.

    Args:
        closed: as traced.
        calls: primitives that are opened.

    >>> import jax
    >>> closed = jax.make_jaxpr(lambda x: jax.jit(lambda y: (y + 1, y * 2))(x)[0])(1.0)
    >>> [equation.primitive.name for equation in inlined(closed).equations]
    ['add']
    """
    inliner = _Inliner(calls)
    jaxpr, consts = opened(closed)
    inputs = [Var(var.aval) for var in jaxpr.invars]
    outputs = inliner.run(jaxpr, consts, inputs, "")
    needed = needed_by(inliner.equations, outputs)
    kept = [(equation, scope) for equation, scope in zip(inliner.equations, inliner.scopes) if id(equation) in needed]
    return Inlined(
        equations=[equation for equation, _ in kept],
        scopes=[scope for _, scope in kept],
        inputs=inputs,
        outputs=outputs,
        constants=inliner.constants,
        template=jaxpr,
    )


def needed_by(equations: Sequence[JaxprEqn], outputs: Iterable[Any]) -> set[int]:
    """Those of the equations, by `id`, that some variables need.

    Args:
        equations: in their order.
        outputs: the variables, and literals.
    """
    live, needed = {var for var in outputs if isinstance(var, Var)}, set()
    for equation in reversed(equations):
        if equation.effects or any(var in live for var in equation.outvars):
            needed.add(id(equation))
            live.update(read(equation))
    return needed


def read(equation: JaxprEqn) -> list[Var]:
    """The variables that an equation takes."""
    return [var for var in equation.invars if isinstance(var, Var)]


class _Inliner:
    def __init__(self, calls: Collection[str]):
        self._calls = calls
        self.equations: list[JaxprEqn] = []
        self.scopes: list[str] = []
        self.constants: dict[Var, Any] = {}

    def run(self, jaxpr: Jaxpr, consts: Sequence[Any], arguments: Sequence[Any], scope: str) -> list[Any]:
        """Append a jaxpr's equations, of variables of their own; gives what stands for its results."""
        made: dict[Var, Any] = dict(zip(jaxpr.invars, arguments))
        for var, value in zip(jaxpr.constvars, consts):
            made[var] = Var(var.aval)
            self.constants[made[var]] = value
        for equation in jaxpr.eqns:
            operands = [var if isinstance(var, Literal) else made[var] for var in equation.invars]
            place = f"{scope}/{equation.source_info.name_stack}"
            if equation.primitive.name in self._calls and "jaxpr" in equation.params:
                results = self.run(*opened(equation.params["jaxpr"]), operands, place)
            else:
                results = [Var(var.aval) for var in equation.outvars]
                self.equations.append(equation.replace(invars=operands, outvars=results))
                self.scopes.append(place)
            made.update(zip(equation.outvars, results))
        return [var if isinstance(var, Literal) else made[var] for var in jaxpr.outvars]
