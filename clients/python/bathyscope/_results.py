"""Hidden states as numpy arrays: a safetensors artifact is downloaded, checked and mapped.

A small artifact is kept in memory. A larger one is streamed to a temporary file that has no name (the system frees
it with the last array, or with the process, however that ends) and mapped copy-on-write, so that memory holds only
the pages in use. A broken transfer goes on where it broke (`Range` with `If-Range`), and the SHA-256 of a whole
artifact is checked as it comes in.

safetensors: 8 bytes little-endian length of the header, the header as JSON (`{"name": {"dtype", "shape",
"data_offsets"}}`, offsets from the end of the header), then the numbers.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import itertools
import json
import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from bathyscope._digest import Digest
from bathyscope._fields import plain
from bathyscope._http import Answer, Attempts, Broken, Operation, Request, Retry, exchange, next_chunk, public, work
from bathyscope.errors import BathyscopeError, InvalidRequest, UnexpectedAnswer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

IN_MEMORY = 32 * 2**20
"""Bytes up to which an artifact is kept in memory."""

_LARGEST_HEADER = 100 * 2**20
# numpy has no bfloat16: its bits are read as uint16 and become the upper half of a float32.
_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U8": "|u1",
    "BOOL": "|b1",
}
_PIECE = 2**22
"""Elements that are widened from bfloat16 at a time."""


class Sink(Protocol):
    """Where a download goes."""

    def write(self, chunk: bytes, /) -> object:
        """Append."""

    def restart(self) -> None:
        """Forget everything written."""


def download(request: Request, retry: Retry, sink_for: SinkFor, *, sha256: str | None = None) -> Operation[Sink]:
    """Stream the answer into the sink that `sink_for(length)` makes for it (`None`: a length not announced).

    Raises `UnexpectedAnswer` when the whole does not have the SHA-256 given.
    """
    with Digest(sha256) as digest:
        sink = yield from _download(request, retry, sink_for, digest)
        if not digest.fits():
            text = f"{request.path}: what arrived is not the artifact, its SHA-256 is another; fetch again"
            raise UnexpectedAnswer(text)
        return sink


def _download(request: Request, retry: Retry, sink_for: SinkFor, digest: Digest) -> Operation[Sink]:
    attempts = Attempts(retry)
    whole = replace(request, headers={"Accept": "*/*", "Accept-Encoding": "identity", **request.headers})
    head = yield from exchange(whole, attempts, stream=True)
    length = _length(head)
    sink = sink_for(length)
    done = 0
    while True:
        cause: BathyscopeError | Broken = Broken(f"{request.path} ended after {done} of {length} bytes")
        try:
            while chunk := (yield from next_chunk()):
                sink.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                attempts.progressed()
            if length is None or done == length:
                return sink
        except Broken as error:
            cause = error
        yield from attempts.pause(public(cause))
        answer = yield from exchange(_rest(whole, head, done), attempts, stream=True)
        if _continues(answer, done):
            continue
        # The service sends it all again: another representation, or it serves no ranges.
        head, length, done = answer, _length(answer), 0
        sink.restart()
        digest.restart()


class SinkFor(Protocol):
    """Chooses a sink by the announced length."""

    def __call__(self, length: int | None, /) -> Sink:
        """The sink for that many bytes."""


def _length(head: Answer) -> int | None:
    value = head.headers.get("content-length", "")
    return int(value) if value.isdigit() and "content-encoding" not in head.headers else None


def _rest(whole: Request, head: Answer, done: int) -> Request:
    """The request for what is missing, or for all again where a part would not surely fit."""
    tag = head.headers.get("etag", "")
    if done == 0 or not tag or tag.startswith("W/") or "content-encoding" in head.headers:
        return whole
    return replace(whole, headers={**whole.headers, "Range": f"bytes={done}-", "If-Range": tag})


def _continues(answer: Answer, done: int) -> bool:
    if answer.status == 200:
        return False
    if answer.status == 206 and answer.headers.get("content-range", "").startswith(f"bytes {done}-"):
        return True
    raise UnexpectedAnswer(f"a download could not go on at byte {done}: the answer was {answer.status}")


class _Memory:
    """A sink in memory."""

    def __init__(self) -> None:
        self.content = bytearray()

    def write(self, chunk: bytes, /) -> None:
        self.content += chunk

    def restart(self) -> None:
        self.content.clear()


class _File:
    """A sink in a file."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file

    def write(self, chunk: bytes, /) -> None:
        self.file.write(chunk)

    def restart(self) -> None:
        self.file.seek(0)
        self.file.truncate()


