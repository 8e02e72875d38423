"""From a layer's states to the rows of the result.

One `BatchPart` is one extraction's share of a batch. For each layer it was asked for it picks the tokens that
count, reduces them on the device (means are taken in float32), and writes them to their place: straight into
the mapped file on CPU; from a GPU by way of pinned memory, a layer's copy beside the blocks above it.

The copies run on a stream of their own, as PyTorch's notes on CUDA semantics ask for: it waits for the stream that the
states are made on, the states are marked as used by it, and what was copied is read after it was waited for. None of
this has been run: no GPU was at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from bathyscope_workers.extraction.extraction import Extraction

Where = Callable[[int, NDArray[np.int64]], NDArray[np.int64]]
"""Of a place in a batch and positions in the row there, where these tokens are in the flattened states."""

_HELD_BYTES = 256 * 2**20
"""Pinned memory that copies may fill before they are written to their place."""


class BatchPart:
    """Rows of one extraction at these places of a batch; those that carry no input's states apart."""

    def __init__(self, extraction: Extraction, rows: list[int], places: list[int], where: Where) -> None:
        self.extraction = extraction
        self.rows = [row for row in rows if extraction.carried(row) is not None]
        """Those that do."""
        self._pooling = extraction.spec.pooling
        tokens: list[NDArray[np.int64]] = []
        targets: list[NDArray[np.int64]] = []
        for place, row in zip(places, rows, strict=True):
            number = extraction.carried(row)
            if number is None:
                continue
            kept = extraction.kept_tokens(number)
            tokens.append(where(place, kept))
            first = extraction.first_target(row)
            width = len(kept) if self._pooling == "none" else 1
            targets.append(np.arange(first, first + width, dtype=np.int64))
        self._lengths = [len(one) for one in tokens]
        nothing = [np.zeros(0, dtype=np.int64)]
        self._index = torch.from_numpy(np.concatenate(tokens or nothing))  # into the flattened states
        self._targets = torch.from_numpy(np.concatenate(targets or nothing))  # into the result's first axis
        self._held: dict[int, torch.Tensor] = {}
        self._streams: set[torch.cuda.Stream] = set()
        self._held_bytes = 0

    def consume(self, layer: int, states: torch.Tensor) -> None:
        """Take what is wanted of a layer's states (…, hidden)."""
        slot = self.extraction.slots.get(layer)
        if slot is None or not self.rows:
            return
        flat = states.reshape(-1, states.shape[-1])
        if self._index.device != flat.device:
            self._index = self._index.to(flat.device)
        pooled = self._reduce(flat.index_select(0, self._index)).to(self.extraction.torch_dtype)
        if pooled.device.type == "cpu":
            self.extraction.states[self._targets, slot] = pooled
            return
        self._held[slot] = self._copied(pooled)
        self._held_bytes += pooled.nbytes
        if self._held_bytes > _HELD_BYTES:
            self.flush()

    def _copied(self, pooled: torch.Tensor) -> torch.Tensor:
        """Pinned memory that holds the states of a GPU once its copying stream was waited for."""
        stream = _copying(pooled.device)
        stream.wait_stream(torch.cuda.current_stream(pooled.device))
        pinned = torch.empty(pooled.shape, dtype=pooled.dtype, pin_memory=True)
        with torch.cuda.stream(stream):
            pinned.copy_(pooled, non_blocking=True)
        pooled.record_stream(stream)  # its memory is not given to another tensor before the copy is over
        self._streams.add(stream)
        return pinned

    def flush(self) -> None:
        """Write what was copied from a GPU."""
        for stream in self._streams:
            stream.synchronize()
        for slot, pinned in self._held.items():
            self.extraction.states[self._targets, slot] = pinned
        self._held.clear()
        self._streams.clear()
        self._held_bytes = 0

    def _reduce(self, picked: torch.Tensor) -> torch.Tensor:
        """(tokens of all rows, hidden) to (rows, hidden); pooling none, last and first are picked already."""
        if self._pooling not in ("mean", "max"):
            return picked
        if self._pooling == "mean":
            picked = picked.float()
        if picked.device.type == "cpu":
            parts = torch.split(picked, self._lengths)
            reduced = [part.mean(0) if self._pooling == "mean" else part.amax(0) for part in parts]
            return torch.stack(reduced)
        lengths = torch.tensor(self._lengths, device=picked.device)
        return torch.segment_reduce(picked, self._pooling, lengths=lengths, axis=0)


@cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    """A stream for copies from a GPU; models spread over several have one on each."""
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return stream
