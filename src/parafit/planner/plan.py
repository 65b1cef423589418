"""`Plan`: who does what, and when. Plain Python: imports neither JAX nor Keras."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from parafit.errors import PlanError
from parafit.planner.schedules import SCHEDULES
from parafit.support.arguments import did_you_mean

AXES = {"data": "batch", "tensor": "inner", "pipeline": "blocks"}
"""The mesh axes a plan may name, each with what a plan's text maps to it: the rows of the batch; "inner", which stands for
the dims that `layout.resolve` finds once the model is known (hidden widths, heads, vocabulary); the sequence of blocks."""

STORED = ("slot", "gradient", "parameter")
"""What a `store` layout may split: ZeRO stage 1 splits the first, stage 2 the first two, stage 3 (FSDP) all three."""

RECOMPUTE = ("none", "blocks")

PRECISIONS = ("float32", "bfloat16")

STATISTICS = ("batch", "microbatch")
"""Of which rows a layer that ties rows together, such as BatchNorm, takes its statistics."""

_TEXT_CHOICES = {"recompute": RECOMPUTE, "precision": PRECISIONS, "schedule": tuple(SCHEDULES), "statistics": STATISTICS}

_CHOICES = ("zero", "store_group", "microbatches", "interleave", *_TEXT_CHOICES)

_WORDS = ("auto", "single", *AXES, *_CHOICES)

_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Mesh axes with their sizes, and the two layouts that map dims to axes.

    Args:
        axes: size of each mesh axis by name ("data", "tensor", "pipeline"); the product is the number of devices. Empty: one device.
        compute: how operations run: dim name → axis name, in order: a tensor is split along the first of its dims that is
            mapped to an axis (so {"ffn": "tensor", "sequence": "tensor"} splits the width inside blocks and the sequence between them).
            Data parallel is `{"batch": "data"}`.
        store: how training state rests in memory: role ("slot", "gradient", "parameter") → axis name; each tensor of the
            role is also split along its largest dimension that the axis divides. Empty: as `compute` has it.
        store_group: neighbours along the store axis over which state is split; 0 means the whole axis. (Hybrid sharding inside a host.)
        microbatches: parts a device's share of the batch is cut into, gradients accumulated (and what a pipeline pumps through).
        recompute: "none", or "blocks": activations inside blocks are computed again in the backward pass.
        precision: "float32", or "bfloat16": operands of float32 products and convolutions; results, state and all else stay float32.
        interleave: chunks of the model per pipeline stage (1F1B with virtual stages).
        schedule: one of `parafit.planner.schedules.SCHEDULES`, of a plan with a pipeline.
        statistics: "batch", or "microbatch": layers that tie the rows of a batch, such as BatchNorm, tie those of a microbatch.

    Raises:
        PlanError: an axis parafit does not know, a size that is not a whole number of at least 2, or an
            axis that no dim is mapped to (it would split nothing).

    >>> plan = Plan.parse("data=8")
    >>> plan.device_count, plan.compute["batch"]
    (8, 'data')
    >>> Plan.from_json(plan.to_json()) == plan
    True
    >>> print(plan)
    plan    data=8 (8 devices)
    compute batch → data
    store   every device keeps all parameters and optimiser state
    """

    axes: Mapping[str, int] = field(default_factory=dict)
    compute: Mapping[str, str] = field(default_factory=dict)
    store: Mapping[str, str] = field(default_factory=dict)
    store_group: int = 0
    microbatches: int = 1
    recompute: str = "none"
    precision: str = "float32"
    interleave: int = 1
    schedule: str = "1f1b"
    statistics: str = "batch"
    ranking: ClassVar[Any] = None  # of a plan that a search found: the `Ranking` it is the best of; no part of the plan itself

    def __post_init__(self):
        for name in ("axes", "compute", "store"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
        for axis, size in self.axes.items():
            _check_axis(axis, size)
        for name, axis in (*self.compute.items(), *self.store.items()):
            if axis not in self.axes:
                raise PlanError(f"{name!r} is mapped to axis {axis!r}, but the plan's axes are {_names(self.axes)}. Map it to one of them.")
        _check_choices(self)
        idle = set(self.axes) - set(self.compute.values()) - set(self.store.values())
        if idle:
            raise PlanError(
                f"axis {sorted(idle)[0]!r} splits nothing: no dim is mapped to it. Map one (such as batch → data) or leave the axis out."
            )

    def __hash__(self):
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(self.to_json())

    def __reduce__(self):
        return Plan.from_json, (self.to_json(),)

    @property
    def device_count(self) -> int:
        """How many devices the plan runs on: the product of the axis sizes."""
        return math.prod(self.axes.values())

    @property
    def stages(self) -> int:
        """How many stages a network is cut into: devices of the pipeline × chunks."""
        return self.axes.get("pipeline", 1) * self.interleave

    @property
    def inside(self) -> "Plan":
        """The plan of a stage of the pipeline: the other axes, with microbatches one after the other.

        >>> Plan.parse("pipeline=4,data=2,microbatches=8").inside.short()
        'data=2,microbatches=8'
        """
        axes = {axis: size for axis, size in self.axes.items() if axis != "pipeline"}
        compute = {dim: axis for dim, axis in self.compute.items() if axis != "pipeline"}
        idle = {choice.name: choice.default for choice in fields(self) if choice.name in ("interleave", "schedule")}
        return replace(self, axes=axes, compute=compute, **idle)

    @property
    def zero_stage(self) -> int:
        """How much of the training state `store` splits, by the names of ZeRO: 0 none, 1 slots, 2 gradients too, 3 parameters too."""
        return len(self.store)

    @classmethod
    def parse(cls, text: str) -> "Plan":
        """The plan written as `"data=8"`; `"single"` is one device.

        Beside the axes: `zero=1|2|3` (split optimiser slots, gradients, parameters over the data axis), `microbatches=4`,
        `recompute=blocks`, `precision=bfloat16`, `interleave=2`, `schedule=zb-h1`, `statistics=microbatch`, `store_group=8`.

        Raises:
            PlanError: the text is not `NAME=VALUE` pairs separated by commas, or names something a plan does not have.

        >>> Plan.parse("single").device_count
        1
        >>> Plan.parse("data=4,tensor=2,zero=1").store
        mappingproxy({'slot': 'data'})
        """
        if text.strip() == "single":
            return cls()
        if text.strip() == "auto":
            raise PlanError("'auto' is no plan: it lets fit, evaluate and predict choose one. Name a plan here, such as 'single'.")
        fields: dict[str, str] = {}
        for part in text.split(","):
            name, equals, value = (piece.strip() for piece in part.partition("="))
            if not equals or not value:
                raise PlanError(
                    f"cannot read {part.strip()!r} in plan {text!r}: expected AXIS=SIZE such as 'data=8', or 'single' for one device."
                    + did_you_mean(part.strip(), _WORDS)
                )
            if name in fields:
                raise PlanError(f"plan {text!r} names {name!r} twice.")
            fields[name] = value
        zero = _whole(text, "zero", fields.pop("zero", "0"))
        if zero > len(STORED):
            raise PlanError(
                f"plan {text!r}: zero={zero} is not a stage of ZeRO. Choose 1 (slots), 2 (and gradients) or 3 (and parameters)."
            )
        numbers: dict[str, Any] = {
            name: _whole(text, name, fields.pop(name)) for name in ("store_group", "microbatches", "interleave") if name in fields
        }
        words: dict[str, Any] = {name: fields.pop(name) for name in _TEXT_CHOICES if name in fields}
        axes = {axis: _size(text, axis, size) for axis, size in fields.items()}
        return cls(axes=axes, compute={AXES[axis]: axis for axis in axes}, store=dict.fromkeys(STORED[:zero], "data"), **numbers, **words)

    def to_json(self) -> str:
        """The plan as JSON text, the same for equal plans."""
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        return json.dumps({"format": _FORMAT} | {name: dict(part) if isinstance(part, Mapping) else part for name, part in content.items()})

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The plan that `to_json` wrote.

        Raises:
            PlanError: not JSON, another format, or fields a plan does not have.
        """
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(f"this is not a plan's JSON ({error}).") from error
        if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
            raise PlanError(f"this JSON is not a parafit plan of format {_FORMAT}: it starts {text[:60]!r}.")
        unknown = set(content) - {field.name for field in fields(cls)}
        if unknown:
            raise PlanError(f"this plan has fields parafit does not know: {_names(unknown)}. It may come from a newer parafit.")
        return cls(**content)

    @classmethod
    def read(cls, plan: "Plan | str | Path") -> "Plan":
        """A plan as such, as text, or in a file.

        Raises:
            PlanError: neither a plan, nor a plan's text, nor a file that holds one.

        >>> Plan.read("data=4").device_count
        4
        """
        if isinstance(plan, Plan):
            return plan
        if isinstance(plan, Path) or str(plan).endswith(".json"):
            return cls.load(plan)
        if not isinstance(plan, str):
            raise PlanError(
                f"plan={plan!r} is a {type(plan).__name__}: expected 'auto', a Plan, a text such as 'data=8', or the path of a JSON file."
            )
        return cls.parse(plan)

    @classmethod
    def load(cls, path: "str | Path") -> "Plan":
        """Read a plan's JSON file.

        Raises:
            PlanError: the file cannot be read, or does not hold a plan.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"cannot read a plan from {str(path)!r}: {error}.") from error

    def short(self) -> str:
        """One line that `parse` reads: `data=8`, or `single`."""
        parts = dict(self.axes)
        if self.store:
            parts["zero"] = self.zero_stage
        for choice in fields(self)[3:]:
            if getattr(self, choice.name) != choice.default:
                parts[choice.name] = getattr(self, choice.name)
        return ",".join(f"{name}={value}" for name, value in parts.items()) or "single"

    def __str__(self):
        devices = "one device" if self.device_count == 1 else f"{self.device_count} devices"
        compute = ", ".join(f"{dim} → {axis}" for dim, axis in self.compute.items()) or "all of it on the one device"
        store = (
            ", ".join(f"{role}s → {axis}" for role, axis in self.store.items()) or "every device keeps all parameters and optimiser state"
        )
        found = f"\n{self.ranking.table()}" if self.ranking else ""
        return f"plan    {self.short()} ({devices})\ncompute {compute}\nstore   {store}{found}"


