"""Routes that the contract names and this version does not offer: each says so."""

from __future__ import annotations

import re

from fastapi import APIRouter

from bathyscope import errors
from bathyscope_service.context import Caller
from bathyscope_service.problems import responses

router = APIRouter(tags=["not offered yet"])

_ROUTES: dict[str, tuple[str, ...]] = {}


def _add(path: str, method: str) -> None:
    noun = path.split("/")[2]

    async def refuse(caller: Caller) -> None:
        raise errors.NotBuilt(f"{noun.title()} are part of the contract and not offered by this version.")

    name = f"{method.lower()}_{path.removeprefix('/v1/').replace('/', '_').replace('{', '').replace('}', '')}"
    refuse.__name__ = name
    refuse.__doc__ = "Part of the contract; this version answers 501."
    router.add_api_route(
        path,
        refuse,
        methods=[method],
        operation_id=name,
        summary="Not offered by this version",
        status_code=501,
        responses=responses(errors.NotBuilt),
        openapi_extra={
            "parameters": [
                {"name": parameter, "in": "path", "required": True, "schema": {"type": "string"}}
                for parameter in re.findall(r"\{(\w+)\}", path)
            ]
        },
    )


for _path, _methods in _ROUTES.items():
    for _method in _methods:
        _add(_path, _method)
