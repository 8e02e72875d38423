"""From a checked file to its jobs: the adapter, the states, a probe for each variant, and the experiment over them.

Each stage is an ordinary job whose parents are the stages before it, and the experiment's own job is the last of them:
so leases, retries, cancels and failures hold for it as for any other. What an earlier experiment of the same key made
from the same things, and is still there, is taken again: a stage is known by a digest over all that it depends on.
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass, field
from typing import Any

import orjson
from fastapi import Request

from bathyscope import errors
from bathyscope.types import AdapterRequest, ExtractionRequest, ProbeRequest
from bathyscope.types.experiments import ExperimentConfig
from bathyscope_backplane.artifacts import Resource
from bathyscope_backplane.ids import new_id
from bathyscope_backplane.keys import ApiKey
from bathyscope_service.adapters.work import adapter_work
from bathyscope_service.context import Context, Memory
from bathyscope_service.datasets.using import probe_with_rows
from bathyscope_service.experiments.adapter import adapter_of
from bathyscope_service.extractions.endpoints import extraction_work
from bathyscope_service.jobs.submission import Work, submit
from bathyscope_service.probes.work import drop_parent, probe_work
from bathyscope_service.problems import pointing
from bathyscope_service.resources import resource_of

_FORMAT = 1
"""Raised whenever stages come to mean something else."""
_IMMUTABLE = ("tinker://",)
"""Sources that name the same weights for ever; others are fetched anew, and recognised by their digest."""


@dataclass(slots=True)
class Stage:
    """One part, as the experiment's job and its `request` hold it."""

    name: str
    digest: str | None = None
    resource: str | None = None
    """Id of what there is, or will be where that is known before."""
    job: str | None = None
    reused: bool = False

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
        return [stage.job for stage in self.stages if stage.job is not None]

    async def known(self, digest: str, kind: str) -> Resource | None:
        """What an earlier stage of that digest made, where it is still there."""
        found = await self.context.plane.reuse.get(self.caller.id, digest)
        if found is None:
            return None
        try:
            return await resource_of(self.context, self.caller, kind, found)
        except (errors.NotFound, errors.Expired):
            return None

    async def queue(self, stage: Stage, work: Work) -> None:
        """Queue the job of a stage; the credentials are for the adapter's alone."""
        work.part, work.credentials = None, work.kind == "adapter"
        stage.job, _ = await submit(self.context, self.request, self.caller, work)
        stage.resource = work.resource_id

    async def drop(self) -> None:
        """End the jobs of an experiment that is not made."""
        for job in reversed(self.made):
            await drop_parent(self.context, job)


