"""One forward pass for rows of several extractions."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bathyscope_workers.extraction.extraction import Extraction
from bathyscope_workers.extraction.pool import BatchPart


def run_batch(shares: Sequence[tuple[Extraction, list[int]]]) -> None:
    """Run rows of extractions on the same resident and write their states to their places.

    Each share is an extraction and the rows (indexes of inputs) it has in this batch. Nothing is counted as done
    when it fails; rows already written are written again by the next try.
    """
    first = shares[0][0]
    forward = first.resident.forward
    ids, lengths = forward.pad([extraction.row_ids(row) for extraction, rows in shares for row in rows])
    seq = ids.shape[1]
    parts: list[BatchPart] = []
    place = 0
    for extraction, rows in shares:
        parts.append(BatchPart(extraction, rows, place, seq))
        place += len(rows)
    layers = sorted(set().union(*(extraction.slots for extraction, _ in shares)))

    def consume(layer: int, states: torch.Tensor) -> None:
        for part in parts:
            part.consume(layer, states)

    forward(ids, lengths, layers, consume, first.style)
    for part in parts:
        part.flush()
    for part in parts:
        part.extraction.done_rows += len(part.rows)
        part.extraction.computed_tokens += len(part.rows) * seq
