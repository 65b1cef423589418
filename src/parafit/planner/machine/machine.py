"""`Machine`: what computes. Devices, their memory, and the links between them, each number with its source. Plain Python.

A machine is read from JSON in which every number is `{"value": ..., "source": "..."}`. Presets are in `presets/`.
"""

import itertools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from parafit.errors import MachineError
from parafit.planner.machine.matmul import rate_between
from parafit.support.arguments import did_you_mean

PRESETS = Path(__file__).with_name("presets")

_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Matmul:
    """How much of a device's peak a matrix product reaches, by its shape.

    Two ways to say it. A table of measurements, for a calibrated machine; or the geometry of the kernels: the product is cut into
    tiles, `units` of them run at once, the last wave is not full, and the first and last steps of the inner loop do no work.

    Attributes:
        best: share of the peak that the best shape reaches, by precision.
        units: multiprocessors (or matrix units, or cores) that work on tiles side by side.
        tiles: (rows, columns, share): tiles a kernel may choose, with the share of `best` that a tile of that size sustains at the highest
            peak; slower precisions lose less, as far as their operands are not wider.
        fill: inner length that takes as long as starting a tile and writing it out, at the highest peak but float8's (a latency: a slower
            precision does less in that time).
        alignment: (bytes, share): a row whose bytes are a multiple of so many is read at that share; largest first. Empty: all alike.
        table: (precision, rows, inner, columns, FLOP/s) measured; where it has the precision, it is used and the geometry is not. Other
            ways to run a product are rows of their own: "float32 transposed" (a dense layer's kernel transposed, for its input's gradient),
            "float32 gradient" (of a dense layer's kernel), "float32 batched" (many at once), "float32 convolution" (a convolution by the
            product it stands for), "float32 correlation" (the gradient of its kernel).
    """

    best: Mapping[str, float] = field(default_factory=dict)
    units: int = 1
    tiles: tuple[tuple[float, ...], ...] = ((1, 1, 1.0),)
    fill: float = 0.0
    alignment: tuple[tuple[float, ...], ...] = ()
    table: tuple[tuple[Any, ...], ...] = ()

    @cached_property
    def _rates(self) -> dict[tuple, float]:
        return {}

    def rate(self, name: str, rows: float, inner: float, columns: float) -> float:
        """FLOP/s between what was measured under this name, 0 where nothing was; kept, for a program asks for few shapes, often.

        Args:
            name: name of a precision, with the form after a space, as in `table`.
            rows, inner, columns: sizes of the product.
        """
        asked = name, rows, inner, columns
        if asked not in self._rates:
            self._rates[asked] = rate_between(self.table, *asked)
        return self._rates[asked]


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device: what it computes and what it remembers.

    Attributes:
        name: what it is called.
        peak_flops: FLOP/s of matrix products by precision ("bfloat16", "float16", "float32", ...).
        memory_bytes: capacity.
        memory_bytes_per_second: what its memory moves at best, both directions together.
        memory_share: share of that which a large copy reaches.
        operation_seconds: what starting one operation costs between two others that are ready.
        dispatch_seconds: what starting a compiled program costs the host.
        context_bytes: memory that the runtime takes before any array exists.
        matmul: see `Matmul`.
        attention: share of the peak that fused attention reaches: "forward" and "backward".
        cores: processor cores or threads it computes with; 0 where that means nothing.
        curves: (bytes, seconds) measured of operations that are no products, by kind; "update" is the optimiser's. Where there are any,
            they are used and the memory's rate is not.
        loop_seconds: what one turn of a loop takes beside its operations.
        feed_bytes_per_second: rate at which the host gathers the rows of a batch; 0 where it costs the device nothing.
    """

    name: str
    peak_flops: Mapping[str, float]
    memory_bytes: float
    memory_bytes_per_second: float
    memory_share: float = 1.0
    operation_seconds: float = 0.0
    dispatch_seconds: float = 0.0
    context_bytes: float = 0.0
    matmul: Matmul = field(default_factory=Matmul)
    attention: Mapping[str, float] = field(default_factory=dict)
    cores: int = 0
    curves: Mapping[str, tuple[tuple[float, ...], ...]] = field(default_factory=dict)
    loop_seconds: float = 0.0
    feed_bytes_per_second: float = 0.0

    def curve_seconds(self, kind: str, nbytes: float) -> float:
        """Seconds of one operation of a kind that moves so many bytes, between measured ones on a straight line of logarithms.

        Args:
            kind: kind of operation; one that was not measured takes as long as an elementwise one.
            nbytes: bytes read and written.

        >>> curves = {"elementwise": ((1e3, 1e-7), (1e5, 1e-5), (1e7, 1e-2))}
        >>> device = Device(name="", peak_flops={}, memory_bytes=1, memory_bytes_per_second=1, curves=curves)
        >>> [device.curve_seconds("elementwise", size) for size in (1, 1e5, 2e7)]
        [1e-07, 1e-05, 0.02]
        """
        points = self.curves.get(kind) or self.curves["elementwise"]
        (low, least), (high, most) = points[0], points[-1]
        if nbytes <= low:
            return least
        if nbytes >= high:
            return most * nbytes / high
        before, after = next((one, other) for one, other in itertools.pairwise(points) if nbytes <= other[0])
        weight = math.log(nbytes / before[0]) / math.log(after[0] / before[0])
        return before[1] * (after[1] / before[1]) ** weight

    def matmul_seconds(self, precision: str, shape: tuple[float, ...], form: str = "") -> float:
        """Seconds that the arithmetic of a product takes.

        Tile and wave quantisation as in NVIDIA, *Matrix Multiplication Background User's Guide* (2023), section 3.

        Args:
            precision: precision of the operands, such as "bfloat16".
            shape: sizes (batches, rows, inner, columns).
            form: as in `Matmul.table`; "" for the plain one.

        >>> device = Machine.load("h100x8").device
        >>> full, odd = (device.matmul_seconds("bfloat16", (1, 8192, 8192, columns)) for columns in (8192, 8193))
        >>> full < odd
        True
        """
        batches, rows, inner, columns = shape
        names = f"{precision} {form or ('batched' if batches > 1 else '')}", precision
        if rate := next(filter(None, (self.matmul.rate(name, rows, inner, columns) for name in names)), 0.0):
            return 2 * batches * rows * inner * columns / rate
        best = self.matmul.best.get(precision, 1.0) * self.peak(precision)
        aligned = _aligned(self.matmul.alignment, ITEMSIZE[precision], (inner, columns))
        slower = self.peak(precision) / max(rate for name, rate in self.peak_flops.items() if name != "float8")
        loads = slower * ITEMSIZE[precision] / 2
        slots = min(_tile_work(tile, loads, self.matmul.units, batches, rows, columns) for tile in self.matmul.tiles)
        fill = self.matmul.fill * min(1.0, slower)
        return 2 * slots * (inner + fill) / (best * aligned)

    def peak(self, precision: str) -> float:
        """FLOP/s of a precision.

        Raises:
            MachineError: the device has no such number.
        """
        if precision not in self.peak_flops:
            raise MachineError(
                f"device {self.name!r} has no peak_flops for {precision!r}, only for {', '.join(self.peak_flops)}. "
                "Choose one of these, or add the number to the machine's file."
            )
        return self.peak_flops[precision]


ITEMSIZE = {"float8": 1, "bfloat16": 2, "float16": 2, "tensorfloat32": 4, "float32": 4, "float64": 8}


@dataclass(frozen=True, kw_only=True)
class Link:
    """One level of the machine's network.

    Attributes:
        name: what it is called.
        alpha_seconds: latency of one step of a collective over it.
        bytes_per_second: per device and direction.
        share: share of that which a large collective reaches.
        start_seconds: what starting a collective costs.
        processor_share: share of the device's processor that a collective takes from what runs beside it.
        shared: whether the devices of a host share its ports, so that one that sends alone has them all.
        measured: (devices, bytes per second): bus bandwidth of an all-reduce measured over so many devices; between hosts, over all of
            theirs: what a group on as many hosts gets at most.
        measured_parts: the same of an all-gather or a reduce-scatter; empty: as an all-reduce.
    """

    name: str
    alpha_seconds: float
    bytes_per_second: float
    share: float = 1.0
    start_seconds: float = 0.0
    processor_share: float = 0.0
    shared: bool = False
    measured: tuple[tuple[float, ...], ...] = ()
    measured_parts: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Hosts of equal devices, joined inside a host by one link and between hosts by another.

    Attributes:
        name: what it is called.
        hosts: how many hosts there are.
        devices_per_host: how many devices share the inner link.
        device: one of them.
        inner: the link between devices of a host.
        network: the link between hosts.
        sources: where each number was read, by its place in this description ("device.memory_bytes").

    >>> machine = Machine.load("h100x8", hosts=16, network="400Gb")
    >>> machine.device_count, machine.network.bytes_per_second
    (128, 50000000000.0)
    >>> Machine.from_json(machine.to_json()) == machine
    True
    """

    name: str
    device: Device
    inner: Link
    network: Link
    hosts: int = 1
    devices_per_host: int = 1
    sources: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        _check(self)

    @property
    def device_count(self) -> int:
        """Devices of all hosts."""
        return self.hosts * self.devices_per_host

    @classmethod
    def load(cls, name: str | Path, *, hosts: int | None = None, network: str | None = None) -> "Machine":
        """A machine by the name of a preset or the path of a JSON file.

        Args:
            name: "h100x8" and the like, or a path that ends in ".json".
            hosts: how many hosts; default: as the file says.
            network: bandwidth for each device ("400Gb": bits per second), or the name of a network that the file describes ("efa").

        Raises:
            MachineError: no such preset or file, or a number that is missing or impossible.
        """
        content = _read(name)
        networks = content.pop("networks", {})
        if network in networks:
            content["network"] = networks[network]
        elif network is not None:
            content["network"] = content["network"] | {"bytes_per_second": _bandwidth(network, networks)}
        if hosts is not None:
            content["hosts"] = {"value": hosts, "source": "asked for"}
        return _build(content)

    @classmethod
    def from_json(cls, text: str) -> "Machine":
        """The machine that `to_json` wrote.

        Raises:
            MachineError: not JSON, not a machine, or a number that is missing or impossible.
        """
        return _build(_parse(text, "this text"))

    def to_json(self) -> str:
        """The machine as JSON text, every number beside its source."""
        return json.dumps({"format": _FORMAT} | _content(self, self.sources), indent=1)

    def of(self, count: int) -> "Machine":
        """The same machine with `count` devices: whole hosts, or a part of one.

        >>> Machine.load("h100x8").of(4).devices_per_host, Machine.load("h100x8").of(64).hosts
        (4, 8)
        """
        inside = min(count, self.devices_per_host)
        return replace(self, devices_per_host=inside, hosts=math.ceil(count / inside))


