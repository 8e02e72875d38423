"""When a request is sent again, when not, and what is raised in the end."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx2
import pytest

import bathyscope
from bathyscope import errors
from bathyscope._http import Attempts, Retry


def test_a_broken_connection_is_tried_again_with_the_same_key(both: Any, wire: Any, answers: Any) -> None:
    wire.then(httpx2.ConnectError("refused"), httpx2.ReadError("reset"), answers.ok(answers.job(), 202))
    assert both("extractions.create", model="m", inputs=["a"]).id == "job_1"
    assert len({request.headers["idempotency-key"] for request in wire.requests}) == 1
    assert len(wire.requests) == 3
    assert len(wire.pauses) == 2
    assert 0 <= wire.pauses[0] <= 0.25
    assert 0 <= wire.pauses[1] <= 0.5


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_these_statuses_are_tried_again(both: Any, wire: Any, answers: Any, status: int) -> None:
    wire.then(httpx2.Response(status, text="proxy"), answers.ok(answers.job(), 202))
    both("extractions.create", model="m", inputs=["a"])
    assert len(wire.requests) == 2


@pytest.mark.parametrize(
    ("slug", "status", "kind"),
    [
        ("invalid-input", 422, errors.InvalidInput),
        ("not-found", 404, errors.NotFound),
        ("internal-error", 500, errors.InternalError),
        ("not-built", 501, errors.NotBuilt),
        ("too-large", 413, errors.TooLarge),
        ("a-slug-of-tomorrow", 418, errors.ProblemError),
    ],
)
def test_a_problem_is_raised_at_once_as_its_class(
    both: Any, wire: Any, answers: Any, slug: str, status: int, kind: type[errors.ProblemError]
) -> None:
    wire.then(answers.problem(slug, status))
    with pytest.raises(kind, match="told so") as caught:
        both("extractions.get", "ext_1")
    assert type(caught.value) is kind
    assert caught.value.status == status
    assert len(wire.requests) == 1


def test_retry_after_is_the_least_pause(client: bathyscope.Client, wire: Any, answers: Any) -> None:
    wire.then(answers.problem("lane-full", 429, headers={"retry-after": "7"}), answers.ok(answers.job(), 202))
    client.extractions.create(model="m", inputs=["a"])
    assert 7 <= wire.pauses[0] <= 8


def test_retry_after_as_a_date(client: bathyscope.Client, wire: Any, answers: Any) -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=20), usegmt=True)
    wire.then(answers.problem("lane-full", 429, headers={"retry-after": soon}), answers.ok(answers.job(), 202))
    client.extractions.create(model="m", inputs=["a"])
    assert 18 <= wire.pauses[0] <= 21


def test_a_retry_after_beyond_the_bound_is_raised_at_once(client: bathyscope.Client, wire: Any, answers: Any) -> None:
    wire.then(answers.problem("quota-exceeded", 429, headers={"retry-after": "3600"}))
    with pytest.raises(errors.QuotaExceeded) as caught:
        client.extractions.create(model="m", inputs=["a"])
    assert caught.value.retry_after == 3600
    assert wire.pauses == []


def test_the_number_of_retries_is_bounded(both: Any, wire: Any) -> None:
    wire.then(httpx2.ConnectError("refused"))
    with pytest.raises(errors.ConnectionFailed, match=r"service\.test.*refused"):
        both("jobs.get", "job_1")
    assert len(wire.requests) == 5


def test_the_pauses_are_bounded_in_all() -> None:
    attempts = Attempts(Retry(max_retries=1000, total=30))
    slept: list[float] = []

    def pause_for_ever() -> None:
        while True:
            slept.extend(effect.seconds for effect in attempts.pause(errors.Unavailable("away"), 4.0))  # type: ignore[union-attr]

    with pytest.raises(errors.Unavailable):
        pause_for_ever()
    assert 20 < sum(slept) <= 30


def test_no_retries_when_none_are_wanted(wire: Any) -> None:
    wire.then(httpx2.ConnectError("refused"))
    with (
        bathyscope.Client("http://service.test", max_retries=0, transport=httpx2.MockTransport(wire)) as client,
        pytest.raises(errors.ConnectionFailed),
    ):
        client.whoami()
    assert len(wire.requests) == 1


def test_a_delete_whose_answer_was_lost_is_done(client: bathyscope.Client, wire: Any, answers: Any) -> None:
    wire.then(httpx2.ReadError("reset"), answers.problem("not-found", 404))
    client.extractions.delete("ext_1")
    wire.answers = [answers.problem("not-found", 404)]
    with pytest.raises(errors.NotFound):
        client.extractions.delete("ext_1")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (httpx2.Response(200, text="<html>welcome</html>", headers={"content-type": "text/html"}), "not JSON"),
        (httpx2.Response(200, json={"id": 3}), "not a"),
        (httpx2.Response(404, text="<html>nginx</html>", headers={"content-type": "text/html"}), "404 with text/html"),
        (httpx2.Response(301, headers={"location": "https://elsewhere.test/"}), "elsewhere"),
        (httpx2.Response(500, json={"error": "x"}), "500"),
    ],
)
def test_answers_of_something_else(both: Any, wire: Any, answer: httpx2.Response, words: str) -> None:
    wire.then(lambda request: httpx2.Response(answer.status_code, content=answer.content, headers=answer.headers))
    with pytest.raises(errors.UnexpectedAnswer, match=words):
        both("extractions.get", "ext_1")


def test_an_unsupported_scheme_of_the_transport_is_not_repeated(client: bathyscope.Client, wire: Any) -> None:
    wire.then(httpx2.LocalProtocolError("bad header"))
    with pytest.raises(errors.ConnectionFailed, match="bad header"):
        client.whoami()
    assert len(wire.requests) == 1
