"""What schemathesis is told of the installation under test: names and ids that exist, so that it gets beyond 404.

Loaded by its command line. Generated data are changed only where they are right already, so that what is meant to be
refused stays wrong.
"""

from __future__ import annotations

import os
from typing import Any

import schemathesis


def _known(name: str, value: Any, prefix: str) -> Any:
    """An id of the seeded installation in the place of a made-up one, for one in two."""
    known = os.environ.get(f"SCHEMA_{name}")
    return known if known and isinstance(value, str) and not value.startswith(prefix) and len(value) % 2 else value


@schemathesis.hook
def map_path_parameters(context: schemathesis.HookContext, path_parameters: dict[str, Any]) -> dict[str, Any]:
    """Ids in paths."""
    assert context.operation is not None
    ids = {"job_id": "job_", "adapter_id": "ad_", "extraction_id": "ext_", "probe_id": "prb_", "dataset_id": "ds_"}
    for parameter, prefix in ids.items():
        if parameter in (path_parameters or {}) and context.operation.method.lower() != "delete":
            path_parameters[parameter] = _known(parameter.upper(), path_parameters[parameter], prefix)
    return path_parameters


@schemathesis.hook
def map_body(context: schemathesis.HookContext, body: Any) -> Any:
    """Models and extractions in bodies, and as many labels as inputs."""
    if not isinstance(body, dict):
        return body
    for part in (body, body.get("data")):
        if isinstance(part, dict) and isinstance(part.get("model"), str) and 0 < len(part["model"]) <= 256:
            part["model"] = "tiny"
    if isinstance(body.get("extraction"), str) and len(body["extraction"]) <= 64:
        body["extraction"] = _known("EXTRACTION_ID", body["extraction"], "ext_")
        labels = body.get("labels")
        if isinstance(labels, list) and labels:
            body["labels"] = (labels * 4)[:4]
    return body
