"""Passes over a traced step: every equation, at every depth, seen, kept or exchanged for others."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxpr_as_fun


def traced_through(change: Callable[[ClosedJaxpr], ClosedJaxpr], step: Callable) -> Callable:
    """`step` with its trace changed. Call the result under `jax.jit`, which traces it once.

    Args:
        change: from a traced step to one of the same arguments and results.
        step: a function of pytrees of arrays, returning a pytree of arrays.

    >>> traced_through(lambda closed: closed, lambda x: {"twice": 2 * x})(3)["twice"].item()
    6
    """

    def changed(*args):
        closed, shapes = jax.make_jaxpr(step, return_shape=True)(*args)
        outputs = jaxpr_as_fun(change(closed))(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return changed


def equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """Those of a jaxpr, at every depth."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda value: isinstance(value, Jaxpr | ClosedJaxpr)):
            if isinstance(value, Jaxpr | ClosedJaxpr):
                yield from equations(value.jaxpr if isinstance(value, ClosedJaxpr) else value)


class Pass:
    """Rebuilds jaxprs. A subclass says in `equations` what becomes of each equation; a jaxpr in which nothing changes is kept as it is."""

    def __init__(self):
        self._done: dict[int, tuple[Jaxpr, Jaxpr]] = {}

    def closed(self, closed: ClosedJaxpr) -> ClosedJaxpr:
        """A jaxpr with its constants."""
        jaxpr = self.jaxpr(closed.jaxpr)
        return closed if jaxpr is closed.jaxpr else ClosedJaxpr(jaxpr, closed.consts)

    def jaxpr(self, jaxpr: Jaxpr) -> Jaxpr:
        """One jaxpr, rebuilt once however often it is called."""
        if id(jaxpr) not in self._done:
            equations = [new for equation in jaxpr.eqns for new in self.equations(equation)]
            changed = len(equations) != len(jaxpr.eqns) or any(new is not old for new, old in zip(equations, jaxpr.eqns))
            self._done[id(jaxpr)] = jaxpr, jaxpr.replace(eqns=equations) if changed else jaxpr
        return self._done[id(jaxpr)][1]

    def equations(self, equation: JaxprEqn) -> list[JaxprEqn]:
        """What stands in the place of an equation: itself, with the jaxprs inside it rebuilt."""
        params = {name: self._param(value) for name, value in equation.params.items()}
        changed = any(params[name] is not value for name, value in equation.params.items())
        return [equation.replace(params=params) if changed else equation]

    def _param(self, value: Any) -> Any:
        if isinstance(value, ClosedJaxpr):
            return self.closed(value)
        if isinstance(value, Jaxpr):
            return self.jaxpr(value)
        if isinstance(value, tuple) and any(isinstance(item, ClosedJaxpr) for item in value):
            items = tuple(self._param(item) for item in value)
            return items if any(new is not old for new, old in zip(items, value)) else value
        return value


class Exchange(Pass):
    """A pass that exchanges equations; equal ones share one replacement, so that the lowered program holds it once.

    Args:
        choosers: for primitives by name: `equation -> form`, a function of its operands to call instead, or None to keep the equation.
    """

    def __init__(self, choosers: dict[str, Callable[[JaxprEqn], Callable | None]]):
        super().__init__()
        self.choosers = choosers
        self.replacements: dict[Any, JaxprEqn] = {}

    def equations(self, equation: JaxprEqn) -> list[JaxprEqn]:
        """The equation's replacement, or what the pass makes of it otherwise."""
        choose = self.choosers.get(equation.primitive.name)
        form = choose(equation) if choose else None
        return [self.exchanged(equation, form)] if form else super().equations(equation)

    def exchanged(self, equation: JaxprEqn, form: Callable) -> JaxprEqn:
        """A call of another form in the place of an equation; equations that are alike share one traced form.

        Args:
            equation: the equation to replace.
            form: a function of arrays like its operands, which gives what it gives.
        """
        key = equation.primitive, tuple((var.aval.shape, var.aval.dtype) for var in equation.invars), tuple(equation.params.items())
        if key not in self.replacements:
            self.replacements[key] = _call(equation, form)
        call = self.replacements[key]
        return call.replace(
            invars=list(equation.invars), outvars=list(equation.outvars), source_info=equation.source_info, ctx=equation.ctx
        )


def _call(equation: JaxprEqn, form: Callable) -> JaxprEqn:
    """One equation that calls `form` on operands like those of `equation`."""
    form.__name__ = f"fast_{equation.primitive.name.replace('-', '_')}"
    with equation.ctx.manager:  # undocumented (JAX 0.10.2): the mesh and the flags that the equation was traced under
        traced = jax.make_jaxpr(jax.jit(form))(*(jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in equation.invars))
    (call,) = traced.eqns
    assert not traced.consts
    assert list(call.invars) == list(traced.jaxpr.invars)
    assert [(var.aval.shape, var.aval.dtype) for var in call.outvars] == [(var.aval.shape, var.aval.dtype) for var in equation.outvars]
    return call
