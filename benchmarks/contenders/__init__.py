"""Who takes part: each contender's name, its module, the environment of its process and what it cannot do.

A contender's module has `make(workload, x, y, **options)`, which returns an object with

- `train(epochs) -> list[float]`: train that many epochs, each row once an epoch in a new random order, the loss and the accuracy
  tracked; the seconds each epoch took, the first one with what the call needs before it;
- `predict() -> array`, of shape (rows, classes), on the host: absent where that would measure nothing of its own.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field

from benchmarks.workloads import Workload


@dataclass(frozen=True, kw_only=True)
class Contender:
    """How to run one contender.

    Attributes:
        module: the module of this package that has its `make`.
        options: keyword arguments of that `make`.
        environment: variables its process gets.
        needs: packages that must be installed.
        not_for: workload family, or `"batch_norm"`, to the reason why it does not take part there.
        fresh: whether the two-epoch run in a fresh process is measured.
        keeps_programs: whether a second start finds the compiled programs of the first.
        quick: whether it takes part in a `--quick` run unless contenders are named.
    """

    name: str
    what: str
    module: str
    options: Mapping = field(default_factory=dict)
    environment: Mapping = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    not_for: Mapping[str, str] = field(default_factory=dict)
    fresh: bool = False
    keeps_programs: bool = False
    quick: bool = False

    def reason_to_skip(self, workload: Workload) -> str | None:
        """Why this contender cannot run `workload` here, or None if it can."""
        for package in self.needs:
            if importlib.util.find_spec(package) is None:
                return f"{package} is not installed"
        if workload.batch_norm and "batch_norm" in self.not_for:
            return self.not_for["batch_norm"]
        return self.not_for.get(workload.family)


def _keras(name: str, what: str, backend: str, needs: tuple[str, ...] = (), **fields) -> Contender:
    return Contender(name=name, what=what, module="keras_fit", environment={"KERAS_BACKEND": backend}, needs=("keras", *needs), **fields)


_JAX = {"KERAS_BACKEND": "jax"}
_SCAN_CNN = {"cnn": "convolutions inside lax.scan are several times slower than outside on XLA:CPU, so no ceiling"}
_ONLY_PLAIN: dict[str, str] = dict.fromkeys(("cnn", "lstm", "transformer", "batch_norm"), "MLPClassifier has dense layers only")

CONTENDERS = {
    contender.name: contender
    for contender in (
        _keras("parafit", "parafit.fit", "jax", options={"parafit": True}, fresh=True, keeps_programs=True, quick=True),
        _keras("keras-jax", "keras fit on JAX", "jax", fresh=True, quick=True),
        _keras("keras-jax-10", "keras fit on JAX, steps_per_execution=10", "jax", options={"steps_per_execution": 10}),
        _keras("keras-jax-50", "keras fit on JAX, steps_per_execution=50", "jax", options={"steps_per_execution": 50}, quick=True),
        _keras("keras-tf", "keras fit on TensorFlow", "tensorflow", ("tensorflow",), fresh=True, quick=True),
        _keras(
            "keras-tf-50",
            "keras fit on TensorFlow, steps_per_execution=50",
            "tensorflow",
            ("tensorflow",),
            options={"steps_per_execution": 50},
        ),
        _keras("keras-torch", "keras fit on PyTorch", "torch", ("torch",), fresh=True),
        Contender(name="torch", what="PyTorch loop", module="torch_loop", needs=("torch",), fresh=True, quick=True),
        Contender(
            name="torch-compile",
            what="PyTorch loop, torch.compile",
            module="torch_loop",
            options={"compiled": True},
            needs=("torch",),
            fresh=True,
        ),
        Contender(
            name="torch-ddp",
            what="PyTorch DDP, 2 processes, gloo",
            module="torch_ddp",
            needs=("torch",),
            not_for={"batch_norm": "DDP's BatchNorm sees one process's rows, and SyncBatchNorm needs a GPU: another computation"},
        ),
        Contender(name="sklearn", what="scikit-learn MLPClassifier", module="scikit", needs=("sklearn",), not_for=_ONLY_PLAIN, quick=True),
        Contender(
            name="scan",
            what="hand-written lax.scan, batches cut and shuffled beforehand",
            module="jax_scan",
            options={"feed": "cut"},
            environment=_JAX,
            needs=("jax",),
            not_for=_SCAN_CNN,
            quick=True,
        ),
        Contender(
            name="scan-gather",
            what="hand-written lax.scan, shuffled, rows gathered on the device",
            module="jax_scan",
            options={"feed": "gather"},
            environment=_JAX,
            needs=("jax",),
            not_for=_SCAN_CNN,
            quick=True,
        ),
        Contender(
            name="scan-take",
            what="hand-written lax.scan, shuffled, rows taken on the host",
            module="jax_scan",
            options={"feed": "take"},
            environment=_JAX,
            needs=("jax",),
            not_for=_SCAN_CNN,
            quick=True,
        ),
    )
}
