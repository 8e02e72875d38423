"""The header of a safetensors file, held against the file's real size before a tensor of it is read.

A safetensors file is eight bytes (the header's length, little-endian), the header (a JSON object of name -> dtype,
shape, [begin, end)), then the data. A file that was cut off in transfer has a perfectly good header: only the size
tells. Format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bathyscope import errors
from bathyscope_workers.adapters import _json

BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}
"""Bits of one element, by the name of its type in the header."""

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,511}")
"""What a tensor may be called: names end in logs, pages and module paths."""

_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""How torch's files begin: zip archives of pickles, and bare ones."""


@dataclass(frozen=True, slots=True)
class HeaderLimits:
    """Bounds of one file."""

    header_bytes: int = 32 << 20
    """An adapter with one tensor for each of 384 experts in 60 layers has about 25 MiB of header."""
    values: int = 5_000_000
    """Lists, objects and commas in it; so many tensors as are read need less."""
    tensors: int = 200_000
    axes: int = 8
    """Of one tensor."""


@dataclass(frozen=True, slots=True)
class TensorFact:
    """Where one tensor lies."""

    name: str
    dtype: str
    """As in the header: F32, F16, BF16, …"""
    shape: tuple[int, ...]
    begin: int
    """Offset of its first byte in the file."""
    end: int
    """Offset after its last byte in the file."""


def read_header(path: Path, limits: HeaderLimits | None = None) -> dict[str, TensorFact]:
    """The tensors of a safetensors file by name, in the file's order; no tensor is read.

    Raises AdapterIncomplete (the file is shorter than its header says), AdapterPickled, AdapterTooLarge and
    AdapterWeightsMalformed.
    """
    limits = limits or HeaderLimits()
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise errors.AdapterIncomplete(
                f"{path.name} is {size} bytes long, too short for a safetensors file; transfer it again"
            )
        (length,) = struct.unpack("<Q", start)
        if 8 + length > size and start.startswith(_PICKLES):
            raise errors.AdapterPickled(
                f"{path.name} is a pickle under another name, which is never loaded; save the adapter with safetensors"
            )
        if length > limits.header_bytes:
            raise errors.AdapterTooLarge(
                f"the header of {path.name} claims {length} bytes, more than the {limits.header_bytes} that are read; "
                "check that it is a safetensors file"
            )
        if 8 + length > size:
            raise errors.AdapterIncomplete(
                f"{path.name} has {size} bytes of the {8 + length} that its header alone needs; transfer it again"
            )
        raw = file.read(length)
    if not raw.startswith(b"{"):
        raise _malformed(path, "does not begin with '{'")
    # Before it is parsed: an empty list takes two bytes here, and thirty times that in memory.
    if sum(raw.count(mark) for mark in (b"[", b"{", b",")) > limits.values:
        raise errors.AdapterTooLarge(
            f"the header of {path.name} holds more than {limits.values} values; check that it is a safetensors file"
        )
    try:
        header = _json.parse(raw, max_bytes=limits.header_bytes, max_depth=4)
    except _json.JsonFault as fault:
        raise _malformed(path, str(fault)) from None
    _check_metadata(path, header.pop("__metadata__", None))
    if not header:
        raise errors.AdapterIncomplete(f"{path.name} holds no tensors; save the adapter again")
    if len(header) > limits.tensors:
        raise errors.AdapterTooLarge(
            f"{path.name} holds {len(header)} tensors, more than the {limits.tensors} that are read"
        )
    facts = [_fact(path, name, entry, 8 + length, limits) for name, entry in header.items()]
    facts.sort(key=lambda fact: (fact.begin, fact.end))
    _check_layout(path, facts, 8 + length, size)
    return {fact.name: fact for fact in facts}


def header_bytes(entries: dict[str, Any]) -> bytes:
    """Length and header of a safetensors file, padded to eight bytes; `entries` is the header as an object."""
    text = json.dumps(entries, separators=(",", ":"), allow_nan=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _fact(path: Path, name: str, entry: Any, data_start: int, limits: HeaderLimits) -> TensorFact:
    if not NAME.fullmatch(name):
        raise _malformed(path, f"has a tensor of a name that is not accepted: {name[:100]!r}", name)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _malformed(path, f"must give dtype, shape and data_offsets, and no more, for {name}", name)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _malformed(path, f"gives {name} a type that is not known: {str(dtype)[:40]!r}", name)
    if not _whole_numbers(shape) or len(shape) > limits.axes:
        raise _malformed(path, f"gives {name} a shape that is not at most {limits.axes} whole numbers", name)
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _malformed(path, f"gives {name} data_offsets that are not [begin, end]", name)
    # Python's integers do not overflow: a product of absurd sides simply differs.
    needed, given = math.prod(shape) * BITS[dtype] // 8, offsets[1] - offsets[0]
    if needed != given:
        raise _malformed(path, f"gives {name} {given} bytes where {dtype} of its shape needs {needed}", name)
    return TensorFact(name, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _whole_numbers(value: Any) -> bool:
    # bool is an int to Python, not to the format.
    return isinstance(value, list) and all(type(side) is int and 0 <= side < 1 << 63 for side in value)


def _check_layout(path: Path, facts: list[TensorFact], data_start: int, size: int) -> None:
    position = data_start
    for fact in facts:
        if fact.begin != position:
            what = "overlaps the one before it" if fact.begin < position else "leaves a gap before it"
            raise _malformed(path, f"places {fact.name} where it {what}", fact.name)
        position = fact.end
    if size < position:
        raise errors.AdapterIncomplete(
            f"{path.name} has {size} bytes of the {position} that its header lists; transfer it again"
        )
    if size > position:
        raise _malformed(path, f"lists {position} bytes where the file has {size}")


def _check_metadata(path: Path, metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _malformed(path, "has a __metadata__ that is not an object of texts")


def _malformed(path: Path, why: str, *names: str) -> errors.AdapterWeightsMalformed:
    return errors.AdapterWeightsMalformed(
        f"the header of {path.name} {why}; save the adapter again with safetensors", names=names
    )
