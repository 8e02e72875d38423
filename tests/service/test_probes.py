"""Probes through HTTP: trained on an extraction, read back, asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load as load_safetensors

from bathyscope.errors import InvalidRequest
from bathyscope_workers.engine import probe_handlers
from bathyscope_workers.engine.protocol import RunJob
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


def test_lists_describe_predictions_without_their_numbers(live: Stack, probe: dict[str, Any]) -> None:
    made = predict(live, probe, inputs=INPUTS[:3])
    listed = live.client.get("/v1/predictions", params={"limit": 1}).json()["data"][0]
    assert {**listed, "probabilities": made["probabilities"], "labels": made["labels"]} == made
    assert (listed["probabilities"], len(made["probabilities"])) == ([], 3)


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
    job = live.post(
        "/v1/probes", {"data": {"model": "tiny", "inputs": ["", "a", "b", "c"]}, "labels": [0, 1, 0, 1], "folds": 2}
    ).json()
    ended = live.job(job["id"])
    assert ended["status"] == "failed"
    assert ended["error"]["type"] == "/problems/dependency-failed"
    assert [error["pointer"] for error in ended["error"]["errors"]] == ["/data/inputs/0"]
    assert [error["pointer"] for error in ended["error"]["cause"]["errors"]] == ["/inputs/0"]
    record = live.client.get(f"/v1/jobs/{job['id']}").json()["request"]
    assert record["data"] == {"inputs": 4}


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


def test_deleting(live: Stack, states: dict[str, Any]) -> None:
    made = train(live, extraction=states["id"], labels=LABELS, C=[1.0], bootstrap=0, layers=[1])
    assert live.client.delete(f"/v1/probes/{made['id']}").status_code == 204
    problem(live.client.get(f"/v1/probes/{made['id']}"), 404, "not-found")


DATA = {"model": "tiny", "inputs": INPUTS, "pooling": "mean"}


@pytest.mark.parametrize(
    ("held", "asked", "pointer"),
    [
        ([0, 1], [3], "/layers/0"),
        ([0, 1], [0, -1], "/layers/1"),
        ("all", [1, 1], "/layers/1"),
        ("all", [4, -1], "/layers/1"),
        ("every:3", [0, 2], "/layers/1"),
        ("all", [9], "/layers/0"),
    ],
)
def test_layers_are_checked_before_the_states_are_there(live: Stack, held: Any, asked: Any, pointer: str) -> None:
    job = live.post("/v1/extractions", {**DATA, "layers": held}, wait=0).json()
    done = live.job(job["id"])["resource"].rpartition("/")[2]
    for source in ({"data": {**DATA, "layers": held}}, {"extraction": job["id"]}, {"extraction": done}):
        document = problem(
            live.post("/v1/probes", {**source, "labels": LABELS, "layers": asked}), 422, "invalid-request"
        )
        assert [error["pointer"] for error in document["errors"]] == [pointer], source


@pytest.mark.parametrize(("asked", "pointer"), [([3], "/layers/0"), ([1, 1], "/layers/1"), ([0, -1], "/layers/1")])
def test_the_engine_refuses_layers_that_do_not_fit(tmp_path: Path, asked: list[int], pointer: str) -> None:
    states = tmp_path / "states"
    np.zeros(64, "<i8").tofile(states)
    (tmp_path / "rows").write_text("[[0, null, null], [1, null, null]]")
    layout = {
        "hidden_states": {"dtype": "F32", "shape": [2, 2, 4], "start": 0},
        "token_ids": {"dtype": "I64", "shape": [2], "start": 64},
        "offsets": {"dtype": "I64", "shape": [3], "start": 80},
    }
    spec = {
        "states_path": str(states),
        "rows_path": str(tmp_path / "rows"),
        "layout": layout,
        "held_layers": [0, 1],
        "num_layers": 4,
        "layers": asked,
    }
    context: Any = None  # the layers are looked at before anything is told of progress
    with pytest.raises(InvalidRequest) as caught:
        probe_handlers.train(RunJob("job_1", "probe", spec=spec), context)
    assert [error["pointer"] for error in caught.value.errors] == [pointer]


@pytest.mark.parametrize(
    ("data", "status", "slug", "pointer"),
    [
        ({"model": "none"}, 404, "model-unknown", "/data/model"),
        ({"layers": [9]}, 422, "invalid-request", "/data/layers/0"),
        ({"quantization": "3bit"}, 422, "invalid-request", "/data/quantization"),
        ({"inputs": ["a", {"token_ids": []}]}, 422, "invalid-input", "/data/inputs/1"),
    ],
)
def test_faults_of_the_data_point_into_it(
    live: Stack, data: dict[str, Any], status: int, slug: str, pointer: str
) -> None:
    answer = live.post("/v1/probes", {"data": {**DATA, **data}, "labels": LABELS})
    assert [error["pointer"] for error in problem(answer, status, slug)["errors"]] == [pointer]


def test_of_a_question_the_prompt_is_predicted_on(live: Stack, probe: dict[str, Any]) -> None:
    asked = [{"prompt": INPUTS[0], "answer": "Very."}, {"prompt": INPUTS[1], "choices": [" a", " b"], "answer": 1}]
    found, plain = (predict(live, probe, inputs=inputs)["probabilities"] for inputs in (asked, INPUTS[:2]))
    assert np.allclose(found, plain, atol=1e-6)


def test_a_refused_probe_leaves_no_idempotency_key(tmp_path: Path, models: str) -> None:
    made = Stack(tmp_path, models=models, limits__key_jobs=2)
    try:
        made.up(workers=0)
        other = made.post("/v1/extractions", {"model": "tiny", "inputs": ["a"]}, wait=0).json()
        body = {"data": {"model": "tiny", "inputs": ["a", "b", "c", "d"]}, "labels": [0, 1, 0, 1], "folds": 2}
        key = {"Idempotency-Key": "again"}
        problem(made.post("/v1/probes", body, wait=0, **key), 429, "quota-exceeded")
        assert made.client.post(f"/v1/jobs/{other['id']}/cancel").status_code == 200
        first = made.post("/v1/probes", body, wait=0, **key)
        assert (first.status_code, first.json()["status"]) == (202, "queued"), first.text
        again = made.post("/v1/probes", body, wait=0, **key)
        assert again.headers["idempotent-replayed"] == "true"
        assert again.json()["id"] == first.json()["id"]
        assert again.json()["status"] == "queued"
        page = made.client.get("/v1/jobs", params={"status": "queued"}).json()["data"]
        assert sorted(job["kind"] for job in page) == ["extraction", "probe"]
    finally:
        made.down()


def test_a_replayed_probe_keeps_its_own_extraction(live: Stack) -> None:
    body = {"data": {"model": "tiny", "inputs": ["", "a", "b", "c"]}, "labels": [0, 1, 0, 1], "folds": 2}
    first, second = (live.post("/v1/probes", body, **{"Idempotency-Key": "failed"}).json() for _ in range(2))
    assert first["id"] == second["id"]
    assert live.job(first["id"])["error"]["type"] == "/problems/dependency-failed"
