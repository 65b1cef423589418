"""Members of one shape, trained together: each in a lane of a stack, one epoch after another.

Where a member stops, its lane takes the next one that waits; where none waits and half of the lanes are empty, the stack gets smaller.
Several stacks take turns in one thread: while callbacks of one run, the devices compute the others' steps.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

from parafit import backends
from parafit.adapters.step import State
from parafit.execution.events import Notice, emit
from parafit.populations.lockstep import Lockstep
from parafit.populations.members import Member
from parafit.populations.stack import Stack
from parafit.support import compat


def train_together(members: Sequence[Member], most: int, *, is_worth: Callable[[float, float], bool] = float.__gt__) -> None:
    """Train members whose steps have equal digests.

    Args:
        members: traced.
        most: how many may train at once.
        is_worth: from the seconds that a smaller stack will save at most and those that compiling takes to whether it is made.
    """
    backend, traced = backends.current(), members[0].traces.train
    most = min(most, len(members))
    strands = min(most, backend.programs_at_once())
    lanes = -(-most // strands) if backend.stacks(traced.closed) else 1
    with backend.running(), compat.attention_to_be_stacked(members[0].model):
        group = _Group(members, is_worth)
        _side_by_side([_Strand(group, lanes) for _ in range(strands)])


def _side_by_side(strands: "Sequence[_Strand]") -> None:
    """Let each strand go on where it waits, while the devices compute what the others have dispatched."""
    try:
        running = [strand.run() for strand in strands]
        while running:
            running = [each for each in running if next(each, _ENDED) is not _ENDED]
    finally:
        for strand in strands:
            strand.leave()


_ENDED = object()


class _Group:
    """What strands share: the members that wait, and the programs.

    Args:
        members, is_worth: as in `train_together`.
    """

    def __init__(self, members: Sequence[Member], is_worth: Callable[[float, float], bool]):
        self._queue, self.is_worth = deque(members), is_worth
        lead = members[0]
        longest = max(member.source.steps_per_epoch for member in members)
        self.train = Lockstep(lead.step, lead.traces.train, lead.source.table, longest=longest)
        self.guarded = lead.traces.train.guard is not None
        self.test: Any = None
        if lead.traces.test is not None:
            rows: Any = lead.order.validation
            longest = max(len(member.validation_batches) for member in members)
            shared = all(member.order.validation is rows for member in members)
            self.test = Lockstep(lead.test_step, lead.traces.test, rows.table, longest=longest, shared=shared)

    @property
    def seconds_compiling(self) -> float:
        """Spent on tracing and compiling so far."""
        return sum(each.seconds_compiling for each in (self.train, self.test) if each)

    def next(self) -> Member | None:
        """The next member that waits, its first epoch begun."""
        while self._queue:
            member = self._queue.popleft()
            if member.begin():
                member.begin_epoch()
                return member
        return None


class _Strand:
    """A stack whose programs run side by side with those of others.

    Args:
        group: what they share.
        lanes: of the stack.
    """

    def __init__(self, group: _Group, lanes: int):
        self._group, self._train, self._test = group, group.train, group.test
        self._lanes: list[Member | None] = [None] * lanes
        self._stack: Any = None
        self._seconds = 0.0

    def run(self) -> Iterator[None]:
        """Train all members that come; waits after each program that it has dispatched."""
        self._start()
        while self._live():
            yield from self._round()
            self._refill()
            self._repack()

    def leave(self) -> None:
        """Let models hold the states of members that were cut off."""
        if self._live() and self._stack.recover():
            for lane, member in self._live():
                member.leave(self._stack.read(lane))

    def _live(self) -> list[tuple[int, Member]]:
        return [(lane, member) for lane, member in enumerate(self._lanes) if member is not None]

    def _start(self) -> None:
        started = []
        while len(started) < len(self._lanes) and (member := self._group.next()) is not None:
            started.append(member)
        if started:
            states = [member.step.read() for member in started]
            spare = len(self._lanes) - len(started)
            self._stack = Stack([*states, *states[:1] * spare])  # so that all strands run the same program
            self._lanes = [*started, *[None] * spare]

    # One epoch of every lane ----------------------------------------------------------------------------------------------------------

    def _round(self) -> Iterator[None]:
        started, compiling = time.perf_counter(), self._group.seconds_compiling
        yield from self._run_training()
        tested = yield from self._run_validation()
        for lane, member in self._live():
            if member.watches:
                member.show(self._stack.read(lane))
            goes_on = member.end_epoch(member.logs | tested.get(lane, {}))
            if goes_on:
                member.begin_epoch()
            if member.watches:
                self._enter(lane, member)
            if not goes_on:
                member.finish(self._stack.read(lane))
                self._lanes[lane] = None
        self._seconds = time.perf_counter() - started - (self._group.seconds_compiling - compiling)

    def _enter(self, lane: int, member: Member) -> None:
        """Take over what a callback has changed."""
        held = member.changed()
        if held is not None:
            self._stack.write(lane, held)

    def _run_training(self) -> Iterator[None]:
        stack = self._stack
        if self._group.guarded:
            stack.keep()
        kept = time.perf_counter()
        stack.reset_metrics(range(stack.lanes))
        prepared = self._train.prepare([member and member.batches for member in self._lanes])
        if self._test:
            self._prepare_test([lane for lane, member in self._live() if member.validates()])
        done, healthy, logs = yield from self._train.run(prepared, [], stack.state, self._take)
        if bad := [lane for lane, _ in self._live() if not healthy[lane]]:
            stack.restore(bad)
        for lane, member in self._live():
            found = dict(zip(member.traces.train.names, (log[lane] for log in logs)))
            member.logs = found
            member.end_training(int(done[lane]), bool(healthy[lane]), found, time.perf_counter() - kept)
            if member.error:
                emit(Notice(text=f"member {member.number} (seed {member.seed}) stopped: {member.error}"))
                member.leave(stack.read(lane))
                self._lanes[lane] = None

    def _take(self, state: State) -> None:
        self._stack.state = state

    def _run_validation(self) -> Generator[None, None, dict[int, dict]]:
        """The logs of validations, by lane."""
        stack = self._stack
        lanes = [lane for lane, member in self._live() if member.validates()]
        if not lanes:
            return {}
        for lane, member in self._live():
            if member.watches_tests and lane in lanes:
                self._tell(lane, member, member.callbacks.on_test_begin)
        stack.reset_metrics(lanes)
        weights = stack.state.weights
        take = lambda new: self._take(stack.state._replace(others=new.others, metrics=new.metrics))  # noqa: E731
        state = stack.state._replace(weights=[], slots=[])
        _, _, logs = yield from self._test.run(self._prepare_test(lanes), weights, state, take)
        tested = {}
        for lane, member in self._live():
            if lane in lanes:
                found = compat.log_values(dict(zip(member.test_names, (log[lane] for log in logs))))
                tested[lane] = {f"val_{name}": value for name, value in found.items()}
                if member.watches_tests:
                    self._tell(lane, member, lambda found=found, member=member: member.callbacks.on_test_end(found))
        return tested

    def _prepare_test(self, lanes: Sequence[int]) -> list:
        batches = [member and (member.validation_batches if lane in lanes else []) for lane, member in enumerate(self._lanes)]
        return self._test.prepare(batches) if lanes else []

    def _tell(self, lane: int, member: Member, hook: Callable[[], None]) -> None:
        member.show(self._stack.read(lane))
        member.random.enter()
        hook()
        self._enter(lane, member)

    # Lanes ----------------------------------------------------------------------------------------------------------------------------

    def _refill(self) -> None:
        for lane, member in enumerate(self._lanes):
            if member is None and (waiting := self._group.next()) is not None:
                self._stack.replace(lane, waiting.step.read())
                self._lanes[lane] = waiting

    def _repack(self) -> None:
        """Go on in a smaller stack, of a power of two, where this saves more than it takes."""
        live = [lane for lane, _ in self._live()]
        size = 1 << max(len(live) - 1, 0).bit_length()
        if not live or size >= len(self._lanes):
            return
        rounds = max(member.order.epochs - member.epoch for _, member in self._live())
        saved = self._seconds * (1 - size / len(self._lanes)) * rounds
        takes = sum(each.seconds_to_make(size) for each in (self._train, self._test) if each)
        if not self._group.is_worth(saved, takes):
            return
        emit(
            Notice(text=f"{len(self._lanes) - len(live)} of {len(self._lanes)} members have stopped; the rest goes on in a stack of {size}")
        )
        chosen = [*live, *[live[0]] * (size - len(live))]
        self._stack.take(chosen)
        self._lanes = [*(self._lanes[lane] for lane in live), *[None] * (size - len(live))]
