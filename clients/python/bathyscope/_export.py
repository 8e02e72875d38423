"""An adapter of the service as files here: a tar file, or the PEFT folder that it holds."""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
from pathlib import Path

from bathyscope._http import Operation, Retry, work
from bathyscope._results import save
from bathyscope.errors import UnexpectedAnswer

FILES = ("adapter_config.json", "adapter_model.safetensors")


def export(target: str, retry: Retry, path: str | os.PathLike[str], *, keep_archive: bool = False) -> Operation[Path]:
    """Download the adapter at the path `target` of the service; a folder unless `path` ends in `.tar`.

    Files that are there already are replaced, each at once; `keep_archive` leaves the tar file beside the folder.
    """
    final = Path(path)
    if final.suffix == ".tar":
        return (yield from save(f"{target}/archive", retry, final, query={}))
    yield from work(lambda: final.mkdir(parents=True, exist_ok=True))
    archive = final.with_name(f"{final.name}.tar")
    kept = keep_archive
    try:
        yield from save(f"{target}/archive", retry, archive, query={})
        yield from work(lambda: _unpack(archive, final))
    except BaseException:
        kept = False
        raise
    finally:
        if not kept:
            archive.unlink(missing_ok=True)
    return final


def _unpack(archive: Path, folder: Path) -> None:
    """The two files of an adapter, whole or not at all; anything else in the archive is not this service's."""
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as made, tarfile.open(archive, "r:") as tar:
        members = {member.name: member for member in tar}
        if set(members) != set(FILES) or not all(member.isreg() for member in members.values()):
            raise UnexpectedAnswer("the archive does not hold an adapter as this service sends it")
        for name in FILES:
            source = tar.extractfile(members[name])
            assert source is not None
            with source, (Path(made) / name).open("wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
        for name in FILES:
            (Path(made) / name).replace(folder / name)
