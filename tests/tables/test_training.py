"""Training on tables and predicting: tasks, networks, the folder, the split, and what stops a run."""

import dataclasses
import json
import os
import re
import shutil

import keras
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from sklearn import metrics

from parafit import Plan, api, planning, tables
from parafit.errors import DataError, ModelError, NonFiniteLossError, OutputError, PlanError
from parafit.tables import model_folder, networks
from parafit.tables.networks import choose_settings
from parafit.tables.scores import score
from parafit.tables.target import Classes, Quantity
from parafit.tables.training import split_rows

ROWS = 120
PART_ROWS = 1 << 16
"""Rows of few columns that are predicted at once."""


def flowers(rows=ROWS, seed=0):
    random = np.random.default_rng(seed)
    species = random.choice(["iris", "rose"], rows)
    return pl.DataFrame(
        {
            "length": np.where(species == "iris", 1.0, 4.0) + random.normal(size=rows) * 0.3,
            "colour": np.where(species == "iris", "blue", random.choice(["red", "blue"], rows)),
            "species": species,
        }
    )


def houses(rows=ROWS, seed=0):
    random = np.random.default_rng(seed)
    size = random.uniform(50, 200, rows)
    return pl.DataFrame({"size": size, "noise": random.normal(size=rows), "price": 1e4 + 2e3 * size + random.normal(size=rows) * 1e3})


