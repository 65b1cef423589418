"""What a microbatch has to do with the loss of its batch: one program, run on some of the rows.

A microbatch runs the program of the whole batch. What that draws, the rows get that belong to them. What it divides by, counts of rows
among it, is the whole batch's; so a sum over the rows of a microbatch is its *share*, and shares add up. What has nothing to do with rows,
such as a penalty on kernels, is the same in every microbatch and counts by its rows. A sum that something not linear is made of ties
rows together: one that depends on data alone, such as how many positions a mask leaves, is computed for the whole batch beforehand; any
other, such as the mean of a BatchNorm, can be taken of a microbatch only.

All of that follows from two traces, for all rows and for some: where they differ, there are rows.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun

from parafit.support.jaxprs import opened, read_branches, read_scan
from parafit.techniques.draws import bits_of_rows, places_of_rows
from parafit.tracing.scopes import layer_of
from parafit.tracing.trace import jaxpr_of


class NoShareError(Exception):
    """Why microbatches have no share in a loss."""


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


def flat(function: Callable, *arguments: Any) -> tuple[ClosedJaxpr, Any]:
    """A function as a jaxpr without calls of others, and the shapes of what it returns."""
    closed, shapes = jaxpr_of(function, *arguments)
    inlined = jax.make_jaxpr(lambda *leaves: _inlined(closed, leaves))(*(_shape(var) for var in closed.jaxpr.invars))
    return inlined, shapes


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


_Fix = Callable[[Any, "_Given"], Any]


@dataclass(frozen=True)
class _Given:
    """What a microbatch is told: its row numbers, and values of the whole batch."""

    numbers: jax.Array
    known: Sequence[Any]


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
            kind = "rows" if _shape_of(ours) != _shape_of(theirs) else "same"
            self._kinds[ours], self._partners[ours] = Kind(kind, learned=number < weights), theirs
        self._turns = [self._turn(ours, theirs) for ours, theirs in _pairs(part.jaxpr, whole.jaxpr)]
        self.results = [self._kind(ours, theirs) for ours, theirs in zip(part.jaxpr.outvars, whole.jaxpr.outvars)]

    def run(self, arguments: Sequence[Any], numbers: jax.Array, known: Sequence[Any]) -> list:
        jaxpr, given = self._part.jaxpr, _Given(numbers, known)
        values: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*self._part.consts, *arguments)))
        for turn in self._turns:
            operands = [_value(values, var) for var in turn.equation.invars]
            for place, fix in turn.operands.items():
                operands[place] = fix(operands[place], given)
            results = turn.form(operands, given) if turn.form else _run(turn.equation, operands)
            for place, fix in turn.results.items():
                results[place] = fix(results[place], given)
            values.update(zip(turn.equation.outvars, results))
        return [_value(values, var) for var in jaxpr.outvars]

    def _turn(self, ours: JaxprEqn, theirs: JaxprEqn | None) -> _Turn:
        turn = _Turn(ours)
        if theirs is None:  # a change of shape that one row needs not, or needs
            kinds = [self._kind(var) for var in ours.invars]
            self._note(ours, None, [_joined(kinds)] * len(ours.outvars))
            return turn
        for place, (one, other) in enumerate(zip(ours.invars, theirs.invars)):
            self._take_constant(turn, place, one, other)
        kinds = [self._kind(one, other) for one, other in zip(ours.invars, theirs.invars)]
        differing = [_differing(one, other) for one, other in zip(ours.outvars, theirs.outvars)]
        if _draws_differ(ours, theirs):
            self._draw(turn, theirs, kinds)
        if any(kind.of == "sum" for kind in kinds):
            if self._stays_sum(turn, theirs, kinds, any(differing)):
                self._note(ours, theirs, [replace(_joined(kinds), of="sum")] * len(ours.outvars))
                return turn
            kinds = [self._resolved(turn, place, kind) for place, kind in enumerate(kinds)]
        self._note(ours, theirs, [self._result(turn, theirs, kinds, place) for place in range(len(differing))])
        return turn

    def _kind(self, var: Any, partner: Any = None) -> Kind:
        kind = Kind("same") if isinstance(var, Literal) else self._kinds.get(var, Kind("same"))
        differs = partner is not None and _shape_of(var) != _shape_of(partner)
        return replace(kind, of="rows") if differs and kind.of in ("same", "own") else kind

    def _note(self, ours: JaxprEqn, theirs: JaxprEqn | None, kinds: Sequence[Kind]) -> None:
        self._kinds.update(zip(ours.outvars, kinds))
        if theirs is not None:
            self._partners.update(zip(ours.outvars, theirs.outvars))

    def _take_constant(self, turn: _Turn, place: int, ours: Any, theirs: Any) -> None:
        """Counts of rows are those of the whole batch."""
        if _shape_of(ours) != _shape_of(theirs):
            return
        known = theirs.val if isinstance(theirs, Literal) else self._constants.get(theirs)
        if known is not None and (isinstance(ours, Literal) or ours in self._part.jaxpr.constvars):
            turn.operands[place] = lambda _, given, known=known: known

    def _draw(self, turn: _Turn, theirs: JaxprEqn, kinds: list[Kind]) -> None:
        """Random numbers of the whole batch, of its rows."""
        turn.form = _drawing(turn.equation, theirs, self._rows, self._some)

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
        partner = self._partners.get(var)
        if not kind.learned and isinstance(partner, Var) and _shape_of(partner) == _shape_of(var):
            turn.operands[place] = self._of_whole(partner)
            return Kind("same", why=kind.why)
        turn.operands[place] = lambda value, given: _times(value, self._rows / self._some)
        return Kind("own", learned=kind.learned, why=kind.why or _tied(turn.equation, "uses a sum over all rows"))

    def _of_whole(self, var: Var) -> _Fix:
        if var not in self.known:
            self.known.append(var)
        number = self.known.index(var)
        return lambda _, given: given.known[number]

    def _result(self, turn: _Turn, theirs: JaxprEqn, kinds: list[Kind], place: int) -> Kind:
        ours, partner = turn.equation.outvars[place], theirs.outvars[place]
        joined = _joined(kinds)
        if differing := _differing(ours, partner):
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
        return replace(joined, of="own", why=joined.why or _tied(turn.equation, "reduces all rows"))

    def _count_again(self, turn: _Turn, theirs: JaxprEqn, place: int, once: int) -> None:
        """Rows that were compared with each other are summed more than once: over rows that a whole batch has more of."""
        times = _summed_dims(turn.equation, theirs) - once
        if times > 0:
            turn.results[place] = lambda value, given: _times(value, (self._rows / self._some) ** times)

    def _why_tied(self, ours: JaxprEqn, theirs: JaxprEqn, result: Var, partner: Var, differing: list[int]) -> str:
        """Why rows of a result depend on other rows, as far as the shapes tell."""
        shape, whole = _shape_of(result), _shape_of(partner)
        if len(differing) > 1:
            return _tied(ours, "compares rows with each other")
        if shape[differing[0]] * self._rows != whole[differing[0]] * self._some:
            return _tied(ours, "leaves rows out")
        if ours.primitive.name in ("random_fold_in", "random_seed"):
            return _tied(ours, "makes random keys of row numbers")
        if _runs_along(ours, theirs):
            return _tied(ours, "runs along the rows")
        return ""


def _inlined(closed: ClosedJaxpr, arguments: Sequence[Any]) -> list:
    jaxpr = closed.jaxpr
    values: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *arguments)))
    for equation in jaxpr.eqns:
        operands = [_value(values, var) for var in equation.invars]
        inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
        results = _inlined(_closed(inner), operands) if equation.primitive.name in _CALLS else _run(equation, operands)
        values.update(zip(equation.outvars, results))
    return [_value(values, var) for var in jaxpr.outvars]


def _closed(jaxpr: Any) -> ClosedJaxpr:
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(*opened(jaxpr))


def _value(values: dict[Any, Any], var: Any) -> Any:
    return var.val if isinstance(var, Literal) else values[var]


def _run(equation: JaxprEqn, operands: Sequence[Any]) -> list:
    """One equation on other operands."""
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


def _shape_of(var: Any) -> tuple[int, ...]:
    return tuple(getattr(var.aval, "shape", ()))


def _differing(ours: Any, theirs: Any) -> list[int]:
    """The dimensions in which two variables differ."""
    return [dim for dim, (one, other) in enumerate(zip(_shape_of(ours), _shape_of(theirs))) if one != other]


def _pairs(part: Jaxpr, whole: Jaxpr) -> Iterator[tuple[JaxprEqn, JaxprEqn | None]]:
    """Equations of a part's trace with those of the whole one; a single row may do without a change of shape, or need one."""
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
    return len(set(summed) & set(_differing(ours.invars[0], theirs.invars[0])))


