"""Every kind of data Keras takes, and clear words about data nobody can take."""

import itertools

import jax.numpy as jnp
import keras
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import scipy.sparse
from keras import layers

import parafit
from parafit import backends
from parafit.adapters.step import State
from parafit.backends.cpu.backend import CpuBackend
from parafit.data.feed import Feed
from parafit.data.source import Source
from parafit.errors import BackendError, DataError, ModelError, NonFiniteLossError, ParafitError
from parafit.execution.snapshot import Snapshot
from tests.models import linear

ROWS = 50
X = np.random.default_rng(0).normal(size=(ROWS, 4)).astype("float32")
Y = (X @ [1, -2, 3, 0.5]).astype("float32")[:, None]


def losses(run, x, y=None, **options):
    return run.fit(linear(), x, y, epochs=2, verbose=0, **options).history["loss"]


EXPECTED = {"x": X, "y": Y}
FRAME = {f"c{i}": X[:, i] for i in range(4)}
ARRAYS = {
    "numpy float64": (X.astype("float64"), Y.astype("float64")),
    "numpy, not contiguous": (np.asfortranarray(X), Y[::-1][::-1]),
    "jax": (jnp.asarray(X), jnp.asarray(Y)),
    "pandas": (pd.DataFrame(FRAME), pd.Series(Y[:, 0])),
    "polars": (pl.DataFrame(FRAME), pl.Series(Y[:, 0])),
    "arrow": (pa.table(FRAME), pa.chunked_array([Y[:, 0]])),
    "memory-mapped": None,
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_and_tables(kind, tmp_path):
    if kind == "memory-mapped":
        np.save(tmp_path / "x.npy", X)
        x, y = np.load(tmp_path / "x.npy", mmap_mode="r"), Y
    else:
        x, y = ARRAYS[kind]
    np.testing.assert_allclose(losses(parafit, x, y, batch_size=8), losses(keras.Model, X, Y, batch_size=8), rtol=1e-5)
    np.testing.assert_allclose(parafit.predict(linear(), x, verbose=0), linear().predict(X, verbose=0), rtol=1e-5, atol=1e-6)


class Batches(keras.utils.PyDataset):
    def __init__(self, size=8, **options):
        super().__init__(**options)
        self.size = size

    def __len__(self):
        return -(-ROWS // self.size)

    def __getitem__(self, index):
        part = slice(index * self.size, (index + 1) * self.size)
        return X[part], Y[part]


def test_py_dataset():
    np.testing.assert_allclose(losses(parafit, Batches(), shuffle=False), losses(keras.Model, Batches(), shuffle=False), rtol=1e-5)
    model = linear()
    np.testing.assert_allclose(parafit.predict(model, Batches(), verbose=0), model.predict(X, verbose=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(parafit.evaluate(model, Batches(), verbose=0), model.evaluate(X, Y, batch_size=8, verbose=0), rtol=1e-5)


def test_py_dataset_with_workers():
    got = losses(parafit, Batches(workers=2, use_multiprocessing=False), shuffle=False)
    np.testing.assert_allclose(got, losses(keras.Model, Batches(workers=2, use_multiprocessing=False), shuffle=False), rtol=1e-5)


def endless():
    while True:
        yield from ((X[i : i + 8], Y[i : i + 8]) for i in range(0, 48, 8))


def test_generators():
    got = losses(parafit, endless(), steps_per_epoch=5, shuffle=False)
    np.testing.assert_allclose(got, losses(keras.Model, endless(), steps_per_epoch=5, shuffle=False), rtol=1e-5)


def test_validation_from_a_generator():
    options = {"steps_per_epoch": 3, "epochs": 2, "verbose": 0, "shuffle": False, "validation_steps": 2}
    histories = [run.fit(linear(), endless(), **(options | {"validation_data": endless()})).history for run in (keras.Model, parafit)]
    for name in ("loss", "val_loss"):
        np.testing.assert_allclose(histories[1][name], histories[0][name], rtol=1e-5)


def test_batches_of_many_shapes():
    class Ragged(keras.utils.PyDataset):
        def __len__(self):
            return 7

        def __getitem__(self, index):
            steps = 3 + index % 3
            return np.ones((4, steps, 2), "float32"), np.ones((4, 1), "float32")

    def model():
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((None, 2)), layers.GRU(3), layers.Dense(1)])
        model.compile("sgd", "mse")
        return model

    theirs, ours = (run.fit(model(), Ragged(), shuffle=False, verbose=0).history["loss"] for run in (keras.Model, parafit))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_only_the_short_last_batch_of_arrays_is_seldom():
    class Sizes(keras.utils.PyDataset):
        def __len__(self):
            return 30

        def __getitem__(self, index):
            return np.ones((4 - index % 3, 2), "float32"), np.ones((4 - index % 3, 1), "float32")

    epoch = Feed(Source(Sizes())).epoch()
    blocks = list(iter(lambda: epoch.take(8), None))
    assert len(blocks) == 30
    assert not any(block.seldom for block in blocks)
    for rows, seldom in ((39, True), (37, False)):
        assert [block.seldom for block in Feed(Source(np.ones((rows, 2)), batch_size=2)).foreseen()] == [False, seldom]


def test_tf_data():
    tf = pytest.importorskip("tensorflow")
    dataset = tf.data.Dataset.from_tensor_slices((X, Y)).batch(8)
    np.testing.assert_allclose(losses(parafit, dataset, shuffle=False), losses(keras.Model, X, Y, batch_size=8, shuffle=False), rtol=1e-5)


def test_torch_data_loader():
    torch = pytest.importorskip("torch")
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(Y)), batch_size=8)
    np.testing.assert_allclose(losses(parafit, loader, shuffle=False), losses(keras.Model, X, Y, batch_size=8, shuffle=False), rtol=1e-5)


