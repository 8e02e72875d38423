"""Experiments through the whole installation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from bathyscope.types import Experiment
from tests.conftest import CORPUS
from tests.service.test_adapters import added
from tests.service.test_adapters_live import archive
from tests.service.test_experiment_files import LLAMA
from tests.service.test_manners import problem
from tests.stack import Stack
from tests.tinker_standin import KEY, Standin
from tests.tiny import write_tiny

BLOCKS = 32
SMALL = {
    "experiment": {"name": "small", "seed": 7},
    "model": {"name": "tiny"},
    "dataset": {"name": "capitals", "limit": 80},
    "extraction": {"layers": [1, 2, 4]},
    "evaluation": {"bootstrap": 100},
}


@pytest.fixture(scope="module")
def standin() -> Iterator[Standin]:
    with Standin() as server:
        yield server


@pytest.fixture(scope="module")
def imports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("imports")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, models: str, standin: Standin, imports: Path) -> Iterator[Stack]:
    """Beside the small models a random Llama of thirty-two blocks, under the name of the one in people's files."""
    llama = write_tiny(tmp_path_factory.mktemp("llama"), CORPUS, blocks=BLOCKS)
    made = Stack(
        tmp_path_factory.mktemp("experiments"),
        models=f"{models},meta-llama/Llama-3.1-8B={llama}",
        worker__adopt_seconds=0,
        adapters__import_dir=str(imports),
        adapters__tinker_url=standin.url,
        adapters__tinker_api_key=KEY,
        adapters__call_seconds=20,
    )
    try:
        yield made.up()
    finally:
        made.down()


def run(running: Stack, config: Any, seconds: float = 240) -> dict[str, Any]:
    """The experiment of a file; a text is YAML."""
    if isinstance(config, dict):
        answer = running.post("/v1/experiments", config, wait=60)
    else:
        answer = running.client.post(
            "/v1/experiments", content=config, headers={"Content-Type": "application/yaml", "Prefer": "wait=60"}
        )
    assert answer.status_code in (200, 202), answer.text
    job = running.job(answer.json()["id"], seconds=seconds)
    assert job["status"] == "succeeded", job
    found = running.client.get(job["resource"]).json()
    Experiment.model_validate(found)
    return dict(found)


def reused(experiment: dict[str, Any]) -> dict[str, bool]:
    return {stage["name"]: stage["reused"] for stage in experiment["stages"]}


def test_every_stage_is_taken_again_and_the_numbers_are_the_same(running: Stack) -> None:
    first = run(running, SMALL)
    assert reused(first) == {"extraction": False, "probe": False}
    assert first["config"]["probe"]["estimator"] == "logistic"
    assert first["config"]["dataset"]["seed"] == first["config"]["experiment"]["seed"] == 7  # whose rows these are
    [result] = first["results"]
    assert result["variant"] == "base"
    assert [one["layer"] for one in result["layers"]] == [1, 2, 4]
    assert result["held_out"]["auroc"]["low"] <= result["held_out"]["auroc"]["value"]
    probe = running.client.get(f"/v1/probes/{result['probe']}").json()
    assert probe["report"]["held_out"]["auroc"] == result["held_out"]["auroc"]
    again = run(running, json.dumps(SMALL).encode())
    assert reused(again) == {"extraction": True, "probe": True}
    assert again["results"] == first["results"]
    assert again["digests"] == first["digests"]
    assert again["id"] != first["id"]


def test_what_depends_on_a_change_is_made_anew(running: Stack) -> None:
    config = json.loads(json.dumps(SMALL)) | {"experiment": {"seed": 11}}
    first = run(running, config)
    other = run(running, config | {"probe": {"C": [0.01]}})
    assert reused(other) == {"extraction": True, "probe": False}
    assert other["digests"] == first["digests"]
    layers = run(running, config | {"extraction": {"layers": [1, 2]}})
    assert reused(layers) == {"extraction": False, "probe": False}
    assert running.client.delete(f"/v1/probes/{first['results'][0]['probe']}").status_code == 204
    assert reused(run(running, config)) == {"extraction": True, "probe": False}


