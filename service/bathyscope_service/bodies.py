"""Reading a request's body: bounded, decompressed, strictly parsed, and described in the OpenAPI document.

The limit counts decompressed bytes while they arrive, so neither a chunked body nor a compressed one passes it.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import re
import zlib
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import orjson
from fastapi import Request
from pydantic import ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect

from bathyscope.errors import FieldError, InvalidRequest, MalformedBody, RequestTimeout, TooLarge, UnsupportedMedia
from bathyscope.types import RequestModel
from bathyscope_backplane.settings import Limits
from bathyscope_service.context import Held, Memory, context_of
from bathyscope_service.extractions.checks import refuse_rows
from bathyscope_service.problems import pointer

Body = TypeVar("Body", bound=RequestModel)

_MAX_ERRORS = 50
MAX_DEPTH = 201
"""Levels of lists and objects within each other, the bound of pydantic's parser."""

_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_NEIGHBOURS = 64
"""Items after the first faulty one of a list that are looked at too, for the report."""


def json_body(model: type[Body]) -> Callable[[Request, Memory], Awaitable[Body]]:
    """A dependency that reads and validates a JSON body.

    Its digest is left in `request.state.body_digest`, its size in `request.state.body_bytes`.

    Raises 415, 408, 413, 400 and 422 problems, the last with a pointer for each faulty member.
    """

    async def read(request: Request, memory: Held) -> Body:
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            raise UnsupportedMedia(
                f"The body's type is {media_type or 'missing'!r}; send JSON with Content-Type: application/json."
            )
        context = context_of(request)
        limits = context.plane.settings.limits
        data = await read_bounded(request, limits, memory)
        body, digest = await context.apart(len(data), parse, model, data, limits)
        request.state.body_digest, request.state.body_bytes = digest, len(data)
        return body

    return read


def parse(model: type[Body], data: bytes, limits: Limits) -> tuple[Body, str]:
    """The body that the JSON says, and the digest of its content. Raises 400, 413 and 422 problems."""
    content = content_of(data, limits)
    if isinstance(content, dict):
        nested = content.get("data")
        for holder in (content, nested if isinstance(nested, dict) else {}):
            if isinstance(rows := holder.get("inputs"), list):
                refuse_rows(len(rows), limits.max_rows)
    digest = digest_of(content)
    try:
        return model.model_validate(content), digest
    except ValidationError as error:
        raise invalid(model, error, content) from None


def content_of(data: bytes, limits: Limits) -> Any:
    """What the JSON says. Raises 400, 413 and 422 problems."""
    _refuse_values(data, limits.max_values)
    try:
        return from_json(data, allow_inf_nan=False)
    except ValueError as error:
        if "recursion limit" in str(error):
            raise MalformedBody(f"The body is nested more than {MAX_DEPTH} deep.", limit=MAX_DEPTH) from None
        _refuse_constants(data)
        raise MalformedBody(f"The body is not valid JSON: {error}.") from None


def digest_of(content: Any) -> str:
    """The SHA-256 of what JSON or YAML said, in hex, whatever the order of its keys. Raises `InvalidRequest`."""
    try:
        return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()
    except TypeError:  # of what JSON can say, orjson refuses only wide numbers
        refuse_wide(content)
        raise


def refuse_wide(content: Any) -> None:
    """Raise `InvalidRequest` for the first whole number of more than 64 bits: it could not be kept."""
    for way in _ways(content, _wide):
        detail = "a whole number has 64 bits at most"
        raise InvalidRequest(
            "A number of the request is too large.", errors=[FieldError(pointer=pointer(way), detail=detail)]
        ) from None


def _refuse_values(data: bytes, limit: int) -> None:
    """Raise `TooLarge` for a body of so many values that they would take many times its size in memory."""
    if data.count(b",") + data.count(b"[") + data.count(b"{") < limit:
        return
    bare = _STRING.sub(b"", data)  # texts hold commas and brackets too
    values = bare.count(b",") + bare.count(b"[") + bare.count(b"{")
    if values >= limit:
        raise TooLarge(
            f"The body holds about {values:,} JSON values and the limit is {limit:,}; split it over several requests.",
            estimate=values,
            limit=limit,
        )


def _refuse_constants(data: bytes) -> None:
    """Raise `InvalidRequest` for a body that would be JSON but for `NaN`, `Infinity` and `-Infinity`."""
    try:
        content = from_json(data)
    except ValueError:
        return
    ways = list(islice(_ways(content, _no_number), _MAX_ERRORS))
    if ways:
        detail = "JSON has no NaN and no Infinity: give a number, or leave it out"
        raise InvalidRequest(
            "The body holds numbers that JSON does not have.",
            errors=[FieldError(pointer=pointer(way), detail=detail) for way in ways],
        )


