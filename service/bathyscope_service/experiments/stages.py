"""From a checked file to its jobs: the adapter, the states, a probe for each variant, and the experiment over them.

Each stage is an ordinary job whose parents are the stages before it, and the experiment's own job is the last of them:
so leases, retries, cancels and failures hold for it as for any other. What an earlier experiment of the same key made
from the same things, and is still there, is taken again: a stage is known by a digest over all that it depends on.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from bathyscope import __version__, errors
from bathyscope.types import AdapterRequest, ExtractionRequest, ProbeRequest
from bathyscope.types.experiments import ExperimentConfig
from bathyscope_backplane.ids import new_id
from bathyscope_backplane.keys import ApiKey
from bathyscope_backplane.reuse import adapter_digest, stage_digest
from bathyscope_service.adapters.variants import BASE
from bathyscope_service.adapters.work import adapter_work
from bathyscope_service.comparisons.work import check_resamples, follow, settings
from bathyscope_service.context import Context, Memory
from bathyscope_service.datasets.using import probe_with_rows
from bathyscope_service.experiments.adapter import adapter_of
from bathyscope_service.extractions.endpoints import extraction_work
from bathyscope_service.jobs.submission import Work, submit
from bathyscope_service.probes.work import drop_parent, probe_work, rows_of
from bathyscope_service.problems import pointing
from bathyscope_service.resources import resource_of


@dataclass(slots=True)
class Stage:
    """One part, as the experiment's job and its `request` hold it."""

    name: str
    digest: str | None = None
    """Of all that it depends on, as far as that is known before."""
    resource: str | None = None
    """Id of what there is."""
    job: str | None = None
    """What makes it, or finds on the worker that an earlier one did."""
    reused: bool = False

    @property
    def reference(self) -> str:
        """What later stages name it by."""
        return self.resource or str(self.job)

    def wire(self) -> dict[str, Any]:
        """A JSON object."""
        return {name: getattr(self, name) for name in ("name", "digest", "resource", "job", "reused")}


@dataclass(slots=True)
class Plan:
    """The stages so far, and the jobs that were queued for them."""

    context: Context
    request: Request
    caller: ApiKey
    config: ExperimentConfig
    stages: list[Stage] = field(default_factory=list)

    @property
    def made(self) -> list[str]:
        """Jobs that are this experiment's own."""
        return list(dict.fromkeys(stage.job for stage in self.stages if stage.job is not None))

    async def is_known(self, stage: Stage, kind: str) -> bool:
        """Whether an earlier experiment made the stage, and it is still there: then it is taken."""
        found = await self.context.plane.reuse.get(self.caller.id, stage.digest) if stage.digest is not None else None
        if found is not None:
            with contextlib.suppress(errors.NotFound, errors.Expired):
                stage.resource = (await resource_of(self.context, self.caller, kind, found)).id
                stage.reused = True
        return stage.reused

    async def queue(self, stage: Stage, work: Work) -> None:
        """Queue the job of a stage; the credentials are for the adapter's alone."""
        work.part, work.credentials = None, work.kind == "adapter"
        stage.job, _ = await submit(self.context, self.request, self.caller, work)

    async def drop(self) -> None:
        """End the jobs of an experiment that is not made."""
        for job in reversed(self.made):
            await drop_parent(self.context, job)


