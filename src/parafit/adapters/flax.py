"""Flax NNX modules: trained, evaluated and asked for predictions like Keras models, and traced.

Only the modules called `flax` and `flax_…` import Flax and Optax.
"""

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from parafit.adapters.flax_checks import check_rows, sizes_of, try_out
from parafit.adapters.flax_variables import NamedVariable, VariableGroup, variables_of
from parafit.adapters.step import Parts, State, Step
from parafit.errors import ModelError
from parafit.planner.program import Leaf, Program
from parafit.support.compat import unpack
from parafit.tracing.trace import trace, tree_leaves

_GRAPHS: WeakKeyDictionary[nnx.Module, Any] = WeakKeyDictionary()


class Trainable:
    """A Flax NNX module with its loss and optimizer: what `fit`, `evaluate`, `predict` and `find_plan` take in place of a Keras model.

    `fit` computes the loss as after `module.train()`, `evaluate` and `predict` as after `module.eval()`; the module's own modes stay as
    they are. Variables of module and optimizer are updated in place, batch statistics and random states among them.

    Args:
        module: what is trained; `predict` gives `module(x)`.
        loss: `(module, batch) -> scalar`, or `(scalar, measures)` with a dict of scalars that are logged as means over an epoch's rows.
            The batch is what `fit` was given, some rows of it: `x`, `(x, y)`, or `(x, y, sample_weight)`.
        optimizer: an `nnx.Optimizer`, or an Optax transformation for all of the module's `nnx.Param`.
        name: of the model, in messages; default: that of the module's class.

    Raises:
        ModelError: not a module, or an optimizer that is neither.

    >>> import parafit
    >>> module = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    >>> model = Trainable(module, loss=lambda module, batch: jnp.mean((module(batch[0]) - batch[1]) ** 2), optimizer=optax.sgd(0.1))
    >>> x = np.linspace(-1, 1, 256, dtype="float32")[:, None]
    >>> history = parafit.fit(model, x, 3 * x + 1, epochs=20, verbose=0)
    >>> module.kernel.get_value().round(1).tolist(), module.bias.get_value().round(1).tolist()
    ([[3.0]], [1.0])
    """

    steps_per_execution = 1
    stop_training = stop_evaluating = stop_predicting = False
    history: Any = None

    def __init__(self, module: nnx.Module, *, loss: Callable | None = None, optimizer: Any = None, name: str = ""):
        if not isinstance(module, nnx.Module):
            raise ModelError(f"expected a Flax NNX module, got {type(module).__name__}: {module!r:.80}.")
        self.module = module
        self.loss: Any = loss
        self.optimizer: Any = _optimizer(module, optimizer)
        self.name = name or type(module).__name__.lower()
        self.measures: dict[str, nnx.Variable] = {}
        self.tried: set = set()

    def reset_metrics(self) -> None:
        """Start the means of a new epoch."""
        for variable in self.measures.values():
            variable.set_raw_value(jnp.zeros_like(variable.get_raw_value()))

    def get_weights(self) -> list[np.ndarray]:
        """The values of all variables of the module but its random states."""
        return [np.asarray(variable.get_raw_value()) for variable in self._variables()]

    def set_weights(self, weights: Sequence[np.ndarray]) -> None:
        """Take values over that `get_weights` gave."""
        for variable, value in zip(self._variables(), weights, strict=True):
            variable.set_raw_value(jnp.asarray(value))

    def _variables(self) -> list[nnx.Variable]:
        return variables_of(nnx.state(self.module, nnx.Not(nnx.RngState)))

    def __getattr__(self, name: str):
        raise AttributeError(
            f"a Flax module has no {name!r}. Callbacks that read logs, end training (stop_training) or use get_weights and set_weights "
            "work with it; those that save the model or change its optimizer need a Keras model."
        )


