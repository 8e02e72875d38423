"""`/v1/probes` and `/v1/predictions`."""

from __future__ import annotations

from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import StreamingResponse
from starlette.responses import Response

from bathyscope import errors
from bathyscope._probe_file import FittedProbe
from bathyscope.types import Job, Page, Prediction, PredictRequest, Probe, ProbeRequest, WeightsFormat
from bathyscope_backplane.artifacts._store import CHUNK_BYTES
from bathyscope_service.auditing import concerns
from bathyscope_service.bodies import describes, json_body
from bathyscope_service.context import Caller, Ctx, Held
from bathyscope_service.datasets.using import probe_with_rows
from bathyscope_service.jobs.submission import answer, submit
from bathyscope_service.probes import card, onnx_file
from bathyscope_service.probes.predicting import prediction_work
from bathyscope_service.probes.work import drop_parent, probe_work
from bathyscope_service.problems import responses
from bathyscope_service.resources import (
    begun,
    may_be_deleted,
    resource_list,
    resource_of,
    resource_response,
    result_headers,
)

router = APIRouter(tags=["probes"])

_SUBMIT_PROBLEMS = (
    errors.MalformedBody,
    errors.NotFound,
    errors.ModelUnknown,
    errors.RequestTimeout,
    errors.StateConflict,
    errors.IdentityMismatch,
    errors.Expired,
    errors.TooLarge,
    errors.UnsupportedMedia,
    errors.InvalidRequest,
    errors.InvalidInput,
    errors.IdempotencyMismatch,
    errors.LaneFull,
    errors.QuotaExceeded,
    errors.NotBuilt,
    errors.DatasetOutOfReach,
)
_SUBMIT_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"model": Job, "description": "The finished job, with `Prefer: wait=N`."},
    **responses(*_SUBMIT_PROBLEMS),
}
_SAFETENSORS = "application/vnd.safetensors"
_ONNX_TIMES = 6
"""Bytes of memory for a byte of a probe's file while it is made into an ONNX model."""

_PARSED_TIMES = 6
"""Bytes of memory for a byte of a prediction's numbers, parsed and written again."""

_READ_RESPONSES = responses(errors.NotFound, errors.Expired, errors.InvalidRequest)

_EXAMPLE = {
    "extraction": "ext_01jd3v9yhhk5t2m0r8q4x7w6nz",
    "labels": [1, 0, 1, 0],
    "groups": ["a", "a", "b", "b"],
    "folds": 2,
}


@router.post(
    "/v1/probes",
    summary="Train a probe",
    status_code=202,
    response_model=Job,
    openapi_extra=describes(ProbeRequest, _EXAMPLE),
    responses=_SUBMIT_RESPONSES,
)
async def create_probe(
    request: Request,
    context: Ctx,
    caller: Caller,
    memory: Held,
    body: Annotated[ProbeRequest, Depends(json_body(ProbeRequest))],
) -> Response:
    """Sweep over the layers of an extraction, report what each is worth, and keep the probe of the best layer."""
    body = await probe_with_rows(context, request, caller, memory, body)
    work, parent = await probe_work(context, request, caller, body)
    try:
        job_id, replayed = await submit(context, request, caller, work)
    except errors.Unavailable:
        raise  # whether the probe is queued is not known, and if so it needs its extraction
    except errors.ProblemError:
        if parent is not None:
            await drop_parent(context, parent)
        raise
    if replayed and parent is not None:
        first = await context.plane.broker.get(job_id)
        if first is not None and parent not in first.parents:
            await drop_parent(context, parent)
    return await answer(context, request, caller, work, job_id, replayed)


@router.get("/v1/probes", summary="List probes", response_model=Page[Probe], responses=responses(errors.InvalidRequest))
async def list_probes(
    context: Ctx,
    caller: Caller,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[str | None, Query(max_length=200)] = None,
) -> Response:
    """One's own probes, newest first; an admin key sees all."""
    return await resource_list(context, caller, "probe", limit, cursor)


@router.get("/v1/probes/{probe_id}", summary="Read a probe", response_model=Probe, responses=_READ_RESPONSES)
async def get_probe(probe_id: str, context: Ctx, caller: Caller) -> Response:
    """The probe's identity, its layer and the report of the sweep."""
    return resource_response(await resource_of(context, caller, "probe", probe_id))


@router.delete("/v1/probes/{probe_id}", summary="Delete a probe", status_code=204, responses=_READ_RESPONSES)
async def delete_probe(probe_id: str, context: Ctx, caller: Caller) -> Response:
    """Remove the probe and its weights."""
    await context.plane.catalogue.delete(await resource_of(context, caller, "probe", probe_id))
    return Response(status_code=204)


