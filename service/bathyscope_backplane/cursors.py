"""List cursors: where the next page begins, wrapped so that nobody builds on its form."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import TypeVar

from bathyscope.errors import FieldError, InvalidRequest

T = TypeVar("T")


def wrap(text: str) -> str:
    """The cursor that stands for a text."""
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def unwrap(cursor: str, read: Callable[[str], T]) -> T:
    """What `read` makes of the text in a cursor.

    Raises `InvalidRequest` for what is no cursor, or where `read` raises `ValueError`.
    """
    try:
        return read(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode())
    except ValueError:
        raise InvalidRequest(
            "The cursor is not one that this list gave.",
            errors=[FieldError(pointer="/cursor", detail="take next_cursor from the page before")],
        ) from None
