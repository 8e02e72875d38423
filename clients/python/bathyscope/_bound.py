"""Objects that can ask the service further."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, PrivateAttr

from bathyscope._connection import AsyncConnection, Connection

M = TypeVar("M", bound=BaseModel)


class Bound(BaseModel):
    """An object that knows the connection it came from."""

    _connection: Any = PrivateAttr()


def bind(thing: M, connection: Connection | AsyncConnection) -> M:
    """`thing`, with the connection it came from where it has use for one."""
    if isinstance(thing, Bound):
        thing._connection = connection
    return thing
