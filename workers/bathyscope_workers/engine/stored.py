"""Tensors of safetensors files, through a memory map."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
}


def stored_tensor(path: str, entry: dict[str, Any]) -> NDArray[Any]:
    """A tensor of a file, mapped; bfloat16 as float32. `entry` has its `dtype`, `shape` and `start` in the file."""
    count = int(np.prod(entry["shape"]))
    if not count:
        return np.zeros(entry["shape"], np.float32)
    mapped: NDArray[Any] = np.memmap(path, _DTYPES[entry["dtype"]], "r", entry["start"], tuple(entry["shape"]))
    if entry["dtype"] != "BF16":
        return mapped
    widened: NDArray[Any] = (mapped.astype(np.uint32) << 16).view(np.float32)  # its upper half is the float32's
    return widened
