"""`parafit plan`: the best plan for a model, and what it would take."""

import warnings
from pathlib import Path
from typing import Any

import click

from parafit.errors import MachineError, ModelError, PlanError
from parafit.support.files import write_output


@click.command()
@click.argument("model")
@click.option("--batch-size", required=True, type=click.IntRange(min=1), help="Rows of one step over all devices together.")
@click.option("--machine", metavar="NAME", help="A preset such as h100x8, or a machine's JSON file. Default: this machine.")
@click.option("--hosts", type=click.IntRange(min=1), help="How many of these machines.")
@click.option("--network", metavar="RATE", help="Bandwidth between hosts for each device, such as 400Gb.")
@click.option("--goal", type=click.Choice(["time", "memory", "cost"]), default="time", show_default=True, help="What to minimise.")
@click.option("--max-gib", type=click.FloatRange(min=0, min_open=True), help="Memory that a device may use. Default: all of it.")
@click.option("--allow", metavar="NAMES", help="Techniques that may be used, such as data,tensor,zero. Default: all that keep the numbers.")
@click.option("--instead", metavar="PLAN", help='A plan to compare with, such as "data=8,tensor=8".')
@click.option(
    "--sizes", type=click.IntRange(min=1), nargs=2, metavar="INPUTS OUTPUTS", help="What a .py file's build_model is called with."
)
@click.option("--out", type=click.Path(path_type=Path), help="Write the plan here, as JSON for --plan.")
@click.option("--report", type=click.Path(path_type=Path), help="Write a page with plots here.")
@click.option("--trace", type=click.Path(path_type=Path), help="Write when each task of a pipeline runs here, for Chrome or Perfetto.")
def plan(model: str, **options) -> int:
    """Find the best plan to train MODEL with, and say what it would take.

    MODEL is a network by name (gpt:39b, llama:8b) or by its sizes (gpt:layers=48,hidden=8192,heads=64,sequence=2048,vocabulary=51200),
    a .keras file, or a .py file with build_model(input_shape, output_size). Nothing is trained.
    """
    click.echo(plan_text(model, **options))
    return 0


def plan_text(
    model: str,
    *,
    batch_size: int,
    machine: str | None = None,
    hosts: int | None = None,
    network: str | None = None,
    goal: str = "time",
    max_gib: float | None = None,
    allow: str | None = None,
    instead: str | None = None,
    sizes: tuple[int, int] | None = None,
    out: Path | None = None,
    report: Path | None = None,
    trace: Path | None = None,
) -> str:
    """Find a plan, write the files that were asked for, and give the text to print.

    Args:
        model: a network such as "gpt:39b", or the path of a .keras or .py file.
        batch_size: rows of one step over all devices together.
        machine: a preset, or the path of a machine's JSON file; None: this machine.
        hosts: how many of them.
        network: bandwidth between them for each device.
        goal: what to minimise.
        max_gib: memory that a device may use.
        allow: techniques that may be used, separated by commas.
        instead: a plan to compare with.
        sizes: numbers of inputs and outputs that a .py file's `build_model` is called with.
        out: the plan's JSON file to write.
        report: the page to write.
        trace: the file of a pipeline's timeline to write.

    Raises:
        MachineError: hosts or a network without a machine.
        PlanError: no plan, or a trace of one without a pipeline.
    """
    from parafit.planner.machine.machine import Machine
    from parafit.planner.search.explain import explain
    from parafit.planning import find_plan
    from parafit.reports.plan_page import plan_page
    from parafit.reports.trace import write_trace

    if machine is None and (hosts is not None or network is not None):
        raise MachineError("--hosts and --network describe a machine that is not here: name it with --machine, such as --machine h100x8.")
    where = Machine.load(machine, hosts=hosts, network=network) if machine else None
    nbytes = None if max_gib is None else max_gib * 2**30
    names = None if allow is None else [name.strip() for name in allow.split(",")]
    wanted = load_model(model, sizes)
    plan = find_plan(wanted, batch_size=batch_size, machine=where, goal=goal, max_bytes=nbytes, allow=names)
    timeline = plan.ranking.best.cost.timeline
    if trace and timeline is None:
        raise PlanError(
            f"the best plan is {plan.short()!r}, which has no pipeline, so there is no timeline to write to {str(trace)!r}. "
            "Leave --trace out, or allow little else than a pipeline, such as with --allow pipeline,microbatches."
        )
    pieces = [str(plan)] + ([explain(plan, instead)] if instead else [])
    if out:
        write_output(out, plan.to_json() + "\n")
        pieces.append(f"written  {out}")
    if report:
        write_output(report, plan_page(plan.ranking, instead))
        pieces.append(f"written  {report}")
    if trace:
        write_trace(trace, timeline)
        pieces.append(f"written  {trace}")
    return "\n\n".join(pieces)


def load_model(model: str, sizes: tuple[int, int] | None = None) -> Any:
    """A network's name as it is; a file's Keras model, compiled.

    Args:
        model: the name of a network, or the path of a .keras or .py file.
        sizes: numbers of inputs and outputs that a .py file's `build_model` is called with.

    Raises:
        ModelError: no such file, or what is in it is no model.
    """
    from parafit.planner.networks import FAMILIES, MODELS

    if model.partition(":")[0] in FAMILIES and not Path(model).exists():
        return model
    from parafit.support.arguments import did_you_mean
    from parafit.tables import networks

    if not Path(model).suffix and (hint := did_you_mean(model, MODELS)):
        raise ModelError(f"there is no network and no file {model!r}.{hint}")
    path = networks.check_model_file(model)
    if path.suffix == ".keras":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an optimizer that never ran has no slots in the file: they do not matter here
            loaded = networks.load_keras_file(path)
    elif sizes is None:
        raise ModelError(f"build_model in {str(path)!r} wants the numbers of inputs and outputs: give them with --sizes INPUTS OUTPUTS.")
    else:
        loaded = networks.call_build_model(path, *sizes)
    if not loaded.compiled:
        loaded.compile("adam", "mse")
    return loaded
