"""`Machine`: what computes. Devices, their memory, and the links between them, each number with its source. Plain Python."""

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from parafit.errors import MachineError
from parafit.planner.machine.files import FORMAT, bandwidth, make, parse_json, read_json, section, with_sources, without_sources
from parafit.planner.machine.matmul import Matmul, aligned_share, tile_work


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
        aligned = aligned_share(self.matmul.alignment, ITEMSIZE[precision], (inner, columns))
        slower = self.peak(precision) / max(rate for name, rate in self.peak_flops.items() if name != "float8")
        loads = slower * ITEMSIZE[precision] / 2
        slots = min(tile_work(tile, loads, self.matmul.units, batches, rows, columns) for tile in self.matmul.tiles)
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
        content = read_json(name)
        networks = content.pop("networks", {})
        if network in networks:
            content["network"] = networks[network]
        elif network is not None:
            content["network"] = content["network"] | {"bytes_per_second": bandwidth(network, networks)}
        if hosts is not None:
            content["hosts"] = {"value": hosts, "source": "asked for"}
        return _build(content)

    @classmethod
    def from_json(cls, text: str) -> "Machine":
        """The machine that `to_json` wrote.

        Raises:
            MachineError: not JSON, not a machine, or a number that is missing or impossible.
        """
        return _build(parse_json(text, "this text"))

    def to_json(self) -> str:
        """The machine as JSON text, every number beside its source."""
        return json.dumps({"format": FORMAT} | with_sources(self, self.sources), indent=1)

    def of(self, count: int) -> "Machine":
        """The same machine with `count` devices: whole hosts, or a part of one.

        >>> Machine.load("h100x8").of(4).devices_per_host, Machine.load("h100x8").of(64).hosts
        (4, 8)
        """
        inside = min(count, self.devices_per_host)
        return replace(self, devices_per_host=inside, hosts=math.ceil(count / inside))


def _build(content: dict[str, Any]) -> Machine:
    sources: dict[str, str] = {}
    plain = without_sources({key: value for key, value in content.items() if key != "networks"}, "", sources)
    device = dict(section(plain, "device"))
    device["matmul"] = make(Matmul, device.get("matmul", {}), "device.matmul")
    parts = {"device": make(Device, device, "device")}
    parts |= {link: make(Link, section(plain, link), link) for link in ("inner", "network")}
    return make(Machine, plain | parts | {"sources": sources}, "")


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
