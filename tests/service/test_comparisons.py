"""Comparisons through the whole installation."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file

import bathyscope
from bathyscope import plots, reports
from bathyscope.datasets import CapitalsDataset
from bathyscope.types import Comparison
from tests.service.test_adapters import added
from tests.service.test_adapters_live import ALPHA, RANK, archive, tensors
from tests.service.test_manners import problem
from tests.stack import Stack
from tests.tinker_standin import Standin

MINE = f"tml-{secrets.token_hex(16)}"
ROWS = CapitalsDataset(limit=80, seed=3)
LAYERS = [0, 2, 4]


@pytest.fixture(scope="module")
def standin() -> Iterator[Standin]:
    with Standin() as server:
        server.add_key(MINE)
        yield server


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, models: str, standin: Standin) -> Iterator[Stack]:
    tiny = dict(pair.split("=") for pair in models.split(","))["tiny"]
    made = Stack(
        tmp_path_factory.mktemp("comparisons"),
        models=f"{models},org/tiny={tiny}",
        worker__adopt_seconds=0,
        adapters__tinker_url=standin.url,
        adapters__tinker_api_key=MINE,
        adapters__call_seconds=20,
    )
    try:
        yield made.up()
    finally:
        made.down()


@pytest.fixture(scope="module")
def adapters(running: Stack) -> list[dict[str, Any]]:
    return [added(running.client, archive(seed, "peft"), base_model="tiny", name=f"tune {seed}") for seed in (1, 2)]


def body(**more: Any) -> dict[str, Any]:
    return {
        "model": "tiny",
        "inputs": list(ROWS.inputs),
        "labels": [bool(one) for one in ROWS.labels or []],
        "groups": list(ROWS.groups or []),
        "layers": LAYERS,
        "bootstrap": 100,
        **more,
    }


def compare(running: Stack, **more: Any) -> dict[str, Any]:
    answer = running.post("/v1/comparisons", body(**more))
    assert answer.status_code in (200, 202), answer.text
    job = running.job(answer.json()["id"], seconds=240)
    assert job["status"] == "succeeded", job["error"]["detail"]
    found = running.client.get(job["resource"]).json()
    Comparison.model_validate(found)
    return dict(found)


def states(running: Stack, extraction: str) -> Any:
    content = running.client.get(f"/v1/extractions/{extraction}/hidden_states?format=npy").content
    import io

    return np.load(io.BytesIO(content))


def test_base_and_adapters_on_the_same_tokens(running: Stack, adapters: list[dict[str, Any]]) -> None:
    found = compare(running, variants=["base", *(one["id"] for one in adapters)], name="what it did")
    names = ["base", "tune 1", "tune 2"]
    assert [one["name"] for one in found["variants"]] == names
    assert [one["digest"] for one in found["variants"]] == [None, *(one["digest"] for one in adapters)]
    assert len({one["extraction"] for one in found["variants"]}) == 1
    report = found["report"]
    assert [one["name"] for one in report["variants"]] == names
    assert all([one["layer"] for one in variant["layers"]] == LAYERS for variant in report["variants"])
    for difference in report["differences"]:
        figure = difference["held_out"]["auroc"]
        assert figure["low"] <= figure["value"] <= figure["high"]
        assert difference["held_out"]["ece"] is not None
    assert np.array(report["transfer"]["values"]).shape == (3, 3)
    # Of the last token's embedding, a full stop in every row, no probe has a direction.
    assert [one["layer"] for one in report["directions"]] == LAYERS[1:]
    for matrix in report["directions"]:
        np.testing.assert_allclose(np.diag(np.array(matrix["values"], dtype=float)), 1, atol=1e-6)
    whole = states(running, found["variants"][0]["extraction"]).astype(np.float64)
    for place, shift in enumerate(report["shift"], start=1):
        moved = np.linalg.norm(whole[place] - whole[0], axis=-1) / np.linalg.norm(whole[0], axis=-1)
        for number, layer in enumerate(shift["layers"]):
            assert layer["relative_norm"]["mean"] == pytest.approx(moved[:, number].mean(), rel=1e-4, abs=1e-9)
            assert layer["relative_norm"]["median"] == pytest.approx(np.median(moved[:, number]), rel=1e-4, abs=1e-9)


def test_a_variants_figures_are_those_of_its_own_probe(running: Stack, adapters: list[dict[str, Any]]) -> None:
    """The same rows, folds and seed: a probe on the paired extraction says the same of its variant."""
    found = compare(running, variants=["base", adapters[0]["id"]])
    extraction = found["variants"][0]["extraction"]
    for place, variant in enumerate(("base", adapters[0]["id"])):
        settings = {name: value for name, value in body().items() if name in ("labels", "groups", "bootstrap")}
        answer = running.post("/v1/probes", {"extraction": extraction, "variant": variant, **settings})
        job = running.job(answer.json()["id"])
        assert job["status"] == "succeeded", job["error"]["detail"]
        report = running.client.get(job["resource"]).json()["report"]
        mine = found["report"]["variants"][place]
        for theirs, ours in zip(report["layers"], mine["layers"], strict=True):
            assert ours["auroc"]["value"] == pytest.approx(theirs["auroc"]["value"], abs=1e-9)
            assert ours["ece"]["value"] == pytest.approx(theirs["ece"]["value"], abs=1e-9)
        assert mine["best_layer"] == report["best_layer"]
        assert mine["held_out"]["auroc"]["value"] == pytest.approx(report["held_out"]["auroc"]["value"], abs=1e-9)


def test_quantizations_of_a_real_model(running: Stack) -> None:
    found = compare(running, model="smollm2", quantizations=["none", "8bit", "4bit"], layers=[8, 15])
    assert found["compares"] == "quantizations"
    assert [one["quantization"] for one in found["variants"]] == ["none", "8bit", "4bit"]
    assert len({one["extraction"] for one in found["variants"]}) == 3
    eight, four = ([layer["cosine"]["median"] for layer in shift["layers"]] for shift in found["report"]["shift"])
    assert all(0.9 < coarse < fine < 1 for fine, coarse in zip(eight, four, strict=True))
    for difference in found["report"]["differences"]:
        assert all(one["auroc"]["low"] <= one["auroc"]["value"] <= one["auroc"]["high"] for one in difference["layers"])


def checkpoint(folder: Path, seed: int) -> Path:
    """Files as Tinker writes them."""
    folder.mkdir()
    save_file(tensors(seed), folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "bias": "none", "r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    (folder / "checkpoint_complete").write_text("")
    return folder


def fetches(running: Stack) -> int:
    """How many adapters were asked for so far."""
    return len(running.client.get("/v1/jobs?kind=adapter&limit=200").json()["data"])


def test_checkpoints_of_a_run_are_fetched_and_stand_by_step(running: Stack, standin: Standin, tmp_path: Path) -> None:
    run = standin.add_run(base_model="org/tiny", rank=RANK, key=MINE)
    for step in (20, 3, 100):
        folder = checkpoint(tmp_path / str(step), step)
        run.add_checkpoint("weights", f"step-{step}", folder)
        source = run.add_checkpoint("external_weights", f"step-{step}", folder)
    run.add_checkpoint("external_weights", "final", tmp_path / "100")  # the last step once more
    run.add_checkpoint("weights", "state-50", tmp_path / "3")  # which only a billed session could give
    job = running.job(running.post("/v1/adapters", {"source": source, "base_model": "org/tiny"}).json()["id"])
    assert job["status"] == "succeeded", job["error"]["detail"]
    asked = fetches(running)
    found = compare(running, model="org/tiny", variants=["base", f"tinker://{run.id}/*"])
    assert fetches(running) == asked + 3  # what is an adapter already is not fetched again
    assert found["compares"] == "checkpoints"
    assert [one["name"] for one in found["variants"]] == ["base", "step-3", "step-20", "step-100", "final"]
    assert [one["step"] for one in found["variants"]] == [None, 3, 20, 100, None]
    assert [one["source"] for one in found["variants"][1:]] == [
        f"tinker://{run.id}/external_weights/{name}" for name in ("step-3", "step-20", "step-100", "final")
    ]
    assert len({one["digest"] for one in found["variants"]}) == 4  # the end has the weights of the last step
    assert found["variants"][3]["adapter"] == found["variants"][4]["adapter"] == job["resource"].rpartition("/")[2]
    last, final = (one["held_out"]["auroc"] for one in found["report"]["differences"][2:])
    assert final == pytest.approx(last, abs=1e-9)
    [notice] = found["notices"]
    assert "state-50" in notice
    assert "training checkpoint" in notice
    # Row by row the same as with adapters that were made before, and nothing is fetched now.
    again = compare(running, model="org/tiny", variants=["base", f"tinker://{run.id}/*"])
    assert fetches(running) == asked + 3
    assert again["report"] == found["report"]
    for form, begins in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        answer = running.client.get(f"/v1/comparisons/{found['id']}/plots/steps?format={form}")
        assert answer.content.startswith(begins), answer.text
    page = running.client.get(found["links"]["report"]).text
    assert page.count("data:image/svg+xml") == 8
    assert "state-50" in page


def test_checkpoints_come_with_the_key_of_the_request(running: Stack, standin: Standin, tmp_path: Path) -> None:
    theirs = f"tml-{secrets.token_hex(16)}"
    standin.add_key(theirs)
    run = standin.add_run(base_model="org/tiny", rank=RANK, key=theirs)
    run.add_checkpoint("external_weights", "1", checkpoint(tmp_path / "1", 7))
    asked = fetches(running)
    request = body(model="org/tiny", variants=[f"tinker://{run.id}/*", "base"])
    found = problem(running.post("/v1/comparisons", request, wait=0), 404, "tinker-not-found")  # the operator's key
    assert [one["pointer"] for one in found["errors"]] == ["/variants/0"]
    assert fetches(running) == asked
    with bathyscope.Client(running.url, tinker_api_key=theirs) as client:
        job = client.comparisons.create(**request, idempotency_key="once")
        done = job.wait()
        assert [one.name for one in done.variants] == ["1", "base"]
        assert client.comparisons.create(**request, idempotency_key="once").id == job.id
    # The operator's key lists nothing of that run; what was fetched before is compared, and it is said.
    again = compare(running, **{**request, "model": "org/tiny"})
    assert [one["name"] for one in again["variants"]] == ["1", "base"]
    [notice] = again["notices"]
    assert "X-Tinker-Api-Key" in notice
    assert theirs not in json.dumps(running.client.get("/v1/jobs?limit=200").json())


def test_a_checkpoint_that_cannot_be_had_fails_the_comparison_with_its_reason(
    running: Stack, standin: Standin, tmp_path: Path
) -> None:
    run = standin.add_run(base_model="org/tiny", rank=RANK, key=MINE)
    folder = checkpoint(tmp_path / "1", 8)
    run.add_checkpoint("external_weights", "1", folder)
    broken = checkpoint(tmp_path / "2", 8)
    (broken / "adapter_model.safetensors").unlink()
    run.add_checkpoint("external_weights", "2", broken)
    request = body(model="org/tiny", variants=["base", f"tinker://{run.id}/*"])
    job = running.job(running.post("/v1/comparisons", request, wait=0).json()["id"])
    assert job["status"] == "failed"
    cause = job["error"]
    while cause.get("cause"):
        cause = cause["cause"]
    assert cause["type"] == "/problems/adapter-incomplete", job["error"]
    states = next(one for one in running.client.get("/v1/jobs").json()["data"] if one["kind"] == "extraction")
    assert states["status"] == "failed"


@pytest.mark.parametrize(
    ("run", "status", "slug", "says"),
    [
        ("empty", 422, "invalid-request", "no checkpoints"),
        ("training", 403, "tinker-export-off", "training checkpoints only"),
        ("other", 404, "tinker-not-found", "no such run"),
        ("..", 422, "invalid-request", "tinker://RUN"),
        ("many", 422, "invalid-request", "by their adapters' ids"),
    ],
)
def test_a_run_that_gives_nothing_to_compare(
    running: Stack, standin: Standin, tmp_path: Path, run: str, status: int, slug: str, says: str
) -> None:
    made = standin.add_run(base_model="org/tiny", rank=RANK, key=MINE)
    if run == "training":
        made.add_checkpoint("weights", "1", checkpoint(tmp_path / "1", 1))
    for number in range(17 if run == "many" else 0):
        made.add_checkpoint("external_weights", str(number), {})
    named = made.id if run in ("empty", "training", "many") else run
    before = len(running.client.get("/v1/jobs?limit=200").json()["data"])
    request = body(model="org/tiny", variants=["base", f"tinker://{named}/*"])
    found = problem(running.post("/v1/comparisons", request, wait=0), status, slug)
    assert says in f"{found['detail']} {found['errors']}"
    assert found["errors"][0]["pointer"].startswith("/variants")
    assert len(running.client.get("/v1/jobs?limit=200").json()["data"]) == before


def test_what_is_wrong_beside_a_run_is_told_before_anything_is_fetched(
    running: Stack, standin: Standin, tmp_path: Path
) -> None:
    run = standin.add_run(base_model="org/tiny", rank=RANK, key=MINE)
    run.add_checkpoint("external_weights", "1", checkpoint(tmp_path / "1", 9))
    before = fetches(running)
    request = body(model="org/tiny", variants=["base", f"tinker://{run.id}/*"], layers=[99])
    found = problem(running.post("/v1/comparisons", request, wait=0), 422, "invalid-request")
    assert [one["pointer"] for one in found["errors"]] == ["/layers/0"]
    assert fetches(running) == before


def test_a_dataset_brings_its_own_labels(running: Stack, adapters: list[dict[str, Any]]) -> None:
    request = {
        "model": "tiny",
        "variants": ["base", adapters[0]["id"]],
        "dataset": {"name": "capitals", "limit": 60},
        "layers": [2],
        "bootstrap": 0,
    }
    job = running.job(running.post("/v1/comparisons", request).json()["id"])
    assert job["status"] == "succeeded", job["error"]["detail"]
    assert running.client.get(job["resource"]).json()["inputs"] == 60
    found = problem(
        running.post("/v1/comparisons", request | {"dataset": {"name": "arithmetic", "limit": 60}}),
        422,
        "invalid-request",
    )
    assert [one["pointer"] for one in found["errors"]] == ["/labels"]


def test_pictures_and_page(running: Stack, adapters: list[dict[str, Any]]) -> None:
    found = compare(running, variants=["base", adapters[1]["id"]], name="<script>x</script>")
    for name in ("layer_curve", "transfer", "layer_shift"):
        for form, begins in (("png", b"\x89PNG"), ("svg", b"<?xml")):
            answer = running.client.get(f"/v1/comparisons/{found['id']}/plots/{name}?format={form}&theme=dark")
            assert answer.status_code == 200, answer.text
            assert answer.content.startswith(begins)
    page = running.client.get(found["links"]["report"])
    assert page.status_code == 200, page.text
    assert "<script>" not in page.text
    assert "&lt;script&gt;" in page.text
    assert page.text.count("data:image/svg+xml") == 6  # three pictures in two themes
    problem(running.client.get(f"/v1/comparisons/{found['id']}/plots/none"), 422, "invalid-request")


def test_the_sdk_says_the_same(running: Stack, adapters: list[dict[str, Any]], tmp_path: Path) -> None:
    with bathyscope.Client(running.url) as client:
        job = client.comparisons.create(**body(variants=["base", adapters[0]["id"]]))
        found = job.wait()
        assert [one.name for one in found.variants] == ["base", "tune 1"]
        assert found.report is not None
        assert client.comparisons.get(found.id).summary == found.summary
        assert found.id in [one.id for one in client.comparisons.list()]
        reports.save(found, tmp_path / "page.html")
        plots.save(found, "transfer", tmp_path / "transfer.svg")
        client.comparisons.delete(found.id)
    problem(running.client.get(f"/v1/comparisons/{found.id}"), 404, "not-found")


@pytest.mark.parametrize(
    ("more", "status", "slug", "pointer"),
    [
        ({"variants": ["base"]}, 422, "invalid-request", ""),
        ({"variants": ["base", "base"]}, 422, "invalid-request", ""),
        ({"variants": ["base", "ad_none"]}, 404, "not-found", None),
        ({"variants": ["base", "tinker://none/*"]}, 404, "tinker-not-found", "/variants/1"),
        ({"variants": ["base", "tinker://run/weights/1"]}, 422, "invalid-request", "/variants/1"),
        ({"quantizations": ["none"]}, 422, "invalid-request", "/quantizations"),
        ({"quantizations": ["none", "2bit"]}, 422, "invalid-request", "/quantizations/1"),
        ({"quantizations": ["none", "8bit"], "labels": [True]}, 422, "invalid-request", "/labels"),
        ({"quantizations": ["none", "8bit"], "layers": [99]}, 422, "invalid-request", "/layers/0"),
        ({"quantizations": ["none", "8bit"], "pooling": "none"}, 422, "invalid-request", ""),
        ({"quantizations": ["none", "8bit"], "model": "nothing"}, 404, "model-unknown", None),
    ],
)
def test_what_is_wrong_is_told_and_nothing_is_queued(
    running: Stack, more: dict[str, Any], status: int, slug: str, pointer: str | None
) -> None:
    before = [job["id"] for job in running.client.get("/v1/jobs").json()["data"]]
    found = problem(running.post("/v1/comparisons", body(**more), wait=0), status, slug)
    if pointer is not None:
        assert [one["pointer"] for one in found["errors"]] == [pointer]
    assert [job["id"] for job in running.client.get("/v1/jobs").json()["data"]] == before
