"""Hostile and broken adapters, uploaded to a real worker: each is refused with its own problem and leaves nothing.

Every case is a good adapter for the tiny model with one thing wrong, so that nothing else can be the reason. Afterwards
the same engines serve on.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from redis import Redis

from bathyscope.errors import AdapterInvalid
from bathyscope_workers.adapters.conversion import convert
from bathyscope_workers.adapters.skeleton import Skeleton
from bathyscope_workers.adapters.source import SourceAdapter
from bathyscope_workers.adapters.unpacking import unpack
from tests.files import paths_below
from tests.service.hostile_adapters import (
    CONFIG,
    GOOD_TENSORS,
    HOSTILE,
    MAX_BYTES,
    ODD,
    SEED,
    good_tar,
    good_zip,
)
from tests.service.test_adapters import added, upload
from tests.service.test_adapters_live import TEXTS, assert_equal, merged
from tests.service.test_extractions import npy
from tests.stack import Stack

# --- refused over HTTP -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory, models: str) -> Iterator[Stack]:
    made = Stack(
        tmp_path_factory.mktemp("hostile"), models=models, worker__adopt_seconds=0, adapters__max_bytes=MAX_BYTES
    )
    (temporary := made.data_dir / "tmp").mkdir()
    made.environment["TMPDIR"] = str(temporary)  # looked at too
    try:
        made.up()
        warm = added(made.client, good_tar())  # the engines have imported what they need
        made.client.delete(f"/v1/adapters/{warm['id']}")
        yield made
    finally:
        made.down()


def on_disk(stack: Stack) -> set[str]:
    """Every file below the data folder, but for logs, locks and the queue's own."""
    own = {"logs", "models", "valkey", ".locks"}
    there = set()
    for path in paths_below(stack.data_dir):
        inner = path.relative_to(stack.data_dir)
        if not own & set(inner.parts) and not inner.parts[0].startswith(("valkey", "redis", "dump", "appendonly")):
            there.add(f"{inner}{'' if path.is_file() else '/'}")
    return there


def on_shelf(stack: Stack) -> dict[str, bytes]:
    """What the queue's server knows of resources: their list, bytes, digests, names and shares."""
    with Redis.from_url(stack.valkey.url) as redis:
        keys = [key for key in redis.scan_iter(match="*:res*", count=1000) if b":gone:" not in key]
        return {key.decode(): redis.dump(key) or b"" for key in keys}


