"""The namespaces of `Client`, one class a noun. What they send is in `_fields.py` and `_operations.py`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Unpack

from bathyscope import _operations, types
from bathyscope._bound import bind
from bathyscope._connection import Connection
from bathyscope._extractions import Extraction
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
from bathyscope._jobs import JobHandle
from bathyscope._objects import Adapter, Prediction, Probe


class _Namespace:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def _submit(
        self,
        target: str,
        body: Mapping[str, Any],
        wait: float = 0.0,
        idempotency_key: str | None = None,
        **rest: Any,
    ) -> JobHandle[Any]:
        retry = self._connection.retry
        operation = _operations.submit(target, body, retry, wait=wait, idempotency_key=idempotency_key, **rest)
        return JobHandle(self._connection, self._connection.run(operation))

    def _get(self, model: type[Any], target: str) -> Any:
        found = self._connection.run(_operations.get(model, target, self._connection.retry))
        return bind(found, self._connection)

    def _delete(self, target: str) -> None:
        self._connection.run(_operations.delete(target, self._connection.retry))

    def _list(self, model: type[Any], target: str, limit: int | None, **query: str | None) -> Iterator[Any]:
        pages = _operations.pages(model, target, self._connection.retry, limit=limit, query=query)
        return (bind(item, self._connection) for item in self._connection.iterate(pages))


class Models(_Namespace):
    """Base models that the operator offers."""

    def get(self, name: str) -> types.Model:
        """One model."""
        model: types.Model = self._get(types.Model, path("v1", "models", name))
        return model

    def load(self, name: str, **fields: Unpack[LoadFields]) -> JobHandle[types.Model]:
        """Have a worker load a model now; needs an admin key."""
        return self._submit(path("v1", "models", name, "load"), request(types.LoadRequest, fields))

    def unload(self, name: str, **fields: Unpack[LoadFields]) -> JobHandle[types.Model]:
        """Have the workers let go of a model; needs an admin key."""
        return self._submit(path("v1", "models", name, "unload"), request(types.LoadRequest, fields))

    def list(self, limit: int | None = None) -> Iterator[types.Model]:
        """Every model."""
        return self._list(types.Model, path("v1", "models"), limit)


class Adapters(_Namespace):
    """LoRA adapters."""

    def create(
        self,
        *,
        source: str | None = None,
        file: str | os.PathLike[str] | None = None,
        wait: float = 0.0,
        idempotency_key: str | None = None,
        **fields: Unpack[AdapterFields],
    ) -> JobHandle[Adapter]:
        """Have the service fetch an adapter (`source`: `tinker://…`, `hf://…`, `s3://…` or `file://…`), or send it one
        (`file`: a tar, tar.gz or zip here); the other fields are those of `types.AdapterFields`.

        With a source of Tinker or the hub the client's `tinker_api_key` or `hf_token` goes along, for this job alone.
        """
        body, upload = adapter_body(source, file, fields)
        headers = self._connection.target.credentials(source or "")
        return self._submit(path("v1", "adapters"), body, wait, idempotency_key, headers=headers, upload=upload)

    def get(self, adapter_id: str) -> Adapter:
        """One adapter."""
        adapter: Adapter = self._get(Adapter, path("v1", "adapters", adapter_id))
        return adapter

    def delete(self, adapter_id: str) -> None:
        """Delete an adapter."""
        self._delete(path("v1", "adapters", adapter_id))

    def list(self, limit: int | None = None) -> Iterator[Adapter]:
        """One's adapters, newest first."""
        return self._list(Adapter, path("v1", "adapters"), limit)


class Comparisons(_Namespace):
    """Variants of a model on the same tokens."""

    def create(
        self, *, wait: float = 0.0, idempotency_key: str | None = None, **fields: Unpack[ComparisonFields]
    ) -> JobHandle[types.Comparison]:
        """Submit a comparison; the fields are those of `types.ComparisonRequest`, `wait` and `idempotency_key` as in
        `extractions.create`. `variants` are `base`, adapters and `tinker://RUN/*`; or give `quantizations`.

        With a run of Tinker the client's `tinker_api_key` goes along, for what has to be fetched.
        """
        body = comparison_body(fields)
        headers = self._connection.target.credentials(*(body.get("variants") or ()))
        return self._submit(path("v1", "comparisons"), body, wait, idempotency_key, headers=headers)

    def get(self, comparison_id: str) -> types.Comparison:
        """One comparison with its report."""
        comparison: types.Comparison = self._get(types.Comparison, path("v1", "comparisons", comparison_id))
        return comparison

    def delete(self, comparison_id: str) -> None:
        """Delete a comparison; the extractions that it read stay."""
        self._delete(path("v1", "comparisons", comparison_id))

    def list(self, limit: int | None = None) -> Iterator[types.Comparison]:
        """One's comparisons, newest first, without their reports."""
        return self._list(types.Comparison, path("v1", "comparisons"), limit)


