"""`/v1/extractions`."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import StreamingResponse
from starlette.responses import Response

from bathyscope import errors
from bathyscope.types import Choices as ChoicesBody
from bathyscope.types import Extraction, ExtractionRequest, Format, Job, Page
from bathyscope_backplane.artifacts._store import CHUNK_BYTES
from bathyscope_backplane.ids import new_id
from bathyscope_backplane.keys import ApiKey
from bathyscope_service import encoding
from bathyscope_service.adapters.variants import resolve
from bathyscope_service.bodies import describes, json_body
from bathyscope_service.context import Caller, Context, Ctx, Held
from bathyscope_service.datasets.using import with_rows
from bathyscope_service.extractions.checks import check, lane_of, model_entry, wire_rows
from bathyscope_service.extractions.choices import Choices
from bathyscope_service.extractions.representations import MEDIA_TYPES, STATES_SCHEMA, States
from bathyscope_service.jobs.submission import Work, answer, submit, webhook_of
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

router = APIRouter(prefix="/v1/extractions", tags=["extractions"])

_BINARY = {"type": "string", "format": "binary"}
_ETAG = {
    "description": "Names this representation.",
    "required": True,
    "schema": {"type": "string", "pattern": '^"[0-9a-f]{40}(-zstd)?"$'},
}

_EXAMPLE = {
    "model": "smollm2",
    "inputs": ["The capital of France is Paris.", {"messages": [{"role": "user", "content": "Hello!"}]}],
    "layers": [8, 16, -1],
    "pooling": "last",
}


@router.post(
    "",
    summary="Extract hidden states",
    status_code=202,
    response_model=Job,
    openapi_extra=describes(ExtractionRequest, _EXAMPLE),
    responses={
        200: {"model": Job, "description": "The finished job, with `Prefer: wait=N`."},
        **responses(
            errors.MalformedBody,
            errors.ModelUnknown,
            errors.NotFound,
            errors.Expired,
            errors.AdapterBaseMismatch,
            errors.StateConflict,
            errors.RequestTimeout,
            errors.TooLarge,
            errors.UnsupportedMedia,
            errors.InvalidRequest,
            errors.InvalidInput,
            errors.IdempotencyMismatch,
            errors.LaneFull,
            errors.QuotaExceeded,
            errors.NotBuilt,
            errors.DatasetOutOfReach,
        ),
    },
)
async def create_extraction(
    request: Request,
    context: Ctx,
    caller: Caller,
    memory: Held,
    body: Annotated[ExtractionRequest, Depends(json_body(ExtractionRequest))],
) -> Response:
    """Queue the extraction of hidden states of texts; the job's `resource` is the extraction."""
    body, _ = await with_rows(context, request, caller, memory, body)
    work = await extraction_work(context, caller, body, request.state.body_bytes)
    job_id, replayed = await submit(context, request, caller, work)
    return await answer(context, request, caller, work, job_id, replayed)


async def extraction_work(
    context: Context, caller: ApiKey, body: ExtractionRequest, size: int, *, repeats: bool = False
) -> Work:
    """The job of a valid request, which came in a body of `size` bytes. Raises what the front end can tell.

    The inputs of a dataset are there already (`with_rows`). With `repeats` an adapter may be named more than once.
    """
    webhook = webhook_of(context, body)
    entry = await model_entry(context, body.model, body.quantization)
    inputs = body.inputs or []
    variants = await resolve(context, caller, body.adapter, entry, repeats=repeats)
    many = len(variants.wire)
    estimate = await context.apart(size, check, entry, body, inputs, context.plane.settings.limits, many)
    spec = {**body.model_dump(exclude={"inputs", "dataset", "adapter", "priority", "webhook"}), **variants.spec}
    return Work(
        kind="extraction",
        lane=lane_of(entry, body),
        spec=spec,
        rows=await context.apart(size, wire_rows, inputs),
        request={**body.model_dump(exclude={"inputs", "webhook"}, exclude_defaults=True), "inputs": len(inputs)},
        resource_id=new_id("ext"),
        priority=body.priority,
        parents=variants.jobs,
        inputs=len(inputs) * many,
        rows_each=0 if variants.jobs else many,  # what waits for another job runs whole
        bytes=estimate,
        webhook=webhook,
    )


