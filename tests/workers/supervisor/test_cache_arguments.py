"""How large the cache of rows may become, by the settings and by what its disk has free."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from bathyscope_backplane.settings import load_settings
from bathyscope_workers.engine.__main__ import _cache, _parser
from bathyscope_workers.extraction.cache import CacheOptions
from bathyscope_workers.supervisor._cache import cache_arguments

GIB = 2**30


def options(folder: Path, **cache: Any) -> CacheOptions | None:
    """What the engine makes of the arguments."""
    settings = load_settings(data_dir=folder, cache=cache)
    return _cache(_parser().parse_args(["--kind", "model", "--fd", "0", *cache_arguments(settings)]))


def disk(monkeypatch: pytest.MonkeyPatch, *, size: int, free: int) -> None:
    values = (4096, 4096, size // 4096, free // 4096, free // 4096, 1000, 1000, 1000, 0, 255)
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(values))


def test_what_the_operator_says_holds(tmp_path: Path) -> None:
    assert options(tmp_path, max_bytes=0) is None
    assert options(tmp_path, max_bytes=1000) is None
    found = options(tmp_path, max_bytes=50 * GIB, dir=tmp_path / "fast", shared=True)
    assert found is not None
    assert (found.folder, found.max_bytes, found.shared) == (tmp_path / "fast", 50 * GIB, True)


@pytest.mark.parametrize(("free", "bound"), [(500, 4 * GIB), (17, 2 * GIB), (1, None)])
def test_by_default_it_is_4_gib_and_a_part_of_a_disk_that_has_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, bound: int | None
) -> None:
    disk(monkeypatch, size=1000 * GIB, free=free * GIB)
    found = options(tmp_path)
    assert (found and found.max_bytes) == bound
    if found is not None:
        assert (found.folder, found.min_free_bytes, found.shared) == (tmp_path / "cache", GIB, False)


def test_what_it_holds_already_does_not_make_it_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk(monkeypatch, size=1000 * GIB, free=9 * GIB)
    before = options(tmp_path)
    assert before is not None
    place = tmp_path / "cache" / "0"
    place.mkdir()
    with (place / "data.mdb").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 2**20)
    disk(monkeypatch, size=1000 * GIB, free=9 * GIB - 2**20)
    assert options(tmp_path) == before
