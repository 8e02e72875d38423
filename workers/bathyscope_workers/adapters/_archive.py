"""Entries of tar, tar.gz and zip files, one after the other, with every claim of the archive held against its bytes.

`tarfile` reads a pax header of any size into memory, and `zipfile` a directory of any size: the bounds come first here.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Protocol

from bathyscope import errors

CHUNK = 1 << 20
_BLOCK = 512
_MAX_EXTRA = 64 << 10
"""Of one pax header or long name."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one archive."""

    entries: int = 1000
    """Files and folders in it."""
    total_bytes: int = 32 << 30
    """Of all entries, unpacked or skipped."""
    ratio: int = 100
    """Unpacked to packed bytes, beyond the first `free_bytes`: float weights do not shrink to a half, zeros to a
    thousandth."""
    free_bytes: int = 16 << 20
    """So much is unpacked whatever the ratio."""

    def check(self, unpacked: int, packed: int) -> None:
        """Raises AdapterTooLarge."""
        if unpacked > self.total_bytes:
            raise errors.AdapterTooLarge(
                f"the archive unpacks to more than {self.total_bytes} bytes; pack only the adapter's own files"
            )
        if unpacked > self.free_bytes and unpacked > self.ratio * packed:
            raise errors.AdapterTooLarge(
                f"the archive unpacks to more than {self.ratio} times its size, as no weights do; pack it again"
            )


class Entry(Protocol):
    """One entry. `chunks` or `skip` is called before the next is taken."""

    name: str
    is_folder: bool

    def chunks(self) -> Iterator[bytes]:
        """Its bytes."""

    def skip(self) -> None:
        """Pass over it."""


def entries_of(
    file: BinaryIO, size: int, limits: Limits, notes: list[str], beat: Callable[[], None]
) -> Iterator[Entry]:
    """The entries of an archive of `size` bytes; the format is told by its first bytes. `beat` is called for each chunk
    of those that are passed over."""
    from bathyscope_workers.adapters._zip import zip_entries

    start = file.read(_BLOCK)
    file.seek(0)
    if start.startswith(b"\x1f\x8b"):
        return _tar_entries(_Gunzip(file, limits).read, limits, notes, beat)
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return zip_entries(file, size, limits, notes)
    if start[257:262] == b"ustar" or _is_header(start) or start == bytes(_BLOCK):  # zeros are the end of a tar
        return _tar_entries(file.read, limits, notes, beat)
    raise errors.AdapterArchiveUnreadable("the file is no tar, tar.gz or zip archive; pack the adapter's folder as one")


def truncated() -> errors.AdapterIncomplete:
    """The archive ends before its last entry does."""
    return errors.AdapterIncomplete("the archive ends too early; transfer it again")


def unreadable(why: str) -> errors.AdapterArchiveUnreadable:
    """The archive is corrupt."""
    return errors.AdapterArchiveUnreadable(f"the archive cannot be read: {why}"[:300] + "; pack it again")


def unsafe(why: str, name: str) -> errors.AdapterArchiveUnsafe:
    """The archive holds what has no place in it."""
    return errors.AdapterArchiveUnsafe(f"the archive holds {why}; pack only the adapter's own files", names=[name])


