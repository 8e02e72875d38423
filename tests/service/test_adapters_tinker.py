"""Adapters of Tinker through the whole installation: a real worker and the real SDK against the stand-in of Tinker."""

from __future__ import annotations

import asyncio
import json
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from safetensors.torch import save_file

import bathyscope
from bathyscope import errors
from bathyscope.types import TinkerModels
from tests.service.test_adapters import files, traces
from tests.service.test_adapters_live import ALPHA, RANK, tensors
from tests.service.test_keys import as_user, make_key
from tests.service.test_manners import problem
from tests.stack import Stack
from tests.tinker_standin import KEY, Fault, Run, Standin

MINE, OTHERS = f"tml-{secrets.token_hex(16)}", f"tml-{secrets.token_hex(16)}"
BASE = "org/tiny"


@pytest.fixture(scope="module")
def standin() -> Iterator[Standin]:
    with Standin() as server:
        server.add_key(MINE)
        server.add_key(OTHERS)
        yield server


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, models: str, standin: Standin) -> Iterator[Stack]:
    """Open to training checkpoints; the operator has a key of its own, which is not the one that requests send."""
    tiny = dict(pair.split("=") for pair in models.split(","))["tiny"]
    made = Stack(
        tmp_path_factory.mktemp("tinker"),
        models=f"tiny={tiny},{BASE}={tiny}",
        worker__adopt_seconds=0,
        log_level="debug",
        adapters__tinker_url=standin.url,
        adapters__tinker_api_key=KEY,
        adapters__allow_training_export=True,
        adapters__call_seconds=20,
        jobs__max_attempts=1,
    )
    try:
        yield made.up()
    finally:
        made.down()


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory, models: str, standin: Standin) -> Iterator[Stack]:
    """As it comes: no key of the operator's, no training checkpoints."""
    made = Stack(
        tmp_path_factory.mktemp("closed"),
        models=models,
        log_level="debug",
        adapters__tinker_url=standin.url,
        adapters__call_seconds=5,
    )
    for name in ("TINKER_API_KEY", "TINKER_BASE_URL"):
        made.environment.pop(name, None)
    try:
        yield made.up()
    finally:
        made.down()


