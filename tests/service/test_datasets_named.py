"""Requests that name a dataset instead of sending its rows."""

from __future__ import annotations

import io
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bathyscope.datasets import CapitalsDataset, arithmetic
from tests.hub_folder import SUBJECTS, configs, repository, write_hub
from tests.service.test_manners import problem
from tests.stack import Stack, stack


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, models: str) -> Iterator[Stack]:
    """An installation with a folder of hub repositories in the place of the hub."""
    hub = write_hub(tmp_path_factory.mktemp("hub"))
    with stack(tmp_path_factory.mktemp("named"), models=models, datasets__folder=hub) as made:
        yield made


def extract(running: Stack, **fields: Any) -> dict[str, Any]:
    job = running.post("/v1/extractions", {"model": "tiny", "layers": [1], **fields}).json()
    assert job["status"] == "succeeded", job
    return dict(running.client.get(job["resource"]).json())


def upload(running: Stack, rows: list[dict[str, Any]]) -> str:
    data = "\n".join(json.dumps(row) for row in rows).encode()
    made = running.client.post("/v1/datasets", files={"file": data}, data={"format": "jsonl"})
    assert made.status_code == 201, made.text
    return str(made.json()["id"])


def states(running: Stack, extraction: dict[str, Any]) -> Any:
    content = running.client.get(extraction["links"]["hidden_states"], params={"format": "npy"}).content
    return np.load(io.BytesIO(content))


def test_uploaded_rows_are_the_inputs(running: Stack) -> None:
    rows = [{"input": f"text {at}", "split": "train" if at % 2 else "dev"} for at in range(20)]
    dataset = upload(running, rows)
    whole = extract(running, dataset={"id": dataset})
    assert whole["inputs"] == 20
    sent = extract(running, inputs=[row["input"] for row in rows])
    np.testing.assert_array_equal(states(running, whole), states(running, sent))
    part = extract(running, dataset={"id": dataset, "split": "train"})
    np.testing.assert_allclose(states(running, part), states(running, sent)[1::2], atol=1e-6)
    few = states(running, extract(running, dataset={"id": dataset, "limit": 5, "seed": 3}))
    assert few.shape[0] == 5
    again = states(running, extract(running, dataset={"id": dataset, "limit": 5, "seed": 3}))
    np.testing.assert_array_equal(few, again)
    found = problem(
        running.client.post("/v1/extractions", json={"model": "tiny", "dataset": {"id": dataset, "split": "x"}}),
        422,
        "invalid-request",
    )
    assert found["errors"][0]["pointer"] == "/dataset/split"
    missing = {"id": "ds_" + "0" * 26}
    problem(running.client.post("/v1/extractions", json={"model": "tiny", "dataset": missing}), 404, "not-found")


def probe(running: Stack, dataset: dict[str, Any], **fields: Any) -> dict[str, Any]:
    scored = fields.pop("score_choices", False)
    data = {"model": "tiny", "layers": [1, 2], "dataset": dataset, "score_choices": scored}
    body = {"data": data, "bootstrap": 0, "selectivity": False, "folds": 2, **fields}
    job = running.post("/v1/probes", body).json()
    assert job["status"] == "succeeded", job
    return dict(running.client.get(job["resource"]).json())


def test_a_probe_takes_labels_groups_and_split_of_its_dataset(running: Stack) -> None:
    report = probe(running, {"name": "capitals", "limit": 80})["report"]
    assert (report["n"], report["task"], report["class_counts"]) == (80, "binary", [40, 40])
    assert (report["folds"]["kind"], report["folds"]["clusters"]) == ("grouped", 20)
    local = CapitalsDataset(limit=80)
    sent = {
        "data": {"model": "tiny", "layers": [1, 2], "inputs": local.inputs},
        "labels": local.labels,
        "groups": local.groups,
        "bootstrap": 0,
        "selectivity": False,
        "folds": 2,
    }
    job = running.post("/v1/probes", sent).json()
    assert running.client.get(job["resource"]).json()["report"]["layers"] == report["layers"]

    rows = [{"input": f"t {at}", "label": "ab"[at % 2], "split": "test" if at > 29 else "train"} for at in range(40)]
    given = probe(running, {"id": upload(running, rows)})["report"]
    assert given["folds"]["kind"] == "given"
    assert given["held_out"]["accuracy"] is not None
    own = probe(running, {"id": upload(running, rows)}, labels=[at % 3 for at in range(40)], split="stratified")[
        "report"
    ]
    assert (own["folds"]["kind"], own["class_counts"]) == ("stratified", [14, 13, 13])


