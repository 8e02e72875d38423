"""`/v1/adapters`."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import ValidationError
from starlette.responses import Response

from bathyscope import errors
from bathyscope.types import Adapter, AdapterFields, AdapterRequest, Job, Page
from bathyscope_backplane.artifacts._store import CHUNK_BYTES
from bathyscope_service.adapters.archive import Tar
from bathyscope_service.adapters.upload import place_for_upload, places_for, read_upload
from bathyscope_service.adapters.work import adapter_work
from bathyscope_service.bodies import invalid, json_body
from bathyscope_service.context import Caller, Ctx, Held
from bathyscope_service.jobs.submission import answer, submit
from bathyscope_service.problems import responses
from bathyscope_service.resources import (
    begun,
    byte_range,
    may_be_deleted,
    resource_list,
    resource_of,
    resource_response,
    result_headers,
)

router = APIRouter(prefix="/v1/adapters", tags=["adapters"])

_TAR = "application/x-tar"
_BINARY = {"type": "string", "format": "binary"}
_ETAG = {
    "description": "Names this archive.",
    "required": True,
    "schema": {"type": "string", "pattern": '^"[0-9a-f]{40}"$'},
}
_READ_RESPONSES = responses(errors.NotFound, errors.Expired, errors.InvalidRequest)

_read_json = json_body(AdapterRequest)


def _upload_schema() -> dict[str, Any]:
    """The multipart body: the fields of the JSON one, as texts, and the file."""
    described = {
        name: {"type": "string", "description": field.description or ""}
        for name, field in AdapterFields.model_fields.items()
    }
    described["metadata"]["description"] = "A JSON object, as a text."
    file = {"type": "string", "format": "binary", "description": "The archive: tar, tar.gz or zip."}
    return {
        "type": "object",
        "required": ["file"],
        "additionalProperties": False,
        "properties": {**described, "file": file},
    }


@router.post(
    "",
    summary="Add an adapter",
    status_code=202,
    response_model=Job,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {"$ref": "#/components/schemas/AdapterRequest"},
                    "example": {"source": "hf://org/adapter", "base_model": "smollm2", "name": "mine"},
                },
                "multipart/form-data": {"schema": _upload_schema()},
            },
        }
    },
    responses={
        200: {"model": Job, "description": "The finished job, with `Prefer: wait=N`."},
        **responses(
            errors.MalformedBody,
            errors.ModelUnknown,
            errors.RequestTimeout,
            errors.StateConflict,
            errors.TooLarge,
            errors.UnsupportedMedia,
            errors.InvalidRequest,
            errors.IdempotencyMismatch,
            errors.LaneFull,
            errors.QuotaExceeded,
        ),
    },
)
async def create_adapter(request: Request, context: Ctx, caller: Caller, memory: Held) -> Response:
    """Fetch an adapter from a `source`, or take one that is uploaded as `file`, and convert it for its base model.

    The job's `resource` is the adapter. It is there only when it was attached to the base model once; an adapter of
    which any part does not land on the base is refused. Weights that you have already give the adapter that you have.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "multipart/form-data":
        body = await _read_json(request, memory)
        work = await adapter_work(context, caller, body)
        job_id, replayed = await submit(context, request, caller, work)
        return await answer(context, request, caller, work, job_id, replayed)
    settings = context.plane.settings
    await context.plane.space.require()
    with places_for(context.uploads, caller.id), place_for_upload(settings.data_dir / "uploads") as (file, path):
        upload = await read_upload(request, settings.limits, file, path)
        content = upload.content()
        try:
            fields = AdapterFields.model_validate(content)
        except ValidationError as error:
            raise invalid(AdapterFields, error, content) from None
        request.state.body_digest, request.state.body_bytes = upload.digest, upload.bytes
        work = await adapter_work(context, caller, fields, upload)
        job_id, replayed = await submit(context, request, caller, work)
    return await answer(context, request, caller, work, job_id, replayed)


@router.get("", summary="List adapters", response_model=Page[Adapter], responses=responses(errors.InvalidRequest))
async def list_adapters(
    context: Ctx,
    caller: Caller,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[str | None, Query(max_length=200)] = None,
) -> Response:
    """One's own adapters, newest first; an admin key sees all."""
    return await resource_list(context, caller, "adapter", limit, cursor)


@router.get("/{adapter_id}", summary="Read an adapter", response_model=Adapter, responses=_READ_RESPONSES)
async def get_adapter(adapter_id: str, context: Ctx, caller: Caller) -> Response:
    """Where it came from, what was converted and how, and what it does to its base model's hidden states."""
    return resource_response(await resource_of(context, caller, "adapter", adapter_id))


@router.delete("/{adapter_id}", summary="Delete an adapter", status_code=204, responses=_READ_RESPONSES)
async def delete_adapter(adapter_id: str, context: Ctx, caller: Caller) -> Response:
    """Remove the adapter. What was made with it stays; jobs that have begun go on, and those that have not will fail.

    Its weights go too, unless they are others' as well.
    """
    await context.plane.catalogue.delete(await resource_of(context, caller, "adapter", adapter_id))
    return Response(status_code=204)


@router.get(
    "/{adapter_id}/archive",
    summary="Download an adapter",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "The adapter's PEFT folder as a tar file.",
            "content": {_TAR: {"schema": _BINARY}},
            "headers": {"ETag": _ETAG},
        },
        206: {
            "description": "The part that `Range` asked for.",
            "content": {_TAR: {"schema": _BINARY}},
            "headers": {
                "ETag": _ETAG,
                "Content-Range": {
                    "description": "Which part of how much: `bytes first-last/length`.",
                    "required": True,
                    "schema": {"type": "string", "pattern": "^bytes [0-9]+-[0-9]+/[0-9]+$"},
                },
            },
        },
        304: {"description": "`If-None-Match` names the archive as it is.", "headers": {"ETag": _ETAG}},
        **responses(
            errors.NotFound, errors.Expired, errors.InvalidRequest, errors.RangeUnsatisfiable, errors.QuotaExceeded
        ),
    },
)
async def get_archive(adapter_id: str, request: Request, context: Ctx, caller: Caller, memory: Held) -> Response:
    """`adapter_model.safetensors` and `adapter_config.json` as PEFT loads them, converted, in a tar file."""
    resource = await resource_of(context, caller, "adapter", adapter_id)
    tar = Tar(context.plane.store, resource)
    digests = "|".join(f"{role} {blob.sha256}" for role, blob in sorted(resource.blobs.items()))
    etag = f'"{hashlib.sha256(digests.encode()).hexdigest()[:40]}"'
    headers = {
        **result_headers(resource),
        "ETag": etag,
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, max-age=3600",
    }
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if etag in known or known == ["*"]:
        return Response(status_code=304, headers=headers)
    start, end, status = 0, len(tar), 200
    if request.headers.get("if-range", etag) == etag:
        start, end, status = byte_range(request.headers.get("range"), len(tar))
    if status == 206:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(tar)}"
    headers["Content-Length"] = str(end - start)
    headers["Content-Disposition"] = f'attachment; filename="{adapter_id}.tar"'
    memory.hold(min(end - start, 2 * CHUNK_BYTES))
    with may_be_deleted(resource):
        return StreamingResponse(await begun(tar.stream(start, end)), status, headers, _TAR)
