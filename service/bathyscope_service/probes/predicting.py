"""From a valid request for a prediction to its job.

One pass serves several probes: on new inputs it extracts the layers of all of them, on stored states each reads its
own. Where they pool differently, or scores of tokens are asked for, the pass keeps every token, and each probe's own
pooling is made of those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bathyscope._probe_file import thresholds_of
from bathyscope.errors import (
    Expired,
    FieldError,
    IdentityMismatch,
    InvalidRequest,
    NotFound,
    StateConflict,
    TooLarge,
)
from bathyscope.types import ExtractionOptions, Identity, Input, PredictRequest
from bathyscope_backplane.artifacts import Resource
from bathyscope_backplane.ids import new_id
from bathyscope_backplane.keys import ApiKey
from bathyscope_backplane.registry import ModelEntry
from bathyscope_service.adapters.variants import chosen, of_digest, wire
from bathyscope_service.context import Context
from bathyscope_service.extractions.checks import check, lane_of, model_entry, resolve_layers, token_bound, wire_rows
from bathyscope_service.jobs.submission import Work, webhook_of
from bathyscope_service.problems import pointing
from bathyscope_service.resources import resource_of

_HOW = ("pooling", "positions")
"""What of an identity says how the tokens of an input become what a probe reads."""

_TOKEN_BYTES, _SCORE_BYTES = 48, 8
"""Of one token in an answer, about; and of each probe's score of it."""


@dataclass(slots=True)
class _Reading:
    """One probe of the pass."""

    probe: Resource
    pointer: str
    """The member of the body that named it; empty for the one in the path."""

    threshold: float | None
    derived: bool = False
    """Whether its own pooling is made of all tokens."""

    transfer: bool = False

    @property
    def identity(self) -> Identity:
        return Identity.model_validate(self.probe.body["identity"])

    def spec(self) -> dict[str, Any]:
        """As the worker is told."""
        body = self.probe.body
        return {
            "probe": self.probe.id,
            **{name: body[name] for name in ("layer", "task", "classes", "identity")},
            "threshold": self.threshold,
            "derived": self.derived,
            "transfer": self.transfer,
        }


async def prediction_work(context: Context, caller: ApiKey, probe: Resource, body: PredictRequest, size: int) -> Work:
    """The job of a prediction, asked for in a body of `size` bytes.

    Raises `IdentityMismatch` unless the states are the probes' own or `transfer` is set, `NotFound` for a further probe
    that is not there or of another owner, and what else the front end can tell.
    """
    webhook = webhook_of(context, body)
    probes = [probe, *[await _further(context, caller, probe, body.also, number) for number in range(len(body.also))]]
    readings = [
        _Reading(one, f"/also/{number - 1}" if number else "", _threshold(one, body.threshold))
        for number, one in enumerate(probes)
    ]
    summary = body.model_dump(exclude={"inputs", "webhook"}, exclude_defaults=True)
    spec: dict[str, Any] = {"probe": probe.id, "per_token": body.per_token, "transfer": body.transfer}
    work = Work(
        kind="prediction",
        lane="cpu",
        spec=spec,
        request={**summary, "probe": probe.id},
        resource_id=new_id("prd"),
        priority=body.priority,
        webhook=webhook,
    )
    if body.inputs is None:
        spec |= await _on_states(context, caller, readings, body)
        work.request["extraction"] = spec["extraction"]
    else:
        chosen({}, body.variant)
        options = _options(readings, body)
        with pointing(None):
            entry = await model_entry(context, options.model, options.quantization)
            if entry.facts is not None:
                resolve_layers(options.layers, entry.facts.num_layers)
        adapter = await _adapter(context, caller, readings[0], entry)
        limits = context.plane.settings.limits
        await context.apart(size, check, entry, options, body.inputs, limits)
        if body.per_token:
            await context.apart(size, _bound_tokens, body.inputs, len(readings), limits.max_json_bytes)
        spec |= options.model_dump() | ({"variants": [wire(adapter)], "paired": False} if adapter else {})
        work.lane = lane_of(entry, options)
        work.rows = await context.apart(size, wire_rows, body.inputs)
        work.inputs = work.request["inputs"] = len(body.inputs)
    spec["readings"] = [one.spec() for one in readings]
    return work


