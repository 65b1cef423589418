"""The tasks of a pipeline's stages as compiled programs on their devices."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.sharding import NamedSharding

from parafit import backends
from parafit.backends.backend import Backend, CompilerOptions
from parafit.placement import Placement
from parafit.planner.layout import Piece
from parafit.planner.program import Leaf
from parafit.support.jaxprs import opened
from parafit.techniques.bfloat16 import HalfProducts
from parafit.techniques.even import evenly
from parafit.techniques.stages import Stage
from parafit.techniques.tasks import Function, Tasks
from parafit.techniques.updates import Round
from parafit.techniques.whole import Whole
from parafit.tracing.passes import Exchange

_COMPILERS = ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="parafit-stages")


@dataclass(frozen=True, kw_only=True)
class Slices:
    """Which rows of a block's batches the microbatches of one size are.

    Attributes:
        count: of a batch.
        rows: of each.
        first: the first row of the first of them.
    """

    count: int
    rows: int
    first: int


def slices_of(pieces: Sequence[Piece]) -> list[Slices]:
    """The microbatches of a batch, those of one size together."""
    found, first = [], 0
    for piece in pieces:
        found.append(Slices(count=piece.count, rows=int(piece.rows), first=first))
        first += piece.count * int(piece.rows)
    return found


class Compiler:
    """Compiles functions of stages; equal ones are traced once.

    Args:
        precision: of the plan.
    """

    def __init__(self, precision: str):
        self._half = HalfProducts() if precision == "bfloat16" else None
        self._shared: dict[Any, Callable] = {}

    def check(self) -> None:
        """Refuse a precision that changes nothing."""
        if self._half:
            self._half.check()

    def prepared(self, closed: ClosedJaxpr, placement: Placement, given: Sequence[Any], left: Sequence[Any]) -> ClosedJaxpr:
        """A traced function as the plan and the compiler want it.

        Args:
            closed: the function.
            placement: its devices.
            given, left: how its arguments and results are split, None where that is not known.
        """
        if self._half:
            closed = Exchange(dict.fromkeys(("dot_general", "conv_general_dilated"), self._half.choose)).closed(closed)
        closed = backends.current().rewrite(closed)
        if placement.plan.device_count > 1 and placement.mesh is not None:
            closed = evenly(closed, placement.mesh, given=given, left=left)
        return closed

    def start(
        self, function: Callable, traced: ClosedJaxpr, closed: ClosedJaxpr, arguments: tuple, *, donates: bool, key: Any, shardings: Any
    ) -> Future:
        """Start compiling a program.

        Args:
            function: that calls `closed`.
            traced: before it was prepared.
            closed: as `prepared` gave it.
            arguments: shapes, with where each lies.
            donates: whether the first argument's memory is given away.
            key: what `function` depends on beside `closed`.
            shardings: where results lie; None: on the one device.
        """
        backend = backends.current()
        options: dict[str, Any] = {"donate_argnums": 0} if donates else {}
        if shardings is not None:
            options["out_shardings"] = shardings
        jitted: Any = jax.jit(function, **options)
        if shardings is None and not opened(closed)[1]:
            jitted = self._shared.setdefault((key, donates, str(closed)), jitted)
        # Lowered here: what the user has set for this thread, such as float64, must hold.
        return _COMPILERS.submit(_compile, backend, jitted.lower(*arguments), backend.compiler_options(traced, seldom=False))


def _compile(backend: Backend, lowered: jax.stages.Lowered, options: CompilerOptions) -> jax.stages.Compiled:
    with backend.compiling():
        return backend.compile(lowered, options)


class StageProgram:
    """The compiled tasks of a stage on microbatches of one size.

    Args:
        compiler: of the whole pipeline.
        whole, stage, tasks: what it computes.
        placement: its devices.
        slices: which rows of a block the microbatches are.
        block: shapes of the block's arrays, each of shape (microbatches of all steps, rows, ...).

    Attributes:
        leaves: which of the block's arrays it reads.
        trained: the weights that have gradients.
        loss_dtype: of the loss to differentiate, None where that is another stage's.
        takes: the numbers of the values that each task takes beside rows of the block, by its kind.
        keeps: for each value that it has after F, whether B or W takes it.
    """

    def __init__(
        self, compiler: Compiler, whole: Whole, stage: Stage, tasks: Tasks, placement: Placement, slices: Slices, block: Sequence[Any]
    ):
        self.whole, self.stage, self.tasks, self.placement = whole, stage, tasks, placement
        self._slices, self._compiler = slices, compiler
        self.leaves = [argument - whole.batch.start - 1 for argument in stage.reads if argument > whole.batch.start]
        self._block = [self._struct(block[leaf], placement.block(block[leaf].shape)) for leaf in self.leaves]
        self._functions: dict[str, Function] = {
            kind: function for kind, function in (("F", tasks.forward), ("B", tasks.backward), ("W", tasks.weights)) if function
        }
        self.takes = {
            kind: [place for place in function.takes if not self._is_of_batch(place)] for kind, function in self._functions.items()
        }
        later = {place for kind, places in self.takes.items() if kind != "F" for place in places}
        self.trained = [stage.reads[place] for place in tasks.trained]
        self.loss_dtype = next((var.aval.dtype for result, var in zip(stage.results, self._results) if whole.trains and result == 0), None)
        self.keeps = [place in later for place in range(tasks.given + tasks.received + tasks.residuals)]
        self._compiling: dict[str, Future] = {}

    @cached_property
    def programs(self) -> dict[str, Any]:
        """F: `(values, block, index) -> (sent, results, residuals)`. B: `(sums, values, block, index) -> (gradients, sums)`; where W is a
        task of its own, `(values, block, index) -> (gradients, what is left for W)`. W: `(sums, values, block, index) -> ((), sums)`.
        """
        return {kind: compiling.result() for kind, compiling in self._compiling.items()}

    @cached_property
    def sums_at(self) -> list[tuple[int, Any]]:
        """The weights that have gradients, each with where these are summed."""
        return [(weight, self.placement.stored(gradient_of(self.whole.leaves[weight]), self._shape_of(weight))) for weight in self.trained]

    @property
    def _results(self) -> list[Any]:
        return self.stage.closed.jaxpr.outvars[len(self.stage.takers) :]

    def _shape_of(self, argument: int) -> Any:
        return self.whole.flat.inputs[argument].aval

    def _is_of_batch(self, place: int) -> bool:
        return place < self.tasks.given and self.stage.reads[place] >= self.whole.batch.start

    def _struct(self, shape: Any, sharding: Any) -> Any:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    def activation(self, shape: Any) -> NamedSharding:
        """Where an array made of the microbatch's rows lies; its first dimension tells whether it is."""
        of_rows = shape.shape[:1] == (self.whole.rows,)
        return self.placement.batch(shape.shape) if of_rows else self.placement.replicated  # type: ignore[return-value]

    def lower_forward(self) -> None:
        """Start compiling F; tasks of another process's stages are compiled there."""
        if not self.placement.is_here:
            return
        received = self.stage.closed.jaxpr.invars[len(self.stage.constants) + self.tasks.given :]
        outputs = [var.aval for var in self.stage.closed.jaxpr.outvars]
        sent, results = outputs[: len(self.stage.takers)], outputs[len(self.stage.takers) :]
        self._values = [self._read(argument) for argument in self.stage.reads]
        self._values += [self._struct(var.aval, self.activation(var.aval)) for var in received]
        self._sent = [self._struct(each, self.activation(each)) for each in sent]
        shardings = [each.sharding for each in self._sent], [self._result(*pair) for pair in zip(self.stage.results, results)], None
        self._start("F", (len(sent), len(results)), shardings)

    def lower_backward(self) -> None:
        """Start compiling B."""
        tasks = self.tasks
        if tasks.backward is None or not self.placement.is_here:
            return
        residuals = [var.aval for var in tasks.forward.closed.jaxpr.outvars[len(self._sent) + len(self.stage.results) :]]
        self._values += self._placed(residuals, "F", 2)
        self._values += [self._sent[place] for place in tasks.sends]
        self._values.append(jax.ShapeDtypeStruct((), self.loss_dtype or np.float32, sharding=self.placement.replicated))
        returns = [self._values[tasks.given + place].sharding for place in tasks.returns]
        if tasks.weights is None:
            self._start("B", (len(returns),), (returns, [sharding for _, sharding in self.sums_at]))
        elif returns or tasks.left:
            self._start("B", (len(returns),), (returns, None))

    def lower_weights(self) -> None:
        """Start compiling W."""
        tasks = self.tasks
        if tasks.weights is None or tasks.backward is None or not tasks.trained or not self.placement.is_here:
            return
        if tasks.left:
            self._values += self._placed([var.aval for var in tasks.backward.closed.jaxpr.outvars[len(tasks.returns) :]], "B", 1)
        self._start("W", (0,), ([], [sharding for _, sharding in self.sums_at]))

    def _read(self, argument: int) -> Any:
        shape = self._shape_of(argument)
        if argument >= self.whole.batch.start:
            return self._struct(shape, self.placement.batch(shape.shape))
        return self._struct(shape, self.placement.stored(self.whole.leaves[argument], shape))

    def _result(self, result: int, shape: Any) -> Any:
        argument = self.whole.replaces.get(result)
        return self.activation(shape) if argument is None else self.placement.stored(self.whole.leaves[argument], shape)

    def _placed(self, shapes: Sequence[Any], kind: str, part: int) -> list[Any]:
        """What a program gives, where it gives it."""
        if self.placement.plan.device_count == 1:
            return [self._struct(shape, self.placement.replicated) for shape in shapes]
        return [self._struct(*pair) for pair in zip(shapes, self._compiling[kind].result().output_shardings[part])]

    def _start(self, kind: str, ends: tuple[int, ...], shardings: tuple) -> None:
        """Start compiling one task."""
        values, function, several = self._values, self._functions[kind], self.placement.plan.device_count > 1
        given = [self._computed(place, values[place]) for place in function.takes]
        flat_shardings = [each for part, count in zip(shardings, self._counts(kind, ends)) for each in (part or [None] * count)]
        closed = self._compiler.prepared(function.closed, self.placement, given, flat_shardings)
        call = self._call(function, closed, given if several else None)
        sums = kind == "W" or (kind == "B" and self.tasks.weights is None)
        whole = _summing(call, ends[0]) if sums else _dividing(call, ends)
        arguments = (
            [values[place] for place in self.takes[kind]],
            self._block,
            jax.ShapeDtypeStruct((), np.int32, sharding=self.placement.replicated),
        )
        if sums:
            summed = [self._struct(self._shape_of(weight), sharding) for weight, sharding in self.sums_at]
            arguments = (summed, *arguments)
        key = (kind, ends, function.takes, self._slices, tuple(self.leaves), self._batch_places(), sums)
        options = {"donates": sums, "key": key, "shardings": shardings if several else None}
        self._compiling[kind] = self._compiler.start(whole, function.closed, closed, arguments, **options)

    def _counts(self, kind: str, ends: tuple[int, ...]) -> list[int]:
        total = len(self._functions[kind].closed.jaxpr.outvars)
        return [*ends, total - sum(ends)]

    def _computed(self, place: int, value: Any) -> Any:
        """How a value lies while operations read it."""
        if place < self.tasks.given and self.stage.reads[place] < self.whole.batch.start:
            return self.placement.computed(self.whole.leaves[self.stage.reads[place]], value)
        return value.sharding

    def _batch_places(self) -> tuple[tuple[int, int], ...]:
        return tuple(
            (place, argument - self.whole.batch.start - 1) for place, argument in enumerate(self.stage.reads) if self._is_of_batch(place)
        )

    def _call(self, function: Function, closed: ClosedJaxpr, shardings: Sequence[Any] | None) -> Callable:
        """`(values, block, index) -> results`: the function, given its rows of the block."""
        run, slices, of_batch = jaxpr_as_fun(closed), self._slices, dict(self._batch_places())
        places = {leaf: place for place, leaf in enumerate(self.leaves)}

        def call(values, block, index):
            rest, arguments = iter(values), []
            for place in function.takes:
                if place not in of_batch:
                    arguments.append(next(rest))
                elif of_batch[place] < 0:
                    arguments.append(slices.first + index % slices.count * slices.rows)
                else:
                    arguments.append(jax.lax.dynamic_index_in_dim(block[places[of_batch[place]]], index, keepdims=False))
            if shardings is not None:
                arguments = [
                    value if at is None else jax.lax.with_sharding_constraint(value, at) for value, at in zip(arguments, shardings)
                ]
            return run(*arguments)

        return call


