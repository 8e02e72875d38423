"""One batch of rows of several extractions: mostly one forward pass, each row under its own adapter."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bathyscope_workers.extraction.branching import branch
from bathyscope_workers.extraction.extraction import Extraction
from bathyscope_workers.extraction.layouts import Branched, Padded
from bathyscope_workers.extraction.pool import BatchPart
from bathyscope_workers.extraction.scoring import ScorePart

Shares = Sequence[tuple[Extraction, list[int]]]


def run_batch(shares: Shares, *, budget: int) -> int:
    """Run rows of extractions on the same resident and write their states and scores to their places.

    Each share is an extraction and the rows it has in this batch. Nothing is counted as done when it fails; rows
    already written are written again by the next try. `budget` is what a batch of the resident may hold, in tokens.
    Gives the tokens that went through the model, with the padding.
    """
    computed = [0] * len(shares)
    trees = branch(shares)
    if trees is not None:
        for branch_rows, layout in trees.run(budget):
            _run(shares, [(one.share, one.row) for one in branch_rows], layout, computed)
    else:
        # Rows of one adapter lie together, the base's first.
        rows = sorted(
            (
                (extraction.adapter_of(row) or "", number, row)
                for number, (extraction, rows) in enumerate(shares)
                for row in rows
            )
        )
        first = shares[0][0]
        padded = Padded(
            first.resident,
            first.style,
            [shares[number][0].row_ids(row) for _, number, row in rows],
            [digest or None for digest, _, _ in rows],
        )
        _run(shares, [(number, row) for _, number, row in rows], padded, computed)
    for (extraction, mine), tokens in zip(shares, computed, strict=True):
        extraction.done_rows += len(mine)
        extraction.computed_tokens += tokens
    return sum(computed)


def tokens_of(shares: Shares) -> int:
    """The tokens that a batch of these rows holds, with the padding."""
    trees = branch(shares)
    if trees is not None:
        return trees.tokens
    lengths = [len(extraction.row_ids(row)) for extraction, rows in shares for row in rows]
    return len(lengths) * max(lengths)


def _run(shares: Shares, rows: Sequence[tuple[int, int]], layout: Padded | Branched, computed: list[int]) -> None:
    """One forward pass, of rows in the order that they lie in."""
    parts: list[BatchPart] = []
    scores: list[ScorePart] = []
    for number, (extraction, _) in enumerate(shares):
        places = [place for place, (owner, _) in enumerate(rows) if owner == number]
        mine = [rows[place][1] for place in places]
        computed[number] += sum(layout.computed[place] for place in places)
        parts.append(BatchPart(extraction, mine, places, layout.where))
        if extraction.questions is not None:
            scores.append(ScorePart(extraction, mine, places, layout.where))
    scores = [part for part in scores if not part.empty]
    asked = set().union(*(extraction.slots for extraction, _ in shares))
    layers = sorted(asked | {shares[0][0].resident.facts.num_layers} if scores else asked)

    def consume(layer: int, states: torch.Tensor) -> None:
        for part in parts:
            part.consume(layer, states)
        for score in scores:
            score.consume(layer, states)

    layout.run(layers, consume)
    for part in parts:
        part.flush()
    for score in scores:
        score.score()
    for part in parts:
        part.extraction.compare(part.rows)
