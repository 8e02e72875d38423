"""Adapters, in two parts: fetched and converted by the engine of lane `fetch`, then attached by one with the base.

What is fetched becomes a PEFT folder in the store, and the job is handed over to the base model's lane with its
address. Only when the adapter was attached to the real base, and its effect measured, is the resource committed:
nothing is visible before. An owner has each digest once for each base: a job that comes to one that is there gives
that one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path
from typing import Any

from bathyscope.errors import ModelUnknown, StateConflict, TooLarge
from bathyscope_backplane.artifacts import ROLES, Blob, Blobs, Claim, Resource, Taken
from bathyscope_backplane.plane import Backplane
from bathyscope_backplane.registry import ModelEntry
from bathyscope_backplane.reuse import adapter_digest
from bathyscope_backplane.times import rfc3339
from bathyscope_workers.adapters.sources._reach import Reach
from bathyscope_workers.jobs._base import Existing, Handover, JobWork, Undecided
from bathyscope_workers.models.spec import QUANTIZATIONS, ModelSpec

_FOLDER = "peft"
"""Where a converted adapter lies in the scratch folder."""


class AdapterJob:
    """`POST /v1/adapters`."""

    def path(self, resource_id: str | None) -> str | None:
        """Where the adapter is found."""
        return f"/v1/adapters/{resource_id}"

    async def commands(self, work: JobWork) -> list[Any]:
        """Fetch and convert it, or attach what was converted."""
        return [await (_attach(work) if "staged" in work.payload else _fetch(work))]

    async def conclude(self, work: JobWork, event: dict[str, Any]) -> Resource | Handover | Existing:
        """After the first part hand it over, after the second describe it."""
        if "staged" in work.payload:
            made: Resource | Handover | Existing = await _describe(work, event["result"]["effect"])
            base = work.payload["converted"]["base_model"]
        else:
            made = await _hand_over(work, event["result"])
            base = event["result"]["base_model"]
        if not isinstance(made, Handover):
            await _note(work, made, base)
        return made

    def smaller(self, work: JobWork, problem: dict[str, Any]) -> Handover | None:
        """Where an adapter goes whose base did not fit into memory: to a smaller variant of it, if one is offered."""
        if work.resident is None or not str(problem.get("type", "")).endswith("/out-of-memory"):
            return None
        entry = work.plane.registry.get(work.resident.name)
        for quantization in QUANTIZATIONS[QUANTIZATIONS.index(work.resident.quantization) + 1 :]:
            if quantization in entry.quantizations:
                return Handover(f"model:{entry.name}:{quantization}:{entry.compute_dtype}", work.payload)
        return None

    async def discard(self, work: JobWork) -> None:
        """Remove what was put by for a job that came to nothing."""
        for key in (work.payload.get("archive_key"), work.payload.get("rows_key")):
            if key is not None:
                await work.plane.store.delete(key)
        for blob in work.kept.values():  # of an upload that was cut short, else nobody has a share in it below
            if work.attached is None:
                await work.plane.store.delete(blob.key)
        if "staged" in work.payload:
            await _release(work, _blobs(work.payload["staged"]))
        if work.attached is not None:
            await _release(work, work.attached)


# --- the first part ---------------------------------------------------------------------------------------


async def _fetch(work: JobWork) -> dict[str, Any]:
    plane, spec = work.plane, work.spec
    archive = None
    if (key := work.payload.get("archive_key")) is not None:
        archive = work.scratch / "archive"
        await _copy(plane, key, archive)
    named = spec.get("base_model")
    models = [plane.registry.get(name) for name in (plane.registry.names() if named is None else [named])]
    reach = Reach.of(plane.settings.adapters, work.credentials)
    return work.run_command(
        spec={"source": spec.get("source"), "base_model": named},
        extra={
            "reach": reach.to_wire(),
            "models": [_spec_of(plane, model) for model in models],
            "archive_path": str(archive) if archive is not None else None,
        },
    )


def _spec_of(plane: Backplane, entry: ModelEntry) -> dict[str, Any]:
    """A model as the engines know it, unquantized: conversion looks at names and shapes only."""
    return ModelSpec(
        name=entry.name,
        source=entry.source,
        revision=entry.revision,
        compute_dtype=entry.compute_dtype,
        max_length=entry.max_length,
        data_dir=str(plane.settings.data_dir),
    ).to_wire()


async def _copy(plane: Backplane, key: str, target: Path) -> None:
    """An object of the store as a file of the attempt's own; without copying where that can be had."""
    found = plane.store.local_path(key)
    if found is not None:
        with contextlib.suppress(OSError):
            await asyncio.to_thread(os.link, found, target)
            return
    await plane.store.download(key, target)


