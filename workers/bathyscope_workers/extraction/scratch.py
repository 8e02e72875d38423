"""A safetensors file of known shape, written in place.

Its space is reserved first (a full disk is an error here, not a signal in the middle of a write), then the
header is written and the rest mapped. Rows go to their place as they are computed, in any order; the pages
belong to the file, so a large result takes no anonymous memory.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from bathyscope_workers.disk import no_room_for
from bathyscope_workers.extraction.file_layout import lay_out, reserve

_DTYPES = {
    "int64": torch.int64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


class ScratchFile:
    """The file while it is being filled. `close()` keeps it, `discard()` removes it."""

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
    ) -> None:
        self.path = path
        header, self.places = lay_out(tensors, metadata)
        self.header_bytes = len(header)
        self.nbytes = self.header_bytes + sum(place.nbytes for place in self.places.values())
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            reserve(descriptor, self.nbytes)
            self._map: mmap.mmap | None = mmap.mmap(descriptor, self.nbytes)
        except OSError as error:
            path.unlink(missing_ok=True)
            problem = no_room_for(self.nbytes, path, error)
            if problem is not None:
                raise problem from error
            raise
        finally:
            os.close(descriptor)
        self._map[: self.header_bytes] = header

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor itself: writing to it writes the file."""
        place = self.places[name]
        assert self._map is not None
        if not place.nbytes:
            return torch.zeros(place.shape, dtype=_DTYPES[place.dtype])
        flat = torch.frombuffer(
            self._map, dtype=_DTYPES[place.dtype], count=math.prod(place.shape), offset=place.offset
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