async def experiment_work(
    context: Context, request: Request, caller: ApiKey, memory: Memory, config: ExperimentConfig
) -> tuple[Work, Plan]:
    """The job of an experiment; those of its stages are queued by now."""
    source, notices = adapter_of(config)
    if "seed" not in config.dataset.model_fields_set:
        dataset = config.dataset.model_copy(update={"seed": config.experiment.seed})
        config = config.model_copy(update={"dataset": dataset})
    try:
        await context.plane.workers.entry(context.plane.registry, config.model.name)
    except errors.ModelUnknown as error:
        error.errors = [errors.FieldError(pointer="/model/name", detail="name a model of GET /v1/models")]
        raise
    plan = Plan(context, request, caller, config)
    probe = await _probe_request(plan, memory)
    try:
        adapter = await _adapter(plan, source) if source is not None else None
        extraction, rows = await _extraction(plan, probe, adapter)
        variants: list[str | None] = [None] if adapter is None else ["base", "adapter"]
        for variant in variants:
            await _probe(plan, probe, rows, extraction, variant)
        if adapter is not None:
            notices += await _comparison(plan, probe, rows, extraction)
    except errors.Unavailable:
        raise  # what is queued is not known; it makes what a repeated request will find
    except BaseException:
        await plan.drop()
        raise
    spec = {
        "config": config.model_dump(mode="json"),
        "notices": notices,
        "stages": [stage.wire() for stage in plan.stages],
        "dataset_digest": rows,
    }
    return (
        Work(
            kind="experiment",
            lane="cpu",
            spec=spec,
            request={
                "name": config.experiment.name,
                "model": config.model.name,
                "notices": notices,
                "stages": [stage.wire() for stage in plan.stages],
                "jobs": plan.made,
            },
            resource_id=new_id("exp"),
            parents=tuple(plan.made),
            credentials=False,
        ),
        plan,
    )


async def _probe_request(plan: Plan, memory: Memory) -> ProbeRequest:
    """The request of a probe with its data: checked as a whole, the dataset's rows in their place."""
    config = plan.config
    seed = config.experiment.seed
    scored = "model_confidence" in config.evaluation.baselines
    body = ProbeRequest(
        data=ExtractionRequest(
            model=config.model.name,
            quantization=config.model.quantization,
            dataset=config.dataset,
            score_choices=scored,
            **config.extraction.model_dump(exclude={"cache_dir"}),
        ),
        **config.probe.model_dump(),
        **config.evaluation.model_dump(),
        seed=seed,
    )
    with pointing("/dataset"):
        body = await probe_with_rows(plan.context, plan.request, plan.caller, memory, body)
    assert body.data is not None
    if body.labels == "correct" and not scored:
        body = body.model_copy(update={"data": body.data.model_copy(update={"score_choices": True})})
    return body


async def _adapter(plan: Plan, source: str) -> Stage:
    stage, model = Stage("adapter"), plan.config.model.name
    plan.stages.append(stage)
    if "://" not in source:
        try:
            stage.resource, stage.reused = (await resource_of(plan.context, plan.caller, "adapter", source)).id, True
        except (errors.NotFound, errors.Expired) as error:
            error.errors = [errors.FieldError(pointer="/model/adapter", detail="name an adapter of GET /v1/adapters")]
            raise
        return stage
    stage.digest = adapter_digest(source, model)
    if not await plan.is_known(stage, "adapter"):
        await plan.queue(
            stage, await adapter_work(plan.context, plan.caller, AdapterRequest(source=source, base_model=model))
        )
    return stage


async def _extraction(plan: Plan, probe: ProbeRequest, adapter: Stage | None) -> tuple[Stage, str]:
    """The states of the base, and of the adapter on the same tokens; and the digest of the rows."""
    context, caller, data = plan.context, plan.caller, probe.data
    assert data is not None
    rows = await context.apart(plan.request.state.body_bytes, _rows_digest, probe)
    pending = adapter is not None and adapter.resource is None
    if adapter is not None:
        data = data.model_copy(update={"adapter": [BASE, adapter.resource or BASE]})
    with pointing("/extraction"):
        work = await extraction_work(context, caller, data, plan.request.state.body_bytes, repeats=pending)
    if adapter is not None and pending:
        # Not looked up: its job may have ended by now, and if it failed this fails by its parent, which tells why.
        follow(work, [BASE, str(adapter.job)])
    entry = await context.plane.workers.entry(context.plane.registry, data.model)
    stage = Stage("extraction")
    plan.stages.append(stage)
    identity = [entry.name, str(entry.source), entry.revision, data.quantization, work.lane]
    options = data.model_dump(mode="json", exclude={"inputs", "dataset", "adapter", "priority", "webhook", "model"})
    basis = work.spec["reuse"] = stage_digest("extraction", identity, options, rows, __version__)
    variants = work.spec.get("variants") or [None]
    if adapter is None or adapter.resource is not None:  # else the worker looks, when it has the adapter
        stage.digest = stage_digest(basis, [variant and variant["id"] for variant in variants])
    if not await plan.is_known(stage, "extraction"):
        await plan.queue(stage, work)
    return stage, rows


