"""Many steps of a model in one compiled program."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr
from jax.sharding import Mesh

from parafit import backends
from parafit.adapters.step import State, Step, remembered
from parafit.backends.backend import Backend, CompilerOptions
from parafit.placement import Lookup, Placement
from parafit.support import compat
from parafit.techniques import planned_function
from parafit.techniques.bfloat16 import in_bfloat16
from parafit.techniques.even import evenly
from parafit.tracing.trace import jaxpr_of, shapes_of

_COMPILERS = ThreadPoolExecutor(max_workers=2, thread_name_prefix="parafit-compile")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tally:
    """What one call of a program hands on to the next.

    Attributes:
        done: steps completed, int32.
        healthy: whether the loss has been finite at every step.
        logs: the last step's logs; None when predicting.
    """

    done: Any
    healthy: Any
    logs: Any


class CompiledSteps:
    """A compiled program of up to `capacity` steps: `(fixed, state, tally, steps, arrays) -> (state, tally, outputs)`.

    The state passed in is donated. After a step whose loss is not finite the program stops; called again with that tally,
    a loop does nothing more (a program of one step runs it). `outputs` are predictions of shape (capacity, batch,
    ...), None when training or testing.

    Attributes:
        fresh_tally: the tally before the first step.
    """

    def __init__(self, lowered, options: CompilerOptions, logs, capacity: int, placement: Placement):
        self.capacity = capacity
        # On the devices once and for all: an array that has to be brought there costs microseconds in every call.
        tally = Tally(np.int32(0), np.bool_(True), jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), logs))
        self.fresh_tally, self._one = jax.device_put((tally, np.int32(1)), placement.replicated)
        self._compiling: Future = _COMPILERS.submit(_compile, backends.current(), lowered, options)

    def __call__(self, fixed: list, state: State, tally: Tally, steps: int, arrays):
        return self._compiling.result()(fixed, state, tally, self._one if steps == 1 else np.int32(steps), arrays)

    def wait(self) -> None:
        """Until the program is compiled."""
        self._compiling.result()

    @property
    def text(self) -> str:
        """The compiler's text of the program."""
        return self._compiling.result().as_text()

    @property
    def argument_bytes(self) -> int:
        """What the program's arguments take on one device."""
        return self._compiling.result().memory_analysis().argument_size_in_bytes

    @property
    def peak_bytes(self) -> int:
        """Memory the program holds on one device: arguments, results and temporaries, as the compiler says."""
        memory = self._compiling.result().memory_analysis()
        return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes - memory.alias_size_in_bytes


def _compile(backend: Backend, lowered, options: CompilerOptions):
    with backend.compiling():
        return backend.compile(lowered, options)


def compiled_steps(keeper, step: Step, arrays, placement: Placement, *, seldom: bool = False) -> CompiledSteps:
    """The program for this step and blocks of these shapes, made once for as long as the model stays as it is.

    Tracing happens here; compiling goes on in the background until the program is called. What runs seldom is compiled quickly.

    Args:
        keeper: the model's `Adapter.keeper`: the program is kept for as long as it lives.
        step: the step that the program runs.
        arrays: arrays of a block, each of shape (capacity, batch, ...), or a `Lookup`.
        placement: where state and batches live.
        seldom: whether compiling it will take longer than running it.
    """
    key = (
        backends.current().name,
        placement.plan,
        seldom,
        jax.tree.structure(arrays),
        tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(arrays)),
    )
    return remembered(keeper, step, key, lambda: _compiled_steps(step, arrays, placement, seldom))


def _compiled_steps(step: Step, arrays, placement: Placement, seldom: bool) -> CompiledSteps:
    traced, options = traced_steps(step, arrays, placement, seldom=seldom)
    capacity = jax.tree.leaves(arrays)[0].shape[0]
    return CompiledSteps(traced.lower(), options, traced.out_info[1].logs, capacity, placement)


def traced_steps(step: Step, arrays, placement: Placement, *, seldom: bool) -> tuple[jax.stages.Traced, CompilerOptions]:
    """The program of `CompiledSteps` before it is lowered, for these devices or for others, and options for the compiler.

    Args:
        step: the step that the program runs.
        arrays: arrays of a block, or their shapes, each of shape (capacity, batch, ...), or a `Lookup`.
        placement: where state and batches live.
        seldom: whether compiling it will take longer than running it.
    """
    fixed, state, arrays = shapes_of((step.read_fixed(), step.read(), arrays))
    batch = jax.eval_shape(lambda arrays: _batch(arrays, 0), arrays)
    capacity = jax.tree.leaves(arrays)[0].shape[0]
    run_step, outputs, options = _trace(step, fixed, state, batch, placement, seldom)
    predicts = step.name == "predict"
    many = _predict_many(run_step, outputs, capacity) if predicts else _run_many(run_step, capacity, guarded=step.may_end_training(outputs))
    stored = [jax.tree.map(placement.stored, *pair) for pair in zip(step.leaves, (fixed, state))]
    program = jax.jit(many, donate_argnums=1, **_shardings(placement, stored, arrays, outputs if predicts else None, capacity))
    tally = Tally(jax.ShapeDtypeStruct((), np.int32), jax.ShapeDtypeStruct((), np.bool_), None if predicts else outputs)
    return program.trace(fixed, state, tally, jax.ShapeDtypeStruct((), np.int32), arrays), options


