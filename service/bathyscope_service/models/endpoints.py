"""`/v1/models`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from bathyscope import errors
from bathyscope.types import ExtractionOptions, Job, LoadRequest, Model, Page
from bathyscope_backplane.cursors import unwrap, wrap
from bathyscope_backplane.keys import ApiKey
from bathyscope_backplane.registry import ModelEntry
from bathyscope_service.bodies import describes, json_body
from bathyscope_service.context import Caller, Context, Ctx
from bathyscope_service.extractions.checks import lane_of, model_entry
from bathyscope_service.guards import require_admin
from bathyscope_service.jobs.submission import Work, answer, submit, webhook_of
from bathyscope_service.jobs.views import json_response
from bathyscope_service.problems import responses

router = APIRouter(prefix="/v1/models", tags=["models"])

_JOB_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"model": Job, "description": "The finished job, with `Prefer: wait=N`."},
    **responses(
        errors.MalformedBody,
        errors.ModelUnknown,
        errors.RequestTimeout,
        errors.TooLarge,
        errors.UnsupportedMedia,
        errors.InvalidRequest,
        errors.IdempotencyMismatch,
        errors.LaneFull,
        errors.QuotaExceeded,
        errors.NotBuilt,
    ),
}


@router.get("", summary="List models", response_model=Page[Model], responses=responses(errors.InvalidRequest))
async def list_models(
    context: Ctx,
    caller: Caller,
    limit: Annotated[int, Query(ge=1, le=200)] = 200,
    cursor: Annotated[str | None, Query(max_length=512)] = None,
) -> Response:
    """Every base model that the operator offers, by name, and where it is resident."""
    after = unwrap(cursor, str) if cursor is not None else ""
    names = [name for name in context.plane.registry.names() if name > after]
    alive = await context.plane.workers.alive()
    entries = [await context.plane.workers.entry(context.plane.registry, name) for name in names[:limit]]
    next_cursor = wrap(names[limit - 1]) if len(names) > limit else None
    return json_response({"data": [_view(entry, alive) for entry in entries], "next_cursor": next_cursor})


@router.get("/{name:path}", summary="Read a model", response_model=Model, responses=responses(errors.ModelUnknown))
async def get_model(name: str, context: Ctx, caller: Caller) -> Response:
    """One base model; its name may hold `/`."""
    entry = await context.plane.workers.entry(context.plane.registry, name)
    return json_response(_view(entry, await context.plane.workers.alive()))


@router.post(
    "/{name:path}/load",
    summary="Load a model",
    status_code=202,
    response_model=Job,
    openapi_extra=describes(LoadRequest, {"quantization": "4bit"}),
    responses=_JOB_RESPONSES,
)
async def load_model(
    name: str,
    request: Request,
    context: Ctx,
    caller: Annotated[ApiKey, Depends(require_admin)],
    body: Annotated[LoadRequest, Depends(json_body(LoadRequest))],
) -> Response:
    """Make a model resident before anyone asks for it (admin)."""
    return await _residency_job("load", name, request, context, caller, body)


@router.post(
    "/{name:path}/unload",
    summary="Unload a model",
    status_code=202,
    response_model=Job,
    openapi_extra=describes(LoadRequest, {"quantization": "4bit"}),
    responses=_JOB_RESPONSES,
)
async def unload_model(
    name: str,
    request: Request,
    context: Ctx,
    caller: Annotated[ApiKey, Depends(require_admin)],
    body: Annotated[LoadRequest, Depends(json_body(LoadRequest))],
) -> Response:
    """Give the memory of a resident model back, on the worker that takes the job (admin)."""
    return await _residency_job("unload", name, request, context, caller, body)


async def _residency_job(
    action: Literal["load", "unload"],
    name: str,
    request: Request,
    context: Context,
    caller: ApiKey,
    body: LoadRequest,
) -> Response:
    webhook = webhook_of(context, body)
    try:
        entry = await model_entry(context, name, body.quantization)
    except errors.ModelUnknown as error:
        error.errors = []  # the name is in the path, not in the body
        raise
    options = ExtractionOptions(model=name, quantization=body.quantization, compute_dtype=body.compute_dtype)
    work = Work(
        kind="model",
        lane=lane_of(entry, options),
        spec={"action": action, **body.model_dump(exclude={"priority", "webhook"}), "model": name},
        request={"action": action, "model": name, **body.model_dump(exclude={"webhook"}, exclude_defaults=True)},
        priority=body.priority,
        webhook=webhook,
    )
    job_id, replayed = await submit(context, request, caller, work)
    return await answer(context, request, caller, work, job_id, replayed)


def _view(entry: ModelEntry, alive: dict[str, dict[str, Any]]) -> dict[str, Any]:
    variants = [
        {**resident, "worker": worker}
        for worker, info in alive.items()
        for resident in info.get("residents", [])
        if resident.get("model") == entry.name
    ]
    hot = [variant for variant in variants if variant["state"] == "hot"]
    facts = entry.facts
    return {
        "name": entry.name,
        "source": entry.kind,
        "revision": entry.revision,
        "quantizations": entry.quantizations,
        "compute_dtype": entry.compute_dtype,
        "llm_int8_threshold": entry.llm_int8_threshold,
        "residency": "hot" if hot else "loading" if variants else "cold",
        "memory_bytes": max((variant["memory_bytes"] for variant in hot), default=None),
        "fraction_quantized": max((variant["fraction_quantized"] for variant in hot), default=None),
        "workers": sorted({variant["worker"] for variant in variants}),
        "variants": variants,
        "num_layers": facts.num_layers if facts else None,
        "hidden_size": facts.hidden_size if facts else None,
        "max_length": min(filter(None, (entry.max_length, facts.max_length if facts else None)), default=None),
        "vocab_size": facts.vocab_size if facts else None,
        "architecture": facts.architecture if facts else None,
        "self_test": hot[0]["self_test"] if hot else None,
    }
