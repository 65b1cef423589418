"""Many models at once: each member's numbers are those of its own seed, its own build and its own fit."""

import keras
import numpy as np
import pytest
from keras import callbacks as kc
from keras import layers

import parafit
from parafit import backends
from parafit.backends.backend import Backend
from parafit.errors import NonFiniteLossError
from parafit.execution.events import listening
from parafit.populations import many
from parafit.populations.training import train_together
from tests.models import compiled, many_inputs_and_outputs

ROWS = 75


def data(shape=(12,), rows=ROWS):
    return np.random.default_rng(0).normal(size=(rows, *shape)), np.random.default_rng(1).integers(0, 3, rows).astype("int32")


def sequential(hidden, shape=(12,), optimizer=None):
    return compiled(keras.Sequential([keras.Input(shape), *hidden, layers.Dense(3, "softmax")]), optimizer)


def normalised():
    """BatchNorm and Dropout, whose seed is the member's own; no bias before a normalisation, as its gradient is rounding alone."""
    hidden = [layers.Dense(16, use_bias=False), layers.BatchNormalization(), layers.Activation("relu"), layers.Dropout(0.3)]
    return sequential([*hidden, layers.Dense(8)])


def dense():
    return sequential([layers.Dense(8, "tanh"), layers.Dropout(0.2)])


def convolutional():
    return sequential([layers.Conv2D(4, 3, activation="tanh"), layers.AveragePooling2D(2), layers.Flatten()], (8, 8, 2))


def recurrent():
    return sequential([layers.LSTM(4), layers.Dense(4, "tanh")], (5, 3))


def state_of(model):
    """All variables of a model and its optimizer: weights, statistics, slots, seeds, metrics."""
    held = [*model.trainable_variables, *model.non_trainable_variables, *model.optimizer.variables, *model.metrics_variables]
    return [np.asarray(variable.value) for variable in held]


def check_same(history, model, ours, our_model, **tolerance):
    tolerance = {"rtol": 1e-12, "atol": 1e-14} | tolerance
    assert ours.epoch == history.epoch
    assert list(ours.history) == list(history.history)
    for name, values in history.history.items():
        np.testing.assert_allclose(ours.history[name], values, **tolerance, err_msg=name)
    for theirs, mine in zip(state_of(model), state_of(our_model), strict=True):
        np.testing.assert_allclose(mine, theirs, **tolerance)


def check_against_alone(build, x, y, seeds, *, callbacks=lambda number: None, folds=None, rates=None, **options):
    """Train members together, and each alone; gives the histories of those that trained together."""
    together = {"seeds": seeds, "folds": folds, "learning_rates": rates, "callbacks": callbacks}
    histories = parafit.fit_many(build, x, y, **together, verbose=0, **options)
    splits = list(folds.split(x, y)) if folds else [None] * len(seeds)
    for number, (seed, ours, split) in enumerate(zip(seeds, histories, splits, strict=True)):
        keras.utils.set_random_seed(seed)
        model = build()
        if rates:
            model.optimizer.learning_rate = rates[number]
        mine, more = (x, y), {}
        if split:
            train, test = split
            mine, more = (x[train], y[train]), {"validation_data": (x[test], y[test])}
        alone = parafit.fit(model, *mine, callbacks=callbacks(number), verbose=0, plan="single", **options, **more)
        assert (ours.seed, ours.error) == (seed, None)
        check_same(alone, model, ours, ours.model)
    return histories


@pytest.fixture
def told():
    """What runs say, in words."""
    heard = []
    with listening(lambda event: heard.append(event.words)):
        yield heard


SEEDS = [3, 1, 4]


@pytest.mark.usefixtures("float64")
def test_dropout_and_batch_statistics_with_validation():
    check_against_alone(normalised, *data(), SEEDS, batch_size=16, epochs=3, validation_split=0.2)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("build", "shape"), [(convolutional, (8, 8, 2)), (recurrent, (5, 3))])
