"""Parts of an artifact as rows of pieces, each of known length, streamed from the store.

A piece is bytes that stand for themselves (headers) or a range of the artifact. What is contiguous there goes from the
store to the socket as it is; a choice of layers is cut out of pieces of some megabytes. Nothing holds a whole result.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import numpy as np

from bathyscope_backplane.artifacts import ArtifactStore
from bathyscope_backplane.artifacts._store import CHUNK_BYTES


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where a tensor lies in the artifact."""

    dtype: str
    """As safetensors names it."""

    shape: list[int]
    start: int
    """First byte in the file."""

    end: int
    """Byte after the last."""

    @property
    def vectors(self) -> int:
        """Entries of the axis before layers and hidden: inputs, or tokens."""
        return self.shape[-3]

    @property
    def variants(self) -> int:
        """Entries of the axis before that, where there is one."""
        return self.shape[0] if len(self.shape) == 4 else 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one vector, in all of its layers."""
        return (self.end - self.start) // (self.variants * self.vectors) if self.vectors else 0

    def place(self, variant: int, vector: int) -> int:
        """Where a vector of a variant begins in the file."""
        return self.start + (variant * self.vectors + vector) * self.row_bytes


@dataclass(frozen=True, slots=True)
class Cut:
    """Bytes `[start, end)` of the artifact; of each row of `row_bytes` only the `chosen` of its equal `parts`."""

    start: int
    end: int
    row_bytes: int = 0
    parts: int = 1
    chosen: tuple[int, ...] = ()

    def __len__(self) -> int:
        """Bytes that come out."""
        if not self.chosen:
            return self.end - self.start
        return (self.end - self.start) // self.parts * len(self.chosen)


class Pieces:
    """A representation of known length; any range of it can be streamed."""

    def __init__(self, store: ArtifactStore, key: str, pieces: list[bytes | Cut]) -> None:
        self._store = store
        self._key = key
        self._pieces = pieces

    def __len__(self) -> int:
        """Bytes of the whole."""
        return sum(map(len, self._pieces))

    @property
    def contiguous(self) -> bool:
        """Whether ranges of it can be given without computing what comes before."""
        return not any(isinstance(piece, Cut) and piece.chosen for piece in self._pieces)

    async def stream(self, start: int, end: int) -> AsyncIterator[bytes | memoryview]:
        """Bytes `[start, end)`, in pieces of some megabytes."""
        for piece in self._pieces:
            low, high = max(start, 0), min(end, len(piece))
            if low < high:
                if isinstance(piece, bytes):
                    yield piece[low:high]
                elif piece.chosen:
                    async for chunk in self._gather(piece):
                        yield chunk
                else:
                    async for chunk in self._store.stream(self._key, piece.start + low, piece.start + high):
                        yield chunk
            start -= len(piece)
            end -= len(piece)

    async def _gather(self, cut: Cut) -> AsyncIterator[memoryview]:
        step = max(1, CHUNK_BYTES // cut.row_bytes) * cut.row_bytes
        for start in range(cut.start, cut.end, step):
            data = await self._store.read(self._key, start, min(start + step, cut.end))
            rows = np.frombuffer(data, np.uint8).reshape(-1, cut.parts, cut.row_bytes // cut.parts)
            yield memoryview(np.ascontiguousarray(rows[:, list(cut.chosen)]).reshape(-1).data)
