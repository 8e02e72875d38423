"""The namespaces of `AsyncClient`: those of `_resources.py`, to be awaited."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any, Unpack

from bathyscope import _operations, types
from bathyscope._bound import bind
from bathyscope._connection import AsyncConnection
from bathyscope._extractions import AsyncExtraction
from bathyscope._fields import (
    AdapterFields,
    ComparisonFields,
    DatasetFields,
    ExtractionFields,
    InputLike,
    LoadFields,
    PredictFields,
    ProbeFields,
    Reference,
    adapter_body,
    comparison_body,
    dataset_upload,
    experiment_body,
    extraction_body,
    identify,
    predict_body,
    probe_body,
    request,
)
from bathyscope._http import path
from bathyscope._jobs import AsyncJobHandle
from bathyscope._objects import AsyncAdapter, AsyncPrediction, AsyncProbe


class _Namespace:
    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    async def _submit(
        self,
        target: str,
        body: Mapping[str, Any],
        wait: float = 0.0,
        idempotency_key: str | None = None,
        **rest: Any,
    ) -> AsyncJobHandle[Any]:
        retry = self._connection.retry
        operation = _operations.submit(target, body, retry, wait=wait, idempotency_key=idempotency_key, **rest)
        return AsyncJobHandle(self._connection, await self._connection.run(operation))

    async def _get(self, model: type[Any], target: str) -> Any:
        found = await self._connection.run(_operations.get(model, target, self._connection.retry))
        return bind(found, self._connection)

    async def _delete(self, target: str) -> None:
        await self._connection.run(_operations.delete(target, self._connection.retry))

    def _list(self, model: type[Any], target: str, limit: int | None, **query: str | None) -> AsyncIterator[Any]:
        pages = _operations.pages(model, target, self._connection.retry, limit=limit, query=query)
        return (bind(item, self._connection) async for item in self._connection.iterate(pages))


class AsyncModels(_Namespace):
    """Base models that the operator offers."""

    async def get(self, name: str) -> types.Model:
        """One model."""
        model: types.Model = await self._get(types.Model, path("v1", "models", name))
        return model

    async def load(self, name: str, **fields: Unpack[LoadFields]) -> AsyncJobHandle[types.Model]:
        """Have a worker load a model now; needs an admin key."""
        return await self._submit(path("v1", "models", name, "load"), request(types.LoadRequest, fields))

    async def unload(self, name: str, **fields: Unpack[LoadFields]) -> AsyncJobHandle[types.Model]:
        """Have the workers let go of a model; needs an admin key."""
        return await self._submit(path("v1", "models", name, "unload"), request(types.LoadRequest, fields))

    def list(self, limit: int | None = None) -> AsyncIterator[types.Model]:
        """Every model."""
        return self._list(types.Model, path("v1", "models"), limit)


class AsyncAdapters(_Namespace):
    """LoRA adapters."""

    async def create(
        self,
        *,
        source: str | None = None,
        file: str | os.PathLike[str] | None = None,
        wait: float = 0.0,
        idempotency_key: str | None = None,
        **fields: Unpack[AdapterFields],
    ) -> AsyncJobHandle[AsyncAdapter]:
        """Have the service fetch an adapter (`source`: `tinker://…`, `hf://…`, `s3://…` or `file://…`), or send it one
        (`file`: a tar, tar.gz or zip here); the other fields are those of `types.AdapterFields`.

        With a source of Tinker or the hub the client's `tinker_api_key` or `hf_token` goes along, for this job alone.
        """
        body, upload = adapter_body(source, file, fields)
        headers = self._connection.target.credentials(source or "")
        return await self._submit(path("v1", "adapters"), body, wait, idempotency_key, headers=headers, upload=upload)

    async def get(self, adapter_id: str) -> AsyncAdapter:
        """One adapter."""
        adapter: AsyncAdapter = await self._get(AsyncAdapter, path("v1", "adapters", adapter_id))
        return adapter

    async def delete(self, adapter_id: str) -> None:
        """Delete an adapter."""
        await self._delete(path("v1", "adapters", adapter_id))

    def list(self, limit: int | None = None) -> AsyncIterator[AsyncAdapter]:
        """One's adapters, newest first."""
        return self._list(AsyncAdapter, path("v1", "adapters"), limit)


