"""Which rows the next batch holds.

Extractions of one resident share batches, and a new one joins at the next batch. Owners take turns at leading a
batch, and an owner's jobs take turns among themselves, so one text never waits for ten thousand; higher priority
goes first, and a class is gained for every `AGING_SECONDS` a job was not served. The leader fills the batch as
far as it can; what is left goes to rows of other jobs that fit its width. A batch takes as long as it is large, so
where the leader ends with it, jobs that do not fill a part of it at most. A leader that has no rows left and gives
answers in words goes on with those for a moment instead.

Rows of a job that begin alike are taken one after the other, since each computes only what the one before did not; a
batch that they leave room in takes whole groups of such rows. Where a single row fills a batch, rows of its owner's
other jobs that begin as it does join it.

A batch holds rows of the base and of whichever adapters mix, each row under its own: sharing costs two small products a
module and adapter, a batch left half empty costs more. An adapter that does not mix has its batches to itself.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from bathyscope_workers.engine.account import Stages
from bathyscope_workers.engine.protocol import RunJob
from bathyscope_workers.extraction.extraction import Extraction
from bathyscope_workers.extraction.plan import Branches, Pending, Queue
from bathyscope_workers.extraction.prefixes import MIN_PART, MIN_SHARED, common_length
from bathyscope_workers.models.resident import Resident

AGING_SECONDS = 10.0
HEAD_START_SECONDS = 1.0
"""A job that is not tokenised at all yet counts as if it had waited so much longer."""
_PART = 4
"""Where its leader ends with a batch, rows of jobs that go on fill it up to one part in so many."""
_LOOKED_AT = 64
"""Jobs whose next row is compared with one that fills a batch."""
_CLASSES = {"high": 0, "normal": 1, "low": 2}


@dataclass(slots=True, eq=False)
class Active:
    """A job that the model engine works on."""

    job: RunJob
    received: float
    """`time.monotonic()` of its arrival, as the other times here."""
    arrived: float = field(default_factory=time.time)
    """The same in Unix seconds."""
    extraction: Extraction | None = None
    """None until its model is resident."""
    tokenised: bool = False
    started: float = 0.0
    last_progress: float = 0.0
    last_served: float = 0.0
    turn: int = 0
    stages: Stages = field(default_factory=Stages)
    timings: dict[str, float] = field(default_factory=lambda: {"load": 0.0, "tokenise": 0.0, "inference": 0.0})

    @property
    def running(self) -> Extraction:
        """The extraction, once there is one."""
        assert self.extraction is not None
        return self.extraction


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a batch."""

    active: Active
    row: int


@dataclass(frozen=True, slots=True)
class Turn:
    """What is done next."""

    leader: Active
    rows: list[Row]
    """A batch; empty when the leader goes on with its answers in words, which it does by itself."""


