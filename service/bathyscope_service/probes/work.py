"""From a valid request for a probe or a prediction to its job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import Request

from bathyscope.errors import FieldError, IdentityMismatch, InvalidRequest, NotBuilt, StateConflict
from bathyscope.types import ExtractionOptions, Identity, PredictRequest, ProbeRequest
from bathyscope_backplane.artifacts import Resource
from bathyscope_backplane.ids import new_id
from bathyscope_backplane.keys import ApiKey
from bathyscope_service.context import Context
from bathyscope_service.extractions.checks import check, lane_of, model_entry
from bathyscope_service.extractions.endpoints import extraction_work
from bathyscope_service.jobs.submission import Work, refuse_webhook, submit
from bathyscope_service.jobs.views import job_of
from bathyscope_service.resources import resource_of

_BUILT_BASELINES = {"length", "shuffled_labels"}


async def probe_work(context: Context, request: Request, caller: ApiKey, body: ProbeRequest) -> tuple[Work, str | None]:
    """The job of a probe, and the id of the extraction job that was queued for it alone.

    `extraction` may be an `ext_…` that exists, or the `job_…` of one in the making.
    """
    refuse_webhook(body)
    _refuse_unbuilt(body)
    labels = body.labels if isinstance(body.labels, list) else []
    parents: tuple[str, ...] = ()
    made_here: str | None = None
    rows: int | None
    if body.data is not None:
        data = await extraction_work(context, body.data)
        if body.data.pooling == "none":
            raise _needs_pooling("/data/pooling")
        rows, extraction_id = len(data.rows or []), data.resource_id
        _check_lengths(body, rows)
        data.part, data.priority = "data", body.priority
        parent, replayed = await submit(context, request, caller, data)
        parents, made_here = (parent,), None if replayed else parent
        extraction_id = (await job_of(context, caller, parent)).resource_id
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
        if record.request.get("pooling") == "none":
            raise _needs_pooling("/extraction")
    else:
        resource = await resource_of(context, caller, "extraction", body.extraction or "")
        rows, extraction_id = resource.body["inputs"], resource.id
        if resource.body["pooling"] == "none":
            raise _needs_pooling("/extraction")
        _check_layers(body, resource)
    if rows is not None:
        _check_lengths(body, rows)
    spec = body.model_dump(exclude={"labels", "groups", "split", "data", "priority", "webhook"})
    groups: Sequence[Any] = body.groups or [None] * len(labels)
    split: Sequence[Any] = body.split or [None] * len(labels)
    return (
        Work(
            kind="probe",
            lane="cpu",
            spec={**spec, "extraction": extraction_id},
            rows=[list(row) for row in zip(labels, groups, split, strict=True)],
            request={
                **body.model_dump(exclude={"labels", "groups", "split", "data"}, exclude_defaults=True),
                "extraction": extraction_id,
                "labels": len(labels),
            },
            resource_id=new_id("prb"),
            priority=body.priority,
            parents=parents,
        ),
        made_here,
    )


def _refuse_unbuilt(body: ProbeRequest) -> None:
    later = {
        'labels "correct"': body.labels == "correct",
        f"the estimator {body.estimator}": body.estimator != "logistic",
        "regression": body.task == "regression",
        f"the calibration {body.calibration}": body.calibration != "none",
        "variant": body.variant is not None,
        "a baseline other than length and shuffled_labels": not set(body.baselines) <= _BUILT_BASELINES,
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


def _check_layers(body: ProbeRequest, resource: Resource) -> None:
    if body.layers == "all":
        return
    held = resource.body["layers"]
    depth = resource.body["num_layers"]
    found = [
        FieldError(pointer=f"/layers/{number}", detail=f"the extraction holds the layers {', '.join(map(str, held))}")
        for number, layer in enumerate(body.layers)
        if (layer + depth + 1 if layer < 0 else layer) not in held
    ]
    if found:
        raise InvalidRequest("A layer is not in the extraction.", errors=found)


def _needs_pooling(pointer: str) -> InvalidRequest:
    detail = "a probe of this kind reads one vector an input; extract with pooling last, mean, max or first"
    return InvalidRequest("The states are not pooled.", errors=[FieldError(pointer=pointer, detail=detail)])


async def prediction_work(context: Context, caller: ApiKey, probe: Resource, body: PredictRequest) -> Work:
    """The job of a prediction. Raises `IdentityMismatch` unless the states are the probe's own or `transfer` is set."""
    refuse_webhook(body)
    if body.per_token or body.also:
        raise NotBuilt("per_token and also are part of the contract and not offered by this version.")
    identity = Identity.model_validate(probe.body["identity"])
    spec: dict[str, Any] = {"probe": probe.id, "layer": probe.body["layer"], "transfer": False}
    summary = body.model_dump(exclude={"inputs"}, exclude_defaults=True)
    if body.inputs is None:
        resource = await resource_of(context, caller, "extraction", body.extraction or "")
        spec |= {"extraction": resource.id, "transfer": _compare(probe, identity, resource, transfer=body.transfer)}
        return Work(
            kind="prediction",
            lane="cpu",
            spec=spec,
            request={**summary, "probe": probe.id, "extraction": resource.id},
            resource_id=new_id("prd"),
            priority=body.priority,
        )
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
    entry = await model_entry(context, options.model, options.quantization)
    check(entry, options, body.inputs, context.plane.settings.limits)
    return Work(
        kind="prediction",
        lane=lane_of(entry, options),
        spec={**options.model_dump(), **spec},
        rows=[item if isinstance(item, str) else item.model_dump() for item in body.inputs],
        request={**summary, "probe": probe.id, "inputs": len(body.inputs)},
        resource_id=new_id("prd"),
        priority=body.priority,
    )


def _compare(probe: Resource, identity: Identity, resource: Resource, *, transfer: bool) -> bool:
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
