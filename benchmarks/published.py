"""Scores `price` on published training measurements: `python -m benchmarks.published [--tables FOLDER] [--out JSON]`.

Each row of a table becomes a program, a plan and a machine by facts that its source states (`published_tables`). What was read from
such rows is listed in docs/cost.md: one number a device, the share of its peak that products sustain in training, and three of EFA and
nanotron. Compared are seconds of a step (or tokens per second turned into them), whether the plan fits into memory, the order of the plans
of one sweep (same model, same devices), and how good the plan is that would have been chosen from it.
"""

import argparse
import csv
import json
import math
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.published_doubts import doubts
from benchmarks.published_tables import TABLES, Case, Row, SkippedError, price_of
from parafit.planner.cost.cost import Cost

DEFAULT_TABLES = (Path(__file__).parents[1] / "published", Path(__file__).parents[2] / "shared" / "published")


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A case and its price."""

    case: Case
    cost: Cost

    @property
    def error(self) -> float:
        """Predicted over measured seconds, less one."""
        return self.cost.seconds / self.case.seconds - 1

    @property
    def fits(self) -> bool:
        """Whether the plan is predicted to fit."""
        return self.cost.peak_bytes <= self.case.machine.device.memory_bytes


def main(arguments: list[str] | None = None) -> int:
    """Score all tables of a folder and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], prog="python -m benchmarks.published")
    parser.add_argument("--tables", type=Path, help="folder with the CSV tables")
    parser.add_argument("--out", type=Path, help="write every row's prediction here as JSON")
    options = parser.parse_args(arguments)
    folder = options.tables or next((folder for folder in DEFAULT_TABLES if folder.is_dir()), None)
    if folder is None or not folder.is_dir():
        print(f"no tables in {folder or DEFAULT_TABLES[0]}: give their folder with --tables FOLDER", file=sys.stderr)
        return 2
    results = {name: score(folder / f"{name}.csv", read) for name, read in TABLES.items() if (folder / f"{name}.csv").is_file()}
    for name, (scored, skipped) in results.items():
        print(report(name, scored, skipped))
    if options.out:
        options.out.write_text(json.dumps({name: [_entry(one) for one in scored] for name, (scored, _) in results.items()}, indent=1))
    return 0


def score(path: Path, read: Callable[[Row], Case]) -> tuple[list[Scored], Counter]:
    """Every usable row of a table with its price, and how many rows were not used, by reason."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    scored, skipped, doubt = [], Counter(), doubts(rows)
    for row in rows:
        try:
            if reason := doubt(row):
                raise SkippedError(reason)
            case = read(row)
        except SkippedError as reason:
            skipped[str(reason)] += 1
        else:
            scored.append(price_case(case))
    return scored, skipped


def price_case(case: Case) -> Scored:
    """The price of a case."""
    return Scored(case=case, cost=price_of(case))


def report(name: str, scored: list[Scored], skipped: Counter) -> str:
    """What a table says about the prices."""
    lines = [f"\n{name}: {len(scored)} rows used, {skipped.total()} not"]
    lines += [f"  not used: {count:4} {reason}" for reason, count in skipped.most_common()]
    for table in sorted({one.case.table for one in scored}):
        lines.append(_line(table, [one for one in scored if one.case.table == table]))
    return "\n".join(lines)


def _line(table: str, scored: list[Scored]) -> str:
    timed = [one for one in scored if one.case.seconds]
    errors = sorted(abs(one.error) for one in timed)
    right = [one.fits == one.case.fits for one in scored]
    parts = [f"  {table:34} n={len(scored):4}"]
    near = sorted(
        abs(one.error) for sweep in _sweeps(timed) for one in sweep if one.case.seconds < 2 * min(other.case.seconds for other in sweep)
    )
    if errors:
        middle = statistics.median(one.error for one in timed)
        p90 = errors[math.ceil(0.9 * len(errors)) - 1]
        parts.append(f"|error| median {statistics.median(errors):5.1%} p90 {p90:6.1%} (signed median {middle:+.1%})")
    if len(near) < len(errors):
        parts.append(f"within twice the sweep's best n={len(near)} median {statistics.median(near):5.1%}")
    sweeps = [sweep for sweep in _sweeps(timed) if len(sweep) >= 5]
    if sweeps:
        ranks = [spearman([one.cost.seconds for one in sweep], [one.case.seconds for one in sweep]) for sweep in sweeps]
        good = [regret(sweep) <= 0.05 for sweep in sweeps]
        parts.append(f"Spearman median {statistics.median(ranks):.2f} of {len(ranks)}; choice within 5% in {sum(good)}/{len(good)}")
    parts.append(f"fits right {sum(right)}/{len(right)} (oom {sum(not one.case.fits for one in scored)})")
    remembered = sorted(abs(one.cost.peak_bytes / one.case.memory_bytes - 1) for one in scored if one.case.memory_bytes)
    if remembered:
        parts.append(f"memory |error| median {statistics.median(remembered):.1%}")
    return "; ".join(parts)


def _sweeps(scored: Iterable[Scored]) -> list[list[Scored]]:
    groups = defaultdict(list)
    for one in scored:
        groups[one.case.sweep].append(one)
    return list(groups.values())


def regret(sweep: list[Scored]) -> float:
    """How much longer the plan that would be chosen took than the sweep's best."""
    fitting = [one for one in sweep if one.fits] or sweep
    chosen = min(fitting, key=lambda one: one.cost.seconds)
    return chosen.case.seconds / min(one.case.seconds for one in sweep) - 1


def spearman(first: list[float], second: list[float]) -> float:
    """Rank correlation.

    >>> spearman([1, 2, 3], [10, 20, 15])
    0.5
    """
    a, b = _ranks(first), _ranks(second)
    middle = (len(a) - 1) / 2
    spread = math.sqrt(sum((x - middle) ** 2 for x in a) * sum((y - middle) ** 2 for y in b))
    return sum((x - middle) * (y - middle) for x, y in zip(a, b)) / spread if spread else 1.0


def _ranks(values: list[float]) -> list[float]:
    return [sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2 for value in values]


def _entry(one: Scored) -> dict:
    case = one.case
    return {
        "table": case.table,
        "sweep": case.sweep,
        "plan": case.plan.short(),
        "machine": case.machine.name,
        "label": case.label,
        "measured_seconds": case.seconds,
        "predicted_seconds": one.cost.seconds,
        "fits": case.fits,
        "predicted_fits": one.fits,
        "measured_bytes": case.memory_bytes,
        "predicted_bytes": one.cost.peak_bytes,
        "times": dict(one.cost.times),
        "memory": dict(one.cost.memory),
    }


if __name__ == "__main__":
    sys.exit(main())
