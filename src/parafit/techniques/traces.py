"""Two traces of one function, for all rows of a batch and for some, read side by side and run again."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun

from parafit.support.jaxprs import opened
from parafit.tracing.scopes import layer_of
from parafit.tracing.trace import jaxpr_of


class NoShareError(Exception):
    """Why microbatches have no share in a loss."""


def flat(function: Callable, *arguments: Any) -> tuple[ClosedJaxpr, Any]:
    """A function as a jaxpr without calls of others, and the shapes of what it returns.

    Args:
        function: of pytrees of arrays.
        arguments: arrays, or shapes.
    """
    closed, shapes = jaxpr_of(function, *arguments)
    inlined = jax.make_jaxpr(lambda *leaves: _inlined(closed, leaves))(*(_shape(var) for var in closed.jaxpr.invars))
    return inlined, shapes


def _inlined(closed: ClosedJaxpr, arguments: Sequence[Any]) -> list:
    jaxpr = closed.jaxpr
    values: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *arguments)))
    for equation in jaxpr.eqns:
        operands = [value_of(values, var) for var in equation.invars]
        inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
        results = _inlined(closed_of(inner), operands) if equation.primitive.name in CALLS else run_equation(equation, operands)
        values.update(zip(equation.outvars, results))
    return [value_of(values, var) for var in jaxpr.outvars]


def closed_of(jaxpr: Any) -> ClosedJaxpr:
    """A jaxpr with its constants, of which an open one has none."""
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(*opened(jaxpr))


def value_of(values: dict[Any, Any], var: Any) -> Any:
    """The value of a variable or a literal.

    Args:
        values: by variable.
        var: either.
    """
    return var.val if isinstance(var, Literal) else values[var]


def run_equation(equation: JaxprEqn, operands: Sequence[Any]) -> list:
    """One equation on other operands.

    Args:
        equation: whichever.
        operands: arrays, one for each that it takes, literals too.
    """
    read = [place for place, var in enumerate(equation.invars) if isinstance(var, Var)]
    changed = any(operands[place] is not var.val for place, var in enumerate(equation.invars) if isinstance(var, Literal))
    if changed or len({equation.invars[place] for place in read}) < len(read):
        equation = equation.replace(invars=[_like(var) for var in equation.invars])
        read = list(range(len(operands)))
    return jaxpr_as_fun(ClosedJaxpr(_jaxpr_of(equation, [equation.invars[place] for place in read]), ()))(
        *(operands[place] for place in read)
    )


def _like(var: Any) -> Var:
    (fresh,) = jax.make_jaxpr(lambda value: value)(_shape(var)).jaxpr.invars
    return fresh


def _jaxpr_of(equation: JaxprEqn, invars: list) -> Jaxpr:
    base = _EMPTY.jaxpr
    debug = base.debug_info._replace(arg_names=("",) * len(invars), result_paths=("",) * len(equation.outvars))
    return base.replace(
        eqns=[equation], invars=invars, outvars=list(equation.outvars), constvars=(), debug_info=debug, effects=equation.effects
    )


_EMPTY = jax.make_jaxpr(lambda: ())()


def _shape(var: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype, weak_type=getattr(var.aval, "weak_type", False))


def shape_of(var: Any) -> tuple[int, ...]:
    """The shape of a variable, () of what has none."""
    return tuple(getattr(var.aval, "shape", ()))


def differing_dims(ours: Any, theirs: Any) -> list[int]:
    """The dimensions in which two variables differ.

    Args:
        ours: of the part's trace.
        theirs: of the whole one.
    """
    return [dim for dim, (one, other) in enumerate(zip(shape_of(ours), shape_of(theirs))) if one != other]


def pairs(part: Jaxpr, whole: Jaxpr) -> Iterator[tuple[JaxprEqn, JaxprEqn | None]]:
    """Equations of a part's trace with those of the whole one; a single row may do without a change of shape, or need one.

    Args:
        part: the trace of some rows.
        whole: the trace of all.
    """
    theirs = list(whole.eqns)
    place = 0
    for ours in part.eqns:
        name = ours.primitive.name
        if name in _SHAPING:
            if place < len(theirs) and theirs[place].primitive.name == name:
                yield ours, theirs[place]
                place += 1
            else:
                yield ours, None
            continue
        while place < len(theirs) and theirs[place].primitive.name in _SHAPING:
            place += 1
        if place == len(theirs) or theirs[place].primitive.name != name:
            raise NoShareError("what it computes depends on how many rows a batch has")
        yield ours, theirs[place]
        place += 1
    if any(equation.primitive.name not in _SHAPING for equation in theirs[place:]):
        raise NoShareError("what it computes depends on how many rows a batch has")


def tied(equation: JaxprEqn, what: str) -> str:
    """In words, which layer does what to the rows of a batch.

    Args:
        equation: of the layer.
        what: a verb and its object.
    """
    layer = layer_of(str(equation.source_info.name_stack))
    return f"{f'layer {layer!r}' if layer else 'its loss'} {what} ({equation.primitive.name})"


CALLS = ("jit", "pjit", "closed_call", "core_call")
_SHAPING = ("broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose", "copy")