async def experiment_work(
    context: Context, request: Request, caller: ApiKey, memory: Memory, config: ExperimentConfig
) -> tuple[Work, Plan]:
    """The job of an experiment; those of its stages are queued by now."""
    source, notices = adapter_of(config)
    try:
        await context.plane.workers.entry(context.plane.registry, config.model.name)
    except errors.ModelUnknown as error:
        error.errors = [errors.FieldError(pointer="/model/name", detail="name a model of GET /v1/models")]
        raise
    plan = Plan(context, request, caller, config)
    probe = await _probe_request(plan, memory)
    try:
        adapter = await _adapter(plan, source) if source is not None else None
        extraction, dataset = await _extraction(plan, probe, adapter)
        variants: list[str | None] = [None] if adapter is None else ["base", "adapter"]
        for variant in variants:
            await _probe(plan, probe, extraction, variant)
    except errors.Unavailable:
        raise  # what is queued is not known; it makes what a repeated request will find
    except BaseException:
        await plan.drop()
        raise
    spec = {
        "config": config.model_dump(mode="json"),
        "notices": notices,
        "stages": [stage.wire() for stage in plan.stages],
        "dataset_digest": dataset,
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
    dataset = config.dataset
    if "seed" not in dataset.model_fields_set:
        dataset = dataset.model_copy(update={"seed": seed})
    scored = "model_confidence" in config.evaluation.baselines
    body = ProbeRequest(
        data=ExtractionRequest(
            model=config.model.name,
            quantization=config.model.quantization,
            dataset=dataset,
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
    stage = Stage("adapter")
    plan.stages.append(stage)
    if "://" not in source:
        try:
            found: Resource | None = await resource_of(plan.context, plan.caller, "adapter", source)
        except (errors.NotFound, errors.Expired) as error:
            error.errors = [errors.FieldError(pointer="/model/adapter", detail="name an adapter of GET /v1/adapters")]
            raise
    else:
        stage.digest = _digest("adapter", source, plan.config.model.name)
        found = await plan.known(stage.digest, "adapter") if source.startswith(_IMMUTABLE) else None
    if found is not None:
        stage.resource, stage.reused = found.id, True
        stage.digest = found.body["digest"]
        return stage
    work = await adapter_work(
        plan.context, plan.caller, AdapterRequest(source=source, base_model=plan.config.model.name)
    )
    await plan.queue(stage, work)
    stage.resource = None  # weights that the caller has already give the adapter that it has
    return stage


async def _extraction(plan: Plan, probe: ProbeRequest, adapter: Stage | None) -> tuple[Stage, str]:
    """The states of the base, and of the adapter on the same tokens; and the digest of the rows."""
    context, caller, data = plan.context, plan.caller, probe.data
    assert data is not None
    rows = await context.apart(plan.request.state.body_bytes, _rows_digest, probe)
    if adapter is not None and adapter.resource is not None:
        data = data.model_copy(update={"adapter": ["base", adapter.resource]})
    with pointing("/extraction"):
        work = await extraction_work(context, caller, data, plan.request.state.body_bytes)
    entry = await context.plane.workers.entry(context.plane.registry, data.model)
    stage = Stage("extraction")
    plan.stages.append(stage)
    if adapter is None or adapter.resource is not None:
        # Of an adapter that is still to be fetched nobody can say what it is.
        identity = [entry.name, str(entry.source), entry.revision, data.quantization, work.lane]
        options = data.model_dump(mode="json", exclude={"inputs", "dataset", "adapter", "priority", "webhook", "model"})
        stage.digest = _digest("extraction", identity, options, rows, adapter and adapter.digest, _version())
        found = await plan.known(stage.digest, "extraction")
        if found is not None:
            stage.resource, stage.reused = found.id, True
            return stage, rows
    else:
        work.spec |= {"variants": [None, {"job": adapter.job}], "paired": True}
        work.inputs, work.bytes, work.parents = 2 * work.inputs, 2 * work.bytes, (str(adapter.job),)
        work.request["adapter"] = ["base", adapter.job]
        work.rows_each = 0  # what waits for another job runs whole
    await plan.queue(stage, work)
    return stage, rows


async def _probe(plan: Plan, probe: ProbeRequest, extraction: Stage, variant: str | None) -> None:
    adapter = next((one for one in plan.stages if one.name == "adapter"), None)
    stage = Stage("probe" if variant is None else f"probe {variant}")
    plan.stages.append(stage)
    if extraction.digest is not None:
        settings = probe.model_dump(mode="json", exclude={"data", "labels", "groups", "split", "extraction", "variant"})
        rows = await plan.context.apart(plan.request.state.body_bytes, _rows_digest, probe)
        stage.digest = _digest("probe", extraction.digest, settings, rows, variant, _version())
        found = await plan.known(stage.digest, "probe")
        if found is not None and found.body["extraction"] == extraction.resource:
            stage.resource, stage.reused = found.id, True
            return
    named = None if variant is None else "base" if variant == "base" else adapter and adapter.resource
    body = probe.model_copy(
        update={"data": None, "extraction": extraction.job or extraction.resource, "variant": named}
    )
    # One of an adapter that is still to be fetched is checked as the base's, whose rows it shares.
    pending = variant == "adapter" and named is None
    try:
        with pointing("/probe"):
            work, _ = await probe_work(
                plan.context,
                plan.request,
                plan.caller,
                body.model_copy(update={"variant": "base"}) if pending else body,
            )
    except errors.StateConflict:
        # The states came to nothing meanwhile, and so will this: the experiment fails by its parent and tells why.
        stage.job = extraction.job
        return
    if pending:
        work.spec["variant"] = 1
    await plan.queue(stage, work)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(orjson.dumps([_FORMAT, *parts], option=orjson.OPT_SORT_KEYS)).hexdigest()


def _rows_digest(probe: ProbeRequest) -> str:
    assert probe.data is not None
    inputs = [one if isinstance(one, str) else one.model_dump(mode="json") for one in probe.data.inputs or []]
    return _digest("rows", inputs, probe.labels, probe.groups, probe.split)


def _version() -> str:
    from bathyscope import __version__

    return __version__


async def cancel_stages(context: Context, stages: list[dict[str, Any]]) -> None:
    """End the jobs of an experiment that was cancelled, the last first."""
    for stage in reversed(stages):
        if stage["job"] is not None:
            with contextlib.suppress(errors.Unavailable, errors.StateConflict):
                await context.plane.broker.cancel(stage["job"])
