"""Prices against published measurements: a few rows of each table, and the bounds that held for them when they were written.

The whole tables are scored by `python -m benchmarks.published`; these rows (facts, each with its source) keep the model honest where the
tables are not at hand. Bounds are wider than what was measured (median 4 %), so that a better constant does not break them.
"""

import csv
import statistics
from pathlib import Path

import pytest

from benchmarks import published
from benchmarks.published_doubts import doubts
from benchmarks.published_tables import TABLES, SkippedError, price_of

ROWS = list(csv.DictReader((Path(__file__).parent / "published_rows.csv").read_text(encoding="utf-8").splitlines()))


@pytest.fixture(scope="module")
def scored():
    cases = [TABLES[row["table"]](row) for row in ROWS]
    return [published.Scored(case=case, cost=price_of(case)) for case in cases]


def test_step_times_agree_in_the_middle_and_at_the_worst(scored):
    errors = sorted(abs(one.error) for one in scored if one.case.fits)
    assert len(errors) >= 18
    assert statistics.median(errors) < 0.10
    assert errors[-1] < 0.30


def test_errors_have_no_side(scored):
    assert abs(statistics.median(one.error for one in scored if one.case.fits)) < 0.08


def test_what_fitted_fits_and_what_did_not_does_not(scored):
    wrong = [one.case.label for one in scored if one.fits != one.case.fits]
    assert wrong == []


def test_faster_published_rows_are_predicted_faster(scored):
    rates = [(one.case.shape.batch / one.cost.seconds, one.case.shape.batch / one.case.seconds) for one in scored if one.case.fits]
    assert published.spearman([rate for rate, _ in rates], [rate for _, rate in rates]) > 0.97


def test_heads_that_tensor_cores_cannot_load_are_slow(scored):
    """BigScience: 78 layers of 13824 took 163 s with 128 heads (of 108) where 72 of 14336 took 110 s."""
    slow, quick = (next(one for one in scored if f"{layers}x" in one.case.label) for layers in (78, 72))
    assert slow.cost.seconds > 1.2 * quick.cost.seconds


def test_the_command_scores_a_folder(tmp_path, capsys):
    rows = [row for row in ROWS if row["table"] == "ultrascale_playbook_h100"]
    with (tmp_path / "ultrascale_playbook_h100.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows([*rows, rows[0] | {"tokens_per_s_per_gpu": "10000"}, rows[0] | {"note": "SUSPECT"}])
    assert published.main(["--tables", str(tmp_path), "--out", str(tmp_path / "out.json")]) == 0
    printed = capsys.readouterr().out
    assert "marked SUSPECT" in printed
    assert "more than 1.5 times as fast" in printed
    assert "ultra-scale 1B" in printed
    assert (tmp_path / "out.json").stat().st_size > 1000


def test_the_command_says_where_the_tables_should_be(tmp_path, capsys):
    assert published.main(["--tables", str(tmp_path / "nowhere")]) == 2
    assert "--tables FOLDER" in capsys.readouterr().err


def test_what_the_software_refuses_is_no_matter_of_memory():
    row = next(row for row in ROWS if row["table"] == "ultrascale_playbook_h100" and row["model"].endswith("1B") and row["pp"] == "4")
    for change, reason in (
        ({"pp": "16", "dp": "8", "micro_batch": "4"}, "fewer microbatches than stages"),
        ({"pp": "16"}, "leaves stages empty"),
    ):
        with pytest.raises(SkippedError, match=reason):
            TABLES["ultrascale_playbook_h100"](row | {"gpus": "128", "tp": "1"} | change)


def test_rows_that_others_contradict_are_not_scored():
    row = next(row for row in ROWS if row["table"] == "ultrascale_playbook_h100" and row["pp"] == "1" and row["status"] == "ok")
    rate, crashed = float(row["tokens_per_s_per_gpu"]), row | {"tokens_per_s_per_gpu": "", "status": "crashed_or_oom"}
    larger = row | {"micro_batch": str(2 * int(row["micro_batch"]))}
    doubt = doubts([row, crashed, larger])
    assert doubt(row) == doubt(larger) == ""
    assert "no less memory ran" in doubt(crashed)
    largest = {"micro_batch": str(4 * int(row["micro_batch"]))}
    assert doubt(crashed | largest) == "", "nothing as large ran"
    slow = row | largest | {"tokens_per_s_per_gpu": str(rate / 2)}
    assert "smaller microbatches" in doubt(slow)
    assert doubt(slow | {"dp": "1024"}) == "", "more replicas exchange more"
    assert "a repeat" in doubt(row | {"tokens_per_s_per_gpu": str(rate / 2)})


def test_rows_that_cannot_be_used_say_why():
    with pytest.raises(SkippedError, match="fp8"):
        TABLES["llm_foundry_mpt"](next(row for row in ROWS if row["table"] == "llm_foundry_mpt") | {"precision": "amp_fp8"})
