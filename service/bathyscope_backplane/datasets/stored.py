"""Rows as an uploaded dataset keeps them: one Parquet file in the store, read in pieces.

`input`, `label`, `group` and `split` are JSON, so that each keeps its kind; what a dataset lacks is null in every row.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Iterator
from typing import Any

import orjson
import pyarrow as pa
from pyarrow import parquet

from bathyscope_backplane.artifacts import ArtifactStore, Resource

EXTRAS = ("label", "group", "split")
SCHEMA = pa.schema([("input", pa.string()), *((name, pa.string()) for name in EXTRAS)])

GROUP_BYTES = 8 * 2**20
"""Most bytes of one piece (a row group) of the file, a longer row apart."""

Row = dict[str, Any]


async def read_rows(store: ArtifactStore, resource: Resource, start: int, end: int) -> list[Row]:
    """Rows `start` to `end` (which is left out) with `index`, `input`, `label`, `group` and `split`.

    Raises `FileNotFoundError` where the file is gone.
    """
    blob, loop = resource.blobs["rows"], asyncio.get_running_loop()

    def read(first: int, last: int) -> memoryview:
        return asyncio.run_coroutine_threadsafe(store.read(blob.key, first, last), loop).result()

    return await asyncio.to_thread(_rows, _Remote(read, blob.bytes), start, end)


def _rows(file: _Remote, start: int, end: int) -> list[Row]:
    return [
        {"index": index, **{name: orjson.loads(text) if text is not None else None for name, text in row.items()}}
        for index, row in _texts(file, start, end)
    ]


def _texts(file: _Remote, start: int, end: int) -> Iterator[tuple[int, dict[str, str | None]]]:
    with parquet.ParquetFile(file, pre_buffer=False) as opened:
        first = 0
        for group in range(opened.num_row_groups):
            count = opened.metadata.row_group(group).num_rows
            low, high = max(0, start - first), min(count, end - first)
            if low < high:
                piece = opened.read_row_group(group, use_threads=False).slice(low, high - low)
                yield from enumerate(piece.to_pylist(), first + low)
            first += count


class _Remote(io.RawIOBase):
    """A file of which the parts that are read are fetched."""

    def __init__(self, read: Callable[[int, int], memoryview], size: int) -> None:
        self._read, self._size, self._at = read, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        end = self._size if size < 0 else min(self._size, self._at + size)
        if end <= self._at:
            return b""
        found = bytes(self._read(self._at, end))
        self._at = end
        return found