async def _further(context: Context, caller: ApiKey, probe: Resource, also: Sequence[str], number: int) -> Resource:
    pointer, asked = f"/also/{number}", also[number]
    if asked == probe.id or asked in also[:number]:
        raise _invalid("A probe is named twice.", pointer, "name each further probe once, and not the one in the path")
    try:
        found = await resource_of(context, caller, "probe", asked)
        if found.owner != probe.owner:  # as an admin may see
            raise NotFound(f"There is no probe {asked!r} beside {probe.id}.")
    except (NotFound, Expired) as error:
        error.errors = [FieldError(pointer=pointer, detail="name probes of GET /v1/probes")]
        raise
    return found


def _threshold(probe: Resource, asked: str | float | None) -> float | None:
    if asked is None:
        return None
    if probe.body["task"] != "binary":
        detail = f"the probe {probe.id} is one of {probe.body['task']}; leave it out"
        raise _invalid("Only binary probes have a threshold.", "/threshold", detail)
    if not isinstance(asked, str):
        return asked
    known = thresholds_of(probe.body["report"])
    if asked not in known:
        detail = f"the probe {probe.id} has {', '.join(known) or 'none'}; name one of these, or a number from 0 to 1"
        raise _invalid(f"The probe has no threshold {asked}.", "/threshold", detail)
    return known[asked]


# --- stored states ---


async def _on_states(
    context: Context, caller: ApiKey, readings: list[_Reading], body: PredictRequest
) -> dict[str, Any]:
    resource = await resource_of(context, caller, "extraction", body.extraction or "")
    variant = _variant_for(readings[0].identity, resource, body.variant)
    held = Identity.model_validate(resource.body["identity"])
    if variant is not None:
        held.adapter = resource.body["variants"][variant]["digest"]
    whole = held.pooling == "none" and held.positions is None
    if body.per_token and not whole:
        raise _invalid(
            "The extraction does not hold every token.",
            "/per_token",
            "name an extraction with pooling none and no positions, or give the inputs themselves",
        )
    for one in readings:
        if one.probe.body["layer"] not in resource.body["layers"]:
            detail = f"the extraction does not hold layer {one.probe.body['layer']}, which {one.probe.id} reads"
            raise _invalid("The extraction lacks the probe's layer.", one.pointer or "/extraction", detail)
        _require_width(one, resource.body["shape"][-1])
        own = one.identity
        if (own.pooling == "none") != (held.pooling == "none") and not whole:
            raise _unpooled(one, held)
        one.derived = whole
        one.transfer = _differ(one, own, held, body.transfer, () if not whole else _HOW, "The extraction was made")
    return {"extraction": resource.id, "variant": variant}


def _variant_for(identity: Identity, resource: Resource, asked: str | None) -> int | None:
    """Which variant of an extraction a probe is to read: the one asked for, else the one that has its own adapter."""
    variants = resource.body.get("variants")
    if asked is None and variants is not None:
        own = [number for number, one in enumerate(variants) if one["digest"] == identity.adapter]
        if own:
            return own[0]
    return chosen(resource.body, asked)


def _unpooled(one: _Reading, held: Identity) -> InvalidRequest:
    if held.pooling == "none":
        detail = (
            f"it holds some tokens of each input; name one with pooling {one.identity.pooling}, or with every token"
        )
        return _invalid("The states are not pooled.", "/extraction", detail)
    detail = f"the probe {one.probe.id} reads every token of an input; extract with pooling none"
    return _invalid("The extraction holds one vector an input.", "/extraction", detail)


# --- new inputs ---


