"""The estimators against scikit-learn's own: the same checks, the same curves, the same attributes."""

import pickle
from unittest.mock import patch

import jax
import numpy as np
import pytest
import scipy.sparse
import sklearn.neural_network
from sklearn.base import clone
from sklearn.datasets import load_digits, make_multilabel_classification, make_regression
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import parafit.sklearn
import parafit.sklearn.perceptron
from parafit.errors import PlanError
from parafit.planner.plan import Plan

unconverged = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@pytest.fixture(autouse=True)
def float64_arithmetic():
    """So that curves can be compared with scikit-learn's to the last digits; without it, epochs are computed in float32."""
    with jax.enable_x64(True):
        yield


@parametrize_with_checks([parafit.sklearn.MLPClassifier(), parafit.sklearn.MLPRegressor()])
@unconverged
def test_scikit_learns_estimator_checks(estimator, check):
    with jax.enable_x64(False):
        check(estimator)


@unconverged
@pytest.mark.parametrize("solver", ["adam", "sgd"])
def test_many_float64_rows_are_computed_in_float32_unless_jax_computes_in_float64(solver):
    x, y = digits()
    exact, theirs = fit_both("MLPClassifier", x, y, solver=solver)
    with jax.enable_x64(False):
        ours, _ = fit_both("MLPClassifier", x, y, solver=solver)
        few, few_exact = fit_both("MLPClassifier", x[:100], y[:100], solver=solver)
    assert_same(few, few_exact, rtol=1e-9)
    assert ours.coefs_[0].dtype == np.float64
    assert not np.array_equal(ours.coefs_[0], exact.coefs_[0])
    assert_same(ours, theirs, rtol=2e-4, atol=1e-5)


@unconverged
@pytest.mark.parametrize(
    "parameters",
    [
        {"hidden_layer_sizes": (12, 9)},
        {"activation": "tanh", "alpha": 0.3, "beta_1": 0.5, "beta_2": 0.9, "epsilon": 1e-3, "learning_rate_init": 0.01},
        {"activation": "logistic", "hidden_layer_sizes": 7, "batch_size": 32, "shuffle": False},
        {"activation": "identity", "hidden_layer_sizes": ()},
        {"solver": "sgd", "learning_rate_init": 0.1},
        {"solver": "sgd", "nesterovs_momentum": False, "momentum": 0.5, "learning_rate": "invscaling", "power_t": 0.1},
        {"solver": "sgd", "learning_rate": "adaptive", "learning_rate_init": 0.2, "tol": 0.05, "n_iter_no_change": 1},
        {"early_stopping": True, "validation_fraction": 0.2, "n_iter_no_change": 2, "tol": 0.02},
        {"tol": 1.0, "n_iter_no_change": 3},
        {"solver": "lbfgs", "alpha": 0.1},
    ],
    ids=str,
)
def test_a_classifier_follows_scikit_learns_curve(parameters):
    x, y = digits()
    ours, theirs = fit_both("MLPClassifier", x, y, **parameters)
    assert_same(ours, theirs, rtol=1e-9)
    np.testing.assert_array_equal(ours.classes_, theirs.classes_)
    np.testing.assert_array_equal(ours.predict(x), theirs.predict(x))
    np.testing.assert_allclose(ours.predict_proba(x), theirs.predict_proba(x), rtol=1e-7)
    np.testing.assert_allclose(ours.predict_log_proba(x), theirs.predict_log_proba(x), rtol=1e-7, atol=1e-9)


@unconverged
@pytest.mark.parametrize("solver", ["adam", "sgd", "lbfgs"])
@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("task", ["one output", "three outputs", "poisson", "binary", "multilabel"])
def test_every_task_follows_scikit_learns_curve(task, weighted, solver):
    name, x, y, parameters = tasks()[task]
    weights = np.random.RandomState(1).randint(0, 4, len(x)).astype(float) if weighted else None
    ours, theirs = fit_both(name, x, y, weights, solver=solver, batch_size=50, **parameters)
    assert_same(ours, theirs, rtol=1e-8)
    assert ours.score(x, y) == pytest.approx(theirs.score(x, y), rel=1e-8)


