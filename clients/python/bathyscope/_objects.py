"""What jobs make, as objects: the fields of the wire types, and what can be done with them.

Each comes twice, `Probe` and `AsyncProbe`; the second has the same methods to be awaited.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from pydantic import PrivateAttr

from bathyscope import _operations, types
from bathyscope._bound import Bound, M, bind
from bathyscope._connection import AsyncConnection, Connection
from bathyscope._export import export
from bathyscope._fields import InputLike, PredictFields, Reference, predict_body
from bathyscope._http import Operation, Retry, path
from bathyscope._progress import Report, progress_bar
from bathyscope._results import fetch_tensors, save

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bathyscope._probe_file import FittedProbe


class Resource(types.AnswerModel):
    """Something of the service's of which this version of the client knows only that it has an id; every further
    member of the answer is an attribute."""

    id: str


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
