"""The most memory a device needs at any time of a step: liveness over a program's operations. Plain Python.

A forward result that the backward pass reads is kept, once for each block and each microbatch in flight; everything else lives from
the operation that writes it to the last that reads it. With recomputation only what passes between blocks is kept.

A program that knows its buffers is taken at its word, unless a plan cuts it into stages. Then gradients live only
until they are used, or, summed over microbatches, all the time.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from parafit.planner.partition import Partition
from parafit.planner.plan import Plan
from parafit.planner.program import BUFFERED, Operation, Program, Tensor


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The part of a program that one pipeline stage runs.

    Attributes:
        operations: of one block each, in order.
        block_share: share of all blocks that it holds.
        in_flight: microbatches whose activations it keeps at once.
    """

    operations: Sequence[Operation]
    block_share: float
    in_flight: float


def peak(program: Program, partition: Partition, stage: Stage, *, reserved_bytes: float = 0.0) -> dict[str, float]:
    """Bytes of each kind at the fullest moment of a stage, without communication buffers.

    Args:
        program: what is computed.
        partition: who holds which part.
        stage: which part of the program.
        reserved_bytes: what the runtime takes.

    Returns:
        Bytes by "parameters", "gradients", "slots", "state", "inputs", "activations", "temporaries" and "context"; inputs are among
        the activations unless the program knows its buffers.
    """
    parts: dict[str, float] = dict.fromkeys(("parameters", "slots", "state", *BUFFERED), 0.0)
    for tensor in _state_of(program, stage):
        name = {"parameter": "parameters", "gradient": "gradients", "slot": "slots"}.get(tensor.role, "state")
        parts[name] += partition.stored_bytes(tensor) * _copies(tensor, stage)
    if is_compiled(program, partition.plan):
        summed = parts["gradients"] if partition.plan.microbatches > 1 else 0.0
        parts |= _fullest(program, partition)
        parts["gradients"] += summed
    else:
        kept, moments = _live(program, partition, stage)
        parts["activations"], parts["temporaries"] = kept * stage.in_flight, moments
    return parts | {"context": reserved_bytes}


def is_compiled(program: Program, plan: Plan) -> bool:
    """Whether memory under a plan follows from the program's buffers.

    Args:
        program: what one step computes.
        plan: who does it.
    """
    return bool(program.buffers) and plan.axes.get("pipeline", 1) == 1


def _fullest(program: Program, partition: Partition) -> dict[str, float]:
    """Bytes of each part of the buffers at the moment when they are most together."""
    changes: dict[int, dict[str, float]] = {}
    for buffer in program.buffers:
        nbytes = buffer.bytes * partition.fraction(buffer.dims)
        for moment, change in ((buffer.first, nbytes), (buffer.last + 1, -nbytes)):
            parts = changes.setdefault(moment, dict.fromkeys(BUFFERED, 0.0))
            parts[buffer.part] += change
    best: dict[str, float] = dict.fromkeys(BUFFERED, 0.0)
    now = best
    for moment in sorted(changes):
        now = {part: now[part] + change for part, change in changes[moment].items()}
        best = max(best, now, key=lambda parts: sum(parts.values()))
    return {part: max(0.0, value) for part, value in best.items()}


def boundary(program: Program, operations: Sequence[Operation]) -> tuple[Tensor, ...]:
    """What passes from one block to the next: read by a block before any block has written it.

    Args:
        program: what one step computes.
        operations: those of it that count, in the order they run.
    """
    written: set[str] = set()
    found: dict[str, Tensor] = {}
    blocks = [operation for operation in operations if operation.count > 1 and operation.phase == "forward"]
    for operation in blocks:
        for name in operation.inputs:
            tensor = program.tensors[name]
            if name not in written and tensor.role == "activation":
                found[name] = tensor
        written.update(operation.outputs)
    return tuple(found.values()) or tuple(program.tensors[name] for operation in blocks[-1:] for name in operation.outputs[:1])


def recomputing_saves(program: Program) -> bool:
    """Whether a step that computes activations again holds less beside its state than one that keeps them, by more than prices are off."""
    again = program.recomputed
    if again is None or again is program:
        return again is not None
    kept, less = (sum(_moving(each).values()) for each in (program, again))
    return less < _SAVING * kept


