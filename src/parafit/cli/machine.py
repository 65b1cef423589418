"""`parafit machine`: the numbers that plans are priced with."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from parafit.errors import MachineError

if TYPE_CHECKING:
    from parafit.planner.machine.machine import Machine


@click.command()
@click.argument("name", required=False)
@click.option("--hosts", type=click.IntRange(min=1), help="How many of these machines.")
@click.option("--network", metavar="RATE", help="Bandwidth between hosts for each device, such as 400Gb.")
@click.option("--calibrate", is_flag=True, help="Measure this machine first, and keep the result.")
def machine(name: str | None, **options) -> int:
    """Print the numbers that plans are priced with, and where each comes from.

    NAME is a preset such as h100x8, or a machine's JSON file. Default: this machine.
    """
    click.echo(machine_text(name, **options))
    return 0


def machine_text(name: str | None, *, hosts: int | None = None, network: str | None = None, calibrate: bool = False) -> str:
    """A machine's numbers, each with its source.

    Args:
        name: a preset, or the path of a machine's JSON file; None: this machine.
        hosts: how many of them.
        network: bandwidth between them for each device.
        calibrate: measure this machine first.
    """
    from parafit.calibration.calibrate import calibrate as calibrated
    from parafit.planner.machine.machine import Machine
    from parafit.planning import this_machine

    if name is None:
        if hosts is not None or network is not None:
            raise MachineError("--hosts and --network go with the name of a machine, such as: parafit machine h100x8 --hosts 4.")
        machine = calibrated() if calibrate else this_machine()
    elif calibrate:
        raise MachineError(f"only the machine that this runs on can be calibrated, not {name!r}: leave the name out.")
    else:
        machine = Machine.load(name, hosts=hosts, network=network)
    rows = list(_numbers(machine))
    width = max(len(path) for path, _, _ in rows)
    amounts = max(len(amount) for _, amount, _ in rows)
    return "\n".join([machine.name, *(f"  {path:{width}}  {amount:>{amounts}}  {source}" for path, amount, source in rows)])


def _numbers(machine: "Machine") -> Iterator[tuple[str, str, str]]:
    """Place, value and source of every number that has one or is not 0."""
    import json

    def walk(content: Any, path: str) -> Iterator[tuple[str, str, str]]:
        if isinstance(content, dict) and set(content) == {"value", "source"}:
            value = content["value"]
            if content["source"] != "default" or value not in (0, 1, [], {}):
                yield path, f"{len(value)} rows" if isinstance(value, list) else f"{value:,.5g}", content["source"]
        elif isinstance(content, dict):
            for name, part in content.items():
                yield from walk(part, f"{path}.{name}".lstrip("."))

    yield from walk({name: part for name, part in json.loads(machine.to_json()).items() if name != "format"}, "")
