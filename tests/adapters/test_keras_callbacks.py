"""Callbacks get control when they should, see the weights of that moment, and what they write counts."""

import csv
import subprocess
import sys

import jax
import keras
import numpy as np
import pytest
from keras import callbacks as kc

import parafit
from parafit.adapters.keras_callbacks import batch_strides
from tests.models import mlp


def both(make_callbacks, *, fit=None, read=lambda model, callbacks: None):
    """Run Keras and parafit with the same callbacks; their histories, weights and what `read` gives must agree."""
    seen = []
    for run in (keras.Model, parafit):
        keras.utils.set_random_seed(3)
        model, x, y = mlp()
        listed = make_callbacks()
        options = {"batch_size": 8, "epochs": 3, "verbose": 0, "validation_split": 0.2} | (fit or {})
        with jax.softmax_custom_jvp(run is keras.Model):  # parafit's form of the gradient, for what is compared to the last digits
            history = run.fit(model, x, y, **options, callbacks=listed)
        seen.append((history.epoch, history.history, model.get_weights(), read(model, listed)))
    (epochs, history, weights, read_out), (our_epochs, our_history, our_weights, our_read_out) = seen
    assert our_epochs == epochs
    assert list(our_history) == list(history)
    for name in history:
        np.testing.assert_allclose(our_history[name], history[name], rtol=2e-5, atol=1e-6, err_msg=name)
    for ours, theirs in zip(our_weights, weights):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-6)
    assert our_read_out == read_out