def test_other_networks(build, shape):
    check_against_alone(build, *data(shape), SEEDS[:2], batch_size=16, epochs=2)


@pytest.mark.usefixtures("float64")
def test_several_inputs_and_outputs():
    _, x, y = many_inputs_and_outputs()
    check_against_alone(lambda: many_inputs_and_outputs()[0], x, y, SEEDS[:2], batch_size=16, epochs=2, validation_split=0.2)


@pytest.mark.usefixtures("float64")
def test_outputs_that_keras_names_are_stacked_all_the_same(told):
    def build():
        inputs = keras.Input((12,))
        model = keras.Model(inputs, [layers.Dense(1)(inputs), layers.Dense(2)(inputs)])
        model.compile(keras.optimizers.SGD(0.01), ["mse", "mse"], metrics=[["mae"], ["mae"]])
        return model

    x, _ = data()
    histories = parafit.fit_many(build, x, [x[:, :1], x[:, 1:3]], seeds=list(range(6)), verbose=0)
    assert [words for words in told if "train together" in words] == ["parafit: 6 of 6 members train together (members 0, 1, 2, 3, 4, 5)"]
    for history in histories:
        keras.utils.set_random_seed(history.seed)
        alone = build()
        expected = parafit.fit(alone, x, [x[:, :1], x[:, 1:3]], verbose=0).history
        np.testing.assert_allclose(sorted(history.history.values()), sorted(expected.values()), rtol=1e-12)


@pytest.mark.usefixtures("float64")
def test_weights_of_rows_and_classes():
    x, y = data()
    weights = np.random.default_rng(2).uniform(size=ROWS)
    check_against_alone(dense, x, y, SEEDS[:2], batch_size=16, sample_weight=weights, validation_split=0.2)
    check_against_alone(dense, x, y, SEEDS[:2], batch_size=16, class_weight={0: 1.0, 1: 2.0, 2: 0.5}, validation_split=0.2)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("shuffle", [False, "batch"])
def test_rows_in_other_orders(shuffle):
    check_against_alone(dense, *data(), SEEDS[:2], batch_size=16, epochs=2, shuffle=shuffle)


@pytest.mark.usefixtures("float64")
def test_learning_rates_are_each_members_own():
    histories = check_against_alone(dense, *data(), SEEDS, rates=[1e-1, 1e-2, 1e-3], batch_size=16, epochs=2)
    assert [float(history.model.optimizer.learning_rate) for history in histories] == pytest.approx([1e-1, 1e-2, 1e-3])


def test_other_numbers_of_the_optimizer_make_groups(told):
    x, y = data()
    histories = parafit.fit_many(dense, x, y, seeds=[1, 1], learning_rates={"beta_1": [0.9, 0.5]}, verbose=0)
    assert [history.model.optimizer.beta_1 for history in histories] == [0.9, 0.5]
    assert histories[0].history != histories[1].history or not np.array_equal(*(h.model.get_weights()[0] for h in histories))
    assert any("have their own turn" in words for words in told)


@pytest.mark.usefixtures("float64")
def test_initial_weights_and_orders_of_rows_are_those_of_the_seed():
    def build(seed):
        assert isinstance(seed, int)
        return dense()

    x, y = data()
    histories = parafit.fit_many(build, x, y, seeds=SEEDS, epochs=0, verbose=0)
    for history in histories:
        keras.utils.set_random_seed(history.seed)
        for theirs, ours in zip(state_of(dense()), state_of(history.model)):
            np.testing.assert_array_equal(ours, theirs)


def test_seeds_come_from_the_global_generator_which_is_left_alone():
    def seeds():
        keras.utils.set_random_seed(5)
        drawn = [history.seed for history in parafit.fit_many(dense, *data(), n=2, verbose=0)]
        return drawn, np.random.uniform()

    assert seeds() == seeds()
    assert len(set(seeds()[0])) == 2


@pytest.mark.usefixtures("float64")
def test_folds_of_unequal_sizes():
    from sklearn.model_selection import StratifiedKFold

    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    x, y = data(rows=73)
    assert len({len(train) % 16 for train, _ in folds.split(x, y)}) > 1
    check_against_alone(dense, x, y, SEEDS, folds=folds, batch_size=16, epochs=2)


