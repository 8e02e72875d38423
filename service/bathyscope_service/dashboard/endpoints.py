"""`/` and `/dashboard/…`: static files of the package, open without a key. Whatever they show the browser asks for
itself, with the key that was typed in."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable

from fastapi import APIRouter, Request
from starlette.responses import Response

from bathyscope import errors

router = APIRouter()

FOLDER = "/dashboard/"

_MEDIA = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "mjs": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "txt": "text/plain; charset=utf-8",
}

HEADERS = {
    # Pictures are fetched with the key and shown as blobs. No inline script or style, no eval, no form that leaves.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Asked again each time, and answered 304: after an update no file of the one before is mixed in.
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class _File:
    content: bytes
    media: str
    etag: str


@router.get("/", include_in_schema=False)
async def front_page(request: Request) -> Response:
    """The dashboard."""
    return _answer(request, "index.html")


@router.get("/dashboard/{path:path}", include_in_schema=False)
async def static_file(path: str, request: Request) -> Response:
    """One file of it."""
    return _answer(request, path)


def _answer(request: Request, path: str) -> Response:
    found = _files().get(path)
    if found is None:
        raise errors.NotFound("The dashboard has no file of that name.")
    headers = {**HEADERS, "ETag": found.etag}
    if found.etag in (tag.strip() for tag in request.headers.get("if-none-match", "").split(",")):
        return Response(status_code=304, headers=headers)
    return Response(found.content, headers=headers, media_type=found.media)


@cache
def _files() -> Mapping[str, _File]:
    """Read once, by name: a path of the request is never one of the file system."""
    found: dict[str, _File] = {}

    def gather(folder: Traversable, prefix: str) -> None:
        for entry in folder.iterdir():
            if entry.is_dir():
                gather(entry, f"{prefix}{entry.name}/")
            elif (media := _MEDIA.get(entry.name.rpartition(".")[2])) is not None:
                content = entry.read_bytes()
                found[prefix + entry.name] = _File(content, media, f'"{hashlib.sha256(content).hexdigest()[:32]}"')

    gather(files("bathyscope_service.dashboard") / "static", "")
    return found
