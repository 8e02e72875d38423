"""Which rows share a forward pass.

Rows are taken longest first (what does not fit shows at once), until the padded batch is full: rows x longest
row <= budget of tokens. A row much shorter than the longest one waits for a batch of its like, since padding
costs as much as tokens do.

Rows that begin alike are taken in the order of their ids instead: each then costs what it does not share with the row
before it, and the budget is of these tokens.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


class Pending:
    """The inputs that are still to be run with one variant of an extraction, longest first."""

    def __init__(self, lengths: NDArray[np.int64], rows: NDArray[np.int64] | None = None) -> None:
        """`lengths` are those of `rows`; of all inputs without."""
        order = np.argsort(-lengths, kind="stable")
        self._rows: list[int] = (order if rows is None else rows[order]).tolist()
        self._negative: list[int] = (-lengths[order]).tolist()
        """Sorted upwards, for bisection."""

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return -self._negative[0]

    @property
    def first(self) -> int:
        """The longest row itself."""
        return self._rows[0]

    def take(self, budget: int, *, width: int | None = None, most: int | None = None) -> list[int]:
        """Rows for a batch whose padded size is at most `budget` tokens, removed from here.

        With `width`, rows that fit into a batch already that wide, at most `most` of them; otherwise the
        longest row sets the width, and one row is given however long it is.
        """
        start = 0 if width is None else bisect_left(self._negative, -width)
        if start == len(self._rows):
            return []
        wide = self.longest if width is None else width
        count = max(1, budget // wide) if most is None else most
        slack = max(wide // 2, budget // 16)
        end = min(start + count, bisect_left(self._negative, slack - wide + 1, lo=start))
        if width is None:
            end = max(end, start + 1)
        taken = self._rows[start:end]
        del self._rows[start:end]
        del self._negative[start:end]
        return taken

    def clear(self) -> None:
        """Forget every row."""
        self._rows.clear()
        self._negative.clear()


class Branches:
    """The inputs that begin as others do and are still to be run with one variant, in the order of their ids."""

    def __init__(self, rows: NDArray[np.int64], lengths: NDArray[np.int64], shared: NDArray[np.int64]) -> None:
        """`lengths` and `shared` are those of `rows`: all tokens, and how many the row before has too."""
        self._rows = rows
        self._ends = np.cumsum(lengths - shared)
        """Tokens that all rows up to each one have to compute."""
        self._groups = np.append(np.flatnonzero(shared == 0), len(rows))
        """Where each group of rows that begin alike begins, and the end."""
        self._next = 0

    def __len__(self) -> int:
        return len(self._rows) - self._next

    @property
    def tokens(self) -> int:
        """That are still to be computed."""
        done = int(self._ends[self._next - 1]) if self._next else 0
        return int(self._ends[-1]) - done if len(self._ends) else 0

    def take(self, budget: int, *, whole: bool = False) -> list[int]:
        """Rows for a batch that computes at most `budget` tokens, removed from here; one however long it is.

        With `whole`, only groups that fit as they are: of those nothing need be kept for a later batch.
        """
        start, total = self._next, len(self._rows)
        if start == total:
            return []
        done = int(self._ends[start - 1]) if start else 0
        end = int(np.searchsorted(self._ends, done + budget, side="right"))
        if whole:
            group = int(np.searchsorted(self._groups, start))
            last = int(np.searchsorted(self._groups, end, side="right")) - 1
            end = int(self._groups[last]) if self._groups[group] == start and last > group else start
        else:
            end = max(end, start + 1)
        self._next = end
        return [int(row) for row in self._rows[start:end]]

    def clear(self) -> None:
        """Forget every row."""
        self._next = len(self._rows)


@dataclass(frozen=True, slots=True)
class Queue:
    """The rows of one variant of an extraction that are still to be run."""

    adapter: str | None
    """Digest of the adapter they run under; None is the base."""
    first_row: int
    """Number of the variant's first row."""
    pending: Pending | Branches

    def __len__(self) -> int:
        return len(self.pending)

    def take(self, budget: int, *, width: int | None = None, most: int | None = None) -> list[int]:
        """As `Pending.take`, numbers of rows. Those that begin alike join no batch of another kind."""
        if isinstance(self.pending, Pending):
            taken = self.pending.take(budget, width=width, most=most)
        else:
            taken = self.pending.take(budget) if width is None else []
        return [self.first_row + one for one in taken]