def scratch_folder(cache_dir: Path | None) -> Path:
    """Where large results lie: the folder asked for, else `TMPDIR`, else `/var/tmp`, which unlike `/tmp` is on disk
    on systems that keep `/tmp` in memory."""
    if cache_dir is not None:
        cache_dir.mkdir(parents=True, exist_ok=True)
        return cache_dir
    lasting = Path("/var/tmp")
    if "TMPDIR" not in os.environ and os.access(lasting, os.W_OK):
        return lasting
    return Path(tempfile.gettempdir())


class Tensors:
    """A safetensors artifact, in memory or in a file that is open as long as this object lives.

    Each call of `array` gives an array of its own, writable without changing the artifact.
    """

    def __init__(self, source: bytearray | IO[bytes], folder: Path) -> None:
        self._source = source
        self._folder = folder
        if isinstance(source, bytearray):
            size = len(source)
            start, header = _parse_header(bytes(source[:8]), size, lambda count: bytes(source[8 : 8 + count]))
        else:
            source.flush()
            size = os.fstat(source.fileno()).st_size
            source.seek(0)
            start, header = _parse_header(source.read(8), size, source.read)
            weakref.finalize(self, source.close)
        self._start = start
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self._entries: dict[str, tuple[str, tuple[int, ...], int]] = {
            name: _checked(name, entry, size - start) for name, entry in header.items()
        }

    @property
    def names(self) -> list[str]:
        """The tensors it holds."""
        return list(self._entries)

    def array(self, name: str) -> NDArray[Any]:
        """The tensor of that name; bfloat16 as float32."""
        import numpy as np

        if name not in self._entries:
            raise UnexpectedAnswer(f"the artifact holds no {name!r}, only {', '.join(self._entries) or 'nothing'}")
        kind, shape, begin = self._entries[name]
        dtype = np.dtype(_DTYPES[kind])
        raw = self._raw(dtype, math.prod(shape), self._start + begin)
        array = self._widen(raw) if kind == "BF16" else raw
        return array.reshape(shape)

    def _raw(self, dtype: np.dtype[Any], count: int, offset: int) -> NDArray[Any]:
        import numpy as np

        if count == 0:
            return np.empty(0, dtype)
        if isinstance(self._source, bytearray):
            return np.frombuffer(self._source, dtype, count, offset).copy()
        return _mapped(self._source, dtype, count, offset)

    def _widen(self, bits: NDArray[Any]) -> NDArray[Any]:
        """bfloat16 -> float32, exactly: `bits << 16`. A large one goes to a file, piece by piece."""
        import numpy as np

        if bits.nbytes * 2 <= IN_MEMORY:
            return (bits.astype(np.uint32) << 16).view(np.float32)
        with tempfile.TemporaryFile(prefix="bathyscope-", dir=self._folder) as file:
            for begin in range(0, len(bits), _PIECE):
                file.write((bits[begin : begin + _PIECE].astype(np.uint32) << 16).data)
            file.flush()
            return _mapped(file, np.dtype("<f4"), len(bits), 0)


def _mapped(file: IO[bytes], dtype: np.dtype[Any], count: int, offset: int) -> NDArray[Any]:
    """A copy-on-write view of a part of the file; it outlives the file object."""
    import numpy as np

    before = offset % mmap.ALLOCATIONGRANULARITY
    length = before + count * dtype.itemsize
    pages = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=offset - before)
    return np.frombuffer(pages, dtype, count, before)


def _parse_header(prefix: bytes, size: int, read: Any) -> tuple[int, dict[str, Any]]:
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(_LARGEST_HEADER, size - 8):
        raise UnexpectedAnswer("what arrived is not a safetensors file")
    try:
        header = json.loads(read(length))
    except ValueError as error:
        raise UnexpectedAnswer("what arrived is not a safetensors file: its header is not JSON") from error
    if not isinstance(header, dict):
        raise UnexpectedAnswer("what arrived is not a safetensors file: its header is no object")
    return 8 + length, header


def _checked(name: str, entry: Any, room: int) -> tuple[str, tuple[int, ...], int]:
    """dtype, shape and first byte of a tensor that lies within the file."""
    try:
        kind, shape = str(entry["dtype"]), tuple(int(extent) for extent in entry["shape"])
        begin, end = (int(offset) for offset in entry["data_offsets"])
        width = int(_DTYPES[kind][2:])
    except (KeyError, TypeError, ValueError) as error:
        raise UnexpectedAnswer(f"the artifact's tensor {name!r} is not described as safetensors has it") from error
    if not (0 <= begin <= end <= room and min(shape, default=0) >= 0 and end - begin == math.prod(shape) * width):
        raise UnexpectedAnswer(f"the artifact's tensor {name!r} lies outside the file")
    return kind, shape, begin