@unconverged
def test_early_stopping_weighs_the_held_out_rows_as_scikit_learn_does():
    x, y = digits()
    weights = np.random.RandomState(2).uniform(0.1, 3, len(x))
    ours, theirs = fit_both("MLPClassifier", x, y, weights, early_stopping=True)
    assert_same(ours, theirs, rtol=1e-9)


@unconverged
def test_float32_stays_float32():
    x, y = digits()
    ours, theirs = fit_both("MLPClassifier", x.astype(np.float32), y)
    assert ours.coefs_[0].dtype == np.float32
    assert_same(ours, theirs, rtol=2e-4, atol=1e-5)


@unconverged
@pytest.mark.parametrize("solver", ["adam", "sgd", "lbfgs"])
def test_sparse_rows_give_the_curve_of_dense_rows(solver):
    x, y = digits()
    dense, _ = fit_both("MLPClassifier", x, y, solver=solver)
    sparse, theirs = fit_both("MLPClassifier", scipy.sparse.csr_array(x), y, solver=solver)
    assert_same(sparse, theirs, rtol=1e-9)
    assert_same(sparse, dense, rtol=1e-9)


@unconverged
def test_rows_that_take_several_chunks_give_the_curve_of_one_chunk(monkeypatch):
    x, y = digits()
    whole, theirs = fit_both("MLPClassifier", x, y, batch_size=23)
    monkeypatch.setattr(parafit.sklearn.perceptron, "_CHUNK_BYTES", 4 * 23 * x.shape[1] * 8)
    chunked, _ = fit_both("MLPClassifier", x, y, batch_size=23)
    assert_same(chunked, whole, rtol=0)
    assert_same(chunked, theirs, rtol=1e-9)


@unconverged
@pytest.mark.parametrize("solver", ["adam", "sgd"])
def test_partial_fit_continues_as_scikit_learn_does(solver):
    x, y = digits()
    models = [module.MLPClassifier((8,), solver=solver, random_state=0) for module in (parafit.sklearn, sklearn.neural_network)]
    for rows in (slice(0, 90), slice(90, 200), slice(200, None)):
        for model in models:
            model.partial_fit(x[rows], y[rows], classes=np.arange(10))
    assert models[0].t_ == len(x)
    assert_same(*models, rtol=1e-9)


@unconverged
def test_partial_fit_takes_float64_rows_after_float32_ones():
    x, y = digits()
    models = [module.MLPClassifier((8,), random_state=0) for module in (parafit.sklearn, sklearn.neural_network)]
    for model in models:
        model.partial_fit(x.astype(np.float32), y, classes=np.arange(10)).partial_fit(x, y)
    assert models[0].coefs_[0].dtype == np.float32
    assert_same(*models, rtol=1e-4, atol=1e-5)


@unconverged
def test_warm_start_continues_as_scikit_learn_does():
    x, y = digits()
    models = [
        module.MLPClassifier((8,), warm_start=True, max_iter=3, random_state=0) for module in (parafit.sklearn, sklearn.neural_network)
    ]
    for model in models:
        model.fit(x, y).fit(x, y)
    assert len(models[0].loss_curve_) == 6
    assert_same(*models, rtol=1e-9)


@unconverged
@pytest.mark.parametrize("options", [{}, {"tol": 9, "n_iter_no_change": 1}], ids=["all epochs", "stops early"])
def test_a_random_state_object_is_used_up_as_by_scikit_learn(options):
    x, y = digits()
    states = np.random.RandomState(5), np.random.RandomState(5)
    for state, module in zip(states, (parafit.sklearn, sklearn.neural_network)):
        module.MLPClassifier((8,), max_iter=4, random_state=state, **options).fit(x, y)
    assert states[0].randint(2**31) == states[1].randint(2**31)


