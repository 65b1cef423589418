"""Writes down a graph as a `Program`: its operations, dims and tensors by name, and what couples the rows of a batch."""

from parafit.planner.program import Program, with_dims_of
from parafit.tracing.blocks import share_dims
from parafit.tracing.fusion import group
from parafit.tracing.graph import Graph
from parafit.tracing.names import Names
from parafit.tracing.phases import attribute


def describe(graph: Graph, name: str, like: Program | None = None) -> Program:
    """The program of a graph.

    Args:
        graph: of one step; what leads to no result is dropped from it.
        name: of the program.
        like: a program of the same arguments, whose names of dims it takes over.
    """
    attribute(graph)
    names = Names(graph)
    operations = tuple(names.operation(kernel) for kernel in group(graph))
    program = Program(
        name=name,
        operations=operations,
        tensors=names.tensors,
        sizes=names.sizes,
        unknown=tuple(graph.unknown),
        couples_batch=_coupling(graph),
        fixed=frozenset(names.dims[factor] for factor in graph.dims.fixed() if factor in names.dims),
    )
    return with_dims_of(like, program) if like else share_dims(program)


def _coupling(graph: Graph) -> str:
    """Why rows are not independent: what was made of parameters and summed over them comes back to them.

    A sum of the batch's own numbers, such as how many positions a mask leaves, is known before rows are cut apart.
    """
    rows = {factor for dim in graph.batch for factor in graph.dims.factors(dim)}
    reasons: dict[str, None] = {}
    mixed: set[int] = set()
    learned: set[int] = set()
    for record in graph.records:
        if record.phase != "forward":
            continue
        roots = [value.root() for value in record.inputs]
        touched = any(id(root) in mixed for root in roots)
        if not any(root.role == "parameter" or id(root) in learned for root in roots):
            continue
        learned.update(id(value.root()) for value in record.outputs)
        has_rows = any(rows & set(graph.dims.factors(dim)) for value in record.outputs for dim in value.dims)
        if touched and has_rows:
            reasons[f"batch statistics in {record.layer!r}"] = None
        elif touched or any(rows & set(graph.dims.factors(dim)) for dim in record.contracted):
            mixed.update(id(value.root()) for value in record.outputs)
    return "; ".join(reasons)
