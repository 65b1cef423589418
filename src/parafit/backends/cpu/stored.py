"""A traced step with what XLA:CPU really keeps of it: its arrays, their buffers, and the transposed copies it makes."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from jax.extend.core import ClosedJaxpr

from parafit.backends.cpu.arrays import Array, arrays_of
from parafit.backends.cpu.buffers import buffers, dim_names
from parafit.backends.cpu.options import saves_memory
from parafit.backends.cpu.rewrite import rewrite_jaxpr
from parafit.planner.program import Leaf, Operation, Program, Tensor
from parafit.tracing.graph import Graph
from parafit.tracing.phases import attribute


def stored(
    program: Program,
    closed: ClosedJaxpr,
    leaves: Sequence[Leaf],
    results: Sequence[Leaf],
    *,
    lower: Callable[[ClosedJaxpr], ClosedJaxpr] = rewrite_jaxpr,
) -> Program:
    """A program with the buffers and the copies of the step that XLA:CPU is given.

    Args:
        program: the step as described.
        closed: the step as traced.
        leaves: name and role of each of its arguments.
        results: for the last of what it returns, the argument each replaces.
        lower: what becomes of the step before it is compiled.
    """
    graph = Graph(lower(closed), leaves, results)
    attribute(graph)
    arrays, returned = arrays_of(graph)
    return replace(_with_copies(program, graph, arrays), buffers=buffers(graph, program, arrays, returned, frugal=saves_memory(closed)))


def _with_copies(program: Program, graph: Graph, arrays: Sequence[Array]) -> Program:
    """A program with the copies among its operations.

    Args:
        program: a step.
        graph: over the same step as the compiler is given it.
        arrays: what the compiler makes of it.
    """
    names = dim_names(graph, program)
    operations, tensors = [], {}
    for number, array in enumerate(array for array in arrays if array.primitive == "transpose" and array.record is not None):
        assert array.record is not None
        dims = tuple(names.get(factor, "") for factor in map(graph.dims.major, array.value.dims))
        name = f"{array.record.layer}/transposed/{number}".lstrip("/")
        tensors[name] = Tensor(name=name, shape=array.value.shape, dims=dims, itemsize=array.value.itemsize)
        phase, steps = array.record.phase or "forward", array.record.steps
        operations.append(
            Operation(name=array.record.layer, kind="move", phase=phase, inputs=(), outputs=(name,), bytes=2.0 * array.bytes, steps=steps)
        )
    return replace(program, operations=(*program.operations, *operations), tensors={**program.tensors, **tensors})