def test_an_adapter_is_compared_with_its_base(running: Stack) -> None:
    adapter = added(running.client, archive(5, "peft"), base_model="tiny")
    config = SMALL | {"model": {"name": "tiny", "adapter": adapter["id"]}}
    found = run(running, config)
    assert reused(found) == {
        "adapter": True,
        "extraction": False,
        "probe base": False,
        "probe adapter": False,
        "comparison": False,
    }
    base, tuned = found["results"]
    assert (base["variant"], tuned["variant"]) == ("base", adapter["id"])
    assert found["digests"]["adapter"] == adapter["digest"]
    assert len(found["relative_change"]) == 3
    assert min(found["relative_change"]) > 0
    # The same rows, folds and seed: the comparison comes to the probes' own figures, and knows how their difference
    # spreads.
    for name, figure in found["differences"].items():
        values = [result["held_out"][name]["value"] for result in (base, tuned)]
        assert figure["value"] == pytest.approx(values[1] - values[0], abs=1e-9)
        assert figure["low"] <= figure["value"] <= figure["high"]
    for place, result in enumerate((base, tuned)):
        own = found["transfer"][place][place]["value"]
        assert own == pytest.approx(result["held_out"]["auroc"]["value"], abs=1e-9)
    moved = [layer["relative_norm"]["mean"] for layer in found["shift"]]
    assert moved == pytest.approx(found["relative_change"], rel=1e-3)
    assert running.client.get(found["links"]["comparison"]).json()["report"]["variants"][0]["name"] == "base"
    again = run(running, config)
    assert all(reused(again).values())
    assert (again["results"], again["differences"]) == (found["results"], found["differences"])
    # Of the same weights, deleted and added anew, nothing is taken that names the adapter which is gone.
    assert running.client.delete(f"/v1/adapters/{adapter['id']}").status_code == 204
    anew = added(running.client, archive(5, "peft"), base_model="tiny")["id"]
    other = run(running, SMALL | {"model": {"name": "tiny", "adapter": anew}})
    assert other["results"][1]["variant"] == anew
    assert reused(other) == reused(found)


