"""From a valid request for a probe or a prediction to its job."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from fastapi import Request

from bathyscope.errors import (
    FieldError,
    IdentityMismatch,
    InvalidRequest,
    ModelUnknown,
    NotBuilt,
    StateConflict,
    Unavailable,
)
from bathyscope.types import ExtractionOptions, Identity, PredictRequest, ProbeRequest
from bathyscope_backplane.artifacts import Resource
from bathyscope_backplane.ids import new_id
from bathyscope_backplane.keys import ApiKey
from bathyscope_service.adapters.variants import chosen, of_digest, place_of, wire
from bathyscope_service.context import Context
from bathyscope_service.extractions.checks import check, lane_of, model_entry, refuse_prompts, resolve_layers, wire_rows
from bathyscope_service.extractions.endpoints import extraction_work
from bathyscope_service.jobs.submission import Work, submit, webhook_of
from bathyscope_service.jobs.views import job_of
from bathyscope_service.problems import pointing
from bathyscope_service.resources import resource_of

_BUILT_BASELINES = {"length", "shuffled_labels"}


async def probe_work(context: Context, request: Request, caller: ApiKey, body: ProbeRequest) -> tuple[Work, str | None]:
    """The job of a probe, and the id of the extraction job that was queued for it alone, by this request.

    `extraction` may be an `ext_…` that exists, or the `job_…` of one in the making.
    """
    _refuse_unbuilt(body)
    webhook = webhook_of(context, body)
    labels = body.labels if isinstance(body.labels, list) else []
    parents: tuple[str, ...] = ()
    made_here: str | None = None
    charged = 0
    rows: int | None
    if body.data is not None:
        with pointing("/data"):
            data = await extraction_work(context, caller, body.data, request.state.body_bytes)
        if body.data.pooling == "none":
            raise _needs_pooling("/data/pooling")
        rows = len(data.rows or [])
        _check_lengths(body, rows)
        variant = _asked(body.data.adapter, body.variant)
        _check_layers(body, *await _layers_of(context, body.data.model, body.data.layers))
        data.priority = body.priority
        charged, data.inputs = data.inputs, 0  # with the probe's own job, which may still be refused
        parent, extraction_id, replayed = await _submit_parent(context, request, caller, data)
        parents, made_here = (parent,), None if replayed else parent
    elif body.extraction is not None and body.extraction.startswith("job_"):
        record = await job_of(context, caller, body.extraction)
        if record.kind != "extraction":
            raise InvalidRequest(
                "The job does not make an extraction.",
                errors=[FieldError(pointer="/extraction", detail=f"it makes a {record.kind}")],
            )
        if record.status in ("failed", "cancelled", "expired"):
            raise StateConflict(f"The extraction's job is {record.status}; make the extraction anew.")
        rows, extraction_id, parents = record.request.get("inputs"), record.resource_id, (record.id,)
        variant = _asked(record.request.get("adapter"), body.variant)
        asked = record.request.get("layers", "all")
        _check_layers(body, *await _layers_of(context, record.request.get("model", ""), asked))
        if record.request.get("pooling") == "none":
            raise _needs_pooling("/extraction")
    else:
        resource = await resource_of(context, caller, "extraction", body.extraction or "")
        rows, extraction_id = resource.body["inputs"], resource.id
        if resource.body["pooling"] == "none":
            raise _needs_pooling("/extraction")
        variant = chosen(resource.body, body.variant)
        _check_layers(body, resource.body["layers"], resource.body["num_layers"])
    if rows is not None:
        _check_lengths(body, rows)
    spec = body.model_dump(exclude={"labels", "groups", "split", "data", "priority", "webhook"})
    groups: Sequence[Any] = body.groups or [None] * len(labels)
    split: Sequence[Any] = body.split or [None] * len(labels)
    return (
        Work(
            kind="probe",
            lane="cpu",
            spec={**spec, "extraction": extraction_id, "variant": variant},
            rows=[list(row) for row in zip(labels, groups, split, strict=True)],
            request={
                **body.model_dump(exclude={"labels", "groups", "split", "data", "webhook"}, exclude_defaults=True),
                "extraction": extraction_id,
                "labels": len(labels),
            },
            resource_id=new_id("prb"),
            priority=body.priority,
            webhook=webhook,
            parents=parents,
            inputs=charged,
        ),
        made_here,
    )


def _asked(adapter: str | list[str] | None, variant: str | None) -> int | None:
    """The place of a variant among those that an extraction in the making will have; null when it has none."""
    if isinstance(adapter, list):
        return place_of(adapter, variant)
    return chosen({}, variant)


async def _submit_parent(
    context: Context, request: Request, caller: ApiKey, work: Work
) -> tuple[str, str | None, bool]:
    """Queue the extraction of a probe: its job, what it makes, and whether an earlier request queued it.

    Of an earlier one with the same Idempotency-Key that did not succeed a new one is made, under a key of its own.
    """
    work.part = "data"
    while True:
        parent, replayed = await submit(context, request, caller, work)
        if not replayed:
            return parent, work.resource_id, False
        record = await job_of(context, caller, parent)
        if not record.cancel_requested and record.status not in ("failed", "cancelled", "expired"):
            return parent, record.resource_id, True
        work.part = f"data after {parent}"


async def drop_parent(context: Context, job_id: str) -> None:
    """End the extraction of a probe that was not made, and its Idempotency-Key with it."""
    with contextlib.suppress(Unavailable, StateConflict):
        await context.plane.broker.cancel(job_id)
        await context.plane.broker.forget(job_id)


async def _layers_of(context: Context, model: str, asked: list[int] | str) -> tuple[list[int] | None, int | None]:
    """The layers that an extraction in the making will hold, and the model's blocks; null while not known."""
    try:
        entry = await context.plane.workers.entry(context.plane.registry, model)
        if entry.facts is None:
            return None, None
        return resolve_layers(asked, entry.facts.num_layers), entry.facts.num_layers
    except (ModelUnknown, InvalidRequest):  # the job says so itself
        return None, None