def _dividing(call: Callable, ends: tuple[int, ...]) -> Callable:
    """`call` with its results in parts of these lengths, and the rest."""

    def divided(values, block, index):
        results, parts = call(values, block, index), []
        for end in ends:
            parts.append(results[:end])
            results = results[end:]
        return (*parts, results)

    return divided


def _summing(call: Callable, returned: int) -> Callable:
    """`call` with gradients of weights added to sums."""

    def summed(sums, values, block, index):
        results = call(values, block, index)
        return results[:returned], [total + gradient for total, gradient in zip(sums, results[returned:])]

    return summed


def gradient_of(weight: Leaf) -> Leaf:
    """What a weight's gradient is."""
    return Leaf(name=f"{weight.name}/gradient", role="gradient", like=weight.name)


class RoundProgram:
    """A round of an update as a compiled program: `(given away, kept) -> (values, zeros)`.

    Args:
        compiler: of the whole pipeline.
        round_: what it computes.
        placement: its devices.
        at: shape of each value it takes or gives, with where it lies.
        gives_away: the numbers of the values whose memory is given away.
        gradients: the numbers of those of them that are sums of gradients: zeros of their shape take their place.
    """

    def __init__(
        self, compiler: Compiler, round_: Round, placement: Placement, at: Callable[[int], Any], gives_away: set[int], gradients: range
    ):
        self.stage, self.gives = round_.stage, round_.gives
        self.given_away = [number for number in round_.takes if number in gives_away]
        self.kept = [number for number in round_.takes if number not in gives_away]
        self.zeroed = [number for number in self.given_away if number in gradients]
        self._compiler, self._round, self._placement, self._at = compiler, round_, placement, at
        self._compiling: Future | None = self._start() if placement.is_here else None

    @cached_property
    def program(self) -> Any:
        """The program, None of another process."""
        return self._compiling and self._compiling.result()

    def _start(self) -> Future:
        several = self._placement.plan.device_count > 1
        structs = {number: self._at(number) for number in (*self._round.takes, *self.gives)}
        given, left = ([structs[number].sharding for number in numbers] for numbers in (self._round.takes, self.gives))
        closed = self._compiler.prepared(self._round.closed, self._placement, given, left)
        run, away, zeroed, takes = jaxpr_as_fun(closed), self.given_away, self.zeroed, self._round.takes
        kept = self.kept

        def update(away_values, kept_values):
            values = dict(zip((*away, *kept), (*away_values, *kept_values)))
            return run(*(values[number] for number in takes)), [jnp.zeros_like(values[number]) for number in zeroed]

        arguments = [structs[number] for number in away], [structs[number] for number in kept]
        shardings = (left, [structs[number].sharding for number in zeroed]) if several else None
        key = ("update", tuple(away), tuple(kept), tuple(zeroed), takes)
        return self._compiler.start(update, self._round.closed, closed, arguments, donates=True, key=key, shardings=shardings)
