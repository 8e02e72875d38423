"""An uploaded archive: read from a multipart body to a file of the data folder, piece by piece, within bounds.

Everything is counted while it arrives: the file, the fields, the parts, their heads. The name that a client gives its
file is not looked at. The file is locked while it is being written, so that what a killed process left is told from
what is in the making, and goes when the next upload begins.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from fastapi import Request
from pydantic_core import from_json
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from bathyscope.errors import (
    FieldError,
    InvalidRequest,
    MalformedBody,
    OutOfSpace,
    QuotaExceeded,
    RequestTimeout,
    TooLarge,
    UnsupportedMedia,
)
from bathyscope_backplane.ids import new_id
from bathyscope_backplane.settings import Limits
from bathyscope_service.bodies import refuse_wide
from bathyscope_service.context import Places

FILE = "file"
ARCHIVE = "archive (tar, tar.gz or zip)"
FIELDS = ("base_model", "name", "metadata", "priority", "webhook")
"""The parts of the body; all but the file are short texts."""

_MOST_PARTS = 16
_MOST_FIELD_BYTES = 64 * 1024
"""Of all fields together."""

_FRAME_BYTES = 256 * 1024
"""What a body may hold beside its file: fields, heads and boundaries."""

_NAME = re.compile(rb"[a-z_]{1,32}")


@dataclass(slots=True)
class Upload:
    """A body that has arrived."""

    path: Path
    """The archive."""

    bytes: int
    sha256: str
    """Of the archive."""

    fields: dict[str, str]

    def content(self, *json_fields: str) -> dict[str, Any]:
        """The fields as a JSON body would have them, `json_fields` read. Raises `InvalidRequest`."""
        found: dict[str, Any] = dict(self.fields)
        for name in (name for name in json_fields or ("metadata",) if name in found):
            try:
                found[name] = from_json(found[name], allow_inf_nan=False)
            except ValueError:
                raise InvalidRequest(
                    "A field of the request is not valid.",
                    errors=[FieldError(pointer=f"/{name}", detail="a JSON object as a text")],
                ) from None
        refuse_wide(found)
        return found

    @property
    def digest(self) -> str:
        """Of the whole request, for the Idempotency-Key."""
        return hashlib.sha256(json.dumps([self.sha256, sorted(self.fields.items())]).encode()).hexdigest()


@dataclass(slots=True)
class _Parts:
    """What the parser's callbacks gather."""

    file: IO[bytes]
    limit: int
    names: tuple[str, ...] = FIELDS
    what: str = ARCHIVE
    size: int = 0
    digest: Any = field(default_factory=hashlib.sha256)
    fields: dict[str, bytearray] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    ended: bool = False
    _parts: int = 0
    _field_bytes: int = 0
    _name: str = ""
    _header: bytearray = field(default_factory=bytearray)
    _value: bytearray = field(default_factory=bytearray)
    _disposition: bytes = b""

    def callbacks(self) -> dict[str, Any]:
        return {
            "on_part_begin": self._begin,
            "on_header_begin": self._header_begin,
            "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._data,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        self._parts += 1
        self._disposition = b""
        if self._parts > _MOST_PARTS:
            raise MalformedBody(f"The body has more than {_MOST_PARTS} parts.")

    def _header_begin(self) -> None:
        self._header.clear()
        self._value.clear()

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._value)

    def _headers_finished(self) -> None:
        kind, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"")
        if kind != b"form-data" or not _NAME.fullmatch(name):
            raise MalformedBody("A part of the body has no name; each is a field of the request.")
        self._name = name.decode()
        if self._name == "source":
            raise _invalid("/source", "an archive is uploaded here; send either a file or a source")
        if self._name not in (FILE, *self.names):
            raise _invalid(f"/{self._name}", "this field is not known")
        if self._name in self.seen:
            raise _invalid(f"/{self._name}", "it comes twice")
        self.seen.add(self._name)

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._name != FILE:
            self._field_bytes += end - start
            if self._field_bytes > _MOST_FIELD_BYTES:
                raise TooLarge(
                    f"The fields beside the file have more than {_MOST_FIELD_BYTES:,} bytes.", limit=_MOST_FIELD_BYTES
                )
            self.fields.setdefault(self._name, bytearray()).extend(data[start:end])
            return
        self.size += end - start
        if self.size > self.limit:
            raise _too_large(self.size, self.limit, self.what)
        piece = memoryview(data)[start:end]
        self.digest.update(piece)
        self.file.write(piece)

    def _end(self) -> None:
        self.ended = True