def llama_adapter(folder: Path, seed: int = 3) -> Path:
    """As Tinker writes one, for every block."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    tensors = {}
    for layer in range(BLOCKS):
        prefix = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(4, 32) * 0.3
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(32, 4) * 0.3
    save_file(tensors, folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "bias": "none", "r": 4, "lora_alpha": 32, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    (folder / "checkpoint_complete").write_text("")
    return folder


def test_the_file_that_people_have_runs_as_it_stands(running: Stack, standin: Standin, tmp_path: Path) -> None:
    made = standin.add_run(base_model="meta-llama/Llama-3.1-8B", rank=4, run_id="abc123")
    folder = llama_adapter(tmp_path / "files")
    made.add_checkpoint("external_weights", "final", folder)
    made.add_checkpoint("sampler_weights", "final", folder)
    found = run(running, LLAMA)
    assert not any(reused(found).values())
    assert found["layers"] == [8, 16, 24, 31]
    assert len(found["notices"]) == 3
    assert [result["variant"] for result in found["results"]] == [
        "base",
        found["stages"][0]["resource"].rpartition("/")[2],
    ]
    assert min(found["relative_change"]) > 0
    again = run(running, LLAMA)
    assert all(reused(again).values())
    for name in ("results", "differences", "digests"):
        assert again[name] == found[name]


def test_an_adapter_that_is_fetched_anew_leaves_the_rest_as_it_is(running: Stack, imports: Path) -> None:
    """A file may hold other weights the next time: only the worker sees that they are the same, or not."""
    llama_adapter(imports / "mine", seed=1)
    config = SMALL | {
        "model": {"name": "meta-llama/Llama-3.1-8B", "adapter": f"file://{imports / 'mine'}"},
        "extraction": {"layers": [3]},
    }
    found = run(running, config)
    again = run(running, config)
    assert [stage["job"] is None for stage in again["stages"]] == [False] * 5
    assert all(reused(again).values())
    assert [one["resource"] for one in again["stages"]] == [one["resource"] for one in found["stages"]]
    assert again["results"] == found["results"]
    (imports / "mine" / "adapter_model.safetensors").unlink()
    llama_adapter(imports / "mine", seed=2)
    other = run(running, config)
    assert not any(reused(other).values())
    assert other["digests"]["adapter"] != found["digests"]["adapter"]


def test_a_stage_that_fails_is_the_experiments_failure(running: Stack, standin: Standin) -> None:
    config = SMALL | {"tinker": {"checkpoint_path": "tinker://nobody/weights/none"}}
    answer = running.post("/v1/experiments", config, wait=0)
    assert answer.status_code in (200, 202), answer.text
    job = running.job(answer.json()["id"])
    assert job["status"] == "failed", job
    stages = {stage["name"]: running.job(stage["job"]) for stage in job["request"]["stages"]}
    cause = job["error"]
    while cause.get("cause"):
        cause = cause["cause"]
    assert stages["adapter"]["error"]["type"] == cause["type"] == "/problems/tinker-export-off"
    assert {stage["status"] for stage in stages.values()} == {"failed"}


def test_cancelled_its_stages_are_too(running: Stack) -> None:
    config = SMALL | {"dataset": {"name": "capitals"}, "experiment": {"seed": 99}}
    job = running.post("/v1/experiments", config, wait=0).json()
    assert running.client.post(f"/v1/jobs/{job['id']}/cancel").status_code == 200
    assert running.job(job["id"])["status"] == "cancelled"
    for stage in job["request"]["stages"]:
        assert running.job(stage["job"])["status"] in ("cancelled", "succeeded")


def test_the_same_key_makes_one_experiment(running: Stack) -> None:
    config = SMALL | {"experiment": {"seed": 5}}
    first = running.post("/v1/experiments", config, wait=0, **{"Idempotency-Key": "once"}).json()
    queued = [job["id"] for job in running.client.get("/v1/jobs?limit=200").json()["data"]]
    second = running.post("/v1/experiments", config, **{"Idempotency-Key": "once"})
    assert second.json()["id"] == first["id"]
    assert second.headers["idempotent-replayed"] == "true"
    assert [job["id"] for job in running.client.get("/v1/jobs?limit=200").json()["data"]] == queued
    assert running.job(first["id"])["status"] == "succeeded"


@pytest.mark.parametrize(
    ("config", "status", "slug", "pointer"),
    [
        (SMALL | {"modle": {}}, 422, "invalid-request", "/modle"),
        (SMALL | {"model": {"name": "none"}}, 404, "model-unknown", "/model/name"),
        (SMALL | {"extraction": {"layers": [99]}}, 422, "invalid-request", "/extraction/layers/0"),
        (SMALL | {"probe": {"folds": 1}}, 422, "invalid-request", "/probe/folds"),
        (SMALL | {"model": {"name": "tiny", "adapter": "ad_none"}}, 404, "not-found", "/model/adapter"),
        (SMALL | {"model": {"name": "tiny", "adapter": "x"}}, 404, "not-found", "/model/adapter"),
        (SMALL | {"model": {"name": "tiny", "adapter": "ftp://x"}}, 422, "invalid-request", "/model/adapter"),
        (SMALL | {"experiment": {"seed": 10**40}}, 422, "invalid-request", "/experiment/seed"),
        (b"model: [", 400, "malformed-body", None),
        (
            b"model: {name: tiny}\nextraction: {layers: [1, -9%s]}" % (b"9" * 30),
            422,
            "invalid-request",
            "/extraction/layers/1",
        ),
        (b'model: {name: "\\ud800"}', 400, "malformed-body", None),
        (b'"\\ud800": 1', 400, "malformed-body", None),
        (b'model: {name: "\\U00110000"}', 400, "malformed-body", None),
        (b'model: {name: "\\UFFFFFFFF"}', 400, "malformed-body", None),
    ],
)
def test_what_is_wrong_is_told_and_nothing_is_queued(
    running: Stack, config: Any, status: int, slug: str, pointer: str | None
) -> None:
    before = running.client.get("/v1/jobs").json()["data"]
    if isinstance(config, bytes):
        answer = running.client.post("/v1/experiments", content=config, headers={"Content-Type": "application/yaml"})
    else:
        answer = running.post("/v1/experiments", config, wait=0)
    found = problem(answer, status, slug)
    if pointer is not None:
        assert [one["pointer"] for one in found["errors"]] == [pointer]
    after = running.client.get("/v1/jobs").json()["data"]
    open_before = [job["id"] for job in before if job["status"] in ("queued", "running")]
    assert [job["id"] for job in after if job["status"] in ("queued", "running")] == open_before


def test_lists_deletes_and_formats(running: Stack) -> None:
    found = run(running, SMALL)
    listed = running.client.get("/v1/experiments").json()["data"]
    assert found["id"] in [one["id"] for one in listed]
    assert running.client.delete(f"/v1/experiments/{found['id']}").status_code == 204
    problem(running.client.get(f"/v1/experiments/{found['id']}"), 404, "not-found")
    problem(
        running.client.post("/v1/experiments", content=b"a", headers={"Content-Type": "text/plain"}),
        415,
        "unsupported-media",
    )


def test_the_example_runs_from_the_command_line_and_again(running: Stack, tmp_path: Path) -> None:
    """The real model, on fewer rows and layers than the example has."""
    content = yaml.safe_load(Path("examples/capitals.yaml").read_text())
    content["dataset"]["limit"], content["extraction"]["layers"], content["evaluation"]["bootstrap"] = 120, [8, 16], 100
    file, page = tmp_path / "study.yaml", tmp_path / "study.html"
    file.write_text(yaml.safe_dump(content))
    found = []
    for _ in range(2):
        command = [sys.executable, "-P", "-m", "bathyscope.cli", "run", str(file), "--report", str(page), "--json"]
        ended = subprocess.run(
            command, env=os.environ | {"BATHYSCOPE_URL": running.url}, capture_output=True, text=True
        )
        assert ended.returncode == 0, ended.stderr
        found.append(Experiment.model_validate_json(ended.stdout))
    assert [stage.reused for stage in found[0].stages] == [False, False]
    assert [stage.reused for stage in found[1].stages] == [True, True]
    assert found[1].results == found[0].results
    assert found[0].results[0].held_out["auroc"]["value"] > 0.6
    text = page.read_text()
    assert found[1].id in text
    assert text.count("data:image/svg+xml") == 2  # one picture in two themes


def test_the_command_line_sends_ones_own_key_for_tinker(running: Stack, standin: Standin, tmp_path: Path) -> None:
    theirs = f"tml-{'7' * 32}"
    standin.add_key(theirs)
    made = standin.add_run(base_model="meta-llama/Llama-3.1-8B", rank=4, key=theirs)
    source = made.add_checkpoint("external_weights", "final", llama_adapter(tmp_path / "files", seed=9))
    content = {**SMALL, "model": {"name": "meta-llama/Llama-3.1-8B"}, "tinker": {"checkpoint_path": source}}
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump({**content, "extraction": {"layers": [2]}}))
    ended = subprocess.run(
        [sys.executable, "-P", "-m", "bathyscope.cli", "run", str(file)],
        env=os.environ | {"BATHYSCOPE_URL": running.url, "TINKER_API_KEY": theirs},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert "minus base" in ended.stdout
    assert theirs not in ended.stdout + ended.stderr


def test_the_page_and_the_pictures_are_of_the_experiment(running: Stack) -> None:
    name = "<script>alert(1)</script> $x_1$"
    adapter = added(running.client, archive(6, "peft"), base_model="tiny")
    config = SMALL | {"model": {"name": "tiny", "adapter": adapter["id"]}, "experiment": {"name": name}}
    found = run(running, config)
    page = running.client.get(found["links"]["report"])
    assert page.headers["content-type"].startswith("text/html")
    assert "<script>" not in page.text
    assert "&lt;script&gt;" in page.text
    assert adapter["id"] in page.text
    for plot in ("layer_curve", "transfer", "layer_shift"):
        for form, begins in (("png", b"\x89PNG"), ("svg", b"<?xml")):
            answer = running.client.get(f"/v1/experiments/{found['id']}/plots/{plot}?format={form}&theme=dark")
            assert answer.status_code == 200, answer.text
            assert answer.content.startswith(begins)
    alone = run(running, SMALL)
    problem(running.client.get(f"/v1/experiments/{alone['id']}/plots/layer_shift"), 422, "invalid-request")
