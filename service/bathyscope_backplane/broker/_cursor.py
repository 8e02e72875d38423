"""List cursors: the id after which a page begins, wrapped so that nobody builds on its form."""

from __future__ import annotations

import base64
import binascii
import re

from bathyscope.errors import FieldError, InvalidRequest
from bathyscope_backplane import cursors

_FORM = re.compile(r"1:([A-Za-z0-9_.-]{1,128})")


def wrap(last_id: str) -> str:
    """The cursor of the page after `last_id`."""
    return cursors.wrap(f"1:{last_id}")


def unwrap(cursor: str) -> str:
    """The id in a cursor. Raises `InvalidRequest` for anything that `wrap` did not make."""
    try:
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode()
    except (binascii.Error, UnicodeError, ValueError):
        text = ""
    found = _FORM.fullmatch(text)
    if found is None or wrap(found[1]) != cursor:
        raise InvalidRequest(
            "The cursor is not one of this service; begin again without it.",
            errors=[FieldError(pointer="/cursor", detail="Use next_cursor of the page before, unchanged.")],
        )
    return found[1]
