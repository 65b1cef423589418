"""Equations that hold other jaxprs, read alike whatever JAX traced them. JAX is not imported.

A form that is not known is no error: the equation is then an operation like any other, of a primitive that is not known.
"""

from dataclasses import dataclass
from typing import Any

_CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")
_MORE_THAN_CALLS = ("scan", "while", "cond")
_UNREADABLE = (AttributeError, KeyError, TypeError, ValueError)


def opened(jaxpr) -> tuple[Any, Any]:
    """A jaxpr and its constants. Since JAX 0.11 jaxprs carry theirs; before, a ClosedJaxpr held both."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def called(equation) -> Any:
    """The jaxpr that an equation does nothing but call, None where there is none."""
    found = [value for name, value in equation.params.items() if name in _CALLS and hasattr(getattr(value, "jaxpr", value), "eqns")]
    if len(found) != 1 or equation.primitive.name in _MORE_THAN_CALLS:
        return None
    jaxpr = getattr(found[0], "jaxpr", found[0])
    inner = [[getattr(var.aval, "shape", ()) for var in side] for side in (jaxpr.invars, jaxpr.outvars)]
    outer = [[getattr(var.aval, "shape", ()) for var in side] for side in (equation.invars, equation.outvars)]
    return found[0] if inner == outer else None


@dataclass(frozen=True, kw_only=True)
class Scan:
    """A loop of known length. Operands: those that every turn reads, those that are carried, those cut into slices.

    Attributes:
        length: turns.
        fixed: how many operands every turn reads whole.
        carried: how many operands, and first results, are carried from turn to turn.
        body: the jaxpr of a turn.
    """

    length: int
    fixed: int
    carried: int
    body: Any


def read_scan(equation) -> Scan | None:
    """The loop of a `scan`, None where the equation is none. JAX 0.11 put trees of the operands in the place of two counts."""
    params = equation.params
    if equation.primitive.name != "scan":
        return None
    try:
        if "ft_in" in params:
            fixed, carried, _ = map(len, params["ft_in"].unpack())
        else:
            fixed, carried = params["num_consts"], params["num_carry"]
        return Scan(length=params["length"], fixed=fixed, carried=carried, body=params["jaxpr"])
    except _UNREADABLE:
        return None


@dataclass(frozen=True, kw_only=True)
class While:
    """A loop of a length that depends on values. Its operands are those of the test, those of the body, and those that are carried.

    Attributes:
        test, body: jaxprs.
        test_fixed, body_fixed: how many operands each reads beside what is carried.
    """

    test: Any
    body: Any
    test_fixed: int
    body_fixed: int


def read_while(equation) -> While | None:
    """The loop of a `while`, None where the equation is none."""
    params = equation.params
    if equation.primitive.name != "while":
        return None
    try:
        test, body = params["cond_jaxpr"], params["body_jaxpr"]
        return While(test=test, body=body, test_fixed=params["cond_nconsts"], body_fixed=params["body_nconsts"])
    except _UNREADABLE:
        return None


def read_branches(equation) -> tuple:
    """The jaxprs of a `cond`, none where the equation is none."""
    branches = equation.params.get("branches") if equation.primitive.name == "cond" else None
    return branches if isinstance(branches, tuple) else ()
