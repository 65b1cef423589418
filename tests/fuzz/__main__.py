"""Runs cases one after the other in a process of their own, so that one that dies is found as well; makes failing ones small."""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator

_CASES_A_PROCESS = 25  # compiled programs add up
_SECONDS_A_CASE = 300


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the next has the next")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--only", action="store_true", help="just the one case of the seed")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return _work()
    end = time.monotonic() + 60 * arguments.minutes
    counts: Counter[str] = Counter()
    seed = arguments.seed
    while time.monotonic() < end:
        last = seed + (1 if arguments.only else _CASES_A_PROCESS)
        for seed, kind, told in _verdicts(range(seed, last), end):
            counts[kind] += 1
            print(f"seed {seed}: {kind}" + (f", {told.splitlines()[0]:.160}" if kind == "refused" else ""), flush=True)
            if kind in ("different", "uneven", "error", "died", "hung"):
                _report(seed, kind, told)
        seed += 1
        if arguments.only:
            break
    print(f"{counts.total()} cases from seed {arguments.seed}: {', '.join(f'{count} {kind}' for kind, count in counts.most_common())}")
    return 1 if set(counts) - {"same", "refused", "chaotic"} else 0


def _verdicts(seeds: range, end: float) -> Iterator[tuple[int, str, str]]:
    """What became of cases, run in one process for as long as it lives; the rest is left to the next."""
    with _worker() as worker:
        for seed in seeds:
            if time.monotonic() > end:
                break
            verdict = _ask(worker, {"seed": seed})
            yield seed, *verdict
            if verdict[0] in ("died", "hung"):
                break
        worker.kill()


def _report(seed: int, kind: str, told: str) -> None:
    from tests.fuzz.draw import draw

    print(told, flush=True)
    case, found = draw(seed), True
    while found:
        found = False
        for smaller in case.smaller():
            with _worker() as worker:
                again = _ask(
                    worker,
                    {"definition": smaller.definition, "plan": smaller.plan, "batch_size": smaller.batch_size, "single": smaller.single},
                )
                worker.kill()
            if again[0] == kind:
                case, found = smaller, True
                break
    print(f"the smallest script that shows it:\n\n{case.script}", flush=True)


def _worker() -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.fuzz", "--worker"]
    quiet = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=quiet)


def _ask(worker: subprocess.Popen, question: dict) -> tuple[str, str]:
    assert worker.stdin and worker.stdout
    timer = threading.Timer(_SECONDS_A_CASE, worker.kill)
    started = time.monotonic()
    timer.start()
    try:
        worker.stdin.write(json.dumps(question) + "\n")
        worker.stdin.flush()
        answer = worker.stdout.readline()
    except BrokenPipeError:
        answer = ""
    finally:
        timer.cancel()
    if answer:
        return tuple(json.loads(answer))
    hung = time.monotonic() - started >= _SECONDS_A_CASE
    return ("hung", f"no end after {_SECONDS_A_CASE} s") if hung else ("died", f"the process ended with code {worker.wait()}")


def _work() -> int:
    """Answers questions, one a line: a seed, or a case that was made smaller."""
    answers, sys.stdout = sys.stdout, sys.stderr
    from tests.fuzz.run import prepare, run, run_seed

    prepare()
    for line in sys.stdin:
        question = json.loads(line)
        verdict = run_seed(question["seed"]) if "seed" in question else run(**question)
        print(json.dumps([verdict.kind, verdict.told]), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
