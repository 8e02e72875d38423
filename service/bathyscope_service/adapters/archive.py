"""An adapter's PEFT folder as a tar file of known length, streamed from the store."""

from __future__ import annotations

import tarfile
from collections.abc import AsyncIterator

from bathyscope_backplane.artifacts import ROLES, ArtifactStore, Blob, Resource

_BLOCK = 512


class Tar:
    """The tar file of an adapter; any range of it can be streamed. The same adapter gives the same bytes."""

    def __init__(self, store: ArtifactStore, resource: Resource) -> None:
        self._store = store
        self._pieces: list[bytes | Blob] = []
        for role, name in sorted(ROLES.items()):
            blob = resource.blobs[role]
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = blob.bytes, 0o644
            self._pieces += [entry.tobuf(tarfile.GNU_FORMAT), blob, bytes(-blob.bytes % _BLOCK)]
        self._pieces.append(bytes(2 * _BLOCK))

    def __len__(self) -> int:
        """Bytes of the whole."""
        return sum(map(_size, self._pieces))

    async def stream(self, start: int, end: int) -> AsyncIterator[bytes | memoryview]:
        """Bytes `[start, end)`, in pieces of some megabytes."""
        for piece in self._pieces:
            low, high = max(start, 0), min(end, _size(piece))
            if low < high:
                if isinstance(piece, bytes):
                    yield piece[low:high]
                else:
                    async for chunk in self._store.stream(piece.key, low, high):
                        yield chunk
            start -= _size(piece)
            end -= _size(piece)


def _size(piece: bytes | Blob) -> int:
    return piece.bytes if isinstance(piece, Blob) else len(piece)
