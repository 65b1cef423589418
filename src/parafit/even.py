"""No array of a program is split unevenly.

XLA fills up what an axis does not divide, and at times counts the filling: scatters add it to row 0 as soon as the mesh has a second axis,
and the gradients of `sort` and `take` abort the process (JAX 0.10 and 0.12, both partitioners). What enters and leaves a step is split
evenly by `mesh.Placement`; here the arrays in between are. XLA spreads the splits that it is given from array to array, through slices,
concatenations and reshapes too, to dimensions that their axes do not divide: these are kept whole.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from parafit.dims import groups
from parafit.jaxprs import called, read_branches, read_scan, read_while
from parafit.operations import behaviour
from parafit.rewrite.passes import Pass
from parafit.walk import Leaf, Value, Walk


def evenly(closed: ClosedJaxpr, mesh: Mesh, *, given: Sequence[NamedSharding | None], left: Sequence[NamedSharding | None]) -> ClosedJaxpr:
    """`closed` with the dimensions kept whole that a split would reach and its axes do not divide; `closed` itself if it has none.

    Args:
        closed: a traced step.
        mesh: the devices.
        given: how its arguments are split.
        left: how its results will be.
    """
    return _Constrainer(mesh, _Reach(closed, given, left)).closed(closed)


class _Reach(Walk):
    """A walk that finds out which mesh axes may come to split which dimension.

    A split passes between dimensions that the walk ties, and between those that an operation cuts or extends.
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
        found = zip(*([self._axes.get(self.dims.major(dim), frozenset()) for dim in dims] for dims in self._dims_of[var]))
        return [frozenset().union(*each) for each in found]

    def visited(self, equation, inputs: list[Value], outputs: list[Value]) -> None:
        for var, value in (*zip(equation.invars, inputs), *zip(equation.outvars, outputs)):
            if not isinstance(var, Literal):
                self._dims_of[var].append(value.dims)
        if equation.primitive.name == "sharding_constraint":
            self._split(outputs[0], equation.params["sharding"])
        if not _runs_others(equation):
            self._links += _changed(equation, [value.dims for value in inputs], [value.dims for value in outputs], self.dims.size)

    def _split(self, value: Value, sharding: NamedSharding | None) -> None:
        for dim, axes in zip(value.dims, sharding.spec if sharding else ()):
            if axes and axes is not PartitionSpec.UNCONSTRAINED:
                self._splits.append((dim, (axes,) if isinstance(axes, str) else axes))

    def _spread(self) -> Mapping[int | None, frozenset[str]]:
        """The axes that reach each outermost factor, over any number of links."""
        neighbours: defaultdict[int | None, set[int | None]] = defaultdict(set)
        for one, other in self._links:
            neighbours[self.dims.major(one)].add(self.dims.major(other))
            neighbours[self.dims.major(other)].add(self.dims.major(one))
        reached: defaultdict[int | None, frozenset[str]] = defaultdict(frozenset)
        waiting = [(self.dims.major(dim), frozenset(axes)) for dim, axes in self._splits]
        while waiting:
            factor, axes = waiting.pop()
            if factor is not None and not axes <= reached[factor]:
                reached[factor] |= axes
                waiting += [(neighbour, reached[factor]) for neighbour in neighbours[factor]]
        return reached


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
        for place, var in enumerate(equation.invars):
            if needed := _needed_whole(equation, var):
                reached = self._reach.axes(var)
                if whole := [dim for dim in needed if reached[dim]]:
                    invars[place] = Var(var.aval)
                    before.append(self._constraint(equation, var, invars[place], whole))
        for place, var in enumerate(equation.outvars):
            if whole := self._uneven(var):
                outvars[place] = Var(var.aval)
                after.append(self._constraint(equation, outvars[place], var, whole))
        return [*before, equation.replace(invars=invars, outvars=outvars) if before or after else equation, *after]

    def _uneven(self, var: Any) -> list[int]:
        """The dimensions that axes may reach and do not divide."""
        reached = zip(_shape(var), self._reach.axes(var))
        return [dim for dim, (size, axes) in enumerate(reached) if size % math.prod(self._mesh.shape[axis] for axis in axes)]

    def _constraint(self, equation: JaxprEqn, source: Any, target: Any, whole: Sequence[int]) -> JaxprEqn:
        """`target` is `source` with some dimensions whole, the others as XLA splits them."""
        spec = PartitionSpec(*(None if dim in whole else PartitionSpec.UNCONSTRAINED for dim in range(len(_shape(source)))))
        key = _shape(source), source.aval.dtype, spec
        if key not in self._constraints:
            constrain = functools.partial(jax.lax.with_sharding_constraint, shardings=NamedSharding(self._mesh, spec))
            self._constraints[key] = jax.make_jaxpr(constrain)(jax.ShapeDtypeStruct(*key[:2])).eqns[0]
        return self._constraints[key].replace(invars=[source], outvars=[target], source_info=equation.source_info, ctx=equation.ctx)


