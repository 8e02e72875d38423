"""The examples run as their readers run them: against a real installation, with the real SDK of Tinker and the
stand-in of its service, on a LoRA that is really trained, if briefly."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from bathyscope.errors import PROBLEMS
from tests.stack import Stack, free_port, model_cache
from tests.tinker_standin import KEY

ROOT = Path(__file__).parents[1]
NAMES = ["finetune_then_probe", "tinker_download_example", "tinker_probe_comparison"]
QUANTIZATIONS = ["none", "8bit", "4bit"]
PAIRS = 8
TENSORS = 30 * 7 * 2 + 2  # seven matrices in each of 30 blocks and the head, an A and a B of each
AUROC = r"([01]\.\d{3}) \((\d\.\d\d) to (\d\.\d\d)\), layer (\d+)"


class Examples:
    """An installation, a port for the stand-in, and the scripts."""

    def __init__(self, stack: Stack, port: int, folder: Path) -> None:
        self.stack = stack
        self.port = port
        self.folder = folder

    def run(self, name: str, *words: str | Path, key: str | None = KEY, **environment: str) -> tuple[int, str, str]:
        """(exit status, stdout, stderr) of a script."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("BATHYSCOPE_", "TINKER_"))}
        given = {
            "BATHYSCOPE_URL": self.stack.url,
            "TINKER_BASE_URL": f"http://127.0.0.1:{self.port}",
            **({"TINKER_API_KEY": key} if key else {}),
            **environment,
        }
        ended = subprocess.run(
            [sys.executable, str(ROOT / "examples" / f"{name}.py"), *map(str, words)],
            cwd=self.folder,
            env={**kept, **given},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        return ended.returncode, ended.stdout, ended.stderr

    @property
    def weights(self) -> Path:
        """The model that the service has converted from its package."""
        return next(path for path in (model_cache() / "models").glob("smollm2-*") if path.is_dir())

    @contextmanager
    def standin(self) -> Iterator[dict[str, str]]:
        """Paths of the trained adapter's checkpoints by kind, served as docs/tinker.md says."""
        words = [sys.executable, "-m", "tests.tinker_standin", str(self.folder / "finetuned"), "--port", str(self.port)]
        with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                said = [json.loads(process.stdout.readline()) for _ in range(4)]
                assert said[0] == {"url": f"http://127.0.0.1:{self.port}", "key": KEY}
                yield {one["path"].split("/")[3]: one["path"] for one in said[1:]}
            finally:
                process.terminate()


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Examples]:
    port = free_port()
    made = Stack(tmp_path_factory.mktemp("examples"), adapters__tinker_url=f"http://127.0.0.1:{port}")
    for name in ("TINKER_API_KEY", "TINKER_BASE_URL"):
        made.environment.pop(name, None)
    try:
        made.up().extract(["The model is converted now."], model="smollm2", layers=[0])
        yield Examples(made, port, tmp_path_factory.mktemp("cwd"))
    finally:
        made.down()


@pytest.fixture(scope="module")
def finetuned(examples: Examples) -> str:
    """What the first example printed; its adapter is in `finetuned` of its folder. The only training of this module."""
    words = ["--steps", "12", "--pairs", str(PAIRS), "--weights", examples.weights]
    status, said, complaint = examples.run("finetune_then_probe", *words)
    assert status == 0, said + complaint
    return said


@pytest.fixture(scope="module")
def paths(examples: Examples, finetuned: str) -> Iterator[dict[str, str]]:
    with examples.standin() as paths:
        yield paths


def changes(said: str) -> dict[str, dict[int, float]]:
    """By quantization and layer, of the first example's table."""
    head, *rows = said.split("over norm of the base's\n")[1].split("\n\n")[0].splitlines()
    layers = [int(layer) for layer in re.findall(r"layer\s+(\d+)", head)]
    found = {}
    for row in rows:
        name, *cells = row.split()
        found[name] = dict(zip(layers, map(float, cells), strict=True))
    return found


def test_it_trains_and_says_what_changed(examples: Examples, finetuned: str) -> None:
    losses = [float(one) for one in re.findall(r"step \d+ of 12: loss ([\d.]+)", finetuned)]
    assert len(losses) == 2
    assert f"{TENSORS} of {TENSORS} tensors applied, rank 8" in finetuned
    assert f"{4 * PAIRS} statements" in finetuned
    assert "Report: finetuned-reports/checkpoints.html" in finetuned
    found = changes(finetuned)
    assert list(found) == QUANTIZATIONS
    for change in found.values():
        assert list(change) == [0, 5, 10, 15, 20, 25, 30]
        assert change[0] == 0
        assert all(value > 0.01 for layer, value in change.items() if layer)
    assert found["none"] != found["8bit"] != found["4bit"]
    for name in QUANTIZATIONS:
        [row] = re.findall(rf"^{name} +{AUROC} +{AUROC}$", finetuned, re.MULTILINE)
        for value, low, high, layer in (row[:4], row[4:]):
            assert 0 <= float(low) <= float(value) + 0.01 <= float(high) + 0.02 <= 1.02
            assert int(layer) % 5 == 0
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"http://127.0.0.1:{examples.port}")  # the stand-in has ended with it


