"""Adapters with a real worker: from an archive to hidden states that equal those of the exact weight merge."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

import bathyscope
from tests.service.test_adapters import added, files, left_behind, upload
from tests.service.test_extractions import npy
from tests.service.test_manners import problem
from tests.stack import Stack, stack

TEXTS = ["The capital of France is Paris.", "deep water", "a", "What is two plus two? It is four." * 3]
RANK, ALPHA = 4, 32
MODULES = {
    "self_attn.q_proj": (32, 32),
    "self_attn.v_proj": (32, 16),
    "mlp.down_proj": (64, 32),
}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, models: str) -> Iterator[Stack]:
    with stack(
        tmp_path_factory.mktemp("live"), models=models, worker__adopt_seconds=0, jobs__lease_seconds=3
    ) as running:
        yield running


def tensors(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    found = {}
    for layer in range(4):
        for module, (inner, outer) in MODULES.items():
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            found[f"{prefix}.lora_A.weight"] = torch.randn(RANK, inner) * 0.2
            found[f"{prefix}.lora_B.weight"] = torch.randn(outer, RANK) * 0.2
    return found


def archive(seed: int, layout: str, form: str = "tar") -> bytes:
    """An adapter for the tiny model, as Tinker or PEFT writes one."""
    config: dict[str, Any] = {"peft_type": "LORA", "bias": "none", "r": RANK, "lora_alpha": ALPHA}
    if layout == "tinker":
        config["target_modules"] = "all-linear"
    else:
        names = sorted(name.rpartition(".")[2] for name in MODULES)
        config |= {"target_modules": names, "task_type": "CAUSAL_LM", "base_model_name_or_path": None}
    content = {
        "adapter_model.safetensors": save(tensors(seed)),
        "adapter_config.json": json.dumps(config).encode(),
        **({"checkpoint_complete": b""} if layout == "tinker" else {}),
    }
    packed = io.BytesIO()
    if form == "zip":
        with zipfile.ZipFile(packed, "w") as made:
            for name, data in content.items():
                made.writestr(name, data)
    else:
        with tarfile.open(fileobj=packed, mode="w:gz" if form == "tar.gz" else "w") as made_tar:
            for name, data in content.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                made_tar.addfile(entry, io.BytesIO(data))
    return packed.getvalue()


def merged(folder: Path, seed: int | None) -> list[np.ndarray[Any, Any]]:
    """For each text the last token's states, (layers, hidden), of a model whose weights hold the adapter."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = tensors(seed) if seed is not None else {}
    with torch.no_grad():
        for name in [name for name in found if name.endswith("lora_A.weight")]:
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = found[name.replace("lora_A", "lora_B")]
            model.get_submodule(path).weight += ALPHA / RANK * b @ found[name]
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return [
            torch.stack(model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states)[
                :, 0, -1
            ].numpy()
            for text in TEXTS
        ]


def assert_equal(found: np.ndarray[Any, Any], expected: list[np.ndarray[Any, Any]]) -> None:
    wanted = np.stack(expected)
    error = np.linalg.norm(found - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)
    assert error.max() <= 1e-5, error.max()


@pytest.mark.parametrize(("layout", "form"), [("tinker", "tar"), ("peft", "zip"), ("peft", "tar.gz")])
def test_states_are_those_of_the_merge(live: Stack, tiny_dir: Path, layout: str, form: str) -> None:
    seed = 7
    adapter = added(live.client, archive(seed, layout, form), name=f"{layout} {form}")
    assert adapter["tensors"] == {"read": 24, "applied": 24}
    assert (adapter["rank"], adapter["alpha"]) == (RANK, float(ALPHA))
    effect = adapter["effect"]
    assert len(effect["relative_change"]) == 5
    assert effect["relative_change"][0] == 0
    assert effect["max"] > 0.01
    assert not effect["is_noop"]

    expected = [merged(tiny_dir, None), merged(tiny_dir, seed)]
    alone = live.extract(TEXTS, model="tiny", adapter=adapter["id"])
    assert alone["identity"]["adapter"] == adapter["digest"]
    assert_equal(npy(live, alone), expected[1])
    both = live.extract(TEXTS, model="tiny", adapter=["base", adapter["id"]])
    found = npy(live, both)
    assert both["shape"] == [2, 4, 5, 32]
    for variant in range(2):
        assert_equal(found[variant], expected[variant])
    assert both["relative_change"][0] == [0.0] * 5
    assert both["relative_change"][1][0] == 0
    assert both["relative_change"][1][4] > 0.01
    assert_equal(npy(live, live.extract(TEXTS, model="tiny")), expected[0])
    assert live.client.delete(f"/v1/adapters/{adapter['id']}").status_code == 204
    assert not files(live)
    assert left_behind(live) == []


