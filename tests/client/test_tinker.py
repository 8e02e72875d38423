"""`client.tinker`: the real SDK of Tinker against the stand-in of its service. What converts is in tests/service."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest

import bathyscope
from bathyscope import errors
from tests.tinker_standin import KEY, Fault, Run, Standin

BASE = "Qwen/Qwen3-8B"
FILES = {"adapter_model.safetensors": b"weights", "adapter_config.json": b"{}", "checkpoint_complete": b""}
Call = Callable[..., Any]

# The SDK leaves the sockets of what it has given up to the collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def server() -> Iterator[Standin]:
    """One address for all: the SDK keeps its connections to each for the life of the process."""
    with Standin() as server:
        yield server
    gc.collect()


@pytest.fixture
def standin(server: Standin, monkeypatch: pytest.MonkeyPatch) -> Standin:
    server.forget()
    server.add_model(BASE)
    server.add_model("org/retired", trainable=False)
    monkeypatch.setenv("TINKER_BASE_URL", server.url)
    monkeypatch.setenv("TINKER_API_KEY", "tml-of-the-environment")  # beaten by the client's
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    return server


@pytest.fixture
def run(standin: Standin) -> Run:
    made = standin.add_run(base_model=BASE, rank=8)
    made.add_checkpoint("sampler_weights", "both", {"x": b"sampler"})
    made.add_checkpoint("external_weights", "both", dict(FILES))
    made.add_checkpoint("weights", "only", dict(FILES))
    made.add_checkpoint("sampler_weights", "old", dict(FILES))
    return made


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest) -> Call:
    """`client.tinker.<name>(…)` of either client."""

    def sync(name: str, *args: Any, key: str | None = KEY, **options: Any) -> Any:
        with bathyscope.Client("http://service.test", tinker_api_key=key) as client:
            return getattr(client.tinker, name)(*args, **options)

    def awaited(name: str, *args: Any, key: str | None = KEY, **options: Any) -> Any:
        async def call() -> Any:
            async with bathyscope.AsyncClient("http://service.test", tinker_api_key=key) as client:
                return await getattr(client.tinker, name)(*args, **options)

        return asyncio.run(call())

    return sync if request.param == "sync" else awaited


def test_models_and_checkpoints_are_tinkers_own_objects(standin: Standin, run: Run, ask: Call) -> None:
    import tinker

    models = ask("supported_models")
    assert all(isinstance(one, tinker.types.SupportedModel) for one in models)
    assert [one.model_name for one in models] == [BASE, "org/retired"]
    found = ask("checkpoints", run.id)
    assert all(isinstance(one, tinker.types.Checkpoint) for one in found)
    assert [(one.checkpoint_id, one.checkpoint_type) for one in found] == [
        ("sampler_weights/both", "sampler"),
        ("external_weights/both", "external"),
        ("weights/only", "training"),
        ("sampler_weights/old", "sampler"),
    ]


@pytest.mark.parametrize("kind", ["external_weights", "sampler_weights", "weights"])
def test_signed_urls_of_the_files_whatever_kind_is_named(run: Run, ask: Call, kind: str) -> None:
    found = ask("archive_url", f"tinker://{run.id}/{kind}/both")
    assert {name: httpx2.get(url).content for name, url in found.items()} == FILES


@pytest.mark.parametrize(("way", "pending"), [("302", 0), ("200", 0), ("302", 1), ("200", 1)])
def test_the_legacy_archive(standin: Standin, run: Run, ask: Call, way: Any, pending: int) -> None:
    standin.state.archive, standin.state.archive_pending = way, pending
    found = ask("archive_url", f"tinker://{run.id}/sampler_weights/old", timeout=30)
    assert set(found) == {"archive.tar"}
    assert b"adapter_model.safetensors" in httpx2.get(found["archive.tar"]).content
    assert standin.asked("sampler_weights/old/archive") == 1 + pending


def test_an_archive_that_is_never_made(standin: Standin, run: Run, ask: Call) -> None:
    standin.state.archive, standin.state.archive_pending = "302", 10_000
    with pytest.raises(errors.TinkerOutOfReach, match="archive in time"):
        ask("archive_url", f"tinker://{run.id}/sampler_weights/old", timeout=1.5)


@pytest.mark.parametrize("kind", ["sampler_weights/old", "weights/only"])
def test_what_has_no_files_says_what_exists_and_what_to_save(run: Run, ask: Call, kind: str) -> None:
    with pytest.raises(errors.TinkerNotDownloadable, match=r"TrainingClient\.save_weights_external") as refused:
        ask("archive_url", f"tinker://{run.id}/{kind}")
    name = kind.partition("/")[2]
    assert f"tinker://{run.id}/external_weights/{name}" in str(refused.value)
    assert "sampler_weights/both, external_weights/both, weights/only, sampler_weights/old" in str(refused.value)
    assert refused.value.problem()["exists"] == list(run.checkpoints)


@pytest.mark.parametrize("path", ["tinker://run/other/x", "tinker://run/weights", "hf://a/b", "tinker://run/weights/"])
def test_what_is_no_checkpoint(ask: Call, path: str) -> None:
    with pytest.raises(errors.InvalidRequest, match="tinker://RUN/external_weights/NAME"):
        ask("archive_url", path)


def test_a_run_without_a_name(standin: Standin, ask: Call) -> None:
    with pytest.raises(errors.InvalidRequest, match="training run"):
        ask("checkpoints", "")


def test_a_training_client_is_tinkers_own(standin: Standin, ask: Call) -> None:
    import tinker

    client = ask("create_training_client", BASE, rank=16, user_metadata={"dataset": "mmlu"})
    assert type(client) is tinker.TrainingClient
    [made] = standin.state.runs.values()
    assert (made.base_model, made.rank, made.key, made.user_metadata) == (BASE, 16, KEY, {"dataset": "mmlu"})
    with pytest.raises(errors.TinkerBaseRetired, match=r"supported_models"):
        ask("create_training_client", "org/retired")


@pytest.mark.parametrize(
    ("status", "problem", "words"),
    [
        (401, errors.TinkerKeyRefused, "does not accept this key"),
        (402, errors.TinkerBilling, "paused for billing"),
        (403, errors.TinkerForbidden, "does not permit"),
        (404, errors.TinkerNotFound, "no such run or checkpoint"),
        (429, errors.TinkerRateLimited, "try again after 7 seconds"),
        (422, errors.InvalidRequest, "status 422"),
        (500, errors.TinkerOutOfReach, "status 500"),
    ],
)
def test_each_answer_is_an_error_of_its_own(
    standin: Standin, run: Run, ask: Call, status: int, problem: type[errors.ProblemError], words: str
) -> None:
    standin.fail("checkpoints", Fault(status=status, headers={"Retry-After": "7"}), times=1000)
    standin.fail("archive", Fault(status=status, headers={"Retry-After": "7"}), times=1000)
    with pytest.raises(errors.ProblemError, match=words) as caught:
        ask("checkpoints", run.id, timeout=0.8)
    assert type(caught.value) is problem
    assert KEY not in str(caught.value)
    if status == 429:
        assert caught.value.retry_after == 7


@pytest.mark.parametrize(
    ("status", "problem"),
    [(401, errors.TinkerKeyRefused), (402, errors.TinkerBilling), (403, errors.TinkerForbidden)],
)
def test_an_archive_that_is_refused_is_not_taken_for_one_that_is_not_there(
    standin: Standin, run: Run, ask: Call, status: int, problem: type[errors.ProblemError]
) -> None:
    standin.fail("archive", Fault(status=status))
    with pytest.raises(problem):
        ask("archive_url", f"tinker://{run.id}/sampler_weights/old")


def test_a_paused_account_is_told_of_before_the_deadline(standin: Standin) -> None:
    """The SDK itself waits for an hour."""
    standin.fail("capabilities", Fault(status=402), times=1000)
    started = time.monotonic()
    with (
        bathyscope.Client("http://service.test", tinker_api_key=KEY) as client,
        pytest.raises(errors.TinkerBilling, match="billing"),
    ):
        client.tinker.supported_models(timeout=120)
    assert time.monotonic() - started < 100  # not an assertion of speed: the deadline is later


def test_keys_that_are_none_and_others_runs(standin: Standin, run: Run, ask: Call) -> None:
    with pytest.raises(errors.TinkerKeyRefused, match="of its form"):
        ask("supported_models", key="dummy")
    with pytest.raises(errors.TinkerKeyRefused, match="does not accept"):
        ask("supported_models", key="tml-unknown")
    with pytest.raises(errors.TinkerNotFound):
        ask("checkpoints", run.id, key=standin.add_key("tml-of-another"))


def test_the_key_of_the_environment_is_taken_when_none_is_given(
    standin: Standin, ask: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(errors.TinkerKeyRefused):
        ask("supported_models", key=None)
    monkeypatch.setenv("TINKER_API_KEY", KEY)
    assert len(ask("supported_models", key=None)) == 2


def test_a_server_that_is_silent(standin: Standin, ask: Call) -> None:
    ask("supported_models")  # so that the SDK is set up
    standin.fail("capabilities", Fault(seconds=3), times=2)
    with pytest.raises(errors.TinkerOutOfReach, match="did not answer within"):
        ask("supported_models", timeout=0.5)


def test_a_server_that_is_not_there() -> None:
    """In a process of its own, which ends though the SDK goes on for minutes, and holds up all of its other clients."""
    code = "import bathyscope; bathyscope.Client().tinker.supported_models(timeout=0.5)"
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{held.getsockname()[1]}"
        environment = {**os.environ, "TINKER_BASE_URL": url, "TINKER_API_KEY": KEY}
        ended = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100, check=False
        )
    assert f"TinkerOutOfReach: Tinker at {url} cannot be reached" in ended.stderr
    assert KEY not in ended.stderr


@pytest.mark.parametrize(
    ("name", "words"),
    [("supported_models", ()), ("checkpoints", ("run",)), ("create_training_client", (BASE,))],
)
def test_without_the_sdk_it_says_what_to_install(
    ask: Call, monkeypatch: pytest.MonkeyPatch, name: str, words: tuple[str, ...]
) -> None:
    monkeypatch.setitem(sys.modules, "tinker", None)
    with pytest.raises(errors.SetupError, match=r"pip install 'bathyscope\[tinker\]'"):
        ask(name, *words)