def _floats(equation: JaxprEqn) -> bool:
    """Whether a conversion keeps numbers as they are: one to whole numbers or truth values is not linear."""
    one, other = (var.aval.dtype for var in (equation.invars[0], equation.outvars[0]))
    return one == other or jnp.issubdtype(other, jnp.inexact) or (jnp.issubdtype(one, jnp.integer) and jnp.issubdtype(other, jnp.integer))


def _runs_along(ours: JaxprEqn, theirs: JaxprEqn) -> bool:
    """Whether an operation goes from row to row."""
    differing = _differing(ours.invars[0], theirs.invars[0]) if ours.invars else []
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


def _tied(equation: JaxprEqn, what: str) -> str:
    layer = layer_of(str(equation.source_info.name_stack))
    return f"{f'layer {layer!r}' if layer else 'its loss'} {what} ({equation.primitive.name})"


def _needed(whole: ClosedJaxpr, wanted: Sequence[Var]) -> ClosedJaxpr:
    """The part of a trace that some of its values need."""
    needed, equations = set(wanted), []
    for equation in reversed(whole.jaxpr.eqns):
        if any(var in needed for var in equation.outvars):
            equations.append(equation)
            needed |= {var for var in equation.invars if isinstance(var, Var)}
    debug = whole.jaxpr.debug_info._replace(result_paths=("",) * len(wanted))
    return ClosedJaxpr(whole.jaxpr.replace(eqns=equations[::-1], outvars=list(wanted), debug_info=debug), whole.consts)