def _aligned(alignment, itemsize, lengths) -> float:
    return min((next((share for size, share in alignment if length * itemsize % size == 0), 1.0) for length in lengths), default=1.0)


def _tile_work(tile, loads, units, batches, rows, columns) -> float:
    """Elements of the output times 1/share that the busiest unit computes, scaled by the number of units. What a small tile loses it waits
    for operands: `loads` of what the fastest precision waits, against its arithmetic."""
    height, width, share = tile
    waves = math.ceil(batches * math.ceil(rows / height) * math.ceil(columns / width) / units)
    return waves * units * height * width * (1 + (1 / share - 1) * loads)


def _read(name: str | Path) -> dict[str, Any]:
    path = Path(name) if str(name).endswith(".json") else PRESETS / f"{name}.json"
    try:
        content = _parse(path.read_text(encoding="utf-8"), str(name))
    except (OSError, UnicodeDecodeError) as error:
        known = sorted(preset.stem for preset in PRESETS.glob("*.json"))
        if path.parent == PRESETS:
            raise MachineError(
                f"there is no machine {str(name)!r}.{did_you_mean(str(name), known)} Presets are {', '.join(known)}; any other name is the "
                "path of a .json file."
            ) from error
        raise MachineError(f"cannot read machine {str(name)!r}: {error}. Presets are {', '.join(known)}.") from error
    return _merge(_read(content.pop("like")), content) if "like" in content else content


