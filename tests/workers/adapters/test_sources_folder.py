"""The import folder: links, devices, and whoever changes things meanwhile."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from bathyscope import errors
from bathyscope_workers.adapters.sources import folder
from tests.workers.adapters.fetching import CONFIG, Fetching, weights

FILES = {"adapter_config.json": CONFIG, "adapter_model.safetensors": weights()}


@pytest.fixture
def imports(tmp_path: Path) -> Path:
    root = tmp_path / "imports"
    fill(root / "one")
    return root


def fill(place: Path) -> None:
    place.mkdir(parents=True)
    for name, content in FILES.items():
        (place / name).write_bytes(content)


@pytest.fixture
def fetching(imports: Path, tmp_path: Path) -> Fetching:
    (tmp_path / "work").mkdir()
    return Fetching(tmp_path / "work", {"import_dir": str(imports)})


def test_a_folder_is_copied(imports: Path, fetching: Fetching) -> None:
    (imports / "one" / "optimizer.pt").write_bytes(b"x")
    fetched = fetching(f"file://{imports}/one")
    assert fetching.files() == FILES
    assert fetched.others == ["optimizer.pt"]


def test_an_archive_is_copied(imports: Path, fetching: Fetching) -> None:
    shutil.make_archive(str(imports / "packed"), "zip", imports / "one")
    fetched = fetching(f"file://{imports}/packed.zip")
    assert fetched.archive is not None
    assert fetched.archive.read_bytes() == (imports / "packed.zip").read_bytes()


def test_links_that_stay_below_the_folder_are_followed(imports: Path, fetching: Fetching) -> None:
    (imports / "latest").symlink_to("one")
    fetching(f"file://{imports}/latest")
    assert fetching.files() == FILES
    # As the hub's cache lays files out.
    (imports / "blobs").mkdir()
    (imports / "one" / "adapter_model.safetensors").rename(imports / "blobs" / "abc")
    (imports / "one" / "adapter_model.safetensors").symlink_to("../blobs/abc")
    fetching(f"file://{imports}/one")
    assert fetching.files() == FILES


def test_the_import_folder_may_be_a_link_itself(imports: Path, fetching: Fetching, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(imports)
    fetching(f"file://{tmp_path}/linked/one", import_dir=str(tmp_path / "linked"))
    assert fetching.files() == FILES


def test_what_leads_out_is_refused(imports: Path, fetching: Fetching, tmp_path: Path) -> None:
    fill(tmp_path / "secret")
    (imports / "out").symlink_to(tmp_path / "secret")
    (imports / "two").mkdir()
    (imports / "two" / "adapter_model.safetensors").symlink_to(tmp_path / "secret" / "adapter_model.safetensors")
    outside = [f"{tmp_path}/secret", f"{imports}/out", f"{imports}/two", "/etc/passwd", f"{imports}-other/one"]
    for path in outside:
        with pytest.raises(errors.AdapterSourceForbidden):
            fetching(f"file://{path}")
        assert fetching.everything() == set()


def test_without_an_import_folder_nothing_is_read(imports: Path, fetching: Fetching) -> None:
    with pytest.raises(errors.AdapterSourceForbidden, match=r"adapters\.import_dir"):
        fetching(f"file://{imports}/one", import_dir=None)


def test_pipes_and_devices_are_refused_and_not_waited_for(imports: Path, fetching: Fetching) -> None:
    os.mkfifo(imports / "pipe")
    with pytest.raises(errors.AdapterSourceForbidden, match="neither"):
        fetching(f"file://{imports}/pipe")
    (imports / "one" / "adapter_model.safetensors").unlink()
    os.mkfifo(imports / "one" / "adapter_model.safetensors")
    with pytest.raises(errors.AdapterSourceForbidden, match="neither"):
        fetching(f"file://{imports}/one")


def test_nothing_there(imports: Path, fetching: Fetching) -> None:
    for path in ("none", "one/none", "one/adapter_config.json/none"):
        with pytest.raises((errors.AdapterSourceMissing, errors.AdapterSourceForbidden)):
            fetching(f"file://{imports}/{path}")


def test_what_is_too_large_is_refused_before_a_byte_of_it(imports: Path, fetching: Fetching) -> None:
    with (imports / "sparse.tar").open("wb") as file:
        file.truncate(1 << 34)
    with pytest.raises(errors.AdapterTooLarge):
        fetching(f"file://{imports}/sparse.tar", max_bytes=1 << 30)
    assert fetching.everything() == set()


@pytest.mark.parametrize("swapped", ["one", "one/adapter_model.safetensors"])
def test_a_link_that_appears_after_the_check_is_not_followed(
    imports: Path, fetching: Fetching, tmp_path: Path, swapped: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moment between check and use, made as long as one likes."""
    fill(tmp_path / "secret")
    (tmp_path / "secret" / "adapter_model.safetensors").write_bytes(weights(seed=9))
    real = folder._opened
    target = tmp_path / "secret" / Path(swapped).relative_to("one")

    def late(root: Path, where: Path) -> object:
        if where == Path(swapped):
            (imports / swapped).rename(tmp_path / "gone")
            (imports / swapped).symlink_to(target)
        return real(root, where)

    monkeypatch.setattr(folder, "_opened", late)
    with pytest.raises(errors.AdapterSourceForbidden):
        fetching(f"file://{imports}/one")
    assert "adapter_model.safetensors" not in fetching.files()


def test_what_the_disk_does_not_hold_is_not_begun(imports: Path, fetching: Fetching) -> None:
    with (imports / "sparse.tar").open("wb") as file:
        file.truncate(1 << 43)
    with pytest.raises(errors.OutOfSpace):
        fetching(f"file://{imports}/sparse.tar", max_bytes=1 << 44)
    assert fetching.everything() == set()
