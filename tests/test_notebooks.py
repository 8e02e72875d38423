"""The notebooks run from first cell to last, with a service of their own, and are committed without output."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.stack import model_cache

FOLDER = Path(__file__).parents[1] / "examples"
NAMES = ["quickstart", "confidence"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_it_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.startswith("BATHYSCOPE_")]:
        monkeypatch.delenv(variable)
    models = model_cache() / "models"  # converting the packaged model takes half a minute: once for all
    models.mkdir(exist_ok=True)
    (tmp_path / "models").symlink_to(models)
    monkeypatch.setenv("BATHYSCOPE_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute(cwd=str(tmp_path))
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.text for output in shown if output.output_type == "stream" and output.name == "stdout")
    pictures = [output for output in shown if "image/svg+xml" in output.get("data", {})]
    assert len(pictures) >= 2
    assert "AUROC" in printed
    assert not [output.text for output in shown if output.output_type == "stream" and output.name == "stderr"]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_committed_without_output(name: str) -> None:
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in notebook.cells)