def _no_number(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _wide(value: Any) -> bool:
    """Whether it is a whole number of more than 64 bits."""
    return isinstance(value, int) and not -(2**63) <= value < 2**64


def _ways(content: Any, faulty: Callable[[Any], bool]) -> Iterator[tuple[Any, ...]]:
    """The ways to values that are `faulty`, in the order of the body."""
    if faulty(content):
        yield ()
    members: Iterable[tuple[Any, Any]] = ()
    if isinstance(content, dict):
        members = content.items()
    elif isinstance(content, list):
        members = enumerate(content)
    for part, member in members:
        for way in _ways(member, faulty):
            yield (part, *way)


async def read_bounded(request: Request, limits: Limits, memory: Memory) -> bytes:
    """The body, decompressed, held in `memory`. Raises `TooLarge` as soon as the limit is passed."""
    limit, seconds = limits.max_body_bytes, limits.body_seconds
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "", "gzip", "deflate"):
        raise UnsupportedMedia(f"The body's encoding {encoding[:40]!r} is not read here; use gzip, deflate or none.")
    declared = request.headers.get("content-length", "")
    if encoding in ("identity", "") and declared.isdigit() and int(declared[:20]) > limit:
        raise _too_large(limit, int(declared[:20]))
    inflate = None if encoding in ("identity", "") else zlib.decompressobj(zlib.MAX_WBITS | 32)
    found = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                before = len(found)
                if inflate is None:
                    found += chunk
                else:
                    found += inflate.decompress(chunk, limit + 1 - len(found))
                    if inflate.unused_data:  # whatever comes after the end is kept there, without a bound
                        raise MalformedBody(f"The body goes on after the end of its {encoding} data.")
                if len(found) > limit or (inflate is not None and inflate.unconsumed_tail):
                    raise _too_large(limit, max(len(found), limit + 1))
                memory.hold(len(found) - before)
    except TimeoutError:
        raise RequestTimeout(f"The body did not arrive within {seconds:g} seconds.", limit=seconds) from None
    except ClientDisconnect:
        raise MalformedBody("The connection was closed before the body had arrived.") from None
    except zlib.error as error:
        raise MalformedBody(f"The body is not valid {encoding}: {error}.") from None
    if inflate is not None and not inflate.eof:
        raise MalformedBody(f"The body's {encoding} data ends too early.")
    return bytes(found)


def _too_large(limit: int, size: int) -> TooLarge:
    return TooLarge(
        f"The body has {size:,} bytes or more after decompression and the limit is {limit:,}; send fewer inputs in one "
        "request.",
        estimate=size,
        limit=limit,
    )


def invalid(model: type[RequestModel], error: ValidationError, content: Any) -> InvalidRequest:
    """The faults of a body as a 422 problem, one entry for each faulty member.

    Long lists are validated up to their first faulty item; some of those that follow it are looked at here.
    """
    faults = _faults(error, content)
    first: dict[tuple[Any, ...], int] = {}
    for way, _ in faults:
        depth = next((depth for depth, part in enumerate(way) if isinstance(part, int)), None)
        if depth is not None:
            first.setdefault(tuple(way[:depth]), way[depth])
    for list_way, place in first.items():
        faults += _neighbours(model, content, list_way, place)
    found: dict[str, list[str]] = {}
    for way, message in faults:
        messages = found.setdefault(pointer(way), [])
        if message not in messages:
            messages.append(message)
    entries = [FieldError(pointer=where, detail="; or ".join(said)) for where, said in found.items()]
    return InvalidRequest(
        f"{len(entries)} field{'s' if len(entries) > 1 else ''} of the request are not valid."
        if len(entries) > 1
        else "A field of the request is not valid.",
        errors=entries[:_MAX_ERRORS],
    )


def _faults(error: ValidationError, content: Any) -> list[tuple[list[Any], str]]:
    """The way into the body and the words of each fault."""
    found, words = [], []
    for fault in error.errors(include_url=False)[: 4 * _MAX_ERRORS]:
        message = fault["msg"].removeprefix("Value error, ")
        way = _location(fault["loc"], content, missing=fault["type"] == "missing")
        if fault["type"] == "extra_forbidden":
            message = "this field is not known"
        elif fault["input"] is None and way and isinstance(way[-1], int):
            message = "it is null: give a value, or leave it out"
        found.append((way, message))
        if fault["type"] == "literal_error" and isinstance(fault["input"], list):
            words.append(found[-1])
    # A list that may also be a word is faulty in its items, and not for being no word.
    return [one for one in found if one not in words or not any(_below(way, one[0]) for way, _ in found)]


def _below(way: Sequence[Any], list_way: Sequence[Any]) -> bool:
    return len(way) > len(list_way) and list(way[: len(list_way)]) == list(list_way)


def _neighbours(
    model: type[RequestModel], content: Any, way: tuple[Any, ...], first: int
) -> list[tuple[list[Any], str]]:
    """The faults of the items after the `first` faulty one of the list at `way`, each validated by itself."""
    items = content
    for part in way:
        items = items[part]
    found: list[tuple[list[Any], str]] = []
    for place in range(first + 1, min(first + 1 + _NEIGHBOURS, len(items))):
        alone: Any = [items[place]]
        for part in reversed(way):
            alone = {part: alone}
        try:
            model.model_validate(alone)
        except ValidationError as error:
            here = [fault for fault in _faults(error, alone) if tuple(fault[0][: len(way) + 1]) == (*way, 0)]
            found += [([*way, place, *inner[len(way) + 1 :]], message) for inner, message in here]
        if len(found) >= 4 * _MAX_ERRORS:
            break
    return found


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
