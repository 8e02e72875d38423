"""What a comparison's `variants` mean: the base, adapters, and the checkpoints of a Tinker run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from bathyscope.errors import (
    FieldError,
    InvalidRequest,
    ProblemError,
    TinkerExportOff,
    TinkerForbidden,
    TinkerKeyRefused,
    TinkerNotFound,
    TinkerNotSetUp,
    TinkerOutOfReach,
    TinkerRateLimited,
)
from bathyscope_backplane.adapter_sources import TinkerKind, TinkerSource, parse_source
from bathyscope_backplane.artifacts import Resource
from bathyscope_backplane.keys import ApiKey
from bathyscope_backplane.registry import ModelEntry
from bathyscope_backplane.reuse import adapter_digest
from bathyscope_service.adapters.variants import BASE, fits
from bathyscope_service.context import Context
from bathyscope_service.credentials import credentials_of
from bathyscope_service.resources import resource_of
from bathyscope_service.tinker.asking import key_of

_RUN = re.compile(r"tinker://([^/*\s]{1,256})/\*")
_STEP = re.compile(r"(\d{1,12})(?!.*\d)")
_FETCHED_AS: tuple[TinkerKind, ...] = ("external_weights", "sampler_weights", "weights")
"""Of several checkpoints of one name the first of these is fetched."""

_SHOWN = 3
_UNLISTED = (TinkerNotSetUp, TinkerNotFound, TinkerForbidden, TinkerKeyRefused, TinkerOutOfReach, TinkerRateLimited)


@dataclass(slots=True)
class Named:
    """One variant, as the request names it and as the report calls it."""

    pointer: str
    """Into the request."""

    adapter: str | None
    """Its id, or `base`; null of a checkpoint that is to be fetched from `source`, until its job is known."""

    name: str
    source: str | None = None
    step: int | None = None


@dataclass(slots=True)
class Asked:
    """What a request's variants come to."""

    variants: list[Named] = field(default_factory=list)
    runs: bool = False
    """Whether a Tinker run is among them."""

    notices: list[str] = field(default_factory=list)
    """What of a run is left out, and why."""


async def named(context: Context, request: Request, caller: ApiKey, asked: list[str], model: str) -> Asked:
    """The variants in their order.

    Raises `NotFound` and `Expired` for adapters that are not there, `InvalidRequest` for a run without checkpoints,
    for one named twice, and for more than may be compared; and of a run what Tinker says.
    """
    most = context.plane.settings.limits.max_variants
    found = Asked()
    entry = context.plane.registry.get(model)  # before anything that points at a variant
    _bounded(max(2, len(asked)), most, of_runs=False)  # each is one variant at least, and of a run Tinker is asked
    mine = await _mine(context, caller, entry) if any(map(_RUN.fullmatch, asked)) else []
    for number, one in enumerate(asked):
        pointer = f"/variants/{number}"
        if one == BASE:
            found.variants.append(Named(pointer, BASE, BASE))
        elif (run := _RUN.fullmatch(one)) is not None:
            found.runs = True
            with _pointed(pointer):
                await _checkpoints(context, request, caller, run[1], model, pointer, found, mine)
        elif one.startswith("tinker://"):
            raise _invalid(pointer, "name a whole run, tinker://RUN/*, or the id of an adapter made of the checkpoint")
        else:
            adapter = await resource_of(context, caller, "adapter", one)
            found.variants.append(_described(adapter, pointer))
    variants = found.variants
    for number, variant in enumerate(variants):
        # Checkpoints of one run may be of equal weights: the last step, and the end.
        twice = (other for other in variants[:number] if other.pointer != variant.pointer)
        if variant.adapter and any(variant.adapter == other.adapter for other in twice):
            raise _invalid(variant.pointer, f"{variant.name} is compared already: leave one of the two out")
    _bounded(len(variants), most, of_runs=found.runs)
    called = [variant.name for variant in variants]
    for variant in variants:  # names are the caller's own; what they do not tell apart ids do
        if called.count(variant.name) > 1:
            variant.name = variant.adapter or str(variant.source)
    return found


