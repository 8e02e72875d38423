"""From a valid request for a probe or a prediction to its job."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from fastapi import Request

from bathyscope._estimators import TOKEN_ESTIMATORS, check_estimator
from bathyscope._fold_checks import check_rows
from bathyscope.errors import (
    FieldError,
    InvalidRequest,
    ModelUnknown,
    StateConflict,
    Unavailable,
)
from bathyscope.types import ExtractionRequest, ProbeRequest
from bathyscope_backplane.ids import new_id
from bathyscope_backplane.keys import ApiKey
from bathyscope_backplane.one_answer import refuse_one_answer
from bathyscope_service.adapters.variants import chosen, place_of
from bathyscope_service.context import Context
from bathyscope_service.extractions.checks import resolve_layers
from bathyscope_service.extractions.endpoints import extraction_work
from bathyscope_service.jobs.submission import Work, cancel, submit, webhook_of
from bathyscope_service.jobs.views import job_of
from bathyscope_service.problems import pointing
from bathyscope_service.resources import resource_of


async def probe_work(context: Context, request: Request, caller: ApiKey, body: ProbeRequest) -> tuple[Work, str | None]:
    """The job of a probe, and the id of the extraction job that was queued for it alone, by this request.

    `extraction` may be an `ext_…` that exists, or the `job_…` of one in the making.
    """
    _check_settings(body)
    webhook = webhook_of(context, body)
    parents: tuple[str, ...] = ()
    made_here: str | None = None
    charged = 0
    rows: int | None
    if body.data is not None:
        _check_scored(body, body.data.score_choices, "set score_choices in data")
        with pointing("/data"):
            data = await extraction_work(context, caller, body.data, request.state.body_bytes)
        _check_pooling(body, body.data.pooling, "/data/pooling")
        rows = len(data.rows or [])
        _check_lengths(body, rows)
        await context.apart(request.state.body_bytes, _check_rows, body)
        variant = _asked(body.data.adapter, body.variant)
        held, depth = await layers_of(context, body.data.model, body.data.layers)
        _check_layers(body, held, depth)
        _check_resamples(body, rows, held, depth, context.plane.settings.limits.max_resampled)
        data.priority = body.priority
        charged, data.inputs = data.inputs, 0  # with the probe's own job, which may still be refused
        parent, extraction_id, replayed = await submit_parent(context, request, caller, data)
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
        _check_scored(body, record.request.get("score_choices", False))
        # A stage of an experiment may have found what an earlier one made.
        made = record.resource.rpartition("/")[2] if record.resource is not None else record.resource_id
        rows, extraction_id, parents = record.request.get("inputs"), made, (record.id,)
        variant = _asked(record.request.get("adapter"), body.variant)
        asked = record.request.get("layers", "all")
        held, depth = await layers_of(context, record.request.get("model", ""), asked)
        _check_pooling(body, record.request.get("pooling", "last"), "/extraction")
    else:
        resource = await resource_of(context, caller, "extraction", body.extraction or "")
        rows, extraction_id = resource.body["inputs"], resource.id
        _check_pooling(body, resource.body["pooling"], "/extraction")
        variant = chosen(resource.body, body.variant)
        _check_scored(body, "choices" in resource.blobs)
        if body.labels == "correct":
            scored = resource.body["scored"]
            mine = scored if variant is None else scored[variant]
            refuse_one_answer(mine["correct"], mine["answered"])
        held, depth = resource.body["layers"], resource.body["num_layers"]
    if body.data is None:
        _check_layers(body, held, depth)
        if rows is not None:
            _check_lengths(body, rows)
            _check_resamples(body, rows, held, depth, context.plane.settings.limits.max_resampled)
        await context.apart(request.state.body_bytes, _check_rows, body)
    spec = body.model_dump(exclude={"labels", "groups", "split", "data", "priority", "webhook"})
    labels: Sequence[Any] = body.labels if isinstance(body.labels, list) else [None] * (rows or 0)
    return (
        Work(
            kind="probe",
            lane="cpu",
            spec={
                **spec,
                "extraction": extraction_id,
                "variant": variant,
                "labels": "correct" if body.labels == "correct" else None,
                "split": body.split if isinstance(body.split, str) else None,
            },
            rows=rows_of(labels, body.groups, body.split),
            request={
                **body.model_dump(exclude={"labels", "groups", "split", "data", "webhook"}, exclude_defaults=True),
                "extraction": extraction_id,
                "labels": "correct" if body.labels == "correct" else len(labels),
                **({"data": _data(body.data, rows), "jobs": list(parents)} if body.data is not None else {}),
            },
            resource_id=new_id("prb"),
            priority=body.priority,
            webhook=webhook,
            parents=parents,
            inputs=charged,
        ),
        made_here,
    )


def rows_of(labels: Sequence[Any], groups: Sequence[Any] | None, split: Any) -> list[Any]:
    """Label, group and place of each row; null for what is not given, and for a split that has only a name."""
    each = split if isinstance(split, list) else [None] * len(labels)
    return [list(row) for row in zip(labels, groups or [None] * len(labels), each, strict=True)]


def _data(data: ExtractionRequest, rows: int | None) -> dict[str, Any]:
    """What clients see of a probe's `data`."""
    named = {} if data.dataset is None else {"dataset": data.dataset.model_dump(exclude_defaults=True)}
    return {"inputs": rows, **named}


def _asked(adapter: str | list[str] | None, variant: str | None) -> int | None:
    """The place of a variant among those that an extraction in the making will have; null when it has none."""
    if isinstance(adapter, list):
        return place_of(adapter, variant)
    return chosen({}, variant)