# PEFT looks at every attribute of the model, deprecated ones of transformers too.
@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")
def test_the_archive_is_what_peft_loads(live: Stack, tiny_dir: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter = added(live.client, archive(8, "tinker"))
    content = live.client.get(adapter["links"]["archive"]).content
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for member in tar.getmembers():
            file = tar.extractfile(member)
            assert file is not None, member
            (tmp_path / member.name).write_bytes(file.read())
    base = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    with torch.no_grad():
        found = [
            torch.stack(model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states)[
                :, 0, -1
            ].numpy()
            for text in TEXTS
        ]
    assert_equal(np.stack(found), merged(tiny_dir, 8))
    live.client.delete(f"/v1/adapters/{adapter['id']}")


def test_an_extraction_follows_the_job_that_makes_its_adapter(live: Stack, tiny_dir: Path) -> None:
    seed = 31
    making = upload(live.client, archive(seed, "tinker"), wait=0).json()
    request = {"model": "tiny", "inputs": TEXTS, "adapter": ["base", making["id"]]}
    following = live.post("/v1/extractions", request, wait=0).json()
    done = live.job(following["id"])
    assert done["status"] == "succeeded", done
    both = live.client.get(done["resource"]).json()
    adapter = live.client.get(live.job(making["id"])["resource"]).json()
    assert [one["adapter"] for one in both["variants"]] == [None, adapter["id"]]
    assert [one["digest"] for one in both["variants"]] == [None, adapter["digest"]]
    found = npy(live, both)
    for variant, expected in enumerate((merged(tiny_dir, None), merged(tiny_dir, seed))):
        assert_equal(found[variant], expected)
    # What the job has made by now is taken, in the SDK by its handle.
    with bathyscope.Client(live.url) as client:
        handle = client.jobs.get(making["id"])
        states = client.extractions.create(model="tiny", inputs=TEXTS, adapter=handle).wait()
        assert states.adapter == adapter["id"]
        assert_equal(states.hidden_states(), merged(tiny_dir, seed))
    live.client.delete(f"/v1/adapters/{adapter['id']}")
    problem(live.post("/v1/extractions", request, wait=0), 404, "not-found")


def test_a_job_that_makes_no_adapter_is_told(live: Stack) -> None:
    request: dict[str, Any] = {"model": "tiny", "inputs": TEXTS}
    other = live.post("/v1/extractions", request).json()["id"]
    found = problem(live.post("/v1/extractions", {**request, "adapter": other}, wait=0), 422, "invalid-request")
    assert found["errors"][0]["pointer"] == "/adapter"
    failed = upload(live.client, b"no archive").json()
    found = problem(live.post("/v1/extractions", {**request, "adapter": failed["id"]}, wait=0), 409, "state-conflict")
    assert found["errors"][0]["pointer"] == "/adapter"
    pending = upload(live.client, b"no archive either", wait=0).json()
    answer = live.post("/v1/extractions", {**request, "adapter": pending["id"]}, wait=0)
    if answer.status_code == 202:  # else it had failed by then, and was told at once
        ended = live.job(answer.json()["id"])
        assert (ended["status"], ended["error"]["type"]) == ("failed", "/problems/dependency-failed")


def test_a_job_whose_adapter_is_of_another_base_fails_what_follows(live: Stack) -> None:
    making = upload(live.client, archive(32, "tinker"), wait=0).json()
    answer = live.post("/v1/extractions", {"model": "smollm2", "inputs": TEXTS, "adapter": making["id"]}, wait=0)
    # It may have been made by then, and is told at once.
    told = live.job(answer.json()["id"])["error"] if answer.status_code == 202 else answer.json()
    assert told["type"] == "/problems/adapter-base-mismatch", told
    live.client.delete(live.job(making["id"])["resource"])


def test_a_probe_with_an_adapter(live: Stack) -> None:
    adapter = added(live.client, archive(9, "tinker"))
    texts = [f"{word} {number}" for number in range(10) for word in ("yes", "no")]
    states = live.extract(texts, model="tiny", adapter=["base", adapter["id"]], layers=[2, 4])
    body = {"extraction": states["id"], "labels": [1, 0] * 10, "folds": 2, "bootstrap": 0, "variant": adapter["id"]}
    job = live.post("/v1/probes", body).json()
    assert job["status"] == "succeeded", job
    probe = live.client.get(job["resource"]).json()
    assert probe["identity"]["adapter"] == adapter["digest"]
    stored = live.post(f"/v1/probes/{probe['id']}/predict", {"extraction": states["id"]}).json()
    fresh = live.post(f"/v1/probes/{probe['id']}/predict", {"inputs": texts}).json()
    read = [np.array(live.client.get(one["resource"]).json()["probabilities"]) for one in (stored, fresh)]
    np.testing.assert_allclose(read[0], read[1], atol=1e-4)
    live.client.delete(f"/v1/adapters/{adapter['id']}")


@pytest.mark.parametrize(
    ("content", "slug"),
    [
        (b"no archive", "adapter-archive-unreadable"),
        (archive(1, "tinker")[:4000], "adapter-incomplete"),
    ],
)
def test_what_is_none_is_refused_whole(live: Stack, content: bytes, slug: str) -> None:
    job = upload(live.client, content).json()
    assert job["status"] == "failed", job
    assert job["error"]["type"] == f"/problems/{slug}"
    time.sleep(0.2)
    assert left_behind(live) == []
    assert not files(live)
    assert live.extract(["after"], model="tiny")["inputs"] == 1


@pytest.mark.parametrize("engine", ["fetch", "model"])
def test_engines_are_killed(live: Stack, engine: str) -> None:
    """Stopped in the midst of its part, then killed: the job ends well, and nothing is left of the first try."""
    seed = {"fetch": 20, "model": 21}[engine]
    live.extract(["warm"], model="tiny")
    [pid] = live.engines(engine)
    os.kill(pid, signal.SIGSTOP)
    job = upload(live.client, archive(seed, "tinker"), wait=0).json()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        record = live.client.get(f"/v1/jobs/{job['id']}").json()
        staged = bool(files(live))
        if record["status"] == "running" and staged == (engine == "model"):
            break
        time.sleep(0.05)
    time.sleep(0.3)
    assert live.client.get("/v1/adapters").json()["data"] == []
    os.kill(pid, signal.SIGKILL)
    ended = live.job(job["id"])
    assert ended["status"] == "succeeded", ended
    [adapter] = live.client.get("/v1/adapters").json()["data"]
    assert len(files(live)) == 2
    assert left_behind(live) == []
    live.client.delete(f"/v1/adapters/{adapter['id']}")


@pytest.mark.parametrize("damage", [lambda content: content[:-100], lambda content: content[:-100] + bytes(100)])
def test_what_the_cache_holds_is_verified(live: Stack, damage: Callable[[bytes], bytes]) -> None:
    """Of another size it is found out at once, and of the same size by the engine, as it reads the tensors."""
    adapter = added(live.client, archive(30, "tinker"))
    home = live.data_dir / "adapters" / adapter["digest"]
    expected = npy(live, live.extract(TEXTS, model="tiny", adapter=adapter["id"]))
    weights = home / "adapter_model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest()
    content = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(damage(content))
    [pid] = live.engines("model")
    os.kill(pid, signal.SIGKILL)  # so that it is attached anew
    np.testing.assert_allclose(npy(live, live.extract(TEXTS, model="tiny", adapter=adapter["id"])), expected, rtol=1e-5)
    assert weights.read_bytes() == content
    live.client.delete(f"/v1/adapters/{adapter['id']}")
