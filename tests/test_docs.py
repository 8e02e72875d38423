"""What README and docs say is true: its examples run as written, its tables match the code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel

from bathyscope.errors import PROBLEMS
from bathyscope_backplane.settings import Settings
from tests.stack import Stack

ROOT = Path(__file__).parents[1]
GROUPS: dict[str, Any] = {
    name: field.annotation
    for name, field in Settings.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
}


def examples() -> list[tuple[str, str]]:
    """The README's code blocks that are marked to be run, in order, with their language."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"<!-- run: (\w+) -->\n```\w+\n(.*?)```", text, re.DOTALL)
    assert len(found) == 4
    return found


def test_the_quick_starts_run_as_written(live: Stack, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "BATHYSCOPE_URL": live.url,
    }
    for kind, text in examples():
        text = text.replace("localhost:8000", f"127.0.0.1:{live.port}")
        command = [sys.executable, "-W", "error", "-c", text] if kind == "python" else ["bash", "-euc", text]
        ended = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert '"status":"failed"' not in ended.stdout
        if (tmp_path / "hidden_states.npy").exists():
            array = np.load(tmp_path / "hidden_states.npy")
            assert array.shape in ((1, 3, 576), (1, 2, 576))
            (tmp_path / "hidden_states.npy").unlink()
            made = True
    assert made


def test_the_demos_curl_lines_run_as_printed(live: Stack, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from bathyscope.cli import _demo_report
    from bathyscope.datasets import capitals

    output = tmp_path / "my demo"
    output.mkdir()
    _demo_report.write_requests(output, "tiny", capitals())
    _demo_report.print_curl(live.url, output)
    script = capsys.readouterr().out.partition("runs:")[2]
    ended = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    assert '"best_layer"' in ended.stdout
    assert '"status":"succeeded"' in ended.stdout
    assert (tmp_path / "states.safetensors").stat().st_size > 296 * 5 * 32 * 4


def test_every_problem_is_listed() -> None:
    text = (ROOT / "docs" / "problems.md").read_text(encoding="utf-8")
    for slug, kind in PROBLEMS.items():
        line = f"| `{slug}` | {kind.status} | `{kind.__name__}` | {(kind.__doc__ or '').strip()} |"
        assert line in text, line


@pytest.mark.parametrize(
    ("prefix", "group"),
    [("", Settings), *((f"{name}.", group) for name, group in GROUPS.items())],
)
def test_every_setting_is_listed(prefix: str, group: type[Settings]) -> None:
    text = (ROOT / "docs" / "operating.md").read_text(encoding="utf-8")
    for name in group.model_fields:
        if name not in GROUPS:
            assert f"`{prefix}{name}`" in text, f"{prefix}{name}"
