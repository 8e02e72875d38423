"""A safetensors file of known shape, written in place.

Its space is reserved first (a full disk is an error here, not a signal in the middle of a write), then the
header is written and the rest mapped. Rows go to their place as they are computed, in any order; the pages
belong to the file, so a large result takes no anonymous memory.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bathyscope_workers.disk import no_room_for

_DTYPES: dict[str, tuple[str, torch.dtype, int]] = {
    "int64": ("I64", torch.int64, 8),
    "float32": ("F32", torch.float32, 4),
    "float16": ("F16", torch.float16, 2),
    "bfloat16": ("BF16", torch.bfloat16, 2),
}


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


class ScratchFile:
    """The file while it is being filled. `close()` keeps it, `discard()` removes it."""

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
    ) -> None:
        self.path = path
        self.places: dict[str, TensorPlace] = {}
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        position = 0
        for name, (dtype, shape) in tensors.items():
            code, _, width = _DTYPES[dtype]
            end = position + width * math.prod(shape)
            header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [position, end]}
            self.places[name] = TensorPlace(dtype, shape, position, end - position)
            position = end
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % 64)  # tensors start aligned
        self.header_bytes = 8 + len(text)
        self.places = {
            name: TensorPlace(place.dtype, place.shape, place.offset + self.header_bytes, place.nbytes)
            for name, place in self.places.items()
        }
        self.nbytes = self.header_bytes + position
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            _reserve(descriptor, self.nbytes)
            self._map: mmap.mmap | None = mmap.mmap(descriptor, self.nbytes)
        except OSError as error:
            path.unlink(missing_ok=True)
            problem = no_room_for(self.nbytes, path, error)
            if problem is not None:
                raise problem from error
            raise
        finally:
            os.close(descriptor)
        self._map[: self.header_bytes] = struct.pack("<Q", len(text)) + text

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor itself: writing to it writes the file."""
        place = self.places[name]
        assert self._map is not None
        if not place.nbytes:
            return torch.zeros(place.shape, dtype=_DTYPES[place.dtype][1])
        flat = torch.frombuffer(
            self._map, dtype=_DTYPES[place.dtype][1], count=math.prod(place.shape), offset=place.offset
        )
        return flat.view(place.shape)

    def close(self) -> None:
        """Let go of the file; tensors handed out must not be used any more."""
        # Tensors still hold the buffer: the map goes with the last of them.
        self._map = None

    def discard(self) -> None:
        """Remove the file."""
        self.close()
        self.path.unlink(missing_ok=True)


def _reserve(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)
