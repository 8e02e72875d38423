"""`GET /v1/probes/{id}/plots/{name}` and `GET /v1/predictions/{id}/plots/{name}`: reports as pictures, and
`GET /v1/probes/{id}/report`: as a page."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Query
from starlette.responses import HTMLResponse, Response

from bathyscope import errors
from bathyscope.types import Comparison, Experiment, Prediction, Probe
from bathyscope_backplane.artifacts import Resource
from bathyscope_service.comparisons.endpoints import comparison_of
from bathyscope_service.context import Caller, Context, Ctx, Held
from bathyscope_service.extractions.representations import row_range
from bathyscope_service.problems import responses
from bathyscope_service.resources import resource_of

router = APIRouter(tags=["plots"])

_MEDIA = {"png": "image/png", "svg": "image/svg+xml"}
_PARSED_TIMES = 6
"""Bytes of memory for a byte of a prediction's numbers, parsed."""

_MOST_ROWS, _MOST_TOKENS = 60, 6000
"""Of a prediction, what a picture has room for; no more is read into objects."""

_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The picture.",
        "content": {media: {"schema": {"type": "string", "format": "binary"}} for media in _MEDIA.values()},
    },
    **responses(errors.NotFound, errors.Expired, errors.InvalidRequest, errors.QuotaExceeded),
}
_Format = Annotated[Literal["png", "svg"], Query(description="What the picture is written as.")]
_Theme = Annotated[Literal["light", "dark"], Query(description="Of the page it is for.")]


@router.get(
    "/v1/probes/{probe_id}/plots/{name}",
    summary="A probe's report as a picture",
    response_class=Response,
    responses=_RESPONSES,
)
async def get_probe_plot(
    probe_id: str,
    name: Literal["layer_curve", "reliability", "roc", "risk_coverage"],
    context: Ctx,
    caller: Caller,
    format: _Format = "png",
    theme: _Theme = "light",
) -> Response:
    """`layer_curve`, `reliability` (before and after calibration), `roc`, or `risk_coverage` (probes on `correct`)."""
    resource = await resource_of(context, caller, "probe", probe_id)

    def draw() -> bytes:
        from bathyscope import plots

        return plots.rendered(Probe.model_validate(resource.body), name, format=format, theme=theme)

    return await _picture(context, resource, draw, format)


@router.get(
    "/v1/probes/{probe_id}/report",
    summary="A probe's report as a page",
    response_class=HTMLResponse,
    responses=responses(errors.NotFound, errors.Expired),
)
async def get_probe_report(probe_id: str, context: Ctx, caller: Caller) -> Response:
    """One HTML page with every figure and picture inside: it needs no network and runs no script."""
    resource = await resource_of(context, caller, "probe", probe_id)
    return await _page(context, lambda: Probe.model_validate(resource.body))


@router.get(
    "/v1/comparisons/{comparison_id}/plots/{name}",
    summary="A comparison as a picture",
    response_class=Response,
    responses=_RESPONSES,
)
async def get_comparison_plot(
    comparison_id: str,
    name: Literal["layer_curve", "steps", "transfer", "layer_shift"],
    context: Ctx,
    caller: Caller,
    memory: Held,
    format: _Format = "png",
    theme: _Theme = "light",
) -> Response:
    """`layer_curve`, a line a variant; `steps` (of checkpoints); `transfer`, what probes trained on one are worth on
    another; `layer_shift`."""
    resource, content = await comparison_of(context, caller, memory, comparison_id)

    def draw() -> bytes:
        from bathyscope import plots

        return plots.rendered(Comparison.model_validate_json(content), name, format=format, theme=theme)

    return await _picture(context, resource, draw, format)


@router.get(
    "/v1/comparisons/{comparison_id}/report",
    summary="A comparison as a page",
    response_class=HTMLResponse,
    responses=responses(errors.NotFound, errors.Expired, errors.QuotaExceeded),
)
async def get_comparison_report(comparison_id: str, context: Ctx, caller: Caller, memory: Held) -> Response:
    """One HTML page with every figure and picture inside: it needs no network and runs no script."""
    _, content = await comparison_of(context, caller, memory, comparison_id)
    return await _page(context, lambda: Comparison.model_validate_json(content))