def _options(readings: list[_Reading], body: PredictRequest) -> ExtractionOptions:
    """The extraction that all probes can read. Raises `IdentityMismatch` when there is none."""
    first = readings[0]
    base, extra = first.identity, first.probe.private.get("options", {})
    width = first.probe.private["hidden_size"]
    for one in readings[1:]:
        _require_width(one, width)
        other = one.probe.private.get("options", {})
        names = [name for name in {**extra, **other} if extra.get(name) != other.get(name)]
        said = f"The probe {first.probe.id} was made"
        one.transfer = _differ(one, one.identity, base, body.transfer, _HOW, said, dict.fromkeys(names, (extra, other)))
    ways = [[getattr(one.identity, name) for name in _HOW] for one in readings]
    shared = not body.per_token and all(way == ways[0] for way in ways)
    for one in readings:
        one.derived = not shared
    return ExtractionOptions(
        model=base.model,
        quantization=base.quantization,
        layers=sorted({one.probe.body["layer"] for one in readings}),
        pooling=base.pooling if shared else "none",
        positions=base.positions if shared else None,  # type: ignore[arg-type]
        template=base.template,  # type: ignore[arg-type]
        add_generation_prompt=base.add_generation_prompt,
        compute_dtype=base.compute_dtype,  # type: ignore[arg-type]
        **extra,
    )


async def _adapter(context: Context, caller: ApiKey, reading: _Reading, entry: ModelEntry) -> Resource | None:
    digest = reading.identity.adapter
    if digest is None:
        return None
    adapter = await of_digest(context, caller, digest, entry)
    if adapter is None:
        raise StateConflict(
            f"The adapter that the probe was trained with ({digest[:12]}…) was deleted; add it again to read new "
            "inputs with it."
        )
    return adapter


def _bound_tokens(inputs: list[Input], probes: int, limit: int) -> None:
    """Refuse an answer of more tokens than are given as JSON."""
    size = sum(token_bound(item) for item in inputs) * (_TOKEN_BYTES + _SCORE_BYTES * probes)
    if size > limit:
        raise TooLarge(
            f"The scores of the tokens are estimated at {size:,} bytes and the limit is {limit:,}: split the inputs "
            "over several requests, or leave out per_token.",
            estimate=size,
            limit=limit,
        )


# --- both ---


def _require_width(one: _Reading, width: int) -> None:
    own = one.probe.private["hidden_size"]
    if own != width:
        detail = f"these states have {width} numbers, the probe {one.probe.id} reads {own}; no transfer is possible"
        raise _invalid("The states are of another width than the probe's.", one.pointer or "/extraction", detail)


def _differ(
    one: _Reading,
    own: Identity,
    held: Identity,
    transfer: bool,
    apart_from: Sequence[str],
    made: str,
    options: dict[str, tuple[dict[str, Any], dict[str, Any]]] | None = None,
) -> bool:
    """Whether states that are `held` are of another identity than a probe's `own`; raises unless that is asked for."""
    pairs = {
        name: (getattr(held, name), getattr(own, name)) for name in Identity.model_fields if name not in apart_from
    }
    pairs |= {name: (theirs.get(name), mine.get(name)) for name, (theirs, mine) in (options or {}).items()}
    fields = [name for name, (theirs, mine) in pairs.items() if theirs != mine]
    if fields and not transfer:
        said = "; ".join(f"{name} {pairs[name][0]!r} where {one.probe.id} has {pairs[name][1]!r}" for name in fields)
        errors = [FieldError(pointer=one.pointer, detail="name a probe made alike, or set transfer")]
        raise IdentityMismatch(
            f"{made} under another identity: {said}. Set transfer to use the probe all the same.",
            errors=errors if one.pointer else None,
            differs=fields,
        )
    return bool(fields)


def _invalid(what: str, pointer: str, detail: str) -> InvalidRequest:
    return InvalidRequest(what, errors=[FieldError(pointer=pointer, detail=detail)])
