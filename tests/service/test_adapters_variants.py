"""Extractions, probes and predictions with adapters: whose they are, which base they fit, and where each lies.

The engines compute nothing: of a paired extraction each variant's states are the first one's plus its number.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import load

from bathyscope_backplane.ids import new_id
from tests.service.test_adapters import added, archive
from tests.service.test_keys import as_user, make_key
from tests.service.test_manners import problem
from tests.stack import Stack, stack

TEXTS = ["a", "bb", "ccc", "dddd", "e", "ff", "ggg", "hhhh"]


@pytest.fixture(scope="module")
def noop(tmp_path_factory: pytest.TempPathFactory, models: str) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("variants")
    tiny = dict(pair.split("=") for pair in models.split(","))["tiny"]
    with stack(
        folder,
        noop=True,
        models=f"{models},alias={tiny}",
        worker__adopt_seconds=0,
        limits__max_variants=3,
        limits__max_result_bytes=50_000,
    ) as running:
        yield running


@pytest.fixture(scope="module")
def adapters(noop: Stack) -> list[dict[str, Any]]:
    return [added(noop.client, archive(f"variant {number}")) for number in range(3)]


def paired(noop: Stack, adapters: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    names = ["base", adapters[0]["id"], adapters[1]["id"]]
    return noop.extract(TEXTS, model="tiny", adapter=names, layers=[1, 2], **options)


def test_one_adapter(noop: Stack, adapters: list[dict[str, Any]]) -> None:
    mine = adapters[0]
    states = noop.extract(TEXTS, model="tiny", adapter=mine["id"], layers=[1, 2])
    assert (states["adapter"], states["adapter_digest"]) == (mine["id"], mine["digest"])
    assert states["identity"]["adapter"] == mine["digest"]
    assert (states["variants"], states["relative_change"]) == (None, None)
    assert states["shape"] == [8, 2, 32]
    base = noop.extract(TEXTS, model="tiny", adapter="base", layers=[1, 2])
    assert base["identity"]["adapter"] is None
    assert not np.array_equal(npy(noop, states), npy(noop, base))  # it was told the adapter
    assert noop.extract(TEXTS, model="alias", adapter=mine["id"])["model"] == "alias"  # the same weights


def npy(noop: Stack, states: dict[str, Any], **query: Any) -> np.ndarray[Any, Any]:
    answer = noop.client.get(states["links"]["hidden_states"], params={"format": "npy", **query})
    assert answer.status_code == 200, answer.text
    return np.load(io.BytesIO(answer.content))  # type: ignore[no-any-return]


@pytest.mark.parametrize("pooling", ["last", "none"])
def test_a_paired_one_in_every_format(noop: Stack, adapters: list[dict[str, Any]], pooling: str) -> None:
    states = paired(noop, adapters, pooling=pooling)
    tokens = states["tokens"]["total"]
    vectors = tokens if pooling == "none" else 8
    assert states["shape"] == [3, vectors, 2, 32]
    assert (states["adapter"], states["identity"]["adapter"]) == (None, None)
    assert states["variants"] == [
        {"adapter": None, "digest": None},
        *({"adapter": one["id"], "digest": one["digest"]} for one in adapters[:2]),
    ]
    assert [len(row) for row in states["relative_change"]] == [2, 2, 2]
    path = states["links"]["hidden_states"]
    whole = load(noop.client.get(path).content)
    full = whole["hidden_states"]
    assert full.shape == (3, vectors, 2, 32)
    np.testing.assert_allclose(full[1:], full[:1] + np.array([1, 2]).reshape(2, 1, 1, 1), rtol=1e-6)
    np.testing.assert_array_equal(npy(noop, states), full)

    offsets = whole["offsets"]
    low, high = (int(offsets[2]), int(offsets[6])) if pooling == "none" else (2, 6)
    cut = full[:, low:high, 1:]
    query = {"rows": "2-5", "layers": "2"}
    np.testing.assert_array_equal(npy(noop, states, **query), cut)
    part = load(noop.client.get(path, params=query).content)
    np.testing.assert_array_equal(part["hidden_states"], cut)
    rows = load(noop.client.get(path, params={"rows": "2-5"}).content)
    np.testing.assert_array_equal(rows["hidden_states"], full[:, low:high])
    found = noop.client.get(path, params={"format": "json", **query}).json()
    assert found["shape"] == list(cut.shape)
    np.testing.assert_allclose(np.array(found["hidden_states"], "f4"), cut, rtol=1e-6)

    table = pa.ipc.open_stream(noop.client.get(path, params={"format": "arrow", **query}).content).read_all()
    assert table["variant"].to_pylist() == [0] * 4 + [1] * 4 + [2] * 4
    assert table["index"].to_pylist() == [2, 3, 4, 5] * 3
    flat = np.concatenate([np.array(row, "f4") for row in table["hidden_states"].to_pylist()])
    np.testing.assert_allclose(flat, cut.reshape(-1), rtol=1e-6)

    ranged = noop.client.get(path, params={"format": "npy", "rows": "2-5"}, headers={"Range": "bytes=100-700"})
    assert ranged.status_code == 206
    assert ranged.content == noop.client.get(path, params={"format": "npy", "rows": "2-5"}).content[100:701]


def test_whose_and_for_what(noop: Stack, adapters: list[dict[str, Any]]) -> None:
    body = {"model": "tiny", "inputs": ["a"]}
    for adapter, pointer in (
        (new_id("ad"), "/adapter"),
        (new_id("ext"), "/adapter"),
        ("nonsense", "/adapter"),
        (["base", new_id("ad")], "/adapter/1"),
    ):
        document = problem(noop.post("/v1/extractions", {**body, "adapter": adapter}), 404, "not-found")
        assert [error["pointer"] for error in document["errors"]] == [pointer]
    ids = [one["id"] for one in adapters]
    for adapter, pointer in (
        ([ids[0], "base", ids[0]], "/adapter/2"),
        (["base", *ids], "/adapter"),
        ([], "/adapter"),
    ):
        document = problem(noop.post("/v1/extractions", {**body, "adapter": adapter}), 422, "invalid-request")
        assert [error["pointer"] for error in document["errors"]] == [pointer]
    other = {"model": "minilm", "inputs": ["a"], "adapter": ["base", ids[0]]}
    document = problem(noop.post("/v1/extractions", other), 422, "adapter-base-mismatch")
    assert document["errors"][0]["pointer"] == "/adapter/1"
    assert "tiny" in document["detail"]


def test_the_size_is_that_of_all_variants(noop: Stack, adapters: list[dict[str, Any]]) -> None:
    body = {"model": "tiny", "inputs": ["a"] * 60, "layers": [1, 2, 3]}
    assert noop.post("/v1/extractions", body).status_code == 200
    names = ["base", adapters[0]["id"], adapters[1]["id"]]
    document = problem(noop.post("/v1/extractions", {**body, "adapter": names}), 413, "too-large")
    assert document["estimate"] == 3 * 60 * 3 * 32 * 4


def test_probes_name_a_variant(noop: Stack, adapters: list[dict[str, Any]]) -> None:
    states = paired(noop, adapters)
    training = {"extraction": states["id"], "labels": [0, 1] * 4, "folds": 2}
    for variant in ({}, {"variant": "nobody"}, {"variant": adapters[2]["id"]}):
        document = problem(noop.post("/v1/probes", {**training, **variant}), 422, "invalid-request")
        assert document["errors"][0]["pointer"] == "/variant"
        assert adapters[0]["id"] in document["errors"][0]["detail"]
    plain = noop.extract(TEXTS, model="tiny", layers=[1, 2])
    lone = {**training, "extraction": plain["id"], "variant": "base"}
    problem(noop.post("/v1/probes", lone), 422, "invalid-request")

    for variant, digest in (("base", None), (adapters[1]["id"], adapters[1]["digest"])):
        job = noop.post("/v1/probes", {**training, "variant": variant}).json()
        probe = noop.client.get(job["resource"]).json()
        assert probe["identity"]["adapter"] == digest
        path = f"/v1/probes/{probe['id']}/predict"
        # Of a paired extraction it reads its own variant, of another one none but by transfer.
        read = noop.post(path, {"extraction": states["id"]}).json()
        prediction = noop.client.get(read["resource"]).json()
        assert prediction["identity"]["adapter"] == digest
        assert not prediction["transfer"]
        problem(noop.post(path, {"extraction": states["id"], "variant": adapters[0]["id"]}), 409, "identity-mismatch")
        fresh = noop.post(path, {"inputs": TEXTS}).json()
        assert fresh["status"] == "succeeded", fresh
        assert noop.client.get(fresh["resource"]).json()["identity"]["adapter"] == digest
    problem(noop.post(path, {"inputs": TEXTS, "variant": "base"}), 422, "invalid-request")


def test_a_probe_of_data_in_the_making(noop: Stack, adapters: list[dict[str, Any]]) -> None:
    data = {"model": "tiny", "inputs": TEXTS, "layers": [1], "adapter": ["base", adapters[0]["id"]]}
    body = {"data": data, "labels": [0, 1] * 4, "folds": 2}
    problem(noop.post("/v1/probes", body), 422, "invalid-request")
    job = noop.post("/v1/probes", {**body, "variant": adapters[0]["id"]}).json()
    assert job["status"] == "succeeded", job
    assert noop.client.get(job["resource"]).json()["identity"]["adapter"] == adapters[0]["digest"]


def test_a_deleted_adapter(noop: Stack) -> None:
    adapter = added(noop.client, archive("to be deleted"))
    states = noop.extract(TEXTS, model="tiny", adapter=adapter["id"], layers=[1])
    job = noop.post("/v1/probes", {"extraction": states["id"], "labels": [0, 1] * 4, "folds": 2}).json()
    probe = noop.client.get(job["resource"]).json()
    slow = {"model": "minilm", "inputs": ["a"], "metadata": {"noop_seconds": 2}}
    noop.post("/v1/extractions", slow, wait=0)
    noop.client.delete(f"/v1/adapters/{adapter['id']}")
    body = {"model": "tiny", "inputs": ["a"], "adapter": adapter["id"]}
    problem(noop.post("/v1/extractions", body), 404, "not-found")
    document = problem(noop.post(f"/v1/probes/{probe['id']}/predict", {"inputs": ["a"]}), 409, "state-conflict")
    assert "add it again" in document["detail"]
    again = added(noop.client, archive("to be deleted"))
    assert noop.post(f"/v1/probes/{probe['id']}/predict", {"inputs": ["a"]}).json()["status"] == "succeeded"
    noop.client.delete(f"/v1/adapters/{again['id']}")


def trained(client: httpx2.Client, model: str, adapter: dict[str, Any]) -> str:
    """Where the predictions of a probe are asked for whose states came from an adapter."""

    def made(path: str, body: dict[str, Any]) -> dict[str, Any]:
        job = client.post(path, json=body, headers={"Prefer": "wait=60"}, timeout=90).json()
        assert job["status"] == "succeeded", job
        return dict(client.get(job["resource"]).json())

    states = made("/v1/extractions", {"model": model, "inputs": TEXTS, "layers": [1], "adapter": adapter["id"]})
    probe = made("/v1/probes", {"extraction": states["id"], "labels": [0, 1] * 4, "folds": 2})
    return f"/v1/probes/{probe['id']}/predict"


def predicted(client: httpx2.Client, path: str) -> httpx2.Response:
    return client.post(path, json={"inputs": TEXTS}, headers={"Prefer": "wait=60"}, timeout=90)


def test_a_probe_reads_with_the_adapter_of_its_own_base(noop: Stack) -> None:
    """Two bases have an adapter of the same digest, and a third one is another name of the first."""
    content = archive("two bases", identity="org/model")
    mine, other = (added(noop.client, content, base_model=base) for base in ("tiny", "minilm"))
    assert mine["digest"] == other["digest"]
    paths = {model: trained(noop.client, model, one) for model, one in (("alias", mine), ("minilm", other))}
    for path in paths.values():
        assert predicted(noop.client, path).json()["status"] == "succeeded"
    noop.client.delete(f"/v1/adapters/{other['id']}")
    problem(predicted(noop.client, paths["minilm"]), 409, "state-conflict")
    assert predicted(noop.client, paths["alias"]).json()["status"] == "succeeded"
    noop.client.delete(f"/v1/adapters/{mine['id']}")


def test_another_keys_adapter_of_the_same_digest_is_not_used(noop: Stack, tmp_path: Path) -> None:
    with stack(tmp_path, noop=True, models=noop.environment["BATHYSCOPE_MODELS"], worker__adopt_seconds=0) as running:
        names = {"anna": (), "bert": (), "boss": ("--scope", "admin")}
        keys = {name: make_key(running, name, *options) for name, options in names.items()}
        with (
            as_user(running, keys["anna"]) as hers,
            as_user(running, keys["bert"]) as his,
            as_user(running, keys["boss"]) as boss,
        ):
            mine, other = (added(who, archive("same")) for who in (hers, his))
            own, read = trained(hers, "tiny", mine), trained(boss, "tiny", mine)
            assert predicted(hers, own).json()["status"] == "succeeded"
            assert predicted(boss, own).json()["status"] == "succeeded"  # it may see her adapter, and has none
            assert predicted(boss, read).json()["status"] == "succeeded"
            hers.delete(f"/v1/adapters/{mine['id']}")
            problem(predicted(hers, own), 409, "state-conflict")
            assert predicted(boss, own).json()["status"] == "succeeded"  # his, that admins see as well
            his.delete(f"/v1/adapters/{other['id']}")
            problem(predicted(boss, read), 409, "state-conflict")


def test_another_keys_adapter_is_as_none(noop: Stack, adapters: list[dict[str, Any]], tmp_path_factory: Any) -> None:
    with stack(tmp_path_factory.mktemp("two"), noop=True, models=noop.environment["BATHYSCOPE_MODELS"]) as two:
        anna, bert = make_key(two, "anna"), make_key(two, "bert")
        with as_user(two, anna) as hers, as_user(two, bert) as his:
            adapter = added(hers, archive("hers"))
            never = new_id("ad")
            for foreign_id, missing_id in ((adapter["id"], never), (["base", adapter["id"]], ["base", never])):
                body = {"model": "tiny", "inputs": ["a"]}
                foreign = his.post("/v1/extractions", json={**body, "adapter": foreign_id})
                missing = his.post("/v1/extractions", json={**body, "adapter": missing_id})
                assert foreign.status_code == 404
                assert foreign.text.replace(adapter["id"], "…") == missing.text.replace(never, "…")
