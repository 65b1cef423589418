"""How many steps run before the host takes control again."""

from dataclasses import dataclass, field

CONTROL_SECONDS = 0.2


@dataclass
class Pace:
    """How many steps to run before the host takes control again: about `CONTROL_SECONDS` of them, measured as they run.

    Attributes:
        strides: every how many steps some callback must have control.
        steps_per_execution: what the model was compiled with; where it is among the strides, callbacks have control after exactly so
            many steps, counted in each epoch.
        steps: steps run so far.
        seconds: what they took.
    """

    strides: list[int] = field(default_factory=list)
    steps_per_execution: int = 1
    steps: int = 0
    seconds: float = 0.0
    _last_steps: int = 0
    _last_seconds_per_step: float = CONTROL_SECONDS

    @property
    def execution(self) -> int:
        """Steps in what callbacks are told to be one execution; their numbers are those of its first and last step."""
        return self.steps_per_execution if self.steps_per_execution in self.strides else 1

    def next_steps(self) -> int:
        """How many steps to run next: an execution, or one at first, then at most eight times what was run before."""
        if self.execution > 1:
            return self.execution
        wanted = min(int(CONTROL_SECONDS / self._last_seconds_per_step), 8 * self._last_steps)
        return max(1, min([wanted, *(stride - self.steps % stride for stride in self.strides)]))

    def count(self, steps: int) -> None:
        """Tell that the next group, of so many steps, is on its way."""
        self.steps += steps

    def record(self, steps: int, seconds: float) -> None:
        """Tell what the last group took.

        Args:
            steps: of the group.
            seconds: from its start to its end.
        """
        self.seconds += seconds
        self._last_steps, self._last_seconds_per_step = steps, max(seconds / steps, 1e-9)