def test_questions_without_labels_are_labelled_by_the_model(running: Stack) -> None:
    report = probe(running, {"name": "arithmetic", "difficulty": 1, "limit": 60}, score_choices=True)["report"]
    assert (report["n"], report["task"]) == (60, "binary")
    body = {"data": {"model": "tiny", "dataset": {"name": "arithmetic"}}}
    found = problem(running.client.post("/v1/probes", json=body), 422, "invalid-request")
    assert found["errors"][0]["pointer"] == "/labels"
    unlabelled = {"data": {"model": "tiny", "dataset": {"id": upload(running, [{"input": "a"}])}}}
    found = problem(running.client.post("/v1/probes", json=unlabelled), 422, "invalid-request")
    assert found["errors"][0]["pointer"] == "/labels"
    without = {"data": {"model": "tiny", "inputs": ["a"]}}
    problem(running.client.post("/v1/probes", json=without), 422, "invalid-request")


def prompts(running: Stack, **dataset: Any) -> list[dict[str, Any]]:
    """The choices of the questions that a dataset gives, as they were scored."""
    made = extract(running, dataset=dataset, score_choices=True, max_new_tokens=2)
    return list(running.client.get(made["links"]["choices"]).json()["data"])


@pytest.mark.parametrize(
    ("dataset", "count", "choices"),
    [
        ({"name": "mmlu"}, 100, 4),
        ({"name": "mmlu", "split": "test", "category": "stem"}, 40, 4),
        ({"name": "mmlu", "category": "social_sciences"}, 20, 4),
        ({"name": "mmlu", "category": "humanities"}, 20, 4),
        ({"name": "mmlu", "category": "other"}, 20, 4),
        ({"name": "mmlu", "category": "college_physics"}, 20, 4),
        ({"name": "mmlu", "category": "stem", "limit": 7}, 7, 4),
        ({"name": "mmlu", "split": "train"}, 30, 4),
        ({"name": "mmlu", "split": "dev"}, 5, 4),
        ({"name": "truthful_qa"}, 9, 3),
        ({"name": "gsm8k"}, 6, 1),
        ({"name": "gsm8k", "split": "train"}, 7, 1),
        (
            {
                "name": "hub:org/arc",
                "columns": {"prompt": "question", "choices": "choices", "answer": "answerKey"},
            },
            4,
            2,
        ),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) and "columns" not in value else "",
)
def test_questions_of_the_hub(running: Stack, dataset: dict[str, Any], count: int, choices: int) -> None:
    scores = prompts(running, **dataset)
    assert len(scores) == count
    assert {len(one["logprobs"]) for one in scores} == {choices}
    assert len(SUBJECTS) == 5


def test_columns_of_any_dataset(running: Stack) -> None:
    moods = {
        "name": "hub:org/moods",
        "split": "train",
        "columns": {"input": "sentence", "label": "mood", "group": "by"},
    }
    report = probe(running, moods)["report"]
    assert (report["n"], report["class_counts"], report["folds"]["kind"]) == (8, [4, 4], "grouped")
    sent = extract(running, inputs=[f"sentence {at}" for at in range(8)])
    np.testing.assert_array_equal(states(running, extract(running, dataset=moods)), states(running, sent))
    assert extract(running, dataset={"name": "hub:org/plain"})["inputs"] == 2


