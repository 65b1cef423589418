"""Rows of published tables that other rows of the same table contradict, whatever a model says: they are not scored."""

from collections import defaultdict
from collections.abc import Callable, Sequence

Row = dict[str, str]

SLACK = 1.5
"""How much faster a row must be than one that it contradicts."""


def doubts(rows: Sequence[Row]) -> Callable[[Row], str]:
    """Why a row is not to be believed, or "", by the other rows of its table.

    Three arguments: the same layout was faster in another run; as many rows of the batch on each device took less where replicas were no
    fewer and microbatches no larger, which cost at least as much; and what crashed had no less memory to spare than what ran.

    >>> common = {"model": "m", "gpus": "8", "global_batch": "64", "seq_len": "1", "tp": "1", "status": "ok", "zero_stage": "0"}
    >>> quick, slow, crashed = (
    ...     common | {"pp": "2", "dp": "4", "micro_batch": size, "step_time_s": seconds, "status": status}
    ...     for size, seconds, status in (("1", "17", "ok"), ("2", "90", "ok"), ("1", "", "crashed_or_oom"))
    ... )
    >>> doubt = doubts([quick, slow, crashed])
    >>> [doubt(row)[:31] for row in (quick, slow, crashed)]
    ['', 'smaller microbatches on no fewe', 'crashed, but what needs no less']
    """
    runs = defaultdict(list)
    for row in rows:
        if seconds_of(row):
            runs[_stage(row)].append(row)

    def doubt(row: Row) -> str:
        others = runs[_stage(row)]
        if seconds_of(row) and any(_layout(row) == _layout(other) and _quicker(other, row) for other in others):
            return "a repeat, or the same layout with another ZeRO stage, is more than 1.5 times as fast"
        if seconds_of(row) and any(_no_easier(other, row) and _quicker(other, row) for other in others):
            return "smaller microbatches on no fewer replicas are more than 1.5 times as fast a row"
        if row["status"] == "crashed_or_oom" and any(_needs_no_less(other, row) for other in others):
            return "crashed, but what needs no less memory ran"
        return ""

    return doubt


def seconds_of(row: Row) -> float:
    """Seconds of a step; 0 where the row says nothing."""
    if row.get("tokens_per_s_per_gpu") and row["global_batch"]:
        return float(row["global_batch"]) * float(row["seq_len"]) / (float(row["tokens_per_s_per_gpu"]) * float(row["gpus"]))
    return float(row.get("step_time_s") or 0.0)


def _stage(row: Row) -> tuple:
    """What makes two rows run the same pipeline stages."""
    names = ("source", "model", "gpu", "seq_len", "tp", "pp", "recompute", "precision", "layers", "hidden", "heads")
    return tuple(row.get(name, "") for name in names)


def _layout(row: Row) -> tuple:
    return tuple(row.get(name, "") for name in ("gpus", "global_batch", "micro_batch", "dp"))


def _quicker(other: Row, row: Row) -> bool:
    """Whether the other took much less for a row of the batch on one pipeline: of its microbatches and those that fill and drain it."""
    return SLACK * _row_seconds(other) < _row_seconds(row)


def _row_seconds(row: Row) -> float:
    turns = _microbatches(row) + _number(row, "pp") - 1
    return seconds_of(row) / (turns * _number(row, "micro_batch"))


def _no_easier(other: Row, row: Row) -> bool:
    """Whether each row of the batch costs the other at least as much."""
    known = all(one.get(name) for one in (row, other) for name in ("dp", "micro_batch"))
    return known and _number(other, "dp") >= _number(row, "dp") and _number(row, "micro_batch") % _number(other, "micro_batch") == 0


def _needs_no_less(other: Row, row: Row) -> bool:
    """Whether the other holds at least as much: rows of a microbatch, microbatches in flight, state."""
    flying = [min(_microbatches(one), _number(one, "pp")) * _number(one, "micro_batch") for one in (other, row)]
    state = row["zero_stage"] >= other["zero_stage"] and _number(row, "dp") >= _number(other, "dp")
    return state and flying[0] >= flying[1] and _number(other, "micro_batch") >= _number(row, "micro_batch")


def _microbatches(row: Row) -> float:
    return max(1.0, _number(row, "global_batch") / (_number(row, "dp") * _number(row, "micro_batch")))


def _number(row: Row, name: str) -> float:
    return float(row.get(name) or 1)
