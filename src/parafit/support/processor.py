"""Which processor this is. JAX is not imported."""

import hashlib
import platform
from pathlib import Path

_INFORMATION = Path("/proc/cpuinfo")
_TELLING = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags")
_TELLING += ("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision", "Features", "cpu", "isa", "uarch")
"""What Linux says of a core that does not change from hour to hour; the second line on other processors than x86."""


def processor_name() -> str:
    """The processor's name, with family and model, which tell generations apart where the name does not."""
    fields = _fields()
    if not fields:
        return platform.processor() or platform.machine()
    numbers = [fields[name] for name in ("cpu family", "model") if name in fields]
    return " ".join([fields.get("model name", platform.machine()), *numbers])


def processor_kind() -> str:
    """What processors have in common that run each other's machine code: a word of letters and digits.

    Model and instructions, where the system tells them; else the host, for a folder may be shared by hosts of several kinds.

    >>> processor_kind() == processor_kind()
    True
    """
    fields = _fields()
    told = [f"{name}={fields[name]}" for name in _TELLING if name in fields]
    told = told if {"flags", "Features", "isa"} & fields.keys() else [platform.processor(), platform.node()]
    return hashlib.sha256("\n".join([platform.machine(), *told]).encode()).hexdigest()[:12]


def _fields() -> dict[str, str]:
    """What Linux says of the first core."""
    if not _INFORMATION.exists():
        return {}
    pairs = (line.partition(":") for line in _INFORMATION.read_text(errors="replace").split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
