"""The grammar of sources, and what a server may send a fetch to."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest

from bathyscope.errors import InvalidRequest
from bathyscope_backplane.adapter_sources import (
    BucketSource,
    FolderSource,
    HubSource,
    TinkerSource,
    base_model_name,
    parse_source,
)
from bathyscope_backplane.settings import AdapterSettings
from bathyscope_backplane.vault import Credentials
from bathyscope_workers.adapters.sources import _wire
from bathyscope_workers.adapters.sources._reach import Reach
from bathyscope_workers.adapters.sources._task import Task
from bathyscope_workers.adapters.sources._wire import Rules, UrlRefused, Wire, parse_url

RUN = "11111111-2222-3333-4444-555555555555:train:0"


@pytest.mark.parametrize(
    ("text", "source"),
    [
        (f"tinker://{RUN}/external_weights/final", TinkerSource(RUN, "external_weights", "final")),
        (f"tinker://{RUN}/sampler_weights/lr=1e-4", TinkerSource(RUN, "sampler_weights", "lr=1e-4")),
        ("hf://org/repo", HubSource("org/repo")),
        ("hf://org/repo@v1.0", HubSource("org/repo", None, "v1.0")),
        ("hf://org/repo@refs/pr/1", HubSource("org/repo", None, "refs/pr/1")),
        ("hf://org/repo/step-100/lora@main", HubSource("org/repo", "step-100/lora", "main")),
        ("s3://my-bucket/adapters/one", BucketSource("s3", "my-bucket", "adapters/one")),
        ("gs://bucket/one.tar.gz", BucketSource("gs", "bucket", "one.tar.gz")),
        ("file:///imports/one", FolderSource("/imports/one")),
        ("file:///imports/my%20adapter/%C3%BC", FolderSource("/imports/my adapter/ü")),
    ],
)
def test_a_source_is_read_and_written_the_same(text: str, source: object) -> None:
    parsed = parse_source(text)
    assert parsed == source
    assert parse_source(parsed.text) == parsed


@pytest.mark.parametrize(
    "text",
    [
        "",
        "org/repo",
        "http://example.com/adapter.tar",
        "TINKER://run/weights/final",
        f"tinker://{RUN}/optimizer/final",
        f"tinker://{RUN}/weights",
        f"tinker://{RUN}/weights/a/b",
        f"tinker://{RUN}/weights/..",
        "tinker://../weights/final",
        f"tinker://{RUN}/weights/final?x=1",
        f"tinker://{RUN}/weights/%2e%2e",
        "hf://org",
        "hf://org/repo/../other",
        "hf://org/repo@",
        "hf://org/repo@a..b",
        "hf://user:pw@org/repo",
        "s3://bucket",
        "s3://bucket/",
        "s3://bucket/a//b",
        "s3://bucket/../other/secret",
        "s3://bucket/a?versionId=1",
        "file://host/folder",
        "file://",
        "file:///",
        "file:///imports/../etc",
        "file:///imports/%2e%2e/etc",
        "file:///imports/%00",
        "file:///imports/%ff",
        "file:///imports/a%e2%80%aeb",  # right-to-left override
        "file:///imports/u%cc%88",  # a letter in two pieces
        "file:///imports/a\\b",
        "hf://org/rеpo",  # a Cyrillic letter
        "hf://org/repo\n",
        " hf://org/repo",
        "hf://org/" + "a" * 2000,
    ],
)
def test_what_is_no_source_is_refused_at_its_field(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_source(text)
    assert caught.value.errors[0]["pointer"] == "/source"


def test_a_suffix_of_tinkers_is_no_part_of_the_base() -> None:
    assert base_model_name("Qwen/Qwen3.8-27B:peft:262144") == "Qwen/Qwen3.8-27B"


def test_the_requests_credentials_beat_the_operators_and_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_machine")
    settings = AdapterSettings.model_validate({"tinker_api_key": "tml-operator", "hf_token": "hf_operator"})
    own = Reach.of(settings, Credentials(tinker_api_key="tml-request", hf_token="hf_request"))
    assert (own.tinker_api_key, own.hf_token) == ("tml-request", "hf_request")
    operators = Reach.of(settings, Credentials())
    assert (operators.tinker_api_key, operators.hf_token) == ("tml-operator", "hf_operator")
    assert Reach.of(AdapterSettings(), Credentials()).hf_token == "hf_of_the_machine"
    assert "tml-" not in repr(own) + repr(settings)
    assert "hf_re" not in repr(own)
    assert Reach.from_wire(own.to_wire()) == own


@pytest.mark.parametrize(
    "url",
    [
        "http://store.example/file",
        "ftp://store.example/file",
        "https://user@store.example/file",
        "https://store.example:22/file",
        "https:///file",
        "https://store.example/a b",
        "https://störe.example/file",
        "file:///etc/passwd",
        "https://store.example/" + "a" * 20_000,
    ],
)
def test_a_url_that_a_public_server_may_not_name(url: str) -> None:
    with pytest.raises(UrlRefused) as caught:
        parse_url(url, Rules(plain=False, private=False))
    assert "store.example" not in str(caught.value)


PUBLIC, PRIVATE = ipaddress.ip_address("93.184.216.34"), ipaddress.ip_address("10.0.0.7")


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "10.0.0.7", "169.254.169.254", "::1", "fd00::1", "::ffff:127.0.0.1", "64:ff9b::a00:7"]
)
def test_a_name_that_leads_to_a_private_address_is_not_connected_to(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"tinker.example": [PUBLIC], "store.example": [ipaddress.ip_address(address)]}
    monkeypatch.setattr(_wire, "look_up", lambda host: found[host])
    with (
        Wire("https://tinker.example", Task(Reach(), tmp_path)) as wire,
        pytest.raises(UrlRefused),
        wire.get("https://store.example/file", {}),
    ):
        pass


def test_each_connection_looks_the_name_up_and_checks_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [[PUBLIC], [PRIVATE]]
    monkeypatch.setattr(_wire, "look_up", lambda host: answers.pop(0))
    with (
        Wire("https://tinker.example", Task(Reach(), tmp_path)) as wire,
        pytest.raises(UrlRefused),
        wire.get("https://tinker.example/file", {}),
    ):
        pass
    assert not answers


@pytest.mark.parametrize(
    "address", ["169.254.169.254", "fe80::1", "fd00:ec2::254", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe"]
)
def test_not_even_a_private_server_may_name_a_cloud_machines_own_service(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"hub.example": [PRIVATE], "store.example": [ipaddress.ip_address(address)]}
    monkeypatch.setattr(_wire, "look_up", lambda host: found[host])
    with (
        Wire("http://hub.example", Task(Reach(), tmp_path)) as wire,
        pytest.raises(UrlRefused),
        wire.get("http://store.example/file", {}),
    ):
        pass


def test_a_private_server_may_name_private_addresses(tmp_path: Path) -> None:
    with Wire("http://127.0.0.1:9", Task(Reach(), tmp_path)) as wire:
        assert wire.rules == Rules(plain=True, private=True)