def _refuse_unbuilt(body: ProbeRequest) -> None:
    later = {
        'labels "correct"': body.labels == "correct",
        f"the estimator {body.estimator}": body.estimator != "logistic",
        "regression": body.task == "regression",
        f"the calibration {body.calibration}": body.calibration != "none",
        "a baseline other than length and shuffled_labels": not set(body.baselines) <= _BUILT_BASELINES,
        "regression, which labels that are not whole numbers mean,": any(
            isinstance(label, float) and not label.is_integer() for label in body.labels
        ),
    }
    for name, asked in later.items():
        if asked:
            raise NotBuilt(f"{name[0].upper()}{name[1:]}: part of the contract and not offered by this version.")


def _check_lengths(body: ProbeRequest, rows: int) -> None:
    found = [
        FieldError(pointer=f"/{name}", detail=f"{len(values)} values for {rows} inputs; give one for each")
        for name, values in (("labels", body.labels), ("groups", body.groups), ("split", body.split))
        if isinstance(values, list) and len(values) != rows
    ]
    if found:
        raise InvalidRequest("Labels, groups and split go with the inputs, one for each.", errors=found)


def _check_layers(body: ProbeRequest, held: list[int] | None, depth: int | None) -> None:
    """Refuse a layer that the extraction lacks or that comes twice, as far as its layers are known."""
    if body.layers == "all":
        return
    seen: set[int] = set()
    found: list[FieldError] = []
    for number, asked in enumerate(body.layers):
        layer = asked + depth + 1 if asked < 0 and depth is not None else asked
        detail = None
        if layer in seen:
            detail = f"layer {layer} is named twice"
        elif held is not None and layer not in held:
            detail = f"the extraction holds the layers {', '.join(map(str, held))}"
        if detail is not None:
            found.append(FieldError(pointer=f"/layers/{number}", detail=detail))
        seen.add(layer)
    if found:
        raise InvalidRequest("The layers do not fit the extraction.", errors=found[:50])


def _needs_pooling(pointer: str) -> InvalidRequest:
    detail = "a probe of this kind reads one vector an input; extract with pooling last, mean, max or first"
    return InvalidRequest("The states are not pooled.", errors=[FieldError(pointer=pointer, detail=detail)])


