"""`Plan`: who does what, and when. Plain Python: imports neither JAX nor Keras."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from parafit.errors import PlanError

AXES = {"data": "batch"}
"""The mesh axes a plan may name, each with the dim its `compute` layout maps to it."""

_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Mesh axes with their sizes, and the two layouts that map dims to axes.

    Args:
        axes: size of each mesh axis by name; the product is the number of devices. Empty: one device.
        compute: how operations run: dim name → axis name. Data parallel is `{"batch": "data"}`.
        store: how parameters, gradients and optimiser state rest in memory: dim name → axis name.
            Empty: every device keeps all of them.

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

    def __post_init__(self):
        for name in ("axes", "compute", "store"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
        for axis, size in self.axes.items():
            _check_axis(axis, size)
        for layout in (self.compute, self.store):
            for dim, axis in layout.items():
                if axis not in self.axes:
                    raise PlanError(
                        f"dim {dim!r} is mapped to axis {axis!r}, but the plan's axes are {_names(self.axes)}. Map it to one of them."
                    )
        idle = set(self.axes) - set(self.compute.values()) - set(self.store.values())
        if idle:
            raise PlanError(
                f"axis {sorted(idle)[0]!r} splits nothing: no dim is mapped to it. Map one (such as batch → data) or leave the axis out."
            )

    def __hash__(self):
        return hash(tuple(tuple(part.items()) for part in (self.axes, self.compute, self.store)))

    def __reduce__(self):
        return Plan.from_json, (self.to_json(),)

    @property
    def device_count(self) -> int:
        """How many devices the plan runs on: the product of the axis sizes."""
        return math.prod(self.axes.values())

    @classmethod
    def parse(cls, text: str) -> "Plan":
        """The plan written as `"data=8"`; `"single"` is one device.

        Raises:
            PlanError: the text is not `AXIS=SIZE` pairs separated by commas.

        >>> Plan.parse("single").device_count
        1
        """
        if text.strip() == "single":
            return cls()
        axes: dict[str, int] = {}
        for part in text.split(","):
            axis, equals, size = (piece.strip() for piece in part.partition("="))
            if not equals or not size.lstrip("-").isdigit():
                raise PlanError(
                    f"cannot read {part.strip()!r} in plan {text!r}: expected AXIS=SIZE such as 'data=8', or 'single' for one device."
                )
            if axis in axes:
                raise PlanError(f"plan {text!r} names axis {axis!r} twice.")
            _check_axis(axis, int(size))
            axes[axis] = int(size)
        return cls(axes=axes, compute={AXES[axis]: axis for axis in axes})

    def to_json(self) -> str:
        """The plan as JSON text, the same for equal plans."""
        content = {"format": _FORMAT, "axes": dict(self.axes), "compute": dict(self.compute), "store": dict(self.store)}
        return json.dumps(content, indent=2)

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
        unknown = set(content) - {"axes", "compute", "store"}
        if unknown:
            raise PlanError(f"this plan has fields parafit does not know: {_names(unknown)}. It may come from a newer parafit.")
        return cls(**content)

    @classmethod
    def read(cls, plan: "Plan | str | Path") -> "Plan":
        """The plan meant by a `plan=` argument; "auto" is one device.

        Raises:
            PlanError: neither a plan, nor a plan's text, nor a file that holds one.

        >>> Plan.read("auto").device_count, Plan.read("data=4").device_count
        (1, 4)
        """
        if isinstance(plan, Plan):
            return plan
        if isinstance(plan, Path) or str(plan).endswith(".json"):
            return cls.load(plan)
        if not isinstance(plan, str):
            raise PlanError(
                f"plan={plan!r} is a {type(plan).__name__}: expected 'auto', a Plan, a text such as 'data=8', or the path of a JSON file."
            )
        return cls() if plan == "auto" else cls.parse(plan)

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
        """One line: `data=8`, or `single`."""
        return ",".join(f"{axis}={size}" for axis, size in self.axes.items()) or "single"

    def __str__(self):
        devices = "one device" if self.device_count == 1 else f"{self.device_count} devices"
        compute = ", ".join(f"{dim} → {axis}" for dim, axis in self.compute.items()) or "all of it on the one device"
        store = ", ".join(f"{dim} → {axis}" for dim, axis in self.store.items()) or "every device keeps all parameters and optimiser state"
        return f"plan    {self.short()} ({devices})\ncompute {compute}\nstore   {store}"


def _check_axis(axis: str, size: int) -> None:
    if axis not in AXES:
        raise PlanError(f"unknown axis {axis!r}: this version runs the axes {_names(AXES)}.")
    if not isinstance(size, int) or isinstance(size, bool) or size < 2:
        raise PlanError(
            f"axis {axis}={size!r} splits nothing: a size is a whole number of at least 2. Leave the axis out for one device ('single')."
        )


def _names(names) -> str:
    return ", ".join(repr(name) for name in sorted(names)) or "none"
