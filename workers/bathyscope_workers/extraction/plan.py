"""Which rows share a forward pass.

Rows are taken longest first (what does not fit shows at once), until the padded batch is full: rows x longest
row <= budget of tokens. A row much shorter than the longest one waits for a batch of its like, since padding
costs as much as tokens do.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


class Pending:
    """The inputs that are still to be run with one variant of an extraction, longest first."""

    def __init__(self, lengths: NDArray[np.int64]) -> None:
        order = np.argsort(-lengths, kind="stable")
        self._rows: list[int] = order.tolist()
        self._negative: list[int] = (-lengths[order]).tolist()
        """Sorted upwards, for bisection."""

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return -self._negative[0]

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


@dataclass(frozen=True, slots=True)
class Queue:
    """The rows of one variant of an extraction that are still to be run."""

    adapter: str | None
    """Digest of the adapter they run under; None is the base."""
    first_row: int
    """Number of the variant's first row."""
    pending: Pending

    def __len__(self) -> int:
        return len(self.pending)

    def take(self, budget: int, *, width: int | None = None, most: int | None = None) -> list[int]:
        """As `Pending.take`, numbers of rows."""
        return [self.first_row + one for one in self.pending.take(budget, width=width, most=most)]
