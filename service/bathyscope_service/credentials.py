"""Credentials that come with a request, to be sealed for its job."""

from __future__ import annotations

import re

from fastapi import Request

from bathyscope.errors import InvalidRequest
from bathyscope_backplane.vault import Credentials

HEADERS = {"tinker_api_key": "X-Tinker-Api-Key", "hf_token": "X-HF-Token"}
"""The header of each field of `Credentials`."""

MOST_CHARACTERS = 1024

_VALUE = re.compile(rf"[!-~]{{1,{MOST_CHARACTERS}}}")


def credentials_of(request: Request) -> Credentials:
    """What the request's headers give. Raises `InvalidRequest`, which repeats no value."""
    given: dict[str, str] = {}
    for name, header in HEADERS.items():
        values = request.headers.getlist(header)
        if len(values) > 1 or (values and _VALUE.fullmatch(values[0]) is None):
            raise InvalidRequest(
                f"The header {header} is not a credential: send it once, with 1 to {MOST_CHARACTERS} printable "
                "characters of ASCII and no space."
            )
        if values:
            given[name] = values[0]
    return Credentials(**given)
