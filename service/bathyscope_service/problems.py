"""Problems as answers (RFC 9457), and as part of the OpenAPI document."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import orjson
import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from bathyscope import errors
from bathyscope.errors import FieldError, ProblemError
from bathyscope_service.observe import HEADER, request_id

MEDIA_TYPE = "application/problem+json"

_log = structlog.get_logger(__name__)

_OF_STATUS: dict[int, type[ProblemError]] = {
    400: errors.MalformedBody,
    401: errors.Unauthorized,
    403: errors.Forbidden,
    404: errors.NotFound,
    405: errors.MethodNotAllowed,
    406: errors.NotAcceptable,
    413: errors.TooLarge,
    415: errors.UnsupportedMedia,
    422: errors.InvalidRequest,
    503: errors.Unavailable,
}


def problem_response(error: ProblemError, path: str) -> Response:
    """A problem as an HTTP answer."""
    document = {**error.problem(), "instance": error.instance or path}
    headers = {"Cache-Control": "no-store"}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, round(error.retry_after)))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, errors.RangeUnsatisfiable) and "length" in error.extra:
        headers["Content-Range"] = f"bytes */{error.extra['length']}"
    if isinstance(error, errors.MethodNotAllowed) and "allow" in error.extra:
        headers["Allow"] = document.pop("allow")
    return Response(orjson.dumps(document), error.status, headers, MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Answer every error of the app with a problem document."""

    @app.exception_handler(ProblemError)
    async def _problem(request: Request, error: ProblemError) -> Response:
        return problem_response(error, _path(request))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        kind = _OF_STATUS.get(error.status_code, ProblemError)
        details = {
            404: f"There is nothing at {_path(request)[:200]}; the routes are listed at /docs.",
            405: f"{request.method} is not offered at {_path(request)[:200]}.",
        }
        problem = kind(details.get(error.status_code, str(error.detail)))
        problem.status = error.status_code
        if error.status_code == 405:  # the framework names the methods of the first route of that path only
            found = methods_at(request.app.openapi()["paths"], _path(request))
            problem.extra["allow"] = ", ".join(found) or (error.headers or {}).get("Allow", "GET, HEAD")
        return problem_response(problem, _path(request))

    @app.exception_handler(RequestValidationError)
    async def _validation(request: Request, error: RequestValidationError) -> Response:
        found = [
            FieldError(pointer=pointer(list(fault["loc"][1:])), detail=str(fault["msg"])) for fault in error.errors()
        ]
        return problem_response(
            errors.InvalidRequest("A parameter of the request is not valid.", errors=found), _path(request)
        )

    @app.exception_handler(Exception)
    async def _fault(request: Request, error: Exception) -> Response:
        _log.error("request.fault", exc_info=error)
        answer = problem_response(
            errors.InternalError("A fault of the service; it was logged and can be reported."), _path(request)
        )
        answer.headers[HEADER] = request_id() or ""  # this is sent from outside of the middleware that adds it
        return answer


def methods_at(paths: dict[str, Any], path: str) -> list[str]:
    """The methods that the OpenAPI document's `paths` have at a path, by the template that says most about it."""
    best: tuple[int, str] | None = None
    for template in paths:
        parts = re.split(r"\{(\w+)\}", template)
        # A model's name may hold slashes; other parameters are one segment.
        pattern = "".join(
            re.escape(part) if number % 2 == 0 else ".+" if part == "name" else "[^/]+"
            for number, part in enumerate(parts)
        )
        if re.fullmatch(pattern, path, re.DOTALL):
            best = max(best or (-1, ""), (sum(map(len, parts[::2])), template))
    found = {method.upper() for method in paths[best[1]]} if best is not None else set()
    return sorted(found | {"HEAD"} if "GET" in found else found)


def _path(request: Request) -> str:
    path: str = request.scope["path"]  # request.url would be read with the Host header, which may be anything
    return path


@contextmanager
def pointing(prefix: str | None) -> Iterator[None]:
    """Around a check of a part of the body: its problems' pointers begin with `prefix`; null when it is no part."""
    try:
        yield
    except ProblemError as error:
        error.errors = [
            FieldError(pointer=prefix + fault["pointer"], detail=fault["detail"])
            for fault in error.errors
            if prefix is not None
        ]
        raise


def pointer(location: Sequence[Any]) -> str:
    """An RFC 6901 JSON pointer."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in location)


def responses(
    *problems: type[ProblemError],
    everywhere: Sequence[type[ProblemError]] = (
        errors.Unauthorized,
        errors.Forbidden,
        errors.Unavailable,
        errors.OutOfSpace,
    ),
) -> dict[int | str, dict[str, Any]]:
    """The error answers of an operation for its OpenAPI entry, those of every operation included."""
    found: dict[int | str, dict[str, Any]] = {}
    kinds: set[type[ProblemError]] = {*problems, *everywhere}
    for problem in sorted(kinds, key=lambda kind: (kind.status, kind.slug)):
        example = {
            "type": f"/problems/{problem.slug}",
            "title": problem.title,
            "status": problem.status,
            "detail": (problem.__doc__ or "").strip(),
            "instance": "/v1/…",
        }
        entry = found.setdefault(
            problem.status,
            {
                "description": "",
                "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}, "examples": {}}},
            },
        )
        entry["content"][MEDIA_TYPE]["examples"][problem.slug] = {"value": example}
        entry["description"] = (entry["description"] + " " + f"`{problem.slug}`: {example['detail']}").strip()
    return found