class FlaxModel:
    """A Flax NNX module the way parafit runs it: a `parafit.adapters.step.Adapter`.

    Args:
        model: a `Trainable`, or a bare module for "predict".
        verb: "fit", "evaluate" or "predict": what it is to be used for.

    Raises:
        ModelError: it lacks the loss or optimizer that the verb needs.
    """

    def __init__(self, model: Trainable | nnx.Module, verb: str):
        self.model = model if isinstance(model, Trainable) else Trainable(model)
        self.keeper = self.model.module
        _check(self.model, verb)
        optimizer = self.model.optimizer
        self._graph, weights, rest = nnx.split(self.keeper, optimizer.wrt if optimizer else nnx.Param, ...)
        self._weights, self._rest = VariableGroup(weights), VariableGroup(rest)
        self._slots = VariableGroup((optimizer.opt_state, optimizer.step), "optimizer/") if optimizer else VariableGroup(())

    def why_stepwise(self) -> str | None:
        """Modules always run in chunks."""
        return None

    def check(self, source: Any, verb: str) -> bool:
        """Try the module, or its loss, on shapes of batches that it has not met yet; see `parafit.adapters.checks.check`.

        Args:
            source: a `parafit.data.source.Source`.
            verb: "fit", "evaluate" or "predict".
        """
        source.inspect(lambda batch: self._try_out(batch, verb) or batch)
        if source.knows_shapes:
            self._try_out(source.shapes(), verb)
        return source.knows_shapes

    def _try_out(self, batch: Any, verb: str) -> None:
        specs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), batch)
        key = verb, jax.tree.structure(specs), tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(specs))
        if key in self.model.tried:
            return
        weights, rest, name = self._weights.read(), self._rest.read(), self.model.name
        if verb == "predict":
            step = self.predict_step()
            try_out(lambda batch: step.function(weights, State(others=rest), batch)[0], specs, what=f"the output of {name!r}")
        else:
            loss = lambda batch: self._loss(weights, State(others=rest), batch, training=verb == "fit")  # noqa: E731
            self._take_measures(*try_out(loss, specs, what=f"the loss of {name!r}"))
            check_rows(lambda batch: loss(batch)[0], specs, name=name, sizes=sizes_of((weights, rest)))
        self.model.tried.add(key)

    def build(self, example: Callable[[], Any]) -> None:
        """Find out what the loss measures."""
        if not self.model.measures:
            self._try_out(example(), "fit")

    def _take_measures(self, value: Any, found: tuple) -> None:
        if value.shape:
            raise ModelError(
                f"the loss of {self.model.name!r} has shape {value.shape}, and must be a scalar: take its mean over the batch."
            )
        names = ("rows", "loss", *sorted(found[1]))
        if not self.model.measures:
            self.model.measures = {name: nnx.Variable(jnp.zeros((), value.dtype)) for name in names}

    def build_layers(self, example: Callable[[], Any]) -> None:
        """Modules have their variables from the start."""

    def train_step(self) -> Step:
        """Loss, gradients and update as `nnx.Optimizer` makes it."""
        parts = Parts(loss=self._loss, measure=self._measure, update=self._update, couples=_why_rows_couple(self.keeper))

        def function(fixed, state, batch):
            (_, (loss, found, others, _)), gradients = jax.value_and_grad(self._loss, has_aux=True)(state.weights, state, batch)
            logs, metrics = self._measure(state.metrics, loss, found, batch)
            weights, slots = self._update(state.slots, gradients, state.weights)
            return logs, State(weights, others, slots, metrics)

        held = State(self._weights.variables, self._rest.variables, self._slots.variables, self._measures())
        return self._step("train", function, held, stops_on_bad_loss=True, parts=parts)

    def test_step(self) -> Step:
        """The loss, nothing learned."""

        def function(weights, state, batch):
            _, (loss, found, others, _) = self._loss(weights, state, batch, training=False)
            logs, metrics = self._measure(state.metrics, loss, found, batch)
            return logs, state._replace(others=others, metrics=metrics)

        held = State(others=self._rest.variables, metrics=self._measures())
        return self._step("test", function, held, fixed=self._weights.variables)

    def predict_step(self) -> Step:
        """The module's outputs."""

        def function(weights, state, batch):
            module = self._merge(weights, state.others, training=False)
            outputs = module(unpack(batch)[0])
            return outputs, state._replace(others=self._rest_of(module))

        return self._step("predict", function, State(others=self._rest.variables), fixed=self._weights.variables)

    def result(self, logs: dict) -> dict[str, float]:
        """The means over the epoch, the loss first."""
        return {name: float(logs[name]) for name in self.model.measures if name in logs}

    def scores(self, logs: dict) -> Any:
        """The loss alone, or a list that begins with it."""
        return list(logs.values()) if len(logs) > 1 else logs["loss"]

    def finish_training(self) -> None:
        """Nothing: Optax has no last step."""

    def config(self) -> None:
        """Nothing but tracing tells modules, losses and transformations apart."""

    def set_hyperparameter(self, name: str, value: float) -> None:
        """Let the optimizer use another number; see `parafit.adapters.step.Adapter`.

        Args:
            name: of the number.
            value: to use.
        """
        held = [each for each in self._slots.variables if each.path.endswith(f"hyperparams/{name}")]
        if not held:
            raise ModelError(
                f"the optimizer of {self.model.name!r} holds no variable {name!r}. Optax keeps numbers in variables where it is asked to: "
                f"optax.inject_hyperparams(optax.adam)({name}=...)."
            )
        for each in held:
            each.write(jnp.asarray(value, each.read().dtype))

    def _loss(self, weights, state, batch, training: bool = True):
        """See `Parts.loss`; what the loss measures takes the place of predictions."""
        module = self._merge(weights, state.others, training=training)
        found = self.model.loss(module, batch)
        value, measures = found if isinstance(found, tuple) else (found, {})
        return value, (value, measures, self._rest_of(module), state.metrics)

    def _measure(self, totals, loss, measures: dict, batch):
        """See `Parts.measure`: means over all rows of the epoch so far."""
        _, *names = self.model.measures
        values = {"loss": loss, **measures}
        if set(values) != set(names):
            raise ModelError(f"the loss of {self.model.name!r} measured {', '.join(names)} before, and {', '.join(values)} now.")
        rows = next(leaf.shape[0] for leaf in jax.tree.leaves(batch) if leaf.ndim)
        count, *sums = totals
        sums = [total + rows * values[name].astype(total.dtype) for name, total in zip(names, sums)]
        return {name: total / (count + rows) for name, total in zip(names, sums)}, [count + rows, *sums]

    def _update(self, slots, gradients, weights):
        """See `Parts.update`: what `nnx.Optimizer.update` does, on arrays."""
        weights, gradients = self._weights.tree(weights), self._weights.tree(gradients)
        slots, step = self._slots.tree(slots)
        changes, slots = self.model.optimizer.tx.update(gradients, slots, weights)
        return self._weights.arrays(optax.apply_updates(weights, changes)), self._slots.arrays((slots, step + 1))

    def _merge(self, weights, rest, *, training: bool) -> nnx.Module:
        module = nnx.merge(self._graph, self._weights.tree(weights), self._rest.tree(rest))
        module.train() if training else module.eval()
        return module

    def _rest_of(self, module: nnx.Module) -> list[jax.Array]:
        """The variables that are not trained, after a call; what it has sown is dropped."""
        nnx.pop(module, nnx.Intermediate)
        wrt = self.model.optimizer.wrt if self.model.optimizer else nnx.Param
        rest = nnx.as_pure(nnx.split(module, wrt, ...)[2])
        if jax.tree.structure(rest) != self._rest.structure:
            raise ModelError(f"{self.model.name!r} makes or drops variables when it is called. Make them when the module is made.")
        return self._rest.arrays(rest)

    def _measures(self) -> list[NamedVariable]:
        return VariableGroup(list(self.model.measures.values()), "measures/").variables

    def _step(self, name: str, function: Callable, variables: State, *, fixed: Sequence[NamedVariable] = (), **options) -> Step:
        for held in (each for group in variables for each in group):
            held.own()
        graph = _GRAPHS.setdefault(self.keeper, self._graph)
        if graph != self._graph:
            graph = _GRAPHS[self.keeper] = self._graph
        identity = graph, self.model.loss, *(each.variable for each in (*fixed, *(held for group in variables for held in group)))
        access = {"get": NamedVariable.read, "put": NamedVariable.write}
        return Step(name=name, function=function, variables=variables, fixed_variables=fixed, identity=identity, **access, **options)


