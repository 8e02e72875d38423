"""Rows that begin alike, laid out as a tree: which of them share tokens, and where each token of each row is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bathyscope_workers.models.past import Past, Tree

Ids = NDArray[np.int32]

LANE_TOKENS = 512
"""Tokens side by side in a lane, if no row needs more: each attends to all of its lane, most of it masked."""


@dataclass(frozen=True, slots=True)
class Laid:
    """A tree and its rows."""

    tree: Tree
    paths: list[NDArray[np.int64]]
    """Of each row, (tokens,): where each of its tokens is in (lanes * width), and behind these in the past."""
    new: list[int]
    """Tokens that each row has to compute."""


def lay(
    rows: Sequence[Ids],
    shared: Sequence[int],
    reused: Sequence[int],
    past: Past | None,
    *,
    pad_id: int,
    keep: tuple[int, int] | None = None,
    lane_tokens: int = LANE_TOKENS,
) -> Laid:
    """Lay out rows, which are in the order of their ids.

    `shared` says how many tokens each has in common with the one before, `reused` how many of the past's it starts
    with. `keep` is a row and how many of its tokens are kept for later passes.
    """
    known = max(reused, default=0)
    past = None if past is None or not known else past.cut(known)
    before, lanes, width = _places(rows, shared, reused, lane_tokens)
    size = lanes[-1] + 1
    ids = np.full((size, width), pad_id, dtype=np.int64)
    positions = np.zeros((size, width), dtype=np.int64)
    mask = np.zeros((size, 1, width, known + width), dtype=bool)
    mask[:, 0, np.arange(width), known + np.arange(width)] = True  # padding sees itself: no row without a number
    triangle = np.tri(width, dtype=bool)
    ends = [0] * size
    paths: list[NDArray[np.int64]] = []
    plain = size == 1
    for number, row in enumerate(rows):
        lane, start, column = lanes[number], before[number], ends[lanes[number]]
        own = lane * width + column + np.arange(len(row) - start)
        if start and start == reused[number]:
            trunk = size * width + np.arange(start)
        elif start:
            trunk = paths[-1][:start]
        else:
            trunk = own[:0]
        paths.append(np.concatenate([trunk, own]))
        end = ends[lane] = column + len(own)
        here = slice(column, end)
        ids[lane, here], positions[lane, here] = row[start:], np.arange(start, len(row))
        seen = mask[lane, 0, here]
        seen[:, known + column : known + end] = triangle[: len(own), : len(own)]
        if start:
            seen[:, np.where(trunk < size * width, known + trunk - lane * width, trunk - size * width)] = True
        plain = plain and (not len(own) or start == known + column)
    tree = Tree(ids, positions, None if plain else mask, past)
    if keep is not None:
        number, tokens = keep
        path, lane = paths[number][:tokens], lanes[number]
        index = np.where(path < size * width, known + path - lane * width, path - size * width)
        tree = Tree(ids, positions, tree.mask, past, index, lane)
    return Laid(tree, paths, [len(row) - start for row, start in zip(rows, before, strict=True)])


def _places(
    rows: Sequence[Ids], shared: Sequence[int], reused: Sequence[int], lane_tokens: int
) -> tuple[list[int], list[int], int]:
    """Of each row the tokens that are computed elsewhere, its lane, and how wide the widest lane is."""
    before: list[int] = []
    lanes: list[int] = []
    filled = widest = 0
    for number, row in enumerate(rows):
        start = max(shared[number] if number else 0, reused[number])
        if filled and filled + len(row) - start > lane_tokens:
            lanes.append(lanes[-1] + 1)
            start, filled = reused[number], 0
        else:
            lanes.append(lanes[-1] if lanes else 0)
        before.append(start)
        filled += len(row) - start
        widest = max(widest, filled)
    return before, lanes, widest
