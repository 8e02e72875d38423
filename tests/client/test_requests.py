"""What `create` sends: Python and numpy values become the wire type, faults have pointers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bathyscope
from bathyscope import errors, types


def test_an_extraction_sends_only_what_was_given(both: Any, wire: Any, answers: Any) -> None:
    wire.then(answers.ok(answers.job(), 202))
    handle = both("extractions.create", model="m", inputs=["a", {"token_ids": [1, 2]}], layers=[0, -1])
    assert handle.id == "job_1"
    assert wire.calls == ["POST /v1/extractions"]
    assert wire.body() == {"model": "m", "inputs": ["a", {"token_ids": [1, 2]}], "layers": [0, -1]}
    assert len(wire.requests[0].headers["idempotency-key"]) == 32
    assert "prefer" not in wire.requests[0].headers


def test_numpy_values_generators_and_models_are_taken(client: bathyscope.Client, wire: Any, answers: Any) -> None:
    wire.then(answers.ok(answers.job(), 202))
    chat = types.MessagesInput(messages=[types.Message(role="user", content="hi")])
    client.extractions.create(
        model="m",
        inputs=(text for text in ["a", chat, {"token_ids": np.array([5, 6], dtype=np.int32)}]),
        layers=np.arange(0, 6, 2),
        max_length=np.int64(7),  # type: ignore[arg-type]  numpy's numbers work all the same
        positions=types.Positions(span=[0, 2]),
        metadata={"share": np.float32(0.5), "path": Path("a/b")},
    )
    assert wire.body() == {
        "model": "m",
        "inputs": ["a", {"messages": [{"role": "user", "content": "hi"}]}, {"token_ids": [5, 6]}],
        "layers": [0, 2, 4],
        "max_length": 7,
        "positions": {"span": [0, 2]},
        "metadata": {"share": 0.5, "path": "a/b"},
    }


def test_labels_groups_and_objects_of_a_probe(client: bathyscope.Client, wire: Any, answers: Any) -> None:
    wire.then(answers.ok(answers.extraction()), answers.ok(answers.job(kind="probe"), 202))
    states = client.extractions.get("ext_1")
    client.probes.create(
        extraction=states,
        labels=np.array([True, False, True]),
        groups=np.array([0, 0, 1]),
        C=[np.float64(0.01)],
        layers=range(3),
    )
    assert wire.body() == {
        "extraction": "ext_1",
        "labels": [True, False, True],
        "groups": [0, 0, 1],
        "C": [0.01],
        "layers": [0, 1, 2],
    }


def test_a_wrong_field_is_refused_before_anything_is_sent(client: bathyscope.Client, wire: Any) -> None:
    with pytest.raises(errors.InvalidRequest) as caught:
        client.extractions.create(
            model="m",
            inputs=["a", {"messages": [{"role": "user"}]}, 3],  # type: ignore[list-item]
            layers=[1.5],
            pooling="sum",  # type: ignore[arg-type]
        )
    assert {fault["pointer"] for fault in caught.value.errors} == {
        "/inputs/1/messages/0/content",  # inputs may be a hundred thousand: they are read up to the first fault
        "/layers",
        "/layers/0",
        "/pooling",
    }
    assert "/pooling: Input should be" in str(caught.value)
    assert wire.requests == []


@pytest.mark.parametrize("value", [float("nan"), object(), "\ud800"])
def test_what_json_cannot_hold_is_refused(client: bathyscope.Client, value: Any) -> None:
    with pytest.raises(errors.InvalidRequest):
        client.extractions.create(model="m", inputs=["a"], metadata={"x": value})


def test_a_string_is_not_a_list_of_texts(client: bathyscope.Client) -> None:
    with pytest.raises(errors.InvalidRequest, match="/inputs"):
        client.extractions.create(model="m", inputs="abc")


def test_names_with_slashes_and_odd_characters(client: bathyscope.Client, wire: Any, answers: Any) -> None:
    wire.then(answers.ok({"name": "Qwen/Qwen3-8B", "source": "hub", "quantizations": ["none"]}))
    assert client.models.get("Qwen/Qwen3-8B").name == "Qwen/Qwen3-8B"
    client.models.get("a b?c#d")
    assert wire.calls == ["GET /v1/models/Qwen/Qwen3-8B", "GET /v1/models/a%20b%3Fc%23d"]
    with pytest.raises(errors.InvalidRequest, match="empty"):
        client.extractions.get("")


def test_lists_go_through_the_pages(both: Any, wire: Any, answers: Any, client: bathyscope.Client) -> None:
    wire.then(
        answers.ok({"data": [answers.job() for _ in range(2)], "next_cursor": "c2"}),
        answers.ok({"data": [answers.job()], "next_cursor": None}),
    )
    assert len(list(client.jobs.list(kind="probe", status="failed"))) == 3
    assert wire.calls == ["GET /v1/jobs?kind=probe&status=failed", "GET /v1/jobs?kind=probe&status=failed&cursor=c2"]


def test_a_limit_ends_the_list(client: bathyscope.Client, wire: Any, answers: Any) -> None:
    wire.then(answers.ok({"data": [answers.job() for _ in range(5)], "next_cursor": "more"}))
    assert len(list(client.jobs.list(limit=3))) == 3
    assert wire.calls == ["GET /v1/jobs?limit=3"]


async def test_async_lists(wire: Any, answers: Any) -> None:
    import httpx2

    wire.then(answers.ok({"data": [answers.extraction()], "next_cursor": None}))
    async with bathyscope.AsyncClient("http://service.test", transport=httpx2.MockTransport(wire)) as client:
        found = [item async for item in client.extractions.list()]
    assert [item.id for item in found] == ["ext_1"]
    assert isinstance(found[0], bathyscope.AsyncExtraction)


def test_the_other_routes(client: bathyscope.Client, wire: Any, answers: Any) -> None:
    wire.then(answers.ok(answers.job(kind="model"), 202))
    client.models.load("m", quantization="8bit")
    client.models.unload("m")
    client.adapters.create(source="hf://a/b", name="n")
    client.jobs.cancel("job_1")
    client.jobs.replay("job_1")
    assert wire.calls == [
        "POST /v1/models/m/load",
        "POST /v1/models/m/unload",
        "POST /v1/adapters",
        "POST /v1/jobs/job_1/cancel",
        "POST /v1/jobs/job_1/replay",
    ]
    assert wire.body(0) == {"quantization": "8bit"}
    assert wire.body(2) == {"source": "hf://a/b", "name": "n"}
    assert all("idempotency-key" in request.headers for request in wire.requests)


def test_key_and_address_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, wire: Any, answers: Any) -> None:
    import httpx2

    monkeypatch.setenv("BATHYSCOPE_URL", "https://host.test/below/")
    monkeypatch.setenv("BATHYSCOPE_API_KEY", " secret\n")
    wire.then(answers.ok(answers.job()))
    with bathyscope.Client(transport=httpx2.MockTransport(wire)) as client:
        client.jobs.get("job_1")
    assert str(wire.requests[0].url) == "https://host.test/below/v1/jobs/job_1"
    assert wire.requests[0].headers["authorization"] == "Bearer secret"
    assert "secret" not in repr(client) + repr(vars(client))


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://[::bad"])
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(errors.SetupError):
        bathyscope.Client(url)


def test_a_service_that_is_not_ready_is_no_error(both: Any, wire: Any, answers: Any) -> None:
    wire.then(answers.ok({"ready": False, "redis": True, "store": True, "workers": 0}, 503))
    assert both("ready").workers == 0
    assert len(wire.requests) == 1
