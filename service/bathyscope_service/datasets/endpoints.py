"""`/v1/datasets`."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import ValidationError
from starlette.responses import Response

from bathyscope import errors
from bathyscope.types import Dataset, DatasetFields, DatasetRow, Page
from bathyscope_backplane.artifacts import Resource
from bathyscope_backplane.cursors import unwrap, wrap
from bathyscope_backplane.datasets.stored import GROUP_BYTES, read_rows
from bathyscope_backplane.ids import new_id
from bathyscope_backplane.keys import ApiKey
from bathyscope_backplane.times import rfc3339
from bathyscope_service.adapters.upload import place_for_upload, places_for, read_upload
from bathyscope_service.auditing import concerns
from bathyscope_service.bodies import invalid
from bathyscope_service.context import Caller, Context, Ctx, Held
from bathyscope_service.datasets.once import Once
from bathyscope_service.datasets.rows import Summary, take_rows
from bathyscope_service.jobs.submission import idempotency_of
from bathyscope_service.jobs.views import json_response
from bathyscope_service.problems import responses
from bathyscope_service.resources import may_be_deleted, resource_list, resource_of, resource_response

router = APIRouter(prefix="/v1/datasets", tags=["datasets"])

FIELDS = ("format", "name", "metadata", "columns")
_SUMMARY = ("rows", "columns", "labels", "groups", "splits", "questions", "sha256")
_WORK_BYTES = 4 * GROUP_BYTES
"""Memory that it takes to go through a dataset: one piece of it, as it is and as rows."""

_READ = responses(errors.NotFound, errors.Expired, errors.InvalidRequest)
_ROWS = responses(errors.NotFound, errors.Expired, errors.InvalidRequest, errors.QuotaExceeded)
_SCHEMA = {
    "type": "object",
    "required": ["file", "format"],
    "additionalProperties": False,
    "properties": {
        "file": {"type": "string", "format": "binary", "description": "The rows."},
        **{
            name: {"type": "string", "description": DatasetFields.model_fields[name].description or ""}
            for name in FIELDS
        },
    },
}


@router.post(
    "",
    summary="Add a dataset",
    status_code=201,
    response_model=Dataset,
    openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _SCHEMA}}}},
    responses=responses(
        errors.MalformedBody,
        errors.RequestTimeout,
        errors.TooLarge,
        errors.UnsupportedMedia,
        errors.InvalidRequest,
        errors.IdempotencyMismatch,
        errors.StateConflict,
        errors.QuotaExceeded,
    ),
)
async def create_dataset(request: Request, context: Ctx, caller: Caller, memory: Held) -> Response:
    """Upload rows as `file`: JSONL, CSV or Parquet. Each is checked; where one is faulty nothing is kept.

    `metadata` and `columns` are JSON objects, as texts. The same rows sent again make another dataset, but for the same
    Idempotency-Key.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        raise errors.UnsupportedMedia("A dataset is uploaded as multipart/form-data, its rows in the part `file`.")
    plane = context.plane
    await plane.space.require()
    limits = plane.settings.limits
    folder = plane.settings.data_dir / "uploads"
    with places_for(context.uploads, caller.id), place_for_upload(folder) as (file, path):
        upload = await read_upload(
            request, limits, file, path, names=FIELDS, most=limits.max_dataset_bytes, what="file of rows"
        )
        content = upload.content("metadata", "columns")
        try:
            fields = DatasetFields.model_validate(content)
        except ValidationError as error:
            raise invalid(DatasetFields, error, content) from None
        request.state.body_digest, request.state.body_bytes = upload.digest, upload.bytes
        memory.hold(_WORK_BYTES)
        with place_for_upload(folder) as (_, target):
            async with context.heavy:
                summary = await asyncio.to_thread(
                    take_rows,
                    path,
                    fields.format,
                    target,
                    columns=fields.columns or {},
                    max_rows=limits.max_rows,
                    max_bytes=limits.max_dataset_bytes,
                )
            size = target.stat().st_size
            await plane.space.require()
            once = Once(plane, idempotency_of(request, caller))
            earlier = await once.earlier()
            if earlier is None:
                try:
                    await _room(context, caller, size)
                    resource = await _kept(context, caller, once.id, fields, summary, target)
                except errors.Unavailable:
                    raise  # whether it is there is not known
                except errors.ProblemError:
                    await once.refused()
                    raise
                await once.made()
            else:
                resource = earlier
    concerns(request, resource.id)
    headers = {"Location": f"/v1/datasets/{resource.id}"}
    if earlier is not None:
        headers["Idempotent-Replayed"] = "true"
    return json_response(resource.body, 201, headers)