@unconverged
@pytest.mark.parametrize("solver", ["adam", "sgd", "lbfgs"])
@pytest.mark.parametrize("batch_size", ["auto", 37])
def test_eight_devices_give_the_weights_of_one(solver, batch_size):
    x, y = digits()
    parameters = {"solver": solver, "batch_size": batch_size, "max_iter": 5, "random_state": 0}
    one = parafit.sklearn.MLPClassifier((8,), plan="single", **parameters).fit(x, y)
    eight = parafit.sklearn.MLPClassifier((8,), plan="data=8", **parameters).fit(x, y)
    assert_same(eight, one, rtol=1e-12, atol=1e-12)


@unconverged
def test_a_plan_may_be_an_object_a_string_or_a_file(tmp_path):
    x, y = digits()
    path = tmp_path / "plan.json"
    path.write_text(Plan.parse("data=2").to_json())
    models = [
        parafit.sklearn.MLPClassifier((4,), max_iter=2, random_state=0, plan=plan)
        for plan in ("data=2", Plan.parse("data=2"), path, str(path))
    ]
    first, *others = [clone(model).fit(x, y) for model in models]
    for other in others:
        assert_same(other, first, rtol=0)


def test_a_plan_that_cannot_run_is_refused_before_training():
    x, y = digits()
    with pytest.raises(PlanError, match="wants 16 devices, but there are 8"):
        parafit.sklearn.MLPClassifier(plan="data=16").fit(x, y)
    for plan in ("tensor=2", "data=2,zero=1", "microbatches=2", "precision=bfloat16", "recompute=blocks"):
        for solver in ("adam", "lbfgs"):
            with pytest.raises(PlanError, match=f"plan '{plan}': these estimators run on one device, or split each batch"):
                parafit.sklearn.MLPClassifier(solver=solver, plan=plan).fit(x, y)
    with pytest.raises(PlanError, match="unknown axis 'rows'"):
        parafit.sklearn.MLPClassifier(plan="rows=2").fit(x, y)
    with pytest.raises(PlanError, match=r"splits a batch over 8 devices, but a batch has 5 rows. Raise batch_size to at least 8"):
        parafit.sklearn.MLPRegressor(plan="data=8", batch_size=5).fit(x, y)
    with pytest.raises(PlanError, match="cannot split a sparse X under solver='lbfgs'"):
        parafit.sklearn.MLPClassifier(plan="data=8", solver="lbfgs").fit(scipy.sparse.csr_array(x), y)
    with pytest.raises(ValueError, match="The 'plan' parameter of MLPClassifier must be"):
        parafit.sklearn.MLPClassifier(plan=8).fit(x, y)


@unconverged
def test_wrong_use_raises_what_scikit_learn_raises():
    x, y = digits()
    with pytest.raises(ValueError, match="partial_fit does not support early_stopping=True"):
        parafit.sklearn.MLPClassifier(early_stopping=True).partial_fit(x, y, classes=np.arange(10))
    with pytest.raises(ValueError, match="The validation set is too small"):
        parafit.sklearn.MLPRegressor(early_stopping=True).fit(x[:9], y[:9])
    with pytest.raises(ValueError, match="'activation' parameter of MLPClassifier must be"):
        parafit.sklearn.MLPClassifier(activation="softmax").fit(x, y)
    with pytest.raises(ValueError, match="Solver produced non-finite parameter weights"), np.errstate(all="ignore"):
        parafit.sklearn.MLPRegressor(solver="sgd", learning_rate_init=1e200, max_iter=3).fit(x, y)
    with pytest.raises(AttributeError, match="partial_fit"):
        parafit.sklearn.MLPClassifier(solver="lbfgs").partial_fit(x, y)