async def _probe(plan: Plan, probe: ProbeRequest, rows: str, extraction: Stage, variant: str | None) -> None:
    adapter = next((one for one in plan.stages if one.name == "adapter"), None)
    stage = Stage("probe" if variant is None else f"probe {variant}")
    plan.stages.append(stage)
    named = variant if adapter is None or variant == "base" else adapter.reference
    body = probe.model_copy(update={"data": None, "extraction": extraction.reference, "variant": named})
    try:
        with pointing("/probe"):
            work, _ = await probe_work(plan.context, plan.request, plan.caller, body)
    except errors.StateConflict:
        # The states came to nothing meanwhile, and so will this: the experiment fails by its parent and tells why.
        stage.job = extraction.job
        return
    settings = probe.model_dump(mode="json", exclude={"data", "labels", "groups", "split", "extraction", "variant"})
    basis = work.spec["reuse"] = stage_digest("probe", settings, rows, __version__)
    work.spec["extraction"] = extraction.reference
    if extraction.resource is not None:
        stage.digest = stage_digest(basis, extraction.resource, work.spec["variant"])
    if not await plan.is_known(stage, "probe"):
        await plan.queue(stage, work)


async def _comparison(plan: Plan, probe: ProbeRequest, rows: str, extraction: Stage) -> list[str]:
    """What the adapter did, with intervals; a notice where the probes cannot be compared row by row."""
    assert probe.data is not None
    names = [BASE, "adapter"]
    if probe.labels == "correct" or not isinstance(probe.labels, list):
        return ["The differences have no intervals: whether the model is right is a label of each variant's own."]
    if probe.data.pooling == "none":
        return ["The differences have no intervals: a comparison is of one vector an input."]
    try:
        await check_resamples(plan.context, probe.data, probe.bootstrap, len(probe.labels), len(names))
    except errors.InvalidRequest as error:
        return [f"The differences have no intervals: {error.errors[0]['detail']}."]
    stage = Stage("comparison")
    plan.stages.append(stage)
    parts = [
        {"extraction": extraction.reference, "variant": place, "name": name, "source": None, "step": None}
        for place, name in enumerate(names)
    ]
    config = settings(probe)
    work = Work(
        kind="comparison",
        lane="cpu",
        spec={
            **config,
            "name": plan.config.experiment.name,
            "model": probe.data.model,
            "compares": "adapters",
            "parts": parts,
            "reuse": stage_digest("comparison", config, rows, __version__),
        },
        rows=rows_of(probe.labels, probe.groups, probe.split),
        request={"model": probe.data.model, "extraction": extraction.reference, "variants": names},
        resource_id=new_id("cmp"),
        parents=(extraction.job,) if extraction.job is not None else (),
    )
    if extraction.resource is not None:
        stage.digest = stage_digest(work.spec["reuse"], [extraction.resource] * len(names))
    if not await plan.is_known(stage, "comparison"):
        await plan.queue(stage, work)
    return []


def _rows_digest(probe: ProbeRequest) -> str:
    assert probe.data is not None
    inputs = [one if isinstance(one, str) else one.model_dump(mode="json") for one in probe.data.inputs or []]
    return stage_digest("rows", inputs, probe.labels, probe.groups, probe.split)
