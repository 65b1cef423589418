"""A user's model as a pure step over explicit state."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import jax

from parafit.planner.program import Leaf, told_apart
from parafit.support import compat


class State(NamedTuple):
    """What a step changes, as groups of arrays (or of whatever stands for each array). A group that a step leaves alone is empty.

    Attributes:
        weights: what training changes.
        others: statistics, seeds and other variables of layers.
        slots: the optimizer's variables.
        metrics: the variables of metrics.
    """

    weights: Sequence[Any] = ()
    others: Sequence[Any] = ()
    slots: Sequence[Any] = ()
    metrics: Sequence[Any] = ()


def same_state(state: Sequence[Sequence[Any]], other: Sequence[Sequence[Any]]) -> bool:
    """Whether groups hold the very same arrays.

    Args:
        state, other: groups of arrays, in the same order.
    """
    return all(ours is theirs for group, others in zip(state, other) for ours, theirs in zip(group, others))


_KEPT: WeakKeyDictionary[Any, dict] = WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A training step in parts, for plans that put something between them.

    Attributes:
        loss: `(weights, state, batch) -> (scaled loss, (loss, predictions, others, metrics))`; the state's own weights are not read.
        measure: `(metrics, loss, predictions, batch) -> (logs, metrics)`.
        update: `(slots, gradients, weights) -> (weights, slots)`.
        couples: why rows of a batch are not independent, "" where no layer is known for it; a plan may allow it in microbatches.
        follows: why a batch's rows go on from those of the batch before, "" where they do not.
        weighs: why parts of a batch may weigh differently in its loss, "" where no layer is known for it.
    """

    loss: Callable
    measure: Callable
    update: Callable
    couples: str = ""
    follows: str = ""
    weighs: str = ""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a model as a pure function, and the variables its state comes from.

    Attributes:
        name: "train", "test" or "predict".
        function: `(fixed, state, batch) -> (outputs, state)`; outputs are the logs, or the predictions.
        variables: the model's variables that the step changes.
        fixed_variables: the weights that the step only reads.
        stops_on_bad_loss: whether a loss that is not finite ends training (not under loss scaling, which skips such steps).
        identity: objects that stay the same while a program compiled from this step stays right.
        parts: a training step in parts, None where the model's class has a step of its own.
        own: the method in which it has it, "" where it has none.
        get: gives the array of a variable, by reference.
        put: lets a variable hold an array, by reference.
    """

    name: str
    function: Callable[[list[jax.Array], State, Any], tuple[Any, State]]
    variables: State
    fixed_variables: Sequence[Any] = ()
    stops_on_bad_loss: bool = False
    identity: tuple
    parts: Parts | None = None
    own: str = ""
    get: Callable[[Any], Any] = compat.read_variable
    put: Callable[[Any, Any], None] = compat.write_variable

    @property
    def weights(self) -> Sequence[Any]:
        """The weights that training changes, whether or not this step does."""
        return self.variables.weights if self.name == "train" else self.fixed_variables

    @property
    def weight_count(self) -> int:
        """Numbers in all `weights` together."""
        return sum(math.prod(weight.shape) for weight in self.weights)

    @property
    def leaves(self) -> tuple[list[Leaf], State]:
        """What each array is that the step reads only, and each array of the state: this alone says what is a slot.

        Equal paths are numbered: Keras' Adafactor has several variables of one path.
        """
        variables = [variable for group in (self.fixed_variables, *self.variables) for variable in group]
        names = dict(zip(map(id, variables), told_apart(variable.path for variable in variables)))
        parameters = {names[id(weight)]: tuple(weight.shape) for weight in self.weights}
        fixed, *state = (
            [_leaf(variable, names[id(variable)], parameters) for variable in group] for group in (self.fixed_variables, *self.variables)
        )
        return fixed, State(*state)

    def may_end_training(self, logs: Any) -> bool:
        """Whether training ends where the loss among these logs is not finite; a step of the user's own may log what it likes."""
        return self.stops_on_bad_loss and isinstance(logs, dict) and getattr(logs.get("loss"), "shape", None) == ()

    def read(self) -> State:
        """The state as the model holds it now: arrays by reference."""
        return State(*([self.get(variable) for variable in group] for group in self.variables))

    def read_fixed(self) -> list[jax.Array]:
        """The arrays of the weights that the step only reads."""
        return [self.get(variable) for variable in self.fixed_variables]

    def write(self, state: State) -> None:
        """Let the model hold this state: arrays by reference."""
        for group, arrays in zip(self.variables, state):
            for variable, array in zip(group, arrays):
                self.put(variable, array)


