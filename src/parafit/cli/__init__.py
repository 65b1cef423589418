"""The command line: verbs, a file and an output path; anything finer is Python."""

import sys
from pathlib import Path

import click

from parafit.errors import ParafitError

_FAILED, _INTERRUPTED = 2, 130


def main() -> None:
    """Run the command line and exit: 0 done, 2 for input that cannot be used, 130 after Ctrl-C."""
    try:
        sys.exit(commands.main(standalone_mode=False))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except ParafitError as error:
        click.echo(f"parafit: {error.command_line}", err=True)
        sys.exit(_FAILED)
    except (KeyboardInterrupt, click.Abort):
        click.echo("parafit: interrupted; nothing was written.", err=True)
        sys.exit(_INTERRUPTED)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="parafit")
def commands() -> None:
    """Fit neural networks to tables, in parallel, and use them."""


@commands.command()
@click.argument("table", type=click.Path(path_type=Path))
@click.option("--target", required=True, metavar="COL", help="The column to predict.")
@click.option("--task", type=click.Choice(["classification", "regression"]), help="Settle what the target is. Default: inferred.")
@click.option("--model", type=click.Path(path_type=Path), help="A .keras file, or a .py file with build_model(input_shape, output_size).")
@click.option("--epochs", type=click.IntRange(min=1), help="The most epochs. Default: chosen for the table's size.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Rows of one step. Default: chosen for the table's size.")
@click.option(
    "--seed", type=click.IntRange(min=0, max=2**32 - 1), default=0, show_default=True, help="Another seed, another split and network."
)
@click.option("--plan", default="auto", show_default=True, help="What to run on: auto, single, data=8, or a plan's JSON file.")
@click.option("--out", type=click.Path(path_type=Path), help="The folder to write. Default: the table's name with -model.")
@click.option("--force", is_flag=True, help="Replace a model that the folder holds already.")
def train(table: Path, out: Path | None, **options) -> int:
    """Fit a network that predicts a column of TABLE from the others.

    TABLE is a CSV, TSV (also .gz), Parquet, Arrow/Feather or Excel file. Leaves a folder with the model, its preprocessing, the plan,
    the history, the scores, and report.html. Ctrl-C keeps what was learnt so far.
    """
    from parafit import tables

    result = tables.train(table, out=out or Path(f"{table.name.split('.')[0]}-model"), **options)
    return _INTERRUPTED if result.stopped else 0


@commands.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("table", type=click.Path(path_type=Path))
@click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), help="The file to write: .csv, .tsv, .parquet, .arrow or .feather."
)
def predict(folder: Path, table: Path, out: Path) -> int:
    """Predict the rows of TABLE with what `parafit train` left in FOLDER; one line for each row, in their order."""
    from parafit import tables

    notes = tables.predict_file(folder, table, out)
    for words in notes.words():
        click.echo(f"note     {words}")
    click.echo(f"written  {out}: {notes.rows:,} rows")
    return 0


@commands.command()
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
def plan(model: str, **options) -> int:
    """Find the best plan to train MODEL with, and say what it would take.

    MODEL is a network by name (gpt:39b, llama:8b) or by its sizes (gpt:layers=48,hidden=8192,heads=64,sequence=2048,vocabulary=51200),
    a .keras file, or a .py file with build_model(input_shape, output_size). Nothing is trained.
    """
    from parafit.cli import plan_command

    click.echo(plan_command.plan_text(model, **options))
    return 0


@commands.command()
@click.argument("name", required=False)
@click.option("--hosts", type=click.IntRange(min=1), help="How many of these machines.")
@click.option("--network", metavar="RATE", help="Bandwidth between hosts for each device, such as 400Gb.")
@click.option("--calibrate", is_flag=True, help="Measure this machine first, and keep the result.")
def machine(name: str | None, **options) -> int:
    """Print the numbers that plans are priced with, and where each comes from.

    NAME is a preset such as h100x8, or a machine's JSON file. Default: this machine.
    """
    from parafit.cli import plan_command

    click.echo(plan_command.machine_text(name, **options))
    return 0


@commands.command()
@click.option("-o", "--out", type=click.Path(path_type=Path), default="parafit-report.html", show_default=True, help="The page to write.")
def report(out: Path) -> int:
    """Plot predicted against measured time and memory of the fits that ran on this machine."""
    from parafit.cli import plan_command

    click.echo(plan_command.report_text(out))
    return 0
