"""Buckets: S3 by moto's server."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from bathyscope import errors
from bathyscope_workers.adapters.unpacking import unpack
from tests.workers.adapters.fetching import CONFIG, Fetching, weights

WEIGHTS = weights(3_000_000)  # of two pieces


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="module")
def s3(endpoint: str) -> Any:
    client = boto3.client(
        "s3", endpoint_url=endpoint, aws_access_key_id="a", aws_secret_access_key="b", region_name="us-east-1"
    )
    client.create_bucket(Bucket="adapters")
    client.create_bucket(Bucket="secrets")
    for bucket in ("adapters", "secrets"):
        client.put_object(Bucket=bucket, Key="team/one/adapter_model.safetensors", Body=WEIGHTS)
        client.put_object(Bucket=bucket, Key="team/one/adapter_config.json", Body=CONFIG)
    client.put_object(Bucket="adapters", Key="team/one/optimizer.pt", Body=b"x")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        entry = tarfile.TarInfo("adapter_model.safetensors")
        entry.size = len(WEIGHTS)
        archive.addfile(entry, io.BytesIO(WEIGHTS))
    client.put_object(Bucket="adapters", Key="team/two.tar.gz", Body=buffer.getvalue())
    return client


@pytest.fixture
def fetching(endpoint: str, s3: Any, tmp_path: Path) -> Fetching:
    options = {"endpoint": endpoint, "allow_http": "true", "access_key_id": "a", "secret_access_key": "b"}
    options["region"] = "us-east-1"
    return Fetching(tmp_path, {"store_options": options, "allowed_buckets": ("s3://adapters/team",)})


def test_a_folder_of_files(fetching: Fetching) -> None:
    fetched = fetching("s3://adapters/team/one/")
    assert fetching.files() == {"adapter_config.json": CONFIG, "adapter_model.safetensors": WEIGHTS}
    assert fetched.others == ["optimizer.pt"]
    assert fetching.steps[-1][1] == len(WEIGHTS) + len(CONFIG)


def test_an_archive(fetching: Fetching) -> None:
    fetched = fetching("s3://adapters/team/two.tar.gz")
    assert fetched.archive is not None
    unpack(fetched.archive, fetching.folder / "unpacked")
    assert (fetching.folder / "unpacked" / "adapter_model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    ("source", "allowed"),
    [
        ("s3://secrets/team/one", ("s3://adapters/team",)),
        ("s3://adapters/teammates/one", ("s3://adapters/team",)),
        ("s3://adapters/team/one", ()),
        ("s3://adapters/team/one", ("s3://",)),
        ("s3://adapters/team/one", ("gs://adapters",)),
        ("s3://adapters/team/one", ("",)),
    ],
)
def test_what_the_operator_did_not_allow_is_not_read(fetching: Fetching, source: str, allowed: tuple[str, ...]) -> None:
    with pytest.raises(errors.AdapterSourceForbidden, match=r"adapters\.allowed_buckets"):
        fetching(source, allowed_buckets=allowed)


def test_nothing_there_and_only_folders_there(fetching: Fetching) -> None:
    with pytest.raises(errors.AdapterSourceMissing):
        fetching("s3://adapters/team/none")
    with pytest.raises(errors.AdapterIncomplete, match=r"it has one/, two\.tar\.gz"):
        fetching("s3://adapters/team")


def test_what_is_too_large_is_refused_before_a_byte_of_it(fetching: Fetching) -> None:
    for source in ("s3://adapters/team/one", "s3://adapters/team/two.tar.gz"):
        with pytest.raises(errors.AdapterTooLarge):
            fetching(source, max_bytes=1_000_000)
        assert fetching.everything() == set()


def test_a_store_that_is_not_there_is_out_of_reach_and_says_nothing_of_itself(fetching: Fetching) -> None:
    options = {**fetching.reach["store_options"], "endpoint": "http://127.0.0.1:9"}
    with pytest.raises(errors.AdapterSourceOutOfReach) as caught:
        fetching("s3://adapters/team/one", store_options=options, call_seconds=3.0)
    assert "127.0.0.1" not in str(caught.value)
