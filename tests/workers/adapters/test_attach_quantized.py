"""Adapters on 8bit and 4bit bases: as PEFT applies them to the same base, or as weights merged exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers as hf

from bathyscope_workers.adapters.bank import Share
from bathyscope_workers.adapters.skeleton import Skeleton
from bathyscope_workers.models.device import Device
from bathyscope_workers.models.load import load_resident
from bathyscope_workers.models.resident import Resident
from bathyscope_workers.models.spec import ModelSpec
from tests.workers.adapters.attaching import load_with_peft, peft_adapter, tinker_adapter
from tests.workers.adapters.tinker_layout import (
    DEEPSEEK,
    SMALL,
    TOKENS,
    Case,
    Edit,
    deepseek_edits,
    dense_edits,
    differences,
    gpt_oss_edits,
    merge,
    rows,
    states_of,
    weight_of,
)

EXACT = 1e-5
WIDE: dict[str, Any] = {**SMALL, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
"""4bit on CPU wants rows of 64 and matrices of 32."""
DEEPSEEK_WIDE: dict[str, Any] = {
    **DEEPSEEK,
    "hidden_size": 64,
    "intermediate_size": 64,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "moe_intermediate_size": 64,
}


def deepseek_wide_edits(model: Any) -> list[Edit]:
    views = {"w1": rows(0, 64), "w3": rows(64, 128)}
    return [replace(edit, view=views.get(edit.module.rpartition(".")[2], edit.view)) for edit in deepseek_edits(model)]


def gpt_oss_wide() -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return hf.GptOssConfig(**WIDE, num_local_experts=4, num_experts_per_tok=2, rope_parameters=rope)


BY_NAME = {
    "llama": Case("llama", lambda: hf.LlamaConfig(**WIDE), dense_edits),
    "llama-tied": Case("llama-tied", lambda: hf.LlamaConfig(**WIDE, tie_word_embeddings=True), dense_edits),
    "qwen2": Case("qwen2", lambda: hf.Qwen2Config(**WIDE, tie_word_embeddings=False), dense_edits),
    "gpt-oss": Case("gpt-oss", gpt_oss_wide, gpt_oss_edits),
    "deepseek-v3": Case("deepseek-v3", lambda: hf.DeepseekV3Config(**DEEPSEEK_WIDE), deepseek_wide_edits),
}
Load = Callable[..., Resident]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """A family's tiny model as a worker holds it."""

    def make(case: Case, quantization: str, dtype: str = "float32") -> Resident:
        folder = tmp_path / f"base-{case.name}"
        if not folder.exists():
            case.build().save_pretrained(folder)
        spec = ModelSpec(case.name, str(folder), quantization=quantization, compute_dtype=dtype)  # type: ignore[arg-type]
        return load_resident(spec, Device("cpu", 1, 10**9))

    return make


def serve(resident: Resident, digest: str) -> list[torch.Tensor]:
    with resident.adapters.serving([Share(digest, 0, 1)], TOKENS.shape[1]):
        return states_of(resident.model)


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("plain", {"target_modules": ["q_proj", "v_proj", "down_proj", "lm_head"]}),
        ("head", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ],
)
def test_as_peft_does_it(quantization: str, kind: str, config: dict[str, Any], load: Load, tmp_path: Path) -> None:
    case = BY_NAME["llama"]
    resident = load(case, quantization)
    assert type(resident.model.model.layers[0].mlp.down_proj).__name__ in ("Linear8bitLt", "Linear4bit")
    stored = peft_adapter(case.build(), Skeleton.of(case.config(), name=case.name), tmp_path, **config)
    plain = states_of(resident.model)
    attached = resident.adapters.attach(stored)
    assert attached.mixable == (kind == "plain")
    found = serve(resident, stored.digest)
    assert max(differences(found, plain)) > 0.02
    expected = states_of(load_with_peft(load(case, quantization).model, stored.folder))
    assert max(differences(found, expected)) < EXACT
    assert all(torch.equal(a, b) for a, b in zip(states_of(resident.model), plain, strict=True))