def settled(stack: Stack, disk: set[str], shelf: dict[str, bytes]) -> None:
    """Nothing has come and nothing has gone; what the worker clears up after a job's end is waited for."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and (on_disk(stack), on_shelf(stack)) != (disk, shelf):
        time.sleep(0.02)
    assert sorted(on_disk(stack) ^ disk) == []
    assert on_shelf(stack) == shelf


SENTENCES: dict[str, str] = {}
"""What each sentence was said of."""


@pytest.mark.parametrize("what", HOSTILE)
def test_refused_with_its_own_problem_and_nothing_left(hostile: Stack, what: str) -> None:
    case = HOSTILE[what]
    before = on_disk(hostile), on_shelf(hostile), hostile.engines("fetch")
    answer = upload(hostile.client, case.make(), name="hostile")
    assert answer.status_code == 200, answer.text
    job = answer.json()
    if job["resource"] is not None:  # so that the next case is not refused for its name
        hostile.client.delete(job["resource"])
    assert (job["status"], job["attempt"], job["resource"]) == ("failed", 1, None), job
    problem = job["error"]
    assert problem["type"] == f"/problems/{case.slug}", problem
    assert re.search(case.words, problem["detail"]), problem["detail"]
    assert "; " in problem["detail"] or case.slug == "adapter-config-invalid", "it names no remedy"
    assert problem["detail"].isprintable()
    assert str(hostile.data_dir) not in json.dumps(problem)
    if case.names is not None:
        assert case.names in problem["names"]
    assert SENTENCES.setdefault(problem["detail"], case.words) == case.words
    settled(hostile, *before[:2])
    assert hostile.engines("fetch") == before[2]
    assert hostile.client.get("/v1/adapters").json()["data"] == []


def test_at_least_thirty() -> None:
    assert len({(case.slug, case.words) for case in HOSTILE.values()}) >= 30


@pytest.mark.parametrize(
    "content",
    [b"", b"--x--", b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\n', b"\xff" * 1000],
    ids=["empty", "no part", "cut off", "noise"],
)
def test_bodies_that_are_none(hostile: Stack, content: bytes) -> None:
    before = on_disk(hostile), on_shelf(hostile)
    answer = hostile.client.post(
        "/v1/adapters", content=content, headers={"Content-Type": "multipart/form-data; boundary=x"}
    )
    assert answer.status_code in (400, 422), answer.text
    assert answer.json()["type"] in ("/problems/malformed-body", "/problems/invalid-request")
    settled(hostile, *before)


# --- odd, and right --------------------------------------------------------------------------------------------


def test_odd_ones_are_taken_and_equal(hostile: Stack, tiny_dir: Path) -> None:
    """The service goes on serving after all that, and gives the good one's numbers for each of these."""
    expected = [merged(tiny_dir, None), merged(tiny_dir, SEED)]
    digests = set()
    for what, make in {"good": good_tar, **ODD}.items():
        adapter = added(hostile.client, make(), name=what)
        digests.add(adapter["digest"])
        assert adapter["tensors"] == {"read": 24, "applied": 24}
        assert "Evil" not in json.dumps(adapter)
        if what in ("good", "tensors in another order"):
            states = hostile.extract(TEXTS, model="tiny", adapter=["base", adapter["id"]])
            for found, wanted in zip(npy(hostile, states), expected, strict=True):
                assert_equal(found, wanted)
        hostile.client.delete(f"/v1/adapters/{adapter['id']}")
    assert len(digests) == 1
    # Only what reads work may still hold, and the worker's own cache, which is bounded.
    left = {name for name in on_disk(hostile) if name.startswith("artifacts/adapters") and not name.endswith("/")}
    assert left == set()
    assert on_disk(hostile) & {f"adapters/{digest}/{CONFIG}" for digest in digests}


# --- broken at random ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def skeleton(tiny_dir: Path) -> Skeleton:
    return Skeleton.read(tiny_dir, name="tiny")


PACKED = {
    "tar": good_tar(),
    "tar.gz": gzip.compress(good_tar()),
    "zip": good_zip(),
    "zip, streamed": good_zip(stream=True),
}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(sorted(PACKED)),
    st.sampled_from(["bits", "header", "config", "cut"]),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 7)), min_size=1, max_size=6),
)
@example("tar", "cut", [(1.0, 0)])
def test_any_damage_is_seen_or_does_none(
    skeleton: Skeleton, tmp_path: Path, form: str, where: str, spots: list[tuple[float, int]]
) -> None:
    """A problem of an adapter's, or an adapter that is whole and finite; where a checksum covers it, the good one."""
    data = bytearray(PACKED[form])
    start, end = 0, len(data) - 1
    if form == "tar" and where in ("header", "config"):
        start = data.index(b"{" if where == "header" else b'{"peft_type"')
        end = data.index(b"}}" if where == "header" else b"}", start)
    if where == "cut":
        del data[int(spots[0][0] * len(data)) :]
    else:
        for spot, bit in spots:
            data[start + int(spot * (end - start))] ^= 1 << bit
    (tmp_path / "archive").write_bytes(data)
    folder, peft = tmp_path / "files", tmp_path / "peft"
    try:
        unpack(tmp_path / "archive", folder)
        converted = convert(SourceAdapter.open(folder, base_model="tiny"), skeleton)
        converted.save(peft)
    except AdapterInvalid as fault:
        json.dumps(fault.problem())
        assert not peft.exists()
    else:
        assert converted.read == converted.applied == len(converted.targets) * 2
        found = {name: tensor.numpy() for name, tensor in converted.tensors.items()}
        assert all(np.isfinite(tensor).all() for tensor in found.values())
        if form != "tar":  # checksums cover the content
            assert all(np.array_equal(found[name], GOOD_TENSORS[name].numpy()) for name in found)
    finally:
        for inner in (folder, peft):
            with contextlib.suppress(FileNotFoundError):
                for path in inner.iterdir():
                    path.unlink()
                inner.rmdir()