class AsyncComparisons(_Namespace):
    """Variants of a model on the same tokens."""

    async def create(
        self, *, wait: float = 0.0, idempotency_key: str | None = None, **fields: Unpack[ComparisonFields]
    ) -> AsyncJobHandle[types.Comparison]:
        """Submit a comparison; the fields are those of `types.ComparisonRequest`, `wait` and `idempotency_key` as in
        `extractions.create`. `variants` are `base`, adapters and `tinker://RUN/*`; or give `quantizations`.

        With a run of Tinker the client's `tinker_api_key` goes along, for what has to be fetched.
        """
        body = comparison_body(fields)
        headers = self._connection.target.credentials(*(body.get("variants") or ()))
        return await self._submit(path("v1", "comparisons"), body, wait, idempotency_key, headers=headers)

    async def get(self, comparison_id: str) -> types.Comparison:
        """One comparison with its report."""
        comparison: types.Comparison = await self._get(types.Comparison, path("v1", "comparisons", comparison_id))
        return comparison

    async def delete(self, comparison_id: str) -> None:
        """Delete a comparison; the extractions that it read stay."""
        await self._delete(path("v1", "comparisons", comparison_id))

    def list(self, limit: int | None = None) -> AsyncIterator[types.Comparison]:
        """One's comparisons, newest first, without their reports."""
        return self._list(types.Comparison, path("v1", "comparisons"), limit)


class AsyncDatasets(_Namespace):
    """Rows that are uploaded once and named in requests."""

    async def create(
        self,
        *,
        file: str | os.PathLike[str],
        idempotency_key: str | None = None,
        **fields: Unpack[DatasetFields],
    ) -> types.Dataset:
        """Send a file of rows: JSONL, CSV or Parquet, as its name or `format` says. `columns` says which column is the
        `input` (or `prompt`, `choices`, `answer`), the `label`, the `group`, the `split`.

        Raises `InvalidRequest` that says which lines are faulty; nothing is kept then.
        """
        upload, retry = dataset_upload(file, fields), self._connection.retry
        send = _operations.send_file(
            types.Dataset, path("v1", "datasets"), upload, retry, idempotency_key=idempotency_key
        )
        return await self._connection.run(send)

    async def get(self, dataset_id: str) -> types.Dataset:
        """One dataset, without its rows."""
        dataset: types.Dataset = await self._get(types.Dataset, path("v1", "datasets", dataset_id))
        return dataset

    async def delete(self, dataset_id: str) -> None:
        """Delete a dataset; what was made with it stays."""
        await self._delete(path("v1", "datasets", dataset_id))

    def rows(self, dataset: Reference, limit: int | None = None) -> AsyncIterator[types.DatasetRow]:
        """Its rows, in the order of the file."""
        return self._list(types.DatasetRow, path("v1", "datasets", identify(dataset), "rows"), limit)

    def list(self, limit: int | None = None) -> AsyncIterator[types.Dataset]:
        """One's datasets, newest first."""
        return self._list(types.Dataset, path("v1", "datasets"), limit)


class AsyncExperiments(_Namespace):
    """Whole studies, each from one file."""

    async def create(
        self,
        config: str | os.PathLike[str] | Mapping[str, Any],
        *,
        wait: float = 0.0,
        idempotency_key: str | None = None,
    ) -> AsyncJobHandle[types.Experiment]:
        """Run a whole study: the path of a YAML or JSON file, or what it says as a mapping.

        With an adapter of Tinker or the hub the client's `tinker_api_key` or `hf_token` goes along, for it alone.
        """
        body, yaml, schemes = experiment_body(config)
        headers = self._connection.target.credentials(*schemes)
        return await self._submit(path("v1", "experiments"), body, wait, idempotency_key, headers=headers, yaml=yaml)

    async def get(self, experiment_id: str) -> types.Experiment:
        """One experiment with what it found."""
        experiment: types.Experiment = await self._get(types.Experiment, path("v1", "experiments", experiment_id))
        return experiment

    async def delete(self, experiment_id: str) -> None:
        """Delete an experiment; what its stages made stays."""
        await self._delete(path("v1", "experiments", experiment_id))

    def list(self, limit: int | None = None) -> AsyncIterator[types.Experiment]:
        """One's experiments, newest first."""
        return self._list(types.Experiment, path("v1", "experiments"), limit)


