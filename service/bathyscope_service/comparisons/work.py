"""From a valid request for a comparison to its job, and to the extractions it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import Request

from bathyscope._estimators import check_estimator
from bathyscope._fold_checks import check_rows
from bathyscope.errors import FieldError, InvalidRequest, ProblemError, Unavailable
from bathyscope.types import AdapterRequest, ComparisonRequest, ExtractionOptions, ExtractionRequest, ProbeRequest
from bathyscope_backplane.ids import new_id
from bathyscope_backplane.keys import ApiKey
from bathyscope_service.adapters.variants import BASE
from bathyscope_service.adapters.work import adapter_work
from bathyscope_service.comparisons.variants import Asked, Named, named
from bathyscope_service.context import Context
from bathyscope_service.extractions.endpoints import extraction_work
from bathyscope_service.jobs.submission import Work, webhook_of
from bathyscope_service.probes.work import drop_parent, layers_of, rows_of, submit_parent

_OPTIONS = tuple(name for name in ExtractionOptions.model_fields if name not in ("adapter", "quantization"))
_PROBE = (
    "task",
    "estimator",
    "C",
    "standardize",
    "covariance",
    "folds",
    "near_duplicates",
    "calibration",
    "bootstrap",
    "target_fpr",
    "seed",
)


async def comparison_work(
    context: Context, request: Request, caller: ApiKey, body: ComparisonRequest
) -> tuple[Work, list[str]]:
    """The job of a comparison, and the ids of the jobs that were queued for it alone, by this request: of adapters that
    are still to be fetched, and of extractions.

    The inputs of a dataset are there already. Everything that can be told here is, before anything is queued.
    """
    webhook = webhook_of(context, body)
    inputs = body.inputs or []
    await context.apart(request.state.body_bytes, _check_rows, body, len(inputs))
    found = Asked()
    if body.variants is not None:
        found = await named(context, request, caller, body.variants, body.model)
        # The base stands for what is still to be fetched, until all else is checked.
        adapters = [one.adapter or BASE for one in found.variants]
        # Part of the name: a run may have changed when a request comes again that did not get as far as its own job.
        read = " ".join(str(one.source or one.adapter) for one in found.variants)
        asked: list[tuple[str, Any, Any]] = [(f"data {read}", adapters, body.quantization)]
    else:
        asked = [(f"data {one}", body.adapter, one) for one in body.quantizations or ()]
    variants, works = found.variants, []
    for number, (_, adapter, quantization) in enumerate(asked):
        data = ExtractionRequest.model_construct(
            **{name: getattr(body, name) for name in _OPTIONS},
            adapter=adapter,
            quantization=quantization,
            inputs=inputs,
            priority=body.priority,
        )
        with _moved(_pointers(variants, number)):
            works.append(await extraction_work(context, caller, data, request.state.body_bytes, repeats=True))
    await check_resamples(context, body, body.bootstrap, len(inputs), len(variants) or len(asked))
    charged = 0
    parents: list[str] = []
    pending = [one for one in variants if one.adapter is None]
    made_here: list[str] = []
    extractions: list[str | None] = []
    try:
        if pending:
            await _fetch(context, request, caller, body, pending, made_here)
            follow(works[0], [str(one.adapter) for one in variants])
        for (part, _, _), work in zip(asked, works, strict=True):
            charged, work.inputs = charged + work.inputs, 0  # with the comparison's own job, which may still be refused
            work.credentials = False
            parent, extraction, replayed = await submit_parent(context, request, caller, work, part)
            parents.append(parent)
            extractions.append(extraction)
            if not replayed:
                made_here.append(parent)
    except Unavailable:
        raise  # whether the last is queued is not known
    except ProblemError:
        for parent in reversed(made_here):
            await drop_parent(context, parent)
        raise
    if variants:
        parts: list[dict[str, Any]] = [
            {"extraction": extractions[0], "variant": place, "name": one.name, "source": one.source, "step": one.step}
            for place, one in enumerate(variants)
        ]
    else:
        parts = [
            {"extraction": extraction, "variant": None, "name": quantization}
            for extraction, (_, _, quantization) in zip(extractions, asked, strict=True)
        ]
    compares = "quantizations" if not variants else "checkpoints" if found.runs else "adapters"
    return (
        Work(
            kind="comparison",
            lane="cpu",
            spec={
                **settings(body),
                "name": body.name,
                "metadata": body.metadata,
                "model": body.model,
                "compares": compares,
                "parts": parts,
                "notices": found.notices,
            },
            rows=rows_of(body.labels or [], body.groups, body.split),
            request={
                **body.model_dump(exclude={"inputs", "labels", "groups", "split", "webhook"}, exclude_defaults=True),
                "inputs": len(inputs),
                "labels": len(body.labels or []),
                "jobs": [*(one.adapter for one in pending), *parents],
                **({"compared": [one.name for one in variants]} if found.runs else {}),
                **({"notices": found.notices} if found.notices else {}),
            },
            resource_id=new_id("cmp"),
            priority=body.priority,
            webhook=webhook,
            parents=tuple(parents),
            inputs=charged,
            credentials=False,
        ),
        made_here,
    )


def settings(body: ComparisonRequest | ProbeRequest) -> dict[str, Any]:
    """What the probes of all variants have in common."""
    split = body.split if isinstance(body.split, str) else None
    return {**{name: getattr(body, name) for name in _PROBE}, "split": split}


async def _fetch(
    context: Context,
    request: Request,
    caller: ApiKey,
    body: ComparisonRequest,
    pending: list[Named],
    made_here: list[str],
) -> None:
    """Queue the jobs of adapters that are to be fetched; `made_here` gets those that this request made."""
    for one in pending:
        asked = AdapterRequest(source=str(one.source), base_model=body.model, priority=body.priority)
        work = await adapter_work(context, caller, asked)
        one.adapter, _, replayed = await submit_parent(context, request, caller, work, f"fetch {one.source}")
        if not replayed:
            made_here.append(one.adapter)


def follow(work: Work, adapters: list[str]) -> None:
    """Let the extraction of variants come after the jobs of adapters among them (`job_…`), and read what they make."""
    jobs = {place: one for place, one in enumerate(adapters) if one.startswith("job_")}
    for place, job in jobs.items():
        work.spec["variants"][place] = {"job": job}
    work.request["adapter"] = adapters
    work.parents, work.rows_each = tuple(jobs.values()), 0  # what waits for another job runs whole


def _pointers(variants: list[Named], number: int) -> Callable[[str], str]:
    """From a pointer into an extraction's request to one into the comparison's."""

    def moved(pointer: str) -> str:
        if variants and pointer.startswith("/adapter/"):
            place = int(pointer.rpartition("/")[2])
            return variants[place].pointer if place < len(variants) else "/variants"
        if variants and pointer == "/adapter":
            return "/variants"
        if not variants and pointer == "/quantization":
            return f"/quantizations/{number}"
        return pointer

    return moved


@contextmanager
def _moved(pointers: Callable[[str], str]) -> Iterator[None]:
    try:
        yield
    except ProblemError as error:
        error.errors = [FieldError(pointer=pointers(one["pointer"]), detail=one["detail"]) for one in error.errors]
        raise


def _check_rows(body: ComparisonRequest, rows: int) -> None:
    """Refuse labels, groups and a split of which no probe can be learned, whatever the states are."""
    found = [
        FieldError(pointer=f"/{name}", detail=f"{len(values)} values for {rows} inputs; give one for each")
        for name, values in (("labels", body.labels), ("groups", body.groups), ("split", body.split))
        if isinstance(values, list) and len(values) != rows
    ]
    if body.split == "grouped" and not body.groups:
        found.append(FieldError(pointer="/split", detail="a grouped split needs groups, one a row; or use stratified"))
    if found:
        raise InvalidRequest("Labels, groups and split go with the inputs, one for each.", errors=found)
    task = check_rows(body.labels or [], task=body.task, groups=body.groups, split=body.split, folds=body.folds)
    check_estimator(body.estimator, penalised=body.C is not None, covariance=body.covariance, task=task)
    if task == "regression" and body.calibration != "none":
        detail = "a regression gives values, no probabilities that could be calibrated: use none"
        raise InvalidRequest(
            "These settings do not go together.", errors=[FieldError(pointer="/calibration", detail=detail)]
        )


async def check_resamples(context: Context, data: ExtractionOptions, bootstrap: int, rows: int, variants: int) -> None:
    """Refuse intervals that would take a worker many minutes: of every variant, and of the differences."""
    held, _ = await layers_of(context, data.model, data.layers)
    layers = len(held) if held is not None else len(data.layers) if isinstance(data.layers, list) else 1
    each, most = 2 * rows * layers * variants, context.plane.settings.limits.max_resampled
    if each * bootstrap > most:
        raise InvalidRequest(
            "The intervals would take too long.",
            errors=[
                FieldError(
                    pointer="/bootstrap",
                    detail=f"{bootstrap:,} resamples of {rows:,} rows at {layers} layers of {variants} variants "
                    f"are over the limit: ask for {most // each:,} at most, or for fewer layers",
                )
            ],
        )
