"""From the `dataset` of a request to its rows: uploaded ones, those that are made by code, those of the hub."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from bathyscope.datasets import Rows
from bathyscope.datasets._rows import fault, made_here
from bathyscope.errors import Expired, NotFound
from bathyscope.types import DatasetRef
from bathyscope_backplane.artifacts import Resource
from bathyscope_backplane.datasets.hub import read_hub
from bathyscope_backplane.datasets.stored import read_rows
from bathyscope_backplane.ids import is_id
from bathyscope_backplane.plane import Backplane

_TIMES = 4
"""Bytes of memory for a character of the rows, as Python objects."""


async def dataset_rows(
    plane: Backplane, ref: DatasetRef, owner: str | None, hold: Callable[[int], None] = lambda size: None
) -> Rows:
    """The rows that a request means by its `dataset`.

    `owner` is the API key's id, whose datasets it may name; null for an admin's, who may name all. `hold` is told how
    much memory they take.

    Raises `NotFound` (also for another's), `Expired`, `InvalidRequest` for what the dataset has not,
    `DatasetOutOfReach`, `TooLarge` and `NotBuilt`.
    """
    if ref.id is not None:
        return await _stored(plane, ref, await _owned(plane, ref.id, owner), hold)
    if ref.name in ("capitals", "arithmetic"):
        most = plane.settings.limits.max_rows
        if (ref.limit or 0) > most:
            raise fault("limit", f"{most:,} at most")
        return await asyncio.to_thread(made_here, ref)
    return await read_hub(plane.settings, ref, hold)


async def _owned(plane: Backplane, dataset_id: str, owner: str | None) -> Resource:
    missing = NotFound(f"There is no dataset {dataset_id!r}.")
    if not is_id(dataset_id, "ds"):
        raise missing
    if owner is not None:
        match await plane.catalogue.standing(dataset_id, "dataset", owner):
            case "expired":
                raise Expired(f"The dataset {dataset_id} has expired; upload it anew.")
            case "none":
                raise missing
    found = await plane.catalogue.get(dataset_id)
    if found is None:
        raise missing
    return found


async def _stored(plane: Backplane, ref: DatasetRef, resource: Resource, hold: Callable[[int], None]) -> Rows:
    hold(_TIMES * int(resource.private["characters"]))
    try:
        kept = await read_rows(plane.store, resource, 0, resource.body["rows"])
    except FileNotFoundError:
        raise NotFound(f"The dataset {resource.id} was deleted.") from None
    columns = resource.body["columns"]
    if ref.split is not None:
        if "split" not in columns:
            raise fault("split", "its rows have no split")
        kept = [row for row in kept if str(row["split"]) == ref.split]
        if not kept:
            raise fault("split", f"it has no rows of split {ref.split!r}")

    def column(name: str) -> list[object] | None:
        return [row[name] for row in kept] if name in columns else None

    splits = column("split") if ref.split is None else None
    return Rows([row["input"] for row in kept], column("label"), column("group"), splits).draw(ref.limit, ref.seed)