@router.get(
    "/v1/experiments/{experiment_id}/plots/{name}",
    summary="An experiment as a picture",
    response_class=Response,
    responses=_RESPONSES,
)
async def get_experiment_plot(
    experiment_id: str,
    name: Literal["layer_curve", "transfer", "layer_shift"],
    context: Ctx,
    caller: Caller,
    format: _Format = "png",
    theme: _Theme = "light",
) -> Response:
    """`layer_curve`, a line a variant; with an adapter `layer_shift`, and `transfer` where both share labels."""
    resource = await resource_of(context, caller, "experiment", experiment_id)

    def draw() -> bytes:
        from bathyscope import plots

        return plots.rendered(Experiment.model_validate(resource.body), name, format=format, theme=theme)

    return await _picture(context, resource, draw, format)


@router.get(
    "/v1/experiments/{experiment_id}/report",
    summary="An experiment as a page",
    response_class=HTMLResponse,
    responses=responses(errors.NotFound, errors.Expired),
)
async def get_experiment_report(experiment_id: str, context: Ctx, caller: Caller) -> Response:
    """One HTML page with every figure and picture inside: it needs no network and runs no script."""
    resource = await resource_of(context, caller, "experiment", experiment_id)
    return await _page(context, lambda: Experiment.model_validate(resource.body))


@router.get(
    "/v1/predictions/{prediction_id}/plots/{name}",
    summary="A prediction's tokens as a picture",
    response_class=Response,
    responses=_RESPONSES,
)
async def get_prediction_plot(
    prediction_id: str,
    name: Literal["tokens"],
    context: Ctx,
    caller: Caller,
    memory: Held,
    format: _Format = "png",
    theme: _Theme = "light",
    rows: Annotated[str | None, Query(max_length=40, description="Inputs, inclusive, as `0-9`.")] = None,
) -> Response:
    """`tokens`: every token on the colour of its score. As many inputs as fit are shown, from the first asked for."""
    resource = await resource_of(context, caller, "prediction", prediction_id)
    blob = resource.blobs["prediction"]
    memory.hold(_PARSED_TIMES * blob.bytes)
    content = await context.plane.store.get(blob.key)
    if content is None:
        raise errors.NotFound(f"The prediction {prediction_id} was deleted.")

    def draw() -> bytes:
        from bathyscope import plots

        found = orjson.loads(content)
        tokens = found.get("tokens")
        if tokens is None:
            raise errors.InvalidRequest("The prediction has no scores of tokens; ask again with per_token.")
        first, last = (0, len(tokens)) if rows is None else row_range(rows, len(tokens))
        shown = tokens[first : min(last, first + _MOST_ROWS)]
        prediction = Prediction.model_validate(resource.body | {"tokens": [row[:_MOST_TOKENS] for row in shown]})
        return plots.rendered(prediction, name, format=format, theme=theme, unshown=last - first - len(shown))

    return await _picture(context, resource, draw, format)


async def _page(context: Context, parse: Callable[[], Any]) -> Response:
    def write() -> str:
        from bathyscope import reports

        return reports.rendered(parse())

    async with context.heavy:
        content = await asyncio.to_thread(write)
    headers = {"Content-Security-Policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'"}
    return HTMLResponse(content, headers=headers)


async def _picture(context: Context, resource: Resource, draw: Callable[[], bytes], format: str) -> Response:
    """Drawn in a thread, few at a time, whatever its size: a picture takes a good part of a second."""
    async with context.heavy:
        content = await asyncio.to_thread(draw)
    headers = {
        "Cache-Control": "private, max-age=3600",
        # Opened by itself, an SVG is a document: nothing in it may run or reach out.
        "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'",
        "Content-Disposition": f'inline; filename="{resource.id}.{format}"',
    }
    return Response(content, headers=headers, media_type=_MEDIA[format])
