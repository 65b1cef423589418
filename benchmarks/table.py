"""A result of `benchmarks.run` as Markdown tables: `python -m benchmarks.table RESULT.json [--baseline keras-jax]`."""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.contenders import CONTENDERS
from benchmarks.estimators import CASES
from benchmarks.series import Spread, ratios, significant, values
from benchmarks.targets import verdicts

IMPORT_LIMIT_SECONDS = 0.2
ESTIMATOR_RATIO = 3


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables of the result the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description="Print a result as Markdown tables.")
    parser.add_argument("result", type=Path, help="a JSON file written by benchmarks.run")
    parser.add_argument("--baseline", help="the contender that the others' speed is divided by (keras-jax)")
    given = parser.parse_args(arguments)
    document = json.loads(given.result.read_text(encoding="utf-8"))
    known = document["options"]["contenders"]
    if given.baseline is not None and given.baseline not in known:
        parser.error(f"--baseline {given.baseline}: {given.result.name} has {', '.join(known)}")
    print(render(document, given.baseline))


def render(document: dict, baseline: str | None = None) -> str:
    """All tables of `document`; speeds are relative to `baseline`, by default keras-jax if it took part, else the first contender."""
    contenders = document["options"]["contenders"]
    baseline = baseline or ("keras-jax" if "keras-jax" in contenders else contenders[0])
    sections = {
        f"Steady state: how many times as fast as {baseline}": _speeds(document, baseline, "step_seconds", 1e6, "µs a step"),
        f"One call of fit with its fixed costs: how many times as fast as {baseline}": _speeds(
            document, baseline, "call_step_seconds", 1e6, "µs a step"
        ),
        f"Fresh process to the end of its second epoch: how many times as fast as {baseline}": _speeds(
            document, baseline, "fresh_cold.total_seconds", 1, "s"
        ),
        "Start to first step, in seconds": _amounts(document, "fresh_cold.first_step_seconds"),
        "Second start to first step, in seconds": _amounts(document, "fresh_warm.first_step_seconds"),
        "Prediction, in rows a second": _amounts(document, "predict_rows_per_second"),
        "Peak memory, in MB": _matrix(document, contenders, _peak_megabytes),
        "Estimators: seconds of one fit": _estimators(document),
        "Targets": _targets(document),
        "Not measured": _absent(document),
    }
    return "\n\n".join([_surroundings(document), *(f"### {title}\n\n{body}" for title, body in sections.items() if body)])


def _surroundings(document: dict) -> str:
    machine, source = document["machine"], document["source"] or {"commit": "unknown", "dirty": False}
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items() if version)
    options = document["options"]
    return (
        f"{document['date'][:10]}, {machine['processor']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB, "
        f"{machine['system']}, load {machine['load_at_start']:.1f} before the run; {versions}; "
        f"source {source['commit'][:10]}{' with changes' if source['dirty'] else ''}; "
        f"{options['rounds']} alternating rounds in warm processes, {options['fresh_rounds']} in fresh ones"
        f"{', quick' if options['quick'] else ''}, {document['duration_seconds'] / 60:.0f} minutes in all. "
        "Cells: median [quartiles]; ratios are taken round by round."
    )


def _speeds(document: dict, baseline: str, measure: str, scale: float, unit: str) -> str:
    """The baseline's own medians, then every contender's speed as a multiple of the baseline's."""
    own = _row(f"{baseline}, {unit}", (_median(workload, baseline, measure, scale) for workload in document["workloads"].values()))

    def speed(workload, contender):
        series = ratios(values(workload, baseline, measure), values(workload, contender, measure))
        return str(Spread.of(series)) if series else None

    return _matrix(document, [name for name in document["options"]["contenders"] if name != baseline], speed, own)


def _amounts(document: dict, measure: str) -> str:
    def amount(workload, contender):
        series = values(workload, contender, measure)
        return str(Spread.of(series)) if series else None

    return _matrix(document, document["options"]["contenders"], amount)


def _peak_megabytes(workload: dict, contender: str) -> str | None:
    peak = workload["contenders"].get(contender, {}).get("peak_bytes")
    return None if peak is None else f"{peak / 1e6:,.0f}"


def _median(workload: dict, contender: str, measure: str, scale: float) -> str:
    series = values(workload, contender, measure)
    return significant(Spread.of(series).median * scale) if series else "–"


def _matrix(document: dict, contenders: Iterable[str], cell: Callable[[dict, str], str | None], *above: str) -> str:
    """A row for each of `contenders` who has a cell that is not None, a column for each workload; "" if there is no row."""
    workloads = document["workloads"]
    head = _row("", (f"{name}<br>{workload['title']}, b{workload['batch_size']}" for name, workload in workloads.items()))
    rows = []
    for contender in contenders:
        cells = [cell(workload, contender) for workload in workloads.values()]
        if any(cells):
            rows.append(_row(CONTENDERS[contender].what, (text or "–" for text in cells)))
    return _table(head, [*above, *rows] if rows else [])


def _estimators(document: dict) -> str:
    head = ("first fit", "fit", "accuracy", "parafit's speed / this", f"wanted ≥ {ESTIMATOR_RATIO:g}")
    rows = []
    for case, results in document["estimators"].items():
        for library, result in results.items():
            own = results["parafit"]["fit_seconds"]
            ratio = Spread.of(ratios(result["fit_seconds"], own))
            reached = "" if library == "parafit" else "yes" if ratio.median >= ESTIMATOR_RATIO else "no"
            fit, first = str(Spread.of(result["fit_seconds"])), significant(result["first_fit_seconds"])
            rows.append(_row(f"{library}, {CASES[case].title}", (first, fit, f"{result['accuracy']:.4f}", str(ratio), reached)))
    return _table(_row("MLPClassifier", head), rows)


def _targets(document: dict) -> str:
    rows = []
    for verdict in verdicts(document):
        cells = (verdict.workload, f"≥ {verdict.target.at_least:g}", str(verdict.measured or "–"), verdict.word)
        rows.append(_row(verdict.target.what, cells))
    if document["import"]:
        added = Spread.of(document["import"]["parafit_seconds"])
        reached = "yes" if added.median < IMPORT_LIMIT_SECONDS else "no"
        rows.append(_row("import, seconds beyond Keras and JAX", ("–", f"< {IMPORT_LIMIT_SECONDS}", str(added), reached)))
    return _table(_row("parafit against", ("workload", "wanted", "measured", "reached")), rows)


def _absent(document: dict) -> str:
    """Who has no numbers where, and why."""
    reasons: dict[str, list[str]] = {}
    for workload, record in document["workloads"].items():
        for contender, result in record["contenders"].items():
            for word in ("skipped", "failed"):
                if result.get(word):
                    reasons.setdefault(f"{contender} {word}: {result[word]}", []).append(workload)
    return "\n".join(f"- {reason} ({', '.join(workloads)})" for reason, workloads in reasons.items())


def _table(head: str, rows: list[str]) -> str:
    """A Markdown table, every column but the first set to the right; "" without rows."""
    return "\n".join([head, "| --- |" + " ---: |" * (head.count(" | ")), *rows]) if rows else ""


def _row(first: str, cells: Iterable[str]) -> str:
    return "| " + " | ".join((first, *cells)) + " |"


if __name__ == "__main__":
    main()
