"""Archives from strangers: the four files of an adapter come out, or a problem and nothing on disk."""

from __future__ import annotations

import gzip
import io
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bathyscope import errors
from bathyscope_workers.adapters.unpacking import Limits, unpack

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FILES = {WEIGHTS: bytes(range(256)) * 20, CONFIG: b'{"peft_type": "LORA"}', "checkpoint_complete": b""}
LIMITS = Limits(entries=20, total_bytes=1 << 20, ratio=50, free_bytes=64 << 10)


def tar(
    *members: tuple[str, bytes] | tarfile.TarInfo,
    files: dict[str, bytes] | None = None,
    folder: str = "",
    **options: Any,
) -> bytes:
    """A tar with an adapter's files, after some other members."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", **options) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member, io.BytesIO(bytes(member.size)))
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            archive.addfile(info, io.BytesIO(member[1]))
        for name, data in (FILES if files is None else files).items():
            info = tarfile.TarInfo(folder + name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def member(name: str, kind: bytes, **fields: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def zipped(
    *members: tuple[str | zipfile.ZipInfo, bytes],
    files: dict[str, bytes] | None = None,
    folder: str = "",
    stream: bool = False,
) -> bytes:
    """A zip likewise; `stream` writes data descriptors, as to a pipe."""
    out = _Pipe() if stream else io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data)
        for name, data in (FILES if files is None else files).items():
            archive.writestr(folder + name, data)
    return out.getvalue()


class _Pipe(io.BytesIO):
    def seekable(self) -> bool:
        return False

    def seek(self, *arguments: Any) -> int:
        raise io.UnsupportedOperation


def zip_info(name: str, mode: int = stat.S_IFREG | 0o644) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system = 3
    info.external_attr = mode << 16
    return info


def patched(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


def central(data: bytes, field: int, value: bytes, which: int = 0) -> bytes:
    """Change a field of the central directory's entry of that number."""
    at = -1
    for _ in range(which + 1):
        at = data.index(b"PK\1\2", at + 1)
    return patched(data, at + field, value)


def end_record(data: bytes, field: int, value: bytes) -> bytes:
    return patched(data, data.rindex(b"PK\5\6") + field, value)


def descriptor(data: bytes, field: int, value: bytes) -> bytes:
    return patched(data, data.index(b"PK\7\x08") + field, value)


def overlapping() -> bytes:
    """Two directory entries for the same bytes."""
    data = zipped()
    start = data.index(b"PK\1\2")
    second = data.index(b"PK\1\2", start + 1)
    end = data.rindex(b"PK\5\6")
    copy = patched(data[start:second], 46, b"Adapter_model.safetensorZ")
    data = data[:end] + copy + data[end:]
    data = end_record(data, 8, struct.pack("<HH", 4, 4))
    return end_record(data, 12, struct.pack("<L", end + len(copy) - start))


def pax(fields: dict[str, str], name: str = "README") -> bytes:
    return tar(member(name, tarfile.REGTYPE, pax_headers=fields), format=tarfile.PAX_FORMAT)


def with_header(change: Callable[[bytearray], None]) -> bytes:
    """A tar whose first header was changed, with its checksum put right."""
    data = bytearray(tar())
    change(data)
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    return bytes(data)


def sized(data: bytearray) -> None:
    data[124:136] = b"%011o\0" % (1 << 30)


def negative(data: bytearray) -> None:
    data[124:136] = b"\xff" * 12


SYM, LNK = tarfile.SYMTYPE, tarfile.LNKTYPE
ZEROS = bytes(900_000)