def _parse(text: str, name: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise MachineError(f"{name} is not a machine's JSON ({error}).") from error
    if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
        raise MachineError(f"{name} is not a machine of format {_FORMAT}: it starts {text[:60]!r}.")
    return content


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    nested = {key for key in changes if isinstance(changes[key], dict) and "value" not in changes[key] and isinstance(base.get(key), dict)}
    return base | {key: _merge(base[key], changes[key]) if key in nested else changes[key] for key in changes}


def _bandwidth(text: str, networks) -> dict[str, Any]:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?Gb", text)
    if not match:
        known = f" or one of {', '.join(networks)}" if networks else ""
        raise MachineError(
            f"network={text!r}: expected gigabits per second for each device such as '400Gb'{known}.{did_you_mean(text, networks)}"
        )
    return {"value": float(match[1]) * 1e9 / 8, "source": f"asked for: {text} for each device"}


def _build(content: dict[str, Any]) -> Machine:
    sources: dict[str, str] = {}
    plain = _plain({key: value for key, value in content.items() if key != "networks"}, "", sources)
    device = dict(_part(plain, "device"))
    device["matmul"] = _make(Matmul, device.get("matmul", {}), "device.matmul")
    parts = {"device": _make(Device, device, "device")}
    parts |= {link: _make(Link, _part(plain, link), link) for link in ("inner", "network")}
    return _make(Machine, plain | parts | {"sources": sources}, "")


def _plain(content: Any, path: str, sources: dict[str, str]) -> Any:
    """The content without its sources, which are noted in `sources`."""
    if isinstance(content, dict) and set(content) == {"value", "source"}:
        if content["source"] != "default":
            sources[path] = str(content["source"])
        return _tuples(content["value"])
    if isinstance(content, dict):
        return {key: _plain(value, f"{path}.{key}".lstrip("."), sources) for key, value in content.items()}
    if isinstance(content, str):
        return content
    raise MachineError(f'{path}={content!r} has no source: write {{"value": {content!r}, "source": "where it was read or measured"}}.')


def _tuples(value: Any) -> Any:
    return tuple(_tuples(part) for part in value) if isinstance(value, list) else value


def _part(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    if not isinstance(content.get(name), dict):
        raise MachineError(f"the machine has no {name!r}: expected an object with its numbers.")
    return content[name]


def _make(kind: type, content: Mapping[str, Any], path: str):
    known = {part.name for part in fields(kind)}
    if unknown := sorted(set(content) - known):
        raise MachineError(
            f"{path or 'the machine'} has {', '.join(unknown)}, which parafit does not know. It knows {', '.join(sorted(known))}."
        )
    try:
        return kind(**content)
    except TypeError as error:
        missing = ", ".join(re.findall(r"'(\w+)'", str(error)))
        raise MachineError(f"{path or 'the machine'} lacks {missing or error}.") from error


def _content(thing: Any, sources: Mapping[str, str], path: str = "") -> Any:
    if is_dataclass(thing):
        parts = {part.name: getattr(thing, part.name) for part in fields(thing) if part.name != "sources"}
        return {name: _content(value, sources, f"{path}.{name}".lstrip(".")) for name, value in parts.items()}
    if isinstance(thing, Mapping):
        return {name: _content(value, sources, f"{path}.{name}") for name, value in thing.items()}
    return thing if isinstance(thing, str) else {"value": thing, "source": sources.get(path, "default")}


def _check(machine: Machine) -> None:
    device, links = machine.device, (machine.inner, machine.network)
    for path, value in (
        ("hosts", machine.hosts),
        ("devices_per_host", machine.devices_per_host),
        ("device.matmul.units", device.matmul.units),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise MachineError(f"{path}={value!r}: expected a whole number of at least 1.")
    if not device.peak_flops:
        raise MachineError("device.peak_flops is empty: expected FLOP/s of at least one precision.")
    for precision, value in device.peak_flops.items():
        if precision not in ITEMSIZE:
            raise MachineError(f"device.peak_flops has precision {precision!r}: expected {', '.join(ITEMSIZE)}.")
        _number(f"device.peak_flops.{precision}", value, above=0)
    for name in ("memory_bytes", "memory_bytes_per_second"):
        _number(f"device.{name}", getattr(device, name), above=0)
    for name in ("operation_seconds", "loop_seconds", "dispatch_seconds", "context_bytes", "feed_bytes_per_second"):
        _number(f"device.{name}", getattr(device, name))
    for name, link in zip(("inner", "network"), links):
        _number(f"{name}.bytes_per_second", link.bytes_per_second, above=0)
        _number(f"{name}.share", link.share, above=0, most=1)
        for part in ("alpha_seconds", "start_seconds"):
            _number(f"{name}.{part}", getattr(link, part))
    for kind, points in device.curves.items():
        for size, seconds in points:
            _number(f"device.curves.{kind}: bytes", size, above=0)
            _number(f"device.curves.{kind}: seconds", seconds, above=0)
    shares = {f"matmul.best.{key}": value for key, value in device.matmul.best.items()}
    shares |= {f"attention.{key}": value for key, value in device.attention.items()} | {"memory_share": device.memory_share}
    for path, value in shares.items():
        _number(f"device.{path}", value, above=0, most=1)


def _number(path: str, value: Any, *, above: float | None = None, most: float = math.inf) -> None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value > most or (value <= above if above is not None else value < 0):
        least = f"above {above}" if above is not None else "of at least 0"
        limit = "" if most == math.inf else f" and at most {most}"
        raise MachineError(f"{path}={value!r}: expected a number {least}{limit}.")