@router.get("", summary="List extractions", response_model=Page[Extraction], responses=responses(errors.InvalidRequest))
async def list_extractions(
    context: Ctx,
    caller: Caller,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[str | None, Query(max_length=200)] = None,
) -> Response:
    """One's own extractions, newest first; an admin key sees all."""
    return await resource_list(context, caller, "extraction", limit, cursor)


@router.get(
    "/{extraction_id}",
    summary="Read an extraction",
    response_model=Extraction,
    responses=responses(errors.NotFound, errors.Expired, errors.InvalidRequest),
)
async def get_extraction(extraction_id: str, context: Ctx, caller: Caller) -> Response:
    """What was extracted and under which identity; the numbers are at `links.hidden_states`."""
    return resource_response(await resource_of(context, caller, "extraction", extraction_id))


@router.delete(
    "/{extraction_id}",
    summary="Delete an extraction",
    status_code=204,
    responses=responses(errors.NotFound, errors.Expired, errors.InvalidRequest),
)
async def delete_extraction(extraction_id: str, context: Ctx, caller: Caller) -> Response:
    """Remove the extraction and its hidden states."""
    await context.plane.catalogue.delete(await resource_of(context, caller, "extraction", extraction_id))
    return Response(status_code=204)


@router.get(
    "/{extraction_id}/hidden_states",
    summary="Read hidden states",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "The tensor, streamed.",
            "content": {
                media: {"schema": STATES_SCHEMA if name == "json" else _BINARY} for name, media in MEDIA_TYPES.items()
            },
            "headers": {"ETag": _ETAG},
        },
        206: {
            "description": "The part that `Range` asked for.",
            "content": {media: {"schema": _BINARY} for name, media in MEDIA_TYPES.items() if name != "json"},
            "headers": {
                "ETag": _ETAG,
                "Content-Range": {
                    "description": "Which part of how much: `bytes first-last/length`.",
                    "required": True,
                    "schema": {"type": "string", "pattern": "^bytes [0-9]+-[0-9]+/[0-9]+$"},
                },
            },
        },
        304: {
            "description": "`If-None-Match` names the present representation.",
            "headers": {"ETag": _ETAG},
        },
        **responses(
            errors.NotFound,
            errors.Expired,
            errors.InvalidRequest,
            errors.NotAcceptable,
            errors.TooLarge,
            errors.RangeUnsatisfiable,
            errors.QuotaExceeded,
        ),
    },
)
async def get_hidden_states(
    extraction_id: str,
    request: Request,
    context: Ctx,
    caller: Caller,
    memory: Held,
    format: Annotated[Format | None, Query(description="By default what `Accept` names, else safetensors.")] = None,
    layers: Annotated[str | None, Query(max_length=20_000, description="Layer numbers, as `8,16`.")] = None,
    rows: Annotated[str | None, Query(max_length=40, description="Inputs, inclusive, as `0-99`.")] = None,
) -> Response:
    """The hidden states, whole or some layers and rows of them, in one of four formats."""
    resource = await resource_of(context, caller, "extraction", extraction_id)
    chosen = format or _accepted(request.headers.get("accept", "*/*"))
    states = States(context.plane.store, resource)
    selection = states.select(layers, rows)
    etag = states.etag(chosen, selection)
    # A range is of the plain bytes.
    zstd = "range" not in request.headers and encoding.wants_zstd(request.headers.get("accept-encoding"))
    headers = {
        **result_headers(resource),
        "ETag": encoding.tagged(etag) if zstd else etag,
        "Cache-Control": "private, max-age=3600",
        "Vary": "Accept, Accept-Encoding",
    }
    if _known(request, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    media_type = MEDIA_TYPES[chosen]
    if zstd:
        headers["Content-Encoding"] = "zstd"
    headers["Content-Disposition"] = f'attachment; filename="{extraction_id}.{chosen}"'
    states.require(chosen)
    limits = context.plane.settings.limits
    with may_be_deleted(resource):
        if chosen == "json":
            content = await states.json(selection, limits.max_json_bytes, memory.hold)
            if zstd:
                content = await asyncio.to_thread(encoding.whole, content)
            return Response(content, headers=headers, media_type=media_type)
        if chosen == "arrow":
            stream = await begun(await states.arrow(selection, limits.max_arrow_bytes, memory.hold))
            if zstd:
                stream = encoding.compressed(stream)
            return StreamingResponse(stream, headers=headers, media_type=media_type)
        pieces = await states.pieces(chosen, selection)
    if zstd:
        memory.hold(min(len(pieces), 3 * CHUNK_BYTES))
        with may_be_deleted(resource):
            plain = await begun(pieces.stream(0, len(pieces)))
        return StreamingResponse(encoding.compressed(plain), headers=headers, media_type=media_type)
    start, end, status = 0, len(pieces), 200
    if pieces.contiguous:
        headers["Accept-Ranges"] = "bytes"
        if request.headers.get("if-range", etag) == etag:
            start, end, status = byte_range(request.headers.get("range"), len(pieces))
        if status == 206:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(pieces)}"
    headers["Content-Length"] = str(end - start)
    memory.hold(min(end - start, 2 * CHUNK_BYTES))
    with may_be_deleted(resource):
        return StreamingResponse(await begun(pieces.stream(start, end)), status, headers, media_type)


