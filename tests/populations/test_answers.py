"""Many models asked at once give what each gives alone."""

import keras
import numpy as np
import pytest
from keras import layers

import parafit
from parafit.errors import DataError, ModelError
from tests.models import many_inputs_and_outputs, mlp, normalised


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("make", [normalised, many_inputs_and_outputs])
def test_scores_are_those_of_each(make):
    models = [make()[0] for _ in range(3)]
    _, x, y = make()
    for form in (True, False):
        scores = parafit.evaluate_many(models, x, y, batch_size=16, verbose=0, return_dict=form)
        for ours, model in zip(scores, models, strict=True):
            assert ours == pytest.approx(parafit.evaluate(model, x, y, batch_size=16, verbose=0, return_dict=form), rel=1e-12)


@pytest.mark.usefixtures("float64")
def test_weights_of_rows_count():
    model, x, y = mlp()
    weights = np.random.default_rng(0).uniform(size=len(y))
    (ours,) = parafit.evaluate_many([model], x, y, sample_weight=weights, verbose=0)
    assert ours == pytest.approx(parafit.evaluate(model, x, y, sample_weight=weights, verbose=0), rel=1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("make", [normalised, many_inputs_and_outputs])
def test_predictions_are_those_of_each(make):
    models = [make()[0] for _ in range(3)]
    _, x, _ = make()
    outputs = parafit.predict_many(models, x, batch_size=16, verbose=0)
    for number, model in enumerate(models):
        alone = parafit.predict(model, x, batch_size=16, verbose=0)
        for name, values in alone.items() if isinstance(alone, dict) else [(None, alone)]:
            ours = outputs if name is None else outputs[name]
            np.testing.assert_allclose(ours[number], values, rtol=1e-12)


def test_models_of_other_outputs_give_a_list():
    models = [keras.Sequential([keras.Input((4,)), layers.Dense(units)]) for units in (1, 2)]
    assert [output.shape for output in parafit.predict_many(models, np.ones((5, 4)), verbose=0)] == [(5, 1), (5, 2)]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras' own
def test_a_model_that_runs_step_by_step_is_asked_alone():
    model, x, y = mlp()
    model.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=True)
    with pytest.warns(UserWarning, match="leaves this run to Keras"):
        scores = parafit.evaluate_many([model, mlp()[0]], x, y, verbose=0)
    assert len(scores) == 2


def test_what_cannot_be_asked():
    model, x, y = mlp()
    with pytest.raises(ModelError, match="expected a list of at least one model, got Sequential"):
        parafit.predict_many(model, x)
    with pytest.raises(ModelError, match="at least one model"):
        parafit.evaluate_many([], x, y)
    with pytest.raises(DataError, match="must be arrays"):
        parafit.predict_many([model], ((x,) for _ in range(2)), verbose=0)