@pytest.mark.parametrize(
    ("dataset", "pointer", "word"),
    [
        ({"name": "mmlu", "split": "train", "category": "stem"}, "/dataset", "auxiliary_train"),
        ({"name": "mmlu", "split": "tests"}, "/dataset/split", "validation"),
        ({"name": "mmlu", "category": "magic"}, "/dataset/category", "humanities"),
        ({"name": "gsm8k", "category": "stem"}, "/dataset", "mmlu"),
        ({"name": "mnist"}, "/dataset/name", ""),
        ({"name": "hub:../../etc"}, "/dataset/name", ""),
        ({"name": "hub:org/nothing"}, "/dataset/name", "org/nothing"),
        ({"name": "hub:org/moods"}, "/dataset/split", "train"),
        ({"name": "hub:org/moods", "split": "train"}, "/dataset/columns", "'sentence'"),
        ({"name": "hub:org/moods", "split": "train", "columns": {"input": "x"}}, "/dataset/columns", "'mood'"),
        ({"name": "hub:org/moods", "split": "train", "columns": {"input": "mood"}}, "/dataset/columns", "row 1"),
        ({"name": "hub:org/moods", "config": "fancy"}, "/dataset/config", "plain"),
        ({"name": "hub:org/outside"}, "/dataset/name", ""),
        ({"name": "hub:org/pickle"}, "/dataset/name", ""),
        ({"name": "hub:org/bomb"}, "", ""),
        ({"name": "capitals", "limit": 3}, "/dataset/limit", "4"),
        ({"name": "arithmetic", "difficulty": 1, "limit": 5000}, "", "difficulty"),
        ({"name": "capitals", "id": "ds_1"}, "/dataset", "either"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)
def test_what_a_dataset_has_not(running: Stack, dataset: dict[str, Any], pointer: str, word: str) -> None:
    before = running.client.get("/v1/jobs").json()
    answer = running.client.post("/v1/extractions", json={"model": "tiny", "dataset": dataset})
    found = problem(answer, 422, "invalid-request")
    if pointer:
        assert found["errors"][0]["pointer"].startswith(pointer), found
    assert word in answer.text
    assert "root:" not in answer.text
    assert running.client.get("/v1/jobs").json() == before
    assert [path for path in (running.data_dir / "hub").glob("*") if path.is_dir()] == []


def test_no_configuration_leads_to_another_address(running: Stack) -> None:
    folder = Path(running.environment["BATHYSCOPE_DATASETS__FOLDER"])
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        listening.settimeout(0.5)
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/rows.csv"
        repository(folder, "org/away", configs(default={"test": address}), **{"test.csv": b"input\na\n"})
        answer = running.client.post("/v1/extractions", json={"model": "tiny", "dataset": {"name": "hub:org/away"}})
        problem(answer, 422, "invalid-request")
        with pytest.raises(TimeoutError):
            listening.accept()


def test_rows_are_kept_for_a_while(running: Stack) -> None:
    kept = running.data_dir / "hub"
    extract(running, dataset={"name": "gsm8k", "split": "train"})
    before = {path: path.stat().st_mtime_ns for path in kept.iterdir()}
    extract(running, dataset={"name": "gsm8k", "split": "train", "limit": 2})
    assert {path: path.stat().st_mtime_ns for path in kept.iterdir()} == before


@pytest.mark.parametrize("answers", [False, True], ids=["refused", "silent"])
def test_a_hub_out_of_reach(tmp_path: Path, models: str, answers: bool) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        if answers:
            listening.listen()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        made = Stack(tmp_path, models=models, datasets__hub_url=url, datasets__seconds=8 if answers else 50)
        try:
            made.up(workers=0)
            body = {"model": "tiny", "dataset": {"name": "mmlu"}}
            found = problem(made.client.post("/v1/extractions", json=body), 502, "dataset-out-of-reach")
            assert "upload" in found["detail"]
            problem(made.client.post("/v1/probes", json={"data": body}), 502, "dataset-out-of-reach")
            assert made.client.get("/v1/jobs").json()["data"] == []
            assert list((tmp_path / "hub").iterdir()) == []
            # What ships needs no hub.
            shipped = {"model": "tiny", "dataset": {"name": "arithmetic", "limit": 3}}
            assert made.client.post("/v1/extractions", json=shipped).status_code == 202
        finally:
            made.down()


def test_the_shipped_questions_are_those_of_the_sdk(running: Stack) -> None:
    dataset = {"name": "arithmetic", "difficulty": 2, "limit": 12, "seed": 5}
    sent = extract(running, inputs=arithmetic(12, 2, seed=5))
    np.testing.assert_array_equal(states(running, extract(running, dataset=dataset)), states(running, sent))
