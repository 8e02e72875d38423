"""Which variants of a base model a request asks for: the base, adapters, or several of them on the same tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bathyscope.errors import AdapterBaseMismatch, Expired, FieldError, InvalidRequest, NotFound, StateConflict
from bathyscope_backplane.artifacts import Resource
from bathyscope_backplane.keys import ApiKey
from bathyscope_backplane.registry import ModelEntry, ModelRegistry
from bathyscope_service.context import Context
from bathyscope_service.jobs.views import job_of
from bathyscope_service.resources import resource_of

BASE = "base"
"""What the base model is called among variants."""


@dataclass(frozen=True, slots=True)
class Variants:
    """The variants of an extraction, in their order."""

    wire: list[dict[str, Any] | None]
    """As the worker is told: null for the base, and of an adapter in the making its `job`."""

    paired: bool
    """Whether a list was asked for, so that the result has an axis for them."""

    @property
    def jobs(self) -> tuple[str, ...]:
        """Of adapters in the making: they come before what needs them."""
        return tuple(one["job"] for one in self.wire if one is not None and "job" in one)

    @property
    def spec(self) -> dict[str, Any]:
        """What the job carries; nothing for the base alone."""
        if self.wire == [None] and not self.paired:
            return {}
        return {"variants": self.wire, "paired": self.paired}


async def resolve(
    context: Context, caller: ApiKey, asked: str | list[str] | None, entry: ModelEntry, *, repeats: bool = False
) -> Variants:
    """The adapters of a request, which must be the caller's and made for the model; `job_…` is what that job makes.

    Raises `NotFound`, also for another's, `Expired`, `AdapterBaseMismatch`, `InvalidRequest` and, of a job that came to
    nothing, `StateConflict`, with pointers.
    """
    if not isinstance(asked, list):
        return Variants([await _resolve(context, caller, asked, entry, "/adapter")], False)
    most = context.plane.settings.limits.max_variants
    if len(asked) > most:
        raise _invalid("/adapter", f"{len(asked)} variants, and one extraction has {most} at most")
    if len(set(asked)) != len(asked) and not repeats:
        twice = next(number for number, one in enumerate(asked) if one in asked[:number])
        raise _invalid(f"/adapter/{twice}", "it is named twice")
    return Variants(
        [await _resolve(context, caller, one, entry, f"/adapter/{number}") for number, one in enumerate(asked)], True
    )


async def _resolve(
    context: Context, caller: ApiKey, asked: str | None, entry: ModelEntry, pointer: str
) -> dict[str, Any] | None:
    if asked in (None, BASE):
        return None
    try:
        made = await _made_by(context, caller, asked, pointer) if asked.startswith("job_") else asked
        if made is None:
            return {"job": asked}
        adapter = await resource_of(context, caller, "adapter", made)
    except (NotFound, Expired) as error:
        error.errors = [FieldError(pointer=pointer, detail="name an adapter of GET /v1/adapters, or base")]
        raise
    if not fits(context.plane.registry, adapter, entry):
        base = adapter.body["base_model"]
        raise AdapterBaseMismatch(
            f"The adapter {adapter.id} was made for {base} and the request names {entry.name}.",
            errors=[FieldError(pointer=pointer, detail=f"name the model {base}, or an adapter made for {entry.name}")],
        )
    return wire(adapter)


async def _made_by(context: Context, caller: ApiKey, job: str, pointer: str) -> str | None:
    """Id of the adapter that a job made; null while it has not ended."""
    record = await job_of(context, caller, job)
    if record.kind != "adapter":
        raise _invalid(pointer, f"the job {job} makes no adapter but is of kind {record.kind}")
    if not record.ended:
        return None
    if record.status != "succeeded" or record.resource is None:
        raise StateConflict(
            f"The adapter's job {job} is {record.status}; add the adapter anew.",
            errors=[FieldError(pointer=pointer, detail=f"its job is {record.status}")],
        )
    return record.resource.rpartition("/")[2]


def wire(adapter: Resource) -> dict[str, Any]:
    """An adapter as the worker is told of it."""
    return {
        "id": adapter.id,
        "digest": adapter.body["digest"],
        "key": adapter.blobs["weights"].key,
        "bytes": adapter.bytes,
    }


def fits(registry: ModelRegistry, adapter: Resource, entry: ModelEntry) -> bool:
    """Whether an adapter was made for a model: for that one, or for another name of the same weights."""
    return registry.same_weights(adapter.body["base_model"], entry)


async def of_digest(context: Context, caller: ApiKey, digest: str, entry: ModelEntry) -> Resource | None:
    """An adapter of a digest, made for a model, that the caller may see: its own, and for an admin key anyone's."""
    catalogue, registry = context.plane.catalogue, context.plane.registry
    for base in [entry.name, *(name for name in registry.names() if name != entry.name)]:
        if registry.same_weights(base, entry) and (claim := await catalogue.shelf.with_digest(caller.id, digest, base)):
            found = await catalogue.get(claim.id)
            if found is not None:
                return found
    cursor: str | None = None
    while caller.admin:
        page, cursor = await catalogue.list("adapter", None, limit=200, cursor=cursor)
        for adapter in page:
            if adapter.body["digest"] == digest and fits(registry, adapter, entry):
                return adapter
        if cursor is None:
            break
    return None


def chosen(body: dict[str, Any], variant: str | None, pointer: str = "/variant") -> int | None:
    """Which entry of a paired extraction's first axis a name means; null for an extraction that has none.

    `body` is the extraction's. Raises `InvalidRequest` for a name that it lacks, or for none where one is needed.
    """
    variants = body.get("variants")
    if variants is None:
        if variant is not None:
            raise _invalid(pointer, "the extraction has no variants; leave it out")
        return None
    return place_of([one["adapter"] or BASE for one in variants], variant, pointer)


def place_of(names: list[str], variant: str | None, pointer: str = "/variant") -> int:
    """The place of a variant among those of a paired extraction. Raises `InvalidRequest`."""
    if variant in names:
        return names.index(variant)
    known = ", ".join(names)
    raise _invalid(pointer, f"name one of the extraction's variants: {known}")


def _invalid(pointer: str, detail: str) -> InvalidRequest:
    return InvalidRequest("The variants do not fit the request.", errors=[FieldError(pointer=pointer, detail=detail)])
