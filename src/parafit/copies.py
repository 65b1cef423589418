"""Transposed copies that XLA:CPU makes of arrays: where a product asks for another order of dims, and where a step transposes."""

from collections.abc import Sequence
from dataclasses import replace

from parafit.arrays import Array
from parafit.buffers import dim_names
from parafit.program import Operation, Program, Tensor
from parafit.walk import Walk


def with_copies(program: Program, walk: Walk, arrays: Sequence[Array]) -> Program:
    """A program with the copies among its operations.

    Args:
        program: a step.
        walk: over the same step as the compiler is given it.
        arrays: what the compiler makes of it.
    """
    names = dim_names(walk, program)
    operations, tensors = [], {}
    for number, array in enumerate(array for array in arrays if array.primitive == "transpose" and array.record is not None):
        assert array.record is not None
        dims = tuple(names.get(factor, "") for factor in map(walk.dims.major, array.value.dims))
        name = f"{array.record.layer}/transposed/{number}".lstrip("/")
        tensors[name] = Tensor(name=name, shape=array.value.shape, dims=dims, itemsize=array.value.itemsize)
        phase, steps = array.record.phase or "forward", array.record.steps
        operations.append(
            Operation(name=array.record.layer, kind="move", phase=phase, inputs=(), outputs=(name,), bytes=2.0 * array.bytes, steps=steps)
        )
    return replace(program, operations=(*program.operations, *operations), tensors={**program.tensors, **tensors})
