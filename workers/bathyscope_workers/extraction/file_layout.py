"""Where the tensors of a result lie in its file: header first, then one after the other. Imports no torch."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_DTYPES = {"int64": ("I64", 8), "float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2)}


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where a tensor lies in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""
    nbytes: int

    def to_wire(self) -> dict[str, Any]:
        """A JSON object."""
        return {"dtype": self.dtype, "shape": list(self.shape), "offset": self.offset, "bytes": self.nbytes}


def lay_out(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, TensorPlace]]:
    """The header of a safetensors file, its length prefix included, and where the tensors lie behind it."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, (dtype, shape) in tensors.items():
        code, width = _DTYPES[dtype]
        end = position + width * math.prod(shape)
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)  # tensors start aligned
    places = {}
    for name, (dtype, shape) in tensors.items():
        start, end = header[name]["data_offsets"]
        places[name] = TensorPlace(dtype, shape, 8 + len(text) + start, end - start)
    return struct.pack("<Q", len(text)) + text, places


def texts_of(provenance: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a file: what its numbers depend on, as safetensors holds it."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in provenance.items()}


def reserve(descriptor: int, size: int) -> None:
    """Take the space that a file needs. Raises `OSError` when there is not so much."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)
