"""`/v1/comparisons`."""

from __future__ import annotations

from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from bathyscope import errors
from bathyscope.types import Comparison, ComparisonRequest, Job, Page
from bathyscope_service.bodies import describes, json_body
from bathyscope_service.comparisons.work import comparison_work
from bathyscope_service.context import Caller, Context, Ctx, Held, Memory
from bathyscope_service.datasets.using import comparison_with_rows
from bathyscope_service.jobs.submission import answer, answer_again, earlier, submit
from bathyscope_service.probes.work import drop_parent
from bathyscope_service.problems import responses
from bathyscope_service.resources import resource_list, resource_of, result_headers

router = APIRouter(prefix="/v1/comparisons", tags=["comparisons"])

_PARSED_TIMES = 6
"""Bytes of memory for a byte of a report, parsed and written again."""

_READ_RESPONSES = responses(errors.NotFound, errors.Expired, errors.InvalidRequest, errors.QuotaExceeded)

_EXAMPLE = {
    "model": "smollm2",
    "variants": ["base", "ad_01jd3v9yhhk5t2m0r8q4x7w6nz"],
    "inputs": ["Paris is in France.", "Paris is in Spain.", "Rome is in Italy.", "Rome is in Peru."],
    "labels": [True, False, True, False],
    "folds": 2,
    "layers": [8, 16, -1],
}


@router.post(
    "",
    summary="Compare variants of a model",
    status_code=202,
    response_model=Job,
    openapi_extra=describes(ComparisonRequest, _EXAMPLE),
    responses={
        200: {"model": Job, "description": "The finished job, with `Prefer: wait=N`."},
        **responses(
            errors.MalformedBody,
            errors.NotFound,
            errors.ModelUnknown,
            errors.AdapterBaseMismatch,
            errors.RequestTimeout,
            errors.StateConflict,
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
            errors.TinkerOutOfReach,
            errors.TinkerNotSetUp,
            errors.TinkerKeyRefused,
            errors.TinkerNotFound,
            errors.TinkerForbidden,
            errors.TinkerBilling,
            errors.TinkerRateLimited,
            errors.TinkerExportOff,
            errors.AdapterSourceMissing,
            errors.TinkerBaseRetired,
        ),
    },
)
async def create_comparison(
    request: Request,
    context: Ctx,
    caller: Caller,
    memory: Held,
    body: Annotated[ComparisonRequest, Depends(json_body(ComparisonRequest))],
) -> Response:
    """Base against fine-tuned, or quantizations of one model, on the same tokens: what probes on each are worth, how
    the differences spread, how probes carry over, and how far the states moved.

    Its extractions are jobs before it, and so are the adapters of `tinker://RUN/*` that are still to be fetched.
    """
    if (first := await earlier(context, request, caller)) is not None:  # before Tinker is asked once more
        return await answer_again(context, request, caller, first)
    body = await comparison_with_rows(context, request, caller, memory, body)
    work, parents = await comparison_work(context, request, caller, body)
    try:
        job_id, replayed = await submit(context, request, caller, work)
    except errors.Unavailable:
        raise  # whether the comparison is queued is not known, and if so it needs its extractions
    except errors.ProblemError:
        for parent in reversed(parents):
            await drop_parent(context, parent)
        raise
    if replayed and parents:
        winner = await context.plane.broker.get(job_id)
        for parent in reversed(parents):
            if winner is not None and parent not in winner.request.get("jobs", winner.parents):
                await drop_parent(context, parent)
    return await answer(context, request, caller, work, job_id, replayed)


@router.get("", summary="List comparisons", response_model=Page[Comparison], responses=responses(errors.InvalidRequest))
async def list_comparisons(
    context: Ctx,
    caller: Caller,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[str | None, Query(max_length=200)] = None,
) -> Response:
    """One's own comparisons, newest first, without their reports; an admin key sees all."""
    return await resource_list(context, caller, "comparison", limit, cursor)


@router.get("/{comparison_id}", summary="Read a comparison", response_model=Comparison, responses=_READ_RESPONSES)
async def get_comparison(comparison_id: str, context: Ctx, caller: Caller, memory: Held) -> Response:
    """What was compared and the report of it."""
    resource, content = await comparison_of(context, caller, memory, comparison_id)
    return Response(content, headers=result_headers(resource), media_type="application/json")


@router.delete("/{comparison_id}", summary="Delete a comparison", status_code=204, responses=_READ_RESPONSES)
async def delete_comparison(comparison_id: str, context: Ctx, caller: Caller) -> Response:
    """Remove the comparison; the extractions that it read stay."""
    await context.plane.catalogue.delete(await resource_of(context, caller, "comparison", comparison_id))
    return Response(status_code=204)


async def comparison_of(context: Context, caller: Any, memory: Memory, comparison_id: str) -> tuple[Any, bytes]:
    """A comparison, and its JSON with the report in it. Raises `NotFound` and `Expired`."""
    resource = await resource_of(context, caller, "comparison", comparison_id)
    blob = resource.blobs["report"]
    memory.hold(_PARSED_TIMES * blob.bytes)
    report = await context.plane.store.get(blob.key)
    if report is None:
        raise errors.NotFound(f"The comparison {comparison_id} was deleted.")
    return resource, await context.apart(blob.bytes, _whole, resource.body, report)


def _whole(body: dict[str, Any], report: bytes) -> bytes:
    return orjson.dumps({**body, "report": orjson.Fragment(report)})