async def submit_parent(
    context: Context, request: Request, caller: ApiKey, work: Work, part: str = "data"
) -> tuple[str, str | None, bool]:
    """Queue the extraction of a probe: its job, what it makes, and whether an earlier request queued it.

    `part` tells the extractions of one request apart.

    Of an earlier one with the same Idempotency-Key that did not succeed a new one is made, under a key of its own.
    """
    work.part = part
    while True:
        parent, replayed = await submit(context, request, caller, work)
        if not replayed:
            return parent, work.resource_id, False
        record = await job_of(context, caller, parent)
        if not record.cancel_requested and record.status not in ("failed", "cancelled", "expired"):
            return parent, record.resource_id, True
        work.part = f"{part} after {parent}"


async def drop_parent(context: Context, job_id: str) -> None:
    """End the extraction of a probe that was not made, and its Idempotency-Key with it."""
    with contextlib.suppress(Unavailable, StateConflict):
        if (record := await context.plane.broker.get(job_id)) is not None:
            await cancel(context, record)
            await context.plane.broker.forget(job_id)


async def layers_of(context: Context, model: str, asked: list[int] | str) -> tuple[list[int] | None, int | None]:
    """The layers that an extraction in the making will hold, and the model's blocks; null while not known."""
    try:
        entry = await context.plane.workers.entry(context.plane.registry, model)
        if entry.facts is None:
            return None, None
        return resolve_layers(asked, entry.facts.num_layers), entry.facts.num_layers
    except (ModelUnknown, InvalidRequest):  # the job says so itself
        return None, None


def _check_settings(body: ProbeRequest) -> None:
    """Refuse settings that do not go together whatever the states are."""
    check_estimator(body.estimator, penalised=body.C is not None, covariance=body.covariance, task=None)
    found = []
    regression = body.task == "regression" or (
        body.task == "auto" and any(isinstance(label, float) and not label.is_integer() for label in body.labels or ())
    )
    if body.labels == "correct" and body.task in ("multiclass", "regression"):
        found.append(FieldError(pointer="/task", detail="right or wrong are two classes: use auto or binary"))
    elif regression and body.calibration != "none":
        detail = "a regression gives values, no probabilities that could be calibrated: use none"
        found.append(FieldError(pointer="/calibration", detail=detail))
    if body.split == "grouped" and not body.groups:
        found.append(FieldError(pointer="/split", detail="a grouped split needs groups, one a row; or use stratified"))
    if found:
        raise InvalidRequest("These settings do not go together.", errors=found)


def _check_pooling(body: ProbeRequest, pooling: str | None, pointer: str) -> None:
    """Refuse an estimator that reads other states than these; `pointer` is where those are asked for."""
    if pooling is None or (pooling == "none") == (body.estimator in TOKEN_ESTIMATORS):
        return
    if pooling == "none":
        raise InvalidRequest(
            "The states are not pooled.",
            errors=[
                FieldError(
                    pointer=pointer,
                    detail=f"a {body.estimator} probe reads one vector an input; extract with pooling last, mean, max "
                    f"or first, or use the estimator {' or '.join(TOKEN_ESTIMATORS)}",
                )
            ],
        )
    raise InvalidRequest(
        "The states are pooled.",
        errors=[
            FieldError(
                pointer=pointer, detail=f"{body.estimator} reads the states of every token; extract with pooling none"
            )
        ],
    )


def _check_scored(body: ProbeRequest, scored: bool, remedy: str = "make one with score_choices") -> None:
    """Refuse what is read from the scores of choices where there are none."""
    if scored:
        return
    found = []
    if body.labels == "correct":
        found.append(FieldError(pointer="/labels", detail=f"nothing says whether the model is right; {remedy}"))
    if "model_confidence" in body.baselines:
        pointer = f"/baselines/{body.baselines.index('model_confidence')}"
        found.append(FieldError(pointer=pointer, detail=f"nothing says how sure the model is; {remedy}"))
    if found:
        raise InvalidRequest("The extraction's choices are not scored.", errors=found)


def _check_lengths(body: ProbeRequest, rows: int) -> None:
    found = [
        FieldError(pointer=f"/{name}", detail=f"{len(values)} values for {rows} inputs; give one for each")
        for name, values in (("labels", body.labels), ("groups", body.groups), ("split", body.split))
        if isinstance(values, list) and len(values) != rows
    ]
    if found:
        raise InvalidRequest("Labels, groups and split go with the inputs, one for each.", errors=found)


def _check_rows(body: ProbeRequest) -> None:
    """Refuse labels, groups and a split of which no probe can be learned, whatever the states are."""
    if isinstance(body.labels, list):
        task = check_rows(body.labels, task=body.task, groups=body.groups, split=body.split, folds=body.folds)
        check_estimator(body.estimator, penalised=body.C is not None, covariance=body.covariance, task=task)


def _check_resamples(body: ProbeRequest, rows: int, held: list[int] | None, depth: int | None, most: int) -> None:
    """Refuse intervals that would take a worker many minutes."""
    known = len(held) if held is not None else 1 if depth is None else depth + 1
    layers = known if body.layers == "all" else len(body.layers)
    if rows * layers * body.bootstrap > most:
        detail = f"{body.bootstrap:,} resamples of {rows:,} rows at {layers} layers are {most:,} at most together"
        room = most // (rows * layers)
        raise InvalidRequest(
            "The intervals would take too long.",
            errors=[
                FieldError(pointer="/bootstrap", detail=f"{detail}: ask for {room:,} at most, or for fewer layers")
            ],
        )


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