async def _hand_over(work: JobWork, result: dict[str, Any]) -> Handover | Existing:
    shelf, owner, digest = work.plane.catalogue.shelf, work.lease.owner, result["digest"]
    known = await shelf.with_digest(owner, digest, result["base_model"])
    if known is not None and (same := await _stands(work, known)) is not None:
        return Existing(f"/v1/adapters/{same.id}")
    if (name := work.spec.get("name")) is not None:
        other = await shelf.with_name(owner, name)
        if other is not None and other != _claim_of(work) and await _stands(work, other) is not None:
            raise _name_taken(name)
    entry = work.plane.registry.get(result["base_model"])
    size = sum(file["bytes"] for file in result["files"])
    if size > work.payload.get("most_bytes", size):
        most = work.payload["most_bytes"]
        raise TooLarge(
            f"Converted, the adapter has {size:,} bytes, and this key's quota leaves {most:,}; delete others.",
            estimate=size,
            limit=most,
        )
    work.attached = staged = await shelf.hold(digest, _claim_of(work)) or await _upload(work, digest)
    payload = {
        "spec": work.spec,
        "converted": {key: value for key, value in result.items() if key not in ("files", "path")},
        "staged": {role: blob.as_json() for role, blob in staged.items()},
        **{key: work.payload[key] for key in ("most_bytes",) if key in work.payload},
    }
    return Handover(await _lane(work.plane, entry), payload, tuple(filter(None, [work.payload.get("archive_key")])))


async def _upload(work: JobWork, digest: str) -> Blobs:
    folder = f"adapters/{digest}/{work.lease.job_id}.{work.lease.ref.token}"
    found: Blobs = {}
    for role, name in ROLES.items():
        path = work.scratch / _FOLDER / name
        if path not in work.kept:
            work.kept[path] = await work.plane.store.put_file(f"{folder}/{name}", path)
        found[role] = work.kept[path]
    return found


async def _lane(plane: Backplane, entry: ModelEntry) -> str:
    """Where the adapter is attached first: to a variant of its base that some worker holds, else to the first one that
    is not known to be too large for all of them, else to the smallest."""
    alive = [info for info in (await plane.workers.alive()).values() if not info.get("draining")]
    for info in alive:
        for held in info.get("residents", ()):
            fits = held["model"] == entry.name and held["state"] == "hot"
            if fits and held["quantization"] in entry.quantizations:
                return f"model:{entry.name}:{held['quantization']}:{held['compute_dtype']}"
    known = await plane.workers.memory()
    offered = [quantization for quantization in QUANTIZATIONS if quantization in entry.quantizations]
    chosen = offered[-1]
    for quantization in entry.quantizations:
        spec = ModelSpec(entry.name, entry.source, quantization=quantization, compute_dtype=entry.compute_dtype)
        if not alive or any(_may_fit(spec, info, known) for info in alive):
            chosen = quantization
            break
    return f"model:{entry.name}:{chosen}:{entry.compute_dtype}"


def _may_fit(spec: ModelSpec, worker: dict[str, Any], known: dict[str, int]) -> bool:
    """Whether a model is not known to be too large for a worker."""
    device = "cpu" if (worker.get("device") or "cpu") == "cpu" else "cuda"
    limit = worker.get("memory_limit_bytes")
    return not limit or known.get(spec.resolved(device).key, 0) <= limit


# --- the second part --------------------------------------------------------------------------------------


async def _attach(work: JobWork) -> dict[str, Any]:
    if work.resident is None:
        raise ModelUnknown("This worker's list of models lacks the job's model; give all workers the same list.")
    digest = work.payload["converted"]["digest"]
    # An earlier attempt may have got as far as to name files that others brought, and removed its own.
    blobs = await work.plane.catalogue.shelf.hold(digest, _claim_of(work)) or _blobs(work.payload["staged"])
    work.attached = blobs
    path = await work.place(digest, blobs)
    return work.run_command(resident=work.resident.to_wire(), extra={"adapter": {"digest": digest, "path": str(path)}})


