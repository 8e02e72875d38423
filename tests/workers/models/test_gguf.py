"""A conversion happens once and whole, whoever crashes or races."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from bathyscope_workers.models import gguf
from bathyscope_workers.models.source import locate
from bathyscope_workers.models.spec import ModelSpec

# A writer that takes its time, so that a race and a crash can be arranged; the real one takes 20 s.
CONVERT = """
import sys, time
from pathlib import Path
from bathyscope_workers.models import gguf

def write(path, folder):
    (folder / "half").write_text("half")
    with open(sys.argv[2], "a") as log:
        log.write("x")
    time.sleep(float(sys.argv[3]))
    (folder / "whole").write_text("whole")

gguf.write_folder = write
print(gguf.convert(Path("m.gguf"), "0123456789abcdef", name="org/m", data_dir=Path(sys.argv[1])))
"""


def convert(data: Path, log: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CONVERT, str(data), str(log), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def folders(data: Path) -> list[str]:
    return sorted(path.name for path in (data / "models").iterdir() if path.is_dir())


def test_two_at_once_make_one(tmp_path: Path) -> None:
    log = tmp_path / "log"
    first, second = convert(tmp_path, log, 0.5), convert(tmp_path, log, 0.5)
    names = {first.communicate(timeout=60)[0], second.communicate(timeout=60)[0]}
    assert (first.returncode, second.returncode) == (0, 0)
    assert len(names) == 1
    assert log.read_text() == "x"
    assert (Path(names.pop().strip()) / "whole").exists()


def test_a_crash_leaves_nothing_half(tmp_path: Path) -> None:
    log = tmp_path / "log"
    crashed = convert(tmp_path, log, 60)
    while not log.exists():
        time.sleep(0.01)
    os.kill(crashed.pid, signal.SIGKILL)
    crashed.communicate(timeout=60)
    assert not any(not name.startswith(".") for name in folders(tmp_path))
    again = convert(tmp_path, log, 0)
    name = again.communicate(timeout=60)[0].strip()
    assert folders(tmp_path) == [Path(name).name]
    assert (Path(name) / "whole").exists()


def test_other_weights_have_another_folder(tmp_path: Path) -> None:
    one, two = tmp_path / "one.gguf", tmp_path / "two.gguf"
    one.write_bytes(b"GGUF1")
    two.write_bytes(b"GGUF2")
    assert gguf.digest(one) != gguf.digest(two)


def test_smollm2_is_converted(smollm2: ModelSpec) -> None:
    source = locate(smollm2)
    assert source.revision == f"gguf:{gguf.digest(Path(smollm2.source))}"
    assert (source.folder / "model.safetensors").is_file()
    assert "quantization_config" not in (source.folder / "config.json").read_text()