async def _kept(
    context: Context, caller: ApiKey, dataset_id: str, fields: DatasetFields, summary: Summary, target: Path
) -> Resource:
    now, plane = int(time.time() * 1000), context.plane
    blob = await plane.store.put_file(f"blobs/{dataset_id}/rows.parquet", target)
    body: dict[str, Any] = {
        "id": dataset_id,
        "name": fields.name,
        "format": fields.format,
        **{name: getattr(summary, name) for name in _SUMMARY},
        "bytes": blob.bytes,
        "metadata": fields.metadata,
        "created_at": rfc3339(now),
    }
    private = {"characters": summary.characters}
    made = Resource(dataset_id, "dataset", caller.id, new_id("job"), now, None, body, {"rows": blob}, private)
    return await plane.catalogue.commit(made)


async def _room(context: Context, caller: ApiKey, size: int) -> None:
    """Raise `QuotaExceeded` where the key may not store so much."""
    most = caller.quota.max_bytes
    if most is not None:
        used = await context.plane.catalogue.bytes_stored(caller.id)
        if used + size > most:
            raise errors.QuotaExceeded(
                f"This key has stored {used:,} bytes and may store {most:,}; this dataset takes {size:,}: delete what "
                "is not needed.",
                quota="bytes",
                used=used,
                estimate=size,
                limit=most,
            )


@router.get("", summary="List datasets", response_model=Page[Dataset], responses=responses(errors.InvalidRequest))
async def list_datasets(
    context: Ctx,
    caller: Caller,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[str | None, Query(max_length=200)] = None,
) -> Response:
    """One's own datasets, newest first; an admin key sees all."""
    return await resource_list(context, caller, "dataset", limit, cursor)


@router.get("/{dataset_id}", summary="Read a dataset", response_model=Dataset, responses=_READ)
async def get_dataset(dataset_id: str, context: Ctx, caller: Caller) -> Response:
    """How many rows it has, their labels, groups and splits."""
    return resource_response(await resource_of(context, caller, "dataset", dataset_id))


@router.get("/{dataset_id}/rows", summary="Read rows", response_model=Page[DatasetRow], responses=_ROWS)
async def get_rows(
    dataset_id: str,
    context: Ctx,
    caller: Caller,
    memory: Held,
    limit: Annotated[int, Query(ge=1, le=200)] = 20,
    cursor: Annotated[str | None, Query(max_length=200)] = None,
) -> Response:
    """Rows in the order of the file."""
    resource = await resource_of(context, caller, "dataset", dataset_id)
    start = unwrap(cursor, _place) if cursor is not None else 0
    memory.hold(_WORK_BYTES)
    with may_be_deleted(resource):
        rows = await read_rows(context.plane.store, resource, start, start + limit)
    end = start + len(rows)
    following = wrap(str(end)) if rows and end < resource.body["rows"] else None
    return json_response({"data": rows, "next_cursor": following})


def _place(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ValueError(text)
    return int(text)


@router.delete("/{dataset_id}", summary="Delete a dataset", status_code=204, responses=_READ)
async def delete_dataset(dataset_id: str, context: Ctx, caller: Caller) -> Response:
    """Remove the dataset. What was made with it stays."""
    await context.plane.catalogue.delete(await resource_of(context, caller, "dataset", dataset_id))
    return Response(status_code=204)
