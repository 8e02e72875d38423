"""The OpenAPI document: generated from the wire types, with the request bodies that the service reads itself."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from bathyscope import errors, types
from bathyscope_service.credentials import HEADERS, MOST_CHARACTERS
from bathyscope_service.links import add_links
from bathyscope_service.problems import responses

_BODIES = (
    types.AdapterRequest,
    types.ComparisonRequest,
    types.ExperimentConfig,
    types.ExtractionRequest,
    types.LoadRequest,
    types.PredictRequest,
    types.ProbeRequest,
)

_PREFER = {
    "name": "Prefer",
    "in": "header",
    "required": False,
    "description": "`wait=N` holds the answer until the job ends, at most N (60) seconds.",
    "schema": {"type": "string", "example": "wait=10"},
}
_IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "Makes a repeated request return what the first one made. Kept for 24 hours.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255},
}


_OF_THE_WIRE = (errors.MalformedRequest, errors.RequestTimeout, errors.UrlTooLong, errors.HeadersTooLarge)
"""What may answer any request before it is looked at."""


def _header(description: str, *, required: bool = False, **schema: Any) -> dict[str, Any]:
    return {"description": description, "required": required, "schema": {"type": "string", **schema}}


_HEADERS: dict[str, dict[str, Any]] = {
    "202": {
        "Location": _header("Path of the job.", required=True, pattern="^/v1/jobs/job_"),
        "Retry-After": _header("Seconds after which to look again.", pattern="^[0-9]+$"),
        "Preference-Applied": _header("`wait`, where `Prefer: wait=N` was asked for."),
        "Idempotent-Replayed": _header("`true` where an earlier request with this key made the job."),
    },
    "201": {
        "Location": _header("Path of what was made.", required=True, pattern="^/v1/"),
        "Idempotent-Replayed": _header("`true` where an earlier request with this key made it."),
    },
    "401": {"WWW-Authenticate": _header("`Bearer`.", required=True)},
    "416": {"Content-Range": _header("The length: `bytes */N`.", required=True, pattern="^bytes \\*/[0-9]+$")},
    "429": {"Retry-After": _header("Seconds after which to try again.", pattern="^[0-9]+$")},
    "503": {"Retry-After": _header("Seconds after which to try again.", pattern="^[0-9]+$")},
}

_CREDENTIALS = [
    {
        "name": header,
        "in": "header",
        "required": False,
        "description": "A credential for the job alone: kept sealed, and erased when the job ends.",
        "schema": {"type": "string", "minLength": 1, "maxLength": MOST_CHARACTERS, "pattern": "^[!-~]+$"},
    }
    for header in HEADERS.values()
]


def document(app: FastAPI) -> dict[str, Any]:
    """The document of an app, made once."""
    if app.openapi_schema:
        return app.openapi_schema
    found = get_openapi(
        title=app.title, version=app.version, summary=app.summary, description=app.description, routes=app.routes
    )
    _, extra = models_json_schema(
        [*((body, "validation") for body in _BODIES), (types.Problem, "serialization")],
        ref_template="#/components/schemas/{model}",
    )
    components = found.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name, schema in extra.get("$defs", {}).items():
        schemas.setdefault(name, schema)
    schemas.pop("HTTPValidationError", None)
    schemas.pop("ValidationError", None)
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer", "description": "An API key."}}
    for path, operations in found["paths"].items():
        for method, operation in operations.items():
            _complete(path, method, operation)
    add_links(found["paths"])
    app.openapi_schema = found
    return found


def _complete(path: str, method: str, operation: dict[str, Any]) -> None:
    for status, more in responses(*_OF_THE_WIRE, everywhere=(errors.Forbidden, errors.Unavailable)).items():
        _merge(operation["responses"].setdefault(str(status), {"description": "", "content": {}}), more)
    for status, headers in _HEADERS.items():
        if status in operation["responses"] and ("requestBody" in operation or status[0] != "2"):
            operation["responses"][status].setdefault("headers", {}).update(headers)
    if path.startswith("/v1/") or path == "/metrics":
        operation["security"] = [{"key": []}, {}]
        for status, response in list(operation["responses"].items()):
            if status >= "400":  # the framework adds its own form of errors; ours are problem documents
                response["content"].pop("application/json", None)
                if not response["content"]:
                    del operation["responses"][status]
    parameters = operation.setdefault("parameters", [])
    if "requestBody" in operation:
        if "202" in operation["responses"]:
            parameters += [_PREFER, _IDEMPOTENCY_KEY, *_CREDENTIALS]
            operation["responses"]["200"].setdefault("headers", {}).update(_HEADERS["202"])
        else:
            parameters.append(_IDEMPOTENCY_KEY)
    elif path.endswith("/replay"):
        parameters += _CREDENTIALS
    elif path == "/v1/tinker/models":
        parameters += _CREDENTIALS[:1]
    elif path == "/v1/jobs/{job_id}" and method == "get":
        parameters.append(_PREFER)


def _merge(response: dict[str, Any], more: dict[str, Any]) -> None:
    """Add what `more` says to an answer of the same status."""
    if "content" in more:
        content = response.setdefault("content", {})
        for media_type, entry in more["content"].items():
            known = content.setdefault(media_type, {**entry, "examples": {}})
            known.setdefault("examples", {}).update(
                {slug: example for slug, example in entry["examples"].items() if slug not in known["examples"]}
            )
    if more["description"] not in response["description"]:
        response["description"] = f"{response['description']} {more['description']}".strip()