async def _checkpoints(
    context: Context,
    request: Request,
    caller: ApiKey,
    run: str,
    model: str,
    pointer: str,
    into: Asked,
    own: list[Resource],
) -> None:
    """A run's checkpoints by step; those without a number last, by age.

    With a key for Tinker they are those that Tinker lists, each as the adapter that one has of it already or else to be
    fetched; without, the adapters that one has (`own`: those for the model).
    """
    parse_source(f"tinker://{run}/weights/any")  # what no path could name is not asked for
    mine = [one for one in own if str(one.body.get("source") or "").startswith(f"tinker://{run}/")]
    listed: list[dict[str, Any]] = []
    try:
        listed = await context.tinker.checkpoints(key_of(request, context.plane.settings.adapters), run)
    except _UNLISTED as error:
        if not mine or credentials_of(request).tinker_api_key is not None:
            raise
        into.notices.append(
            f"Tinker did not list the checkpoints ({error.title}): tinker://{run}/* are the adapters that were made of "
            "them before. Send your key in X-Tinker-Api-Key for the others."
        )
    saved: dict[str, dict[str, float]] = {}
    for one in listed:
        saved.setdefault(one["name"], {})[one["kind"]] = one["time"]
    found: dict[str, tuple[Named, float]] = {}
    for adapter in mine:
        name = str(adapter.body["source"]).rpartition("/")[2]
        found[name] = _described(adapter, pointer), min(saved.get(name, {"": adapter.created_ms / 1000}).values())
    training: list[str] = []
    left_out: list[str] = []
    for name, times in saved.items():
        kind = next((kind for kind in _FETCHED_AS if kind in times), None)
        if name in found or kind is None:
            continue
        source = TinkerSource(run, kind, name)
        try:
            parse_source(source.text)
        except InvalidRequest:
            left_out.append(name)
            continue
        if source.kind == "weights" and not context.plane.settings.adapters.allow_training_export:
            training.append(name)
            continue
        found[name] = Named(pointer, None, name, source.text, _step(name)), min(times.values())
    if training:
        into.notices.append(
            f"Left out as training checkpoints, of which the operator allows no exports: {_first(training)}."
        )
    if left_out:
        into.notices.append(f"Left out for names that no path can hold: {_first(left_out)}.")
    if not found and training:
        raise TinkerExportOff(
            f"The run {run} has training checkpoints only, and the operator has not allowed their export "
            "(adapters.allow_training_export). Save others with training_client.save_weights_external(NAME)."
        )
    if not found:
        raise _invalid(pointer, f"the run {run} has no checkpoints; save one with save_weights_external(NAME)")
    _bounded(max(2, len(into.variants) + len(found)), context.plane.settings.limits.max_variants, of_runs=True)
    for variant, _ in found.values():
        variant.adapter = variant.adapter or await _known(context, caller, str(variant.source), model)
    by_step = sorted(found.values(), key=lambda pair: (pair[0].step is None, pair[0].step or 0, pair[1]))
    into.variants += [one for one, _ in by_step]


def _first(names: list[str]) -> str:
    """The first names, and how many more."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(name[:80] for name in names[:_SHOWN]) + more


async def _mine(context: Context, caller: ApiKey, entry: ModelEntry) -> list[Resource]:
    """One's adapters that were made of Tinker's checkpoints, for a model."""
    registry = context.plane.registry
    mine: list[Resource] = []
    cursor: str | None = None
    while True:
        page, cursor = await context.plane.catalogue.list("adapter", caller.id, limit=200, cursor=cursor)
        mine += [
            one
            for one in page
            if str(one.body.get("source") or "").startswith("tinker://") and fits(registry, one, entry)
        ]
        if cursor is None:
            return mine


async def _known(context: Context, caller: ApiKey, source: str, model: str) -> str | None:
    """Id of one's adapter that a checkpoint came to before, though its own source is another of equal weights."""
    digest = adapter_digest(source, model)
    found = await context.plane.reuse.get(caller.id, digest) if digest is not None else None
    adapter = await context.plane.catalogue.get(found) if found is not None else None
    return adapter.id if adapter is not None else None


def _described(adapter: Resource, pointer: str) -> Named:
    body: dict[str, Any] = adapter.body
    source = body.get("source")
    name = body.get("name")
    step = None
    if isinstance(source, str) and source.startswith("tinker://"):
        checkpoint = source.rpartition("/")[2]
        step = _step(checkpoint)
        name = name or checkpoint
    return Named(pointer, adapter.id, name if name and name != BASE else adapter.id, source, step)


def _step(checkpoint: str) -> int | None:
    """The last number in a checkpoint's name."""
    number = _STEP.search(checkpoint)
    return int(number[1]) if number is not None else None


@contextmanager
def _pointed(pointer: str) -> Iterator[None]:
    """Faults of Tinker's point at the variant that names the run."""
    try:
        yield
    except ProblemError as error:
        told = [one["detail"] for one in error.errors] or ["this run's checkpoints were asked for"]
        error.errors = [FieldError(pointer=pointer, detail=detail) for detail in told]
        raise


def _bounded(count: int, most: int, *, of_runs: bool) -> None:
    if not 2 <= count <= most:
        remedy = "; name those that you want by their adapters' ids" if of_runs and count > most else ""
        raise _invalid("/variants", f"{count} variants, and a comparison has 2 to {most}{remedy}")


def _invalid(pointer: str, detail: str) -> InvalidRequest:
    return InvalidRequest("The variants do not fit the request.", errors=[FieldError(pointer=pointer, detail=detail)])
