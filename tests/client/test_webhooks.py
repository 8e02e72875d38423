"""What a receiver of webhooks does with a delivery."""

from __future__ import annotations

import hashlib
import hmac
import json
import time

import hypothesis.strategies as st
import pytest
from hypothesis import given

import bathyscope
from bathyscope.errors import SignatureInvalid, UnexpectedAnswer
from bathyscope.webhooks import sign, verify

SECRET = "whsec_abc"
JOB = {"id": "job_1", "kind": "extraction", "status": "succeeded", "created_at": "2026-01-31T12:00:00.000Z"}
BODY = json.dumps(JOB).encode()


def header(body: bytes = BODY, secret: str = SECRET, *, age: float = 0.0) -> str:
    """A signature as the contract writes it, made without the code that is tested."""
    at = int(time.time() - age)
    return f"t={at},v1=" + hmac.new(secret.encode(), f"{at}.".encode() + body, hashlib.sha256).hexdigest()


def test_a_delivery_gives_its_job() -> None:
    job = verify(BODY, header(), SECRET)
    assert isinstance(job, bathyscope.types.Job)
    assert (job.id, job.status, job.ended) == ("job_1", "succeeded", True)
    assert verify(BODY.decode(), header(), SECRET) == job
    assert verify(BODY, " , ".join(header().split(",")), SECRET) == job
    assert header(age=9) == sign(BODY, SECRET, int(time.time() - 9))


@pytest.mark.parametrize(
    "value",
    [
        None,
        "",
        "v1=" + "0" * 64,
        "t=1",
        "t=,v1=",
        f"t={int(time.time())},v1=",
        f"t={int(time.time())},v1={'0' * 64}",
        f"t={int(time.time())},v1=é\ud800",
        f"t=１,v1={'0' * 64}",
        f"t=-5,v1={'0' * 64}",
        header().replace("v1", "v0"),
        header().upper(),
        "t=1," + header(),
        header(secret="whsec_other"),
        header(BODY + b" "),
    ],
    ids=map(str, range(15)),  # not by the time of day: processes that share the tests must call them the same
)
def test_any_other_signature_is_refused(value: str | None) -> None:
    for tolerance in (300, None):
        with pytest.raises(SignatureInvalid):
            verify(BODY, value, SECRET, tolerance)


@given(st.binary(max_size=40), st.integers(0, len(BODY) - 1), st.integers(1, 255))
def test_a_changed_body_is_refused(tail: bytes, at: int, bits: int) -> None:
    changed = BODY[:at] + bytes([BODY[at] ^ bits]) + BODY[at + 1 :] + tail
    with pytest.raises(SignatureInvalid):
        verify(changed, header(), SECRET)


@pytest.mark.parametrize("age", [400, -400])
def test_a_signature_of_another_time_is_refused(age: float) -> None:
    with pytest.raises(SignatureInvalid, match="300 seconds"):
        verify(BODY, header(age=age), SECRET)
    assert verify(BODY, header(age=age), SECRET, tolerance=500).id == "job_1"
    assert verify(BODY, header(age=age), SECRET, tolerance=None).id == "job_1"


def test_one_of_several_signatures_is_enough() -> None:
    at, _, good = header().partition(",")
    assert verify(BODY, f"{at},v1={'0' * 64},{good}", SECRET).id == "job_1"


def test_a_signed_body_that_is_no_job_says_so() -> None:
    for body in (b"{}", b"[]", b"\xff"):
        with pytest.raises(UnexpectedAnswer):
            verify(body, header(body), SECRET)


def test_an_empty_secret_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="empty"):
        verify(BODY, header(secret=""), "")
