"""Reading what jobs made: whose it is, whether it is still there, lists and headers."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from starlette.responses import Response

from bathyscope.errors import Expired, NotFound, RangeUnsatisfiable
from bathyscope_backplane.artifacts import Resource
from bathyscope_backplane.ids import KIND_PREFIX, is_id
from bathyscope_backplane.keys import ApiKey
from bathyscope_service.context import Context
from bathyscope_service.jobs.views import json_response, timing_headers

Piece = TypeVar("Piece")

_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})", re.IGNORECASE)


@contextmanager
def may_be_deleted(resource: Resource) -> Iterator[None]:
    """Around reading a resource's blobs: `NotFound` when they went between the look-up and the reading."""
    try:
        yield
    except FileNotFoundError:
        raise NotFound(f"The {resource.kind} {resource.id} was deleted.") from None


async def begun(stream: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
    """The stream with its first pieces already read, so that a fault there can still be answered with a problem.

    Two, since the first may be a header that was made without the store.
    """
    first: list[Piece] = []
    async for piece in stream:
        first.append(piece)
        if len(first) == 2:
            break

    async def whole() -> AsyncIterator[Piece]:
        for piece in first:
            yield piece
        async for piece in stream:
            yield piece

    return whole()


def byte_range(header: str | None, length: int) -> tuple[int, int, int]:
    """First byte, byte after the last, and status, for one range (RFC 9110); several are answered whole."""
    found = _RANGE.fullmatch(header.strip()) if header is not None else None
    if found is None or not (found[1] or found[2]):
        return 0, length, 200
    if not found[1]:
        start, end = max(0, length - int(found[2])), length
    else:
        start, end = int(found[1]), min(int(found[2] or length - 1) + 1, length)
    if start >= end:
        if found[1] and found[2] and int(found[2]) < int(found[1]):
            return 0, length, 200  # not a range at all
        raise RangeUnsatisfiable(
            f"The representation has {length} bytes; {header} asks for none of them.", length=length
        )
    return start, end, 206


async def resource_of(context: Context, caller: ApiKey, kind: str, resource_id: str) -> Resource:
    """A resource that the caller may see. Raises `NotFound`, also for another's, and `Expired`."""
    missing = NotFound(f"There is no {kind} {resource_id[:80]!r}.")
    if not is_id(resource_id, KIND_PREFIX[kind]):
        raise missing
    catalogue = context.plane.catalogue
    expired = Expired(f"The {kind} {resource_id} has expired; make it anew.")
    if not caller.admin:
        match await catalogue.standing(resource_id, kind, caller.id):
            case "expired":
                raise expired
            case "none":
                raise missing
    resource = await catalogue.get(resource_id)
    if resource is None:
        raise missing if await catalogue.tombstone(resource_id) is None else expired
    return resource


async def resource_list(context: Context, caller: ApiKey, kind: str, limit: int, cursor: str | None) -> Response:
    """One page of one's own resources of a kind, newest first."""
    found, next_cursor = await context.plane.catalogue.list(
        kind, None if caller.admin else caller.id, limit=limit, cursor=cursor
    )
    return json_response({"data": [resource.body for resource in found], "next_cursor": next_cursor})


def resource_response(resource: Resource) -> Response:
    """A resource as an answer, with its timings."""
    return json_response(resource.body, headers=result_headers(resource))


def result_headers(resource: Resource) -> dict[str, str]:
    """Timings and tokens of the job that made a resource."""
    tokens: Any = resource.body.get("tokens")
    return timing_headers(resource.private.get("timings", {}), tokens.get("total") if tokens else None)
