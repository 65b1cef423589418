"""Well-known networks as `Program`s, by their sizes alone: what published tables and what-if questions are asked about. Plain Python."""

import re
from typing import Any

from parafit.errors import ModelError
from parafit.planner.networks.transformer import Transformer, transformer_program
from parafit.planner.program import Program
from parafit.support.arguments import did_you_mean

_LLAMA_2 = {"vocabulary": 32000, "sequence": 4096}


MODELS: dict[str, dict[str, Any]] = {
    "gpt:125m": {"layers": 12, "hidden": 768, "heads": 12},
    "gpt:1.3b": {"layers": 24, "hidden": 2048, "heads": 32},
    "gpt:1.7b": {"layers": 24, "hidden": 2304, "heads": 24},
    "gpt:3.6b": {"layers": 30, "hidden": 3072, "heads": 32},
    "gpt:7.5b": {"layers": 36, "hidden": 4096, "heads": 32},
    "gpt:18b": {"layers": 40, "hidden": 6144, "heads": 48},
    "gpt:39b": {"layers": 48, "hidden": 8192, "heads": 64},
    "gpt:76b": {"layers": 60, "hidden": 10240, "heads": 80},
    "gpt:145b": {"layers": 80, "hidden": 12288, "heads": 96},
    "gpt:175b": {"layers": 96, "hidden": 12288, "heads": 96},
    "gpt:310b": {"layers": 96, "hidden": 16384, "heads": 128},
    "gpt:530b": {"layers": 105, "hidden": 20480, "heads": 128},
    "gpt:1t": {"layers": 128, "hidden": 25600, "heads": 160},
    "llama:1b": {"layers": 16, "hidden": 2048, "heads": 32, "kv_heads": 8, "ffn": 8192, "tied": True},
    "llama:7b": {"layers": 32, "hidden": 4096, "heads": 32, "ffn": 11008} | _LLAMA_2,
    "llama:8b": {"layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "ffn": 14336},
    "llama:13b": {"layers": 40, "hidden": 5120, "heads": 40, "ffn": 13824} | _LLAMA_2,
    "llama:70b": {"layers": 80, "hidden": 8192, "heads": 64, "kv_heads": 8, "ffn": 28672},
    "llama:405b": {"layers": 126, "hidden": 16384, "heads": 128, "kv_heads": 8, "ffn": 53248},
}
"""Shapes by name: GPT from Narayanan et al. 2021, table 1, and Brown et al. 2020; LLaMA from its model cards."""


FAMILIES: dict[str, dict[str, Any]] = {
    "gpt": {},
    "llama": {"gated": True, "rotary": True, "biases": False, "tied": False, "vocabulary": 128256, "sequence": 8192},
    "bert": {"dropout": True, "causal": False, "sequence": 512, "vocabulary": 30522, "predictions": 80},
}


def named(name: str, *, batch: int = 1, **changes: Any) -> Program:
    """The program of a network by name: "gpt:39b", "llama:8b", or by sizes: "gpt:layers=48,hidden=8192,heads=64".

    Args:
        name: a family ("gpt", "llama", "bert"), a colon, and a known size or fields of `Transformer` as NAME=NUMBER.
        batch: rows of the global batch.
        **changes: other fields of `Transformer`.

    Raises:
        ModelError: no such family, size or field.

    >>> program = named("gpt:39b", batch=1536)
    >>> round(program.bytes_of("parameter") / 2 / 1e9, 1)
    39.1
    >>> named("gpt:layers=2,hidden=64,heads=4,sequence=16", batch=8).sizes["ffn"]
    256
    """
    family, _, size = name.partition(":")
    if family not in FAMILIES:
        hint = did_you_mean(name, MODELS)
        raise ModelError(f"no network is called {name!r}.{hint} Expected one of {', '.join(MODELS)}, or {', '.join(FAMILIES)} with sizes.")
    shape = MODELS.get(name) or _sizes(name, size)
    known = set(Transformer.__dataclass_fields__)
    if unknown := sorted((set(shape) | set(changes)) - known):
        hint = did_you_mean(unknown[0], known)
        raise ModelError(f"network {name!r} has no {', '.join(unknown)}.{hint} Its sizes are {', '.join(sorted(known))}.")
    try:
        fields: dict[str, Any] = FAMILIES[family] | shape | {"batch": batch} | changes
        return transformer_program(Transformer(**fields), name=name)
    except TypeError as error:
        raise ModelError(f"network {name!r} needs layers, hidden and heads such as '{family}:layers=2,hidden=64,heads=4'.") from error


def _sizes(name: str, text: str) -> dict[str, Any]:
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(equals and re.fullmatch(r"\d+", value) for _, equals, value in pairs):
        raise ModelError(
            f"cannot read {name!r}.{did_you_mean(name, MODELS)} Expected one of {', '.join(MODELS)}, or sizes such as "
            "'gpt:layers=48,hidden=8192,heads=64'."
        )
    return {key.strip(): int(value) for key, _, value in pairs}