def test_its_comparisons_are_of_every_checkpoint_and_quantization(examples: Examples, finetuned: str) -> None:
    """SmolLM2 with the LoRA that was trained: figures with intervals, transfer, and how far each layer moved."""
    client = examples.stack.client
    found = {}
    for listed in client.get("/v1/comparisons").json()["data"]:
        one = client.get(listed["links"]["self"]).json()
        found[one["compares"]] = one
    checkpoints, quantized = found["checkpoints"], found["quantizations"]
    assert [one["name"] for one in checkpoints["variants"]] == ["base", "step-4", "step-8", "final"]
    assert [one["step"] for one in checkpoints["variants"]] == [None, 4, 8, None]
    assert [one["name"] for one in quantized["variants"]] == QUANTIZATIONS
    assert {one["digest"] for one in quantized["variants"]} == {checkpoints["variants"][-1]["digest"]}
    for one in (checkpoints, quantized):
        report, many = one["report"], len(one["variants"])
        assert one["inputs"] == 4 * PAIRS
        assert [len(row) for row in report["transfer"]["values"]] == [many] * many
        for difference in report["differences"]:
            figure = difference["held_out"]["auroc"]
            assert figure["low"] <= figure["value"] <= figure["high"]
            assert difference["held_out"]["ece"] is not None
        page = (examples.folder / "finetuned-reports" / f"{one['compares']}.html").read_text()
        assert one["id"] in page
        assert "<script" not in page
    moved = {shift["name"]: shift["layers"] for shift in checkpoints["report"]["shift"]}
    for layers in zip(*moved.values(), strict=True):
        norms = [layer["relative_norm"]["median"] for layer in layers]
        if layers[0]["layer"] > 0:  # no LoRA changes the embeddings; after each step the states lie further away
            assert 0 < norms[0] < norms[1] < norms[2]
    # What the first table says, from states that were extracted apart from these.
    for layer, change in changes(finetuned)["none"].items():
        place = next(one for one in moved["final"] if one["layer"] == layer)
        assert place["relative_norm"]["mean"] == pytest.approx(change, abs=2e-4)
    cost = {shift["name"]: shift["layers"] for shift in quantized["report"]["shift"]}
    for eight, four in zip(cost["8bit"], cost["4bit"], strict=True):
        if eight["layer"] > 0:
            assert 0.8 < four["cosine"]["median"] < eight["cosine"]["median"] < 1


def test_what_it_saves_is_what_tinker_saves(examples: Examples, finetuned: str) -> None:
    from safetensors import safe_open

    folder = examples.folder / "finetuned"
    files = {"adapter_model.safetensors", "adapter_config.json", "checkpoint_complete"}
    assert {path.name for path in folder.iterdir()} == files | {"checkpoints"}
    for step in ("step-4", "step-8"):
        assert {path.name for path in (folder / "checkpoints" / step).iterdir()} == files
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (8, 32, "all-linear")
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        names = set(file.keys())
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    assert len(names) == TENSORS
    assert shapes["base_model.model.model.layers.29.self_attn.q_proj.lora_A.weight"] == (8, 576)
    assert shapes["base_model.model.model.unembed_tokens.lora_B.weight"] == (49152, 8)
    assert not [name for name in names if "lm_head" in name]