def fetch_tensors(
    target: str,
    retry: Retry,
    *,
    cache_dir: Path | None,
    query: dict[str, str],
    sha256: str | None = None,
    keep_at: str | os.PathLike[str] | None = None,
) -> Operation[Tensors]:
    """Download safetensors, to memory if it is small, else to disk; `keep_at` names a file that stays."""
    folder = scratch_folder(cache_dir)
    partial = None if keep_at is None else _partial(Path(keep_at))
    opened: list[IO[bytes]] = []

    def sink_for(length: int | None) -> Sink:
        if partial is not None:
            opened.append(partial.open("w+b"))
        elif length is not None and length <= IN_MEMORY:
            return _Memory()
        else:
            opened.append(tempfile.TemporaryFile(prefix="bathyscope-", dir=folder))  # noqa: SIM115  lives on in Tensors
        return _File(opened[-1])

    request = Request("GET", target, query=query)
    try:
        sink = yield from download(request, retry, sink_for, sha256=sha256)
        tensors = Tensors(sink.content if isinstance(sink, _Memory) else opened[-1], folder)
        if partial is not None and keep_at is not None:
            # Never written over in place: arrays may still be mapped from the file that was there.
            partial.replace(keep_at)
    except BaseException:
        for file in opened:
            file.close()
        if partial is not None:
            partial.unlink(missing_ok=True)
        raise
    return tensors


def _partial(final: Path) -> Path:
    return final.with_name(f".{final.name}.{os.getpid()}.part")


def save(
    target: str,
    retry: Retry,
    destination: str | os.PathLike[str],
    *,
    query: dict[str, str],
    sha256: str | None = None,
) -> Operation[Path]:
    """Download to a file that is there only when it is complete; returns its path."""
    final = Path(destination)
    partial = _partial(final)
    try:
        with partial.open("wb") as file:
            yield from download(Request("GET", target, query=query), retry, lambda length: _File(file), sha256=sha256)
        partial.replace(final)
    finally:
        partial.unlink(missing_ok=True)
    return final


def selection(layers: str | Iterable[Any] | None, rows: range | slice | int | str | None, count: int) -> dict[str, str]:
    """Query members `layers` and `rows` (inclusive, as the service has them) for a part of `count` inputs."""
    chosen: dict[str, str] = {}
    if layers is not None:
        chosen["layers"] = layers if isinstance(layers, str) else ",".join(str(layer) for layer in plain(layers))
    if rows is None:
        return chosen
    if isinstance(rows, str):
        return {**chosen, "rows": rows}
    first, last = chosen_rows(rows, count)
    return {**chosen, "rows": f"{first}-{last - 1}"}


def chosen_rows(rows: range | slice | int | str | None, count: int) -> tuple[int, int]:
    """Inputs `[first, last)` of a run of `count` inputs; all of them by default."""
    if rows is None:
        return 0, count
    if isinstance(rows, str):
        first, _, last = rows.partition("-")
        if not (first.isdecimal() and (last or first).isdecimal()):
            raise InvalidRequest(f"rows is given as first-last, both inclusive, such as 0-99, not {rows!r}")
        rows = range(int(first), int(last or first) + 1)
    elif isinstance(rows, slice):
        rows = range(*rows.indices(count))
    elif not isinstance(rows, range):
        index = int(rows)
        rows = range(index % count, index % count + 1) if -count <= index < count else range(0)
    if len(rows) == 0 or rows.step != 1:
        raise InvalidRequest("rows is a run of inputs that follow each other, as slice(0, 100); none are chosen here")
    return rows[0], rows[-1] + 1


def per_input(states: NDArray[Any], offsets: NDArray[Any] | None) -> Iterator[NDArray[Any]]:
    """Views, one an input: of pooled states `(layers, hidden)`, else `(tokens of the input, layers, hidden)`; of a
    paired extraction with the axis of variants before that."""
    if offsets is None:
        for index in range(states.shape[-3]):
            yield states[..., index, :, :]
        return
    for begin, end in itertools.pairwise(offsets):
        yield states[..., begin:end, :, :]


def array_of(tensors: Tensors, name: str) -> Operation[NDArray[Any]]:
    """A tensor of an artifact; reading and widening may take a while."""
    array = yield from work(lambda: tensors.array(name))
    return array