async def _describe(work: JobWork, effect: dict[str, Any]) -> Resource | Existing:
    plane, spec, converted = work.plane, work.spec, work.payload["converted"]
    digest, name, staged = converted["digest"], spec.get("name"), work.attached or _blobs(work.payload["staged"])
    dead: list[Claim] = []
    while True:
        what = (digest, converted["base_model"], name)
        blobs = await plane.catalogue.shelf.claim(_claim_of(work), work.lease.owner, *what, staged, dead)
        if not isinstance(blobs, Taken):
            break
        resource = await _stands(work, blobs.by)
        if resource is None:
            dead.append(blobs.by)
            continue
        await _release(work, staged)
        if blobs.what == "digest":
            return Existing(f"/v1/adapters/{resource.id}")
        raise _name_taken(name)
    if blobs["weights"].key != staged["weights"].key:
        await _release(work, staged, claims=False)
    work.attached = blobs  # not before: when that failed, this is called again
    link = f"/v1/adapters/{work.lease.resource_id}"
    source = converted.get("source", spec.get("source"))
    body = {
        "name": name,
        "source": source,
        "base_model": converted["base_model"],
        "digest": digest,
        "rank": converted["rank"],
        "alpha": converted["alpha"],
        "target_modules": converted["target_modules"],
        "format": converted["format"],
        "tensors": converted["tensors"],
        "conversion": converted.get("conversion", []),
        "effect": effect,
        "tinker": converted.get("tinker"),
        "bytes": sum(blob.bytes for blob in blobs.values()),
        "metadata": spec.get("metadata"),
        "links": {"self": link, "archive": f"{link}/archive", "job": f"/v1/jobs/{work.lease.job_id}"},
    }
    private = {"exclusive": converted.get("exclusive", True), "archive_sha256": spec.get("archive_sha256")}
    resource = work.resource(body, blobs=blobs, private=private)
    days = plane.settings.adapters.days
    resource.expires_ms = None if days is None else resource.created_ms + int(days * 86_400_000)
    resource.body["expires_at"] = rfc3339(resource.expires_ms)
    return resource


async def _note(work: JobWork, made: Resource | Existing, base_model: str) -> None:
    """Let later requests find the adapter by its source, where that names the same weights for ever."""
    source = work.spec.get("source")
    if source is not None and (digest := adapter_digest(source, base_model)) is not None:
        made_id = made.id if isinstance(made, Resource) else made.path.rpartition("/")[2]
        await work.plane.reuse.put(work.lease.owner, digest, made_id)


async def _stands(work: JobWork, claim: Claim) -> Resource | None:
    """The adapter of a claim, null when its job came to nothing. Raises `Undecided` while that is not known."""
    catalogue = work.plane.catalogue
    resource = await catalogue.get(claim.id)
    if resource is not None or claim == _claim_of(work):
        return resource
    record = await work.plane.broker.get(claim.job)
    if record is None or record.ended:  # looked up once more: it may have been committed in between
        return await catalogue.get(claim.id)
    raise Undecided("Another job is about to make the same adapter, or one of this name; this one waits for it.")


async def _release(work: JobWork, blobs: Blobs, *, claims: bool = True) -> None:
    """Give the share in some files back, and digest and name with it; files go when nobody else has a share."""
    shelf, key = work.plane.catalogue.shelf, blobs["weights"].key
    owner, name = (work.lease.owner, work.spec.get("name")) if claims else ("", None)
    base = work.payload.get("converted", {}).get("base_model", "")  # in the first part nothing is claimed yet
    if await shelf.release([_claim_of(work)], owner, key.split("/")[1], base, name, key):
        for blob in blobs.values():
            await work.plane.store.delete(blob.key)


def _claim_of(work: JobWork) -> Claim:
    assert work.lease.resource_id is not None
    return Claim(work.lease.resource_id, work.lease.job_id)


def _blobs(staged: dict[str, Any]) -> Blobs:
    return {role: Blob(**blob) for role, blob in staged.items()}


def _name_taken(name: str | None) -> StateConflict:
    return StateConflict(
        f"Another adapter of yours is called {name!r}; choose another name, or delete that one.",
        errors=[{"pointer": "/name", "detail": "unique among one's adapters"}],
    )