# PEFT looks at every attribute of the model, deprecated ones of transformers too.
@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")
def test_it_downloads_what_peft_loads_whole(examples: Examples, paths: dict[str, str]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    path = paths["sampler_weights"]  # which Tinker does not give out: its external sibling is fetched
    words = ["--checkpoint", path, "--weights", examples.weights, "--output", "out"]
    status, said, complaint = examples.run("tinker_download_example", *words)
    assert status == 0, said + complaint
    assert "Tinker supports 1 models" in said
    assert "smollm2, context of 32768 tokens" in said
    for kind, named in (("external", "external_weights"), ("training", "weights"), ("sampler", "sampler_weights")):
        assert re.search(rf"  {named}/final: {kind}, [\d,]+ bytes, ", said)
    assert f"adapter_model.safetensors at 127.0.0.1:{examples.port}" in said
    assert "X-Signature" not in said + complaint
    assert KEY not in said + complaint
    assert f"As Tinker saves it, PEFT applies {TENSORS - 2} of {TENSORS} tensors" in said
    assert f"Converted, PEFT applies {TENSORS} of {TENSORS} tensors" in said

    folder = examples.folder / "out" / "peft_adapter"
    info = json.loads((examples.folder / "out" / "checkpoint_info.json").read_text())
    # Equal weights are there once, beside two checkpoints of the way.
    [adapter] = [one for one in examples.stack.client.get("/v1/adapters").json()["data"] if "/final" in one["source"]]
    assert (info["rank"], info["digest"]) == (8, adapter["digest"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        base = AutoModelForCausalLM.from_pretrained(examples.weights)
        model = PeftModel.from_pretrained(base, str(folder))
        loaded = model.load_adapter(str(folder), "again")
    assert not loaded.missing_keys
    assert not loaded.unexpected_keys
    assert sum("lora_" in name and ".again." in name for name in model.state_dict()) == TENSORS


def test_it_compares_base_and_finetuned(examples: Examples, finetuned: str, paths: dict[str, str]) -> None:
    words = ["--checkpoint", paths["external_weights"], "--quantization", "4bit", "--pairs", str(PAIRS)]
    status, said, complaint = examples.run("tinker_probe_comparison", *words)
    assert status == 0, said + complaint
    rows = re.findall(r"^ +(\d+) +(\d+\.\d{4}) +([01]\.\d{3}) +([01]\.\d{3})$", said, re.MULTILINE)
    assert [int(row[0]) for row in rows] == list(range(31))
    assert (float(rows[0][1]), rows[0][2]) == (0, rows[0][3])
    assert [row[2] for row in rows] != [row[3] for row in rows]
    for layer, change in changes(finetuned)["4bit"].items():
        assert float(rows[layer][1]) == pytest.approx(change, abs=2e-4)
    assert re.search(rf"^base: +{AUROC}$", said, re.MULTILINE)
    assert re.search(rf"^fine-tuned: +{AUROC}$", said, re.MULTILINE)


# --- what is missing is said in one sentence --------------------------------------------------------------------------


def refused(examples: Examples, name: str, *words: str, **given: Any) -> str:
    began = time.monotonic()
    status, said, complaint = examples.run(name, *words, **given)
    assert status == 1, (time.monotonic() - began, said, complaint)
    assert not (examples.folder / "downloaded").exists()
    assert complaint.startswith("error: ")
    assert len(complaint.splitlines()) == 1, complaint
    return complaint


@pytest.mark.parametrize("name", NAMES)
def test_what_is_missing(examples: Examples, paths: dict[str, str], name: str) -> None:
    real = paths["external_weights"]
    assert "set TINKER_API_KEY" in refused(examples, name, "--checkpoint", real, key=None)
    complaint = refused(examples, name, "--checkpoint", real, "--url", f"http://127.0.0.1:{free_port()}")
    assert "bathyscope up" in complaint
    assert "--url" in complaint
    complaint = refused(examples, name, "--checkpoint", f"{real}-none")
    assert "Tinker" in complaint
    assert "no such" in complaint
    assert "key" in refused(examples, name, "--checkpoint", real, key="tml-another")
    complaint = refused(examples, name, "--checkpoint", real, "--model", "smollm3")
    assert "smollm3" in complaint


def test_training_here_needs_a_place_for_the_standin(examples: Examples, paths: dict[str, str]) -> None:
    complaint = refused(examples, NAMES[0], TINKER_BASE_URL="")
    assert "TINKER_BASE_URL=http://127.0.0.1:8123" in complaint
    assert "--checkpoint" in complaint
    assert f"port {examples.port}" in refused(examples, NAMES[0])  # the stand-in of this module listens there


def test_the_guide_names_problems_that_exist() -> None:
    text = (ROOT / "docs" / "tinker.md").read_text(encoding="utf-8")
    rows = text.partition("## Problems")[2].partition("\n## ")[0].splitlines()
    named = [slug for row in rows if row.startswith("|") for slug in re.findall(r"`([a-z-]+)`", row.split("|")[1])]
    assert not set(named) - set(PROBLEMS)
    assert {slug for slug in PROBLEMS if slug.startswith("tinker-")} <= set(named)


@pytest.mark.parametrize("name", NAMES)
def test_help(examples: Examples, name: str) -> None:
    status, said, complaint = examples.run(name, "--help", key=None)
    assert (status, complaint) == (0, "")
    for option in ("--url", "--model", "--checkpoint"):
        assert option in said
