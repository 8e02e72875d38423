"""Results of shards joined: byte for byte the file that one engine would have left, wherever it was cut."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import boto3
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from moto.server import ThreadedMotoServer
from safetensors.torch import load_file

from bathyscope.errors import InternalError, TooLarge
from bathyscope_backplane.artifacts import ArtifactStore
from bathyscope_workers.extraction.change import ChangeSum
from bathyscope_workers.extraction.file_layout import texts_of
from bathyscope_workers.extraction.scratch import ScratchFile
from bathyscope_workers.jobs.joining import Joiner, Part

LAYERS, HIDDEN = 2, 3
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PROVENANCE = {"model": "m", "llm_int8_threshold": 6.0, "layers": [1, 2], "versions": {"torch": "2", "numpy": "1"}}


def result(
    folder: Path, name: str, rows: list[list[int]], states: torch.Tensor, *, each_token: bool, choices: bool
) -> dict[str, Any]:
    """What an engine leaves for inputs with these tokens; `states` is [(variants,) vectors, layers, hidden]."""
    folder.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    offsets = np.cumsum([0, *map(len, rows)])
    token_ids = [one for row in rows for one in row]
    dtype = {value: key for key, value in DTYPES.items()}[states.dtype]
    file = ScratchFile(
        folder / name,
        {
            "offsets": ("int64", (len(rows) + 1,)),
            "token_ids": ("int64", (len(token_ids),)),
            "hidden_states": (dtype, tuple(states.shape)),
        },
        texts_of(PROVENANCE),
    )
    file.tensor("offsets")[:] = torch.from_numpy(offsets)
    file.tensor("token_ids")[:] = torch.tensor(token_ids, dtype=torch.int64)
    file.tensor("hidden_states")[:] = states
    file.close()
    paired = states.dim() == 4
    changes = []
    for variant in range(1, len(states) if paired else 0):
        change = ChangeSum(LAYERS)
        change.add(0, states[0], states[variant])
        changes.append(change)
    tokens = int(offsets[-1])
    return {
        "path": str(file.path),
        "bytes": file.nbytes,
        "header_bytes": file.header_bytes,
        "tensors": {name: place.to_wire() for name, place in file.places.items()},
        "shape": list(states.shape),
        "dtype": dtype,
        "layers": [1, 2],
        "inputs": len(rows),
        "tokens": {"total": 2 * tokens, "computed": 3 * tokens, "kept": tokens},
        "cache": {"hits": len(rows), "duplicates": 1},
        "provenance": PROVENANCE,
        "relative_change": [[0.0] * LAYERS, *(one.means() for one in changes)] if paired else None,
        "change": [one.to_wire() for one in changes] if paired else None,
        "choices": lines(folder, name, rows, len(states) if paired else 1) if choices else None,
    }


def lines(folder: Path, name: str, rows: list[list[int]], variants: int) -> dict[str, Any]:
    """Scores, of one variant after those of another."""
    texts = [json.dumps([variant, row]).encode() + b"\n" for variant in range(variants) for row in rows]
    path, index = folder / f"{name}.lines", folder / f"{name}.index"
    path.write_bytes(b"".join(texts))
    index.write_bytes(np.cumsum([0, *map(len, texts)], dtype="<i8").tobytes())
    right = sum(len(row) % 2 for row in rows)
    confidence = float(np.mean([1 / len(row) for row in rows]))
    scored = [{"answered": len(rows), "correct": right, "confidence": confidence, "shared": 1}] * variants
    return {"choices_path": str(path), "choices_index_path": str(index), "scored": scored}


def part_of(store: ArtifactStore, made: dict[str, Any], number: int) -> Part:
    """A part as a shard leaves it."""
    made = {**made, "choices": made["choices"] and dict(made["choices"])}
    paths = {"states": made.pop("path")}
    for role, name in (("choices", "choices_path"), ("choices_index", "choices_index_path")):
        if made["choices"] is not None:
            paths[role] = made["choices"].pop(name)
    keys = {role: f"shards/j/{number}.{role}" for role in paths}
    for role, path in paths.items():
        asyncio.run(store.put(keys[role], Path(path).read_bytes()))
    return Part(result=made, keys=keys, timings={"load": 0.0, "inference": 1.0})


@st.composite
def jobs(draw: st.DrawFn) -> dict[str, Any]:
    rows = draw(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=5), min_size=1, max_size=12))
    cuts = draw(st.sets(st.integers(1, max(1, len(rows) - 1)), max_size=4))
    each_token = draw(st.booleans())
    variants = draw(st.sampled_from([0, 1, 2, 3]))
    vectors = sum(map(len, rows)) if each_token else len(rows)
    shape = ((variants,) if variants else ()) + (vectors, LAYERS, HIDDEN)
    seed = draw(st.integers(0, 2**30))
    states = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if draw(st.booleans()):
        states[..., 0, :] = 0  # a layer in which there is no relative change
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    cuts = sorted(cut for cut in cuts if cut < len(rows))
    spans = list(zip([0, *cuts], [*cuts, len(rows)], strict=True))
    return {
        "rows": rows,
        "spans": spans,
        "states": states.to(dtype),
        "each_token": each_token,
        "choices": draw(st.booleans()),
    }


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ArtifactStore]]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    credentials = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=f"http://{host}:{port}", **credentials).create_bucket(Bucket="joins")
    options = {
        "endpoint": f"http://{host}:{port}",
        "access_key_id": "testing",
        "secret_access_key": "testing",
        "region": "us-east-1",
        "allow_http": "true",
        "virtual_hosted_style_request": "false",
    }
    yield {
        "folder": ArtifactStore(tmp_path_factory.mktemp("store").as_uri()),
        "s3": ArtifactStore("s3://joins", options),
    }
    server.stop()


def check(store: ArtifactStore, job: dict[str, Any]) -> None:
    rows, states = job["rows"], job["states"]
    options = {"each_token": job["each_token"], "choices": job["choices"]}
    starts = np.cumsum([0, *map(len, rows)]) if job["each_token"] else np.arange(len(rows) + 1)
    axis = states.dim() - 3
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        whole = result(folder, "whole", rows, states, **options)

        parts = []
        for number, (first, last) in enumerate(job["spans"]):
            part = states.narrow(axis, int(starts[first]), int(starts[last] - starts[first]))
            made = result(folder / str(number), "part", rows[first:last], part, **options)
            parts.append(part_of(store, made, number))
        found = asyncio.run(Joiner(store, parts, folder).join(2**40))
        assert Path(found.pop("path")).read_bytes() == Path(whole.pop("path")).read_bytes()
        scored, expected = found.pop("choices"), whole.pop("choices")
        if expected is not None:
            for name in ("choices_path", "choices_index_path"):
                assert Path(scored[name]).read_bytes() == Path(expected[name]).read_bytes()
            for one, other in zip(scored["scored"], expected["scored"], strict=True):
                assert one == {**other, "shared": len(job["spans"]), "confidence": pytest.approx(other["confidence"])}
        for one, other in zip(found.pop("relative_change") or [], whole.pop("relative_change") or [], strict=True):
            assert [each is None for each in one] == [each is None for each in other]
            assert np.allclose(np.array(one, dtype=float), np.array(other, dtype=float), rtol=1e-9, equal_nan=True)
        assert found.pop("cache") == {"hits": len(rows), "duplicates": len(job["spans"])}
        del whole["cache"], whole["change"], found["change"]
        assert found == whole
        assert load_file(folder / "joined.safetensors")["offsets"][-1] == sum(map(len, rows))


@settings(max_examples=80, deadline=None)
@given(job=jobs())
def test_in_a_folder(stores: dict[str, ArtifactStore], job: dict[str, Any]) -> None:
    check(stores["folder"], job)


@settings(max_examples=8, deadline=None)
@given(job=jobs())
def test_in_s3(stores: dict[str, ArtifactStore], job: dict[str, Any]) -> None:
    check(stores["s3"], job)


def small(folder: Path, store: ArtifactStore, number: int, **changed: Any) -> Part:
    made = result(folder / str(number), "part", [[1, 2]], torch.ones(1, 2, 3), each_token=False, choices=False)
    return part_of(store, {**made, **changed}, number)


def test_parts_of_different_models_are_not_joined(tmp_path: Path, stores: dict[str, ArtifactStore]) -> None:
    store = stores["folder"]
    first = small(tmp_path, store, 0)
    other = small(tmp_path, store, 1, provenance={**PROVENANCE, "revision": "another"})
    with pytest.raises(InternalError, match="differ"):
        asyncio.run(Joiner(store, [first, other], tmp_path).join(2**40))
    assert not (tmp_path / "joined.safetensors").exists()
    # Libraries may be of another version on another worker: then both are named.
    other = small(tmp_path, store, 1, provenance={**PROVENANCE, "versions": {"torch": "3", "numpy": "1"}})
    found = asyncio.run(Joiner(store, [first, other], tmp_path).join(2**40))
    assert found["provenance"]["versions"] == {"torch": "2, 3", "numpy": "1"}


def test_a_result_beyond_the_limit_is_refused(tmp_path: Path, stores: dict[str, ArtifactStore]) -> None:
    store = stores["folder"]
    parts = [small(tmp_path, store, number) for number in range(2)]
    with pytest.raises(TooLarge, match="48 bytes"):
        asyncio.run(Joiner(store, parts, tmp_path).join(47))
    assert asyncio.run(Joiner(store, parts, tmp_path).join(48))["shape"] == [2, 2, 3]


class Stop(Exception):
    pass


def test_it_can_be_stopped_and_begun_again(tmp_path: Path, stores: dict[str, ArtifactStore]) -> None:
    store = stores["folder"]
    parts = [small(tmp_path, store, number) for number in range(2)]

    def check() -> None:
        raise Stop

    with pytest.raises(Stop):
        asyncio.run(Joiner(store, parts, tmp_path, check).join(2**40))
    asyncio.run(Joiner(store, parts, tmp_path).join(2**40))
