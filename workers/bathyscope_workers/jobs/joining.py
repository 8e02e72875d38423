"""Results of shards put together to what one engine would have left: bytes are moved, no tensor is ever in memory."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bathyscope.errors import InternalError, TooLarge
from bathyscope_backplane.artifacts import ArtifactStore
from bathyscope_backplane.artifacts._store import CHUNK_BYTES
from bathyscope_workers.disk import no_room_for
from bathyscope_workers.extraction.file_layout import TensorPlace, lay_out, reserve, texts_of

_TENSORS = ("offsets", "token_ids", "hidden_states")


@dataclass(frozen=True, slots=True)
class Part:
    """What a shard left."""

    result: dict[str, Any]
    """The engine's, `ExtractionResult.to_wire()`."""
    keys: dict[str, str]
    """Its files in the store by role: `states`, `choices`, `choices_index`."""
    timings: dict[str, float]
    """Seconds: `load`, `inference`."""


class Joiner:
    """Puts the parts of one extraction together, in `folder`. `check` is called between the pieces and may raise."""

    def __init__(
        self, store: ArtifactStore, parts: Sequence[Part], folder: Path, check: Callable[[], None] = lambda: None
    ) -> None:
        self._store = store
        self._parts = parts
        self._results = [part.result for part in parts]
        self._folder = folder
        self._check = check

    async def join(self, most_bytes: int) -> dict[str, Any]:
        """The result, as of an engine that ran all inputs by itself.

        Raises `TooLarge` beyond `most_bytes`, and `InternalError` for parts of which one was made otherwise.
        """
        first = self._results[0]
        provenance = self._provenance()
        lengths = [result["shape"][-3] for result in self._results]
        shape = [*first["shape"][:-3], sum(lengths), *first["shape"][-2:]]
        shapes = {
            "offsets": (sum(result["inputs"] for result in self._results) + 1,),
            "token_ids": (sum(result["tensors"]["token_ids"]["shape"][0] for result in self._results),),
            "hidden_states": tuple(shape),
        }
        header, places = lay_out(
            {name: (first["tensors"][name]["dtype"], shapes[name]) for name in _TENSORS}, texts_of(provenance)
        )
        size = places["hidden_states"].nbytes
        if size > most_bytes:
            raise TooLarge(
                f"the result would take {size} bytes, the limit is {most_bytes}: ask for fewer layers or inputs, pool, "
                "or choose dtype float16",
                bytes=size,
                limit=most_bytes,
            )
        path = self._folder / "joined.safetensors"
        path.unlink(missing_ok=True)
        await self._fill(path, header, places)
        choices = await self._choices() if first.get("choices") is not None else None
        return {
            **first,
            "path": str(path),
            "bytes": len(header) + sum(place.nbytes for place in places.values()),
            "header_bytes": len(header),
            "tensors": {name: place.to_wire() for name, place in places.items()},
            "shape": shape,
            "inputs": shapes["offsets"][0] - 1,
            "provenance": provenance,
            "relative_change": self._relative_change(),
            "choices": choices,
            **{name: _sums(result[name] for result in self._results) for name in ("tokens", "cache") if name in first},
        }

    def _provenance(self) -> dict[str, Any]:
        """What all numbers depend on. Versions of libraries may differ from worker to worker: then each is named."""
        found = [result["provenance"] for result in self._results]
        plain = [{name: value for name, value in one.items() if name != "versions"} for one in found]
        if any(one != plain[0] for one in plain):
            raise InternalError("The job's parts ran on models that differ from worker to worker; submit it again.")
        versions: dict[str, dict[str, None]] = {}
        for one in found:
            for name, version in one["versions"].items():
                versions.setdefault(name, {})[version] = None
        return {**found[0], "versions": {name: ", ".join(map(str, each)) for name, each in versions.items()}}

    def _relative_change(self) -> list[list[float | None]] | None:
        """Means over all vectors, from the parts' sums and counts."""
        first = self._results[0]
        if first.get("change") is None:
            found: list[list[float | None]] | None = first.get("relative_change")
            return found
        changes = [[0.0] * len(first["layers"])]
        for variant in range(len(first["change"])):
            sums, counts = (
                np.sum([result["change"][variant][name] for result in self._results], axis=0)
                for name in ("sums", "counts")
            )
            changes.append([float(each / many) if many else None for each, many in zip(sums, counts, strict=True)])  # type: ignore[misc]
        return changes  # type: ignore[return-value]

    # --- the file ---

    async def _fill(self, path: Path, header: bytes, places: dict[str, TensorPlace]) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            size = len(header) + sum(place.nbytes for place in places.values())
            try:
                await asyncio.to_thread(reserve, descriptor, size)
            except OSError as error:
                if (problem := no_room_for(size, path, error)) is not None:
                    raise problem from error
                raise
            await asyncio.to_thread(_write, descriptor, header, 0)
            at = {name: places[name].offset for name in ("offsets", "token_ids")}
            await asyncio.to_thread(_write, descriptor, bytes(8), at["offsets"])
            at["offsets"] += 8
            tokens, filled = 0, 0
            for part in self._parts:
                tensors = part.result["tensors"]
                begin, end = _span(tensors["offsets"])
                async for piece in self._read(part, "states", begin + 8, end):
                    data = (np.frombuffer(piece, "<i8") + tokens).astype("<i8").tobytes()
                    await asyncio.to_thread(_write, descriptor, data, at["offsets"])
                    at["offsets"] += len(data)
                tokens += part.result["tokens"]["kept"]
                at["token_ids"] = await self._copy(
                    part, "states", _span(tensors["token_ids"]), descriptor, at["token_ids"]
                )
                filled += await self._copy_states(part, descriptor, places["hidden_states"], filled)
        finally:
            os.close(descriptor)

    async def _copy_states(self, part: Part, descriptor: int, place: TensorPlace, filled: int) -> int:
        """The part's rows of each variant behind those before; bytes of them of one variant."""
        begin, end = _span(part.result["tensors"]["hidden_states"])
        variants = place.shape[0] if len(place.shape) == 4 else 1
        whole, own = place.nbytes // variants, (end - begin) // variants
        for variant in range(variants):
            span = (begin + variant * own, begin + (variant + 1) * own)
            await self._copy(part, "states", span, descriptor, place.offset + variant * whole + filled)
        return own

    async def _copy(self, part: Part, role: str, span: tuple[int, int], descriptor: int, at: int) -> int:
        """Bytes of a part's file to where they belong; where they end there."""
        local = self._store.local_path(part.keys[role])
        if local is not None:
            for start in range(*span, 16 * CHUNK_BYTES):
                self._check()
                stop = min(start + 16 * CHUNK_BYTES, span[1])
                await asyncio.to_thread(_copy_file, local, start, stop, descriptor, at + start - span[0])
            return at + span[1] - span[0]
        async for piece in self._read(part, role, *span):
            await asyncio.to_thread(_write, descriptor, piece, at)
            at += len(piece)
        return at

    async def _read(self, part: Part, role: str, start: int, end: int) -> AsyncIterator[memoryview]:
        async for piece in self._store.stream(part.keys[role], start, end):
            self._check()
            yield piece

    # --- scores of choices ---

    async def _choices(self) -> dict[str, Any]:
        """Lines of one variant after those of another, and where each begins."""
        path, index = self._folder / "joined.choices.jsonl", self._folder / "joined.choices.index"
        scored = [result["choices"]["scored"] for result in self._results]
        indices = []
        for part in self._parts:
            data = [piece async for piece in self._read(part, "choices_index", 0, await self._size(part))]
            indices.append(np.frombuffer(b"".join(data), "<i8"))
        at = 0
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            with index.open("wb") as file:
                file.write(bytes(8))
                for variant in range(len(scored[0])):
                    for part, starts in zip(self._parts, indices, strict=True):
                        inputs = part.result["inputs"]
                        here = starts[variant * inputs : (variant + 1) * inputs + 1]
                        file.write((here[1:] - here[0] + at).astype("<i8").tobytes())
                        at = await self._copy(part, "choices", (int(here[0]), int(here[-1])), descriptor, at)
        finally:
            os.close(descriptor)
        return {
            "choices_path": str(path),
            "choices_index_path": str(index),
            "scored": [_scored([one[variant] for one in scored]) for variant in range(len(scored[0]))],
        }

    async def _size(self, part: Part) -> int:
        size = await self._store.size(part.keys["choices_index"])
        if size is None:
            raise FileNotFoundError(part.keys["choices_index"])
        return size


def _scored(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts add up, the mean confidence is over all that were answered."""
    total = _sums(parts)
    weighted = sum(part["confidence"] * part["answered"] for part in parts)
    return {**total, "confidence": weighted / total["answered"] if total["answered"] else 0.0}


def _sums(counts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for one in counts:
        for name, value in one.items():
            found[name] = found.get(name, 0) + value
    return found


def _span(place: dict[str, Any]) -> tuple[int, int]:
    return place["offset"], place["offset"] + place["bytes"]


def _write(descriptor: int, data: bytes | memoryview, at: int) -> None:
    view = memoryview(data)
    while len(view):
        written = os.pwrite(descriptor, view, at)
        at, view = at + written, view[written:]


def _copy_file(path: Path, start: int, end: int, descriptor: int, at: int) -> None:
    with path.open("rb", buffering=0) as file:
        while start < end:
            data = os.pread(file.fileno(), min(CHUNK_BYTES, end - start), start)
            if not data:
                raise InternalError("A part of the job's result is shorter than it was.")
            _write(descriptor, data, at)
            start, at = start + len(data), at + len(data)