@pytest.mark.usefixtures("float64")
def test_folds_whose_numbers_of_batches_differ():
    class Growing:
        def split(self, x, y=None, groups=None):
            yield from ((np.arange(size), np.arange(size, ROWS)) for size in (20, 40, 66))

        def get_n_splits(self, *_):
            return 3

    check_against_alone(normalised, *data(), SEEDS, folds=Growing(), batch_size=16, epochs=2)


# Stopping -----------------------------------------------------------------------------------------------------------------------------


class StopAfter(kc.Callback):
    def __init__(self, epochs):
        super().__init__()
        self.epochs = epochs

    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training = epoch + 1 >= self.epochs


@pytest.mark.usefixtures("float64")
def test_members_that_stop_make_room_for_those_that_wait_and_the_stack_gets_smaller(told, monkeypatch):
    monkeypatch.setattr(many, "train_together", lambda *arguments: train_together(*arguments, is_worth=lambda saved, takes: True))
    seeds, epochs = [1, 2, 3, 4, 5, 6, 7], [1, 4, 2, 1, 3, 1, 5]
    x, y = data()
    callbacks = lambda number: [StopAfter(epochs[number])]  # noqa: E731
    histories = parafit.fit_many(dense, x, y, seeds=seeds, callbacks=callbacks, epochs=6, batch_size=16, stack=4, verbose=0)
    assert [len(history.epoch) for history in histories] == epochs
    assert "parafit: 7 of 7 members train 4 at a time (members 0, 1, 2, 3, 4, 5, 6)" in told
    assert [words for words in told if "in a stack of" in words]
    for seed, history, number in zip(seeds, histories, range(7)):
        keras.utils.set_random_seed(seed)
        model = dense()
        alone = parafit.fit(model, x, y, callbacks=callbacks(number), epochs=6, batch_size=16, verbose=0)
        check_same(alone, model, history, history.model)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "callbacks",
    [
        lambda number: [kc.EarlyStopping("val_loss", patience=0, min_delta=0.05 * number, restore_best_weights=True)],
        lambda number: [
            kc.EarlyStopping("loss", patience=0, min_delta=0.05 * number),
            kc.ReduceLROnPlateau("loss", patience=0, min_delta=9),
        ],
        lambda number: [kc.LearningRateScheduler(lambda epoch, rate: rate / (epoch + 1 + number)), kc.TerminateOnNaN()],
    ],
)
def test_callbacks_of_keras(callbacks):
    check_against_alone(dense, *data(), SEEDS, callbacks=callbacks, batch_size=16, epochs=4, validation_split=0.2)


@pytest.mark.usefixtures("float64")
def test_averaged_weights_are_swapped_in_for_validation():
    build = lambda: sequential([layers.Dense(4)], optimizer=keras.optimizers.Adam(1e-2, use_ema=True))  # noqa: E731
    check_against_alone(build, *data(), SEEDS[:2], callbacks=lambda number: [kc.SwapEMAWeights()], epochs=2, validation_split=0.2)


def test_callbacks_see_their_own_model_with_its_weights(tmp_path):
    seen = {}

    class Look(kc.Callback):
        def __init__(self, number):
            super().__init__()
            self.number = number

        def on_epoch_end(self, epoch, logs=None):
            seen[self.number, epoch] = self.model.get_weights()

    x, y = data()
    checkpoint = lambda number: kc.ModelCheckpoint(tmp_path / f"{number}-{{epoch}}.weights.h5", save_weights_only=True)  # noqa: E731
    histories = parafit.fit_many(
        dense, x, y, seeds=SEEDS, callbacks=[[Look(number), checkpoint(number)] for number in range(3)], epochs=2, verbose=0
    )
    assert sorted(seen) == [(number, epoch) for number in range(3) for epoch in range(2)]
    for number, history in enumerate(histories):
        for saved, held in zip(seen[number, 1], history.model.get_weights()):
            np.testing.assert_array_equal(saved, held)
        history.model.load_weights(tmp_path / f"{number}-1.weights.h5")
        for saved, held in zip(seen[number, 0], history.model.get_weights()):
            np.testing.assert_array_equal(saved, held)


