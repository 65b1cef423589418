"""What a run will take, said before it starts, and scored when it ends. Plain Python."""

from dataclasses import dataclass

from parafit.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Price:
    """What a step takes, found out before a run.

    Args:
        seconds_per_step: timed on a copy of the state, with the first rows of the data.
        peak_bytes: memory of the compiled program on one device, as the compiler says.
    """

    seconds_per_step: float
    peak_bytes: int

    def announce(self, plan: Plan, *, steps: int, epochs: int) -> str:
        """The line printed before a run.

        >>> Price(seconds_per_step=2e-4, peak_bytes=3 << 20).announce(Plan.parse("data=8"), steps=100, epochs=5)
        'parafit: plan data=8, 0.200 ms/step, 0.1 s for 5 epochs of 100 steps, peak memory 3.0 MiB a device'
        """
        milliseconds, seconds = self.seconds_per_step * 1e3, self.seconds_per_step * steps * epochs
        mebibytes = self.peak_bytes / 2**20
        return (
            f"parafit: plan {plan.short()}, {milliseconds:.3f} ms/step, {seconds:.1f} s for {epochs} epochs of {steps} steps, "
            f"peak memory {mebibytes:.1f} MiB a device"
        )

    def score(self, measured_seconds_per_step: float) -> str:
        """The line printed after a run.

        >>> Price(seconds_per_step=2e-4, peak_bytes=0).score(2.2e-4)
        'parafit: predicted 0.200 ms/step, measured 0.220 (+10 %)'
        """
        predicted, measured = self.seconds_per_step * 1e3, measured_seconds_per_step * 1e3
        return f"parafit: predicted {predicted:.3f} ms/step, measured {measured:.3f} ({measured / predicted - 1:+.0%})".replace("%)", " %)")
