"""Extractions as objects: what was made, and its numbers, fetched when they are asked for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import PrivateAttr

from bathyscope import _operations, types
from bathyscope._bound import Bound
from bathyscope._choices import Choices, fetch_choices
from bathyscope._connection import AsyncConnection, Connection
from bathyscope._fields import Reference, identify
from bathyscope._http import Operation, Retry, path
from bathyscope._results import Tensors, array_of, chosen_rows, fetch_tensors, per_input, save, selection
from bathyscope.errors import InvalidRequest

if TYPE_CHECKING:
    from numpy.typing import NDArray

Rows = range | slice | int | str
"""A run of inputs: `slice(0, 100)`, `range(100)`, one index, or `"0-99"` as in the HTTP interface."""


class _Extraction(types.Extraction, Bound):
    """The operations that both kinds share."""

    _tensors: Tensors | None = PrivateAttr(default=None)

    @property
    def _path(self) -> str:
        return path("v1", "extractions", self.id)

    def _fetch(
        self,
        connection: Connection | AsyncConnection,
        query: dict[str, str],
        keep_at: str | os.PathLike[str] | None,
    ) -> Operation[Tensors]:
        """A whole artifact is fetched once, a part each time."""
        if self._tensors is not None and not query and keep_at is None:
            return self._tensors
        tensors = yield from fetch_tensors(
            f"{self._path}/hidden_states",
            connection.retry,
            cache_dir=connection.target.cache_dir,
            query={"format": "safetensors", **query},
            sha256=None if query else self.sha256,
            keep_at=keep_at,
        )
        if not query:
            self._tensors = tensors
        return tensors

    def _array(
        self,
        connection: Connection | AsyncConnection,
        name: str,
        query: dict[str, str] | None = None,
        keep_at: str | os.PathLike[str] | None = None,
    ) -> Operation[NDArray[Any]]:
        tensors = yield from self._fetch(connection, query or {}, keep_at)
        return (yield from array_of(tensors, name))

    def _by_input(self, connection: Connection | AsyncConnection) -> Operation[Iterator[NDArray[Any]]]:
        states = yield from self._array(connection, "hidden_states")
        offsets = (yield from self._array(connection, "offsets")) if self.pooling == "none" else None
        return per_input(states, offsets)

    def _choices(self, retry: Retry, rows: Rows | None, variant: Reference | None) -> Operation[Choices]:
        first, last = chosen_rows(rows, self.inputs)
        query = {} if variant is None else {"variant": str(identify(variant))}
        return (yield from fetch_choices(f"{self._path}/choices", retry, query=query, first=first, last=last))

    def _save(
        self,
        connection: Connection | AsyncConnection,
        destination: str | os.PathLike[str],
        format: types.Format | None,
        query: dict[str, str],
    ) -> Operation[Path]:
        kind = format or Path(destination).suffix.removeprefix(".")
        if kind not in ("safetensors", "npy", "arrow", "json"):
            raise InvalidRequest(
                f"the format of {os.fspath(destination)!r} is not clear; give format as safetensors, npy, arrow or json"
            )
        whole = kind == "safetensors" and not query
        return (
            yield from save(
                f"{self._path}/hidden_states",
                connection.retry,
                destination,
                query={"format": kind, **query},
                sha256=self.sha256 if whole else None,
            )
        )


class Extraction(_Extraction):
    """Hidden states that were made; the numbers are fetched when they are asked for."""

    _connection: Connection = PrivateAttr()

    def hidden_states(
        self,
        layers: str | Iterable[Any] | None = None,
        rows: Rows | None = None,
        path: str | os.PathLike[str] | None = None,
    ) -> NDArray[Any]:
        """The states, `(inputs, layers, hidden)`; with pooling none `(tokens, layers, hidden)`; of a paired extraction
        with an axis of variants before these.

        `layers` (layer numbers as they were asked for) and `rows` (inputs) fetch a part. More than 32 MB is streamed to
        disk and mapped; `path` names a safetensors file to keep, otherwise the space is free again with the last array.
        bfloat16 comes as float32, exactly. Each call gives an array of its own, which may be written to.
        """
        query = selection(layers, rows, self.inputs)
        return self._connection.run(self._array(self._connection, "hidden_states", query, path))

    def token_ids(self) -> NDArray[Any]:
        """Ids of the tokens of all inputs in one row, int64; `offsets` says where each input begins."""
        return self._connection.run(self._array(self._connection, "token_ids"))

    def offsets(self) -> NDArray[Any]:
        """Where each input begins in `token_ids` (with pooling none in the states too), int64, `[inputs + 1]`."""
        return self._connection.run(self._array(self._connection, "offsets"))

    def choices(self, rows: Rows | None = None, variant: Reference | None = None) -> Choices:
        """What the model made of each question, of an extraction with `score_choices`; `.correct`, `.confidence` and
        others are arrays. `variant` names one of a paired extraction, `rows` a run of inputs."""
        return self._connection.run(self._choices(self._connection.retry, rows, variant))

    def by_input(self) -> Iterator[NDArray[Any]]:
        """Views of the states, one an input; with pooling none each `(tokens of the input, layers, hidden)`."""
        return self._connection.run(self._by_input(self._connection))

    def save(
        self,
        path: str | os.PathLike[str],
        format: types.Format | None = None,
        *,
        layers: str | Iterable[Any] | None = None,
        rows: Rows | None = None,
    ) -> Path:
        """Stream the states to a file, which is there only when it is complete; the suffix may name the format."""
        query = selection(layers, rows, self.inputs)
        return self._connection.run(self._save(self._connection, path, format, query))

    def delete(self) -> None:
        """Delete the extraction from the service."""
        self._connection.run(_operations.delete(self._path, self._connection.retry))


class AsyncExtraction(_Extraction):
    """Hidden states that were made; the numbers are fetched when they are asked for."""

    _connection: AsyncConnection = PrivateAttr()

    async def hidden_states(
        self,
        layers: str | Iterable[Any] | None = None,
        rows: Rows | None = None,
        path: str | os.PathLike[str] | None = None,
    ) -> NDArray[Any]:
        """As `Extraction.hidden_states`."""
        query = selection(layers, rows, self.inputs)
        return await self._connection.run(self._array(self._connection, "hidden_states", query, path))

    async def token_ids(self) -> NDArray[Any]:
        """As `Extraction.token_ids`."""
        return await self._connection.run(self._array(self._connection, "token_ids"))

    async def offsets(self) -> NDArray[Any]:
        """As `Extraction.offsets`."""
        return await self._connection.run(self._array(self._connection, "offsets"))

    async def choices(self, rows: Rows | None = None, variant: Reference | None = None) -> Choices:
        """As `Extraction.choices`."""
        return await self._connection.run(self._choices(self._connection.retry, rows, variant))

    async def by_input(self) -> Iterator[NDArray[Any]]:
        """As `Extraction.by_input`: `for states in await extraction.by_input()`."""
        return await self._connection.run(self._by_input(self._connection))

    async def save(
        self,
        path: str | os.PathLike[str],
        format: types.Format | None = None,
        *,
        layers: str | Iterable[Any] | None = None,
        rows: Rows | None = None,
    ) -> Path:
        """As `Extraction.save`."""
        query = selection(layers, rows, self.inputs)
        return await self._connection.run(self._save(self._connection, path, format, query))

    async def delete(self) -> None:
        """Delete the extraction from the service."""
        await self._connection.run(_operations.delete(self._path, self._connection.retry))
