"""Reading a request's body: bounded, decompressed, strictly parsed, and described in the OpenAPI document.

The limit counts decompressed bytes while they arrive, so neither a chunked body nor a compressed one passes it.
"""

from __future__ import annotations

import asyncio
import hashlib
import zlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import orjson
from fastapi import Request
from pydantic import ValidationError
from pydantic_core import from_json

from bathyscope.errors import FieldError, InvalidRequest, MalformedBody, RequestTimeout, TooLarge, UnsupportedMedia
from bathyscope.types import RequestModel
from bathyscope_service.context import get_context
from bathyscope_service.problems import pointer

Body = TypeVar("Body", bound=RequestModel)

_READ_SECONDS = 120.0
_MAX_ERRORS = 50


def json_body(model: type[Body]) -> Callable[[Request], Awaitable[Body]]:
    """A dependency that reads and validates a JSON body. Its digest is left in `request.state.body_digest`.

    Raises 415, 408, 413, 400 and 422 problems, the last with a pointer for each faulty member.
    """

    async def read(request: Request) -> Body:
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            raise UnsupportedMedia(
                f"The body's type is {media_type or 'missing'!r}; send JSON with Content-Type: application/json."
            )
        data = await read_bounded(request, get_context(request).plane.settings.limits.max_body_bytes)
        try:
            content = from_json(data, allow_inf_nan=False)
        except ValueError as error:
            raise MalformedBody(f"The body is not valid JSON: {error}.") from None
        del data
        request.state.body_digest = hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()
        try:
            return model.model_validate(content)
        except ValidationError as error:
            raise invalid(error, content) from None

    return read


async def read_bounded(request: Request, limit: int) -> bytes:
    """The body, decompressed. Raises `TooLarge` as soon as the limit is passed."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "", "gzip", "deflate"):
        raise UnsupportedMedia(f"The body's encoding {encoding[:40]!r} is not read here; use gzip, deflate or none.")
    declared = request.headers.get("content-length", "")
    if encoding in ("identity", "") and declared.isdigit() and int(declared[:20]) > limit:
        raise _too_large(limit)
    inflate = None if encoding in ("identity", "") else zlib.decompressobj(zlib.MAX_WBITS | 32)
    found = bytearray()
    try:
        async with asyncio.timeout(_READ_SECONDS):
            async for chunk in request.stream():
                if inflate is None:
                    found += chunk
                else:
                    found += inflate.decompress(chunk, limit + 1 - len(found))
                if len(found) > limit or (inflate is not None and inflate.unconsumed_tail):
                    raise _too_large(limit)
    except TimeoutError:
        raise RequestTimeout(f"The body did not arrive within {_READ_SECONDS:.0f} seconds.") from None
    except zlib.error as error:
        raise MalformedBody(f"The body is not valid {encoding}: {error}.") from None
    if inflate is not None and not inflate.eof:
        raise MalformedBody(f"The body's {encoding} data ends too early.")
    return bytes(found)


def _too_large(limit: int) -> TooLarge:
    return TooLarge(
        f"The body is larger than {limit:,} bytes after decompression; send fewer inputs in one request.", limit=limit
    )


def invalid(error: ValidationError, content: Any) -> InvalidRequest:
    """The faults of a body as a 422 problem, one entry for each faulty member."""
    found: dict[str, list[str]] = {}
    for fault in error.errors(include_url=False, include_input=False)[: 4 * _MAX_ERRORS]:
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            message = "this field is not known"
        messages = found.setdefault(pointer(_location(fault["loc"], content, missing=fault["type"] == "missing")), [])
        if message not in messages:
            messages.append(message)
    entries = [FieldError(pointer=where, detail="; or ".join(said)) for where, said in found.items()]
    return InvalidRequest(
        f"{len(entries)} field{'s' if len(entries) > 1 else ''} of the request are not valid."
        if len(entries) > 1
        else "A field of the request is not valid.",
        errors=entries[:_MAX_ERRORS],
    )


def _location(location: Sequence[Any], content: Any, *, missing: bool) -> list[Any]:
    """The part of pydantic's location that is a way into the body: names of union members are left out."""
    way: list[Any] = []
    for number, part in enumerate(location):
        inside = (
            isinstance(part, int) and part < len(content)
            if isinstance(content, list)
            else (isinstance(content, dict) and part in content)
        )
        if inside:
            content = content[part]
        elif not (missing and number == len(location) - 1):
            continue
        way.append(part)
    return way


def describes(model: type[RequestModel], example: dict[str, Any]) -> dict[str, Any]:
    """The `openapi_extra` of an operation whose body `json_body(model)` reads."""
    return {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {"$ref": f"#/components/schemas/{model.__name__}"},
                    "example": example,
                }
            },
        }
    }
