"""`/v1/tinker`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from bathyscope import errors
from bathyscope.types import TinkerModels
from bathyscope_backplane.registry import ModelRegistry
from bathyscope_service.context import Caller, Ctx
from bathyscope_service.jobs.views import json_response
from bathyscope_service.problems import responses
from bathyscope_service.tinker.asking import key_of

router = APIRouter(prefix="/v1/tinker", tags=["tinker"])


@router.get(
    "/models",
    summary="List Tinker's models",
    response_model=TinkerModels,
    responses=responses(
        errors.TinkerOutOfReach,
        errors.TinkerNotSetUp,
        errors.TinkerKeyRefused,
        errors.TinkerNotFound,
        errors.TinkerBaseRetired,
        errors.AdapterSourceMissing,
        errors.TinkerForbidden,
        errors.TinkerBilling,
        errors.TinkerRateLimited,
        errors.InvalidRequest,
    ),
)
async def list_tinker_models(request: Request, context: Ctx, caller: Caller) -> Response:
    """What Tinker says it supports now, for the key of `X-Tinker-Api-Key` or the operator's, and which model of this
    service fits each. An answer is kept for a minute."""
    key = key_of(request, context.plane.settings.adapters)
    offered = _by_repository(context.plane.registry)
    found = await context.tinker.models(key)
    return json_response({"data": [{**model, "model": offered.get(repository(model["name"]))} for model in found]})


def repository(name: str) -> str:
    """The base model's name on the hub, without what Tinker says of a variant of it after a colon."""
    return name.partition(":")[0].casefold()


def _by_repository(registry: ModelRegistry) -> dict[str, str]:
    """The models offered here, by their repository on the hub and by their own name."""
    found: dict[str, str] = {}
    for name in registry.names():
        entry = registry.get(name)
        found.setdefault(name.casefold(), name)
        if entry.kind == "hub":
            found[entry.source.removeprefix("hf://").casefold()] = name
    return found
