"""The wheel, installed into empty environments: the client alone needs no server, the service no torch."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str | Path) -> str:
    ended = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, timeout=900)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--outdir", folder, ROOT)
    [made] = folder.glob("*.whl")
    return made


def environment(folder: Path, what: str) -> Path:
    """The interpreter of a new environment that holds the wheel."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", what)
    return python


def installed(python: Path) -> set[str]:
    lines = run(python, "-m", "pip", "list", "--format=freeze").splitlines()
    return {line.partition("==")[0].lower().replace("_", "-") for line in lines}


SERVERS = {"fastapi", "uvicorn", "redis", "torch", "transformers", "obstore", "typer"}


def test_the_client_alone_needs_no_server_and_no_torch(wheel: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "client", str(wheel))
    assert not installed(python) & SERVERS
    run(
        python,
        "-c",
        "import bathyscope; bathyscope.Client('http://127.0.0.1:9').close();"
        "from importlib.resources import files; assert files('bathyscope').joinpath('py.typed').is_file()",
    )
    ended = subprocess.run([python.with_name("bathyscope")], capture_output=True, text=True, check=False)
    assert ended.returncode != 0
    assert "bathyscope[cli]" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_the_service_needs_no_torch(wheel: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "service", f"{wheel}[service]")
    assert not installed(python) & {"torch", "transformers", "peft", "bitsandbytes", "scikit-learn"}
    run(
        python,
        "-c",
        "from bathyscope_backplane.settings import load_settings; from bathyscope_service.app import create_app;"
        "assert create_app(load_settings(), loopback=True).openapi()['paths']",
    )
    scripts = run(
        python,
        "-c",
        "from importlib.resources import files;"
        "print(*[f.name for f in (files('bathyscope_backplane') / 'broker' / 'lua').iterdir()])",
    )
    assert "submit.lua" in scripts.split()
    pages = run(
        python,
        "-c",
        "from bathyscope_service.dashboard.endpoints import _files; print(*_files())",
    )
    assert {"index.html", "app.js", "views/jobs.js", "vendor/preact.mjs", "vendor/LICENSE-htm.txt"} <= set(
        pages.split()
    )
