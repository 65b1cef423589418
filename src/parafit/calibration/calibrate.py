"""What this machine does, measured.

Rates are measured the way parafit runs steps: many runs of an operation in one compiled loop, after the same rewriting. Each probe is
timed again and again, in turns with all others, until the time is up; the median counts, for a fit meets the machine as it mostly is.
"""

import datetime
import math
import statistics
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import jax
import numpy as np

from parafit import backends
from parafit.calibration.detect import core_count, detect, machine_path
from parafit.calibration.probe import Probe
from parafit.calibration.probes import ADAM, network_loss, network_shapes, probes
from parafit.planner.cost.estimator import price
from parafit.planner.cost.framework import Software
from parafit.planner.machine.machine import Machine
from parafit.planner.machine.matmul import Matmul
from parafit.planner.plan import Plan
from parafit.planner.program import Program
from parafit.support.environment import cache_directory
from parafit.support.files import private_folder, prune, write_whole
from parafit.tracing.trace import trace_loss

_MOST_BYTES = 1 << 24
"""Of all calibrations together; one takes about 30 kB."""
_LEAST_ROUNDS, _LEAST_PROBES = 4, 9
_TURNS = 8
_SHORT_BYTES, _LONG_BYTES = 8, 1 << 22
_IN_A_LOOP = Software(steps_per_dispatch=1 << 30)
_PRECISIONS = ("float32", "float64", "bfloat16")


def calibrate(seconds: float = 30.0) -> Machine:
    """Measure this machine and keep the result, where `detect.here` finds it.

    Args:
        seconds: to take, for all probes together.

    Returns:
        The machine, each measured number with how it was measured.
    """
    ends = time.perf_counter() + 0.95 * seconds
    found = detect()
    others = {"feed_bytes_per_second": feed_rate(), "dispatch_seconds": dispatch_seconds()}
    with backends.current().running():  # as a fit does
        timed = _measure(list(probes()), ends)
    machine = _linked(_started(_described(found, timed, others), timed))
    folder = private_folder(cache_directory(), "machines")
    write_whole(machine_path(), machine.to_json(), mode=0o600)
    prune(folder, _MOST_BYTES, pattern="*.json")
    return machine


# From times to numbers ---------------------------------------------------------------------------------------------------------------


def _described(found: Machine, probes: list[Probe], others: dict[str, float]) -> Machine:
    """The machine as it was found, with what the probes and the `others` measured in the place of what was not known."""
    table = tuple((probe.kind, *probe.size, probe.rate) for probe in probes if probe.part == "matmul")
    peaks = {precision: max((rate for kind, *_, rate in table if kind == precision), default=0.0) for precision in _PRECISIONS}
    peaks = {precision: rate for precision, rate in peaks.items() if rate} or found.device.peak_flops
    curves = _curves(probes)
    device = replace(
        found.device,
        peak_flops=peaks,
        matmul=Matmul(table=table),
        curves=curves,
        memory_bytes_per_second=max(size / seconds for size, seconds in curves["elementwise"][-1:]),
        memory_share=1.0,
        operation_seconds=0.0,
        loop_seconds=next(probe.seconds for probe in probes if probe.part == "turn"),
        **others,
    )
    measured = ["memory_bytes_per_second", "loop_seconds", "matmul.table", *others]
    measured += [*(f"peak_flops.{precision}" for precision in peaks), *(f"curves.{kind}" for kind in curves)]
    how = f"measured with parafit on {found.device.name}, JAX {jax.__version__}, {datetime.date.today()}"
    return replace(found, device=device, sources={**found.sources, **{f"device.{name}": how for name in measured}})


def _curves(probes: list[Probe]) -> dict[str, tuple[tuple[float, float], ...]]:
    """(bytes, seconds) of each kind of operation; two ways to do one kind ("reduction 0", "reduction 1") count half each."""
    points: dict[str, dict[float, list[float]]] = {}
    for probe in probes:
        if probe.part == "curve":
            points.setdefault(probe.kind.partition(" ")[0], {}).setdefault(float(probe.size), []).append(probe.seconds)
    means = {kind: sorted((size, math.exp(np.mean(np.log(each)))) for size, each in sizes.items()) for kind, sizes in points.items()}
    return {kind: tuple(_rising(curve)) for kind, curve in means.items()}


def _rising(curve: list[tuple[float, float]]) -> Iterable[tuple[float, float]]:
    """The curve without noise that would have more bytes take less time."""
    least = math.inf
    lowest = []
    for size, seconds in reversed(curve):
        least = min(least, seconds)
        lowest.append((size, least))
    return reversed(lowest)