def train(table=None, target="species", **options):
    return tables.train(flowers() if table is None else table, target=target, **{"epochs": 30, "verbose": False, **options})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trained model and the folder it left."""
    place = tmp_path_factory.mktemp("tables") / "flowers"
    return train(out=place), place


def test_classification_learns(trained):
    result, _ = trained
    assert result.preparation.target.labels == ("iris", "rose")
    assert result.scores["test"]["accuracy"] > 0.9
    assert [part["rows"] for part in result.scores.values()] == [82, 14, 24]
    assert np.sum(result.scores["test"]["confusion"]) == 24
    assert result.stopped is None


def test_regression_learns_and_scores_in_the_targets_units():
    result = train(houses(), "price", epochs=100)
    test = result.scores["test"]
    assert result.preparation.target.task == "regression"
    assert test["r2"] > 0.9
    assert 100 < test["mean_absolute_error"] < 30_000
    predictions = tables.predict(result, houses(seed=1))["prediction"]
    assert metrics.r2_score(houses(seed=1)["price"], predictions) > 0.9


def test_the_same_seed_gives_the_same_model_and_another_does_not():
    first, again, other = (train(epochs=2, seed=seed) for seed in (3, 3, 4))
    assert first.history == again.history
    assert first.history != other.history


def test_the_plan_does_not_change_the_numbers():
    single, spread = (train(epochs=3, plan=plan) for plan in ("single", "data=2"))
    assert spread.plan.short() == "data=2"
    np.testing.assert_allclose(single.history["loss"], spread.history["loss"], rtol=1e-4)


def test_predictions_in_the_kind_of_frame_that_came(trained):
    result, place = trained
    new = flowers(50, seed=1)
    frame = tables.predict(result, new)
    assert frame.columns == ["prediction", "probability_iris", "probability_rose"]
    np.testing.assert_allclose(frame["probability_iris"] + frame["probability_rose"], 1, rtol=1e-6)
    assert (frame["prediction"] == new["species"]).mean() > 0.9
    assert frame.equals(tables.predict(place, new))
    for convert, kind in ((pl.DataFrame.to_pandas, pd.DataFrame), (pl.DataFrame.to_arrow, pa.Table)):
        other = tables.predict(result, convert(new))
        assert isinstance(other, kind)
        np.testing.assert_allclose(other["probability_iris"], frame["probability_iris"], rtol=1e-6)


def test_predictions_for_no_rows(trained):
    assert tables.predict(trained[0], flowers().clear()).shape == (0, 3)


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".csv.gz", ".parquet", ".arrow", ".feather"])
def test_files_are_predicted_in_parts_in_order(trained, tmp_path, ending):
    new = flowers(PART_ROWS + 75, seed=2)
    new.write_csv(tmp_path / "new.csv")
    out = tmp_path / f"out{ending}"
    notes = tables.predict_file(trained[1], tmp_path / "new.csv", out)
    read = {".csv": pl.read_csv, ".tsv": lambda path: pl.read_csv(path, separator="\t"), ".parquet": pl.read_parquet}
    written = read.get(ending.removesuffix(".gz"), pl.read_ipc)(out.read_bytes())
    assert notes.rows == len(new)
    assert written["prediction"].to_list() == tables.predict(trained[0], new)["prediction"].to_list()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.csv", out.name]


def test_what_prediction_notes(trained, tmp_path):
    pl.DataFrame({"length": [1.0, None, 4.0], "colour": ["green", "blue", "pink"], "weight": [1, 2, 3]}).write_csv(tmp_path / "new.csv")
    words = tables.predict_file(trained[1], tmp_path / "new.csv", tmp_path / "out.csv").words()
    assert words == [
        "column colour: rows with a category that training had not, taken as missing: 2",
        "column length: rows without a value, though training had none: 1",
        "columns not used, as training had none of that name: weight",
    ]


def test_a_failed_prediction_leaves_the_old_file(trained, tmp_path):
    (tmp_path / "new.csv").write_text("length,colour\n1.0,red\nlong,blue\n")
    (tmp_path / "out.csv").write_text("old")
    with pytest.raises(DataError, match="column 'length' holds 'long' in line 3"):
        tables.predict_file(trained[1], tmp_path / "new.csv", tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.csv", "out.csv"]


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        ("", OutputError, "is a folder: expected the name of a file"),
        ("nowhere/out.csv", OutputError, "cannot write .*nowhere/out.csv.*No such file"),
        ("out.txt", DataError, "cannot tell the format"),
    ],
)
def test_prediction_files_that_cannot_be_written(trained, tmp_path, out, error, message):
    place = tmp_path / out if out else tmp_path / "folder.csv"
    if not out:
        place.mkdir()
    with pytest.raises(error, match=message):
        tables.predict_file(trained[1], tmp_path / "never read.csv", place)


def test_the_folder(trained):
    _, place = trained
    assert sorted(path.name for path in place.iterdir()) == sorted(model_folder.FILES)
    assert [path.name for path in place.parent.iterdir()] == ["flowers"]
    history = json.loads((place / "history.json").read_text())
    assert history["stopped"] is None
    assert history["epochs"] == trained[0].history
    scores = json.loads((place / "scores.json").read_text())
    assert scores == trained[0].scores
    report = (place / "report.html").read_text()
    assert "Confusion matrix" in report
    assert report.count("<svg") == 3


def test_the_report_counts_unseen_categories_and_names_dropped_columns(tmp_path):
    table = flowers()
    rows = split_rows(table["species"].rank("dense").to_numpy(), seed=0)
    colour = table["colour"].to_list()
    colour[rows.test[0]] = colour[rows.validation[0]] = "seen only there"
    train(table.with_columns(colour=pl.Series(colour), row=pl.int_range(ROWS)), epochs=1, out=tmp_path / "a")
    report = (tmp_path / "a" / "report.html").read_text()
    assert re.search(r'<td>colour</td><td>category</td>(<td class="number">\d+</td>){2}<td class="number">2</td>', report)
    assert re.search(r"<td>row</td><td>dropped</td>.*it numbers the rows", report)


def written(values, comma):
    return [f"{value:,.2f} €".translate(str.maketrans(",.", ".,")) if comma else f"{value}" for value in values]


def test_a_file_as_people_write_it(tmp_path):
    """Decimal commas, units, a bad cell, a missing target, another encoding; the folder reads new files alike."""
    table = houses()
    size, price = written(table["size"], True), written(table["price"], True)
    size[3], price[5], price[7] = "abc", "", "soon"
    lines = [f"{a};{b};{c}" for a, b, c in zip(size, written(table["noise"], False), price)]
    (tmp_path / "t.csv").write_text("\n".join(["size;noise;price", *lines]) + "\n", encoding="cp1252")
    result = train(tmp_path / "t.csv", "price", epochs=100, out=tmp_path / "a")
    assert result.notes == (
        "read as cp1252, as it is not UTF-8",
        "column price: cells that cannot be read, taken as missing: 'soon' in line 9",
        "rows without a target, left out: 2",
        "column size: cells that cannot be read, taken as missing: 'abc' in line 5",
    )
    assert result.scores["test"]["r2"] > 0.9
    assert sum(part["rows"] for part in result.scores.values()) == ROWS - 2
    report = (tmp_path / "a" / "report.html").read_text()
    for words in (*result.notes, "decimal comma, groups of digits parted by &#x27;.&#x27;, unit &#x27;€&#x27;"):
        assert words.replace("'", "&#x27;") in report
    again = model_folder.read_folder(tmp_path / "a")
    assert (again.notes, again.preparation) == (result.notes, result.preparation)
    new = houses(seed=1)
    texts = new.select(size=pl.Series(written(new["size"], True)), noise=pl.Series(written(new["noise"], False)))
    rounded = new.select(pl.col("size").round(2), "noise")
    np.testing.assert_allclose(tables.predict(again, texts)["prediction"], tables.predict(result, rounded)["prediction"])


def test_what_was_read_is_printed(capsys):
    train(pl.DataFrame({"x": ["1,5", "2,25"] * 10, "y": ["a", "b"] * 10}), "y", epochs=1, verbose=True)
    assert "note     column x: read with decimal comma" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("labels", "predicted"),
    [(("01", "1"), pl.String), (("12345678901234567", "12345678901234568"), pl.String), ((2**60, 2**60 + 1), pl.Int64)],
)
def test_codes_as_target_come_back_as_they_were(tmp_path, labels, predicted):
    species = pl.Series("code", [labels[species == "iris"] for species in flowers()["species"]])
    table = flowers().drop("species").with_columns(species)
    result = train(table, "code", out=tmp_path / "a", epochs=20)
    answers = tables.predict(model_folder.read_folder(tmp_path / "a"), table)["prediction"]
    assert (answers.dtype, set(answers)) == (predicted, set(labels))
    assert (answers == table["code"]).mean() > 0.9
    assert result.scores["test"]["accuracy"] > 0.9


def test_every_row_in_gives_a_row_out(trained, tmp_path):
    (tmp_path / "new.csv").write_text("length,colour\n1.0,blue\n,\n\n4.0,red\nlength,colour\n1.0,blue\n")
    notes = tables.predict_file(trained[1], tmp_path / "new.csv", tmp_path / "out.csv")
    assert notes.rows == pl.read_csv(tmp_path / "out.csv").height == 4
    assert notes.words()[:2] == ["blank lines left out: 1", "repeated header lines left out: 1"]


def test_every_line_of_one_column_gives_a_row_out(tmp_path):
    result = train(flowers().select("length", "species"), epochs=1)
    (tmp_path / "new.csv").write_text("length\n1.0\n\n4.0\n")
    assert tables.predict_file(result, tmp_path / "new.csv", tmp_path / "out.csv").rows == 3


@pytest.mark.parametrize("way", ["itself", "link"])
def test_predictions_do_not_replace_their_table(trained, tmp_path, way):
    table = tmp_path / "t.csv"
    table.write_text("length,colour\n1.0,blue\n")
    out = table if way == "itself" else tmp_path / "link.csv"
    if way == "link":
        out.symlink_to(table)
    with pytest.raises(OutputError, match=r"would replace .*, the table they are made from: choose another name"):
        tables.predict_file(trained[1], table, out)
    assert table.read_text() == "length,colour\n1.0,blue\n"


def test_bad_cells_are_judged_over_the_whole_file(trained, tmp_path):
    lines = ["1.0,blue"] * PART_ROWS + ["abc,blue"] * 3 + ["1.0,red"] * 5
    (tmp_path / "new.csv").write_text("\n".join(["length,colour", *lines]) + "\n")
    notes = tables.predict_file(trained[1], tmp_path / "new.csv", tmp_path / "out.csv")
    shown = ", ".join(f"'abc' in line {PART_ROWS + line}" for line in (2, 3, 4))
    assert notes.words()[0] == f"column length: cells that cannot be read, taken as missing: {shown}"


def test_an_excel_file_is_learnt_and_predicted(tmp_path):
    pytest.importorskip("fastexcel", reason="fastexcel reads Excel files")
    openpyxl = pytest.importorskip("openpyxl", reason="openpyxl writes the test's Excel file")
    book = openpyxl.Workbook()
    for row in (flowers().columns, *flowers().rows()):
        book.active.append(row)
    book.save(tmp_path / "t.xlsx")
    result = train(tmp_path / "t.xlsx")
    assert result.scores["test"]["accuracy"] > 0.9
    assert tables.predict_file(result, tmp_path / "t.xlsx", tmp_path / "out.csv").rows == ROWS


def test_a_boolean_target_comes_back_boolean():
    table = flowers().with_columns(wild=pl.col("species") == "iris").drop("species")
    result = train(table, "wild")
    assert result.scores["test"]["accuracy"] > 0.9
    assert tables.predict(result, table)["prediction"].dtype == pl.Boolean


def test_a_folder_reads_back(trained):
    result, place = trained
    again = model_folder.read_folder(place)
    assert (again.preparation, again.plan, again.scores, again.history) == (result.preparation, result.plan, result.scores, result.history)


def test_a_second_run_replaces_its_own_folder_by_force(tmp_path):
    train(epochs=1, out=tmp_path / "deep" / "a")
    train(epochs=2, out=tmp_path / "deep" / "a", force=True)
    assert len(model_folder.read_folder(tmp_path / "deep" / "a").history["loss"]) == 2
    assert os.listdir(tmp_path / "deep") == ["a"]


def test_a_model_is_kept_unless_forced(trained, monkeypatch):
    monkeypatch.setattr(api, "fit", never)
    with pytest.raises(OutputError, match=r"holds a model already: choose another folder, or replace it with --force"):
        train(out=trained[1])


def test_a_model_that_came_during_training_is_kept(tmp_path):
    result = train(epochs=1, out=tmp_path / "a")
    before = (tmp_path / "a" / "model.keras").read_bytes()
    assert model_folder.write_folder(tmp_path / "a", result, "second") == tmp_path / "a-2"
    assert (tmp_path / "a" / "model.keras").read_bytes() == before
    assert (tmp_path / "a-2" / "report.html").read_text() == "second"


class FullDisk(Plan):
    def to_json(self):
        raise OSError("no space left")


def test_a_failed_write_keeps_the_old_folder(tmp_path):
    result = dataclasses.replace(train(epochs=1, out=tmp_path / "a"), plan=FullDisk())
    with pytest.raises(OutputError, match=r"no space left.*Nothing was replaced"):
        model_folder.write_folder(tmp_path / "a", result, "new", force=True)
    assert "Confusion" in (tmp_path / "a" / "report.html").read_text()
    assert os.listdir(tmp_path) == ["a"]


def never(*_, **__):
    raise AssertionError("training began")


@pytest.mark.parametrize("obstacle", ["file", "foreign file inside", "below a file"])
def test_an_unwritable_folder_is_found_before_training(tmp_path, monkeypatch, obstacle):
    monkeypatch.setattr(api, "fit", never)
    place = tmp_path / "a"
    if obstacle == "foreign file inside":
        place.mkdir()
        (place / "thesis.txt").write_text("years of work")
    else:
        place.write_text("x")
    with pytest.raises(OutputError, match=r"is a file: expected|holds 'thesis.txt', which parafit did not write|cannot write to"):
        train(out=place / "b" if obstacle == "below a file" else place)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": "specie"}, DataError, r"no column 'specie'; it has 'length', 'colour', 'species'. Did you mean 'species'\?"),
        ({"table": flowers(10)}, DataError, "DataFrame has 10 rows: expected at least 20"),
        ({"table": flowers().clear()}, DataError, "has 0 rows"),
        ({"table": flowers().with_columns(species=pl.lit("iris"))}, DataError, "nothing to learn with one class"),
        ({"table": pl.DataFrame({"x": range(20), "species": [str(n // 2) + "c" for n in range(20)]})}, DataError, "too few to test on"),
        ({"plan": "data=99"}, PlanError, "99"),
        ({"plan": "sideways=2"}, PlanError, "unknown axis 'sideways'"),
        ({"model": "net.h5"}, ModelError, "there is no file 'net.h5'"),
    ],
)
def test_what_training_refuses(options, error, message):
    with pytest.raises(error, match=message):
        train(**options)


def test_not_a_folder_of_parafit(tmp_path):
    with pytest.raises(DataError, match=r"there is no folder .*expected a folder that `parafit train` wrote"):
        tables.predict(tmp_path / "nothing", flowers())
    with pytest.raises(DataError, match=r"there is no model.keras in"):
        tables.predict(tmp_path, flowers())


def test_a_damaged_model(tmp_path):
    train(epochs=1, out=tmp_path / "a")
    (tmp_path / "a" / "model.keras").write_text("x")
    with pytest.raises(ModelError, match="cannot load a network from"):
        tables.predict(tmp_path / "a", flowers())


DAMAGE = {
    "cut off": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "turned": lambda content: content[:-20] + bytes(reversed(content[-20:])),
}


@pytest.mark.parametrize("name", [name for name in model_folder.FILES if name != "report.html"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_of_a_folder(trained, tmp_path, name, damage):
    place = shutil.copytree(trained[1], tmp_path / "a")
    content = (place / name).read_bytes()
    (place / name).write_bytes(DAMAGE[damage](content))
    with pytest.raises((DataError, ModelError), match=f"{name}.*([Cc]opy|another run|cannot load)"):
        tables.predict(place, flowers())


def test_a_folder_of_two_runs(trained, tmp_path):
    train(epochs=1, seed=5, out=tmp_path / "b")
    for name in ("model.keras", "preprocessing.json"):
        place = shutil.copytree(trained[1], tmp_path / name)
        shutil.copy(tmp_path / "b" / name, place / name)
        with pytest.raises(DataError, match=f"{name} is not what training wrote there: .*from another run.*Copy the whole folder"):
            tables.predict(place, flowers())


def test_auto_asks_the_planner(monkeypatch):
    asked = []

    def best(plan, step, program, **_):
        if plan is None:
            asked.append(step.name)
        return plan or Plan.parse("data=2")

    monkeypatch.setattr(planning, "plan_for", best)
    assert train(epochs=1).plan == Plan.parse("data=2")
    assert asked == ["train"]
    assert train(epochs=1, plan="single").plan == Plan()
    assert asked == ["train"]


@pytest.mark.parametrize("finished", [0, 5])
def test_ctrl_c_keeps_the_best_weights_and_the_history(tmp_path, monkeypatch, finished):
    real = api.fit

    class PressCtrlC(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == finished:
                raise KeyboardInterrupt

    def fit(*arguments, callbacks, **rest):
        callbacks.callbacks.append(PressCtrlC())
        return real(*arguments, callbacks=callbacks, **rest)

    monkeypatch.setattr(api, "fit", fit)
    result = train(epochs=1000, out=tmp_path / "a")
    again = model_folder.read_folder(tmp_path / "a")
    assert result.stopped == again.stopped == "interrupted by Ctrl-C"
    assert len(again.history.get("loss", [])) == finished
    assert "interrupted by Ctrl-C" in (tmp_path / "a" / "report.html").read_text()
    assert (again.scores["test"]["accuracy"] > 0.8) == (finished > 0)


def model_file(path, body):
    path.write_text("import keras\n\n\ndef build_model(input_shape, output_size):\n    " + body + "\n")
    return path


def test_a_loss_that_becomes_nan(tmp_path):
    body = (
        "huge = keras.initializers.Constant(1e30)\n"
        "    model = keras.Sequential([keras.Input(input_shape), keras.layers.Dense(output_size, kernel_initializer=huge)])\n"
        "    model.compile(keras.optimizers.SGD(1e30), 'mse')\n"
        "    return model"
    )
    with pytest.raises(NonFiniteLossError, match="the loss became"):
        train(houses(), "price", model=model_file(tmp_path / "net.py", body), out=tmp_path / "a")
    assert "the loss became" in json.loads((tmp_path / "a" / "history.json").read_text())["stopped"]


SOFTMAX = "keras.layers.Dense(output_size, 'softmax')"
SCORES = "keras.layers.Dense(output_size)"


@pytest.mark.parametrize("last", [SOFTMAX, SCORES, f"{SCORES}, keras.layers.Softmax()"])
@pytest.mark.parametrize("loss", [None, "sparse_categorical_crossentropy", "categorical_crossentropy"])
def test_a_network_of_ones_own(tmp_path, last, loss):
    if loss and "oftmax" not in last:
        loss = (
            f"keras.losses.get({{'class_name': '{''.join(part.title() for part in loss.split('_'))}', 'config': {{'from_logits': True}}}})"
        )
    elif loss:
        loss = repr(loss)
    body = f"model = keras.Sequential([keras.Input(input_shape), {last}])\n"
    body += f"    model.compile('adam', {loss})\n" if loss else ""
    result = train(model=model_file(tmp_path / "net.py", body + "    return model"), out=tmp_path / "a", epochs=20)
    probabilities = tables.predict(tmp_path / "a", flowers())["probability_iris"]
    assert result.history["loss"][-1] < result.history["loss"][0]
    assert probabilities.min() >= 0
    assert probabilities.max() <= 1


def test_a_sequential_model_without_an_input_shape(tmp_path):
    body = "return keras.Sequential([keras.layers.Dense(output_size)])"
    assert train(model=model_file(tmp_path / "net.py", body), epochs=1).model.input_shape == (None, 3)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_keras_file(tmp_path, compiled):
    net = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, "softmax", name="mine")])
    if compiled:
        net.compile(keras.optimizers.SGD(0.5), "sparse_categorical_crossentropy")
    net.save(tmp_path / "net.keras")
    result = train(model=tmp_path / "net.keras", epochs=5)
    assert result.model.layers[-1].name == "mine"
    assert isinstance(result.model.optimizer, keras.optimizers.SGD if compiled else keras.optimizers.AdamW)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 1", "gave int: expected a Keras model"),
        ("return keras.Sequential([keras.layers.Flat()])", r"failed in line 5: AttributeError"),
        (
            "x = keras.Input(input_shape); return keras.Model(x, [keras.layers.Dense(output_size)(x), keras.layers.Dense(1)(x)])",
            "has 1 inputs and 2 outputs: a table needs one of each",
        ),
        (
            "return keras.Sequential([keras.Input((7,)), keras.layers.Dense(2)])",
            r"maps \(None, 7\) to \(None, 2\), but this table needs \(None, 3\)",
        ),
        ("return keras.Sequential([keras.Input(input_shape), keras.layers.Dense(1)])", r"to \(None, 1\).*'species' is 2 classes"),
        (
            "return keras.Sequential([keras.Input(input_shape), keras.layers.Dense(2, 'sigmoid')])",
            "ends with sigmoid: for 2 classes end with softmax",
        ),
        (
            "return keras.Sequential([keras.Input(input_shape), keras.layers.Lambda(lambda x: x[:, :2])])",
            "uses Lambda, which a saved folder could not",
        ),
    ],
)
def test_networks_that_do_not_fit(tmp_path, body, message):
    with pytest.raises(ModelError, match=message):
        train(model=model_file(tmp_path / "net.py", body))


def test_model_files_that_are_none(tmp_path):
    for name, content, message in (
        ("net.txt", "", "expected a .keras file, or a .py file"),
        ("empty.py", "", "has no attribute 'build_model'"),
        ("wrong.py", "x = (", "failed.*SyntaxError"),
        ("net.keras", "x", "cannot load a network from"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ModelError, match=message):
            train(model=tmp_path / name)


def test_the_split_is_stratified_disjoint_and_complete():
    classes = np.repeat([0, 1, 2], [100, 50, 10])
    split = split_rows(classes, seed=0)
    assert np.sort(np.concatenate([split.train, split.validation, split.test])).tolist() == list(range(160))
    assert np.bincount(classes[split.test]).tolist() == [20, 10, 2]
    assert np.bincount(classes[split.validation]).tolist() == [12, 6, 1]
    assert split_rows(classes, seed=1).test.tolist() != split.test.tolist()


def test_settings_follow_the_size():
    small, large = choose_settings(100, "classification"), choose_settings(1_000_000, "classification")
    assert small.widths < large.widths
    assert small.batch_size < large.batch_size
    assert small.epochs > large.epochs >= 15
    assert choose_settings(100, "regression", epochs=7, batch_size=9).epochs == 7


def test_class_scores_are_scikit_learns(rng):
    codes, probabilities = rng.integers(3, size=200), rng.dirichlet([1, 1, 1], size=200)
    ours = score(Classes(name="y", labels=("a", "b", "c"), values="text", reason=""), codes, probabilities)
    chosen = probabilities.argmax(axis=1)
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(codes, chosen, average="macro")
    assert ours["loss"] == pytest.approx(metrics.log_loss(codes, probabilities))
    assert ours["accuracy"] == metrics.accuracy_score(codes, chosen)
    assert [ours["precision"], ours["recall"], ours["f1"]] == pytest.approx([precision, recall, f1])
    assert ours["confusion"] == metrics.confusion_matrix(codes, chosen).tolist()
    assert ours["classes"][1]["rows"] == (codes == 1).sum()


def test_quantity_scores_are_scikit_learns(rng):
    truth, predicted = rng.normal(size=(50, 1)), rng.normal(size=(50, 1))
    ours = score(Quantity(name="y", mean=5.0, scale=3.0, reason=""), truth, predicted)
    assert ours["mean_absolute_error"] == pytest.approx(metrics.mean_absolute_error(3 * truth, 3 * predicted))
    assert ours["root_mean_squared_error"] == pytest.approx(metrics.root_mean_squared_error(3 * truth, 3 * predicted))
    assert ours["r2"] == pytest.approx(metrics.r2_score(truth, predicted))


def test_labels_as_the_loss_wants_them():
    classes = Classes(name="y", labels=("a", "b"), values="text", reason="")
    net = keras.Sequential([keras.Input((1,)), keras.layers.Dense(2, "softmax")])
    for loss, shape in (("sparse_categorical_crossentropy", (3,)), (keras.losses.CategoricalCrossentropy(), (3, 2))):
        net.compile(loss=loss)
        assert networks.encode_labels(net, classes, np.array([0, 1, 0])).shape == shape


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 3])
def test_digits_reach_97_percent(seed):
    assert train("examples/data/digits.csv.gz", "digit", seed=seed, epochs=None).scores["test"]["accuracy"] >= 0.97
