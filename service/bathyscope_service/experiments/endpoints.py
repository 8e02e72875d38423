"""`/v1/experiments`."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from pydantic import ValidationError
from starlette.responses import Response

from bathyscope import errors
from bathyscope.types import Experiment, ExperimentConfig, Job, Page
from bathyscope_service.bodies import content_of, digest_of, invalid, read_bounded
from bathyscope_service.context import Caller, Ctx, Held, Memory, context_of
from bathyscope_service.experiments import reading
from bathyscope_service.experiments.stages import experiment_work
from bathyscope_service.jobs.submission import answer, answer_again, earlier, submit
from bathyscope_service.problems import responses
from bathyscope_service.resources import resource_list, resource_of, resource_response

router = APIRouter(prefix="/v1/experiments", tags=["experiments"])

_READ_RESPONSES = responses(errors.NotFound, errors.Expired, errors.InvalidRequest)
_YAML = ("application/yaml", "application/x-yaml", "text/yaml", "text/x-yaml")
_EXAMPLE_YAML = """\
experiment: {name: capitals, seed: 42}
model: {name: smollm2}
extraction: {layers: [8, 15, 22]}
"""


@router.post(
    "",
    summary="Run an experiment",
    status_code=202,
    response_model=Job,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {"$ref": "#/components/schemas/ExperimentConfig"},
                    "example": {"model": {"name": "smollm2"}, "extraction": {"layers": [8, 15, 22]}},
                },
                "application/yaml": {"schema": {"type": "string"}, "example": _EXAMPLE_YAML},
            },
        }
    },
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
async def create_experiment(request: Request, context: Ctx, caller: Caller, memory: Held) -> Response:
    """A whole study from one file, YAML or JSON: fetch the adapter, read the states of base and adapter on the same
    tokens, train and judge a probe for each, and report.

    The job's `request.stages` name the job of each part; what an earlier experiment made of the same things is taken
    again.
    """
    config = await _read(request, memory)
    if (first := await earlier(context, request, caller)) is not None:
        return await answer_again(context, request, caller, first)
    work, plan = await experiment_work(context, request, caller, memory, config)
    try:
        job_id, replayed = await submit(context, request, caller, work)
    except errors.Unavailable:
        raise  # whether it is queued is not known, and if so it needs its stages
    except errors.ProblemError:
        await plan.drop()
        raise
    if replayed:
        await plan.drop()
    return await answer(context, request, caller, work, job_id, replayed)


@router.get("", summary="List experiments", response_model=Page[Experiment], responses=responses(errors.InvalidRequest))
async def list_experiments(
    context: Ctx,
    caller: Caller,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[str | None, Query(max_length=200)] = None,
) -> Response:
    """One's own experiments, newest first; an admin key sees all."""
    return await resource_list(context, caller, "experiment", limit, cursor)


@router.get("/{experiment_id}", summary="Read an experiment", response_model=Experiment, responses=_READ_RESPONSES)
async def get_experiment(experiment_id: str, context: Ctx, caller: Caller) -> Response:
    """What it found, from what, and the file as it was understood."""
    return resource_response(await resource_of(context, caller, "experiment", experiment_id))


@router.delete("/{experiment_id}", summary="Delete an experiment", status_code=204, responses=_READ_RESPONSES)
async def delete_experiment(experiment_id: str, context: Ctx, caller: Caller) -> Response:
    """Remove the experiment; the adapter, the states and the probes that it made stay."""
    await context.plane.catalogue.delete(await resource_of(context, caller, "experiment", experiment_id))
    return Response(status_code=204)


async def _read(request: Request, memory: Memory) -> ExperimentConfig:
    context = context_of(request)
    limits = context.plane.settings.limits
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == "application/json":
        data = await read_bounded(request, limits, memory)
        content = await context.apart(len(data), content_of, data, limits)
    elif media_type in _YAML:
        data = await read_bounded(request, limits, memory)
        if len(data) > reading.MAX_BYTES:
            raise errors.TooLarge(
                f"The file has {len(data):,} bytes and the limit is {reading.MAX_BYTES:,}; upload rows as a dataset.",
                limit=reading.MAX_BYTES,
            )
        content = await context.apart(len(data), reading.from_yaml, data)
    else:
        raise errors.UnsupportedMedia(
            f"The body's type is {media_type or 'missing'!r}; send the file with Content-Type: application/yaml, or "
            "application/json."
        )
    reading.refuse_unknown(content)
    request.state.body_digest, request.state.body_bytes = digest_of(content), len(data)
    try:
        return ExperimentConfig.model_validate(content)
    except ValidationError as error:
        raise invalid(ExperimentConfig, error, content) from None
