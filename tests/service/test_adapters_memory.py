"""Adapters whose base does not fit into the worker's memory in every quantization that is offered."""

from __future__ import annotations

import io
import json
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from tests.service.test_adapters import files, left_behind, upload
from tests.stack import Stack, stack

HIDDEN, LAYERS = 256, 4
"""Its weights take 10 MB unquantized, 3 in 8bit, 1.8 in 4bit."""


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path) -> Path:
    """A random model most of whose weights are quantized."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("middling")
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=HIDDEN,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer: Any = PreTrainedTokenizerFast
    tokenizer.from_pretrained(tiny_dir).save_pretrained(folder)
    return folder


def archive(seed: int, rank: int = 4) -> bytes:
    torch.manual_seed(seed)
    found = {}
    for layer in range(LAYERS):
        prefix = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        found[f"{prefix}.lora_A.weight"] = torch.randn(rank, HIDDEN) * 0.2
        found[f"{prefix}.lora_B.weight"] = torch.randn(HIDDEN, rank) * 0.2
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 32, "target_modules": ["q_proj"], "bias": "none"}
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, data in (
            ("adapter_model.safetensors", save(found)),
            ("adapter_config.json", json.dumps(config).encode()),
        ):
            (entry := tarfile.TarInfo(name)).size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return packed.getvalue()


def submitted(running: Stack, content: bytes) -> dict[str, Any]:
    """The job when it has ended; the first part of the first one starts with many imports."""
    answer = upload(running.client, content, wait=0, base_model="middling")
    return running.job(answer.json()["id"], seconds=300)


def added_to(running: Stack, content: bytes) -> str:
    """The quantization of the base that the adapter was attached to."""
    job = submitted(running, content)
    assert job["status"] == "succeeded", job
    return str(running.client.get(job["resource"]).json()["effect"]["quantization"])


def moves(running: Stack, count: int) -> list[str]:
    """The quantizations of the lanes that jobs were handed over to, when there are so many; it is logged afterwards."""
    deadline = time.monotonic() + 20
    while True:
        lines = (running.logs / "worker0.log").read_text().splitlines()
        found = [json.loads(line)["to"].split(":")[2] for line in lines if '"job.moved"' in line]
        if len(found) >= count or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("memory", "tried"), [(9 << 20, ["none", "8bit"]), (5 << 19, ["none", "8bit", "4bit"])], ids=["8bit", "4bit"]
)
def test_it_goes_on_to_a_variant_that_fits(tmp_path: Path, models_dir: Path, memory: int, tried: list[str]) -> None:
    with stack(
        tmp_path,
        models=f"middling={models_dir}",
        worker__adopt_seconds=0,
        worker__memory_bytes=memory,
        log_level="info",
    ) as running:
        fits = tried[-1]
        assert added_to(running, archive(1)) == fits
        assert moves(running, len(tried)) == tried

        # What is too large is known now, also when no variant is in memory.
        unload = running.post("/v1/models/middling/unload", {"quantization": fits}).json()
        assert unload["status"] == "succeeded", unload
        deadline = time.monotonic() + 60
        while running.client.get("/v1/models/middling").json()["residency"] == "hot":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert added_to(running, archive(2)) == fits
        assert moves(running, len(tried) + 1) == [*tried, fits]

        if fits == "4bit":  # there is no smaller one
            job = submitted(running, archive(3, rank=256))
            assert (job["status"], job["error"]["type"]) == ("failed", "/problems/out-of-memory")
            assert moves(running, len(tried) + 2) == [*tried, fits, fits]
        assert left_behind(running) == []
        deadline = time.monotonic() + 20  # what was put by for the one that failed goes after its end
        while len(files(running)) > 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(files(running)) == 4
