"""Content coding of large answers: `zstd` (RFC 8878) where `Accept-Encoding` names it, as they are otherwise.

A compressed answer is a representation of its own: it has an entity tag of its own and takes no ranges.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import zstandard

LEVEL = 3
"""Hidden states hardly shrink more at higher ones, which are several times slower."""

_AT_ONCE = 2**16
"""Bytes up to which compressing takes no longer than a switch of threads."""


def wants_zstd(accept_encoding: str | None) -> bool:
    """Whether zstd is named and liked at least as well as the plain bytes (RFC 9110, 12.5.3).

    A bare `*` does not ask for it: who sends that may not know it.
    """
    liked: dict[str, float] = {}
    for part in (accept_encoding or "").split(","):
        name, _, parameter = part.partition(";")
        weight = parameter.strip().lower().removeprefix("q=")
        try:
            liked[name.strip().lower()] = float(weight) if parameter.strip() else 1.0
        except ValueError:
            liked[name.strip().lower()] = 0.0
    return liked.get("zstd", 0.0) > 0 and liked["zstd"] >= liked.get("identity", 0.0)


def tagged(etag: str) -> str:
    """The entity tag of the compressed form of what has `etag`."""
    return f'{etag[:-1]}-zstd"'


def whole(content: bytes) -> bytes:
    """One zstd frame of something small."""
    return zstandard.ZstdCompressor(level=LEVEL).compress(content)


async def compressed(stream: AsyncIterator[bytes | memoryview]) -> AsyncIterator[bytes]:
    """One zstd frame of a stream, a piece at a time; larger pieces are worked on in a thread."""
    compressor = zstandard.ZstdCompressor(level=LEVEL).compressobj()
    async for piece in stream:
        view = memoryview(piece).cast("B")
        small = len(view) <= _AT_ONCE
        data = compressor.compress(view) if small else await asyncio.to_thread(compressor.compress, view)
        if data:
            yield data
    yield compressor.flush()