def _started(machine: Machine, probes: list[Probe]) -> Machine:
    """The machine with what starting operations takes: (operations of a program, seconds), what its own numbers leave of small networks."""
    points = [(len(program.operations), probe.seconds - price(program, Plan(), machine, software=_IN_A_LOOP).seconds)
              for probe, program in ((probe, _program(probe)) for probe in probes if probe.part == "network")]  # fmt: skip
    count, least = points[0]
    curve = _rising([(float(size), max(seconds, 1e-9)) for size, seconds in [(1, least / count), *points]])
    device = replace(machine.device, curves={**machine.device.curves, "operation": tuple(curve)})
    sources = {**machine.sources, "device.curves.operation": machine.sources["device.curves.elementwise"]}
    return replace(machine, device=device, sources=sources)


def _program(probe: Probe) -> Program:
    return trace_loss(network_loss, *network_shapes(probe.size), optimizer=ADAM)


def dispatch_seconds() -> float:
    """What starting a compiled program takes, that hands on the state of a small network."""
    state = [jax.device_put(np.zeros((8, 8), np.float32)) for _ in range(20)]
    program = jax.jit(lambda state: [each + 1 for each in state], donate_argnums=0)
    state, fastest = program(state), math.inf
    for _ in range(200):
        started = time.perf_counter()
        state = jax.block_until_ready(program(state))
        fastest = min(fastest, time.perf_counter() - started)
    return fastest


def _linked(machine: Machine) -> Machine:
    """The machine with its inner link measured, where a host has several devices."""
    sizes = [size for size in (2**power for power in range(1, 11)) if size <= machine.devices_per_host]
    if not sizes:
        return machine
    short = {size: reduction_seconds(size, _SHORT_BYTES) for size in sizes}
    rates = tuple((float(size), 2 * (size - 1) / size * _LONG_BYTES / reduction_seconds(size, _LONG_BYTES)) for size in sizes)
    alpha = min(seconds / (2 * (size - 1)) for size, seconds in short.items())
    inner = replace(machine.inner, alpha_seconds=alpha, bytes_per_second=max(rate for _, rate in rates), measured=rates)
    how = f"measured with parafit: all-reduce over {', '.join(map(str, sizes))} devices, JAX {jax.__version__}, {datetime.date.today()}"
    sources = {f"inner.{name}": how for name in ("alpha_seconds", "bytes_per_second", "measured")}
    return replace(machine, inner=inner, sources={**machine.sources, **sources})


def reduction_seconds(size: int, nbytes: int) -> float:
    """An all-reduce of so many bytes on each of so many devices, in a compiled loop: the fastest of a few runs.

    Args:
        size: devices.
        nbytes: bytes on each.
    """
    mesh = jax.make_mesh((size,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.local_devices()[:size])
    split = jax.sharding.PartitionSpec("data")

    def loop(vector):
        return jax.lax.fori_loop(
            0, _TURNS, lambda _, vector: jax.lax.pcast(jax.lax.psum(vector, "data"), "data", to="varying") / size, vector
        )

    vector = jax.device_put(np.ones(size * nbytes // 4, np.float32), jax.sharding.NamedSharding(mesh, split))
    program = jax.jit(jax.shard_map(loop, mesh=mesh, in_specs=split, out_specs=split))
    fastest = math.inf
    jax.block_until_ready(program(vector))
    for _ in range(_LEAST_ROUNDS):
        started = time.perf_counter()
        jax.block_until_ready(program(vector))
        fastest = min(fastest, (time.perf_counter() - started) / _TURNS)
    return fastest


def feed_rate() -> float:
    """Bytes per second at which rows of an array that no cache holds are gathered into a block on the host."""
    table, target = np.ones((2**15, 784), np.float32), np.ones((1024, 784), np.float32)
    random, taken = np.random.default_rng(0), []
    for _ in range(9):
        rows = random.integers(0, len(table), len(target), dtype=np.int32)
        started = time.perf_counter()
        np.take(table, rows, axis=0, out=target, mode="clip")
        taken.append(time.perf_counter() - started)
    return target.nbytes / statistics.median(taken)


def _measure(probes: list[Probe], ends: float) -> list[Probe]:
    """Compile probes for up to half of the time (the first few in any case), then time them in turns, forward and backward.

    Those of a kind follow each other, so that the threads that they use are awake.
    """
    middle = (time.perf_counter() + ends) / 2
    latest = [math.inf if place < _LEAST_PROBES else middle for place in range(len(probes))]
    with backends.current().compiling(), ThreadPoolExecutor(core_count()) as pool:
        ready = [probe for probe, made in zip(probes, pool.map(_compile_before, probes, latest)) if made]
    order, rounds = sorted(ready, key=lambda probe: probe.kind), 0
    while rounds < _LEAST_ROUNDS or time.perf_counter() < ends:
        for probe in order:
            probe.time()
            if rounds >= _LEAST_ROUNDS and time.perf_counter() > ends:
                break
        order, rounds = order[::-1], rounds + 1
    return [probe for probe in ready if math.isfinite(probe.seconds)]


def _compile_before(probe: Probe, latest: float) -> bool:
    if time.perf_counter() > latest:
        return False
    probe.compile()
    return True
