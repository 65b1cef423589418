"""`parafit train`: a network for a column of a table."""

from pathlib import Path

import click

INTERRUPTED = 130
"""What the process ends with after Ctrl-C."""


@click.command()
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
    return INTERRUPTED if result.stopped else 0