def _optimizer(module: nnx.Module, optimizer: Any) -> nnx.Optimizer | None:
    if optimizer is None:
        return None
    if isinstance(optimizer, nnx.Optimizer) and type(optimizer).update is nnx.Optimizer.update:
        return optimizer
    if isinstance(optimizer, optax.GradientTransformation):
        return nnx.Optimizer(module, optimizer, wrt=nnx.Param)
    raise ModelError(
        f"optimizer={optimizer!r:.80} is a {type(optimizer).__name__}: expected an Optax transformation such as optax.adam(1e-3), or an "
        "nnx.Optimizer that updates as nnx.Optimizer does."
    )


def _check(model: Trainable, verb: str) -> None:
    if verb != "predict" and model.loss is None:
        raise ModelError(
            f"{model.name!r} has no loss, so {verb} has nothing to compute. Pass parafit.nnx.Trainable(module, loss=..., ...)."
        )
    if verb == "fit" and model.optimizer is None:
        raise ModelError(
            f"{model.name!r} has no optimizer, so fit cannot train it. Pass parafit.nnx.Trainable(..., optimizer=optax.adam(1e-3))."
        )


def _why_rows_couple(module: nnx.Module) -> str:
    """Why the loss of a batch is not the mean of the losses of its parts, as far as the kinds of modules tell."""
    for path, part in nnx.iter_graph(module):
        if isinstance(part, nnx.BatchNorm):
            return f"module {'/'.join(map(str, path))!r} normalises by the statistics of the batch"
    return ""


