"""What the tests of the command line share."""

import sys

import pytest

from parafit import cli


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run `parafit ARGUMENTS` in a folder of its own; gives the exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["parafit", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code or 0, *capsys.readouterr()

    return call
