"""Every error parafit raises on purpose, as a tree.

```
ParafitError
├── BackendError             Keras runs on another backend than JAX
├── ModelError (ValueError)  the model cannot be fitted as it is (not compiled, not traceable)
├── DataError (ValueError)   arrays, tables or files that cannot be used as they are
├── PlanError (ValueError)   a plan that cannot run on this machine or model
├── MachineError (ValueError) a machine's description with missing or impossible numbers
├── ProgramError             a compiled program whose text cannot be read
├── OutputError (OSError)    a place that cannot be written, found out before any work
└── NonFiniteLossError       the loss became NaN or infinite; the model holds its last good weights
```

A message says what happened, with which values, what was expected and how to mend it.
"""

from typing import Self


class ParafitError(Exception):
    """The root: `except parafit.errors.ParafitError` catches all of them."""

    _command_line = ""

    @classmethod
    def advising(cls, what: str, *, python: str, command: str, **attributes) -> Self:
        """An error whose advice depends on where parafit is called from.

        Args:
            what: what happened, and what was expected.
            python: how to mend it in Python.
            command: how to mend it on the command line.
            **attributes: what this kind of error tells besides.

        >>> error = PlanError.advising("no plan fits.", python="Pass plan='single'.", command="Pass --plan single.")
        >>> str(error), error.command_line
        ("no plan fits. Pass plan='single'.", 'no plan fits. Pass --plan single.')
        """
        error = cls(f"{what} {python}", **attributes)
        error._command_line = f"{what} {command}"
        return error

    @property
    def command_line(self) -> str:
        """The message, with advice for the command line."""
        return self._command_line or str(self)


class BackendError(ParafitError):
    """Keras runs on a backend other than JAX."""


class ModelError(ParafitError, ValueError):
    """The model cannot be fitted, evaluated or asked as it is."""


class DataError(ParafitError, ValueError):
    """Arrays, tables or files that cannot be used as they are."""


class PlanError(ParafitError, ValueError):
    """A plan that cannot run on this machine or with this model."""


class MachineError(ParafitError, ValueError):
    """A description of a machine that lacks a number, or has one that cannot be."""


class ProgramError(ParafitError):
    """The compiler's text of a program is in a form that parafit cannot read."""


class OutputError(ParafitError, OSError):
    """A place that cannot be written to."""


class NonFiniteLossError(ParafitError):
    """The loss became NaN or infinite; training stopped and the model holds its last good weights.

    Attributes:
        epoch: the epoch it happened in, counted from 0.
        step: the step within that epoch, counted from 0.
        value: the loss as it was measured (`nan`, `inf` or `-inf`).
    """

    def __init__(self, message: str, *, epoch: int, step: int, value: float):
        super().__init__(message)
        self.epoch, self.step, self.value = epoch, step, value
