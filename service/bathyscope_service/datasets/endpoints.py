"""`/v1/datasets`."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Query, Request
from pyarrow import parquet
from pydantic import ValidationError
from starlette.responses import Response

from bathyscope import errors
from bathyscope.types import Page
from bathyscope.types.datasets import Dataset, DatasetFields, DatasetRow
from bathyscope_backplane.artifacts import Resource
from bathyscope_backplane.ids import new_id
from bathyscope_backplane.times import rfc3339
from bathyscope_service.adapters.upload import place_for_upload, places_for, read_upload
from bathyscope_service.bodies import invalid
from bathyscope_service.context import Caller, Context, Ctx
from bathyscope_service.datasets.rows import take_rows
from bathyscope_service.jobs.views import json_response
from bathyscope_service.problems import responses
from bathyscope_service.resources import may_be_deleted, resource_list, resource_of, resource_response

router = APIRouter(prefix="/v1/datasets", tags=["datasets"])

FIELDS = ("format", "name", "metadata", "columns")
_READ = responses(errors.NotFound, errors.Expired, errors.InvalidRequest)
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
        errors.QuotaExceeded,
    ),
)
async def create_dataset(request: Request, context: Ctx, caller: Caller) -> Response:
    """Upload rows as `file`: JSONL, CSV or Parquet. Each is checked; where one is faulty nothing is kept.

    `metadata` and `columns` are JSON objects, as texts. The same rows sent again make another dataset.
    """
    if "multipart/form-data" not in request.headers.get("content-type", "").lower():
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
            await _room(context, caller, target)
            dataset_id, job, now = new_id("ds"), new_id("job"), int(time.time() * 1000)
            blob = await plane.store.put_file(f"blobs/{dataset_id}/rows.parquet", target)
    body: dict[str, Any] = {
        "id": dataset_id,
        "job": job,
        "name": fields.name,
        "format": fields.format,
        **{name: getattr(summary, name) for name in summary.__slots__},
        "bytes": blob.bytes,
        "metadata": fields.metadata,
        "created_at": rfc3339(now),
    }
    await plane.catalogue.commit(Resource(dataset_id, "dataset", caller.id, job, now, None, body, {"rows": blob}))
    return json_response(body, 201, {"Location": f"/v1/datasets/{dataset_id}"})


async def _room(context: Context, caller: Caller, target: Path) -> None:
    most = caller.quota.max_bytes
    if most is not None:
        used = await context.plane.catalogue.bytes_stored(caller.id)
        if used + target.stat().st_size > most:
            raise errors.QuotaExceeded(
                f"This key may store {most:,} bytes and has {used:,}; delete what is not needed."
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


@router.get("/{dataset_id}/rows", summary="Read rows", response_model=Page[DatasetRow], responses=_READ)
async def get_rows(
    dataset_id: str,
    context: Ctx,
    caller: Caller,
    limit: Annotated[int, Query(ge=1, le=200)] = 20,
    cursor: Annotated[str | None, Query(pattern="^[0-9]{1,9}$")] = None,
) -> Response:
    """Rows in the order of the file."""
    resource = await resource_of(context, caller, "dataset", dataset_id)
    start = int(cursor or 0)
    with may_be_deleted(resource):
        data = await context.plane.store.get(resource.blobs["rows"].key)
    if data is None:
        raise errors.NotFound(f"The dataset {dataset_id} was deleted.")
    async with context.heavy:
        rows = await asyncio.to_thread(_page, data, start, start + limit)
    end = start + len(rows)
    following = str(end) if end < resource.body["rows"] and rows else None
    return json_response({"data": rows, "next_cursor": following})


def _page(data: bytes, start: int, end: int) -> list[dict[str, Any]]:
    import pyarrow as pa

    rows: list[dict[str, Any]] = []
    with parquet.ParquetFile(pa.BufferReader(data)) as file:
        first = 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if first < end and first + count > start:
                low = max(0, start - first)
                part = file.read_row_group(group, use_threads=False).slice(low, min(count, end - first) - low)
                for at, row in enumerate(part.to_pylist(), first + low):
                    values = {name: orjson.loads(text) for name, text in row.items() if text is not None}
                    rows.append({"index": at, "label": None, "group": None, "split": None, **values})
            first += count
    return rows


@router.delete("/{dataset_id}", summary="Delete a dataset", status_code=204, responses=_READ)
async def delete_dataset(dataset_id: str, context: Ctx, caller: Caller) -> Response:
    """Remove the dataset. What was made with it stays."""
    await context.plane.catalogue.delete(await resource_of(context, caller, "dataset", dataset_id))
    return Response(status_code=204)