@router.get(
    "/{extraction_id}/choices",
    summary="Read the scores of choices",
    response_model=ChoicesBody,
    responses={
        200: {"description": "The scores, streamed.", "headers": {"ETag": _ETAG}},
        304: {"description": "`If-None-Match` names the present representation.", "headers": {"ETag": _ETAG}},
        **responses(errors.NotFound, errors.Expired, errors.InvalidRequest, errors.QuotaExceeded),
    },
)
async def get_choices(
    extraction_id: str,
    request: Request,
    context: Ctx,
    caller: Caller,
    memory: Held,
    variant: Annotated[
        str | None, Query(max_length=64, description="Of a paired extraction: an adapter's id, or `base`.")
    ] = None,
    rows: Annotated[str | None, Query(max_length=40, description="Inputs, inclusive, as `0-99`.")] = None,
) -> Response:
    """What the model made of each question of an extraction with `score_choices`, in the order of the inputs."""
    resource = await resource_of(context, caller, "extraction", extraction_id)
    choices = Choices(context.plane.store, resource, variant, rows)
    headers = {**result_headers(resource), "ETag": choices.etag, "Cache-Control": "private, max-age=3600"}
    if _known(request, choices.etag):
        return Response(status_code=304, headers=headers)
    with may_be_deleted(resource):
        length, stream = await choices.open()
        headers["Content-Length"] = str(length)
        memory.hold(min(length, 2 * CHUNK_BYTES))
        return StreamingResponse(await begun(stream), headers=headers, media_type="application/json")


def _known(request: Request, etag: str) -> bool:
    """Whether the client has this representation already."""
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    return etag in known or known == ["*"]


def _accepted(accept: str) -> Format:
    """The format that an Accept header prefers. Raises `NotAcceptable`."""
    choices: dict[str, Format] = {media: name for name, media in MEDIA_TYPES.items()}  # type: ignore[misc]
    choices |= {"*/*": "safetensors", "application/octet-stream": "safetensors", "application/*": "safetensors"}
    best: tuple[float, Format] | None = None
    for entry in accept.split(","):
        media, *parameters = [part.strip().lower() for part in entry.split(";")]
        quality = 1.0
        for parameter in parameters:
            name, _, value = parameter.partition("=")
            if name.strip() == "q":
                try:
                    quality = float(value)
                except ValueError:
                    quality = 0.0
        if media in choices and quality > 0 and (best is None or quality > best[0]):
            best = (quality, choices[media])
    if best is None:
        raise errors.NotAcceptable(f"Accept names none of {', '.join(MEDIA_TYPES.values())}; or give format=.")
    return best[1]
