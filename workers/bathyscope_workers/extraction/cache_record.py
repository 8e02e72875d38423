"""A record of the cache: some layers of a row, with a sum that tells whether they are what was written.

    crc32 of key and all that follows | layers | vectors | bytes of a vector | numbers of the layers | states

Numbers are little-endian; the states are (vectors, layers, bytes of a vector), as they lie in a result.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

Block = NDArray[np.uint8]
"""States as bytes: (vectors, layers, bytes of a vector)."""

PAGE = 4096
_HEADER = struct.Struct("<IIII")
_SUM = struct.Struct("<I")
_INLINE_BYTES = 2000
"""About the largest record that shares a page with others."""


class Damaged(Exception):
    """A record is not what was written."""


def record(key: bytes, layers: tuple[int, ...], block: Block) -> bytes:
    """The record of a block with these layers."""
    vectors, many, width = block.shape
    head = _HEADER.pack(0, many, vectors, width)[_SUM.size :] + np.array(layers, dtype="<u2").tobytes()
    body = np.ascontiguousarray(block).data
    return b"".join((_SUM.pack(zlib.crc32(body, zlib.crc32(head, zlib.crc32(key)))), head, body))


def held_layers(value: memoryview) -> bytes:
    """Numbers of a record's layers, as they lie there; its sum is not looked at. Raises `Damaged`."""
    if len(value) < _HEADER.size:
        raise Damaged("a record is too short")
    end = _HEADER.size + 2 * _HEADER.unpack_from(value)[1]
    if len(value) < end:
        raise Damaged("a record is shorter than it says")
    return bytes(value[_HEADER.size : end])


def parse(key: bytes, value: memoryview) -> tuple[bytes, Block]:
    """Layers, as `held_layers` gives them, and states of a record, which lie where it does. Raises `Damaged`."""
    if len(value) < _HEADER.size:
        raise Damaged("a record is too short")
    crc, many, vectors, width = _HEADER.unpack_from(value)
    start = _HEADER.size + 2 * many
    if len(value) != start + vectors * many * width or zlib.crc32(value[_SUM.size :], zlib.crc32(key)) != crc:
        raise Damaged("a record has another sum than when it was written")
    block = np.frombuffer(value, dtype=np.uint8, offset=start).reshape(vectors, many, width)
    return bytes(value[_HEADER.size : start]), block


def size_of(length: int) -> int:
    """Bytes of the file that a record of so many takes, about."""
    return length + 128 if length < _INLINE_BYTES else ((length + 128) // PAGE + 1) * PAGE
