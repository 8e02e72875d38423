"""Scores of choices, streamed from the store: lines of JSON there, one array for the client."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator

import numpy as np

from bathyscope.errors import NotFound
from bathyscope_backplane.artifacts import ArtifactStore, Resource
from bathyscope_service.adapters.variants import chosen
from bathyscope_service.extractions.representations import row_range

_HEAD, _TAIL = b'{"data":[', b"]}"


class Choices:
    """The scores of one extraction, opened for reading."""

    def __init__(self, store: ArtifactStore, resource: Resource, variant: str | None, rows: str | None) -> None:
        """`variant` names one of a paired extraction, `rows` inputs as `0-99`.

        Raises `NotFound` for an extraction made without `score_choices`, `InvalidRequest` for what it does not hold.
        """
        if "choices" not in resource.blobs:
            raise NotFound(f"The extraction {resource.id} was made without score_choices; make it anew with it.")
        self._store = store
        self._blob, self._index = resource.blobs["choices"], resource.blobs["choices_index"]
        inputs: int = resource.body["inputs"]
        first, last = (0, inputs) if rows is None else row_range(rows, inputs)
        before = (chosen(resource.body, variant) or 0) * inputs
        self._lines = before + first, before + last
        what = f"{self._blob.sha256}|{self._lines}"
        self.etag = f'"{hashlib.sha256(what.encode()).hexdigest()[:40]}"'
        """A strong validator of this representation."""

    async def open(self) -> tuple[int, AsyncIterator[bytes]]:
        """Length in bytes, and the bytes in pieces of some megabytes."""
        first, last = self._lines
        ends = await self._start_of(first), await self._start_of(last)
        return len(_HEAD) + ends[1] - 1 - ends[0] + len(_TAIL), self._stream(*ends)

    async def _start_of(self, line: int) -> int:
        data = await self._store.read(self._index.key, line * 8, line * 8 + 8)
        return int(np.frombuffer(data, "<i8")[0])

    async def _stream(self, start: int, end: int) -> AsyncIterator[bytes]:
        """Each line but the last ends in a comma instead of a line break."""
        yield _HEAD
        async for piece in self._store.stream(self._blob.key, start, end - 1):
            yield bytes(piece).replace(b"\n", b",")
        yield _TAIL
