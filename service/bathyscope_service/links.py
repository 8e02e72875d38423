"""Links of the OpenAPI document: which operation comes after which, and where its parameters are found."""

from __future__ import annotations

from typing import Any

_ID = "$response.body#/id"
_FIRST = "$response.body#/data/0/id"

_JOB = (
    ("readJob", "get", "/v1/jobs/{job_id}"),
    ("cancelJob", "post", "/v1/jobs/{job_id}/cancel"),
    ("listenToJob", "get", "/v1/jobs/{job_id}/events"),
)
_EXTRACTION = (
    ("readExtraction", "get", "/v1/extractions/{extraction_id}"),
    ("readHiddenStates", "get", "/v1/extractions/{extraction_id}/hidden_states"),
    ("deleteExtraction", "delete", "/v1/extractions/{extraction_id}"),
)
_ADAPTER = (
    ("readAdapter", "get", "/v1/adapters/{adapter_id}"),
    ("readArchive", "get", "/v1/adapters/{adapter_id}/archive"),
    ("deleteAdapter", "delete", "/v1/adapters/{adapter_id}"),
)
_PROBE = (
    ("readProbe", "get", "/v1/probes/{probe_id}"),
    ("readWeights", "get", "/v1/probes/{probe_id}/weights"),
    ("predict", "post", "/v1/probes/{probe_id}/predict"),
    ("deleteProbe", "delete", "/v1/probes/{probe_id}"),
)
_PREDICTION = (
    ("readPrediction", "get", "/v1/predictions/{prediction_id}"),
    ("deletePrediction", "delete", "/v1/predictions/{prediction_id}"),
)
_COMPARISON = (
    ("readComparison", "get", "/v1/comparisons/{comparison_id}"),
    ("readComparisonReport", "get", "/v1/comparisons/{comparison_id}/report"),
    ("deleteComparison", "delete", "/v1/comparisons/{comparison_id}"),
)
_EXPERIMENT = (
    ("readExperiment", "get", "/v1/experiments/{experiment_id}"),
    ("readExperimentReport", "get", "/v1/experiments/{experiment_id}/report"),
    ("deleteExperiment", "delete", "/v1/experiments/{experiment_id}"),
)
_DATASET = (
    ("readDataset", "get", "/v1/datasets/{dataset_id}"),
    ("readRows", "get", "/v1/datasets/{dataset_id}/rows"),
    ("deleteDataset", "delete", "/v1/datasets/{dataset_id}"),
)
_MODEL = (
    ("readModel", "get", "/v1/models/{name}"),
    ("loadModel", "post", "/v1/models/{name}/load"),
    ("unloadModel", "post", "/v1/models/{name}/unload"),
)

_LINKS: dict[tuple[str, str], list[tuple[tuple[tuple[str, str, str], ...], str]]] = {
    ("post", "/v1/adapters"): [(_JOB, _ID)],
    ("get", "/v1/adapters"): [(_ADAPTER, _FIRST)],
    ("get", "/v1/adapters/{adapter_id}"): [(_ADAPTER[1:], _ID), (_JOB[:1], "$response.body#/job")],
    ("post", "/v1/comparisons"): [(_JOB, _ID)],
    ("get", "/v1/comparisons"): [(_COMPARISON, _FIRST)],
    ("get", "/v1/comparisons/{comparison_id}"): [(_COMPARISON[1:], _ID), (_JOB[:1], "$response.body#/job")],
    ("post", "/v1/experiments"): [(_JOB, _ID)],
    ("get", "/v1/experiments"): [(_EXPERIMENT, _FIRST)],
    ("get", "/v1/experiments/{experiment_id}"): [(_EXPERIMENT[1:], _ID), (_JOB[:1], "$response.body#/job")],
    ("post", "/v1/datasets"): [(_DATASET, _ID)],
    ("get", "/v1/datasets"): [(_DATASET, _FIRST)],
    ("get", "/v1/datasets/{dataset_id}"): [(_DATASET[1:], _ID)],
    ("post", "/v1/extractions"): [(_JOB, _ID)],
    ("post", "/v1/probes"): [(_JOB, _ID)],
    ("post", "/v1/probes/{probe_id}/predict"): [(_JOB, _ID)],
    ("post", "/v1/models/{name}/load"): [(_JOB, _ID)],
    ("post", "/v1/models/{name}/unload"): [(_JOB, _ID)],
    ("get", "/v1/jobs"): [((*_JOB, ("replayJob", "post", "/v1/jobs/{job_id}/replay")), _FIRST)],
    ("get", "/v1/jobs/{job_id}"): [(_JOB[1:], _ID)],
    ("post", "/v1/jobs/{job_id}/cancel"): [(_JOB[:1], _ID)],
    ("get", "/v1/extractions"): [(_EXTRACTION, _FIRST)],
    ("get", "/v1/extractions/{extraction_id}"): [(_EXTRACTION[1:], _ID), (_JOB[:1], "$response.body#/job")],
    ("get", "/v1/probes"): [(_PROBE, _FIRST)],
    ("get", "/v1/probes/{probe_id}"): [
        (_PROBE[1:], _ID),
        (_EXTRACTION[:1], "$response.body#/extraction"),
        (_JOB[:1], "$response.body#/job"),
    ],
    ("get", "/v1/predictions"): [(_PREDICTION, _FIRST)],
    ("get", "/v1/predictions/{prediction_id}"): [
        (_PREDICTION[1:], _ID),
        (_PROBE[:1], "$response.body#/probe"),
        (_JOB[:1], "$response.body#/job"),
    ],
    ("get", "/v1/models"): [(_MODEL, "$response.body#/data/0/name")],
    ("get", "/v1/models/{name}"): [(_MODEL[1:], "$response.body#/name")],
}
"""After each operation those that take what it answered, and where in its answer their one path parameter is."""


def add_links(paths: dict[str, Any]) -> None:
    """Put the links into the successful answers of a document's `paths`."""
    for (method, path), groups in _LINKS.items():
        links = {
            name: {
                "operationId": paths[target][verb]["operationId"],
                "parameters": {target.partition("{")[2].partition("}")[0]: value},
            }
            for targets, value in groups
            for name, verb, target in targets
        }
        for status in ("200", "201", "202"):
            response = paths[path][method]["responses"].get(status)
            if response is not None:
                response.setdefault("links", {}).update(links)