# Random numbers -----------------------------------------------------------------------------------------------------------------------


def _draws_differ(ours: JaxprEqn, theirs: JaxprEqn) -> bool:
    """Whether an equation draws, at any depth, other numbers for a part than for the whole."""
    if ours.primitive.name in _DRAWS:
        return ours.params["shape"] != theirs.params["shape"]
    return any(_draws_differ(one, other) for one, other in _inner_pairs(ours, theirs) if other is not None)


def _inner_pairs(ours: JaxprEqn, theirs: JaxprEqn) -> Iterator[tuple[JaxprEqn, JaxprEqn | None]]:
    for one, other in zip(_inner(ours), _inner(theirs)):
        if any(equation.primitive.name in _DRAWS or _inner(equation) for equation in one.eqns):
            yield from _pairs(one, other)


def _inner(equation: JaxprEqn) -> list[Jaxpr]:
    values = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda value: isinstance(value, Jaxpr | ClosedJaxpr))
    return [opened(value)[0] for value in values if isinstance(value, Jaxpr | ClosedJaxpr)]


def _drawing(ours: JaxprEqn, theirs: JaxprEqn, rows: int, some: int) -> Callable:
    """`(operands, given) -> results` of an equation whose draws are rows of the whole batch's."""
    name = ours.primitive.name
    if name in _DRAWS:
        return _drawn(ours, theirs, rows, some)
    if name in _CALLS:
        inner = _redrawn(_body(ours), _body(theirs), rows, some)
        return lambda operands, given: inner(operands, given)
    if name in ("checkpoint", "remat", "remat2"):
        inner, params = _redrawn(_body(ours), _body(theirs), rows, some), ours.params
        options = {"prevent_cse": params.get("prevent_cse", True), "policy": params.get("policy")}
        return lambda operands, given: jax.checkpoint(lambda *values: inner(values, given), **options)(*operands)
    if (loop := read_scan(ours)) is not None and loop.length == theirs.params["length"]:
        return _scanning(ours, loop, _redrawn(_closed(loop.body), _body(theirs), rows, some))
    if branches := read_branches(ours):
        forms = [_redrawn(_closed(one), _closed(other), rows, some) for one, other in zip(branches, read_branches(theirs))]
        return lambda operands, given: jax.lax.switch(
            operands[0], [lambda *values, form=form: form(values, given) for form in forms], *operands[1:]
        )
    again = ", again and again until all have what they need" if ours.primitive.name == "while" else ""
    raise NoShareError(_tied(ours, f"draws random numbers for all rows of a batch{again}"))


