"""What a run will take, said before it starts, and scored when it ends. Plain Python."""

from dataclasses import dataclass

from parafit.planner.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Price:
    """What a step takes, found out before a run.

    Args:
        seconds_per_step: what is predicted.
        peak_bytes: what the program holds on one device at most, as predicted.
        compiled_bytes: the same, as the compiler says of its program.
        modelled_seconds: what the cost model says of a step, before past fits corrected it; 0 where a few steps were timed instead.
    """

    seconds_per_step: float
    peak_bytes: float
    compiled_bytes: float
    modelled_seconds: float = 0.0

    def announce(self, plan: Plan, *, steps: int, epochs: int) -> str:
        """The line printed before a run.

        Args:
            plan: the plan that will run.
            steps: number of steps in an epoch.
            epochs: number of epochs that will run.

        >>> price = Price(seconds_per_step=2e-4, peak_bytes=3 << 20, compiled_bytes=3 << 20, modelled_seconds=1.9e-4)
        >>> price.announce(Plan.parse("data=8"), steps=100, epochs=5)
        'parafit: plan data=8, predicted 0.200 ms/step, 0.1 s for 5 epochs of 100 steps, peak memory 3.0 MiB a device'
        """
        milliseconds, seconds = self.seconds_per_step * 1e3, self.seconds_per_step * steps * epochs
        how = "predicted" if self.modelled_seconds else "a trial took"
        return (
            f"parafit: plan {plan.short()}, {how} {milliseconds:.3f} ms/step, {seconds:.1f} s for {epochs} epochs of {steps} steps, "
            f"peak memory {self.peak_bytes / 2**20:.1f} MiB a device"
        )

    def score(self, measured_seconds_per_step: float) -> str:
        """The line printed after a run.

        >>> Price(seconds_per_step=2e-4, peak_bytes=3 << 20, compiled_bytes=3 << 20).score(2.2e-4)
        'parafit: predicted 0.200 ms/step, measured 0.220 (+10 %); peak 3.0 MiB, compiled 3.0 (+0 %)'
        """
        predicted, measured = self.seconds_per_step * 1e3, measured_seconds_per_step * 1e3
        peak, compiled = self.peak_bytes / 2**20, self.compiled_bytes / 2**20
        return (
            f"parafit: predicted {predicted:.3f} ms/step, measured {measured:.3f} ({measured / predicted - 1:+.0%}); "
            f"peak {peak:.1f} MiB, compiled {compiled:.1f} ({compiled / peak - 1:+.0%})"
        ).replace("%)", " %)")
