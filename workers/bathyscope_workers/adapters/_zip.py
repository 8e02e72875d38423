"""Entries of a zip file. The directory at its end is bounded before `zipfile` parses it, and what it says of each
entry is held against the entry's own header and descriptor, since programs differ in which of them they believe."""

from __future__ import annotations

import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from bathyscope import errors
from bathyscope_workers.adapters._archive import CHUNK, Entry, Limits, truncated, unreadable, unsafe

_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCAL = struct.Struct("<4s5H3L2H")
_MAX_DIRECTORY = 4 << 20
_DESCRIPTOR_FLAG, _UTF8_FLAG, _ENCRYPTED_FLAGS = 0x8, 0x800, 0x1 | 0x40 | 0x2000
_UNKNOWN = 0xFFFFFFFF
_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a pipe",
}


def zip_entries(file: BinaryIO, size: int, limits: Limits, notes: list[str]) -> Iterator[Entry]:
    """See `entries_of`."""
    directory_start = _check_directory(file, size, limits, notes)
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, UnicodeDecodeError) as error:
        raise unreadable(str(error)) from None
    with archive:
        if archive.start_dir != directory_start:
            raise unsafe("two directories", "central directory")
        infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
        if len(infos) > limits.entries:
            raise errors.AdapterTooLarge(f"the archive holds more than {limits.entries} entries; pack only the adapter")
        limits.check(sum(info.file_size for info in infos), sum(info.compress_size for info in infos))
        ends = [*(info.header_offset for info in infos), directory_start][1:]
        for info, following in zip(infos, ends, strict=True):
            _check_entry(file, info, following)
        for info in infos:
            yield _ZipEntry(archive, info)


class _ZipEntry:
    def __init__(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
        self.name = info.orig_filename
        self.is_folder = info.is_dir()
        self._archive = archive
        self._info = info

    def chunks(self) -> Iterator[bytes]:
        left = self._info.file_size
        try:
            with self._archive.open(self._info) as source:
                while chunk := source.read(CHUNK):
                    left -= len(chunk)
                    if left < 0:
                        raise unsafe("an entry longer than its directory says", self.name)
                    yield chunk
        except EOFError:
            raise truncated() from None
        except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, ValueError) as error:
            raise unreadable(f"{type(error).__name__} {error}") from None
        if left:
            raise unsafe("an entry shorter than its directory says", self.name)

    def skip(self) -> None:
        """A zip is not read in order: nothing to pass over."""


def _check_directory(file: BinaryIO, size: int, limits: Limits, notes: list[str]) -> int:
    """Bound the directory and the number of entries. Returns where the directory begins."""
    tail_size = min(size, (1 << 16) + _END.size + _END64_LOCATOR.size + _END64.size)
    file.seek(size - tail_size)
    tail = file.read(tail_size)
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < _END.size:
        raise truncated()
    _, disk, first_disk, here, count, length, offset, comment = _END.unpack_from(tail, at)
    end = size - tail_size + at
    if (rest := len(tail) - at - _END.size) != comment:
        notes.append(f"archive: {rest} bytes after its end were not read")
    if disk or first_disk:
        raise unreadable("it is one part of several")
    locator = at - _END64_LOCATOR.size
    if locator >= 0 and tail[locator : locator + 4] == b"PK\6\7":
        _, _, end64, _ = _END64_LOCATOR.unpack_from(tail, locator)
        file.seek(min(end64, size))
        record = file.read(_END64.size)
        if len(record) < _END64.size or record[:4] != b"PK\6\6":
            raise unreadable("its zip64 record is not where it should be")
        *_, here, count, length, offset = _END64.unpack(record)
        end = end64
    if count > limits.entries or here != count:
        raise errors.AdapterTooLarge(
            f"the archive claims {count} entries; at most {limits.entries} are read: pack only the adapter"
        )
    if length > _MAX_DIRECTORY:
        raise errors.AdapterTooLarge(
            f"the archive's directory has {length} bytes; at most {_MAX_DIRECTORY} are read: pack only the adapter"
        )
    if offset + length != end:
        raise unsafe("bytes between its directory and its end, or before its start", "central directory")
    return int(offset)


def _check_entry(file: BinaryIO, info: zipfile.ZipInfo, following: int) -> None:
    name = info.orig_filename
    if info.flag_bits & _ENCRYPTED_FLAGS:
        raise unsafe("an encrypted entry", name)
    mode = info.external_attr >> 16
    kind = stat.S_IFMT(mode)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise unsafe(_KINDS.get(kind, "an entry that is no regular file"), name)
    if kind and (kind == stat.S_IFDIR) != info.is_dir():
        raise unsafe("a folder that is a file, or a file that is a folder", name)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise unreadable(f"its compression method {info.compress_type} is not zip's own; use deflate")
    if "\0" in name:
        raise unsafe("a name with a null character", repr(name))
    file.seek(info.header_offset)
    head = file.read(_LOCAL.size)
    if len(head) < _LOCAL.size:
        raise truncated()
    signature, _, flags, method, _, _, crc, packed, unpacked, name_length, extra_length = _LOCAL.unpack(head)
    own_name = file.read(name_length).decode("utf-8" if flags & _UTF8_FLAG else "cp437", "replace")
    if (signature, flags, method, own_name) != (b"PK\3\4", info.flag_bits, info.compress_type, name):
        raise unsafe("an entry whose own header differs from the directory", name)
    end = info.header_offset + _LOCAL.size + name_length + extra_length + info.compress_size
    if flags & _DESCRIPTOR_FLAG:
        file.seek(end)
        end += _descriptor_length(file.read(24), info)
        expected = {(0, 0, 0), (info.CRC, info.compress_size, info.file_size), (0, _UNKNOWN, _UNKNOWN)}
    else:
        expected = {(info.CRC, info.compress_size, info.file_size)}
    # With zip64 the sizes are in an extra field, and these say so.
    expected.add((info.CRC, _UNKNOWN, _UNKNOWN))
    if (crc, packed, unpacked) not in expected:
        raise unsafe("an entry whose own header differs from the directory", name)
    if end > following:
        raise unsafe("entries that overlap", name)
    if info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size:
        raise unsafe("an entry whose sizes contradict each other", name)


def _descriptor_length(data: bytes, info: zipfile.ZipInfo) -> int:
    """Bytes of the descriptor behind an entry, of any of its four forms. Raises AdapterArchiveUnsafe."""
    for signature in (b"PK\7\x08", b""):
        for sizes in ("<L2L", "<L2Q"):
            try:
                expected = signature + struct.pack(sizes, info.CRC, info.compress_size, info.file_size)
            except struct.error:
                continue
            if data.startswith(expected):
                return len(expected)
    raise unsafe("an entry whose descriptor differs from the directory", info.orig_filename)
