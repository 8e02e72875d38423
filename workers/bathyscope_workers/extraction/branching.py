"""Which rows of a batch run as a tree, on which kept beginning, and what is kept of them.

Nothing is assumed of how the rows came together: what they share is read off their ids, so that a half of a batch that
ran out of memory, or rows of several jobs, are laid out as any others are. Beginnings are shared and kept for one owner
only: how long a text takes tells nobody of another's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bathyscope_workers.extraction.extraction import Extraction
from bathyscope_workers.extraction.layouts import Branched
from bathyscope_workers.extraction.prefixes import MIN_PART, MIN_SHARED, common_length, sort_key
from bathyscope_workers.models.past import Past
from bathyscope_workers.models.tree import LANE_TOKENS, lay

Ids = NDArray[np.int32]

MIN_KEPT_TOKENS = 4096
"""Tokens of beginnings that are kept for a model, if a batch's budget is not more."""


@dataclass(frozen=True, slots=True)
class BranchRow:
    """A row of a batch."""

    extraction: Extraction
    share: int
    """Its extraction's number in the batch."""
    row: int
    ids: Ids


@dataclass(frozen=True, slots=True)
class Passes:
    """How the rows of a batch run as trees: one pass after the other."""

    rows: list[BranchRow]
    """In the order of their ids, one owner's after another's."""
    shared: list[int]
    """Tokens that each has in common with the one before, of the same owner."""
    adapter: str | None
    top: int
    """The highest layer that is asked for."""

    @property
    def tokens(self) -> int:
        """That are computed where no beginning is kept."""
        return sum(len(one.ids) - have for one, have in zip(self.rows, self.shared, strict=True))

    def run(self, budget: int) -> Iterator[tuple[list[BranchRow], Branched]]:
        """Each pass as its rows and their layout, which the caller runs before it asks for the next."""
        rows, shared = self.rows, self.shared
        first = rows[0]
        whole = len({one.extraction.owner for one in rows}) == 1
        common = min((min(shared[1:]), len(first.ids) - 1)) if len(rows) > 1 and whole else 0
        known = max((self._usable(past, rows) for past in self._pasts(first)), default=0)
        if common - known >= MIN_SHARED and self.tokens > LANE_TOKENS:
            # Every lane would begin with it.
            yield from self._pass(rows[:1], shared[:1], budget, (0, common))
            rows, shared = rows[1:], [0, *shared[2:]]
        ahead = [one.extraction.ahead(one.row) for one in rows]
        longest = int(np.argmax(np.array(ahead)[::-1]))
        place = len(rows) - 1 - longest
        yield from self._pass(rows, shared, budget, (place, ahead[place]) if ahead[place] >= MIN_SHARED else None)

    def _pass(
        self, rows: list[BranchRow], shared: list[int], budget: int, keep: tuple[int, int] | None
    ) -> Iterator[tuple[list[BranchRow], Branched]]:
        resident = rows[0].extraction.resident
        pasts = [(self._usable(past, rows), past) for past in self._pasts(rows[0])]
        usable, past = max(pasts, key=lambda one: one[0], default=(0, None))
        owner = rows[0].extraction.owner
        reused = [
            min(usable, common_length(past.ids, one.ids)) if past is not None and one.extraction.owner == owner else 0
            for one in rows
        ]
        laid = lay([one.ids for one in rows], shared, reused, past, pad_id=resident.forward.pad_id, keep=keep)
        states: set[int] = set()
        if keep is not None:
            asking = rows[keep[0]].extraction
            if asking.reads_beginnings and (not any(reused) or _covers(past, asking)):
                states = set(asking.slots)
        layout = Branched(resident, self.adapter, laid, states)
        yield rows, layout
        if keep is not None:
            made = layout.kept(rows[keep[0]].ids[: keep[1]])
            keeper = rows[keep[0]].extraction.owner
            resident.kept.put(keeper, self.adapter, made, most=max(MIN_KEPT_TOKENS, budget))

    def _pasts(self, first: BranchRow) -> list[Past]:
        kept = first.extraction.resident.kept.of(first.extraction.owner, self.adapter)
        return [past for past in kept if past.top >= self.top]

    def _usable(self, past: Past, rows: Sequence[BranchRow]) -> int:
        """How much of a past may be used: no more than what has no token in it whose states are wanted and gone."""
        owner = rows[0].extraction.owner
        most, bound = 0, len(past)
        for one in rows:
            if one.extraction.owner == owner:
                common = common_length(past.ids, one.ids)
                most = max(most, common)
                wanted = one.extraction.first_wanted(one.row, pooled=not _covers(past, one.extraction))
                if wanted < common:
                    bound = min(bound, wanted)
        usable = min(most, bound)
        return usable if usable >= MIN_SHARED else 0


def branch(shares: Sequence[tuple[Extraction, list[int]]]) -> Passes | None:
    """The rows of a batch as trees; None where that would gain nothing or is not exact."""
    if not all(extraction.branching for extraction, _ in shares):
        return None
    adapters = {extraction.adapter_of(row) for extraction, rows in shares for row in rows}
    if len(adapters) > 1:
        return None
    adapter = adapters.pop()
    rows = [
        BranchRow(extraction, number, row, extraction.row_ids(row))
        for number, (extraction, rows) in enumerate(shares)
        for row in rows
    ]
    first = rows[0].extraction
    if len(rows) == 1 and not first.ahead(rows[0].row) and not first.resident.kept.of(first.owner, adapter):
        return None
    # The leader's owner first: it is theirs of whom a beginning may be kept.
    rows.sort(key=lambda one: (one.extraction.owner != first.owner, one.extraction.owner, sort_key(one.ids)))
    shared = [0] * len(rows)
    for place in range(1, len(rows)):
        if rows[place].extraction.owner == rows[place - 1].extraction.owner:
            shared[place] = common_length(rows[place - 1].ids, rows[place].ids)
    resident = first.resident
    scored = any(extraction.questions is not None for extraction, _ in shares)
    top = resident.facts.num_layers if scored else max(max(extraction.slots) for extraction, _ in shares)
    passes = Passes(rows, shared, adapter, top)
    if any(one.extraction.ahead(one.row) >= MIN_SHARED for one in rows):
        return passes
    tokens = passes.tokens - max((passes._usable(past, rows) for past in passes._pasts(rows[0])), default=0)
    return passes if tokens <= (1 - MIN_PART) * sum(len(one.ids) for one in rows) else None


def _covers(past: Past | None, extraction: Extraction) -> bool:
    return past is not None and past.states.keys() >= extraction.slots.keys()
