"""The double against the real thing: its results pass through the real supervisor and service."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load

from bathyscope import types
from bathyscope_workers.probes import FittedProbe
from tests.stack import Stack, stack


@pytest.fixture(scope="module")
def noop(tmp_path_factory: pytest.TempPathFactory, models: str) -> Iterator[Stack]:
    with stack(tmp_path_factory.mktemp("noop"), noop=True, models=models) as running:
        yield running


def finished(noop: Stack, path: str, body: Any) -> dict[str, Any]:
    answer = noop.post(path, body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["status"] == "succeeded", answer.text
    return dict(noop.client.get(answer.json()["resource"]).json())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_an_extraction(noop: Stack, dtype: str) -> None:
    made = finished(noop, "/v1/extractions", {"model": "tiny", "inputs": ["ab", "c"], "dtype": dtype})
    assert types.Extraction.model_validate(made).shape == [2, 5, 32]
    answer = noop.client.get(f"/v1/extractions/{made['id']}/hidden_states")
    if dtype != "bfloat16":
        assert load(answer.content)["hidden_states"][1, 3, 0] == np.dtype(dtype).type(ord("c") / 256 + 3)


def test_pooling_none_keeps_tokens(noop: Stack) -> None:
    body = {"model": "tiny", "inputs": ["abc", {"messages": [{"role": "user", "content": "c"}]}], "pooling": "none"}
    made = finished(noop, "/v1/extractions", {**body, "positions": {"tokens": [-1, 0]}})
    assert made["shape"] == [4, 5, 32]


def test_a_probe_and_its_predictions(noop: Stack) -> None:
    states = finished(noop, "/v1/extractions", {"model": "tiny", "inputs": ["a", "b", "c", "d"]})
    made = finished(noop, "/v1/probes", {"extraction": states["id"], "labels": [0, 1, 0, 1], "folds": 2})
    types.Probe.model_validate(made)
    weights = FittedProbe.from_bytes(noop.client.get(f"/v1/probes/{made['id']}/weights").content)
    assert weights.hidden_size == 32
    for body in ({"inputs": ["e"]}, {"extraction": states["id"]}):
        found = types.Prediction.model_validate(finished(noop, f"/v1/probes/{made['id']}/predict", body))
        assert found.probabilities[0] == [0.5, 0.5]


def test_models_come_and_go(noop: Stack) -> None:
    for action in ("load", "unload"):
        answer = noop.post(f"/v1/models/minilm/{action}", {"quantization": "none"})
        assert answer.json()["status"] == "succeeded", answer.text


def test_a_long_job_is_cancelled(noop: Stack) -> None:
    body = {"model": "tiny", "inputs": ["a"], "metadata": {"noop_seconds": 60}}
    job = noop.post("/v1/extractions", body, wait=0).json()
    assert noop.client.post(f"/v1/jobs/{job['id']}/cancel").status_code in (200, 202)
    assert noop.job(job["id"])["status"] == "cancelled"


def test_bad_inputs_fail(noop: Stack) -> None:
    job = noop.post("/v1/extractions", {"model": "tiny", "inputs": ["a" * 600]}).json()
    assert (job["status"], job["error"]["status"]) == ("failed", 422)