class Recorder(kc.Callback):
    """Writes down every hook that is called, with batch or epoch and the keys of the logs."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def _note(name):  # noqa: N805
        def hook(self, *arguments, logs=None):
            last = arguments[-1] if arguments else None
            logs = logs if logs is not None or not isinstance(last, dict) else last
            self.calls.append((name, *(n for n in arguments if isinstance(n, int)), *sorted(logs or ())))

        return hook

    for _name in (
        *("on_train_begin", "on_train_end", "on_epoch_begin", "on_epoch_end", "on_train_batch_begin", "on_train_batch_end"),
        *("on_test_begin", "on_test_end", "on_test_batch_begin", "on_test_batch_end"),
    ):
        locals()[_name] = _note(_name)


def test_order_numbers_and_logs_of_every_hook():
    both(lambda: [Recorder()], read=lambda model, callbacks: callbacks[0].calls)


def test_predict_hooks():
    calls = []
    for run in (keras.Model, parafit):
        model, x, _ = mlp()
        outputs = []
        listed = [kc.LambdaCallback(), kc.Callback()]
        listed[1].on_predict_batch_end = lambda batch, logs, outputs=outputs: outputs.append((batch, np.shape(logs["outputs"])))
        run.predict(model, x, batch_size=20, callbacks=listed, verbose=0)
        calls.append(outputs)
    assert calls[0] == calls[1] == [(0, (20, 3)), (1, (20, 3)), (2, (20, 3)), (3, (15, 3))]


class WeightSums(kc.Callback):
    def __init__(self):
        super().__init__()
        self.sums = []

    def on_train_batch_end(self, batch, logs=None):
        self.sums.append(float(sum(np.abs(weight).sum() for weight in self.model.get_weights())))


def test_reading_weights_after_every_batch():
    made = []
    both(lambda: [made.append(WeightSums()) or made[-1]])
    np.testing.assert_allclose(made[1].sums, made[0].sums, rtol=2e-6)
    assert len(made[0].sums) == len(set(made[0].sums)) > 10


def test_a_callback_that_holds_the_model_itself_can_read_it():
    model, x, y = mlp()
    sums = []
    look = kc.LambdaCallback(on_train_batch_end=lambda batch, logs: sums.append(float(np.abs(model.layers[0].kernel.numpy()).sum())))
    parafit.fit(model, x, y, batch_size=8, callbacks=[look], verbose=0)
    assert len(set(sums)) == 10


class Clip(kc.Callback):
    def on_train_batch_begin(self, batch, logs=None):
        self.model.set_weights([np.clip(weight, -0.1, 0.1) for weight in self.model.get_weights()])


def test_setting_weights_before_every_batch():
    both(lambda: [Clip()])


class WarmUp(kc.Callback):
    def on_train_batch_begin(self, batch, logs=None):
        self.model.optimizer.learning_rate = 1e-4 * (batch + 1)


KERAS_CALLBACKS = {
    "learning rate set at every batch": lambda folder: [WarmUp()],
    "early stopping": lambda folder: [kc.EarlyStopping("val_loss", patience=0, min_delta=10, restore_best_weights=True)],
    "plateau": lambda folder: [kc.ReduceLROnPlateau("loss", patience=1, min_delta=10)],
    "schedule": lambda folder: [kc.LearningRateScheduler(lambda epoch, rate: rate * 0.5)],
    "stop in the middle": lambda folder: [kc.LambdaCallback(on_epoch_end=lambda epoch, logs: None), StopAt(4)],
    "averaged weights swapped in": lambda folder: [kc.SwapEMAWeights(swap_on_epoch=True)],
    "terminate on nan": lambda folder: [kc.TerminateOnNaN()],
}


class StopAt(kc.Callback):
    def __init__(self, batch):
        super().__init__()
        self.batch = batch

    def on_train_batch_end(self, batch, logs=None):
        if batch == self.batch:
            self.model.stop_training = True


@pytest.mark.parametrize("name", [name for name in KERAS_CALLBACKS if name != "averaged weights swapped in"])
def test_callbacks_of_keras_and_users(name, tmp_path):
    both(lambda: KERAS_CALLBACKS[name](tmp_path))


def test_swapping_averaged_weights(tmp_path):
    weights = []
    for run in (keras.Model, parafit):
        keras.utils.set_random_seed(3)
        model, x, y = mlp()
        model.compile(keras.optimizers.Adam(1e-2, use_ema=True), "sparse_categorical_crossentropy")
        run.fit(model, x, y, epochs=2, verbose=0, callbacks=[kc.SwapEMAWeights(swap_on_epoch=True)])
        weights.append(model.get_weights())
    for theirs, ours in zip(*weights):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_csv_logger(tmp_path):
    model, x, y = mlp()
    parafit.fit(model, x, y, epochs=2, verbose=0, callbacks=[kc.CSVLogger(tmp_path / "log.csv")])
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert float(rows[1]["loss"]) == pytest.approx(model.history.history["loss"][1])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("frequency", ["epoch", 4])
def test_model_checkpoints_hold_the_weights_of_their_batch(frequency, tmp_path):
    saved = []
    for number, run in enumerate((keras.Model, parafit)):
        keras.utils.set_random_seed(3)
        model, x, y = mlp()
        folder = tmp_path / str(number)
        folder.mkdir()
        name = "{epoch}-{batch}.weights.h5" if frequency == 4 else "{epoch}.weights.h5"
        checkpoint = kc.ModelCheckpoint(folder / name, save_freq=frequency, save_weights_only=True)
        run.fit(model, x, y, batch_size=8, epochs=2, verbose=0, callbacks=[checkpoint])
        found = {}
        for path in sorted(folder.iterdir()):
            model.load_weights(path)
            found[path.name] = model.get_weights()
        saved.append(found)
    theirs, ours = saved
    assert list(ours) == list(theirs)
    assert len(ours) == (2 if frequency == "epoch" else 5)
    for name in theirs:
        for mine, other in zip(ours[name], theirs[name]):
            np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-7)


def test_backup_and_restore_goes_on_at_the_epoch_it_was_cut_off(tmp_path):
    class CutOff(kc.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    def run(callbacks):
        keras.utils.set_random_seed(3)
        model, x, y = mlp()
        return parafit.fit(model, x, y, epochs=4, shuffle=False, verbose=0, callbacks=callbacks), model

    whole, model = run([])
    with pytest.raises(KeyboardInterrupt):
        run([kc.BackupAndRestore(tmp_path), CutOff()])
    rest, resumed = run([kc.BackupAndRestore(tmp_path)])
    assert rest.epoch == [2, 3]
    np.testing.assert_allclose(rest.history["loss"], whole.history["loss"][2:], rtol=1e-5)
    for ours, theirs in zip(resumed.get_weights(), model.get_weights()):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_tensorboard(tmp_path):
    for package in ("tensorflow", "tensorboard"):
        pytest.importorskip(package, reason="Keras' TensorBoard callback needs TensorFlow and TensorBoard")
    model, x, y = mlp()
    parafit.fit(model, x, y, epochs=2, verbose=0, callbacks=[kc.TensorBoard(tmp_path)])
    assert list(tmp_path.rglob("events.out.tfevents.*"))


def strides(callbacks, phase="train"):
    model, _, _ = mlp()
    return batch_strides(kc.CallbackList(callbacks, model=model), phase, 1)


def test_known_callbacks_do_not_slow_a_run_down(tmp_path):
    quiet = [
        kc.History(),
        kc.EarlyStopping(),
        kc.CSVLogger(tmp_path / "a.csv"),
        kc.ProgbarLogger(),
        kc.TerminateOnNaN(),
        kc.LambdaCallback(),
    ]
    assert strides([*quiet, kc.ModelCheckpoint("a.keras"), kc.BackupAndRestore(tmp_path)]) == []
    assert strides([kc.ModelCheckpoint("a.keras", save_freq=7), kc.BackupAndRestore(tmp_path, save_freq=3)]) == [3, 7]
    assert strides([kc.LambdaCallback(on_train_batch_end=lambda batch, logs: None)]) == [1]
    assert strides([kc.LambdaCallback(on_train_batch_end=lambda batch, logs: None)], "test") == []


def test_the_progress_bar_moves_during_a_long_epoch(capsys):
    model, x, y = mlp()
    x, y = np.tile(x, (400, 1)), np.tile(y, 400)
    parafit.fit(model, x, y, batch_size=1, verbose=1)
    assert capsys.readouterr().out.count("/30000") > 2


def test_ctrl_c_keeps_weights_and_history():
    script = """
import os, signal, threading
import parafit, keras, numpy as np
model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4), keras.layers.Dense(1)])
model.compile("sgd", "mse")
first = model.get_weights()
class AfterTwoEpochs(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        if epoch == 1:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    parafit.fit(model, np.ones((50000, 8)), np.ones((50000, 1)), batch_size=2, epochs=10**6, verbose=0, callbacks=[AfterTwoEpochs()])
except KeyboardInterrupt:
    assert len(model.history.history["loss"]) >= 2
    assert all(np.isfinite(weight).all() for weight in model.get_weights())
    assert abs(model.get_weights()[0] - first[0]).max() > 0
    print("kept", model.predict(np.ones((1, 8)), verbose=0).shape)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "kept (1, 1)", done.stderr


def test_an_error_in_a_callback_leaves_the_model_usable():
    class Fail(kc.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 3:
                raise RuntimeError("mine")

    model, x, y = mlp()
    with pytest.raises(RuntimeError, match="mine"):
        parafit.fit(model, x, y, batch_size=8, callbacks=[Fail()], verbose=0)
    assert int(model.optimizer.iterations) == 4
    assert np.isfinite(model.evaluate(x, y, verbose=0)).all()
