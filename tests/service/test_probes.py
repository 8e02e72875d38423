"""Probes through HTTP: trained on an extraction, read back, asked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load as load_safetensors

from tests.service.test_extractions import npy
from tests.service.test_manners import problem
from tests.stack import Stack

WORDS = ["cold", "warm", "dark", "bright", "deep", "flat", "calm", "rough", "salt", "sweet"]
INPUTS = [f"The water is {word} {'today' if k % 2 else 'tonight'}, number {k}." for k in range(8) for word in WORDS]
LABELS = [bool(k % 2) for k in range(8) for _ in WORDS]


@pytest.fixture(scope="module")
def states(live: Stack) -> dict[str, Any]:
    return live.extract(INPUTS, model="tiny", pooling="mean")


def train(live: Stack, **body: Any) -> dict[str, Any]:
    answer = live.post("/v1/probes", body)
    assert answer.status_code in (200, 202), answer.text
    job = live.job(answer.json()["id"])
    assert job["status"] == "succeeded", job
    return dict(live.client.get(job["resource"]).json())


def predict(live: Stack, probe: dict[str, Any], **body: Any) -> dict[str, Any]:
    answer = live.post(f"/v1/probes/{probe['id']}/predict", body)
    assert answer.status_code in (200, 202), answer.text
    job = live.job(answer.json()["id"])
    assert job["status"] == "succeeded", job
    return dict(live.client.get(job["resource"]).json())


@pytest.fixture(scope="module")
def probe(live: Stack, states: dict[str, Any]) -> dict[str, Any]:
    return train(live, extraction=states["id"], labels=LABELS, C=[1.0], bootstrap=100, name="time of day")


def test_the_report_holds_every_layer(probe: dict[str, Any], states: dict[str, Any]) -> None:
    report = probe["report"]
    assert [layer["layer"] for layer in report["layers"]] == states["layers"]
    for layer in report["layers"]:
        for metric in ("auroc", "accuracy", "brier", "ece"):
            figure = layer[metric]
            assert 0 <= figure["low"] <= figure["value"] <= figure["high"] <= 1
    best = next(layer for layer in report["layers"] if layer["layer"] == report["best_layer"])
    assert best["auroc"]["value"] == max(layer["auroc"]["value"] for layer in report["layers"])
    assert best["auroc"]["value"] > 0.9
    assert probe["layer"] == report["best_layer"]
    assert probe["identity"] == states["identity"]


def test_a_probe_predicts_with_its_weights(live: Stack, probe: dict[str, Any], states: dict[str, Any]) -> None:
    weights = load_safetensors(live.client.get(probe["links"]["weights"]).content)
    column = states["layers"].index(probe["layer"])
    scores = npy(live, states)[:, column].astype(np.float64) @ weights["weights"].T + weights["intercept"]
    expected = 1 / (1 + np.exp(-scores[:, 0]))
    found = predict(live, probe, extraction=states["id"])
    assert np.allclose(np.array(found["probabilities"])[:, 1], expected, atol=1e-12)
    assert found["classes"] == [False, True]
    assert found["labels"] == [bool(value > 0.5) for value in expected]


def test_new_inputs_are_extracted_under_the_probes_identity(
    live: Stack, probe: dict[str, Any], states: dict[str, Any]
) -> None:
    on_inputs = predict(live, probe, inputs=INPUTS[:12])
    on_states = predict(live, probe, extraction=states["id"])
    assert np.allclose(on_inputs["probabilities"], on_states["probabilities"][:12], atol=1e-5)
    assert on_inputs["identity"] == probe["identity"]
    assert on_inputs["transfer"] is False


def test_the_same_request_gives_the_same_numbers(live: Stack, states: dict[str, Any], probe: dict[str, Any]) -> None:
    again = train(live, extraction=states["id"], labels=LABELS, C=[1.0], bootstrap=100)
    assert again["report"] == probe["report"]


def test_another_identity_is_refused_unless_asked_for(live: Stack, probe: dict[str, Any]) -> None:
    other = live.extract(INPUTS[:4], model="tiny", pooling="last")
    answer = live.post(f"/v1/probes/{probe['id']}/predict", {"extraction": other["id"]})
    document = problem(answer, 409, "identity-mismatch")
    assert document["differs"] == ["pooling"]
    assert "pooling" in document["detail"]
    assert predict(live, probe, extraction=other["id"], transfer=True)["transfer"] is True


def test_another_width_is_refused_even_with_transfer(live: Stack, probe: dict[str, Any]) -> None:
    other = live.extract(INPUTS[:4], model="minilm", pooling="mean", layers=list(range(7)))
    answer = live.post(f"/v1/probes/{probe['id']}/predict", {"extraction": other["id"], "transfer": True})
    assert problem(answer, 422, "invalid-request")["errors"][0]["pointer"] == "/extraction"


def test_extraction_and_probe_in_one_request(live: Stack) -> None:
    made = train(live, data={"model": "tiny", "inputs": INPUTS, "pooling": "mean"}, labels=LABELS, C=[1.0], bootstrap=0)
    assert live.client.get(f"/v1/extractions/{made['extraction']}").json()["inputs"] == len(INPUTS)


def test_a_probe_waits_for_an_extraction_in_the_making(live: Stack) -> None:
    job = live.post("/v1/extractions", {"model": "tiny", "inputs": INPUTS, "pooling": "mean"}, wait=0).json()
    made = train(live, extraction=job["id"], labels=LABELS, C=[1.0], bootstrap=0, layers=[2])
    assert made["layer"] == 2


def test_a_failed_extraction_fails_its_probe_with_the_cause(live: Stack) -> None:
    job = live.post("/v1/probes", {"data": {"model": "tiny", "inputs": ["", "a"]}, "labels": [0, 1], "folds": 2}).json()
    ended = live.job(job["id"])
    assert ended["status"] == "failed"
    assert ended["error"]["type"] == "/problems/dependency-failed"


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"labels": [0, 1]}, "/labels"),
        ({"labels": LABELS, "groups": ["a"]}, "/groups"),
        ({"labels": LABELS, "layers": [9]}, "/layers/0"),
        ({"labels": LABELS, "C": [0.0]}, "/C/0"),
        ({"labels": LABELS, "folds": 1}, "/folds"),
        ({"labels": LABELS, "seed": -1}, "/seed"),
    ],
)
def test_bad_requests_are_refused_at_once(
    live: Stack, states: dict[str, Any], body: dict[str, Any], pointer: str
) -> None:
    document = problem(live.post("/v1/probes", {"extraction": states["id"], **body}), 422, "invalid-request")
    assert document["errors"][0]["pointer"] == pointer


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"labels": [1] * len(INPUTS)}, "/labels"),
        ({"labels": LABELS, "groups": ["one"] * len(INPUTS)}, "/groups"),
    ],
)
def test_labels_that_cannot_be_learned_fail_the_job(
    live: Stack, states: dict[str, Any], body: dict[str, Any], pointer: str
) -> None:
    job = live.post("/v1/probes", {"extraction": states["id"], **body}).json()
    assert job["status"] == "failed"
    assert job["error"]["status"] == 422
    assert job["error"]["errors"][0]["pointer"] == pointer


@pytest.mark.parametrize(
    "body",
    [{"estimator": "lda"}, {"calibration": "platt"}, {"labels": "correct"}, {"baselines": ["bag_of_words"]}],
)
def test_what_is_not_offered_yet_says_so(live: Stack, states: dict[str, Any], body: dict[str, Any]) -> None:
    answer = live.post("/v1/probes", {"extraction": states["id"], "labels": LABELS, **body})
    problem(answer, 501, "not-built")


def test_deleting(live: Stack, states: dict[str, Any]) -> None:
    made = train(live, extraction=states["id"], labels=LABELS, C=[1.0], bootstrap=0, layers=[1])
    assert live.client.delete(f"/v1/probes/{made['id']}").status_code == 204
    problem(live.client.get(f"/v1/probes/{made['id']}"), 404, "not-found")