class Scheduler:
    """Picks the next batch among active jobs."""

    def __init__(self, *, batch_tokens: int | None) -> None:
        self.batch_tokens = batch_tokens
        """Budget of padded tokens a batch; None is each resident's own."""
        self._turn = 0
        self._owner_turns: dict[str, int] = {}

    def next_batch(self, jobs: Iterable[Active]) -> list[Row]:
        """Rows of one resident that share the next forward pass; taken from their extractions."""
        turn = self.next_turn(jobs)
        return turn.rows if turn is not None else []

    def next_turn(self, jobs: Iterable[Active]) -> Turn | None:
        """Whose turn it is and what is done in it; None when nothing waits."""
        ready = [active for active in jobs if active.tokenised and (_has_rows(active) or active.running.answering)]
        if not ready:
            self._owner_turns.clear()
            return None
        now = time.monotonic()
        ready.sort(key=lambda active: self._order(active, now))
        leader = ready[0]
        self._serve(leader, now)
        if not _has_rows(leader):
            return Turn(leader, [])
        return Turn(leader, self._fill(leader, [active for active in ready if _has_rows(active)], now))

    def _fill(self, leader: Active, ready: list[Active], now: float) -> list[Row]:
        extraction = leader.running
        budget = self.budget(extraction.resident)
        first = next(queue for queue in extraction.queues if queue)
        if extraction.style.alone:
            return [Row(leader, row) for row in first.take(1)]
        if isinstance(first.pending, Branches):
            return self._fill_branches(leader, first, ready, now)
        width, group = first.pending.longest, extraction.group_of(first.adapter)
        rows = [Row(leader, row) for row in first.take(budget)]
        if budget < 2 * width and extraction.branching:
            rows += self._alike(rows[0], ready, now)
            if len(rows) > 1:
                return rows
        for other in ready:
            if other is not leader and not self._fits(leader, other):
                continue
            goes_on = other is not leader and _rows_left(other) > budget // width - len(rows)
            most = budget // _PART if goes_on and not _has_rows(leader) else budget
            for queue in other.running.queues:
                if budget // width <= len(rows):
                    return rows
                room = most // width - len(rows)
                if room <= 0:
                    break
                if queue and other.running.group_of(queue.adapter) == group:
                    taken = queue.take(budget, width=width, most=room)
                    if taken:
                        other.last_served = now
                    rows += [Row(other, row) for row in taken]
        return rows

    def _fill_branches(self, leader: Active, first: Queue, ready: list[Active], now: float) -> list[Row]:
        assert isinstance(first.pending, Branches)
        budget = self.budget(leader.running.resident)
        before = first.pending.tokens
        rows = [Row(leader, row) for row in first.take(budget)]
        room = budget - (before - first.pending.tokens)
        for other in ready:
            if not other.running.branching or (other is not leader and not self._fits(leader, other)):
                continue
            for queue in other.running.queues:
                if room <= 0:
                    return rows
                if queue is not first and isinstance(queue.pending, Branches) and queue.adapter == first.adapter:
                    before = queue.pending.tokens
                    taken = [Row(other, queue.first_row + row) for row in queue.pending.take(room, whole=True)]
                    room -= before - queue.pending.tokens
                    if taken:
                        other.last_served = now
                    rows += taken
        return rows

    def _alike(self, row: Row, ready: list[Active], now: float) -> list[Row]:
        """Rows of the same owner's other jobs that begin as this one does, as far as they fit beside it."""
        mine = row.active.running
        ids, adapter = mine.row_ids(row.row), mine.adapter_of(row.row)
        budget = self.budget(mine.resident)
        room = budget if len(ids) >= budget else budget - len(ids)
        rows: list[Row] = []
        others = [one for one in ready if one is not row.active and one.job.owner == row.active.job.owner]
        for other in others[:_LOOKED_AT]:
            if not other.running.branching or not self._fits(row.active, other):
                continue
            for queue in other.running.queues:
                if queue.adapter != adapter or not isinstance(queue.pending, Pending):
                    continue
                while queue:
                    theirs = other.running.row_ids(queue.first_row + queue.pending.first)
                    common = common_length(ids, theirs)
                    cost = len(theirs) - common
                    if common < max(MIN_SHARED, MIN_PART * len(theirs)) or cost > room:
                        break
                    room -= cost
                    taken = queue.take(budget, width=queue.pending.longest, most=1)
                    rows += [Row(other, one) for one in taken]
                    other.last_served = now
        return rows

    def budget(self, resident: Resident) -> int:
        """Padded tokens a batch of this resident may hold."""
        own = self.batch_tokens or resident.facts.batch_tokens
        return min(own, resident.token_budget or own)

    def _order(self, active: Active, now: float) -> tuple[int, int, int, float]:
        waited = now - (active.last_served or active.received)
        effective = _CLASSES.get(active.job.priority, 1) - int(waited / AGING_SECONDS)
        return effective, self._owner_turns.get(active.job.owner, 0), active.turn, active.received

    def _serve(self, active: Active, now: float) -> None:
        self._turn += 1
        self._owner_turns[active.job.owner] = active.turn = self._turn
        active.last_served = now

    @staticmethod
    def _fits(leader: Active, other: Active) -> bool:
        """Whether another job's rows may join: same model and style, and not for half its blocks or twice them."""
        mine, theirs = leader.running, other.running
        if leader.job.solo or other.job.solo or theirs.resident is not mine.resident or theirs.style != mine.style:
            return False
        low, high = sorted((mine.top, theirs.top))
        return 2 * low >= high


def next_to_tokenise(waiting: Sequence[Active]) -> Active:
    """Whose inputs are tokenised next: in turn, and a new job, mostly a small one, does not wait for a large one's turn
    that came while it was on its way; but not so that new ones keep that from its turn for ever."""
    return min(waiting, key=lambda one: one.last_served or one.received - HEAD_START_SECONDS)


def _has_rows(active: Active) -> bool:
    return any(active.running.queues)


def _rows_left(active: Active) -> int:
    return sum(map(len, active.running.queues))
