"""Times as the contract writes them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import overload


@overload
def rfc3339(milliseconds: int) -> str: ...


@overload
def rfc3339(milliseconds: int | None) -> str | None: ...


def rfc3339(milliseconds: int | None) -> str | None:
    """A Unix time in ms as RFC 3339 in UTC, null when there is none."""
    if milliseconds is None:
        return None
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