def written(folder: Path, seed: int) -> Path:
    """An adapter for the tiny model, as Tinker writes one."""
    folder.mkdir()
    save_file(tensors(seed), folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "bias": "none", "r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "checkpoint_complete").write_text("")
    return folder


@pytest.fixture
def run(standin: Standin) -> Run:
    return standin.add_run(base_model=f"{BASE}:peft:262144", rank=RANK, key=MINE)


def ended(stack: Stack, source: str, key: str | None = MINE, **fields: Any) -> dict[str, Any]:
    headers = {"X-Tinker-Api-Key": key} if key else {}
    answer = stack.post("/v1/adapters", {"source": source, **fields}, **headers)
    assert answer.status_code in (200, 202), answer.text
    return stack.job(answer.json()["id"])


def refused(stack: Stack, slug: str, source: str, key: str | None = MINE, **fields: Any) -> dict[str, Any]:
    """The problem that ends the job; nothing is left."""
    job = ended(stack, source, key, **fields)
    assert job["status"] == "failed", job
    assert job["error"]["type"] == f"/problems/{slug}", job["error"]
    deadline = time.monotonic() + 10
    while traces(stack) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not traces(stack)
    assert not files(stack)
    assert MINE not in str(job)
    return dict(job["error"])


def added(stack: Stack, source: str, key: str | None = MINE, **fields: Any) -> dict[str, Any]:
    job = ended(stack, source, key, **fields)
    assert job["status"] == "succeeded", job
    return dict(stack.client.get(job["resource"]).json())


# --- from each kind of checkpoint to an adapter ---------------------------------------------------------------------


def test_what_tinker_says_is_held_against_what_is_asked(
    live: Stack, standin: Standin, run: Run, tmp_path: Path
) -> None:
    folder = written(tmp_path / "files", 2)
    elsewhere = standin.add_run(base_model="meta-llama/Llama-3.2-1B", rank=RANK, key=MINE)
    path = elsewhere.add_checkpoint("external_weights", "final", folder)
    error = refused(live, "adapter-base-mismatch", path, base_model=BASE)
    assert "meta-llama/Llama-3.2-1B" in error["detail"]
    assert BASE in error["detail"]
    error = refused(live, "adapter-base-mismatch", path)
    assert "not offered here" in error["detail"]
    wide = standin.add_run(base_model=BASE, rank=RANK * 2, key=MINE)
    error = refused(live, "adapter-config-invalid", wide.add_checkpoint("external_weights", "final", folder))
    assert f"rank {RANK * 2}" in error["detail"]


def test_the_key_of_the_request_beats_the_operators(live: Stack, standin: Standin, run: Run, tmp_path: Path) -> None:
    folder = written(tmp_path / "files", 3)
    operators = standin.add_run(base_model=BASE, rank=RANK).add_checkpoint("external_weights", "final", folder)
    mine = run.add_checkpoint("external_weights", "final", folder)
    refused(live, "tinker-not-found", operators, MINE)
    refused(live, "tinker-not-found", mine, None)
    adapter = added(live, operators, None)
    refused_here = ended(live, mine, OTHERS)  # though these weights are here already
    assert refused_here["error"]["type"] == "/problems/tinker-not-found"
    live.client.delete(f"/v1/adapters/{adapter['id']}")


@pytest.mark.parametrize(
    ("route", "status", "slug", "words"),
    [
        ("config", 401, "tinker-key-refused", "X-Tinker-Api-Key"),
        ("info", 402, "tinker-billing", "billing"),
        ("urls", 403, "tinker-forbidden", "own account"),
    ],
)
def test_each_answer_is_a_problem_of_the_job(
    live: Stack, standin: Standin, run: Run, tmp_path: Path, route: str, status: int, slug: str, words: str
) -> None:
    source = run.add_checkpoint("external_weights", "final", written(tmp_path / "files", 5))
    standin.fail(route, Fault(status=status), times=50)
    try:
        assert words in refused(live, slug, source)["detail"]
    finally:
        standin.state.faults.clear()


def test_a_sampler_checkpoint_alone_says_what_exists(live: Stack, run: Run, tmp_path: Path) -> None:
    folder = written(tmp_path / "files", 6)
    run.add_checkpoint("external_weights", "step-1", folder)
    error = refused(live, "tinker-not-downloadable", run.add_checkpoint("sampler_weights", "final", folder))
    assert error["exists"] == ["external_weights/step-1", "sampler_weights/final"]
    assert "save_weights_external" in error["detail"]


# --- as the service comes --------------------------------------------------------------------------------------------


def test_training_checkpoints_are_off_and_it_says_what_they_cost(closed: Stack, run: Run, tmp_path: Path) -> None:
    error = refused(closed, "tinker-export-off", run.add_checkpoint("weights", "final", written(tmp_path / "files", 7)))
    for words in ("billed", "operator", "adapters.allow_training_export", "save_weights_external"):
        assert words in error["detail"]


def test_without_a_key_each_route_says_what_is_missing_and_the_rest_works(
    closed: Stack, run: Run, tmp_path: Path
) -> None:
    source = run.add_checkpoint("external_weights", "final", written(tmp_path / "files", 8))
    error = refused(closed, "tinker-not-set-up", source, None, base_model="tiny")
    for words in ("X-Tinker-Api-Key", "BATHYSCOPE_ADAPTERS__TINKER_API_KEY"):
        assert words in error["detail"]
    missing = problem(closed.client.get("/v1/tinker/models"), 503, "tinker-not-set-up")
    for words in ("X-Tinker-Api-Key", "BATHYSCOPE_ADAPTERS__TINKER_API_KEY"):
        assert words in missing["detail"]
    assert closed.extract(["a"], model="tiny")["inputs"] == 1
    adapter = added(closed, source, base_model="tiny")
    closed.client.delete(f"/v1/adapters/{adapter['id']}")


def test_what_tinker_supports(live: Stack, closed: Stack, standin: Standin) -> None:
    standin.state.models.clear()
    standin.add_model("Qwen/Qwen3-8B", trainable=False)
    standin.add_model(f"{BASE}:peft:1")
    found = live.client.get("/v1/tinker/models")
    assert found.status_code == 200, found.text
    listed = TinkerModels.model_validate(found.json()).data
    assert [(one.name, one.trainable, one.model) for one in listed] == [
        ("Qwen/Qwen3-8B", False, None),
        (f"{BASE}:peft:1", True, BASE),
    ]
    asked = standin.asked("get_server_capabilities")
    assert live.client.get("/v1/tinker/models").json() == found.json()
    assert standin.asked("get_server_capabilities") == asked  # kept for a minute
    with_mine = closed.client.get("/v1/tinker/models", headers={"X-Tinker-Api-Key": MINE})
    assert [one["model"] for one in with_mine.json()["data"]] == [None, None]
    standin.state.models.clear()


@pytest.mark.parametrize(
    ("status", "slug"),
    [
        (401, "tinker-key-refused"),
        (402, "tinker-billing"),
        (403, "tinker-forbidden"),
        (404, "tinker-not-found"),
        (410, "tinker-not-found"),
        (429, "tinker-rate-limited"),
        (503, "tinker-out-of-reach"),
    ],
)
def test_what_tinker_answers_to_the_question_for_models(
    closed: Stack, standin: Standin, status: int, slug: str
) -> None:
    key = standin.add_key(f"tml-{secrets.token_hex(8)}")
    standin.fail("capabilities", Fault(status=status, headers={"Retry-After": "1"}), times=100)
    try:
        answer = closed.client.get("/v1/tinker/models", headers={"X-Tinker-Api-Key": key}, timeout=60)
    finally:
        standin.state.faults.clear()
    document = answer.json()
    assert (document["type"], document["status"]) == (f"/problems/{slug}", answer.status_code)
    assert answer.status_code == errors.PROBLEMS[slug].status
    assert key not in answer.text + closed.said()


# --- the SDK's helper ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "awaited"), [("external_weights", False), ("weights", True), ("sampler_weights", False), ("archive", True)]
)
def test_download_and_convert(
    live: Stack, standin: Standin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, awaited: bool
) -> None:
    """In a user's own words: the folder, what is beside it, and every field of what is known."""
    folder = written(tmp_path / "files", 10)
    run = standin.add_run(base_model=f"{BASE}:peft:262144", rank=RANK, key=MINE)
    run.user_metadata = {"dataset": "of the run"}
    if kind == "sampler_weights":
        run.add_checkpoint("external_weights", "final", folder)
    if kind == "archive":
        monkeypatch.setattr(standin.state, "archive", "302")
        monkeypatch.setattr(standin.state, "archive_pending", 1)
    source = run.add_checkpoint("sampler_weights" if kind == "archive" else kind, "final", folder)
    checkpoint = run.checkpoints[source.partition(f"{run.id}/")[2]]
    checkpoint.made = 1_750_000_000.0
    if kind == "external_weights":
        checkpoint.user_metadata = {"training_dataset": "mmlu"}
    monkeypatch.setenv("TINKER_API_KEY", MINE)  # as Tinker users have it
    out, given = tmp_path / "out", {"cleanup_archive": not awaited}

    async def call() -> Path:
        async with bathyscope.AsyncClient(live.url) as client:
            return await client.tinker.download_and_convert_weights(source, BASE, out, **given)

    if awaited:
        path = asyncio.run(call())
    else:
        with bathyscope.Client(live.url) as client:
            path = client.tinker.download_and_convert_weights(source, BASE, out, **given)
    assert path == out / "peft_adapter"
    assert sorted(one.name for one in path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    beside = {"checkpoint_info.json", "peft_adapter", *(["peft_adapter.tar"] if awaited else [])}
    assert {one.name for one in out.iterdir()} == beside
    [adapter] = live.client.get("/v1/adapters").json()["data"]
    info = json.loads((out / "checkpoint_info.json").read_text())
    assert info == {
        "tinker_path": source,
        "base_model": BASE,
        "training_dataset": "mmlu" if kind == "external_weights" else "of the run",
        "training_date": "2025-06-15T15:06:40Z",
        "local_path": str(path),
        "rank": RANK,
        "digest": adapter["digest"],
    }
    assert (adapter["source"], adapter["base_model"], adapter["format"]) == (source, BASE, "tinker")
    assert adapter["tensors"] == {"read": 24, "applied": 24}
    assert adapter["effect"]["max"] > 0.01
    said = adapter["tinker"]
    assert (said["path"], said["base_model"], said["lora_rank"]) == (source, f"{BASE}:peft:262144", RANK)
    live.client.delete(f"/v1/adapters/{adapter['id']}")
    assert not files(live)
    assert not traces(live)
    left = [name for one in standin.state.runs.values() for name in one.checkpoints if "bathyscope-" in name]
    assert left == []  # of the export


def test_what_is_not_known_of_a_checkpoint_is_null(live: Stack, run: Run, tmp_path: Path) -> None:
    first = run.add_checkpoint("external_weights", "first", written(tmp_path / "files", 11))
    second = run.add_checkpoint("external_weights", "second", tmp_path / "files")
    with bathyscope.Client(live.url, tinker_api_key=MINE) as client:
        client.tinker.download_and_convert_weights(first, None, tmp_path / "one")
        client.tinker.download_and_convert_weights(second, None, tmp_path / "two")  # the same weights once more
        [adapter] = client.adapters.list()
        with pytest.raises(errors.TinkerNotFound):
            client.tinker.download_and_convert_weights(f"{first}-none", None, tmp_path / "none")
        assert not (tmp_path / "none").exists()
        adapter.delete()
    one, two = (json.loads((tmp_path / name / "checkpoint_info.json").read_text()) for name in ("one", "two"))
    assert one["training_dataset"] is None
    assert one["training_date"]
    assert (two["tinker_path"], two["training_date"], two["digest"]) == (second, None, one["digest"])


def test_the_command_sends_the_key_of_the_environment(live: Stack, run: Run, tmp_path: Path) -> None:
    source = run.add_checkpoint("external_weights", "final", written(tmp_path / "files", 12))

    def command(*words: str) -> subprocess.CompletedProcess[str]:
        environment = {**live.environment, "BATHYSCOPE_URL": live.url, "TINKER_API_KEY": MINE}
        return subprocess.run(
            [sys.executable, "-m", "bathyscope.cli", "adapters", *words],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    done = command("add", source, "--name", "cli", "--json")
    assert done.returncode == 0, done.stderr
    adapter = json.loads(done.stdout)
    assert (adapter["source"], adapter["base_model"], adapter["name"]) == (source, BASE, "cli")
    failed = command("add", f"{source}-none")
    assert failed.returncode == 1
    assert "Tinker has no such run or checkpoint" in failed.stderr
    assert MINE not in done.stdout + done.stderr + failed.stdout + failed.stderr
    live.client.delete(f"/v1/adapters/{adapter['id']}")


def test_what_one_fetched_is_not_handed_to_another(live: Stack, run: Run, tmp_path: Path) -> None:
    source = run.add_checkpoint("external_weights", "final", written(tmp_path / "files", 4))
    # From here on the service has keys.
    anna, bert = make_key(live, "anna"), make_key(live, "bert")
    with as_user(live, anna) as hers, as_user(live, bert) as his:
        hers.timeout = his.timeout = 90
        job = hers.post(
            "/v1/adapters", json={"source": source}, headers={"X-Tinker-Api-Key": MINE, "Prefer": "wait=60"}
        ).json()
        assert job["status"] == "succeeded", job
        adapter = hers.get(job["resource"]).json()
        for path in (job["resource"], adapter["links"]["archive"], f"/v1/jobs/{job['id']}"):
            problem(his.get(path), 404, "not-found")
        body = {"model": BASE, "inputs": ["a"], "adapter": adapter["id"]}
        problem(his.post("/v1/extractions", json=body), 404, "not-found")
        assert his.get("/v1/adapters").json()["data"] == []
        # Neither the worker's cache nor the store makes up for a key that does not open the checkpoint.
        for headers in ({"X-Tinker-Api-Key": OTHERS}, {}):
            job = his.post("/v1/adapters", json={"source": source}, headers={"Prefer": "wait=60", **headers}).json()
            assert job["error"]["type"] == "/problems/tinker-not-found", job
        assert his.get("/v1/adapters").json()["data"] == []
        hers.delete(f"/v1/adapters/{adapter['id']}")


# --- last in this module: whatever the tests above left behind is searched --------------------------------------------


def test_the_keys_are_in_clear_nowhere(live: Stack, closed: Stack) -> None:
    keys = (MINE, OTHERS, KEY)  # the last is the operator's
    for stack in (live, closed):
        with Redis.from_url(stack.environment["BATHYSCOPE_REDIS_URL"]) as redis:
            for name in redis.scan_iter(count=1000):
                dumped = redis.dump(name)
                assert isinstance(dumped, bytes)
                assert not [key for key in keys if key.encode() in dumped + name], name
                assert not [key for key in keys if key in str(_read(redis, name))], name
        found = [path for path in stack.data_dir.rglob("*") if path.is_file() and not path.is_symlink()]
        assert any(path.name.endswith(".aof") for path in found)
        assert any(path.parent.name == "logs" and path.stat().st_size for path in found)
        for path in found:
            content = path.read_bytes()
            assert not [key for key in (*keys, "X-Signature=") if key.encode() in content], path


def _read(redis: Any, name: bytes) -> Any:
    match redis.type(name):
        case b"string":
            return redis.get(name)
        case b"hash":
            return redis.hgetall(name)
        case b"stream":
            return redis.xrange(name)
        case b"set":
            return redis.smembers(name)
        case b"zset":
            return redis.zrange(name, 0, -1)
        case b"list":
            return redis.lrange(name, 0, -1)
    raise AssertionError(name)
