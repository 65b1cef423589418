"""The surroundings parafit runs in. The only module that reads or sets environment variables."""

import importlib.util
import os
import sys
from pathlib import Path


def prepare() -> None:
    """Choose Keras' JAX backend unless `KERAS_BACKEND` names one. Runs when parafit is imported."""
    if "keras" not in sys.modules:
        os.environ.setdefault("KERAS_BACKEND", "jax")


def jax_platform(*, otherwise: str) -> str:
    """Where JAX will compute, as far as it can be told without asking JAX, which would start its threads.

    Args:
        otherwise: what is meant where JAX was told nothing and has no plugin.

    Returns:
        The first platform that JAX was told, `otherwise`, or "" where a plugin will decide.
    """
    jax = sys.modules.get("jax")
    platforms = (jax.config.jax_platforms if jax else os.environ.get("JAX_PLATFORMS")) or ""
    if platforms:
        return platforms.split(",")[0]
    return "" if any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu")) else otherwise


def cache_directory() -> Path:
    """Where parafit keeps what can be made again: `$XDG_CACHE_HOME/parafit`, else `~/.cache/parafit`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "parafit"


def chosen_by_user(setting: str) -> bool:
    """Whether the environment sets this of JAX's settings."""
    return setting.upper() in os.environ