def trace_nnx(model: nnx.Module, loss: Callable, batch, *, optimizer=None, name: str = "") -> Program:
    """The program of a training step of a Flax NNX module.

    Args:
        model: a module, or one without arrays as `nnx.eval_shape(lambda: Net(rngs=nnx.Rngs(0)))` makes it.
        loss: `(model, batch) -> scalar`.
        batch: a pytree of arrays or `jax.ShapeDtypeStruct`s, rows first.
        optimizer: an Optax transformation: a pair of functions `(init, update)`; None: gradients only.
        name: of the model.

    Returns:
        Its program. Parameters are named by their path: "blocks/0/linear/kernel".

    Raises:
        ModelError: the module cannot be traced.

    >>> model = nnx.eval_shape(lambda: nnx.Linear(784, 10, rngs=nnx.Rngs(0)))
    >>> program = trace_nnx(model, lambda model, x: model(x).sum(), jax.ShapeDtypeStruct((32, 784), "float32"))
    >>> program.tensors["kernel"].dims
    ('x/features', 'kernel/units')
    """
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)
    init, update = optimizer[:2] if optimizer is not None else (lambda weights: (), None)
    slots = jax.eval_shape(init, parameters)

    def value(parameters, rest, batch):
        merged = nnx.merge(graph, parameters, rest, copy=True)
        return loss(merged, batch), nnx.split(merged, nnx.Param, ...)[2]

    def step(parameters, rest, slots, batch):
        (result, rest), gradients = jax.value_and_grad(value, has_aux=True)(parameters, rest, batch)
        if update is None:
            return result, gradients, rest
        changes, slots = update(gradients, slots, parameters)
        return result, jax.tree.map(lambda old, change: old + change.astype(old.dtype), parameters, changes), rest, slots

    leaves = [*_leaves(parameters, "parameter"), *_leaves(rest, "state"), *_leaves(slots, "slot")]
    return trace(step, (parameters, rest, slots, batch), [*leaves, *tree_leaves(batch, "input", "x")], results=leaves, name=name)


def _leaves(tree, role: str) -> list[Leaf]:
    """Variables are leaves called "value" of the tree: the name is that of the variable."""
    return [Leaf(name=leaf.name.removesuffix("/value"), role=role) for leaf in tree_leaves(tree, role, role)]