def test_warnings_and_progress_are_scikit_learns(capsys):
    x, y = digits()
    printed = []
    for module in (parafit.sklearn, sklearn.neural_network):
        with pytest.warns(ConvergenceWarning, match=r"Maximum iterations \(2\) reached"):
            module.MLPClassifier((4,), max_iter=2, verbose=True, random_state=0).fit(x, y)
        with pytest.warns(UserWarning, match="Got `batch_size` less than 1 or larger than sample size"):
            module.MLPClassifier((4,), batch_size=1000, tol=9, n_iter_no_change=1, verbose=True, random_state=0).fit(x, y)
        module.MLPClassifier((4,), early_stopping=True, tol=9, n_iter_no_change=1, verbose=True, random_state=0).fit(x, y)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert "Training loss did not improve more than tol=9.000000 for 1 consecutive epochs. Stopping." in printed[0]


def test_ctrl_c_keeps_the_weights_of_the_last_whole_epoch(monkeypatch):
    x, y = digits()
    with pytest.warns(ConvergenceWarning):
        short = parafit.sklearn.MLPClassifier((4,), max_iter=2, random_state=0).fit(x, y)
    run_epochs = parafit.sklearn.perceptron.Trainer.run_epochs

    def interrupted(trainer, orders, **options):
        losses = run_epochs(trainer, orders, **options)
        yield next(losses)
        yield next(losses)
        raise KeyboardInterrupt

    monkeypatch.setattr(parafit.sklearn.perceptron.Trainer, "run_epochs", interrupted)
    with pytest.warns(UserWarning, match="Training interrupted by user"):
        model = parafit.sklearn.MLPClassifier((4,), random_state=0).fit(x, y)
    assert_same(model, short, rtol=0)


@unconverged
def test_a_fitted_model_is_pickled_and_goes_on_training():
    x, y = digits()
    model = parafit.sklearn.MLPClassifier((8,), random_state=0).partial_fit(x, y, classes=np.arange(10))
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict_proba(x), model.predict_proba(x))
    assert_same(again.partial_fit(x, y), model.partial_fit(x, y), rtol=0)


def test_a_clone_has_the_same_parameters_and_nothing_learnt():
    model = parafit.sklearn.MLPRegressor(loss="poisson", alpha=0.5, plan=Plan.parse("data=2"))
    copy = clone(model)
    assert copy.get_params() == model.get_params()
    assert not hasattr(copy, "coefs_")


@unconverged
def test_grid_search_over_a_pipeline_chooses_as_scikit_learn_does():
    x, y = digits()
    searches = []
    for module in (parafit.sklearn, sklearn.neural_network):
        pipeline = make_pipeline(StandardScaler(), module.MLPClassifier((8,), max_iter=5, random_state=0))
        searches.append(GridSearchCV(pipeline, {"mlpclassifier__learning_rate_init": [1e-4, 1e-2]}, cv=2).fit(x, y))
    np.testing.assert_allclose(*(search.cv_results_["mean_test_score"] for search in searches))
    assert searches[0].best_params_ == searches[1].best_params_ == {"mlpclassifier__learning_rate_init": 1e-2}


@unconverged
def test_nothing_global_changes():
    x, y = digits()
    before = np.random.get_state()[1].copy()
    with jax.enable_x64(False):
        parafit.sklearn.MLPClassifier((4,), max_iter=2, random_state=0).fit(x, y)
        parafit.sklearn.MLPClassifier((4,), max_iter=2, solver="lbfgs", random_state=0).fit(x, y)
        assert not jax.config.jax_enable_x64
        assert jax.numpy.ones(1).dtype == np.float32
    np.testing.assert_array_equal(np.random.get_state()[1], before)


@unconverged
def test_new_hyperparameters_compile_nothing_again():
    x, y = digits()
    for solver in ("adam", "sgd"):
        parafit.sklearn.MLPClassifier((4,), solver=solver, max_iter=1).fit(x, y)
    programs = parafit.sklearn.perceptron._run_chunk._cache_size()
    parafit.sklearn.MLPClassifier((4,), alpha=1, learning_rate_init=0.1, beta_1=0.5, epsilon=0.1, random_state=7, max_iter=2).fit(x, y)
    parafit.sklearn.MLPClassifier((4,), solver="sgd", momentum=0.1, learning_rate="adaptive", tol=9, max_iter=2).fit(x, y)
    assert parafit.sklearn.perceptron._run_chunk._cache_size() == programs