def _trace(step: Step, fixed, state, batch, placement: Placement, seldom: bool) -> tuple[Callable, Any, CompilerOptions]:
    """The step as a function that no longer runs the model's Python code, the shapes of its outputs, and options for the compiler."""
    closed, (outputs, new_state) = jaxpr_of(planned_function(step, placement, batch), fixed, state, batch)
    if placement.plan.precision == "bfloat16":
        closed = in_bfloat16(closed)
    backend = backends.current()
    options = backend.compiler_options(closed, seldom=seldom)
    closed = backend.rewrite(closed)
    if placement.mesh is not None:
        closed = _evenly(closed, step, fixed, state, batch, outputs, placement, placement.mesh)
    flat = compat.jaxpr_as_function(closed)
    structure = jax.tree.structure((outputs, new_state))
    held = step.leaves

    def run_step(fixed, state, batch):
        inputs = placement.constrain(placement.computed, held, (fixed, state))
        results = flat(*jax.tree.leaves((inputs, placement.split_batch(batch))))
        outputs, new = jax.tree.unflatten(structure, results)
        # A custom train_step may change a dtype (float32 to float64, say); a loop needs the one it started with.
        new = jax.tree.map(lambda old, array: array.astype(old.dtype), state, new)
        return outputs, placement.constrain(placement.stored, held[1], new)

    return run_step, outputs, options


def _evenly(closed: ClosedJaxpr, step: Step, fixed, state, batch, outputs, placement: Placement, mesh: Mesh) -> ClosedJaxpr:
    """The traced step with no array split unevenly under the plan."""
    held = step.leaves
    given = jax.tree.map(placement.computed, held, (fixed, state)), jax.tree.map(lambda leaf: placement.batch(leaf.shape), batch)
    predicted = jax.tree.map(lambda leaf: placement.batch(leaf.shape) if step.name == "predict" else None, outputs)
    left = predicted, jax.tree.map(placement.stored, held[1], state)
    leaves = lambda tree: jax.tree.leaves(tree, is_leaf=lambda leaf: leaf is None)  # noqa: E731
    return evenly(closed, mesh, given=leaves(given), left=leaves(left))


def _run_many(run_step: Callable, capacity: int, *, guarded: bool) -> Callable:
    """Steps one after the other, each on the next batch; `guarded` ones stop at a loss that is not finite."""

    def advance(fixed, state, tally, batch):
        logs, new = run_step(fixed, state, batch)
        healthy = tally.healthy & jnp.isfinite(logs["loss"]) if guarded else tally.healthy
        return new, Tally(tally.done + healthy, healthy, logs)

    def once(fixed, state, tally, steps, arrays):
        return *advance(fixed, state, tally, _batch(arrays, 0)), None

    def loop(fixed, state, tally, steps, arrays):
        def more(carry):
            index, _, tally = carry
            return (index < steps) & tally.healthy

        def body(carry):
            index, state, tally = carry
            return index + 1, *advance(fixed, state, tally, _batch(arrays, index))

        _, state, tally = jax.lax.while_loop(more, body, (jnp.int32(0), state, tally))
        return state, tally, None

    return once if capacity == 1 else loop


def _predict_many(run_step: Callable, outputs, capacity: int) -> Callable:
    """Predictions for batch after batch, collected in one array per output."""

    def once(fixed, state, tally, steps, arrays):
        predictions, state = run_step(fixed, state, _batch(arrays, 0))
        return state, tally, jax.tree.map(lambda array: array[None], predictions)

    def loop(fixed, state, tally, steps, arrays):
        def body(index, carry):
            state, collected = carry
            predictions, state = run_step(fixed, state, _batch(arrays, index))
            return state, jax.tree.map(
                lambda array, part: jax.lax.dynamic_update_index_in_dim(array, part, index, 0), collected, predictions
            )

        empty = jax.tree.map(lambda leaf: jnp.zeros((capacity, *leaf.shape), leaf.dtype), outputs)
        state, collected = jax.lax.fori_loop(0, steps, body, (state, empty))
        return state, tally, collected

    return once if capacity == 1 else loop


def _batch(arrays, index):
    if isinstance(arrays, Lookup):
        rows = jax.lax.dynamic_index_in_dim(arrays.rows, index, keepdims=False)
        return jax.tree.map(lambda array: jnp.take(array, rows, axis=0, mode="clip"), arrays.table)
    return jax.tree.map(lambda array: jax.lax.dynamic_index_in_dim(array, index, keepdims=False), arrays)


def _shardings(placement: Placement, stored, arrays, outputs, capacity: int) -> dict:
    """How a program's arguments and results lie on the devices, for `jax.jit`; nothing to say for one device."""
    if placement.mesh is None:
        return {}
    whole, (fixed, state) = placement.replicated, stored
    collected = jax.tree.map(lambda leaf: placement.block((capacity, *leaf.shape)), outputs)
    return {"in_shardings": (fixed, state, whole, whole, placement.blocks(arrays)), "out_shardings": (state, whole, collected)}
