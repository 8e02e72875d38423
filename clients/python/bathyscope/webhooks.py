"""Webhooks on the receiving side: is this delivery really from the service, and which job has ended?

```python
job = bathyscope.webhooks.verify(request.body, request.headers["Bathyscope-Signature"], secret)
if job.status == "succeeded": ...
```

A delivery may come twice, as when an answer of yours was lost: the header `Bathyscope-Delivery` is the same then.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import time

from pydantic import ValidationError

from bathyscope.errors import SignatureInvalid, UnexpectedAnswer
from bathyscope.types import Job

SIGNATURE_HEADER = "Bathyscope-Signature"
"""`t=<Unix time>,v1=<HMAC-SHA256 in hex>`."""

DELIVERY_HEADER = "Bathyscope-Delivery"
"""Names a delivery; the same at each attempt at it."""

_TIME = re.compile(r"[0-9]{1,12}")


def sign(body: bytes, secret: str, at: int) -> str:
    """The signature header of a body sent at a Unix time: the HMAC-SHA256 of `<at>.<body>` under the secret."""
    return f"t={at},v1={_digest(body, secret, at)}"


def verify(payload: bytes | str, header: str | None, secret: str, tolerance: float | None = 300.0) -> Job:
    """The job that a delivery tells of.

    `payload`: the body as it came, byte for byte; parsed and written anew it would not fit its signature.
    `header`: the value of `Bathyscope-Signature`. `secret`: `whsec_…`, made with the API key.
    `tolerance`: seconds by which the signature may be old, or ahead of this clock; None takes any.

    Raises `SignatureInvalid` unless the signature is the service's and of now, and `UnexpectedAnswer` for a signed
    body that is no Job.
    """
    body = payload.encode() if isinstance(payload, str) else bytes(payload)
    if not secret:
        raise ValueError("secret is empty; it is what `bathyscope keys webhook-secret` prints")
    parts = [part.strip().partition("=") for part in (header or "").split(",")]
    times = [value for name, _, value in parts if name == "t"]
    given = [value for name, _, value in parts if name == "v1"]
    if len(times) != 1 or not _TIME.fullmatch(times[0]) or not given:
        raise SignatureInvalid(f"the header {SIGNATURE_HEADER} is missing or not of the form t=…,v1=…")
    at = int(times[0])
    expected = _digest(body, secret, at).encode()
    # Each is compared, and each in constant time: an early answer would tell how much of a guess was right.
    if not sum([hmac.compare_digest(expected, one.encode("utf-8", "replace")) for one in given]):
        raise SignatureInvalid("the signature does not fit the body; is this the secret of the key that made the job?")
    if tolerance is not None and abs(time.time() - at) > tolerance:
        raise SignatureInvalid(f"the signature is not from the last {tolerance:g} seconds; is this clock right?")
    try:
        return Job.model_validate_json(body)
    except ValidationError as error:
        raise UnexpectedAnswer("the body is signed, and is no Job of this API") from error


def _digest(body: bytes, secret: str, at: int) -> str:
    return hmac.new(secret.encode(), b"%d." % at + body, hashlib.sha256).hexdigest()
