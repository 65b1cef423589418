"""The surroundings parafit runs in. The only module that reads or sets environment variables."""

import importlib.util
import os
import sys
from pathlib import Path


def prepare() -> None:
    """Choose Keras' JAX backend unless `KERAS_BACKEND` names one, and keep compiled programs on disk.

    Runs when parafit is imported. What the user set in the environment, or configured in JAX, stays as it is.
    """
    if "keras" not in sys.modules:
        os.environ.setdefault("KERAS_BACKEND", "jax")
    _keep_compiled_programs()


def computes_on_processor() -> bool:
    """Whether JAX will compute on the processor, as far as can be told before it is asked: it was told so, or has no plugin for anything else.

    Asking JAX would start its threads.
    """
    jax = sys.modules.get("jax")
    platforms = (jax.config.jax_platforms if jax else os.environ.get("JAX_PLATFORMS")) or ""
    if platforms:
        return platforms.split(",")[0] == "cpu"
    return not any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))


def cache_directory() -> Path:
    """Where parafit keeps what can be made again: `$XDG_CACHE_HOME/parafit`, else `~/.cache/parafit`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "parafit"


def _keep_compiled_programs() -> None:
    settings = {
        "jax_compilation_cache_dir": str(cache_directory() / "programs"),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    if "jax" not in sys.modules:
        for name, value in settings.items():
            os.environ.setdefault(name.upper(), str(value))
        return
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        for name, value in settings.items():
            jax.config.update(name, value)
