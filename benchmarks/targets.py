"""The numbers parafit has set itself, as ratios between two measured series, and whether a run reached them."""

from dataclasses import dataclass

from benchmarks.series import Spread, fastest, ratios, values
from benchmarks.workloads import WORKLOADS

MLP = tuple(name for name, workload in WORKLOADS.items() if workload.family == "mlp")
ALL = tuple(WORKLOADS)
KERAS_JAX = ("keras-jax", "keras-jax-10", "keras-jax-50")


@dataclass(frozen=True, kw_only=True)
class Target:
    """`theirs / ours` of a measure has to be at least `at_least` on each of `workloads`.

    Attributes:
        against: contenders of whom the fastest counts.
        measure, their_measure: names of series as `series.values` takes them; theirs is the same unless given.
    """

    what: str
    workloads: tuple[str, ...]
    against: tuple[str, ...]
    at_least: float
    measure: str = "step_seconds"
    their_measure: str | None = None


TARGETS = (
    Target(what="hand-written scan that shuffles and feeds", workloads=MLP, against=("scan-gather", "scan-take"), at_least=0.95),
    Target(what="bare scan over pre-cut batches", workloads=MLP, against=("scan",), at_least=0.7),
    Target(what="keras fit on JAX", workloads=("mlp-small",), against=("keras-jax",), at_least=2.5),
    Target(what="keras fit on JAX, best steps_per_execution", workloads=("mlp-small",), against=KERAS_JAX, at_least=1.3),
    Target(what="keras fit on TensorFlow", workloads=("mlp-small",), against=("keras-tf",), at_least=10),
    Target(what="keras fit on PyTorch", workloads=("mlp-small",), against=("keras-torch",), at_least=15),
    Target(what="PyTorch loop", workloads=("mlp-small",), against=("torch",), at_least=3),
    Target(what="keras fit on JAX", workloads=("cnn",), against=("keras-jax",), at_least=2),
    Target(
        what="best of keras fit on TensorFlow and PyTorch loop",
        workloads=("cnn",),
        against=("keras-tf", "keras-tf-50", "torch"),
        at_least=1,
    ),
    Target(what="PyTorch loop", workloads=("transformer",), against=("torch",), at_least=1.2),
    Target(what="keras fit on JAX", workloads=ALL, against=("keras-jax",), at_least=1),
    Target(
        what="keras fit on JAX, two epochs in a fresh process",
        workloads=ALL,
        against=("keras-jax",),
        at_least=1,
        measure="fresh_cold.total_seconds",
    ),
    Target(
        what="own first start, from start to first step (second start)",
        workloads=ALL,
        against=("parafit",),
        at_least=2,
        measure="fresh_warm.first_step_seconds",
        their_measure="fresh_cold.first_step_seconds",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one target came to on one workload; `measured` is None where a series is missing."""

    target: Target
    workload: str
    measured: Spread | None

    @property
    def word(self) -> str:
        """`yes`, `no`, `no (within the quartiles)` or `not measured`."""
        if self.measured is None:
            return "not measured"
        if self.measured.median >= self.target.at_least:
            return "yes"
        return "no (within the quartiles)" if self.measured.high >= self.target.at_least else "no"


def verdicts(document: dict) -> list[Verdict]:
    """Every target on every workload that `document`, a result of `benchmarks.run`, has."""
    return [
        Verdict(target=target, workload=name, measured=_measured(document["workloads"][name], target))
        for target in TARGETS
        for name in target.workloads
        if name in document["workloads"]
    ]


def _measured(workload: dict, target: Target) -> Spread | None:
    theirs = fastest(workload, target.against, target.their_measure or target.measure)
    ours = values(workload, "parafit", target.measure)
    if theirs is None or not ours:
        return None
    return Spread.of(ratios(values(workload, theirs, target.their_measure or target.measure), ours))