_SAVING = 0.95
"""Nine in ten predictions of what a compiled step holds are nearer to it than this (docs/cost.md)."""


def _moving(program: Program) -> dict[str, float]:
    """What one device holds beside the state at the fullest moment of a step over the whole batch."""
    operations = [operation for operation in program.operations if operation.phase != "update"]
    found = peak(program, Partition(program, Plan()), Stage(operations=operations, block_share=1.0, in_flight=1))
    return {part: found[part] for part in BUFFERED}


def recomputed(program: Program) -> list[Operation]:
    """The forward operations of a block that recomputation must run again: those whose results the backward pass reads."""
    operations = [operation for operation in program.operations if operation.phase != "update"]
    passed = {tensor.name for tensor in boundary(program, operations)}
    needed = _lives(program, operations)[2] - passed
    found = []
    for operation in reversed([operation for operation in operations if operation.count > 1 and operation.phase == "forward"]):
        if not needed.isdisjoint(operation.outputs):
            needed.update(set(operation.inputs) - passed)
            found.append(operation)
    return found


def _state_of(program: Program, stage: Stage) -> list[Tensor]:
    """The training state that a stage's operations touch."""
    names = {name for operation in stage.operations for name in (*operation.inputs, *operation.outputs)}
    mine = {name for name in names if program.tensors[name].role in ("parameter", "gradient", "state")}
    for operation in program.operations:
        if operation.phase == "update" and not mine.isdisjoint(operation.inputs):
            mine.update(name for name in operation.inputs if program.tensors[name].role in ("slot", "gradient", "state"))
    return [program.tensors[name] for name in mine]


def _copies(tensor: Tensor, stage: Stage) -> int:
    return math.ceil(tensor.count * stage.block_share) if tensor.count > 1 else 1


def _live(program: Program, partition: Partition, stage: Stage) -> tuple[float, float]:
    """Bytes of kept activations of one microbatch, and of what lives beside them, at the fullest moment."""
    recompute = partition.plan.recompute == "blocks"
    passed = {tensor.name for tensor in boundary(program, stage.operations)}
    firsts, lasts, kept = _lives(program, stage.operations)
    changes: dict[int, float] = {}
    kept_changes: dict[int, float] = {}
    turn = next((index for index, operation in enumerate(stage.operations) if operation.phase == "backward" and operation.count > 1), 0)
    for name, first in firsts.items():
        tensor, nbytes = program.tensors[name], partition.local_bytes(program.tensors[name])
        if name in kept and (tensor.count == 1 or not recompute or name in passed):
            _add(kept_changes, first, lasts[name], nbytes * _copies(tensor, stage))
        elif name in kept:
            _add(changes, first, first + 1, nbytes)
            _add(changes, turn, lasts[name], nbytes)
        else:
            _add(changes, first, lasts[name], nbytes)
    return _highest(kept_changes, changes)


def _lives(program: Program, operations: Sequence[Operation]) -> tuple[dict[str, int], dict[str, int], set[str]]:
    """First and last index at which each activation lives, and which are forward results that the backward pass reads."""
    firsts: dict[str, int] = {}
    lasts: dict[str, int] = {}
    forward: set[str] = set()
    kept: set[str] = set()
    for index, operation in enumerate(operations):
        for name in (*operation.inputs, *operation.outputs):
            if program.tensors[name].role in ("activation", "input"):
                firsts.setdefault(name, index)
                lasts[name] = index
        if operation.phase == "forward":
            forward.update((*operation.inputs, *operation.outputs))
        elif operation.phase == "backward":
            kept.update(name for name in operation.inputs if name in forward and name in firsts)
    return firsts, lasts, kept


def _add(changes: dict[int, float], first: int, last: int, nbytes: float) -> None:
    changes[first] = changes.get(first, 0.0) + nbytes
    changes[last + 1] = changes.get(last + 1, 0.0) - nbytes


def _highest(kept: dict[int, float], other: dict[int, float]) -> tuple[float, float]:
    best, now_kept, now_other = (0.0, 0.0), 0.0, 0.0
    for index in sorted({*kept, *other}):
        now_kept, now_other = now_kept + kept.get(index, 0.0), now_other + other.get(index, 0.0)
        best = max(best, (now_kept, now_other), key=sum)
    return best
