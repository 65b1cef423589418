"""What a microbatch has to do with the loss of its batch: one program, run on some of the rows.

A microbatch runs the program of the whole batch. What that draws, the rows get that belong to them. What it divides by, counts of rows
among it, is the whole batch's; so a sum over the rows of a microbatch is its *share*, and shares add up. What has nothing to do with rows,
such as a penalty on kernels, is the same in every microbatch and counts by its rows. A sum that something not linear is made of ties
rows together: one that depends on data alone, such as how many positions a mask leaves, is computed for the whole batch beforehand; any
other, such as the mean of a BatchNorm, can be taken of a microbatch only.

All of that follows from two traces, for all rows and for some: where they differ, there are rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var

from parafit.support.jaxprs import read_scan
from parafit.techniques.draws import Given, drawing, draws_differ
from parafit.techniques.traces import differing_dims, pairs, run_equation, shape_of, tied, value_of


@dataclass(frozen=True)
class Kind:
    """What a value of a microbatch is of the whole batch's.

    Attributes:
        of: "same" as there; some "rows" of it; a share of it that adds to those of other microbatches: a "sum"; its "own", which
            a batch of nothing but such rows would have.
        learned: whether it depends on weights.
        why: what ties it to rows of other microbatches, "" where nothing does.
    """

    of: str
    learned: bool = False
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Share:
    """A loss of a batch, run on some of its rows.

    Attributes:
        kinds: of what it gives.
        needs: what it takes of the whole batch, to be computed beforehand: a jaxpr of the flat arguments.
        run: `(flat arguments, row numbers, what it needs) -> flat results`.
    """

    kinds: list[Kind]
    needs: ClosedJaxpr
    run: Callable[[Sequence[Any], jax.Array, Sequence[Any]], list]


def share(whole: ClosedJaxpr, part: ClosedJaxpr, *, weights: int, rows: int, some: int) -> Share:
    """What some rows do for the loss of a batch.

    Args:
        whole: of `flat`, for the whole batch.
        part: for some rows of it.
        weights: how many of the arguments are weights.
        rows: of the batch.
        some: rows of the part.

    Raises:
        NoShareError: the two are not the same program; why.
    """
    reading = _Reading(whole, part, weights=weights, rows=rows, some=some)
    return Share(kinds=reading.results, needs=_needed(whole, reading.known), run=reading.run)


_Fix = Callable[[Any, Given], Any]


@dataclass
class _Turn:
    """An equation of the part, with what is done to its operands and its results, and what is run in its place."""

    equation: JaxprEqn
    operands: dict[int, _Fix] = field(default_factory=dict)
    results: dict[int, _Fix] = field(default_factory=dict)
    form: Callable | None = None


class _Reading:
    """Reads two traces side by side."""

    def __init__(self, whole: ClosedJaxpr, part: ClosedJaxpr, *, weights: int, rows: int, some: int):
        self._rows, self._some, self._part = rows, some, part
        self.known: list[Var] = []
        self._kinds: dict[Var, Kind] = {}
        self._partners: dict[Var, Any] = {}
        self._constants = dict(zip(whole.jaxpr.constvars, whole.consts))
        for number, (ours, theirs) in enumerate(zip(part.jaxpr.invars, whole.jaxpr.invars)):
            kind = "rows" if shape_of(ours) != shape_of(theirs) else "same"
            self._kinds[ours], self._partners[ours] = Kind(kind, learned=number < weights), theirs
        self._turns = [self._turn(ours, theirs) for ours, theirs in pairs(part.jaxpr, whole.jaxpr)]
        self.results = [self._kind(ours, theirs) for ours, theirs in zip(part.jaxpr.outvars, whole.jaxpr.outvars)]

    def run(self, arguments: Sequence[Any], numbers: jax.Array, known: Sequence[Any]) -> list:
        jaxpr, given = self._part.jaxpr, Given(numbers, known)
        values: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*self._part.consts, *arguments)))
        for turn in self._turns:
            operands = [value_of(values, var) for var in turn.equation.invars]
            for place, fix in turn.operands.items():
                operands[place] = fix(operands[place], given)
            results = turn.form(operands, given) if turn.form else run_equation(turn.equation, operands)
            for place, fix in turn.results.items():
                results[place] = fix(results[place], given)
            values.update(zip(turn.equation.outvars, results))
        return [value_of(values, var) for var in jaxpr.outvars]

    def _turn(self, ours: JaxprEqn, theirs: JaxprEqn | None) -> _Turn:
        turn = _Turn(ours)
        if theirs is None:  # a change of shape that one row needs not, or needs
            kinds = [self._kind(var) for var in ours.invars]
            self._note(ours, None, [_joined(kinds)] * len(ours.outvars))
            return turn
        for place, (one, other) in enumerate(zip(ours.invars, theirs.invars)):
            self._take_constant(turn, place, one, other)
        kinds = [self._kind(one, other) for one, other in zip(ours.invars, theirs.invars)]
        differing = [differing_dims(one, other) for one, other in zip(ours.outvars, theirs.outvars)]
        if draws_differ(ours, theirs):
            turn.form = drawing(ours, theirs, self._rows, self._some)
        if any(kind.of == "sum" for kind in kinds):
            if self._stays_sum(turn, theirs, kinds, any(differing)):
                self._note(ours, theirs, [replace(_joined(kinds), of="sum")] * len(ours.outvars))
                return turn
            kinds = [self._resolved(turn, place, kind) for place, kind in enumerate(kinds)]
        self._note(ours, theirs, [self._result(turn, theirs, kinds, place) for place in range(len(differing))])
        return turn

    def _kind(self, var: Any, partner: Any = None) -> Kind:
        kind = Kind("same") if isinstance(var, Literal) else self._kinds.get(var, Kind("same"))
        differs = partner is not None and shape_of(var) != shape_of(partner)
        return replace(kind, of="rows") if differs and kind.of in ("same", "own") else kind

    def _note(self, ours: JaxprEqn, theirs: JaxprEqn | None, kinds: Sequence[Kind]) -> None:
        self._kinds.update(zip(ours.outvars, kinds))
        if theirs is not None:
            self._partners.update(zip(ours.outvars, theirs.outvars))

    def _take_constant(self, turn: _Turn, place: int, ours: Any, theirs: Any) -> None:
        """Counts of rows are those of the whole batch."""
        if shape_of(ours) != shape_of(theirs):
            return
        known = theirs.val if isinstance(theirs, Literal) else self._constants.get(theirs)
        if known is not None and (isinstance(ours, Literal) or ours in self._part.jaxpr.constvars):
            turn.operands[place] = lambda _, given, known=known: known

    def _stays_sum(self, turn: _Turn, theirs: JaxprEqn, kinds: list[Kind], differs: bool) -> bool:
        """Whether an operation on shares gives shares; what has no rows then counts by rows."""
        name, sums = turn.equation.primitive.name, [kind.of == "sum" for kind in kinds]
        if differs or any(kind.of == "rows" for kind in kinds):
            return False
        if name in _ADDITIVE and not (name == "select_n" and sums[0]):
            others = [place for place, is_sum in enumerate(sums) if not is_sum and not (name == "select_n" and place == 0)]
            if not all(jnp.issubdtype(turn.equation.invars[place].aval.dtype, jnp.inexact) for place in others):
                return False  # a whole number has no share
            for place in others:
                self._scale(turn, place)
            return True
        if name in ("mul", "dot_general"):
            return sum(sums) == 1
        if name == "div":
            return sums == [True, False]
        return name in _LINEAR and _floats(turn.equation)

    def _scale(self, turn: _Turn, place: int) -> None:
        before, factor = turn.operands.get(place), self._some / self._rows
        turn.operands[place] = lambda value, given: _times(before(value, given) if before else value, factor)

    def _resolved(self, turn: _Turn, place: int, kind: Kind) -> Kind:
        """A share that something not linear is made of: what it is of the whole batch, where that can be known, else of this part."""
        if kind.of != "sum":
            return kind
        var = turn.equation.invars[place]
        partner = self._partners.get(var) if isinstance(var, Var) else None
        if not kind.learned and isinstance(partner, Var) and shape_of(partner) == shape_of(var):
            turn.operands[place] = self._of_whole(partner)
            return Kind("same", why=kind.why)
        turn.operands[place] = lambda value, given: _times(value, self._rows / self._some)
        return Kind("own", learned=kind.learned, why=kind.why or tied(turn.equation, "uses a sum over all rows"))

    def _of_whole(self, var: Var) -> _Fix:
        if var not in self.known:
            self.known.append(var)
        number = self.known.index(var)
        return lambda _, given: given.known[number]

    def _result(self, turn: _Turn, theirs: JaxprEqn, kinds: list[Kind], place: int) -> Kind:
        ours, partner = turn.equation.outvars[place], theirs.outvars[place]
        joined = _joined(kinds)
        if differing := differing_dims(ours, partner):
            why = joined.why or self._why_tied(turn.equation, theirs, ours, partner, differing)
            self._count_again(turn, theirs, place, 0)
            return replace(joined, of="rows", why=why)
        if joined.of != "rows":
            return joined
        if _sums(turn.equation):
            if turn.equation.primitive.name.startswith("scatter") and kinds[0].of != "rows":
                self._scale(turn, 0)
            self._count_again(turn, theirs, place, 1)
            return replace(joined, of="sum")
        if not joined.learned:
            turn.results[place] = self._of_whole(partner)
            return Kind("same", why=joined.why)
        return replace(joined, of="own", why=joined.why or tied(turn.equation, "reduces all rows"))

    def _count_again(self, turn: _Turn, theirs: JaxprEqn, place: int, once: int) -> None:
        """Rows that were compared with each other are summed more than once: over rows that a whole batch has more of."""
        times = _summed_dims(turn.equation, theirs) - once
        if times > 0:
            turn.results[place] = lambda value, given: _times(value, (self._rows / self._some) ** times)

    def _why_tied(self, ours: JaxprEqn, theirs: JaxprEqn, result: Var, partner: Var, differing: list[int]) -> str:
        """Why rows of a result depend on other rows, as far as the shapes tell."""
        shape, whole = shape_of(result), shape_of(partner)
        if len(differing) > 1:
            return tied(ours, "compares rows with each other")
        if shape[differing[0]] * self._rows != whole[differing[0]] * self._some:
            return tied(ours, "leaves rows out")
        if ours.primitive.name in ("random_fold_in", "random_seed"):
            return tied(ours, "makes random keys of row numbers")
        if _runs_along(ours, theirs):
            return tied(ours, "runs along the rows")
        return ""


def _joined(kinds: Sequence[Kind]) -> Kind:
    of = next((name for name in ("rows", "sum", "own") if any(kind.of == name for kind in kinds)), "same")
    return Kind(of, learned=any(kind.learned for kind in kinds), why=next((kind.why for kind in kinds if kind.why), ""))


def _sums(equation: JaxprEqn) -> bool:
    return equation.primitive.name in ("reduce_sum", "dot_general", "scatter-add", "scatter_add")


def _summed_dims(ours: JaxprEqn, theirs: JaxprEqn) -> int:
    """How many dimensions of rows are summed over."""
    if ours.primitive.name not in ("reduce_sum", "dot_general"):
        return 0
    params = ours.params
    summed = params["axes"] if ours.primitive.name == "reduce_sum" else params["dimension_numbers"][0][0]
    return len(set(summed) & set(differing_dims(ours.invars[0], theirs.invars[0])))


def _floats(equation: JaxprEqn) -> bool:
    """Whether a conversion keeps numbers as they are: one to whole numbers or truth values is not linear."""
    one, other = (var.aval.dtype for var in (equation.invars[0], equation.outvars[0]))
    return one == other or jnp.issubdtype(other, jnp.inexact) or (jnp.issubdtype(one, jnp.integer) and jnp.issubdtype(other, jnp.integer))


def _runs_along(ours: JaxprEqn, theirs: JaxprEqn) -> bool:
    """Whether an operation goes from row to row."""
    differing = differing_dims(ours.invars[0], theirs.invars[0]) if ours.invars else []
    params = ours.params
    if (loop := read_scan(ours)) is not None:
        return loop.length != theirs.params["length"] and loop.carried > 0
    if ours.primitive.name not in _ALONG:
        return False
    along = next(params[name] for name in ("dimensions", "dimension", "axis") if name in params)
    return bool(set(differing) & set(np.atleast_1d(along).tolist()))


def _times(value: Any, factor: float) -> Any:
    dtype = jnp.result_type(value)
    return value * jnp.asarray(factor, dtype) if jnp.issubdtype(dtype, jnp.inexact) else jnp.round(value * factor).astype(dtype)


def _needed(whole: ClosedJaxpr, wanted: Sequence[Var]) -> ClosedJaxpr:
    """The part of a trace that some of its values need."""
    needed, equations = set(wanted), []
    for equation in reversed(whole.jaxpr.eqns):
        if any(var in needed for var in equation.outvars):
            equations.append(equation)
            needed |= {var for var in equation.invars if isinstance(var, Var)}
    debug = whole.jaxpr.debug_info._replace(result_paths=("",) * len(wanted))
    return ClosedJaxpr(whole.jaxpr.replace(eqns=equations[::-1], outvars=list(wanted), debug_info=debug), whole.consts)


_LINEAR = {
    *("broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose", "tile", "slice", "split", "unstack", "rev", "copy", "copy_p"),
    *("neg", "convert_element_type", "reduce_precision", "real", "imag", "reduce_sum"),
    *("name", "stop_gradient", "sharding_constraint", "reshard", "device_put", "optimization_barrier"),
}
"""Operations that make shares of shares: a sum of what they make of parts is what they make of the sum."""
_ADDITIVE = {"add", "sub", "add_any", "concatenate", "stack", "select_n", "pad"}
_ALONG = {"sort", "rev", "cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "top_k"}