@pytest.mark.usefixtures("float64")
def test_a_callback_between_batches_makes_its_member_train_alone(told):
    class Count(kc.Callback):
        def on_train_batch_end(self, batch, logs=None):
            pass

    check_against_alone(dense, *data(), SEEDS, callbacks=lambda number: [Count()] if number == 1 else None, batch_size=16)
    assert "parafit: member 1 trains alone: its callback Count is called between batches" in told


def test_a_member_whose_loss_becomes_nan_stops_alone(told):
    x, y = data()
    build = lambda: sequential([layers.Dense(8)], optimizer=keras.optimizers.SGD(0.01))  # noqa: E731
    histories = parafit.fit_many(build, x, y, seeds=SEEDS, learning_rates=[0.01, 1e38, 0.02], batch_size=16, epochs=3, verbose=0)
    assert [len(history.epoch) for history in histories] == [3, 0, 3]
    error = histories[1].error
    assert isinstance(error, NonFiniteLossError)
    assert error.epoch == 0
    assert histories[0].error is histories[2].error is None
    assert all(np.isfinite(weight).all() for history in histories for weight in history.model.get_weights())
    assert any(words.startswith("parafit: member 1 (seed 1) stopped: the loss became") for words in told)
    keras.utils.set_random_seed(3)
    alone = build()
    parafit.fit(alone, x, y, batch_size=16, epochs=3, verbose=0)
    for theirs, ours in zip(alone.get_weights(), histories[0].model.get_weights()):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_terminate_on_nan_ends_a_member_without_an_error():
    x, y = data()
    options = {"learning_rates": [1e-2, 1e38], "callbacks": lambda number: [kc.TerminateOnNaN()], "validation_split": 0.2, "epochs": 3}
    build = lambda: sequential([layers.Dense(8)], optimizer=keras.optimizers.SGD(0.01))  # noqa: E731
    histories = parafit.fit_many(build, x, y, seeds=[1, 2], batch_size=16, **options, verbose=0)
    assert [len(history.epoch) for history in histories] == [3, 1]
    assert histories[1].error is None
    assert np.isfinite(histories[1].history["val_loss"]).all()


