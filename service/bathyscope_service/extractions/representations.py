"""Hidden states as safetensors, npy, Arrow or JSON.

Safetensors and npy are rows of pieces of the artifact: whole results and ranges of rows are contiguous there.

The states of a paired extraction are `[variants, vectors, layers, hidden]`: a run of rows is a piece of each variant.

Formats: safetensors (8 bytes length, JSON header, data), NPY 1.0 (NEP 1), the Arrow IPC stream.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from itertools import chain, product
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from bathyscope.errors import FieldError, InvalidRequest, NotAcceptable, TooLarge
from bathyscope_backplane.artifacts import ArtifactStore, Resource
from bathyscope_backplane.artifacts._store import CHUNK_BYTES
from bathyscope_service.extractions.pieces import Cut, Pieces, Tensor

MEDIA_TYPES = {
    "safetensors": "application/vnd.safetensors",
    "npy": "application/x-npy",
    "arrow": "application/vnd.apache.arrow.stream",
    "json": "application/json",
}
_INTEGERS = {"type": "array", "items": {"type": "integer"}}
STATES_SCHEMA = {
    "type": "object",
    "description": "Hidden states as JSON.",
    "required": ["shape", "dtype", "layers", "rows", "hidden_states", "token_ids", "offsets"],
    "properties": {
        "shape": {**_INTEGERS, "description": "Of `hidden_states`."},
        "dtype": {"type": "string", "enum": ["float32", "float16"], "description": "Of the stored numbers."},
        "layers": {**_INTEGERS, "description": "Layer numbers along the second axis."},
        "rows": {**_INTEGERS, "description": "First and last input, inclusive."},
        "hidden_states": {
            "type": "array",
            "items": {"type": "array", "items": {"type": "array"}},
            "description": "`[inputs, layers, hidden]`, of a paired extraction `[variants, inputs, layers, hidden]`; "
            "null stands for what JSON cannot say.",
        },
        "token_ids": {**_INTEGERS, "description": "Of all inputs, one after the other."},
        "offsets": {**_INTEGERS, "description": "Where each input's tokens begin, and their end."},
    },
}
"""Of the representation `json`, for the OpenAPI document."""

_JSON_TIMES = 8
"""Bytes of memory that JSON takes for a byte of its numbers: two as float16 are written with up to twelve letters."""
_ARROW_TIMES = 4
"""The same for Arrow: the bytes read, the array, the batch, and the text of it that is being sent."""

Hold = Callable[[int], None]
"""Told how many bytes of memory are about to be taken; raises when there are none left."""


def nothing(size: int) -> None:
    """A `Hold` that counts nothing."""


_NUMPY: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
}


@dataclass(frozen=True, slots=True)
class Selection:
    """Which part of an extraction is asked for."""

    layers: list[int] | None
    """Positions along the layer axis, null for all of them."""

    rows: tuple[int, int]
    """Inputs `[first, last)`."""

    whole: bool
    """Neither layers nor rows were restricted."""


class States:
    """The artifact of one extraction, opened for reading."""

    def __init__(self, store: ArtifactStore, resource: Resource) -> None:
        self._store = store
        self._blob = resource.blobs["states"]
        self._tensors = {name: Tensor(**entry) for name, entry in resource.private["layout"].items()}
        self._ragged = resource.body["pooling"] == "none"
        self._layers: list[int] = resource.body["layers"]
        self._num_layers: int = resource.body["num_layers"]
        self._inputs: int = resource.body["inputs"]
        self._metadata: dict[str, str] = resource.private.get("metadata", {})

    def select(self, layers: str | None, rows: str | None) -> Selection:
        """Read the query parameters `layers=8,16` and `rows=0-99`. Raises `InvalidRequest`."""
        chosen = None if layers is None else [self._position(text.strip()) for text in layers.split(",")]
        if chosen is not None and len(set(chosen)) != len(chosen):
            raise _invalid("/layers", "a layer is named twice")
        first, last = (0, self._inputs) if rows is None else row_range(rows, self._inputs)
        return Selection(chosen, (first, last), whole=layers is None and rows is None)

    def _position(self, text: str) -> int:
        try:
            layer = int(text[:12])
        except ValueError:
            layer = self._num_layers + 1
        layer = layer + self._num_layers + 1 if layer < 0 else layer
        if layer not in self._layers:
            known = ", ".join(map(str, self._layers[:40]))
            raise _invalid("/layers", f"this extraction holds the layers {known}, not {text[:20]!r}")
        return self._layers.index(layer)

    def etag(self, format: str, selection: Selection) -> str:
        """A strong validator of one representation."""
        what = f"{self._blob.sha256}|{format}|{selection.layers}|{selection.rows}"
        return f'"{hashlib.sha256(what.encode()).hexdigest()[:40]}"'

    async def pieces(self, format: str, selection: Selection) -> Pieces:
        """A representation of known length: safetensors or npy."""
        if format == "safetensors":
            return await self._safetensors(selection)
        states = self._tensors["hidden_states"]
        vectors = await self._vectors(selection)
        shape = self._shape(selection, vectors)
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            head, {"descr": _NUMPY[states.dtype].str, "fortran_order": False, "shape": tuple(shape)}
        )
        return Pieces(self._store, self._blob.key, [head.getvalue(), *self._cuts(states, selection, vectors)])

    async def _safetensors(self, selection: Selection) -> Pieces:
        if selection.whole:
            return Pieces(self._store, self._blob.key, [Cut(0, self._blob.bytes)])
        first, last = await self._tokens(*selection.rows)
        offsets = (await self._offsets(*selection.rows)) - first
        tokens = self._tensors["token_ids"]
        states = self._tensors["hidden_states"]
        vectors = await self._vectors(selection)
        parts: list[list[bytes | Cut]] = [
            [*self._cuts(states, selection, vectors)],
            [Cut(tokens.start + first * 8, tokens.start + last * 8)],
            [offsets.astype("<i8").tobytes()],
        ]
        layers = self._layers if selection.layers is None else [self._layers[index] for index in selection.layers]
        metadata = {
            **self._metadata,
            "layers": json.dumps(layers),
            "rows": f"{selection.rows[0]}-{selection.rows[1] - 1}",
        }
        header: dict[str, Any] = {"__metadata__": metadata}
        position = 0
        for (name, dtype, shape), part in zip(
            (
                ("hidden_states", states.dtype, self._shape(selection, vectors)),
                ("token_ids", "I64", [last - first]),
                ("offsets", "I64", [len(offsets)]),
            ),
            parts,
            strict=True,
        ):
            length = sum(map(len, part))
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + length]}
            position += length
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return Pieces(self._store, self._blob.key, [len(text).to_bytes(8, "little") + text, *chain(*parts)])

    async def arrow(self, selection: Selection, limit: int, hold: Hold = nothing) -> AsyncIterator[bytes]:
        """The Arrow IPC stream, one row an input: `index`, `token_ids`, `hidden_states`; of a paired extraction one for
        each variant of it, with a column `variant` that counts them, all inputs of one variant before the next.

        `hidden_states` is the row's numbers, flat: `[layers, hidden]`, with pooling none `[tokens, layers, hidden]`;
        the shape stands in the schema's metadata. A record batch is made in memory and holds one input at least:
        raises `TooLarge` when the largest has more than `limit` bytes. `hold` is told how much memory that takes.
        """
        groups = await self._row_groups(selection)
        largest = max((size for _, _, size in groups), default=0)
        if largest > limit:
            raise TooLarge(
                f"The largest input has {largest:,} bytes of states and Arrow is given up to {limit:,} for one; ask "
                "for safetensors or npy, which have no such bound.",
                estimate=largest,
                limit=limit,
            )
        hold(_ARROW_TIMES * largest)
        return self._arrow(selection, [(first, last) for first, last, _ in groups])

    async def _arrow(self, selection: Selection, groups: list[tuple[int, int]]) -> AsyncIterator[bytes]:
        states = self._tensors["hidden_states"]
        layers = len(self._layers) if selection.layers is None else len(selection.layers)
        width = layers * states.shape[-1]
        paired = len(states.shape) == 4
        value = pa.from_numpy_dtype(_NUMPY[states.dtype])
        kind = pa.large_list(value) if self._ragged else pa.list_(value, width)
        schema = pa.schema(
            [
                *([("variant", pa.int64())] if paired else []),
                ("index", pa.int64()),
                ("token_ids", pa.large_list(pa.int64())),
                ("hidden_states", kind),
            ],
            metadata={**self._metadata, "row_shape": json.dumps([-1, layers, states.shape[-1]][not self._ragged :])},
        )
        sink = io.BytesIO()
        with pa.ipc.new_stream(sink, schema) as writer:
            for variant, (first, last) in product(range(states.variants), groups):
                offsets = await self._offsets(first, last)
                numbers = await self._array(selection, first, last, offsets, variant)
                ids = await self._numbers("token_ids", int(offsets[0]), int(offsets[-1]))
                relative = offsets - offsets[0]
                column = (
                    pa.LargeListArray.from_arrays(pa.array(relative * width), pa.array(numbers.reshape(-1)))
                    if self._ragged
                    else pa.FixedSizeListArray.from_arrays(pa.array(numbers.reshape(-1)), width)
                )
                tokens = pa.LargeListArray.from_arrays(pa.array(relative), pa.array(ids))
                counts = [pa.array([variant] * (last - first), pa.int64())] if paired else []
                index = pa.array(range(first, last), pa.int64())
                writer.write_batch(pa.record_batch([*counts, index, tokens, column], schema=schema))
                yield sink.getvalue()
                sink.seek(0)
                sink.truncate()
        yield sink.getvalue()

    async def json(self, selection: Selection, limit: int, hold: Hold = nothing) -> bytes:
        """Everything as JSON, below a limit in bytes of states and token ids. Raises `TooLarge`.

        `hold` is told how much memory that takes.
        """
        states = self._tensors["hidden_states"]
        vectors = await self._vectors(selection)
        shape = self._shape(selection, vectors)
        low, high = await self._tokens(*selection.rows)
        size = int(np.prod(shape)) * _NUMPY[states.dtype].itemsize + 8 * (high - low + shape[-3] + 1)
        if size > limit:
            raise TooLarge(
                f"The result has {size:,} bytes and JSON is given up to {limit:,}; ask for safetensors, npy or arrow, "
                "or for fewer layers or rows.",
                estimate=size,
                limit=limit,
            )
        hold(_JSON_TIMES * size)
        first, last = selection.rows
        offsets = await self._offsets(first, last)
        arrays = [await self._array(selection, first, last, offsets, number) for number in range(states.variants)]
        numbers = np.stack(arrays) if len(shape) == 4 else arrays[0]
        return orjson.dumps(
            {
                "shape": shape,
                "dtype": str(numbers.dtype),
                "layers": self._layers if selection.layers is None else [self._layers[i] for i in selection.layers],
                "rows": [first, last - 1],
                "hidden_states": np.ascontiguousarray(numbers),
                "token_ids": await self._numbers("token_ids", int(offsets[0]), int(offsets[-1])),
                "offsets": offsets - offsets[0],
            },
            option=orjson.OPT_SERIALIZE_NUMPY,
        )

    def require(self, format: str) -> None:
        """Raise `NotAcceptable` for a format that these states are not given in."""
        if format != "safetensors" and self._tensors["hidden_states"].dtype == "BF16":
            raise NotAcceptable("bfloat16 is given as safetensors only; ask for format=safetensors, or dtype float32.")

    def _shape(self, selection: Selection, vectors: tuple[int, int]) -> list[int]:
        states = self._tensors["hidden_states"]
        layers = states.shape[-2] if selection.layers is None else len(selection.layers)
        return [*states.shape[:-3], vectors[1] - vectors[0], layers, states.shape[-1]]

    def _cuts(self, states: Tensor, selection: Selection, vectors: tuple[int, int]) -> Iterator[Cut]:
        """What is chosen of each variant."""
        for variant in range(states.variants):
            start, end = (states.place(variant, vector) for vector in vectors)
            if selection.layers is None:
                yield Cut(start, end)
            else:
                chosen = tuple(selection.layers)
                yield Cut(start, end, row_bytes=states.row_bytes, parts=states.shape[-2], chosen=chosen)

    async def _vectors(self, selection: Selection) -> tuple[int, int]:
        """Vectors `[first, last)`."""
        return await self._tokens(*selection.rows) if self._ragged else selection.rows

    async def _tokens(self, first: int, last: int) -> tuple[int, int]:
        if (first, last) == (0, self._inputs):
            return 0, self._tensors["token_ids"].shape[0]
        offsets = await self._offsets(first, last)
        return int(offsets[0]), int(offsets[-1])

    async def _offsets(self, first: int, last: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        return await self._numbers("offsets", first, last + 1)

    async def _numbers(self, name: str, first: int, last: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        tensor = self._tensors[name]
        data = await self._store.read(self._blob.key, tensor.start + first * 8, tensor.start + last * 8)
        return np.frombuffer(data, "<i8")

    async def _array(
        self, selection: Selection, first: int, last: int, offsets: np.ndarray[Any, np.dtype[np.int64]], variant: int
    ) -> np.ndarray[Any, Any]:
        """The numbers of inputs `[first, last)` of a variant: `(vectors, layers, hidden)`."""
        states = self._tensors["hidden_states"]
        low, high = (int(offsets[0]), int(offsets[-1])) if self._ragged else (first, last)
        data = await self._store.read(self._blob.key, states.place(variant, low), states.place(variant, high))
        whole = np.frombuffer(data, _NUMPY[states.dtype]).reshape(high - low, *states.shape[-2:])
        return whole if selection.layers is None else whole[:, selection.layers]

    async def _row_groups(self, selection: Selection) -> list[tuple[int, int, int]]:
        """First input, input after the last, and bytes of groups of some megabytes; a larger input is one by itself."""
        row_bytes = self._tensors["hidden_states"].row_bytes
        first, last = selection.rows
        offsets = await self._offsets(first, last)
        tokens = offsets - offsets[0]
        vectors = tokens if self._ragged else np.arange(len(tokens))
        ends = vectors * row_bytes + tokens * 8  # bytes before each input, of states and token ids
        groups, start = [], 0
        while start < last - first:
            stop = max(start + 1, int(np.searchsorted(ends, ends[start] + CHUNK_BYTES, "right")) - 1)
            groups.append((first + start, first + stop, int(ends[stop] - ends[start])))
            start = stop
        return groups


def row_range(text: str, inputs: int) -> tuple[int, int]:
    """Inputs `[first, last)` of the query parameter `rows=0-99`, inclusive. Raises `InvalidRequest`."""
    first, _, last = text.partition("-")
    if not (first.isascii() and first.isdigit() and len(first) < 12) or (
        last and not (last.isascii() and last.isdigit() and len(last) < 12)
    ):
        raise _invalid("/rows", "give rows as first-last, counted from 0, both inclusive, such as 0-99")
    start, stop = int(first), int(last or first)
    if stop < start or stop >= inputs:
        raise _invalid("/rows", f"there are the inputs 0-{inputs - 1}, not {text[:30]!r}")
    return start, stop + 1


def _invalid(where: str, detail: str) -> InvalidRequest:
    return InvalidRequest("A parameter of the request is not valid.", errors=[FieldError(pointer=where, detail=detail)])