class Adapter(Protocol):
    """A model the way parafit runs it.

    Attributes:
        model: what callbacks see.
        keeper: compiled programs are kept for as long as this object lives.
    """

    model: Any
    keeper: Any

    def why_stepwise(self) -> str | None:
        """Why this model must run one Python step at a time, None where whole chunks of steps can be compiled."""
        ...

    def build(self, example: Callable[[], Any]) -> None:
        """Create all variables; `example` draws a batch, and is called only if the model needs one."""
        ...

    def build_layers(self, example: Callable[[], Any]) -> None:
        """Create the variables that predicting needs."""
        ...

    def train_step(self) -> Step:
        """What `fit` runs."""
        ...

    def test_step(self) -> Step:
        """What `evaluate` runs."""
        ...

    def predict_step(self) -> Step:
        """What `predict` runs."""
        ...

    def result(self, logs: dict) -> dict[str, Any]:
        """An epoch's logs, from those of its last step; a step of the user's own may nest them."""
        ...

    def scores(self, logs: dict) -> Any:
        """Logs as `evaluate` returns them: a number if there is only the loss, else a list."""
        ...

    def finish_training(self) -> None:
        """What is done once after the last step."""
        ...

    def config(self) -> str | None:
        """What tells the model's steps from another's without tracing them; None where nothing else does."""
        ...

    def set_hyperparameter(self, name: str, value: float) -> None:
        """Let the optimizer use another number, such as "learning_rate".

        Args:
            name: of the number.
            value: to use.

        Raises:
            ModelError: it has none of this name, or none that can be set.
        """
        ...


def remembered(keeper: Any, step: Step, key: Hashable, make: Callable[[], Any]) -> Any:
    """What `make()` gave for this model and key, made once for as long as the model stays as it is.

    Args:
        keeper: the model's `Adapter.keeper`; what is kept goes when it goes.
        step: its `identity` tells whether the model is as it was.
        key: tells apart what is kept.
        make: called where nothing is kept, or nothing that is still right.
    """
    kept = _KEPT.setdefault(keeper, {})
    identity, made = kept.get((step.name, key), ((), None))
    if made is None or len(identity) != len(step.identity) or any(ours is not theirs for ours, theirs in zip(identity, step.identity)):
        made = make()
        kept[step.name, key] = step.identity, made
    return made


def _leaf(variable: Any, name: str, parameters: dict[str, tuple[int, ...]]) -> Leaf:
    """What the array of a variable is. A slot is named after its parameter, of whose shape it is.

    Keras: "adam/dense_kernel_momentum"; Flax: "optimizer/0/mu/dense/kernel".
    """
    path, shape = variable.path, tuple(variable.shape)
    if name in parameters:
        return Leaf(name=name, role="parameter")
    last = path.rpartition("/")[2]
    fits = (parameter for parameter in parameters if shape and parameters[parameter] == shape)
    owners = [
        parameter
        for parameter in fits
        if last.startswith(parameter.replace("/", "_") + "_") or (path.startswith("optimizer/") and path.endswith("/" + parameter))
    ]
    return Leaf(name=name, role="slot", like=max(owners, key=len)) if owners else Leaf(name=name, role="state")
