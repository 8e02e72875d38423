"""One forward pass for rows of several extractions, each under its own adapter."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import groupby

import torch

from bathyscope_workers.adapters.bank import Share
from bathyscope_workers.extraction.extraction import Extraction
from bathyscope_workers.extraction.pool import BatchPart
from bathyscope_workers.extraction.scoring import ScorePart


def run_batch(shares: Sequence[tuple[Extraction, list[int]]]) -> None:
    """Run rows of extractions on the same resident and write their states and scores to their places.

    Each share is an extraction and the rows it has in this batch. Nothing is counted as done when it fails; rows
    already written are written again by the next try.
    """
    first = shares[0][0]
    resident = first.resident
    # Rows of one adapter lie together, the base's first.
    rows = sorted(
        (
            (extraction.adapter_of(row) or "", number, row)
            for number, (extraction, rows) in enumerate(shares)
            for row in rows
        )
    )
    ids, lengths = resident.forward.pad([shares[number][0].row_ids(row) for _, number, row in rows])
    seq = ids.shape[1]
    parts: list[BatchPart] = []
    scores: list[ScorePart] = []
    for number, (extraction, _) in enumerate(shares):
        mine = [(place, row) for place, (_, owner, row) in enumerate(rows) if owner == number]
        mine_rows, places = [row for _, row in mine], [place for place, _ in mine]
        parts.append(BatchPart(extraction, mine_rows, places, seq))
        if extraction.questions is not None:
            scores.append(ScorePart(extraction, mine_rows, places, seq))
    scores = [part for part in scores if not part.empty]
    asked = set().union(*(extraction.slots for extraction, _ in shares))
    layers = sorted(asked | {resident.facts.num_layers} if scores else asked)

    def consume(layer: int, states: torch.Tensor) -> None:
        for part in parts:
            part.consume(layer, states)
        for score in scores:
            score.consume(layer, states)

    adapters: list[Share] = []
    for digest, group in groupby(rows, key=lambda one: one[0]):
        count = len(list(group))
        adapters.append(Share(digest or None, adapters[-1].first + adapters[-1].rows if adapters else 0, count))
    plain = all(share.adapter is None for share in adapters)
    with nullcontext() if plain else resident.adapters.serving(adapters, seq):
        resident.forward(ids, lengths, layers, consume, first.style)
    for part in parts:
        part.flush()
    for score in scores:
        score.score()
    for part in parts:
        part.extraction.compare(part.rows)
    for extraction, mine_rows in shares:
        extraction.done_rows += len(mine_rows)
        extraction.computed_tokens += len(mine_rows) * seq