class AsyncExtractions(_Namespace):
    """Hidden states of texts."""

    async def create(
        self, *, wait: float = 0.0, idempotency_key: str | None = None, **fields: Unpack[ExtractionFields]
    ) -> AsyncJobHandle[AsyncExtraction]:
        """Submit an extraction; the fields are those of `types.ExtractionRequest`.

        `wait`: seconds (up to 60) for which this call may wait for the job's end, which spares short work a second
        request. The same `idempotency_key` and fields again within 24 h give the same job; without one, a key is
        made, so that a repeated request never makes two jobs.
        """
        return await self._submit(path("v1", "extractions"), extraction_body(fields), wait, idempotency_key)

    async def get(self, extraction_id: str) -> AsyncExtraction:
        """One extraction."""
        extraction: AsyncExtraction = await self._get(AsyncExtraction, path("v1", "extractions", extraction_id))
        return extraction

    async def delete(self, extraction_id: str) -> None:
        """Delete an extraction."""
        await self._delete(path("v1", "extractions", extraction_id))

    def list(self, limit: int | None = None) -> AsyncIterator[AsyncExtraction]:
        """One's extractions, newest first."""
        return self._list(AsyncExtraction, path("v1", "extractions"), limit)


class AsyncProbes(_Namespace):
    """Probes on hidden states."""

    async def create(
        self, *, wait: float = 0.0, idempotency_key: str | None = None, **fields: Unpack[ProbeFields]
    ) -> AsyncJobHandle[AsyncProbe]:
        """Submit the training of a probe; the fields are those of `types.ProbeRequest`, `wait` and
        `idempotency_key` as in `extractions.create`."""
        return await self._submit(path("v1", "probes"), probe_body(fields), wait, idempotency_key)

    async def get(self, probe_id: str) -> AsyncProbe:
        """One probe with its report."""
        probe: AsyncProbe = await self._get(AsyncProbe, path("v1", "probes", probe_id))
        return probe

    async def delete(self, probe_id: str) -> None:
        """Delete a probe."""
        await self._delete(path("v1", "probes", probe_id))

    def list(self, limit: int | None = None) -> AsyncIterator[AsyncProbe]:
        """One's probes, newest first."""
        return self._list(AsyncProbe, path("v1", "probes"), limit)


class AsyncPredictions(_Namespace):
    """What probes say of texts."""

    async def create(
        self,
        probe: Reference,
        inputs: Iterable[InputLike] | None = None,
        *,
        extraction: Reference | None = None,
        wait: float = 0.0,
        idempotency_key: str | None = None,
        **fields: Unpack[PredictFields],
    ) -> AsyncJobHandle[AsyncPrediction]:
        """Submit a prediction; `probe.predict` does the same and waits."""
        target = path("v1", "probes", identify(probe), "predict")
        return await self._submit(target, predict_body(inputs, extraction, fields), wait, idempotency_key)

    async def get(self, prediction_id: str) -> AsyncPrediction:
        """One prediction."""
        prediction: AsyncPrediction = await self._get(AsyncPrediction, path("v1", "predictions", prediction_id))
        return prediction

    async def delete(self, prediction_id: str) -> None:
        """Delete a prediction."""
        await self._delete(path("v1", "predictions", prediction_id))


class AsyncJobs(_Namespace):
    """Long work."""

    async def attach(self, job_id: str) -> AsyncJobHandle[Any]:
        """The handle of a job that is there already, as after a crash of the caller."""
        record = await self._connection.run(_operations.refresh(job_id, self._connection.retry))
        return AsyncJobHandle(self._connection, record)

    async def get(self, job_id: str) -> types.Job:
        """How a job stands."""
        return await self._connection.run(_operations.refresh(job_id, self._connection.retry))

    async def cancel(self, job_id: str) -> types.Job:
        """Cancel a job: at once if queued, at the next batch if running."""
        return await self._connection.run(_operations.cancel(job_id, self._connection.retry))

    async def replay(self, job_id: str) -> types.Job:
        """Put a failed job back into its queue; needs an admin key."""
        return await self._connection.run(_operations.replay(job_id, self._connection.retry))

    def list(
        self, *, kind: types.JobKind | None = None, status: types.JobStatus | None = None, limit: int | None = None
    ) -> AsyncIterator[types.Job]:
        """One's jobs, newest first."""
        return self._list(types.Job, path("v1", "jobs"), limit, kind=kind, status=status)
