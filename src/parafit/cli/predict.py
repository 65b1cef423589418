"""`parafit predict`: what a trained network says of a table."""

from pathlib import Path

import click


@click.command()
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
