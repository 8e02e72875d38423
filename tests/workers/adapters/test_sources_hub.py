"""Repositories of the hub: the real huggingface_hub against a small server."""

from __future__ import annotations

import os

# The libraries look at it once; this machine may be cut off and still reach the server of these tests.
os.environ.setdefault("HF_HUB_OFFLINE", "0")

from collections.abc import Iterator
from pathlib import Path

import pytest

from bathyscope import errors
from tests.hub_standin import SHA, HubStandin, Repository
from tests.workers.adapters.fetching import CONFIG, Fetching, weights

FILES = {"adapter_model.safetensors": weights(), "adapter_config.json": CONFIG, "README.md": b"# An adapter"}


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests of the run have said that there is no hub."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def hub() -> Iterator[HubStandin]:
    with HubStandin() as server:
        server.repositories["org/peft"] = Repository({**FILES, "optimizer.pt": b"x" * 100})
        yield server


@pytest.fixture
def fetching(hub: HubStandin, tmp_path: Path) -> Fetching:
    return Fetching(tmp_path, {"hub_url": hub.url})


def downloads(hub: HubStandin) -> list[str]:
    return [path for path, _ in hub.requests if not path.startswith("/api/")]


@pytest.mark.parametrize("source", ["hf://org/peft", "hf://org/peft@main", f"hf://org/peft@{SHA}"])
def test_a_repository_is_fetched_at_its_commit(hub: HubStandin, fetching: Fetching, source: str) -> None:
    fetched = fetching(source)
    assert fetching.files() == FILES
    assert fetched.others == ["optimizer.pt"]
    assert all(SHA in path for path in downloads(hub) if "/resolve/" in path)


def test_tinkers_layout_in_a_folder_is_fetched_by_name(hub: HubStandin, fetching: Fetching) -> None:
    marked = {**FILES, "checkpoint_complete": b""}
    hub.repositories["org/runs"] = Repository(
        {f"{step}/{name}": content for step in ("100", "200") for name, content in marked.items()}
    )
    fetching("hf://org/runs/200")
    assert fetching.files() == marked
    with pytest.raises(errors.AdapterArchiveUnsafe, match="several folders"):
        fetching("hf://org/runs")
    with pytest.raises(errors.AdapterSourceMissing, match="no folder 300"):
        fetching("hf://org/runs/300")


def test_the_token_goes_to_the_hub_and_not_to_where_it_redirects(hub: HubStandin, fetching: Fetching) -> None:
    hub.repositories["org/private"] = Repository(dict(FILES), token="hf_secret")
    fetching("hf://org/private", hf_token="hf_secret")
    assert fetching.files() == FILES
    sent = {path.partition("/")[2].partition("/")[0]: "authorization" in headers for path, headers in hub.requests}
    assert sent == {"api": True, "org": True, "store": False}


def test_without_a_token_none_of_the_machine_is_sent(
    hub: HubStandin, fetching: Fetching, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_machine")
    fetching("hf://org/peft")
    assert not any("authorization" in headers for _, headers in hub.requests)


def test_a_broken_transfer_is_gone_on_with(hub: HubStandin, fetching: Fetching) -> None:
    hub.cut_after = [500_000]
    fetching("hf://org/peft")
    assert fetching.files() == FILES
    assert any(headers.get("range") == "bytes=500000-" for _, headers in hub.requests)


def test_a_repository_far_larger_than_an_adapter_is_refused_before_a_byte_of_it(
    hub: HubStandin, fetching: Fetching
) -> None:
    hub.repositories["org/huge"] = Repository(dict(FILES), sizes={"adapter_model.safetensors": 10**13})
    with pytest.raises(errors.AdapterTooLarge):
        fetching("hf://org/huge")
    assert not downloads(hub)


def test_a_size_or_content_that_is_not_the_listed_one_is_refused(hub: HubStandin, fetching: Fetching) -> None:
    hub.repositories["org/lies"] = Repository(dict(FILES), sizes={"adapter_model.safetensors": 1000})
    with pytest.raises(errors.AdapterIncomplete):
        fetching("hf://org/lies")
    hub.content["adapter_model.safetensors"] = weights(seed=1)
    with pytest.raises(errors.AdapterIncomplete, match="SHA-256"):
        fetching("hf://org/peft")


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("hf://org/none", errors.AdapterSourceMissing),
        ("hf://org/gated", errors.AdapterSourceForbidden),
        ("hf://org/peft@v9", errors.AdapterSourceMissing),
        ("hf://org/pickled", errors.AdapterPickled),
        ("hf://org/model", errors.AdapterIncomplete),
    ],
)
def test_what_is_wrong_with_a_repository_is_told(
    hub: HubStandin, fetching: Fetching, source: str, problem: type[errors.ProblemError]
) -> None:
    hub.repositories["org/gated"] = Repository(dict(FILES), gated=True)
    hub.repositories["org/pickled"] = Repository({"adapter_model.bin": b"PK", "adapter_config.json": CONFIG})
    hub.repositories["org/model"] = Repository({"model.safetensors": weights(), "config.json": b"{}"})
    with pytest.raises(errors.ProblemError) as caught:
        fetching(source, hf_token="hf_marker_of_the_request")
    assert type(caught.value) is problem
    assert "hf_marker" not in str(caught.value.problem())
    assert not fetching.files()


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_that_fails_is_out_of_reach(hub: HubStandin, fetching: Fetching, status: int) -> None:
    hub.status = status
    with pytest.raises(errors.AdapterSourceOutOfReach):
        fetching("hf://org/peft", call_seconds=4.0)


def test_a_hub_that_is_not_there_is_out_of_reach(fetching: Fetching) -> None:
    with pytest.raises(errors.AdapterSourceOutOfReach):
        fetching("hf://org/peft", hub_url="http://127.0.0.1:9", call_seconds=4.0)
