"""No array of a program is split unevenly.

XLA fills up what an axis does not divide, and at times counts the filling: scatters add it to row 0 as soon as the mesh has a second axis,
and the gradients of `sort` and `take` abort the process (JAX 0.10, both partitioners). What enters and leaves a step is split
evenly by `Placement`; here the arrays in between are. XLA spreads the splits that it is given from array to array, through slices,
concatenations and reshapes too, to dimensions that their axes do not divide: these are kept whole.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from parafit.planner.program import Leaf
from parafit.support.jaxprs import called, read_branches, read_scan, read_while
from parafit.tracing.dims import groups
from parafit.tracing.graph import Graph
from parafit.tracing.passes import Pass
from parafit.tracing.primitives import primitive_named
from parafit.tracing.values import Value


def evenly(closed: ClosedJaxpr, mesh: Mesh, *, given: Sequence[NamedSharding | None], left: Sequence[NamedSharding | None]) -> ClosedJaxpr:
    """`closed` with the dimensions kept whole that a split would reach and its axes do not divide; `closed` itself if it has none.

    Args:
        closed: a traced step.
        mesh: the devices.
        given: how its arguments are split.
        left: how its results will be.
    """
    return _Constrainer(mesh, _Reach(closed, given, left)).closed(closed)


class _Reach(Graph):
    """A graph that finds out which mesh axes may come to split which dimension.

    A split passes between dimensions that the graph ties, and between those that an operation cuts or extends.
    """

    def __init__(self, closed: ClosedJaxpr, given: Sequence[NamedSharding | None], left: Sequence[NamedSharding | None]):
        self._dims_of: defaultdict[Any, list[list[int]]] = defaultdict(list)
        self._links: list[tuple[int, int]] = []
        self._splits: list[tuple[int, tuple[str, ...]]] = []
        state = Leaf(name="", role="state")
        super().__init__(closed, [state] * len(given), [state] * len(left))
        for value, sharding in (*zip(self.arguments, given), *((value, each) for (_, value), each in zip(self.results, left))):
            self._split(value, sharding)
        self._axes = self._spread()

    def axes(self, var: Any) -> list[frozenset[str]]:
        """For each dimension of a variable, the axes that may split it."""
        found = zip(*([self._axes.get(self._split_part(dim), frozenset()) for dim in dims] for dims in self._dims_of[var]))
        return [frozenset().union(*each) for each in found]

    def visited(self, equation, inputs: list[Value], outputs: list[Value]) -> None:
        for var, value in (*zip(equation.invars, inputs), *zip(equation.outvars, outputs)):
            if not isinstance(var, Literal):
                self._dims_of[var].append(value.dims)
        if equation.primitive.name == "sharding_constraint":
            self._split(outputs[0], equation.params["sharding"])
        self._links += [(inputs[side].dims[dim], outputs[result].dims[other]) for (side, dim), (result, other) in _passages(equation)]

    def _split(self, value: Value, sharding: NamedSharding | None) -> None:
        for dim, axes in zip(value.dims, sharding.spec if sharding else ()):
            if axes and axes is not PartitionSpec.UNCONSTRAINED:
                self._splits.append((dim, (axes,) if isinstance(axes, str) else axes))

    def _spread(self) -> Mapping[int, frozenset[str]]:
        """The axes that reach each part, over any number of links."""
        neighbours: defaultdict[int, set[int]] = defaultdict(set)
        for one, other in self._links:
            one, other = self._split_part(one), self._split_part(other)
            neighbours[one].add(other)
            neighbours[other].add(one)
        reached: defaultdict[int, frozenset[str]] = defaultdict(frozenset)
        waiting = [(self._split_part(dim), frozenset(axes)) for dim, axes in self._splits]
        while waiting:
            part, axes = waiting.pop()
            if not axes <= reached[part]:
                reached[part] |= axes
                waiting += [(neighbour, reached[part]) for neighbour in neighbours[part]]
        return reached

    def _split_part(self, dim: int) -> int:
        """What a split of a dimension splits: its outermost factor, or where the size is 1 and there is none, itself, as -1, -2, ..."""
        factor = self.dims.major(dim)
        return -1 - dim if factor is None else factor


class _Constrainer(Pass):
    """Puts constraints before and after the equations whose arrays might be split unevenly."""

    def __init__(self, mesh: Mesh, reach: _Reach):
        super().__init__()
        self._mesh, self._reach = mesh, reach
        self._constraints: dict[Any, JaxprEqn] = {}

    def equations(self, equation: JaxprEqn) -> list[JaxprEqn]:
        (equation,) = super().equations(equation)
        invars, outvars = list(equation.invars), list(equation.outvars)
        before, after = [], []
        for place, dims in self._needed_whole(equation).items():
            invars[place] = Var(equation.invars[place].aval)
            before.append(self._constraint(equation, equation.invars[place], invars[place], dims))
        for place, dims in enumerate(self._whole_results(equation)):
            if dims:
                var = equation.outvars[place]
                outvars[place] = Var(var.aval)
                after.append(self._constraint(equation, outvars[place], var, dims))
        return [*before, equation.replace(invars=invars, outvars=outvars) if before or after else equation, *after]

    def _needed_whole(self, equation: JaxprEqn) -> dict[int, set[int]]:
        """By operand, the dimensions that its results need whole: they make uneven ones, or the operation works along them."""
        uneven = self._whole_results(equation)
        needed: defaultdict[int, set[int]] = defaultdict(set)
        for (side, dim), (result, other) in _passages(equation):
            if other in uneven[result]:
                needed[side].add(dim)
        for side, dim in _along(equation):
            needed[side].add(dim)
        reached = {side: self._reach.axes(equation.invars[side]) for side in needed}
        whole = {side: {dim for dim in dims if reached[side] and reached[side][dim]} for side, dims in needed.items()}
        return {side: dims for side, dims in whole.items() if dims}

    def _whole_results(self, equation: JaxprEqn) -> list[list[int]]:
        """By result, the dimensions that axes may reach and must not split: they do not divide it, or XLA cannot make it in parts."""
        found = [self._uneven(var) for var in equation.outvars]
        if made_whole := _made_whole(equation):
            reached = self._reach.axes(equation.outvars[0])
            found[0] = sorted({*found[0], *(dim for dim in made_whole if reached and reached[dim])})
        return found

    def _uneven(self, var: Any) -> list[int]:
        """The dimensions that axes may reach and do not divide."""
        reached = zip(_shape(var), self._reach.axes(var))
        return [dim for dim, (size, axes) in enumerate(reached) if size % math.prod(self._mesh.shape[axis] for axis in axes)]

    def _constraint(self, equation: JaxprEqn, source: Any, target: Any, whole: Collection[int]) -> JaxprEqn:
        """`target` is `source` with some dimensions whole, the others as XLA splits them."""
        spec = PartitionSpec(*(None if dim in whole else PartitionSpec.UNCONSTRAINED for dim in range(len(_shape(source)))))
        key = _shape(source), source.aval.dtype, spec
        if key not in self._constraints:
            constrain = functools.partial(jax.lax.with_sharding_constraint, shardings=NamedSharding(self._mesh, spec))
            self._constraints[key] = jax.make_jaxpr(constrain)(jax.ShapeDtypeStruct(*key[:2])).eqns[0]
        return self._constraints[key].replace(invars=[source], outvars=[target], source_info=equation.source_info, ctx=equation.ctx)


Place = tuple[int, int]
"""Which operand or result of an equation, and which of its dimensions."""


def _passages(equation: JaxprEqn) -> Iterator[tuple[Place, Place]]:
    """Dimensions of operands and of results that a split passes between: before and after a cut, a window, a padding, a join."""
    name, params, operands = equation.primitive.name, equation.params, [_shape(var) for var in equation.invars]
    if _runs_others(equation) or not equation.outvars:
        return
    result = _shape(equation.outvars[0])
    if name in ("reshape", "squeeze", "expand_dims"):
        for old, new in groups(operands[0], result):
            yield from (((0, one), (0, other)) for one in old for other in new if len(old) > 1 < len(new))
    elif name == "conv_general_dilated":
        numbers = params["dimension_numbers"]
        yield from (((0, one), (0, other)) for one, other in zip(numbers.lhs_spec[2:], numbers.out_spec[2:]))
        yield from (((1, one), (0, other)) for one, other in zip(numbers.rhs_spec[2:], numbers.out_spec[2:]))
    elif name == "gather":
        numbers = params["dimension_numbers"]
        outside = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
        yield from (((0, one), (0, other)) for one, other in zip(_without(operands[0], outside), numbers.offset_dims))
    elif name.startswith("scatter"):
        numbers = params["dimension_numbers"]
        outside = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
        yield from (((2, one), (0, other)) for one, other in zip(numbers.update_window_dims, _without(result, outside)))
    elif name not in ("broadcast_in_dim", "transpose", "dot_general"):
        repeats = primitive_named(name).kind == "elementwise"  # a size of 1, as often as the other operand is long
        for side, shape in enumerate(operands):
            alike = [place for place, var in enumerate(equation.outvars) if len(_shape(var)) == len(shape)]
            dims = [dim for dim, size in enumerate(shape) if not repeats or size == result[dim]] if alike else []
            yield from (((side, dim), (place, dim)) for place in ([side] if name == "optimization_barrier" else alike) for dim in dims)


def _made_whole(equation: JaxprEqn) -> list[int]:
    """Dimensions of a result that XLA cannot make in parts, whatever divides them.

    A stack is put together of single rows. Paddings between elements, and those that cut off what a padding at the other end replaces,
    give wrong numbers or abort the process where the operand is whole (JAX 0.10).
    """
    params = equation.params
    if equation.primitive.name == "stack":
        return [params["axis"]]
    if equation.primitive.name == "pad":
        return [dim for dim, (low, high, between) in enumerate(params["padding_config"]) if between or min(low, high) < 0]
    return [dim for dim, dilation in enumerate(params.get("base_dilation") or ()) if dilation > 1]


def _along(equation: JaxprEqn) -> Iterator[Place]:
    """Dimensions of operands that an operation works along, by halves or as one; all of them where it is not known."""
    if _runs_others(equation):
        return
    if equation.primitive.name != "stack":
        yield from ((0, dim) for dim in _made_whole(equation))
    along = equation.params.get(_ALONG.get(equation.primitive.name, ""))
    for side, var in enumerate(equation.invars):
        rank = 0 if isinstance(var, Literal) else len(_shape(var))
        if primitive_named(equation.primitive.name).kind == "unknown":
            yield from ((side, dim) for dim in range(rank))
        elif rank and along is not None:
            yield side, along % rank


_ALONG = {
    "sort": "dimension",
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "top_k", "unstack"), "axis"),
}


def _runs_others(equation: JaxprEqn) -> bool:
    return bool(read_scan(equation) or read_while(equation) or read_branches(equation)) or called(equation) is not None


def _without(shape: Sequence[int], gone: Collection[int]) -> list[int]:
    return [dim for dim in range(len(shape)) if dim not in gone]


def _shape(var: Any) -> tuple[int, ...]:
    return getattr(var.aval, "shape", ())
