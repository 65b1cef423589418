"""What this machine is: as it was calibrated, else as JAX and the operating system tell."""

import logging
import os
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import jax

from parafit import backends
from parafit.errors import MachineError
from parafit.planner.machine.machine import Device, Link, Machine
from parafit.support.environment import cache_directory
from parafit.support.processor import processor_name

_LOGGER = logging.getLogger("parafit")
_PRESETS = (("B200", "b200x8"), ("H200", "h200x8"), ("H100", "h100x8"), ("A100.*40GB", "a100x8-40gb"), ("A100", "a100x8"))
_PRESETS += (("V100.*32GB", "v100x8"), ("V100", "v100x8-16gb"), ("TPU v5p?$", "tpu-v5p"))
_LANES = 32
"""Floating-point operations of a core in a cycle where nothing is known: eight lanes, two fused multiply-adds. At 2 GHz."""


def here() -> Machine:
    """The machine this process runs on: as it was calibrated, else as it was found, with numbers that say "default".

    >>> machine = here()
    >>> machine.device_count == jax.device_count()
    True
    """
    return _calibrated() or detect()


def is_calibrated() -> bool:
    """Whether this machine's numbers were measured, by `calibrate`."""
    return _calibrated() is not None


def _calibrated() -> Machine | None:
    """This machine as it was calibrated; a file that is damaged, or of another version, goes."""
    path = machine_path()
    if not path.exists():
        return None
    try:
        with suppress(OSError):
            os.utime(path)  # in use: `prune` takes others first
        return Machine.load(path)
    except (MachineError, OSError, UnicodeDecodeError) as error:
        _LOGGER.warning(
            "parafit: the calibration of this machine cannot be read and goes; measure anew with `parafit machine --calibrate`: %s", error
        )
        with suppress(OSError):
            path.unlink()
        return None


def detect() -> Machine:
    """The devices that JAX sees: those of a preset where one has their name, else a processor with cautious numbers."""
    device = jax.devices()[0]
    for pattern, preset in _PRESETS:
        if re.search(pattern, device.device_kind):
            return replace(Machine.load(preset, hosts=jax.process_count()), devices_per_host=jax.local_device_count())
    cores = core_count()
    found = Device(
        name=processor_name(),
        peak_flops={"float32": cores * _LANES * 2e9, "float64": cores * _LANES / 2 * 2e9},
        memory_bytes=_memory_bytes(),
        memory_bytes_per_second=1e10,
        operation_seconds=1e-6,
        dispatch_seconds=3e-5,
        cores=cores,
    )
    inner = Link(name="memory", alpha_seconds=2.5e-5, bytes_per_second=2e9)
    network = Link(name="network", alpha_seconds=2.5e-4, bytes_per_second=1.25e8)
    sources = {"device.memory_bytes": "the operating system", "device.cores": "the operating system"}
    sources |= {"hosts": "JAX", "devices_per_host": "JAX"}
    hosts, local = jax.process_count(), jax.local_device_count()
    return Machine(name=machine_id(), device=found, inner=inner, network=network, hosts=hosts, devices_per_host=local, sources=sources)


def machine_id() -> str:
    """What tells one kind of machine, and one set-up of it, from another: processor, cores, devices and JAX's version."""
    device = jax.devices()[0]
    name = f"{backends.current().device_kind()} {core_count()} cores {jax.device_count()} {device.platform} jax {jax.__version__}"
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def machine_path() -> Path:
    """Where this machine's calibration is kept."""
    return cache_directory() / "machines" / f"{machine_id()}.json"


def core_count() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_bytes() -> float:
    """Memory that this process may use: the machine's, or less where a control group says so."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else ""
    return float(min(whole, int(text)) if text.isdigit() else whole)
