"""Datasets of the hub over HTTP: the real library against a stand-in of the hub's routes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.dataset_hub import SHA, DatasetHub
from tests.hub_folder import write_hub
from tests.service.test_manners import problem
from tests.stack import Stack


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DatasetHub]:
    with DatasetHub(write_hub(tmp_path_factory.mktemp("hub"))) as made:
        made.gated.add("org/arc")
        yield made


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, models: str, hub: DatasetHub) -> Iterator[Stack]:
    """A service without a worker, and with secrets of the operator's in its environment."""
    made = Stack(tmp_path_factory.mktemp("alone"), models=models, datasets__hub_url=hub.url)
    try:
        made.start("service", "service", HF_TOKEN="hf_operators", BATHYSCOPE_ADAPTERS__HF_TOKEN="hf_operators")
        made.wait_alive()
        yield made
    finally:
        made.down()


def ask(alone: Stack, **dataset: Any) -> Any:
    return alone.client.post("/v1/extractions", json={"model": "tiny", "dataset": dataset, "score_choices": True})


def test_a_split_is_read_and_nothing_else(alone: Stack, hub: DatasetHub) -> None:
    hub.requests.clear()
    made = ask(alone, name="mmlu", category="stem", limit=30)
    assert made.status_code == 202, made.text
    assert made.json()["request"]["inputs"] == 30
    assert made.json()["request"]["dataset"] == {"name": "mmlu", "category": "stem", "limit": 30}
    read = {path for path, _ in hub.requests if path.endswith(".parquet")}
    assert read == {f"GET /datasets/cais/mmlu/resolve/{SHA}/all/test-0.parquet"}
    assert not [headers for _, headers in hub.requests if "authorization" in headers]
    before = len(hub.requests)
    assert ask(alone, name="mmlu", category="virology").json()["request"]["inputs"] == 20
    assert len(hub.requests) == before, "kept"
    assert ask(alone, name="gsm8k", split="train", revision="v1").json()["request"]["inputs"] == 7


@pytest.mark.parametrize(
    ("dataset", "pointer", "word"),
    [
        ({"name": "gsm8k", "revision": "v9"}, "/dataset/revision", "'v9'"),
        ({"name": "hub:org/nothing"}, "/dataset/name", "private"),
        ({"name": "hub:org/arc"}, "/dataset/name", "gated"),
        ({"name": "hub:org/outside"}, "/dataset/name", ""),
        ({"name": "hub:org/pickle"}, "/dataset/name", ""),
        ({"name": "hub:org/moods"}, "/dataset/split", "train"),
        ({"name": "hub:org/bomb"}, "", ""),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_the_hub_has_not(alone: Stack, hub: DatasetHub, dataset: dict[str, Any], pointer: str, word: str) -> None:
    found = problem(ask(alone, **dataset), 422, "invalid-request")
    assert word in found["detail"]
    if pointer:
        assert found["errors"][0]["pointer"] == pointer
    assert "hf_operators" not in str(hub.requests)
    assert [path for path in (alone.data_dir / "hub").glob("*") if path.is_dir()] == []


def test_what_is_kept_stays_within_its_bound(tmp_path: Path, models: str, hub: DatasetHub) -> None:
    made = Stack(tmp_path, models=models, datasets__hub_url=hub.url, datasets__cache_bytes=2000)
    try:
        made.up(workers=0)
        for dataset in ({"name": "gsm8k"}, {"name": "gsm8k", "split": "train"}, {"name": "truthful_qa"}):
            answer = ask(made, **dataset)
            assert answer.status_code == 202, answer.text
        kept = list((tmp_path / "hub").iterdir())
        assert all(re.fullmatch("[0-9a-f]{64}.jsonl", path.name) for path in kept)
        assert 0 < sum(path.stat().st_size for path in kept) <= 2000
    finally:
        made.down()
