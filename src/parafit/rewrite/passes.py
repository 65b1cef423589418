"""One pass over a traced step: every equation, at every depth, kept or exchanged for others."""

from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn


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