def matrices_of(model: Any) -> dict[str, torch.Tensor]:
    """The matrices of a quantized model as its kernels see them: what comes out for each unit vector."""
    return {
        f"{path}.weight": (module(torch.eye(module.in_features)) - (0 if module.bias is None else module.bias)).T
        for path, module in model.named_modules()
        if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))
    }


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_dora_equals_the_exact_merge(quantization: str, load: Load, tmp_path: Path) -> None:
    """PEFT's own is no reference: on CPU it takes norms of repacked weights, and leaves an 8bit base that fails."""
    case = BY_NAME["qwen2"]  # with biases
    resident = load(case, quantization)
    config = {"target_modules": ["q_proj", "down_proj"], "use_dora": True}
    stored = peft_adapter(case.build(), Skeleton.of(case.config(), name=case.name), tmp_path, **config)
    plain = states_of(resident.model)
    assert resident.adapters.attach(stored).mixable
    tensors = {name: tensor.double() for name, tensor in stored.read()}
    matrices = matrices_of(resident.model)
    for target in stored.targets:
        module = resident.model.get_submodule(target.name)
        a, b = (tensors[f"{target.prefix}.lora_{part}.weight"] for part in "AB")
        delta = target.scale * (b @ a)
        matrix = matrices[f"{target.name}.weight"].double() + delta
        gain = tensors[f"{target.prefix}.lora_magnitude_vector"] / matrix.norm(dim=1)
        given = torch.randn(2, 3, module.in_features, generator=torch.Generator().manual_seed(1))
        bias = 0.0 if module.bias is None else module.bias.double()
        with torch.inference_mode():
            base = module(given)
            with resident.adapters.serving([Share(None, 0, 1), Share(stored.digest, 1, 1)], 3):
                found = module(given)
        expected = (base[1].double() - bias + given[1].double() @ delta.T) * gain + bias
        assert torch.equal(found[0], base[0])
        assert float((found[1] - base[1]).norm() / base[1].norm()) > 0.02
        bound = 1e-4 if quantization == "8bit" else EXACT  # `matrices` of 8bit went through float16
        assert float((found[1].double() - expected).norm() / expected.norm()) < bound
    assert all(torch.equal(a, b) for a, b in zip(states_of(resident.model), plain, strict=True))


@pytest.mark.parametrize("name", ["llama-tied", "deepseek-v3", "gpt-oss"])
def test_a_family_on_4bit_equals_the_exact_merge(
    name: str, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSeek's shared experts among them: PEFT would add to their packed weights."""
    # That kernel multiplies in bfloat16.
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: False)
    case = BY_NAME[name]
    stored, edits, tensors = tinker_adapter(case, tmp_path)
    resident = load(case, "4bit")
    merged = case.build()
    matrices = matrices_of(resident.model)
    assert matrices
    with torch.no_grad():
        for path, matrix in matrices.items():
            weight_of(merged, path).copy_(matrix)
    assert max(differences(states_of(resident.model), states_of(merged))) < EXACT
    merge(merged, edits, tensors)
    resident.adapters.attach(stored)
    assert max(differences(serve(resident, stored.digest), states_of(merged))) < EXACT


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
def test_a_module_trained_whole_that_the_base_quantizes(quantization: str, load: Load, tmp_path: Path) -> None:
    """It is applied as it was trained, not quantized."""
    case = BY_NAME["llama"]
    config = {"target_modules": ["q_proj"], "modules_to_save": ["layers.1.mlp.down_proj"]}
    stored = peft_adapter(case.build(), Skeleton.of(case.config(), name=case.name), tmp_path, **config)
    resident = load(case, quantization)
    trained = dict(stored.read())["base_model.model.model.layers.1.mlp.down_proj.weight"]
    seen: list[torch.Tensor] = []
    block = resident.model.model.layers[1].mlp

    def note(_module: Any, args: Any, output: torch.Tensor) -> None:
        seen.append(output)

    resident.adapters.attach(stored)
    with resident.adapters.serving([Share(stored.digest, 0, 1)], TOKENS.shape[1]):
        handle = block.register_forward_hook(note)
        inner = block.down_proj.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
        states_of(resident.model)
        inner.remove()
        handle.remove()
    states, output = seen
    torch.testing.assert_close(output, torch.nn.functional.linear(states, trained), rtol=1e-5, atol=1e-6)
    assert resident.adapters.memory_bytes == stored.float32_bytes


def test_bfloat16_rounds_once(load: Load, tmp_path: Path) -> None:
    """The base computes in bfloat16, the adapter in float32: as PEFT does it."""
    case = BY_NAME["llama"]
    stored, _, _ = tinker_adapter(case, tmp_path)
    resident = load(case, "none", "bfloat16")
    resident.adapters.attach(stored)
    found = serve(resident, stored.digest)
    assert {layer.dtype for layer in found} == {torch.bfloat16}
    expected = states_of(load_with_peft(load(case, "none", "bfloat16").model, stored.folder))
    floats = [[layer.float() for layer in layers] for layers in (found, expected)]
    assert max(differences(*floats)) < 0.03