def _changed(equation: JaxprEqn, inputs: list[list[int]], outputs: list[list[int]], size) -> Iterator[tuple[int, int]]:
    """Pairs of dimensions of different size that a split may pass between: before and after a cut, a window, a padding, a join."""
    name, params = equation.primitive.name, equation.params
    if name in ("reshape", "squeeze", "expand_dims"):
        for old, new in groups(list(map(size, inputs[0])), list(map(size, outputs[0]))):
            yield from ((inputs[0][one], outputs[0][other]) for one in old for other in new if len(old) > 1 < len(new))
    elif name == "conv_general_dilated":
        numbers = params["dimension_numbers"]
        yield from zip([inputs[0][dim] for dim in numbers.lhs_spec], [outputs[0][dim] for dim in numbers.out_spec])
        yield from zip([inputs[1][dim] for dim in numbers.rhs_spec[2:]], [outputs[0][dim] for dim in numbers.out_spec[2:]])
    elif name == "gather":
        outside = {*params["dimension_numbers"].collapsed_slice_dims, *params["dimension_numbers"].operand_batching_dims}
        windows = [dim for place, dim in enumerate(inputs[0]) if place not in outside]
        yield from zip(windows, [outputs[0][place] for place in params["dimension_numbers"].offset_dims])
    elif name.startswith("scatter"):
        outside = {*params["dimension_numbers"].inserted_window_dims, *params["dimension_numbers"].operand_batching_dims}
        windows = [dim for place, dim in enumerate(inputs[0]) if place not in outside]
        yield from zip(windows, [inputs[2][place] for place in params["dimension_numbers"].update_window_dims])
    elif name not in ("broadcast_in_dim", "transpose", "dot_general"):
        alike = [dims for dims in inputs if len(dims) == len(outputs[0])] if outputs else []
        yield from ((one, other) for dims in alike for result in outputs if len(result) == len(dims) for one, other in zip(dims, result))


def _needed_whole(equation: JaxprEqn, var: Any) -> Sequence[int]:
    """The dimensions of an operand that an operation works along, by halves or as one; all of them where it is not known."""
    if isinstance(var, Literal) or not _shape(var) or _runs_others(equation):
        return ()
    if behaviour(equation.primitive.name).kind == "unknown":
        return range(len(_shape(var)))
    along = equation.params.get(_ALONG.get(equation.primitive.name, ""))
    return () if along is None else (along % len(_shape(var)),)


_ALONG = {"sort": "dimension", **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "top_k"), "axis")}


def _runs_others(equation: JaxprEqn) -> bool:
    return bool(read_scan(equation) or read_while(equation) or read_branches(equation)) or called(equation) is not None


def _shape(var: Any) -> tuple[int, ...]:
    return getattr(var.aval, "shape", ())
