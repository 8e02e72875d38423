"""The inputs of a job, some at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson

_CHUNK_INPUTS, _CHUNK_BYTES = 1000, 500_000
"""Inputs tokenised in one step: a fraction of a second between two batches of other jobs."""


def chunks(inputs: list[Any] | None, inputs_path: str | None) -> Iterator[list[Any]]:
    """The inputs, some at a time; a file is never held whole."""
    if inputs is not None:
        chunk: list[Any] = []
        size = 0
        for item in inputs:
            chunk.append(item)
            size += _characters(item)
            if len(chunk) >= _CHUNK_INPUTS or size >= _CHUNK_BYTES:
                yield chunk
                chunk, size = [], 0
        if chunk:
            yield chunk
        return
    assert inputs_path is not None
    with open(inputs_path, "rb") as file:
        while lines := _some_lines(file):
            yield [orjson.loads(line) for line in lines]


def _characters(item: Any) -> int:
    """About as many as are tokenised for an input."""
    if isinstance(item, str):
        return len(item)
    if isinstance(item, dict) and isinstance(item.get("prompt"), str):
        choices = item.get("choices") or ()
        return len(item["prompt"]) * (1 + len(choices)) + sum(map(len, choices))
    return 1000


def _some_lines(file: Any) -> list[bytes]:
    lines: list[bytes] = []
    size = 0
    while len(lines) < _CHUNK_INPUTS and size < _CHUNK_BYTES:
        line = file.readline()
        if not line:
            break
        if line.strip():
            lines.append(line)
            # A prompt is tokenised with each of its choices.
            size += len(line) * (1 + line.count(b'","')) if b'"choices"' in line else len(line)
    return lines


def count_lines(path: str | None) -> int:
    """Inputs of a file."""
    if path is None:
        return 0
    with open(path, "rb") as file:
        return sum(1 for line in file if line.strip())
