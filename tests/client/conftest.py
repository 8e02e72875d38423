"""A fake of the wire: requests are answered by a function of the test, pauses are recorded instead of slept."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx2
import pytest

import bathyscope
from bathyscope import _connection

Answer = httpx2.Response | Exception | Callable[[httpx2.Request], httpx2.Response]


@dataclass
class Wire:
    """Answers in turn; the last one again and again."""

    answers: list[Answer] = field(default_factory=list)
    requests: list[httpx2.Request] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        if callable(answer):
            return answer(request)
        return answer

    def then(self, *answers: Answer) -> Wire:
        self.answers += answers
        return self

    @property
    def calls(self) -> list[str]:
        return [f"{request.method} {request.url.raw_path.decode()}" for request in self.requests]

    def body(self, index: int = -1) -> Any:
        return json.loads(self.requests[index].content)


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    wire = Wire()

    async def paused(seconds: float) -> None:
        wire.pauses.append(seconds)

    monkeypatch.setattr(_connection.time, "sleep", wire.pauses.append)
    monkeypatch.setattr(_connection.asyncio, "sleep", paused)
    return wire


@pytest.fixture
def client(wire: Wire) -> Iterator[bathyscope.Client]:
    with bathyscope.Client("http://service.test", api_key="k", transport=httpx2.MockTransport(wire)) as client:
        yield client


class Both:
    """Runs the same call on `Client` and `AsyncClient`."""

    def __init__(self, wire: Wire, kind: str) -> None:
        self.wire = wire
        self.kind = kind

    def __call__(self, path: str, *args: Any, then: str | None = None, **kwargs: Any) -> Any:
        """`client.<path>(…)`, and of its outcome `.<then>()`."""
        transport = httpx2.MockTransport(self.wire)

        def find(client: Any) -> Any:
            for name in path.split("."):
                client = getattr(client, name)
            return client

        if self.kind == "sync":
            with bathyscope.Client("http://service.test", transport=transport) as client:
                outcome = find(client)(*args, **kwargs)
                return getattr(outcome, then)() if then else outcome

        async def call() -> Any:
            async with bathyscope.AsyncClient("http://service.test", transport=transport) as client:
                outcome = await find(client)(*args, **kwargs)
                return await getattr(outcome, then)() if then else outcome

        return asyncio.run(call())


@pytest.fixture(params=["sync", "async"])
def both(wire: Wire, request: pytest.FixtureRequest) -> Both:
    return Both(wire, request.param)


NOW = "2026-01-01T00:00:00Z"
IDENTITY = {"model": "m", "compute_dtype": "float32", "pooling": "last"}


def ok(body: Any, status: int = 200, **headers: str) -> httpx2.Response:
    return httpx2.Response(status, json=body, headers=headers)


def job(status: str = "queued", kind: str = "extraction", **more: Any) -> dict[str, Any]:
    made = {"extraction": "/v1/extractions/ext_1", "probe": "/v1/probes/prb_1", "prediction": "/v1/predictions/prd_1"}
    resource = made.get(kind) if status == "succeeded" else None
    return {"id": "job_1", "kind": kind, "status": status, "created_at": NOW, "resource": resource, **more}


def problem(slug: str, status: int, detail: str = "told so", headers: dict[str, str] | None = None) -> httpx2.Response:
    body = {"type": f"/problems/{slug}", "title": "T", "status": status, "detail": detail}
    return httpx2.Response(
        status, content=json.dumps(body), headers={"content-type": "application/problem+json", **(headers or {})}
    )


def extraction(**more: Any) -> dict[str, Any]:
    return {
        "id": "ext_1",
        "job": "job_1",
        "model": "m",
        "identity": IDENTITY,
        "layers": [0, 1],
        "num_layers": 2,
        "pooling": "last",
        "shape": [3, 2, 4],
        "dtype": "float32",
        "inputs": 3,
        "bytes": 100,
        "sha256": "0" * 64,
        "tokens": {"total": 9},
        "created_at": NOW,
        **more,
    }


def probe(**more: Any) -> dict[str, Any]:
    scores = {"auroc": {"value": 0.9, "low": 0.8, "high": 1.0}, "ece": {"value": 0.05}}
    report = {"layers": [{"layer": 1, **scores}], "best_layer": 1, "held_out": scores}
    return {
        "id": "prb_1",
        "job": "job_1",
        "estimator": "logistic",
        "task": "binary",
        "classes": [False, True],
        "layer": 1,
        "identity": IDENTITY,
        "report": report,
        "created_at": NOW,
        **more,
    }


def prediction(**more: Any) -> dict[str, Any]:
    return {
        "id": "prd_1",
        "job": "job_1",
        "probe": "prb_1",
        "classes": [False, True],
        "probabilities": [[0.25, 0.75], [1.0, 0.0]],
        "labels": [True, False],
        "identity": IDENTITY,
        "created_at": NOW,
        **more,
    }


@pytest.fixture
def answers() -> Any:
    """The builders of answers above, for tests (which cannot import this file)."""
    from types import SimpleNamespace

    return SimpleNamespace(
        ok=ok, job=job, problem=problem, extraction=extraction, probe=probe, prediction=prediction, identity=IDENTITY
    )
