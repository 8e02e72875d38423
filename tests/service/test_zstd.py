"""Hidden states compressed by zstd: the same numbers, a representation of its own, only when it is asked for."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
import zstandard
from safetensors.numpy import load

from bathyscope_service.encoding import wants_zstd
from tests.stack import Stack

FORMATS = ["safetensors", "npy", "arrow", "json"]


@pytest.fixture(scope="module")
def states(live: Stack) -> dict[str, Any]:
    return live.extract([f"Text {number} goes down." for number in range(40)], model="tiny", layers="all")


def raw(live: Stack, path: str, format: str, **headers: str) -> tuple[Any, bytes]:
    """The answer, and its bytes as they came."""
    with live.client.stream("GET", path, params={"format": format}, headers=headers) as answer:
        return answer, b"".join(answer.iter_raw())


@pytest.mark.parametrize("format", FORMATS)
def test_it_unpacks_to_the_plain_bytes(live: Stack, states: dict[str, Any], format: str) -> None:
    path = states["links"]["hidden_states"]
    plain, content = raw(live, path, format, **{"Accept-Encoding": "identity"})
    packed, compressed = raw(live, path, format, **{"Accept-Encoding": "gzip, zstd"})
    assert plain.status_code == packed.status_code == 200
    assert "content-encoding" not in plain.headers
    assert packed.headers["content-encoding"] == "zstd"
    assert packed.headers["etag"] == plain.headers["etag"][:-1] + '-zstd"'
    for answer in (plain, packed):
        assert "Accept-Encoding" in answer.headers["vary"]
    unpacked = zstandard.ZstdDecompressor().decompressobj().decompress(compressed)
    assert unpacked == content
    assert len(compressed) < len(content)
    match format:
        case "safetensors":
            assert load(unpacked)["hidden_states"].shape == tuple(states["shape"])
        case "npy":
            assert np.load(io.BytesIO(unpacked)).shape == tuple(states["shape"])
        case "json":
            assert json.loads(unpacked)["shape"] == states["shape"]


def test_each_has_its_own_tag_and_only_the_plain_one_ranges(live: Stack, states: dict[str, Any]) -> None:
    path = states["links"]["hidden_states"]
    packed, _ = raw(live, path, "safetensors", **{"Accept-Encoding": "zstd"})
    again, nothing = raw(
        live, path, "safetensors", **{"Accept-Encoding": "zstd", "If-None-Match": packed.headers["etag"]}
    )
    assert (again.status_code, nothing) == (304, b"")
    plain, _ = raw(live, path, "safetensors", **{"Accept-Encoding": "", "If-None-Match": packed.headers["etag"]})
    assert plain.status_code == 200
    part, content = raw(live, path, "safetensors", **{"Accept-Encoding": "zstd", "Range": "bytes=0-99"})
    assert part.status_code == 206
    assert "content-encoding" not in part.headers
    assert len(content) == 100
    assert "accept-ranges" not in packed.headers


@pytest.mark.parametrize(
    ("header", "wanted"),
    [
        (None, False),
        ("", False),
        ("*", False),
        ("gzip, deflate", False),
        ("zstd", True),
        ("ZSTD", True),
        ("gzip, zstd;q=0.5", True),
        ("zstd;q=0", False),
        ("zstd; q=0.1, identity", False),
        ("zstd;q=0.9, identity;q=0.5", True),
        ("zstd;q=x", False),
        ("zstd;level=3", False),
    ],
)
def test_what_asks_for_it(header: str | None, wanted: bool) -> None:
    assert wants_zstd(header) == wanted
