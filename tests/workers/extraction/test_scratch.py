import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from bathyscope import errors
from bathyscope_workers.extraction.scratch import ScratchFile


def test_written_in_place(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {"offsets": ("int64", (3,)), "states": ("bfloat16", (2, 3, 5))}
    file = ScratchFile(path, tensors, {"model": "org/ünïcode", "layers": "[1, 2]"})
    values = torch.randn(2, 3, 5).to(torch.bfloat16)
    file.tensor("offsets")[:] = torch.tensor([0, 4, 9])
    file.tensor("states")[1] = values[1]
    file.tensor("states")[0] = values[0]
    file.close()
    found = load_file(path)
    assert torch.equal(found["states"], values)
    assert found["offsets"].tolist() == [0, 4, 9]
    assert os.path.getsize(path) == file.nbytes
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"model": "org/ünïcode", "layers": "[1, 2]"}
    place = file.places["states"]
    raw = path.read_bytes()[place.offset : place.offset + place.nbytes]
    assert torch.equal(torch.frombuffer(bytearray(raw), dtype=torch.bfloat16).view(2, 3, 5), values)
    assert (path.stat().st_mode & 0o777) == 0o600


def test_what_no_disk_holds_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(errors.TooLarge, match="281,474,976,710,784 bytes"):
        ScratchFile(path, {"states": ("float32", (1 << 46,))}, {})
    assert not path.exists()


def test_discard(tmp_path: Path) -> None:
    file = ScratchFile(tmp_path / "x", {"states": ("float32", (4,))}, {})
    file.discard()
    assert not (tmp_path / "x").exists()


def test_empty_tensors(tmp_path: Path) -> None:
    file = ScratchFile(tmp_path / "x", {"states": ("float32", (0, 3))}, {})
    assert file.tensor("states").shape == (0, 3)
    file.close()
    assert load_file(tmp_path / "x")["states"].shape == (0, 3)