def boundary_of(request: Request) -> bytes:
    """The boundary of a multipart body. Raises `UnsupportedMedia` and `MalformedBody`."""
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("identity", ""):
        raise UnsupportedMedia("An upload is not compressed as a whole: the archive itself may be.")
    _, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary", b"")
    if not 1 <= len(boundary) <= 70:
        raise MalformedBody("The body's type names no boundary of 1 to 70 characters.")
    return bytes(boundary)


@contextmanager
def places_for(places: Places, owner: str) -> Iterator[None]:
    """A place for an upload. Raises `QuotaExceeded`."""
    with places.take(owner) as free:
        if not free:
            raise QuotaExceeded(
                f"{places.taken[owner]} uploads of this key are arriving, and the limits are {places.per_key} for a "
                f"key and {places.total} in all: send one after the other.",
                retry_after=10,
                limit=places.per_key,
            )
        yield


async def read_upload(
    request: Request,
    limits: Limits,
    file: IO[bytes],
    path: Path,
    *,
    names: tuple[str, ...] = FIELDS,
    most: int | None = None,
    what: str = ARCHIVE,
) -> Upload:
    """The body of a request: its file in `file`, which lies at `path`, is `what`, of `most` bytes; its fields `names`.

    Raises 400, 408, 413, 415, 422 and 503 problems.
    """
    boundary, most = boundary_of(request), limits.max_archive_bytes if most is None else most
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared[:20]) > most + _FRAME_BYTES:
        raise _too_large(int(declared[:20]), most, what)
    parts, arrived = _Parts(file, most, names, what), 0
    try:
        parser = MultipartParser(boundary, parts.callbacks())  # type: ignore[arg-type]
        async with asyncio.timeout(limits.upload_seconds) as deadline:
            arriving = aiter(request.stream())
            while True:
                try:
                    async with asyncio.timeout(limits.stall_seconds):
                        chunk = await anext(arriving, None)
                except TimeoutError:
                    if deadline.expired():
                        raise
                    raise RequestTimeout(
                        f"The upload brought nothing for {limits.stall_seconds:g} seconds.", limit=limits.stall_seconds
                    ) from None
                if chunk is None:
                    break
                arrived += len(chunk)
                if arrived > most + _FRAME_BYTES:  # with what comes after the last part
                    raise _too_large(arrived, most, what)
                if not parts.ended:
                    await asyncio.to_thread(parser.write, chunk)
    except TimeoutError:
        raise RequestTimeout(
            f"The upload did not arrive within {limits.upload_seconds:g} seconds.", limit=limits.upload_seconds
        ) from None
    except ClientDisconnect:
        raise MalformedBody("The connection was closed before the body had arrived.") from None
    except FormParserError as error:
        raise MalformedBody(f"The body is not multipart/form-data that can be read: {str(error)[:200]}.") from None
    except OSError as error:
        raise _of_the_disk(error) from error
    if not parts.ended:
        raise MalformedBody("The body ends before its last part does.")
    if FILE not in parts.seen or not parts.size:
        raise _invalid("/file", f"the {what}; it is missing, or empty")
    fields: dict[str, str] = {}
    for name, content in parts.fields.items():
        try:
            fields[name] = content.decode()
        except UnicodeDecodeError:
            raise _invalid(f"/{name}", "a text in UTF-8") from None
    try:
        file.flush()
    except OSError as error:
        raise _of_the_disk(error) from error
    return Upload(path, parts.size, parts.digest.hexdigest(), fields)


@contextmanager
def place_for_upload(folder: Path) -> Iterator[tuple[IO[bytes], Path]]:
    """A new file that is locked while the block runs, and gone after it unless it was moved away."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _sweep(folder)
    while True:
        path = folder / new_id("job")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        file = os.fdopen(descriptor, "w+b", buffering=1 << 20)
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists():  # else another one took it for a dead process's
                break
        file.close()
    try:
        yield file, path
    finally:
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # what could not be written is of no use any more
            file.close()


def _sweep(folder: Path) -> None:
    """Remove what processes that died left."""
    for path in folder.iterdir():
        with contextlib.suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _of_the_disk(error: OSError) -> OutOfSpace:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise error
    return OutOfSpace("The service's disk has no room for this archive; try again later.", retry_after=60)


def _too_large(size: int, limit: int, what: str) -> TooLarge:
    return TooLarge(
        f"The {what} has {size:,} bytes or more and the limit is {limit:,}; send only what is needed.",
        estimate=size,
        limit=limit,
    )


def _invalid(pointer: str, detail: str) -> InvalidRequest:
    return InvalidRequest("A field of the request is not valid.", errors=[FieldError(pointer=pointer, detail=detail)])
