"""States of every token, row by row: what the attention and max-of-means probes read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bathyscope_workers.probes.estimators._base import Floats, check_classes

_Index = NDArray[np.int64] | NDArray[np.bool_]
_CHUNK_BYTES = 32_000_000


@dataclass(frozen=True)
class TokenStates:
    """One layer's states of rows of different lengths, laid end to end.

    `tokens[rows]` picks rows without copying states, so that the folds of a sweep share one array.
    """

    states: NDArray[Any]
    """(tokens, hidden), any float dtype, memory-mapped or not."""

    offsets: NDArray[np.int64]
    """(rows + 1,): row r of `states` is `states[offsets[r]:offsets[r + 1]]`. Every row has a token at least."""

    rows: NDArray[np.int64] | None = None
    """Which of those rows these are, in their order; None is all of them."""

    def __post_init__(self) -> None:
        if self.states.ndim != 2 or self.offsets.ndim != 1 or len(self.offsets) < 1:
            raise ValueError("states are (tokens, hidden) and offsets (rows + 1,)")
        if self.offsets[0] != 0 or self.offsets[-1] != len(self.states) or (np.diff(self.offsets) < 1).any():
            raise ValueError("offsets rise from 0 to the number of tokens, by one token a row at least")

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.offsets) - 1 if self.rows is None else len(self.rows)

    def __getitem__(self, rows: _Index) -> TokenStates:
        """These rows, by an index array or a mask."""
        chosen = np.arange(len(self.offsets) - 1) if self.rows is None else self.rows
        return TokenStates(self.states, self.offsets, chosen[rows])

    @property
    def hidden_size(self) -> int:
        """Width of the states."""
        return int(self.states.shape[1])

    @property
    def starts(self) -> NDArray[np.int64]:
        """Index in `states` of each row's first token, (rows,)."""
        starts: NDArray[np.int64] = self.offsets[:-1]
        return starts if self.rows is None else starts[self.rows]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row, (rows,)."""
        lengths: NDArray[np.int64] = np.diff(self.offsets)
        return lengths if self.rows is None else lengths[self.rows]

    def row(self, number: int) -> NDArray[Any]:
        """The states of one row, (its tokens, hidden)."""
        start = self.starts[number]
        return self.states[start : start + self.lengths[number]]

    def positions(self) -> NDArray[np.int64]:
        """Index in `states` of every token of these rows, row after row, (their tokens,)."""
        lengths = self.lengths
        ends = np.cumsum(lengths)
        found: NDArray[np.int64] = np.arange(ends[-1] if len(ends) else 0)
        found += np.repeat(self.starts - (ends - lengths), lengths)
        return found

    def finite_rows(self) -> NDArray[np.bool_]:
        """Whether all states of a row are finite, (rows,)."""
        return np.array([np.isfinite(self.row(number)).all() for number in range(len(self))], dtype=bool)


def check_rows(X: TokenStates, y: NDArray[Any], classes: int) -> None:
    """Raise ValueError unless the states are `TokenStates` and every class occurs among the codes."""
    if not isinstance(X, TokenStates):
        raise ValueError("this estimator reads TokenStates")
    check_classes(y, classes)


def row_slices(X: TokenStates, directions: Floats) -> Iterator[tuple[range, list[Floats]]]:
    """Some rows at a time, their numbers and the products of their tokens with `directions` (columns, hidden)."""
    ends = np.cumsum(X.lengths)
    budget = max(1, _CHUNK_BYTES // (8 * X.hidden_size))
    first = 0
    while first < len(X):
        before = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + budget, side="right")))
        rows = np.arange(first, last)
        part = X[rows]
        products = np.asarray(part.states[part.positions()], dtype=np.float64) @ directions.T
        yield range(first, last), np.split(products, np.cumsum(part.lengths)[:-1])
        first = last
