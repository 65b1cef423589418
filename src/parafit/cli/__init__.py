"""The command line: verbs, a file and an output path; anything finer is Python."""

import sys

import click

from parafit.cli import machine, plan, predict, report, train
from parafit.errors import ParafitError

_FAILED = 2


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
        sys.exit(train.INTERRUPTED)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="parafit")
def commands() -> None:
    """Fit neural networks to tables, in parallel, and use them."""


for verb in (train.train, predict.predict, plan.plan, machine.machine, report.report):
    commands.add_command(verb)