@pytest.mark.parametrize("name", ["MLPClassifier", "MLPRegressor"])
def test_parameters_and_defaults_are_scikit_learns_and_plan(name):
    ours, theirs = (getattr(module, name)().get_params() for module in (parafit.sklearn, sklearn.neural_network))
    assert ours == theirs | {"plan": "auto"}
    assert isinstance(getattr(parafit.sklearn, name)(), getattr(sklearn.neural_network, name))


@pytest.mark.parametrize(("method", "solver"), [("_fit_stochastic", "adam"), ("_fit_lbfgs", "lbfgs"), ("_loss_grad_lbfgs", "lbfgs")])
def test_scikit_learn_still_calls_what_parafit_replaces(method, solver):
    """If scikit-learn renames one of them, its own loop would run instead, unnoticed but for its speed."""
    model = sklearn.neural_network.MLPClassifier(solver=solver)
    with patch.object(type(model), method, side_effect=NotImplementedError("called")), pytest.raises(NotImplementedError, match="called"):
        model.fit(*digits())


def digits():
    x, y = load_digits(return_X_y=True)
    return x[:300] / 16, y[:300]


def tasks():
    x, y = digits()
    x_table, y_table = make_regression(220, 6, n_targets=3, random_state=0)
    x_labels, y_labels = make_multilabel_classification(220, 6, n_classes=4, random_state=0)
    return {
        "one output": ("MLPRegressor", x_table, y_table[:, 0] / 50, {}),
        "three outputs": ("MLPRegressor", x_table, y_table / 50, {}),
        "poisson": ("MLPRegressor", x_table, np.round(np.exp(y_table[:, 0] / 200)), {"loss": "poisson", "activation": "tanh"}),
        "binary": ("MLPClassifier", x, np.where(y > 4, "high", "low"), {}),
        "multilabel": ("MLPClassifier", x_labels / 10, y_labels, {}),
    }


def fit_both(name, x, y, weights=None, **parameters):
    parameters = {"hidden_layer_sizes": (9,), "max_iter": 12, "random_state": 0} | parameters
    return [getattr(module, name)(**parameters).fit(x, y, sample_weight=weights) for module in (parafit.sklearn, sklearn.neural_network)]


def assert_same(ours, theirs, *, rtol, atol=1e-12):
    """Same attributes, whole numbers equal, numbers within the tolerance."""
    for name in ("n_iter_", "n_layers_", "n_outputs_", "out_activation_", "t_", "n_features_in_"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in ("loss_", "best_loss_", "best_validation_score_", "loss_curve_", "validation_scores_"):
        assert hasattr(ours, name) == hasattr(theirs, name), name
        expected = getattr(theirs, name, None)
        if expected is None:
            assert getattr(ours, name, None) is None, name
        else:
            np.testing.assert_allclose(getattr(ours, name), expected, rtol=rtol, atol=atol, err_msg=name)
    for ours_part, theirs_part in zip(ours.coefs_ + ours.intercepts_, theirs.coefs_ + theirs.intercepts_, strict=True):
        np.testing.assert_allclose(ours_part, theirs_part, rtol=rtol, atol=max(atol, rtol))


@unconverged
def test_a_loss_too_large_for_its_dtype_leaves_the_weights_finite():
    x, y = np.ones((40, 3), np.float32), np.full(40, 1e20, np.float32)
    with np.errstate(over="ignore"):
        ours = parafit.sklearn.MLPRegressor(hidden_layer_sizes=(4,), random_state=0, max_iter=2).fit(x, y)
    assert ours.loss_ == np.inf
    assert all(np.isfinite(part).all() for part in ours.coefs_ + ours.intercepts_)