class Datasets(_Namespace):
    """Rows that are uploaded once and named in requests."""

    def create(
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
        return self._connection.run(send)

    def get(self, dataset_id: str) -> types.Dataset:
        """One dataset, without its rows."""
        dataset: types.Dataset = self._get(types.Dataset, path("v1", "datasets", dataset_id))
        return dataset

    def delete(self, dataset_id: str) -> None:
        """Delete a dataset; what was made with it stays."""
        self._delete(path("v1", "datasets", dataset_id))

    def rows(self, dataset: Reference, limit: int | None = None) -> Iterator[types.DatasetRow]:
        """Its rows, in the order of the file."""
        return self._list(types.DatasetRow, path("v1", "datasets", identify(dataset), "rows"), limit)

    def list(self, limit: int | None = None) -> Iterator[types.Dataset]:
        """One's datasets, newest first."""
        return self._list(types.Dataset, path("v1", "datasets"), limit)


class Experiments(_Namespace):
    """Whole studies, each from one file."""

    def create(
        self,
        config: str | os.PathLike[str] | Mapping[str, Any],
        *,
        wait: float = 0.0,
        idempotency_key: str | None = None,
    ) -> JobHandle[types.Experiment]:
        """Run a whole study: the path of a YAML or JSON file, or what it says as a mapping.

        With an adapter of Tinker or the hub the client's `tinker_api_key` or `hf_token` goes along, for it alone.
        """
        body, yaml, schemes = experiment_body(config)
        headers = self._connection.target.credentials(*schemes)
        return self._submit(path("v1", "experiments"), body, wait, idempotency_key, headers=headers, yaml=yaml)

    def get(self, experiment_id: str) -> types.Experiment:
        """One experiment with what it found."""
        experiment: types.Experiment = self._get(types.Experiment, path("v1", "experiments", experiment_id))
        return experiment

    def delete(self, experiment_id: str) -> None:
        """Delete an experiment; what its stages made stays."""
        self._delete(path("v1", "experiments", experiment_id))

    def list(self, limit: int | None = None) -> Iterator[types.Experiment]:
        """One's experiments, newest first."""
        return self._list(types.Experiment, path("v1", "experiments"), limit)


class Extractions(_Namespace):
    """Hidden states of texts."""

    def create(
        self, *, wait: float = 0.0, idempotency_key: str | None = None, **fields: Unpack[ExtractionFields]
    ) -> JobHandle[Extraction]:
        """Submit an extraction; the fields are those of `types.ExtractionRequest`.

        `wait`: seconds (up to 60) for which this call may wait for the job's end, which spares short work a second
        request. The same `idempotency_key` and fields again within 24 h give the same job; without one, a key is
        made, so that a repeated request never makes two jobs.
        """
        return self._submit(path("v1", "extractions"), extraction_body(fields), wait, idempotency_key)

    def get(self, extraction_id: str) -> Extraction:
        """One extraction."""
        extraction: Extraction = self._get(Extraction, path("v1", "extractions", extraction_id))
        return extraction

    def delete(self, extraction_id: str) -> None:
        """Delete an extraction."""
        self._delete(path("v1", "extractions", extraction_id))

    def list(self, limit: int | None = None) -> Iterator[Extraction]:
        """One's extractions, newest first."""
        return self._list(Extraction, path("v1", "extractions"), limit)


class Probes(_Namespace):
    """Probes on hidden states."""

    def create(
        self, *, wait: float = 0.0, idempotency_key: str | None = None, **fields: Unpack[ProbeFields]
    ) -> JobHandle[Probe]:
        """Submit the training of a probe; the fields are those of `types.ProbeRequest`, `wait` and
        `idempotency_key` as in `extractions.create`."""
        return self._submit(path("v1", "probes"), probe_body(fields), wait, idempotency_key)

    def get(self, probe_id: str) -> Probe:
        """One probe with its report."""
        probe: Probe = self._get(Probe, path("v1", "probes", probe_id))
        return probe

    def delete(self, probe_id: str) -> None:
        """Delete a probe."""
        self._delete(path("v1", "probes", probe_id))

    def list(self, limit: int | None = None) -> Iterator[Probe]:
        """One's probes, newest first."""
        return self._list(Probe, path("v1", "probes"), limit)


class Predictions(_Namespace):
    """What probes say of texts."""

    def create(
        self,
        probe: Reference,
        inputs: Iterable[InputLike] | None = None,
        *,
        extraction: Reference | None = None,
        wait: float = 0.0,
        idempotency_key: str | None = None,
        **fields: Unpack[PredictFields],
    ) -> JobHandle[Prediction]:
        """Submit a prediction; `probe.predict` does the same and waits."""
        target = path("v1", "probes", identify(probe), "predict")
        return self._submit(target, predict_body(inputs, extraction, fields), wait, idempotency_key)

    def get(self, prediction_id: str) -> Prediction:
        """One prediction."""
        prediction: Prediction = self._get(Prediction, path("v1", "predictions", prediction_id))
        return prediction

    def delete(self, prediction_id: str) -> None:
        """Delete a prediction."""
        self._delete(path("v1", "predictions", prediction_id))


class Jobs(_Namespace):
    """Long work."""

    def attach(self, job_id: str) -> JobHandle[Any]:
        """The handle of a job that is there already, as after a crash of the caller."""
        record = self._connection.run(_operations.refresh(job_id, self._connection.retry))
        return JobHandle(self._connection, record)

    def get(self, job_id: str) -> types.Job:
        """How a job stands."""
        return self._connection.run(_operations.refresh(job_id, self._connection.retry))

    def cancel(self, job_id: str) -> types.Job:
        """Cancel a job: at once if queued, at the next batch if running."""
        return self._connection.run(_operations.cancel(job_id, self._connection.retry))

    def replay(self, job_id: str) -> types.Job:
        """Put a failed job back into its queue; needs an admin key."""
        return self._connection.run(_operations.replay(job_id, self._connection.retry))

    def list(
        self, *, kind: types.JobKind | None = None, status: types.JobStatus | None = None, limit: int | None = None
    ) -> Iterator[types.Job]:
        """One's jobs, newest first."""
        return self._list(types.Job, path("v1", "jobs"), limit, kind=kind, status=status)
