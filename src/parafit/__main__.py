"""`python -m parafit`: the command line."""

from parafit.cli import main

main()
