"""What every contender has to do: a model, data of a size, a batch size and a number of steps."""

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A classification job, described so that each library can build it in its own way.

    Attributes:
        family: `"mlp"`, `"cnn"`, `"lstm"` or `"transformer"`; what the other fields do not say is fixed by the family.
        input_shape: shape of one row, without the batch dimension; token numbers for the transformer.
        hidden: widths of the hidden layers of an MLP.
        batch_norm, dropout: whether an MLP's hidden layers are Dense, BatchNormalization, ReLU, Dropout(dropout).
        steps: steps in an epoch; rows are `steps * batch_size`, so that no batch is short.
        epochs: epochs timed in a round, after one that is not.
    """

    name: str
    title: str
    family: str
    input_shape: tuple[int, ...]
    classes: int
    batch_size: int
    steps: int
    epochs: int = 1
    hidden: tuple[int, ...] = ()
    batch_norm: bool = False
    dropout: float = 0.0
    vocabulary: int = 0

    @property
    def rows(self) -> int:
        """Rows of training data: whole batches only."""
        return self.steps * self.batch_size


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            name="mlp-small",
            title="784-32-10",
            family="mlp",
            input_shape=(784,),
            hidden=(32,),
            classes=10,
            batch_size=32,
            steps=1875,
            epochs=2,
        ),
        Workload(
            name="mlp-medium",
            title="784-512-512-10",
            family="mlp",
            input_shape=(784,),
            hidden=(512, 512),
            classes=10,
            batch_size=128,
            steps=200,
            epochs=4,
        ),
        Workload(
            name="mlp-large",
            title="1024-4096-4096-1024",
            family="mlp",
            input_shape=(1024,),
            hidden=(4096, 4096),
            classes=1024,
            batch_size=512,
            steps=8,
        ),
        Workload(
            name="mlp-bn",
            title="784-256-128-10, BatchNorm, Dropout",
            family="mlp",
            input_shape=(784,),
            hidden=(256, 128),
            classes=10,
            batch_size=128,
            steps=200,
            epochs=4,
            batch_norm=True,
            dropout=0.2,
        ),
        Workload(
            name="cnn",
            title="28×28, Conv 32, Conv 64, Dense 10",
            family="cnn",
            input_shape=(28, 28, 1),
            classes=10,
            batch_size=64,
            steps=50,
            epochs=4,
            dropout=0.25,
        ),
        Workload(name="lstm", title="LSTM 64 × 50 steps", family="lstm", input_shape=(50, 16), classes=10, batch_size=64, steps=50),
        Workload(
            name="transformer",
            title="encoder, width 128, 2 layers, 64 tokens",
            family="transformer",
            input_shape=(64,),
            vocabulary=1000,
            classes=10,
            batch_size=32,
            steps=25,
            dropout=0.1,
        ),
        Workload(
            name="table",
            title="table 100k × 50, MLP 256-128",
            family="mlp",
            input_shape=(50,),
            hidden=(256, 128),
            classes=2,
            batch_size=256,
            steps=390,
            epochs=4,
        ),
    )
}


def with_steps(workload: Workload, steps: int | None, *, quick: bool) -> Workload:
    """`workload` with `steps` steps in an epoch; with `quick` and no `steps`, a quarter of its own, at least 4."""
    if steps is None:
        steps = max(workload.steps // 4, 4) if quick else workload.steps
    return replace(workload, steps=steps)


def make_arrays(workload: Workload, rows: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows to learn from and their classes, the same for the same `seed`.

    Returns:
        `x` of shape (rows, *input_shape), float32 (int32 token numbers for the transformer), and `y` of shape (rows,), int32.

    >>> x, y = make_arrays(WORKLOADS["cnn"], 5)
    >>> x.shape, x.dtype.name, y.shape, y.dtype.name
    ((5, 28, 28, 1), 'float32', (5,), 'int32')
    """
    random = np.random.default_rng(seed)
    shape = (rows, *workload.input_shape)
    if workload.vocabulary:
        x = random.integers(0, workload.vocabulary, shape, dtype=np.int32)
    else:
        x = random.standard_normal(shape, dtype=np.float32)
    return x, _classes(workload, x, random)


def _classes(workload: Workload, x: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Classes a network can learn: the largest of `classes` random linear functions of the first 50 numbers of a row."""
    numbers = x.reshape(len(x), -1)[:, :50].astype(np.float32)
    weights = random.standard_normal((numbers.shape[1], workload.classes), dtype=np.float32)
    return ((numbers - numbers.mean()) @ weights).argmax(axis=1).astype(np.int32)
