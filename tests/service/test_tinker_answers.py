"""Front end and workers make the same problem of the same answer of Tinker's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bathyscope import errors
from bathyscope_service.tinker.asking import _read
from bathyscope_workers.adapters.sources._reach import Reach
from bathyscope_workers.adapters.sources._task import Task
from bathyscope_workers.adapters.sources._tinker_sdk import TinkerSdk

KEY = "tml-secret"
URL = "http://127.0.0.1:1"


@pytest.mark.parametrize(
    ("kind", "status", "text", "problem"),
    [
        ("AuthenticationError", 401, "no", errors.TinkerKeyRefused),
        ("TinkerError", None, "The api_key must start with the 'tml-' prefix", errors.TinkerKeyRefused),
        ("APIStatusError", 402, "pay", errors.TinkerBilling),
        ("PermissionDeniedError", 403, f"not with {KEY}", errors.TinkerForbidden),
        ("NotFoundError", 404, "none at https://host/signed?token=1", errors.TinkerNotFound),
        ("APIStatusError", 410, "gone", errors.TinkerNotFound),
        ("RequestFailedError", None, "Request failed with status 404", errors.TinkerNotFound),
        ("BadRequestError", 400, "bad", errors.AdapterSourceMissing),
        ("BadRequestError", 400, "the base model is retired", errors.TinkerBaseRetired),
        ("RateLimitError", 429, "slowly", errors.TinkerRateLimited),
        ("InternalServerError", 500, "oh", errors.TinkerOutOfReach),
        ("APIConnectionError", None, "Connection error.", errors.TinkerOutOfReach),
        ("Surprise", None, "", errors.TinkerOutOfReach),
    ],
)
def test_one_answer_is_one_problem(
    tmp_path: Path, kind: str, status: int | None, text: str, problem: type[errors.ProblemError]
) -> None:
    fault: dict[str, Any] = {"kind": kind, "status": status, "text": text}
    theirs = TinkerSdk(Task(Reach(tinker_url=URL), tmp_path), KEY)._problem(**fault)
    asked = {"base_url": URL, "api_key": KEY, "seconds": 1.0}
    with pytest.raises(errors.ProblemError) as caught:
        _read(json.dumps({"error": fault}).encode(), asked)
    assert type(caught.value) is problem
    assert caught.value.problem() == theirs.problem()
    for secret in (KEY, "token"):
        assert secret not in str(theirs.problem())