def test_data_is_not_changed_and_later_changes_are_not_seen():
    x = X.copy()
    model = linear()
    parafit.fit(model, x, Y, batch_size=10, verbose=0)
    weights = model.get_weights()
    x[...] = np.nan
    assert all(np.isfinite(weight).all() for weight in weights + model.get_weights())


@pytest.mark.filterwarnings("ignore:parafit leaves this run to Keras")
def test_sparse_data_is_left_to_keras():
    with pytest.warns(UserWarning, match="leaves this run to Keras, one step at a time: the data is sparse"):
        parafit.evaluate(linear(), scipy.sparse.csr_matrix(X), Y, verbose=0)


def test_eager_models_are_left_to_keras():
    model = linear()
    model.compile("sgd", "mse", run_eagerly=True)
    with pytest.warns(UserWarning, match="run_eagerly=True"):
        parafit.fit(model, X, Y, verbose=0)
    with pytest.raises(parafit.errors.PlanError, match="run_eagerly=True"):
        parafit.fit(model, X, Y, plan="data=2", verbose=0)


BAD_DATA = {
    "different lengths": (lambda: (X, Y[:40]), "x: 50 rows, y: 40 rows"),
    "no rows": (lambda: (X[:0], Y[:0]), "the data is empty"),
    "text": (lambda: (np.array([["a"] * 4] * ROWS), Y), "dtype <U1"),
    "objects": (lambda: (np.array([[1, None, 2, 3]] * ROWS, dtype=object), Y), "dtype object"),
    "list of numbers": (lambda: ([1.0, 2.0], Y), "numpy.asarray"),
    "mixed table": (lambda: (pd.DataFrame({"a": [1.0] * ROWS, "b": ["x"] * ROWS}), Y), "dtype object"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data(name):
    make, message = BAD_DATA[name]
    model = linear()
    before = model.get_weights()
    with pytest.raises(DataError, match=message):
        parafit.fit(model, *make(), verbose=0)
    np.testing.assert_array_equal(model.get_weights()[0], before[0])


def test_a_shape_the_model_does_not_take_names_both():
    with pytest.raises(DataError, match=r"'functional' takes arrays of shape \(rows, 4\), but x has shape \(rows, 3\)"):
        parafit.fit(linear(), X[:, :3], Y, batch_size=8, verbose=0)


def test_models_that_cannot_be_fitted():
    model = keras.Sequential([layers.Dense(1)])
    with pytest.raises(ModelError, match=r"not compiled, so fit has no loss. Call model.compile"):
        parafit.fit(model, X, Y)
    with pytest.raises(ModelError, match=r"not compiled, so evaluate has no loss"):
        parafit.evaluate(model, X, Y)
    with pytest.raises(ModelError, match=r"expected a keras.Model, got int"):
        parafit.predict(3, X)


def test_another_backend(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    with pytest.raises(BackendError, match=r"'torch' backend, and parafit needs 'jax'"):
        parafit.fit(linear, X, Y)


def test_a_bad_row_stops_training_and_keeps_good_weights():
    x = X.copy()
    x[33, 2] = np.inf
    model = linear()
    model.compile(keras.optimizers.Adam(0.1), "mse")
    with pytest.raises(NonFiniteLossError, match=r"epoch 2 at step 5.*in 1 rows, the first is row 33") as caught:
        parafit.fit(model, x, Y, batch_size=8, shuffle=False, verbose=0, epochs=2, initial_epoch=1)
    assert (caught.value.epoch, caught.value.step) == (1, 4)
    assert isinstance(caught.value, ParafitError)
    good = []
    reference = linear()
    reference.compile(keras.optimizers.Adam(0.1), "mse")
    for step in range(5):
        good.append(reference.get_weights())
        parafit.fit(reference, X[8 * step : 8 * step + 8], Y[8 * step : 8 * step + 8], batch_size=8, verbose=0)
    held = model.get_weights()
    assert any(all(np.array_equal(mine, other) for mine, other in zip(held, weights)) for weights in good)
    assert all(np.isfinite(variable.numpy()).all() for variable in model.optimizer.variables)


def test_weights_that_a_gradient_spoilt_are_brought_back():
    @keras.saving.register_keras_serializable()
    def square_root(y, outputs):
        return keras.ops.sqrt(keras.ops.sum(outputs * 0.0 * y, axis=-1))  # 0 with an infinite slope

    model = linear()
    model.compile(keras.optimizers.Adam(0.1), square_root)
    before = model.get_weights()
    with pytest.raises(NonFiniteLossError, match="the model holds its last good weights, from"):
        parafit.fit(model, X, Y, batch_size=8, epochs=2, verbose=0)
    for now, good in zip(model.get_weights(), before):
        np.testing.assert_array_equal(now, good)
    assert all(np.isfinite(variable.numpy()).all() for variable in model.optimizer.variables)


def test_weights_that_are_nan_before_training_are_named():
    model = linear()
    model.compile("sgd", "mse")
    model.layers[-1].kernel.assign(np.full((4, 1), np.nan))
    with pytest.raises(NonFiniteLossError, match=r"Before training, these weights already were NaN or infinite: .*kernel\."):
        parafit.fit(model, X, Y, batch_size=8, verbose=0)


def test_copies_of_the_state_take_a_hundredth_of_the_time(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr("parafit.execution.snapshot.time.perf_counter", lambda: float(next(clock)))  # so that a copy takes a second

    def state(number):
        return State([jnp.full(100, number)], [], [jnp.full(100, number)] * 2, [])

    guard = Snapshot()
    guard.update(state(1.0))  # of weights alone: the next, of three times as much, will take three seconds
    for _ in range(299):
        guard.update(state(2.0))
    np.testing.assert_array_equal(guard.mend(state(2.0))[0].weights[0], np.ones(100))
    guard.update(state(3.0))
    mended, seconds = guard.mend(state(4.0))
    np.testing.assert_array_equal(mended.slots[1], np.full(100, 3.0))
    assert seconds == 2.0


def test_terminate_on_nan_ends_without_an_error():
    x = np.where(np.arange(ROWS)[:, None] == 20, np.nan, X)
    model = linear()
    parafit.fit(model, x, Y, batch_size=8, shuffle=False, verbose=0, epochs=5, callbacks=[keras.callbacks.TerminateOnNaN()])
    assert len(model.history.epoch) == 1
    assert all(np.isfinite(weight).all() for weight in model.get_weights())


def test_blocks_hold_every_row_once_in_order():
    epoch, rows = Feed(Source(np.arange(23)[:, None].astype("float32"), None, batch_size=4)).epoch(), []
    while (block := epoch.take(3)) is not None:
        rows.append(np.array(block.arrays)[: block.steps].reshape(-1))
    assert [len(part) for part in rows] == [12, 8, 3]
    np.testing.assert_array_equal(np.concatenate(rows), np.arange(23))


@pytest.mark.parametrize("plan", ["single", "data=8"])
def test_data_that_stays_on_the_devices_gives_the_same_numbers(plan):
    class Resident(CpuBackend):
        name = "resident"

        def resident(self, nbytes, **_):
            return True

    streamed = losses(parafit, X, Y, batch_size=8, plan=plan)
    with backends.using(Resident()):
        np.testing.assert_array_equal(losses(parafit, X, Y, batch_size=8, plan=plan), streamed)


@pytest.mark.parametrize(
    ("one_device", "nbytes", "flops", "epochs", "resident"),
    [
        (True, 1 << 20, 4_000_000, 5, True),
        (True, 1 << 20, 4_000_000, 4, False),
        (True, 1 << 20, 2_000_000, 5, False),
        (True, 1 << 30, 4_000_000, 5, False),
        (False, 1 << 20, 4_000_000, 5, False),
    ],
)
def test_steps_that_use_all_cores_of_a_cpu_look_their_rows_up(one_device, nbytes, flops, epochs, resident):
    assert CpuBackend().resident(nbytes, one_device=one_device, flops=lambda: flops, epochs=epochs) == resident


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        ([layers.Dense(4096, "relu"), layers.Dense(1)], (40,)),
        ([layers.Conv1D(64, 3), layers.GlobalMaxPooling1D(), layers.Dense(1)], (66, 8)),
    ],
    ids=["dense", "convolution"],
)
def test_a_fit_of_much_work_takes_no_batches_on_the_host(network, shape, monkeypatch):
    taken = []
    monkeypatch.setattr(Feed, "_gather_into", lambda self, rows: taken.append(rows))
    model = keras.Sequential([keras.Input(shape), *network])
    model.compile("sgd", "mse")
    parafit.fit(model, np.ones((64, *shape)), np.ones(64), batch_size=32, epochs=5, verbose=0)
    assert not taken
