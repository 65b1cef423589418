"""The stages of a program whose blocks are not counted: where each operation is in the chain, and a program for each stage. Plain Python.

The chain is the forward pass in the order it runs. An operation of the backward pass belongs where the forward operation is whose results
or parameters it reads, of several the last one before that from which the gradient comes to it.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from parafit.planner.cut import Unit, balance
from parafit.planner.program import Operation, Program, Tensor


def is_counted(program: Program) -> bool:
    """Whether a program writes blocks once, with their count; else its stages are cut between any of its operations."""
    return any(operation.count > 1 for operation in program.operations)


def places_to_cut(program: Program) -> int:
    """Into how many stages a program can be cut: its blocks, or pieces of its chain.

    Args:
        program: what one step computes.
    """
    if is_counted(program):
        return max(operation.count for operation in program.operations)
    forward = _forward(program)
    return 1 + sum(map(_separable, forward, forward[1:])) if forward else 1


def cut_program(
    program: Program, stages: int, seconds: Callable[[Operation], float], nbytes: Callable[[Tensor], float]
) -> tuple[tuple[Program, ...], tuple[float, ...]]:
    """A program for each stage, balanced by time, and the bytes of a microbatch that each passes on.

    Args:
        program: what one step computes, its blocks not counted.
        stages: how many.
        seconds: of one run of an operation.
        nbytes: of a device's part of a tensor.

    Raises:
        PlanError: there are fewer places to cut.
    """
    forward, places = _forward(program), _places(program)
    times = {phase: [0.0] * len(forward) for phase in ("forward", "backward")}
    for operation, place in zip(program.operations, places):
        if operation.phase in times:
            times[operation.phase][place] += seconds(operation) * operation.steps
    passed = _passed(program, forward, nbytes)
    can = [*map(_separable, forward, forward[1:]), True]
    units = [
        Unit(name=one.name, forward=ahead, backward=back, passed_bytes=out if cuts else None)
        for one, ahead, back, out, cuts in zip(forward, times["forward"], times["backward"], passed, can)
    ]
    cut = balance(units, stages=stages)
    numbers = [bisect_right(cut.starts, place) - 1 for place in places]
    return tuple(_stage(program, numbers, {stage}) for stage in range(stages)), cut.passed_bytes


def joined(program: Program, parts: Sequence[Program]) -> Program:
    """One program of several stages, in the order in which the whole runs them.

    Args:
        program: the whole.
        parts: programs of some of its stages.
    """
    wanted = {id(operation) for part in parts for operation in part.operations}
    return _only(program, (operation for operation in program.operations if id(operation) in wanted))


def _forward(program: Program) -> list[Operation]:
    return [operation for operation in program.operations if operation.phase == "forward"]


def _separable(one: Operation, following: Operation) -> bool:
    """Whether a stage may end between two operations: not inside a loop."""
    looping = any(each.steps > 1 or each.kind == "loop" for each in (one, following))
    return not (looping and one.name == following.name)


def _places(program: Program) -> list[int]:
    """Where each operation is in the chain; an update is where its parameter is first used."""
    uses, written, first = defaultdict[str, list[int]](list), dict[str, int](), dict[str, int]()
    places, count = list[int](), 0
    for operation in program.operations:
        if operation.phase == "forward":
            place, count = count, count + 1
            for name in (*operation.inputs, *operation.outputs):
                uses[name].append(place)
                first.setdefault(name, place)
        elif operation.phase == "backward":
            place = _backward_place(operation, uses, written, count - 1)
        else:
            place = max((first[name] for name in operation.inputs if name in first), default=0)
            first |= dict.fromkeys(operation.outputs, place)
        if operation.phase == "backward":
            written |= dict.fromkeys(operation.outputs, place)
            first |= dict.fromkeys(operation.outputs, place)
        places.append(place)
    return places


def _backward_place(operation: Operation, uses: dict[str, list[int]], written: dict[str, int], last: int) -> int:
    latest = min((written[name] for name in operation.inputs if name in written), default=last)
    found = [uses[name][index - 1] for name in operation.inputs if name in uses and (index := bisect_right(uses[name], latest))]
    return max(found, default=latest)


def _passed(program: Program, forward: Sequence[Operation], nbytes: Callable[[Tensor], float]) -> list[float]:
    """Bytes of activations that are written up to each operation of the chain and read after it."""
    changes, written = [0.0] * (len(forward) + 1), dict[str, int]()
    lasts = {name: index for index, operation in enumerate(forward) for name in operation.inputs}
    for index, operation in enumerate(forward):
        for name in operation.outputs:
            written.setdefault(name, index)
    for name, first in written.items():
        if program.tensors[name].role == "activation" and lasts.get(name, first) > first:
            size = nbytes(program.tensors[name])
            changes[first] += size
            changes[lasts[name]] -= size
    passed, now = [], 0.0
    for change in changes[:-1]:
        now = max(0.0, now + change)
        passed.append(now)
    return passed


def _stage(program: Program, numbers: Sequence[int], stages: set[int]) -> Program:
    return _only(program, (operation for operation, number in zip(program.operations, numbers) if number in stages))


def _only(program: Program, operations: Iterable[Operation]) -> Program:
    operations = tuple(operations)
    names = {name for operation in operations for name in (*operation.inputs, *operation.outputs)}
    tensors = {name: tensor for name, tensor in program.tensors.items() if name in names}
    return replace(program, operations=operations, tensors=tensors, buffers=(), recomputing=None)
