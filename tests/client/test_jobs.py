"""Handles: waiting, failing, cancelling, listening, coming back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx2
import pytest

import bathyscope
from bathyscope import _operations, errors


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Time as `wait` sees it; a test moves it on."""

    class Clock:
        now = 1000.0

        def monotonic(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(_operations, "time", clock)
    return clock


def held(clock: Any, body: Any) -> Any:
    """An answer that the service held as long as it was asked to."""

    def answer(request: httpx2.Request) -> httpx2.Response:
        clock.now += float(request.headers["prefer"].removeprefix("wait="))
        return httpx2.Response(200, json=body)

    return answer


def test_wait_holds_the_line_and_gives_the_object(both: Any, wire: Any, answers: Any, clock: Any) -> None:
    wire.then(
        answers.ok(answers.job(), 202),
        held(clock, answers.job("running")),
        answers.ok(answers.job("succeeded")),
        answers.ok(answers.extraction()),
    )
    states = both("extractions.create", model="m", inputs=["a"], then="wait")
    assert isinstance(states, bathyscope.Extraction | bathyscope.AsyncExtraction)
    assert states.id == "ext_1"
    assert wire.calls == [
        "POST /v1/extractions",
        "GET /v1/jobs/job_1",
        "GET /v1/jobs/job_1",
        "GET /v1/extractions/ext_1",
    ]
    assert wire.requests[1].headers["prefer"] == "wait=30"
    assert wire.pauses == []


def test_create_may_wait_itself(client: bathyscope.Client, wire: Any, answers: Any) -> None:
    wire.then(answers.ok(answers.job("succeeded")), answers.ok(answers.extraction()))
    handle = client.extractions.create(model="m", inputs=["a"], wait=100)
    assert wire.requests[0].headers["prefer"] == "wait=60"
    assert handle.status == "succeeded"
    assert handle.wait() is handle.result()
    assert wire.calls == ["POST /v1/extractions", "GET /v1/extractions/ext_1"]


def test_where_the_service_does_not_hold_the_pauses_are_ours(
    client: bathyscope.Client, wire: Any, answers: Any, clock: Any
) -> None:
    wire.then(answers.ok(answers.job(), 202))
    handle = client.extractions.create(model="m", inputs=["a"])
    wire.answers = [answers.ok(answers.job("running"))] * 4 + [
        answers.ok(answers.job("succeeded")),
        answers.ok(answers.extraction()),
    ]
    handle.wait()
    assert wire.pauses == pytest.approx([0.1, 0.15, 0.225, 0.3375])


def test_a_wait_that_runs_out(both: Any, wire: Any, answers: Any, clock: Any) -> None:
    wire.then(answers.ok(answers.job("running")), held(clock, answers.job("running")))
    handle = both("jobs.attach", "job_1")
    with pytest.raises(errors.WaitTimeout, match=r"job_1 was still running after 5 s.*attach\('job_1'\)"):
        _wait(both, wire, handle, timeout=5)
    assert clock.now == 1005


def _wait(both: Any, wire: Any, handle: Any, **kwargs: Any) -> Any:
    """Wait on a fresh handle of the same job."""

    transport = httpx2.MockTransport(wire)
    if both.kind == "sync":
        with bathyscope.Client("http://service.test", transport=transport) as client:
            return bathyscope.JobHandle[Any](client._connection, handle.record).wait(**kwargs)

    async def call() -> Any:
        async with bathyscope.AsyncClient("http://service.test", transport=transport) as client:
            return await bathyscope.AsyncJobHandle[Any](client._connection, handle.record).wait(**kwargs)

    return asyncio.run(call())


def test_wait_survives_a_restart_of_the_service(client: bathyscope.Client, wire: Any, answers: Any) -> None:
    wire.then(answers.ok(answers.job("running")))
    handle = client.jobs.attach("job_1")
    wire.answers = [
        *[httpx2.ConnectError("refused")] * 10,
        answers.problem("unavailable", 503),
        answers.ok(answers.job("succeeded")),
        answers.ok(answers.extraction()),
    ]
    assert handle.wait().id == "ext_1"


@pytest.mark.parametrize(
    ("slug", "kind"),
    [
        ("invalid-input", errors.InvalidInput),
        ("engine-died", errors.EngineDied),
        ("dependency-failed", errors.DependencyFailed),
    ],
)
def test_a_failed_job_raises_the_class_of_its_problem(
    both: Any, wire: Any, answers: Any, slug: str, kind: type[errors.ProblemError]
) -> None:
    document = {
        "type": f"/problems/{slug}",
        "title": "T",
        "status": 422,
        "detail": "input 3 is empty",
        "errors": [{"pointer": "/inputs/3", "detail": "no tokens"}],
    }
    wire.then(answers.ok(answers.job(), 202), answers.ok(answers.job("failed", error=document)))
    with pytest.raises(kind, match="input 3 is empty") as caught:
        both("extractions.create", model="m", inputs=["a"], then="wait")
    assert caught.value.errors == [{"pointer": "/inputs/3", "detail": "no tokens"}]
    assert caught.value.job.id == "job_1"  # type: ignore[attr-defined]


def test_cancelled_expired_and_unfinished(client: bathyscope.Client, wire: Any, answers: Any) -> None:
    wire.then(answers.ok(answers.job("cancelled")))
    with pytest.raises(errors.JobCancelled):
        client.jobs.attach("job_1").wait()
    wire.answers = [answers.ok(answers.job("expired"))]
    with pytest.raises(errors.Expired):
        client.jobs.attach("job_1").wait()
    wire.answers = [answers.ok(answers.job("running"))]
    with pytest.raises(errors.StateConflict, match="running"):
        client.jobs.attach("job_1").result()


def test_cancel_sees_the_new_state(client: bathyscope.Client, wire: Any, answers: Any) -> None:
    wire.then(answers.ok(answers.job(), 202), answers.ok(answers.job("cancelled")))
    handle = client.extractions.create(model="m", inputs=["a"])
    assert handle.cancel().status == "cancelled"
    wire.answers = [answers.problem("state-conflict", 409)]
    with pytest.raises(errors.StateConflict):
        handle.cancel()


@pytest.mark.parametrize(
    ("kind", "resource", "cls"),
    [
        ("extraction", "extraction", bathyscope.Extraction),
        ("probe", "probe", bathyscope.Probe),
        ("prediction", "prediction", bathyscope.Prediction),
    ],
)
def test_attach_knows_what_the_job_makes(
    client: bathyscope.Client, wire: Any, answers: Any, kind: str, resource: str, cls: type
) -> None:
    wire.then(answers.ok(answers.job("succeeded", kind=kind)), answers.ok(getattr(answers, resource)()))
    assert type(client.jobs.attach("job_1").wait()) is cls


def test_a_kind_without_a_class_of_its_own(
    client: bathyscope.Client, wire: Any, answers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(bathyscope.JobHandle._kinds, "comparison")  # as with a client older than the kind
    wire.then(
        answers.ok(answers.job("succeeded", kind="comparison") | {"resource": "/v1/comparisons/cmp_1"}),
        answers.ok({"id": "cmp_1", "rank": 8}),
    )
    comparison = client.jobs.attach("job_1").wait()
    assert (comparison.id, comparison.rank) == ("cmp_1", 8)


def event(number: int, body: Any, kind: str = "progress") -> str:
    return f"id: {number}\nevent: {kind}\ndata: {json.dumps(body)}\n\n"


class Chunks(httpx2.SyncByteStream, httpx2.AsyncByteStream):
    """A body in pieces that may break off."""

    def __init__(self, *pieces: str | Exception) -> None:
        self.pieces = pieces

    def __iter__(self) -> Iterator[bytes]:
        for piece in self.pieces:
            if isinstance(piece, Exception):
                raise piece
            yield piece.encode()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self:
            yield piece


def stream(*pieces: str | Exception) -> httpx2.Response:
    return httpx2.Response(200, headers={"content-type": "text/event-stream"}, stream=Chunks(*pieces))


def scenario(wire: Any, answers: Any) -> None:
    """Broken in the middle of an event, refused once, ended early, then done."""
    wire.then(
        answers.ok(answers.job()),
        stream(": hello\n\n", event(1, answers.job("running"))[:-1], "\n", "id: 2\nevent: prog", httpx2.ReadError("x")),
        httpx2.ConnectError("refused"),
        stream("retry: 50\n\n", event(2, answers.job("running", attempt=2)), event(3, {}, "of_tomorrow")),
        stream(event(4, answers.job("succeeded"), "done"), event(5, answers.job("failed"))),
    )


def check(wire: Any, seen: list[Any], handle: Any) -> None:
    assert [(item.id, item.event, item.job.status) for item in seen] == [
        ("1", "progress", "running"),
        ("2", "progress", "running"),
        ("4", "done", "succeeded"),
    ]
    assert [request.headers.get("last-event-id") for request in wire.requests[1:]] == [None, "1", "1", "3"]
    assert handle.status == "succeeded"


def test_events_go_on_behind_the_last_one_seen(client: bathyscope.Client, wire: Any, answers: Any) -> None:
    scenario(wire, answers)
    handle = client.jobs.attach("job_1")
    check(wire, list(handle.events()), handle)
    assert wire.pauses[-1] >= 0.05


async def test_async_events_likewise(wire: Any, answers: Any) -> None:
    scenario(wire, answers)
    async with bathyscope.AsyncClient("http://service.test", transport=httpx2.MockTransport(wire)) as client:
        handle = await client.jobs.attach("job_1")
        check(wire, [item async for item in handle.events()], handle)


def test_events_of_a_service_that_stays_away(client: bathyscope.Client, wire: Any, answers: Any) -> None:
    wire.then(answers.ok(answers.job()), stream(event(1, answers.job("running"))), httpx2.ConnectError("refused"))
    seen = client.jobs.attach("job_1").events()
    assert next(seen).id == "1"
    with pytest.raises(errors.ConnectionFailed):
        next(seen)


def test_an_event_stream_that_is_none(client: bathyscope.Client, wire: Any, answers: Any) -> None:
    wire.then(answers.ok(answers.job()), answers.ok({}))
    with pytest.raises(errors.UnexpectedAnswer, match="event-stream"):
        list(client.jobs.attach("job_1").events())


def test_leaving_the_events_closes_the_stream(client: bathyscope.Client, wire: Any, answers: Any) -> None:
    response = stream(event(1, answers.job("running")), event(2, answers.job("running")))
    wire.then(answers.ok(answers.job()), response)
    for _ in client.jobs.attach("job_1").events():
        break
    assert response.is_closed


def test_a_probe_predicts_in_one_held_request(both: Any, wire: Any, answers: Any) -> None:
    wire.then(
        answers.ok(answers.probe()),
        answers.ok(answers.job("succeeded", kind="prediction")),
        answers.ok(answers.prediction()),
    )
    transport = httpx2.MockTransport(wire)
    if both.kind == "sync":
        with bathyscope.Client("http://service.test", transport=transport) as client:
            trained = client.probes.get("prb_1")
            said: Any = trained.predict(["a", "b"])
    else:

        async def call() -> Any:
            async with bathyscope.AsyncClient("http://service.test", transport=transport) as client:
                return await (await client.probes.get("prb_1")).predict(["a", "b"])

        said = asyncio.run(call())
        assert type(said) is bathyscope.AsyncPrediction
    assert said.array().shape == (2, 2)
    assert said.labels == [True, False]
    assert wire.calls == ["GET /v1/probes/prb_1", "POST /v1/probes/prb_1/predict", "GET /v1/predictions/prd_1"]
    assert wire.requests[1].headers["prefer"] == "wait=30"
    assert wire.body(1) == {"inputs": ["a", "b"]}


def test_the_report_is_typed(client: bathyscope.Client, wire: Any, answers: Any) -> None:
    wire.then(answers.ok(answers.probe()))
    trained = client.probes.get("prb_1")
    assert trained.report.held_out.ece is not None
    assert trained.report.held_out.ece.value == 0.05
    assert trained.report.layers[0].layer == trained.report.best_layer


def test_the_bar_draws_on_a_terminal_only(
    client: bathyscope.Client, wire: Any, answers: Any, clock: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    progress = {"stage": "forward", "done": 3, "total": 9, "unit": "inputs"}

    def script() -> None:
        wire.answers = [
            answers.ok(answers.job()),
            held(clock, answers.job("running", progress=progress)),
            answers.ok(answers.job("succeeded")),
            answers.ok(answers.extraction()),
        ]

    script()
    client.jobs.attach("job_1").wait(progress=True)
    assert capsys.readouterr() == ("", "")
    assert wire.requests[-2].headers["prefer"] == "wait=30"

    monkeypatch.setenv("FORCE_COLOR", "1")
    script()
    client.jobs.attach("job_1").wait(progress=True)
    assert wire.requests[-2].headers["prefer"] == "wait=1"
    assert "extraction: " in capsys.readouterr().err
