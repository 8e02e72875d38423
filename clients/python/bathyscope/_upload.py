"""A file and some fields as a multipart body (RFC 7578), read from disk while it is sent."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bathyscope.errors import InvalidRequest

_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class FileUpload:
    """The file at `path` as the part `file`, and `fields`. The file's name is not sent."""

    path: Path
    fields: Mapping[str, str]
    size: int
    boundary: str = field(default_factory=lambda: secrets.token_hex(16))

    @classmethod
    def of(cls, path: str | os.PathLike[str], fields: Mapping[str, str]) -> FileUpload:
        """Of a file that is there."""
        found = Path(path)
        try:
            size = found.stat().st_size
        except OSError as error:
            raise InvalidRequest(f"{found} cannot be read: {error.strerror}") from error
        if not found.is_file():
            raise InvalidRequest(f"{found} is no file; an adapter's folder is packed as tar, tar.gz or zip")
        return cls(found, fields, size)

    @property
    def content_type(self) -> str:
        """Of the body."""
        return f"multipart/form-data; boundary={self.boundary}"

    @property
    def length(self) -> int:
        """Bytes of the whole."""
        return len(self._head()) + self.size + len(self._tail())

    def chunks(self) -> Iterator[bytes]:
        """The body. Raises `InvalidRequest` when the file has changed meanwhile."""
        yield self._head()
        sent = 0
        with self.path.open("rb") as file:
            while piece := file.read(_PIECE_BYTES):
                sent += len(piece)
                yield piece
        if sent != self.size:
            raise InvalidRequest(f"{self.path} changed while it was sent")
        yield self._tail()

    async def achunks(self) -> AsyncIterator[bytes]:
        """As `chunks`, read in a thread."""
        pieces = self.chunks()
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            yield piece

    def _head(self) -> bytes:
        parts = [
            f'--{self.boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
            for name, value in self.fields.items()
        ]
        file = (
            f'--{self.boundary}\r\nContent-Disposition: form-data; name="file"; filename="upload"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        )
        return "".join([*parts, file]).encode()

    def _tail(self) -> bytes:
        return f"\r\n--{self.boundary}--\r\n".encode()
