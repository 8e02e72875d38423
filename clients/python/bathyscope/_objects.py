"""What jobs make, as objects: the fields of the wire types, and what can be done with them.

Each comes twice, `Extraction` and `AsyncExtraction`; the second has the same methods to be awaited.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

from pydantic import BaseModel, PrivateAttr

from bathyscope import _operations, types
from bathyscope._choices import Choices, fetch_choices
from bathyscope._connection import AsyncConnection, Connection
from bathyscope._export import export
from bathyscope._fields import InputLike, PredictFields, Reference, identify, predict_body
from bathyscope._http import Operation, Retry, path
from bathyscope._progress import Report, progress_bar
from bathyscope._results import Tensors, array_of, chosen_rows, fetch_tensors, per_input, save, selection
from bathyscope.errors import InvalidRequest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bathyscope._probe_file import FittedProbe

M = TypeVar("M", bound=BaseModel)

Rows = range | slice | int | str
"""A run of inputs: `slice(0, 100)`, `range(100)`, one index, or `"0-99"` as in the HTTP interface."""


class Bound(BaseModel):
    """An object that knows the connection it came from."""

    _connection: Any = PrivateAttr()


def bind(thing: M, connection: Connection | AsyncConnection) -> M:
    """`thing`, with the connection it came from where it has use for one."""
    if isinstance(thing, Bound):
        thing._connection = connection
    return thing


class Resource(types.AnswerModel):
    """Something of the service's of which this version of the client knows only that it has an id; every further
    member of the answer is an attribute."""

    id: str


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


class _Adapter(types.Adapter, Bound):
    @property
    def _path(self) -> str:
        return path("v1", "adapters", self.id)


class Adapter(_Adapter):
    """An adapter that the service holds."""

    _connection: Connection = PrivateAttr()

    def export(self, path: str | os.PathLike[str]) -> Path:
        """Write the adapter as PEFT loads it: a folder, or a tar file when `path` ends in `.tar`."""
        return self._connection.run(export(self._path, self._connection.retry, path))

    def delete(self) -> None:
        """Delete the adapter from the service."""
        self._connection.run(_operations.delete(self._path, self._connection.retry))


class AsyncAdapter(_Adapter):
    """An adapter that the service holds."""

    _connection: AsyncConnection = PrivateAttr()

    async def export(self, path: str | os.PathLike[str]) -> Path:
        """As `Adapter.export`."""
        return await self._connection.run(export(self._path, self._connection.retry, path))

    async def delete(self) -> None:
        """Delete the adapter from the service."""
        await self._connection.run(_operations.delete(self._path, self._connection.retry))


class _Prediction(types.Prediction, Bound):
    @property
    def _path(self) -> str:
        return path("v1", "predictions", self.id)

    def array(self) -> NDArray[Any]:
        """`probabilities` as an array, float64, `(inputs, classes)`; of a regression `values`, `(inputs,)`."""
        import numpy as np

        if self.task == "regression":
            return np.asarray(self.values, dtype=np.float64)
        return np.asarray(self.probabilities, dtype=np.float64).reshape(len(self.probabilities), -1)


class Prediction(_Prediction):
    """What a probe says of texts."""

    _connection: Connection = PrivateAttr()

    def delete(self) -> None:
        """Delete the prediction from the service."""
        self._connection.run(_operations.delete(self._path, self._connection.retry))


class AsyncPrediction(_Prediction):
    """What a probe says of texts."""

    _connection: AsyncConnection = PrivateAttr()

    async def delete(self) -> None:
        """Delete the prediction from the service."""
        await self._connection.run(_operations.delete(self._path, self._connection.retry))


class _Probe(types.Probe, Bound):
    @staticmethod
    def load(path: str | os.PathLike[str]) -> FittedProbe:
        """The probe in a safetensors file, for predictions here, without a service: `.predict(states)` needs numpy
        alone and gives the bits that the service gives. Raises `errors.ProbeFormatError`."""
        from bathyscope._probe_file import FittedProbe

        return FittedProbe.load(Path(path))

    @property
    def _path(self) -> str:
        return path("v1", "probes", self.id)

    def _save(
        self, retry: Retry, destination: str | os.PathLike[str], format: types.WeightsFormat | None
    ) -> Operation[Path]:
        suffix = Path(destination).suffix.lower()
        kind = format or {".onnx": "onnx", ".md": "card"}.get(suffix, "safetensors")
        return (yield from save(f"{self._path}/weights", retry, destination, query={"format": kind}))

    def _predict(
        self,
        model: type[M],
        retry: Retry,
        body: dict[str, Any],
        timeout: float | None,
        report: Report | None,
    ) -> Operation[M]:
        # Most predictions are short: the first request already waits for the end, unless someone watches.
        hold = 30.0 if timeout is None else min(30.0, timeout)
        target = f"{self._path}/predict"
        job = yield from _operations.submit(target, body, retry, wait=hold if report is None else 0.0)
        job = yield from _operations.wait(job, retry, timeout=timeout, report=report)
        return (yield from _operations.get(model, _operations.outcome(job), retry))

    def _weights(self, connection: Connection | AsyncConnection) -> Operation[dict[str, NDArray[Any]]]:
        tensors = yield from fetch_tensors(
            f"{self._path}/weights", connection.retry, cache_dir=connection.target.cache_dir, query={}
        )
        return {name: tensors.array(name) for name in tensors.names}


class Probe(_Probe):
    """A trained probe."""

    _connection: Connection = PrivateAttr()

    def predict(
        self,
        inputs: Iterable[InputLike] | None = None,
        *,
        extraction: Reference | None = None,
        timeout: float | None = None,
        progress: bool = False,
        **fields: Unpack[PredictFields],
    ) -> Prediction:
        """What the probe says of new `inputs`, extracted under its own identity, or of an `extraction` that exists.

        Waits for the answer, at most `timeout` seconds (`WaitTimeout`). `client.predictions.create` gives the job
        instead. Raises `IdentityMismatch` for states of another identity, unless `transfer=True`.
        """
        body = predict_body(inputs, extraction, fields)
        with progress_bar(progress) as report:
            prediction = self._connection.run(self._predict(Prediction, self._connection.retry, body, timeout, report))
        return bind(prediction, self._connection)

    def weights(self) -> dict[str, NDArray[Any]]:
        """The probe's arrays by name, with its scaling."""
        return self._connection.run(self._weights(self._connection))

    def save_weights(self, path: str | os.PathLike[str], format: types.WeightsFormat | None = None) -> Path:
        """Write the probe as a safetensors file (`Probe.load` reads it), as an ONNX model, or its model card as
        Markdown; without a `format` the suffix says which, `.onnx`, `.md`, or any other for safetensors."""
        return self._connection.run(self._save(self._connection.retry, path, format))

    def delete(self) -> None:
        """Delete the probe from the service."""
        self._connection.run(_operations.delete(self._path, self._connection.retry))


class AsyncProbe(_Probe):
    """A trained probe."""

    _connection: AsyncConnection = PrivateAttr()

    async def predict(
        self,
        inputs: Iterable[InputLike] | None = None,
        *,
        extraction: Reference | None = None,
        timeout: float | None = None,
        progress: bool = False,
        **fields: Unpack[PredictFields],
    ) -> AsyncPrediction:
        """As `Probe.predict`."""
        body = predict_body(inputs, extraction, fields)
        with progress_bar(progress) as report:
            prediction = await self._connection.run(
                self._predict(AsyncPrediction, self._connection.retry, body, timeout, report)
            )
        return bind(prediction, self._connection)

    async def weights(self) -> dict[str, NDArray[Any]]:
        """As `Probe.weights`."""
        return await self._connection.run(self._weights(self._connection))

    async def save_weights(self, path: str | os.PathLike[str], format: types.WeightsFormat | None = None) -> Path:
        """As `Probe.save_weights`."""
        return await self._connection.run(self._save(self._connection.retry, path, format))

    async def delete(self) -> None:
        """Delete the probe from the service."""
        await self._connection.run(_operations.delete(self._path, self._connection.retry))