@pytest.mark.usefixtures("float64")
def test_an_interrupted_run_leaves_every_model_its_state():
    class Interrupt(kc.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:
                raise KeyboardInterrupt

    x, y = data()
    with pytest.raises(KeyboardInterrupt) as stop, backends.using(Backend()):  # one stack: all have done as many epochs
        parafit.fit_many(
            dense, x, y, seeds=SEEDS, callbacks=lambda number: [Interrupt()] if number == 2 else None, epochs=9, batch_size=16, verbose=0
        )
    for history in stop.value.histories:
        keras.utils.set_random_seed(history.seed)
        alone = dense()
        parafit.fit(alone, x, y, epochs=2, batch_size=16, verbose=0)
        for theirs, ours in zip(alone.get_weights(), history.model.get_weights(), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-14)


# What is stacked ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64")
def test_members_of_other_shapes_are_grouped(told):
    def build(seed):
        return sequential([layers.Dense(8 if seed % 2 else 5, "relu"), layers.Dropout(0.1 if seed < 3 else 0.4)])

    x, y = data()
    histories = parafit.fit_many(build, x, y, seeds=[1, 2, 3, 5], epochs=2, batch_size=16, verbose=0)
    assert [words.partition(";")[0] for words in told if "train together" in words] == [
        f"parafit: {count} of 4 members train together (members {members})" for count, members in ((1, "0"), (1, "1"), (2, "2, 3"))
    ]
    for history in histories:
        keras.utils.set_random_seed(history.seed)
        model = build(history.seed)
        alone = parafit.fit(model, x, y, epochs=2, batch_size=16, verbose=0)
        check_same(alone, model, history, history.model)


def test_numbers_that_no_config_tells_are_told_apart(told):
    class Scaled(layers.Layer):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def call(self, x):
            return x * self.factor

    factors = iter([1.0, 1.0, 2.0])
    models = [sequential([layers.Dense(4), Scaled(next(factors))]) for _ in range(3)]
    parafit.fit_many(models, *data(), seeds=[1, 1, 1], verbose=0)
    assert [words.partition(";")[0] for words in told if "train together" in words] == [
        "parafit: 2 of 3 members train together (members 0, 1)",
        "parafit: 1 of 3 members train together (members 2)",
    ]


def test_losses_of_the_users_are_told_apart_by_what_they_compute(told):
    def build(factor):
        model = keras.Sequential([keras.Input((12,)), layers.Dense(1)])
        model.compile("sgd", lambda y, output: factor * keras.ops.mean((y - output) ** 2))
        return model

    x, y = data()
    models = [build(factor) for factor in (1.0, 2.0, 1.0)]
    histories = parafit.fit_many(models, x, y.astype(float), seeds=[1, 1, 1], verbose=0)
    assert sorted(words.partition("(")[2].partition(")")[0] for words in told if "train together" in words) == ["members 0, 2", "members 1"]
    assert len({history.history["loss"][0] for history in histories}) > 1


@pytest.mark.usefixtures("float64")
def test_models_are_updated_in_place_and_go_on():
    x, y = data()
    models = [sequential([layers.Dense(8, "tanh")]) for _ in range(2)]
    alone = [keras.models.clone_model(model) for model in models]
    for model, copy in zip(models, alone):
        copy.set_weights(model.get_weights())
        compiled(copy)
    for turn in (7, 8):
        histories = parafit.fit_many(models, x, y, seeds=[turn, turn], batch_size=16, epochs=2, verbose=0)
        for model, copy, history in zip(models, alone, histories):
            keras.utils.set_random_seed(turn)
            expected = parafit.fit(copy, x, y, batch_size=16, epochs=2, verbose=0)
            assert history.model is model
            np.testing.assert_allclose(history.history["loss"], expected.history["loss"], rtol=1e-12)


@pytest.mark.usefixtures("float64")
def test_a_model_that_is_built_when_it_first_sees_data():
    def build():
        model = keras.Sequential([layers.Dense(8, "relu"), layers.Dropout(0.2), layers.Dense(3, "softmax")])
        return compiled(model)

    check_against_alone(build, *data(), SEEDS[:2], batch_size=16, epochs=2)


def test_data_that_does_not_fit_on_the_device_comes_in_blocks(monkeypatch):
    from parafit.populations import rows

    x, y = data()
    whole = parafit.fit_many(dense, x, y, seeds=SEEDS, epochs=2, validation_split=0.2, verbose=0)
    monkeypatch.setattr(rows, "_HELD_SHARE", 0)
    parts = parafit.fit_many(dense, x, y, seeds=SEEDS, epochs=2, validation_split=0.2, verbose=0)
    for one, other in zip(whole, parts):
        np.testing.assert_allclose(one.history["val_loss"], other.history["val_loss"], rtol=1e-5)


@pytest.mark.usefixtures("float64")
def test_attention_of_a_kernel_library_is_computed_plainly(monkeypatch):
    from parafit.support import compat

    layer = layers.MultiHeadAttention(2, 4, flash_attention=True)
    inputs = keras.Input((6, 8))
    model = keras.Model(inputs, layer(inputs, inputs))
    monkeypatch.setattr(compat, "_BATCHED_ATTENTION", (99,))
    with compat.attention_to_be_stacked(model):
        assert layer._flash_attention is False
    assert layer._flash_attention is True
    monkeypatch.setattr(compat, "_BATCHED_ATTENTION", (0,))
    with compat.attention_to_be_stacked(model):
        assert layer._flash_attention is True
