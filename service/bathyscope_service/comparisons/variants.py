"""What a comparison's `variants` mean: the base, adapters, and the checkpoints of a Tinker run that one has."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from bathyscope.errors import FieldError, InvalidRequest
from bathyscope_backplane.artifacts import Resource
from bathyscope_backplane.keys import ApiKey
from bathyscope_service.adapters.variants import BASE
from bathyscope_service.context import Context
from bathyscope_service.resources import resource_of

_RUN = re.compile(r"tinker://([^/*\s]{1,256})/\*")
_STEP = re.compile(r"(\d{1,12})(?!.*\d)")


@dataclass(frozen=True, slots=True)
class Named:
    """One variant, as the request names it and as the report calls it."""

    pointer: str
    """Into the request."""

    adapter: str
    """Its id, or `base`."""

    name: str
    source: str | None = None
    step: int | None = None


async def named(context: Context, caller: ApiKey, asked: list[str]) -> tuple[list[Named], str]:
    """The variants in their order, and whether they are `adapters` or `checkpoints`.

    Raises `NotFound` and `Expired` for adapters that are not there, `InvalidRequest` for a run without checkpoints,
    for one named twice, and for more than may be compared.
    """
    most = context.plane.settings.limits.max_variants
    found: list[Named] = []
    runs = False
    for number, one in enumerate(asked):
        pointer = f"/variants/{number}"
        if one == BASE:
            found.append(Named(pointer, BASE, BASE))
        elif (run := _RUN.fullmatch(one)) is not None:
            runs = True
            found += await _checkpoints(context, caller, run[1], pointer)
        elif one.startswith("tinker://"):
            raise _invalid(pointer, "name a whole run, tinker://RUN/*, or the id of an adapter made of the checkpoint")
        else:
            adapter = await resource_of(context, caller, "adapter", one)
            found.append(_described(adapter, pointer))
    for number, variant in enumerate(found):
        if any(variant.adapter == other.adapter for other in found[:number]):
            raise _invalid(variant.pointer, f"{variant.name} is compared already: leave one of the two out")
    if not 2 <= len(found) <= most:
        raise _invalid("/variants", f"{len(found)} variants, and a comparison has 2 to {most}")
    called = [variant.name for variant in found]
    # Names are the caller's own; what they do not tell apart ids do.
    return [
        variant
        if called.count(variant.name) == 1
        else Named(variant.pointer, variant.adapter, variant.adapter, variant.source, variant.step)
        for variant in found
    ], "checkpoints" if runs else "adapters"


async def _checkpoints(context: Context, caller: ApiKey, run: str, pointer: str) -> list[Named]:
    """One's adapters that were made of a run's checkpoints, by step; those without a number last, by age."""
    mine: list[Resource] = []
    cursor: str | None = None
    while True:
        page, cursor = await context.plane.catalogue.list("adapter", caller.id, limit=200, cursor=cursor)
        mine += [one for one in page if str(one.body.get("source") or "").startswith(f"tinker://{run}/")]
        if cursor is None:
            break
    if not mine:
        raise _invalid(
            pointer,
            f"none of your adapters was made of a checkpoint of the run {run}: add them first, each with "
            "POST /v1/adapters and its tinker:// path as source",
        )
    described = [(_described(one, pointer), one.created_ms) for one in mine]
    described.sort(key=lambda pair: (pair[0].step is None, pair[0].step or 0, pair[1]))
    return [one for one, _ in described]


def _described(adapter: Resource, pointer: str) -> Named:
    body: dict[str, Any] = adapter.body
    source = body.get("source")
    name = body.get("name")
    step = None
    if isinstance(source, str) and source.startswith("tinker://"):
        checkpoint = source.rpartition("/")[2]
        number = _STEP.search(checkpoint)
        step = int(number[1]) if number is not None else None
        name = name or checkpoint
    return Named(pointer, adapter.id, name if name and name != BASE else adapter.id, source, step)


def _invalid(pointer: str, detail: str) -> InvalidRequest:
    return InvalidRequest("The variants do not fit the request.", errors=[FieldError(pointer=pointer, detail=detail)])