async def prediction_work(context: Context, caller: ApiKey, probe: Resource, body: PredictRequest, size: int) -> Work:
    """The job of a prediction, asked for in a body of `size` bytes.

    Raises `IdentityMismatch` unless the states are the probe's own or `transfer` is set."""
    webhook = webhook_of(context, body)
    if body.per_token or body.also:
        raise NotBuilt("per_token and also are part of the contract and not offered by this version.")
    identity = Identity.model_validate(probe.body["identity"])
    spec: dict[str, Any] = {"probe": probe.id, "layer": probe.body["layer"], "transfer": False}
    summary = body.model_dump(exclude={"inputs", "webhook"}, exclude_defaults=True)
    if body.inputs is None:
        resource = await resource_of(context, caller, "extraction", body.extraction or "")
        variant = _variant_for(identity, resource, body.variant)
        transfer = _compare(probe, identity, resource, variant, transfer=body.transfer)
        spec |= {"extraction": resource.id, "variant": variant, "transfer": transfer}
        return Work(
            kind="prediction",
            lane="cpu",
            spec=spec,
            request={**summary, "probe": probe.id, "extraction": resource.id},
            resource_id=new_id("prd"),
            priority=body.priority,
            webhook=webhook,
        )
    chosen({}, body.variant)
    options = ExtractionOptions(
        model=identity.model,
        quantization=identity.quantization,
        layers=[probe.body["layer"]],
        pooling=identity.pooling,
        positions=identity.positions,  # type: ignore[arg-type]
        template=identity.template,  # type: ignore[arg-type]
        add_generation_prompt=identity.add_generation_prompt,
        compute_dtype=identity.compute_dtype,  # type: ignore[arg-type]
        **probe.private.get("options", {}),
    )
    refuse_prompts(body.inputs)
    with pointing(None):
        entry = await model_entry(context, options.model, options.quantization)
    adapter = None
    if identity.adapter is not None and (adapter := await of_digest(context, caller, identity.adapter, entry)) is None:
        raise StateConflict(
            f"The adapter that the probe was trained with ({identity.adapter[:12]}…) was deleted; add it again to read "
            "new inputs with it."
        )
    await context.apart(size, check, entry, options, body.inputs, context.plane.settings.limits)
    return Work(
        kind="prediction",
        lane=lane_of(entry, options),
        spec={**options.model_dump(), **spec, **({"variants": [wire(adapter)], "paired": False} if adapter else {})},
        rows=await context.apart(size, wire_rows, body.inputs),
        request={**summary, "probe": probe.id, "inputs": len(body.inputs)},
        resource_id=new_id("prd"),
        priority=body.priority,
        webhook=webhook,
        inputs=len(body.inputs),
    )


def _variant_for(identity: Identity, resource: Resource, asked: str | None) -> int | None:
    """Which variant of an extraction a probe is to read: the one asked for, else the one that has its own adapter."""
    variants = resource.body.get("variants")
    if asked is None and variants is not None:
        own = [number for number, one in enumerate(variants) if one["digest"] == identity.adapter]
        if own:
            return own[0]
    return chosen(resource.body, asked)


def _compare(probe: Resource, identity: Identity, resource: Resource, variant: int | None, *, transfer: bool) -> bool:
    """Whether the states are of another identity; raises unless that is asked for."""
    if probe.body["layer"] not in resource.body["layers"]:
        raise InvalidRequest(
            "The extraction lacks the probe's layer.",
            errors=[FieldError(pointer="/extraction", detail=f"it does not hold layer {probe.body['layer']}")],
        )
    if resource.body["pooling"] == "none":
        raise _needs_pooling("/extraction")
    if resource.body["shape"][-1] != probe.private["hidden_size"]:
        raise InvalidRequest(
            "The extraction is of another width than the probe.",
            errors=[
                FieldError(
                    pointer="/extraction",
                    detail=f"its states have {resource.body['shape'][-1]} numbers, the probe reads "
                    f"{probe.private['hidden_size']}; no transfer is possible",
                )
            ],
        )
    other = Identity.model_validate(resource.body["identity"])
    if variant is not None:
        other.adapter = resource.body["variants"][variant]["digest"]
    fields = [name for name in Identity.model_fields if getattr(identity, name) != getattr(other, name)]
    if fields and not transfer:
        differing = "; ".join(
            f"{name} {getattr(other, name)!r} where the probe has {getattr(identity, name)!r}" for name in fields
        )
        raise IdentityMismatch(
            f"The extraction was made under another identity: {differing}. Set transfer to use the probe all the same.",
            differs=fields,
        )
    return bool(fields)
