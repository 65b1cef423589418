"""`parafit report`: how good past predictions were."""

from pathlib import Path

import click

from parafit.errors import DataError
from parafit.support.files import write_output


@click.command()
@click.option("-o", "--out", type=click.Path(path_type=Path), default="parafit-report.html", show_default=True, help="The page to write.")
def report(out: Path) -> int:
    """Plot predicted against measured time and memory of the fits that ran on this machine."""
    click.echo(report_text(out))
    return 0


def report_text(out: Path) -> str:
    """Write a page of predicted against measured over the fits that this machine remembers, and give the text to print.

    Raises:
        DataError: nothing was fitted yet.
    """
    import statistics

    from parafit.calibration import history
    from parafit.reports.history_page import error, history_page

    fits = history.load()
    if not fits:
        where = history.residuals_path()
        raise DataError(f"no fit was scored yet ({where} holds none): run `parafit machine --calibrate`, and then `parafit train`, first.")
    write_output(out, history_page(fits))
    errors = sorted(abs(error(fit)) for fit in fits)
    words = f"step time off by {statistics.median(errors):.0%} (median), {errors[-1]:.0%} (most)".replace("%", " %")
    return f"{len(fits)} fits: {words}\nwritten  {out}"
