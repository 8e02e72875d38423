"""The OpenAPI document: generated from the wire types, with the request bodies that the service reads itself."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from bathyscope import types

_BODIES = (types.ExtractionRequest, types.LoadRequest, types.PredictRequest, types.ProbeRequest)

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
    "description": "Makes a repeated request return the first one's job. Kept for 24 hours.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255},
}


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
    app.openapi_schema = found
    return found


def _complete(path: str, method: str, operation: dict[str, Any]) -> None:
    if path.startswith("/v1/") or path == "/metrics":
        operation["security"] = [{"key": []}, {}]
        for status, response in list(operation["responses"].items()):
            if status >= "400":  # the framework adds its own form of errors; ours are problem documents
                response["content"].pop("application/json", None)
                if not response["content"]:
                    del operation["responses"][status]
    parameters = operation.setdefault("parameters", [])
    if "requestBody" in operation:
        parameters += [_PREFER, _IDEMPOTENCY_KEY]
    elif path == "/v1/jobs/{job_id}" and method == "get":
        parameters.append(_PREFER)
