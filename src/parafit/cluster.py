"""The surroundings parafit runs in. The only module that reads or sets environment variables."""

import importlib.util
import os
import sys
from pathlib import Path


def prepare() -> None:
    """Choose Keras' JAX backend unless `KERAS_BACKEND` names one. Runs when parafit is imported."""
    if "keras" not in sys.modules:
        os.environ.setdefault("KERAS_BACKEND", "jax")


def computes_on_processor() -> bool:
    """Whether JAX will compute on the processor: it was told so, or has no plugin for anything else. Asking JAX would start its threads."""
    jax = sys.modules.get("jax")
    platforms = (jax.config.jax_platforms if jax else os.environ.get("JAX_PLATFORMS")) or ""
    if platforms:
        return platforms.split(",")[0] == "cpu"
    return not any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))


def cache_directory() -> Path:
    """Where parafit keeps what can be made again: `$XDG_CACHE_HOME/parafit`, else `~/.cache/parafit`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "parafit"


def chosen_by_user(setting: str) -> bool:
    """Whether the environment sets this of JAX's settings."""
    return setting.upper() in os.environ
