"""A machine's file: JSON in which every number is `{"value": ..., "source": "..."}`. Presets are in `presets/`. Plain Python."""

import json
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from parafit.errors import MachineError
from parafit.support.arguments import did_you_mean

PRESETS = Path(__file__).with_name("presets")

FORMAT = 1
"""Of the file; another one is not read."""


def read_json(name: str | Path) -> dict[str, Any]:
    """What the file of a machine says, laid over the machine that it is `like`.

    Raises:
        MachineError: no such preset or file, or not a machine's.
    """
    path = Path(name) if str(name).endswith(".json") else PRESETS / f"{name}.json"
    try:
        content = parse_json(path.read_text(encoding="utf-8"), str(name))
    except (OSError, UnicodeDecodeError) as error:
        known = sorted(preset.stem for preset in PRESETS.glob("*.json"))
        if path.parent == PRESETS:
            raise MachineError(
                f"there is no machine {str(name)!r}.{did_you_mean(str(name), known)} Presets are {', '.join(known)}; any other name is the "
                "path of a .json file."
            ) from error
        raise MachineError(f"cannot read machine {str(name)!r}: {error}. Presets are {', '.join(known)}.") from error
    return _merge(read_json(content.pop("like")), content) if "like" in content else content


def parse_json(text: str, name: str) -> dict[str, Any]:
    """The object that a machine's JSON describes.

    Args:
        text: the JSON.
        name: what messages call it.

    Raises:
        MachineError: not JSON, or of another format.
    """
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise MachineError(f"{name} is not a machine's JSON ({error}).") from error
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise MachineError(f"{name} is not a machine of format {FORMAT}: it starts {text[:60]!r}.")
    return content


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    nested = {key for key in changes if isinstance(changes[key], dict) and "value" not in changes[key] and isinstance(base.get(key), dict)}
    return base | {key: _merge(base[key], changes[key]) if key in nested else changes[key] for key in changes}


def bandwidth(text: str, networks: Mapping[str, Any]) -> dict[str, Any]:
    """Bytes per second of a network that is asked for by its bandwidth, with their source.

    Args:
        text: gigabits per second, such as "400Gb".
        networks: the networks that the file describes, by name.

    Raises:
        MachineError: not a bandwidth.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?Gb", text)
    if not match:
        known = f" or one of {', '.join(networks)}" if networks else ""
        raise MachineError(
            f"network={text!r}: expected gigabits per second for each device such as '400Gb'{known}.{did_you_mean(text, networks)}"
        )
    return {"value": float(match[1]) * 1e9 / 8, "source": f"asked for: {text} for each device"}


def without_sources(content: Any, path: str, sources: dict[str, str]) -> Any:
    """The content without its sources.

    Args:
        content: as read from JSON.
        path: where it stands in the file: "device.matmul".
        sources: takes the source of each number, by its path.

    Raises:
        MachineError: a number has no source.
    """
    if isinstance(content, dict) and set(content) == {"value", "source"}:
        if content["source"] != "default":
            sources[path] = str(content["source"])
        return _tuples(content["value"])
    if isinstance(content, dict):
        return {key: without_sources(value, f"{path}.{key}".lstrip("."), sources) for key, value in content.items()}
    if isinstance(content, str):
        return content
    raise MachineError(f'{path}={content!r} has no source: write {{"value": {content!r}, "source": "where it was read or measured"}}.')


def _tuples(value: Any) -> Any:
    return tuple(_tuples(part) for part in value) if isinstance(value, list) else value


def section(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The object called `name` in a machine's content.

    Args:
        content: as `without_sources` gives it.
        name: of the object, such as "device".

    Raises:
        MachineError: there is none.
    """
    if not isinstance(content.get(name), dict):
        raise MachineError(f"the machine has no {name!r}: expected an object with its numbers.")
    return content[name]


def make(kind: type, content: Mapping[str, Any], path: str) -> Any:
    """A dataclass from its fields.

    Args:
        kind: the dataclass.
        content: its fields by name.
        path: where they stand in the file; "" for the whole.

    Raises:
        MachineError: a field is missing or not known.
    """
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


def with_sources(value: Any, sources: Mapping[str, str], path: str = "") -> Any:
    """What `without_sources` reads: each number beside its source.

    Args:
        value: a dataclass, a mapping or a number.
        sources: by path; what is not in it says "default".
        path: of `value`.
    """
    if is_dataclass(value):
        parts = {part.name: getattr(value, part.name) for part in fields(value) if part.name != "sources"}
        return {name: with_sources(part, sources, f"{path}.{name}".lstrip(".")) for name, part in parts.items()}
    if isinstance(value, Mapping):
        return {name: with_sources(part, sources, f"{path}.{name}") for name, part in value.items()}
    return value if isinstance(value, str) else {"value": value, "source": sources.get(path, "default")}
