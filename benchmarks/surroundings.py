"""On what the numbers were measured: machine, versions, source."""

import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("parafit", "keras", "jax", "jaxlib", "tensorflow", "torch", "scikit-learn", "numpy")
VARIABLES = ("XLA_FLAGS", "JAX_PLATFORMS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "TF_ENABLE_ONEDNN_OPTS")


def describe() -> dict:
    """When, on what machine, with which versions, variables and source; nothing that names the machine or its folders."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "load_at_start": os.getloadavg()[0],
        },
        "versions": {"python": platform.python_version(), **{package: _version(package) for package in PACKAGES}},
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "source": _source(),
    }


def _processor() -> str:
    """The processor's name, and family and model where the name alone leaves the generation open."""
    information = Path("/proc/cpuinfo")
    if not information.exists():
        return platform.processor()
    pairs = (line.partition(":") for line in information.read_text().split("\n\n")[0].splitlines())
    fields = {name.strip(): value.strip() for name, _, value in pairs}
    return f"{fields.get('model name', platform.machine())} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _source() -> dict | None:
    """The commit, and whether files other than results differ from it; None where git knows nothing."""
    try:
        commit = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit, "dirty": bool(changed)}


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