class _Gunzip:
    """The bytes in a gzip file; members that follow each other count as one."""

    def __init__(self, file: BinaryIO, limits: Limits) -> None:
        self._file = file
        self._limits = limits
        self._inflate = zlib.decompressobj(wbits=31)
        self._packed = 0
        self._unpacked = 0

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes, fewer only at the end. Raises AdapterIncomplete where the file was cut off."""
        found = bytearray()
        while len(found) < size:
            source = self._inflate.unconsumed_tail or self._more()
            if self._inflate.eof:
                rest = self._inflate.unused_data or source
                if not rest.startswith(b"\x1f\x8b"):
                    break
                self._inflate, source = zlib.decompressobj(wbits=31), rest
            elif not source:
                raise truncated()
            try:
                found += self._inflate.decompress(source, size - len(found))
            except zlib.error as error:
                raise unreadable(str(error)) from None
        self._unpacked += len(found)
        self._limits.check(self._unpacked, self._packed)
        return bytes(found)

    def _more(self) -> bytes:
        if self._inflate.eof and self._inflate.unused_data:
            return b""
        data = self._file.read(64 << 10)
        self._packed += len(data)
        return data


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


class _TarEntry:
    def __init__(self, name: str, size: int, is_folder: bool, read: Callable[[int], bytes]) -> None:
        self.name = name
        self.is_folder = is_folder
        self._size = size
        self._read = read
        self.done = False

    def chunks(self) -> Iterator[bytes]:
        left = self._size
        while left:
            chunk = self._read(min(left, CHUNK))
            if not chunk:
                raise truncated()
            left -= len(chunk)
            yield chunk
        if self._size % _BLOCK:
            padding = _BLOCK - self._size % _BLOCK
            if len(self._read(padding)) < padding:
                raise truncated()
        self.done = True

    def skip(self) -> None:
        for _ in self.chunks():
            pass


def _tar_entries(
    read_on: Callable[[int], bytes], limits: Limits, notes: list[str], beat: Callable[[], None]
) -> Iterator[Entry]:
    def read(size: int) -> bytes:
        beat()
        return read_on(size)

    count = total = 0
    extra: dict[str, str] = {}
    while (block := read(_BLOCK)) != bytes(_BLOCK):
        if len(block) < _BLOCK:
            raise truncated()
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise unreadable(str(error)) from None
        count += 1
        if count > limits.entries:
            raise errors.AdapterTooLarge(f"the archive holds more than {limits.entries} entries; pack only the adapter")
        if info.size < 0:
            raise unreadable("an entry of negative size")
        if info.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME):
            if info.size > _MAX_EXTRA:
                raise unsafe(f"a header of {info.size} bytes", info.name)
            data = b"".join(_TarEntry("", info.size, False, read).chunks())
            fields = _extra_fields(info, data)
            # A global header's path or size would be every entry's: nobody writes one.
            if info.type == tarfile.XGLTYPE and fields.keys() & {"path", "size"}:
                raise unsafe("a header that renames every entry", info.name)
            if info.type != tarfile.XGLTYPE:
                extra |= fields
            continue
        name = extra.get("path", info.name)
        size = _pax_size(extra["size"]) if "size" in extra else info.size
        extra = {}
        what = _not_plain(info)
        if what:
            raise unsafe(what, name)
        if info.isdir():
            size = 0
        total += size
        limits.check(total, total)
        entry = _TarEntry(name, size, info.isdir(), read)
        yield entry
        if not entry.done:
            entry.skip()
    _drain(read, notes)


def _not_plain(info: tarfile.TarInfo) -> str | None:
    if info.type in (tarfile.SYMTYPE, tarfile.GNUTYPE_LONGLINK):
        return "a symbolic link"
    if info.type == tarfile.LNKTYPE:
        return "a hard link"
    if info.type in (tarfile.CHRTYPE, tarfile.BLKTYPE):
        return "a device"
    if info.type == tarfile.FIFOTYPE:
        return "a pipe"
    if info.type == tarfile.GNUTYPE_SPARSE:
        return "a sparse file"
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE):
        return "an entry that is no regular file"
    return None


def _extra_fields(info: tarfile.TarInfo, data: bytes) -> dict[str, str]:
    """What a pax header or a GNU long name says of the next entry."""
    if info.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    fields: dict[str, str] = {}
    while data.rstrip(b"\0"):
        digits, space, _ = data.partition(b" ")
        length = int(digits) if space and digits.isdigit() and len(digits) < 6 else 0
        record = data[len(digits) + 1 : length]
        key, equals, value = record.partition(b"=")
        if not length or not equals or not value.endswith(b"\n") or length > len(data):
            raise unreadable("a pax header that does not follow the format")
        name = key.decode("utf-8", "replace")
        if name.startswith("GNU.sparse"):
            raise unsafe("a sparse file", info.name)
        fields[name] = value[:-1].decode("utf-8", "surrogateescape")
        data = data[length:]
    return fields


def _pax_size(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 15:
        raise unreadable("a size that is no number")
    return int(text)


def _drain(read: Callable[[int], bytes], notes: list[str]) -> None:
    """Read on to the end, so that a gzip checksum is checked too."""
    garbage = 0
    while chunk := read(CHUNK):
        garbage += len(chunk.strip(b"\0"))
    if garbage:
        notes.append(f"archive: {garbage} bytes after its end were not read")
