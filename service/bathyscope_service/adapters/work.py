"""From a valid request for an adapter to its job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bathyscope.errors import FieldError, InvalidRequest, ModelUnknown, StateConflict
from bathyscope.types import AdapterFields, AdapterRequest
from bathyscope_backplane.adapter_sources import FolderSource, parse_source
from bathyscope_backplane.ids import new_id
from bathyscope_backplane.keys import ApiKey
from bathyscope_service.adapters.upload import Upload
from bathyscope_service.context import Context
from bathyscope_service.jobs.submission import Work, webhook_of

LANE = "fetch"
"""Where adapters are downloaded and converted, by an engine of its own."""


async def adapter_work(context: Context, caller: ApiKey, body: AdapterFields, upload: Upload | None = None) -> Work:
    """The job of a request. Raises what the front end can tell."""
    webhook = webhook_of(context, body)
    source = body.source if isinstance(body, AdapterRequest) else None
    if source is not None and isinstance(parse_source(source), FolderSource):
        _require_import_dir(context.plane.settings.adapters.import_dir)
    if body.base_model is not None:
        try:
            await context.plane.workers.entry(context.plane.registry, body.base_model)
        except ModelUnknown as error:
            error.errors = [FieldError(pointer="/base_model", detail="name a model of GET /v1/models")]
            raise
    archive_sha256 = upload.sha256 if upload is not None else None
    await _check_name(context, caller, body.name, source, archive_sha256)
    spec: dict[str, Any] = {
        "source": source,
        "base_model": body.base_model,
        "name": body.name,
        "metadata": body.metadata,
        "archive_sha256": archive_sha256,
    }
    summary = body.model_dump(exclude={"webhook"}, exclude_defaults=True)
    return Work(
        kind="adapter",
        lane=LANE,
        spec=spec,
        archive=upload.path if upload is not None else None,
        request=summary if upload is None else {**summary, "file": {"bytes": upload.bytes, "sha256": upload.sha256}},
        resource_id=new_id("ad"),
        priority=body.priority,
        webhook=webhook,
        bytes=upload.bytes if upload is not None else 0,
    )


async def _check_name(
    context: Context, caller: ApiKey, name: str | None, source: str | None, archive_sha256: str | None
) -> None:
    """Raise `StateConflict` for a name that another adapter has; of the same source it may turn out to be the same."""
    catalogue = context.plane.catalogue
    holder = await catalogue.shelf.with_name(caller.id, name) if name is not None else None
    other = await catalogue.get(holder.id) if holder is not None else None
    if other is None:
        return
    same = (
        other.body["source"] == source if source is not None else other.private.get("archive_sha256") == archive_sha256
    )
    if not same:
        raise StateConflict(
            f"Your adapter {other.id} is called {name!r}; choose another name, or delete that one.",
            errors=[FieldError(pointer="/name", detail="unique among one's adapters")],
        )


def _require_import_dir(folder: Path | None) -> None:
    if folder is None:
        raise InvalidRequest(
            "This service imports nothing from its own disk; upload the adapter instead, or let the operator set "
            "adapters.import_dir.",
            errors=[FieldError(pointer="/source", detail="file:// needs an import folder, which is not set up here")],
        )
