"""Requests that name a dataset: its rows in their place, before anything else is looked at."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from pydantic import TypeAdapter

from bathyscope.datasets import Rows
from bathyscope.errors import FieldError, InvalidRequest
from bathyscope.types import ComparisonRequest, DatasetRef, ExtractionRequest, Input, ProbeRequest
from bathyscope_backplane.datasets.resolving import dataset_rows
from bathyscope_backplane.keys import ApiKey
from bathyscope_service.auditing import concerns
from bathyscope_service.context import Context, Memory
from bathyscope_service.extractions.checks import refuse_rows
from bathyscope_service.problems import pointing

_INPUTS: TypeAdapter[list[Input]] = TypeAdapter(list[Input])


async def rows_of(context: Context, request: Request, caller: ApiKey, memory: Memory, ref: DatasetRef) -> Rows:
    """The rows of a request's `dataset`, held in `memory`.

    Raises `NotFound`, `Expired`, `InvalidRequest`, `DatasetOutOfReach`, `TooLarge`, `QuotaExceeded` and `NotBuilt`.
    """
    concerns(request, ref.id)
    held = memory.held
    rows = await dataset_rows(context.plane, ref, None if caller.admin else caller.id, memory.hold)
    refuse_rows(len(rows), context.plane.settings.limits.max_rows)
    # What goes through the inputs later does so apart when they are large.
    request.state.body_bytes += memory.held - held
    return rows


async def with_rows(
    context: Context, request: Request, caller: ApiKey, memory: Memory, body: ExtractionRequest
) -> tuple[ExtractionRequest, Rows | None]:
    """The request with the inputs of its dataset, and the rows; as it is where it names none."""
    if body.dataset is None:
        return body, None
    rows = await rows_of(context, request, caller, memory, body.dataset)
    inputs = await context.apart(request.state.body_bytes, _INPUTS.validate_python, rows.inputs)
    return body.model_copy(update={"inputs": inputs}), rows


async def probe_with_rows(
    context: Context, request: Request, caller: ApiKey, memory: Memory, body: ProbeRequest
) -> ProbeRequest:
    """The request with what the dataset of its `data` has: inputs, and labels, groups and split where not given."""
    if body.data is None or body.data.dataset is None:
        return body
    with pointing("/data"):
        data, rows = await with_rows(context, request, caller, memory, body.data)
    assert rows is not None
    update: dict[str, Any] = {"data": data}
    if body.labels is None:
        update["labels"] = _labels(rows)
    if body.groups is None and rows.groups is not None:
        update["groups"] = rows.groups
    if body.split is None and rows.splits is not None and _assigns(rows.splits):
        update["split"] = rows.splits
    return body.model_copy(update=update)


async def comparison_with_rows(
    context: Context, request: Request, caller: ApiKey, memory: Memory, body: ComparisonRequest
) -> ComparisonRequest:
    """The request with what its dataset has: inputs, and labels, groups and split where not given."""
    if body.dataset is None:
        return body
    rows = await rows_of(context, request, caller, memory, body.dataset)
    inputs = await context.apart(request.state.body_bytes, _INPUTS.validate_python, rows.inputs)
    update: dict[str, Any] = {"inputs": inputs}
    if body.labels is None:
        if rows.labels is None:
            raise InvalidRequest(
                "Nothing says what the probes are to learn.",
                errors=[
                    FieldError(
                        pointer="/labels",
                        detail="the dataset has no labels: give one for each of its rows. Whether the model is right "
                        "differs between variants, and is no label of a comparison",
                    )
                ],
            )
        update["labels"] = rows.labels
    if body.groups is None and rows.groups is not None:
        update["groups"] = rows.groups
    if body.split is None and rows.splits is not None and _assigns(rows.splits):
        update["split"] = rows.splits
    return body.model_copy(update=update)


def _labels(rows: Rows) -> Any:
    """The labels of a dataset; of questions whether the model has them right."""
    if rows.labels is not None:
        return rows.labels
    if rows.questions:
        return "correct"
    raise InvalidRequest(
        "Nothing says what the probe is to learn.",
        errors=[FieldError(pointer="/labels", detail="the dataset has no labels: give one for each of its rows")],
    )


def _assigns(splits: list[Any]) -> bool:
    """Whether these say which rows a probe learns from: `train` and `test`, or folds by number."""
    if all(split in ("train", "test") for split in splits):
        return {"train", "test"} == set(splits)
    return all(type(split) is int and 0 <= split < 2**31 for split in splits) and len(set(splits)) > 1