def _scanning(equation: JaxprEqn, loop: Any, body: Callable) -> Callable:
    def form(operands, given):
        fixed, rest = operands[: loop.fixed], operands[loop.fixed :]

        def turn(carry, slices):
            results = body([*fixed, *carry, *slices], given)
            return results[: loop.carried], results[loop.carried :]

        options = {"length": loop.length, "reverse": equation.params["reverse"], "unroll": equation.params["unroll"]}
        carry, collected = jax.lax.scan(turn, list(rest[: loop.carried]), list(rest[loop.carried :]), **options)
        return [*carry, *collected]

    return form


def _body(equation: JaxprEqn) -> ClosedJaxpr:
    return _closed(equation.params.get("jaxpr", equation.params.get("call_jaxpr")))


def _redrawn(part: ClosedJaxpr, whole: ClosedJaxpr, rows: int, some: int) -> Callable:
    """`(operands, given) -> results` of a jaxpr, its draws rows of the whole batch's."""
    forms = [
        (ours, _drawing(ours, theirs, rows, some) if theirs is not None and _draws_differ(ours, theirs) else None)
        for ours, theirs in _pairs(part.jaxpr, whole.jaxpr)
    ]

    def run(operands, given):
        values: dict[Any, Any] = dict(zip((*part.jaxpr.constvars, *part.jaxpr.invars), (*part.consts, *operands)))
        for equation, form in forms:
            read = [_value(values, var) for var in equation.invars]
            values.update(zip(equation.outvars, form(read, given) if form else _run(equation, read)))
        return [_value(values, var) for var in part.jaxpr.outvars]

    return run


def _drawn(ours: JaxprEqn, theirs: JaxprEqn, rows: int, some: int) -> Callable:
    shape, whole = ours.params["shape"], theirs.params["shape"]
    differing = [dim for dim, (one, other) in enumerate(zip(shape, whole)) if one != other]
    if (
        len(shape) != len(whole)
        or len(differing) != 1
        or any(whole[dim] * some != shape[dim] * rows or whole[dim] % rows for dim in differing)
    ):
        raise NoShareError(_tied(ours, f"draws {whole} random numbers for {rows} rows and {shape} for {some} of them"))
    (dim,) = differing
    if ours.primitive.name == "random_bits" and ours.invars[0].aval.ndim == 0:
        width = ours.params["bit_width"]
        return lambda operands, given: [bits_of_rows(operands[0], given.numbers, shape=whole, dim=dim, rows=rows, bit_width=width)]
    axis = ours.invars[0].aval.ndim + dim
    equation = theirs

    def form(operands, given):
        (drawn,) = _run(equation, operands)
        return [jnp.take(drawn, places_of_rows(given.numbers, whole[dim] // rows), axis=axis)]

    return form


_DRAWS = ("random_bits", "random_split")
_CALLS = ("jit", "pjit", "closed_call", "core_call")
_SHAPING = ("broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose", "copy")
_LINEAR = {
    "broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose", "copy", "copy_p", "neg", "convert_element_type",
    "reduce_sum", "slice", "rev", "stop_gradient", "sharding_constraint", "real", "imag", "optimization_barrier", "reduce_precision",
}  # fmt: skip
_ADDITIVE = {"add", "sub", "add_any", "concatenate", "select_n", "pad"}
_ALONG = {"sort", "rev", "cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "top_k"}