@router.get(
    "/v1/probes/{probe_id}/weights",
    summary="Read a probe's weights",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "A safetensors file, an ONNX model or the model card.",
            "content": {
                _SAFETENSORS: {"schema": {"type": "string", "format": "binary"}},
                onnx_file.MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}},
                "text/markdown": {"schema": {"type": "string"}},
            },
        },
        **_READ_RESPONSES,
    },
)
async def get_weights(
    probe_id: str,
    context: Ctx,
    caller: Caller,
    memory: Held,
    format: Annotated[WeightsFormat, Query(description="`card` is Markdown.")] = "safetensors",
) -> Response:
    """The probe as a file: safetensors, with all it takes to predict and its identity in the metadata; ONNX (probes on
    pooled states), from raw states to calibrated probabilities; or its model card."""
    resource = await resource_of(context, caller, "probe", probe_id)
    blob = resource.blobs["weights"]
    headers = result_headers(resource)
    if format == "card":
        return Response(card.card(resource), headers=headers, media_type=card.MEDIA_TYPE)
    headers["Content-Disposition"] = f'attachment; filename="{probe_id}.{format}"'
    if format == "onnx":
        memory.hold(_ONNX_TIMES * blob.bytes)
        with may_be_deleted(resource):
            data = await context.plane.store.get(blob.key)
        if data is None:
            raise errors.NotFound(f"The probe {probe_id} was deleted.")
        content = await context.apart(blob.bytes, lambda: onnx_file.to_onnx(FittedProbe.from_bytes(data)))
        return Response(content, headers=headers, media_type=onnx_file.MEDIA_TYPE)
    headers |= {"ETag": f'"{blob.sha256[:40]}"', "Content-Length": str(blob.bytes)}
    memory.hold(min(blob.bytes, 2 * CHUNK_BYTES))
    with may_be_deleted(resource):
        stream = await begun(context.plane.store.stream(blob.key, 0, blob.bytes))
    return StreamingResponse(stream, headers=headers, media_type=_SAFETENSORS)


@router.post(
    "/v1/probes/{probe_id}/predict",
    summary="Ask a probe",
    status_code=202,
    response_model=Job,
    openapi_extra=describes(PredictRequest, {"inputs": ["The capital of France is Paris."]}),
    responses=_SUBMIT_RESPONSES,
)
async def predict(
    probe_id: str,
    request: Request,
    context: Ctx,
    caller: Caller,
    body: Annotated[PredictRequest, Depends(json_body(PredictRequest))],
) -> Response:
    """What the probe, and further ones in the same pass, say of new inputs, extracted under the probe's own identity,
    or of an existing extraction."""
    probe = await resource_of(context, caller, "probe", probe_id)
    concerns(request, *body.also)
    work = await prediction_work(context, caller, probe, body, request.state.body_bytes)
    job_id, replayed = await submit(context, request, caller, work)
    return await answer(context, request, caller, work, job_id, replayed)


@router.get(
    "/v1/predictions",
    summary="List predictions",
    response_model=Page[Prediction],
    responses=responses(errors.InvalidRequest),
)
async def list_predictions(
    context: Ctx,
    caller: Caller,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[str | None, Query(max_length=200)] = None,
) -> Response:
    """One's own predictions, newest first; an admin key sees all."""
    return await resource_list(context, caller, "prediction", limit, cursor)


@router.get(
    "/v1/predictions/{prediction_id}",
    summary="Read a prediction",
    response_model=Prediction,
    responses=_READ_RESPONSES,
)
async def get_prediction(prediction_id: str, context: Ctx, caller: Caller, memory: Held) -> Response:
    """What the probes say, one entry an input."""
    resource = await resource_of(context, caller, "prediction", prediction_id)
    blob = resource.blobs["prediction"]
    memory.hold(_PARSED_TIMES * blob.bytes)
    numbers = await context.plane.store.get(blob.key)
    if numbers is None:
        raise errors.NotFound(f"The prediction {prediction_id} was deleted.")
    content = await context.apart(blob.bytes, _with_numbers, resource.body, numbers)
    return Response(content, headers=result_headers(resource), media_type="application/json")


def _with_numbers(body: dict[str, Any], numbers: bytes) -> bytes:
    found = orjson.loads(numbers)
    further = zip(body.get("also", []), found.pop("also", []), strict=True)
    return orjson.dumps({**body, **found, "also": [{**one, **more} for one, more in further]})


@router.delete(
    "/v1/predictions/{prediction_id}", summary="Delete a prediction", status_code=204, responses=_READ_RESPONSES
)
async def delete_prediction(prediction_id: str, context: Ctx, caller: Caller) -> Response:
    """Remove the prediction."""
    await context.plane.catalogue.delete(await resource_of(context, caller, "prediction", prediction_id))
    return Response(status_code=204)