HOSTILE: dict[str, tuple[bytes, type[errors.AdapterInvalid]]] = {
    "a symbolic link": (tar(member("x", SYM, linkname="/etc/passwd")), errors.AdapterArchiveUnsafe),
    "a link in the weights' place": (
        tar(member(WEIGHTS, SYM, linkname="/etc/passwd"), files={CONFIG: b"{}"}),
        errors.AdapterArchiveUnsafe,
    ),
    "a link after the weights": (
        tar((WEIGHTS, b"x"), member("x", SYM, linkname=".."), files={}),
        errors.AdapterArchiveUnsafe,
    ),
    "a hard link": (tar(member("x", LNK, linkname=WEIGHTS)), errors.AdapterArchiveUnsafe),
    "a long link": (
        tar(member("x", SYM, linkname="a/" * 200), format=tarfile.GNU_FORMAT),
        errors.AdapterArchiveUnsafe,
    ),
    "a character device": (tar(member("x", tarfile.CHRTYPE, devmajor=1, devminor=3)), errors.AdapterArchiveUnsafe),
    "a block device": (tar(member("x", tarfile.BLKTYPE)), errors.AdapterArchiveUnsafe),
    "a pipe": (tar(member("x", tarfile.FIFOTYPE)), errors.AdapterArchiveUnsafe),
    "an entry of an unknown kind": (tar(member("x", b"V")), errors.AdapterArchiveUnsafe),
    "a sparse file": (tar(member("x", tarfile.GNUTYPE_SPARSE)), errors.AdapterArchiveUnsafe),
    "a sparse file by its pax header": (
        pax({"GNU.sparse.major": "1", "GNU.sparse.realsize": "1000000000000"}),
        errors.AdapterArchiveUnsafe,
    ),
    "an absolute path": (tar(("/tmp/x", b"x")), errors.AdapterArchiveUnsafe),
    "a parent path": (tar(("../x", b"x")), errors.AdapterArchiveUnsafe),
    "a parent path within": (tar(("a/../../x", b"x")), errors.AdapterArchiveUnsafe),
    "a parent path by its pax header": (pax({"path": "../" + WEIGHTS}), errors.AdapterArchiveUnsafe),
    "a parent path by its long name": (
        tar(("../" * 60 + "x", b"x"), format=tarfile.GNU_FORMAT),
        errors.AdapterArchiveUnsafe,
    ),
    "a backslash": (tar(("a\\x", b"x")), errors.AdapterArchiveUnsafe),
    "a drive letter": (tar(("C:/x", b"x")), errors.AdapterArchiveUnsafe),
    "a line break": (tar(("a\nb", b"x")), errors.AdapterArchiveUnsafe),
    "bytes that are no text": (tar(("a\udcff", b"x"), errors="surrogateescape"), errors.AdapterArchiveUnsafe),
    "an empty part": (tar(("a//x", b"x")), errors.AdapterArchiveUnsafe),
    "a path of 2000 characters": (tar(("a/" * 1000 + "x", b"x")), errors.AdapterArchiveUnsafe),
    "a header of a megabyte": (pax({"comment": "x" * (1 << 20)}), errors.AdapterArchiveUnsafe),
    "a header that renames all": (
        tar(format=tarfile.PAX_FORMAT, pax_headers={"path": "../x"}),
        errors.AdapterArchiveUnsafe,
    ),
    "a size that is no number": (pax({"size": "-1"}), errors.AdapterArchiveUnreadable),
    "a negative size": (with_header(negative), errors.AdapterArchiveUnreadable),
    "the same path twice": (tar((CONFIG, b"{}")), errors.AdapterArchiveUnsafe),
    "the same path twice, with a dot": (tar((f"./{CONFIG}", b"{}")), errors.AdapterArchiveUnsafe),
    "paths that differ in case": (tar((WEIGHTS.upper(), b"x")), errors.AdapterArchiveUnsafe),
    "two adapters": (tar((f"b/{WEIGHTS}", b"x"), files=FILES, folder="a/"), errors.AdapterArchiveUnsafe),
    "config and weights apart": (tar((f"b/{CONFIG}", b"x"), files={WEIGHTS: b"x"}), errors.AdapterArchiveUnsafe),
    "too many entries": (tar(*((f"{index}", b"") for index in range(30))), errors.AdapterTooLarge),
    "too many bytes": (tar(("x", bytes(1 << 20))), errors.AdapterTooLarge),
    "a size beyond the limit": (with_header(sized), errors.AdapterTooLarge),
    "a gzip bomb": (gzip.compress(tar(("x", ZEROS))), errors.AdapterTooLarge),
    "a gzip bomb behind the end": (gzip.compress(tar() + ZEROS * 3), errors.AdapterTooLarge),
    "a gzip bomb within a header": (
        gzip.compress(tar(member("x", tarfile.XHDTYPE, size=800_000))),
        errors.AdapterArchiveUnsafe,
    ),
    "cut off": (tar()[:3000], errors.AdapterIncomplete),
    "cut off between entries": (tar()[: 512 + 5120], errors.AdapterIncomplete),
    "cut off in a header": (tar()[: 512 + 5120 + 100], errors.AdapterIncomplete),
    "gzip cut off": (gzip.compress(tar())[:-20], errors.AdapterIncomplete),
    "gzip without its checksum": (gzip.compress(tar())[:-8], errors.AdapterIncomplete),
    "gzip with a wrong checksum": (
        gzip.compress(tar())[:-8] + bytes(8),
        errors.AdapterArchiveUnreadable,
    ),
    "gzip of something else": (gzip.compress(b"hello" * 1000), errors.AdapterArchiveUnreadable),
    "a wrong checksum": (patched(tar(), 148, b"0000000\0"), errors.AdapterArchiveUnreadable),
    "an empty file": (b"", errors.AdapterArchiveUnreadable),
    "a safetensors file": (struct.pack("<Q", 2) + b"{}", errors.AdapterArchiveUnreadable),
    "a rar file": (b"Rar!\x1a\x07\x01\0" + bytes(600), errors.AdapterArchiveUnreadable),
    "no weights": (tar(files={CONFIG: b"{}"}), errors.AdapterIncomplete),
    "weights too deep": (tar(files=FILES, folder="a/b/"), errors.AdapterIncomplete),
    "encrypted with age": (tar(files={f"{WEIGHTS}.age": b"x"}), errors.AdapterIncomplete),
    "pickled weights": (tar(files={"adapter_model.bin": b"x", CONFIG: b"{}"}), errors.AdapterPickled),
    "a torch checkpoint": (zipped(files={"archive/data.pkl": b"x", "archive/data/0": b"x"}), errors.AdapterPickled),
    "zip: a symbolic link": (zipped((zip_info("x", stat.S_IFLNK | 0o777), b"/etc")), errors.AdapterArchiveUnsafe),
    "zip: a device": (zipped((zip_info("x", stat.S_IFCHR | 0o600), b"")), errors.AdapterArchiveUnsafe),
    "zip: a folder that is a file": (zipped((zip_info("x/", stat.S_IFREG | 0o600), b"")), errors.AdapterArchiveUnsafe),
    "zip: a parent path": (zipped(("../x", b"x")), errors.AdapterArchiveUnsafe),
    "zip: an absolute path": (zipped(("/x", b"x")), errors.AdapterArchiveUnsafe),
    "zip: a backslash": (zipped(("..\\x", b"x")), errors.AdapterArchiveUnsafe),
    "zip: a drive letter": (zipped(("c:x", b"x")), errors.AdapterArchiveUnsafe),
    "zip: paths that differ in case": (zipped((CONFIG.title(), b"x")), errors.AdapterArchiveUnsafe),
    "zip: encrypted": (central(zipped(), 8, b"\x01"), errors.AdapterArchiveUnsafe),
    "zip: a bomb": (zipped(("x", ZEROS)), errors.AdapterTooLarge),
    "zip: a bomb that lies": (central(zipped(("x", ZEROS)), 24, struct.pack("<L", 10)), errors.AdapterArchiveUnsafe),
    "zip: too many entries": (zipped(*((f"{index}", b"") for index in range(30))), errors.AdapterTooLarge),
    "zip: a directory of 60,000 entries": (end_record(zipped(), 8, b"\x60\xea\x60\xea"), errors.AdapterTooLarge),
    "zip: a directory of a gigabyte": (end_record(zipped(), 12, struct.pack("<L", 1 << 30)), errors.AdapterTooLarge),
    "zip: entries that overlap": (overlapping(), errors.AdapterArchiveUnsafe),
    "zip: a name that differs": (central(zipped(), 46, b"Z"), errors.AdapterArchiveUnsafe),
    "zip: a method that differs": (central(zipped(), 10, b"\0\0"), errors.AdapterArchiveUnsafe),
    "zip: a method of its own": (
        central(patched(zipped(), 8, b"\x0c\0"), 10, b"\x0c\0"),
        errors.AdapterArchiveUnreadable,
    ),
    "zip: a size that differs": (central(zipped(), 24, struct.pack("<L", 5121)), errors.AdapterArchiveUnsafe),
    "zip: a descriptor that lies": (descriptor(zipped(stream=True), 12, b"\xff"), errors.AdapterArchiveUnsafe),
    "zip: sizes that lie everywhere": (
        central(patched(zipped(), 22, struct.pack("<L", 6000)), 24, struct.pack("<L", 6000)),
        errors.AdapterArchiveUnsafe,
    ),
    "zip: a wrong checksum": (
        central(patched(zipped(), 14, bytes(4)), 16, bytes(4)),
        errors.AdapterArchiveUnreadable,
    ),
    "zip: data that does not inflate": (patched(zipped(), 60, b"\xff" * 12), errors.AdapterArchiveUnreadable),
    "zip: bytes before its start": (b"PK\3\4" + bytes(26) + zipped(), errors.AdapterArchiveUnsafe),
    "zip: cut off": (zipped()[:-40], errors.AdapterIncomplete),
    "zip: one of several disks": (end_record(zipped(), 4, b"\x01\0"), errors.AdapterArchiveUnreadable),
    "zip: empty": (zipped(files={}), errors.AdapterIncomplete),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_refused_and_nothing_left(what: str, tmp_path: Path) -> None:
    data, problem = HOSTILE[what]
    archive = tmp_path / "upload"
    archive.write_bytes(data)
    (tmp_path / "mine").mkdir()
    for folder in (tmp_path / "new", tmp_path / "mine"):
        with pytest.raises(errors.AdapterInvalid) as fault:
            unpack(archive, folder, LIMITS)
        assert type(fault.value) is problem, fault.value
        assert fault.value.problem()["detail"].isprintable()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine", "upload"]


GOOD: dict[str, bytes] = {
    "tar": tar(),
    "tar, pax": tar(format=tarfile.PAX_FORMAT, pax_headers={"comment": "by a stranger"}),
    "tar, gnu": tar(("a" * 300, b"x"), format=tarfile.GNU_FORMAT),
    "tar, old": tar(format=tarfile.USTAR_FORMAT),
    "tar, one folder": tar(member("run", tarfile.DIRTYPE, mode=0o755), files=FILES, folder="run/"),
    "tar, dots": tar(member("./", tarfile.DIRTYPE), files=FILES, folder="./"),
    "tar, others": tar(("run/optimizer.pt", b"x"), ("a/b/c/deep.txt", b"x"), ("tokenizer.json", b"{}")),
    "tar, garbage": tar() + b"garbage" * 100,
    "tar.gz": gzip.compress(tar()),
    "tar.gz, two members": gzip.compress(tar()[:4000]) + gzip.compress(tar()[4000:]),
    "tar.gz, garbage": gzip.compress(tar()) + b"garbage",
    "zip": zipped(),
    "zip, streamed": zipped(stream=True),
    "zip, one folder": zipped((zip_info("run/", stat.S_IFDIR | 0o755), b""), files=FILES, folder="run/"),
    "zip, others": zipped(("run/optimizer.pt", b"x"), ("__MACOSX/._x", b"x")),
    "zip, garbage": zipped() + b"garbage",
}


@pytest.mark.parametrize("what", GOOD)
def test_unpacked(what: str, tmp_path: Path) -> None:
    archive, folder = tmp_path / "upload", tmp_path / "adapter"
    archive.write_bytes(GOOD[what])
    result = unpack(archive, folder, LIMITS)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    assert sorted(result.files) == sorted(FILES)
    assert stat.S_IMODE((folder / WEIGHTS).stat().st_mode) == 0o600
    if "others" in what:
        assert "run/optimizer.pt" in result.skipped
        assert "run/optimizer.pt" in result.notes[-1]
    if "garbage" in what and what != "tar.gz, garbage":
        assert "after its end were not read" in result.notes[0]


def test_stored_zip64(tmp_path: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in FILES.items():
            with archive.open(name, "w", force_zip64=True) as target:
                target.write(data)
    (tmp_path / "upload").write_bytes(out.getvalue())
    assert sorted(unpack(tmp_path / "upload", tmp_path / "adapter").files) == sorted(FILES)


@pytest.mark.parametrize("form", ["tar", "tar.gz", "zip"])
@pytest.mark.parametrize("name", [WEIGHTS, "other.txt"])
def test_a_job_that_is_stopped_unpacks_no_more(form: str, name: str, tmp_path: Path) -> None:
    files = {name: os.urandom(8 << 20)}
    data = {"tar": tar, "tar.gz": lambda **rest: gzip.compress(tar(**rest), 1), "zip": zipped}[form](files=files)
    (tmp_path / "upload").write_bytes(data)
    left = 3

    def beat() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise InterruptedError

    if (form, name) == ("zip", "other.txt"):  # which is not read at all
        with pytest.raises(errors.AdapterIncomplete):
            unpack(tmp_path / "upload", tmp_path / "adapter", beat=beat)
        return
    with pytest.raises(InterruptedError):
        unpack(tmp_path / "upload", tmp_path / "adapter", beat=beat)
    assert [path.name for path in tmp_path.iterdir()] == ["upload"]


def test_a_read_me_elsewhere_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "upload").write_bytes(tar(("README.md", b"top"), ("a/README.md", b"other")))
    result = unpack(tmp_path / "upload", tmp_path / "adapter")
    assert (tmp_path / "adapter" / "README.md").read_bytes() == b"top"
    assert result.skipped == ["a/README.md"]


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "upload").write_bytes(tar())
    (tmp_path / WEIGHTS).write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        unpack(tmp_path / "upload", tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == b"mine"


def test_zeros_within_the_free_bytes_are_unpacked(tmp_path: Path) -> None:
    (tmp_path / "upload").write_bytes(gzip.compress(tar(("x", ZEROS))))
    assert unpack(tmp_path / "upload", tmp_path / "adapter", replace(LIMITS, free_bytes=1 << 20)).skipped == ["x"]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(
        [GOOD["tar"], GOOD["tar, pax"], GOOD["tar, gnu"], GOOD["zip"], GOOD["zip, streamed"], GOOD["tar.gz"]]
    ),
    st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=9)), max_size=4),
    st.floats(0, 1),
    st.booleans(),
)
def test_any_archive_is_unpacked_or_refused(
    tmp_path: Path, data: bytes, changes: list[tuple[float, bytes]], cut: float, whole: bool
) -> None:
    for where, value in changes:
        # Headers are at the ends.
        spot = where**4 if value[0] % 2 else 1 - where**4
        data = patched(data, int(spot * (len(data) - 1)), value)[: len(data)]
    if not whole:
        data = data[: int(cut * len(data))]
    archive, folder = tmp_path / "upload", tmp_path / "adapter"
    archive.write_bytes(data)
    try:
        result = unpack(archive, folder, LIMITS)
    except errors.AdapterInvalid:
        assert not folder.exists()
        return
    assert sorted(result.files) == sorted(path.name for path in folder.iterdir())
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def test_memory_is_a_chunk(tmp_path: Path) -> None:
    """An entry of 64 MiB goes to disk without being held."""
    import tracemalloc

    size = 64 << 20
    block = zlib.compress(bytes(1000))
    noise = (block * (1 + (1 << 20) // len(block)))[: 1 << 20]
    with tarfile.open(tmp_path / "upload", "w") as archive:
        info = tarfile.TarInfo(WEIGHTS)
        info.size = size
        (tmp_path / "raw").write_bytes(noise * (size >> 20))
        with (tmp_path / "raw").open("rb") as source:
            archive.addfile(info, source)
    tracemalloc.start()
    try:
        unpack(tmp_path / "upload", tmp_path / "adapter")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (tmp_path / "adapter" / WEIGHTS).stat().st_size == size
    assert peak < 8 << 20