def _check_axis(axis: str, size: int) -> None:
    if axis not in AXES:
        raise PlanError(_unknown(axis, AXES))
    if not isinstance(size, int) or isinstance(size, bool) or size < 2:
        raise PlanError(
            f"axis {axis}={size!r} splits nothing: a size is a whole number of at least 2. Leave the axis out for one device ('single')."
        )


def _check_choices(plan: Plan) -> None:
    for role in plan.store:
        if role not in STORED:
            raise PlanError(f"store maps {role!r}, but what a plan stores are {_names(STORED)}.")
    if set(plan.store) != set(STORED[: len(plan.store)]):
        raise PlanError(f"store splits {_names(plan.store)}: gradients are split only where slots are, parameters only where both are.")
    for name, least in (("store_group", 0), ("microbatches", 1), ("interleave", 1)):
        value = getattr(plan, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise PlanError(f"{name}={value!r}: expected a whole number of at least {least}.")
    for axis in set(plan.store.values()) if plan.store_group else ():
        if plan.axes[axis] % plan.store_group:
            raise PlanError(f"store_group={plan.store_group} does not divide axis {axis}={plan.axes[axis]}. Choose a number that does.")
    for name, known in _TEXT_CHOICES.items():
        if getattr(plan, name) not in known:
            raise PlanError(
                f"{name}={getattr(plan, name)!r}: choose one of {_names(known)}." + did_you_mean(str(getattr(plan, name)), known)
            )


def _unknown(axis: str, known: Iterable[str]) -> str:
    return f"unknown axis {axis!r}: this version runs the axes {_names(AXES)}.{did_you_mean(axis, known)}"


def _size(text: str, axis: str, size: str) -> int:
    if axis not in AXES:
        raise PlanError(f"plan {text!r}: {_unknown(axis, (*AXES, *_CHOICES))}")
    return _whole(text, axis, size)


def _whole(text: str, name: str, value: str) -> int:
    if not value.lstrip("-").isdigit():
        raise PlanError(f"cannot read '{name}={value}' in plan {text!r}: expected {name}=NUMBER such as '{name}=2'.")
    return int(value)


def _names(names) -> str:
    return ", ".join(repr(name) for name in sorted(names)) or "none"
