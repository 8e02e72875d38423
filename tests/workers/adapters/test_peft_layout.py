"""Adapters that PEFT saved: after conversion they do what PEFT itself does with them, or are refused with a reason."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from bathyscope import errors
from bathyscope_workers.adapters.conversion import Converted, convert
from bathyscope_workers.adapters.skeleton import Skeleton
from bathyscope_workers.adapters.source import SourceAdapter
from tests.workers.adapters.tinker_layout import CASES, differences, states_of

WEIGHTS = "adapter_model.safetensors"
BY_NAME = {case.name: case for case in CASES}


def save_peft(name: str, folder: Path, *, save_embeddings: bool = False, **config: Any) -> list[torch.Tensor]:
    """Train an adapter at random, save it as PEFT does, and give the states that PEFT computes with it."""
    model = BY_NAME[name].build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, **config})).eval()
        torch.manual_seed(2)
        for key, parameter in wrapped.named_parameters():
            if "lora_" in key or "modules_to_save.default" in key:
                with torch.no_grad():
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        wrapped.save_pretrained(folder, save_embedding_layers=save_embeddings)
    return states_of(wrapped)


def converted(name: str, folder: Path) -> Converted:
    case = BY_NAME[name]
    return convert(SourceAdapter.open(folder), Skeleton.of(case.config(), name=name, auto_class=case.auto_class))


def states_after(name: str, folder: Path) -> list[torch.Tensor]:
    """What PEFT computes with the converted adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return states_of(PeftModel.from_pretrained(BY_NAME[name].build(), folder).eval())


ATTENTION = ["q_proj", "v_proj"]
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ATTENTION}),
    "dora": ("llama", {"target_modules": [*ATTENTION, "down_proj"], "use_dora": True}),
    "rslora": ("qwen3.5-moe", {"target_modules": [*ATTENTION, "in_proj_qkv"], "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": [*ATTENTION, "up_proj"],
            "rank_pattern": {"q_proj": 2, r".*\.1\.self_attn\.v_proj": 6, "up_proj": 8},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 3, r"layers\.\d+\.mlp\.up_proj": 32},
            "use_rslora": True,
        },
    ),
    "some-layers": ("llama", {"target_modules": ATTENTION, "layers_to_transform": [1]}),
    "regular-expression": ("llama", {"target_modules": r".*layers\.[01]\.mlp\.(up|down)_proj"}),
    "head": ("llama-tied", {"target_modules": [*ATTENTION, "lm_head"]}),
    "embeddings": ("llama-tied", {"target_modules": [*ATTENTION, "embed_tokens"]}),
    "saved-head": ("llama", {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]}),
    "saved-head-tied": ("llama-tied", {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]}),
    "saved-norm": ("qwen3", {"target_modules": ATTENTION, "modules_to_save": ["norm", "embed_tokens"]}),
    "experts": (
        "qwen3-moe",
        {"target_modules": ATTENTION, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "one-parameter": ("qwen3-moe", {"target_modules": ATTENTION, "target_parameters": ["experts.down_proj"]}),
    "router": ("qwen3-moe", {"target_modules": ATTENTION, "target_parameters": ["mlp.gate.weight"]}),
    "gpt-oss-experts": (
        "gpt-oss",
        {"target_modules": ATTENTION, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "deepseek-experts": (
        "deepseek-v3",
        {"target_modules": ["o_proj", "q_b_proj"], "target_parameters": ["experts.gate_up_proj"]},
    ),
    "vision": ("qwen3.5-vision", {"target_modules": [*ATTENTION, "in_proj_qkv", "linear_fc1"]}),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_applied_as_peft_does(kind: str, tmp_path: Path) -> None:
    name, config = ADAPTERS[kind]
    expected = save_peft(name, tmp_path / "peft", **config)
    result = converted(name, tmp_path / "peft")
    assert result.read == result.applied == len(load_file(tmp_path / "peft" / WEIGHTS))
    result.save(tmp_path / "converted")
    plain = states_of(BY_NAME[name].build())
    assert max(differences(plain, expected)) > 0.01
    assert max(differences(states_after(name, tmp_path / "converted"), expected)) < 1e-5
    assert result.plain == (
        kind in ("plain", "rslora", "patterns", "some-layers", "regular-expression", "head", "vision")
    )


def test_experts_one_by_one(tmp_path: Path) -> None:
    """The layout of the years before experts were 3-D: as one expert each, and as PEFT 0.21 loads it."""
    name = "qwen3-moe"
    torch.manual_seed(3)
    tensors = {}
    for layer in range(2):
        for expert in range(4):
            for leaf, out, inner in (("gate_proj", 12, 16), ("up_proj", 12, 16), ("down_proj", 16, 12)):
                path = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{leaf}"
                tensors[f"{path}.lora_A.weight"] = torch.randn(4, inner) * 0.1
                tensors[f"{path}.lora_B.weight"] = torch.randn(out, 4) * 0.1
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": ["gate_proj", "up_proj", "down_proj"]}
    write(tmp_path / "old", tensors, config)
    result = converted(name, tmp_path / "old")
    assert result.read == 2 * 4 * 3 * 2
    result.save(tmp_path / "converted")
    states = states_after(name, tmp_path / "converted")
    assert max(differences(states, states_after(name, tmp_path / "old"))) < 1e-5
    # One expert of one layer alone.
    few = {key: tensor for key, tensor in tensors.items() if ".1.mlp.experts.2." in key}
    write(tmp_path / "few", few, config)
    converted(name, tmp_path / "few").save(tmp_path / "few-converted")
    merged = BY_NAME[name].build()
    experts = merged.model.layers[1].mlp.experts
    for leaf, weight in (
        ("gate_proj", experts.gate_up_proj[2, :12]),
        ("up_proj", experts.gate_up_proj[2, 12:]),
        ("down_proj", experts.down_proj[2]),
    ):
        path = f"base_model.model.model.layers.1.mlp.experts.2.{leaf}"
        weight += 4 * few[f"{path}.lora_B.weight"] @ few[f"{path}.lora_A.weight"]
    assert max(differences(states_after(name, tmp_path / "few-converted"), states_of(merged))) < 1e-5


def test_scales_that_differ_within_one_matrix(tmp_path: Path) -> None:
    name = "qwen3.5"
    torch.manual_seed(3)
    base = "base_model.model.model.layers.0.linear_attn."
    tensors = {}
    for leaf, rank, out in (("in_proj_q", 2, 8), ("in_proj_k", 4, 8), ("in_proj_v", 6, 16)):
        tensors[f"{base}{leaf}.lora_A.weight"] = torch.randn(rank, 16) * 0.1
        tensors[f"{base}{leaf}.lora_B.weight"] = torch.randn(out, rank) * 0.1
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 16,
        "rank_pattern": {"in_proj_q": 2, "in_proj_v": 6},
        "alpha_pattern": {"in_proj_v": 3},
    }
    write(tmp_path / "tinker", tensors, config)
    converted(name, tmp_path / "tinker").save(tmp_path / "converted")
    merged = BY_NAME[name].build()
    weight = merged.model.layers[0].linear_attn.in_proj_qkv.weight
    for leaf, start, stop, scale in (("in_proj_q", 0, 8, 8.0), ("in_proj_k", 8, 16, 4.0), ("in_proj_v", 16, 32, 0.5)):
        weight[start:stop] += scale * tensors[f"{base}{leaf}.lora_B.weight"] @ tensors[f"{base}{leaf}.lora_A.weight"]
    assert max(differences(states_after(name, tmp_path / "converted"), states_of(merged))) < 1e-5


def test_scales_that_differ_are_not_rounded_to_the_files_type(tmp_path: Path) -> None:
    torch.manual_seed(3)
    base = "base_model.model.model.layers.0.linear_attn."
    tensors = {}
    for leaf, out in (("in_proj_q", 8), ("in_proj_k", 8), ("in_proj_v", 16)):
        tensors[f"{base}{leaf}.lora_A.weight"] = torch.randn(4, 16).bfloat16()
        tensors[f"{base}{leaf}.lora_B.weight"] = torch.randn(out, 4).bfloat16()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "alpha_pattern": {"in_proj_v": 3}}
    write(tmp_path / "tinker", tensors, config)
    result = converted("qwen3.5", tmp_path / "tinker")
    b = result.tensors["base_model.model.model.layers.0.linear_attn.in_proj_qkv.lora_B.weight"]
    assert torch.equal(b[16:, 8:], tensors[f"{base}in_proj_v.lora_B.weight"].float() * (3 / 16))


def test_names_of_a_whole_state_dict(tmp_path: Path) -> None:
    """`lora_A.default.weight`, a bare path without PEFT's prefix, `modules_to_save.default`."""
    expected = save_peft("llama", tmp_path / "peft", target_modules=ATTENTION, modules_to_save=["lm_head"])
    tensors = load_file(tmp_path / "peft" / WEIGHTS)
    renamed = {}
    for key, tensor in tensors.items():
        new = (
            key.removeprefix("base_model.model.")
            .replace(".lora_A.", ".lora_A.default.")
            .replace("lora_B", "lora_B.my-run")
        )
        renamed[new.replace("lm_head.weight", "lm_head.modules_to_save.default.weight")] = tensor
    (tmp_path / "renamed").mkdir()
    save_file(renamed, tmp_path / "renamed" / WEIGHTS)
    (tmp_path / "renamed" / "adapter_config.json").write_bytes((tmp_path / "peft" / "adapter_config.json").read_bytes())
    result = converted("llama", tmp_path / "renamed")
    assert result.digest == converted("llama", tmp_path / "peft").digest
    result.save(tmp_path / "converted")
    assert max(differences(states_after("llama", tmp_path / "converted"), expected)) < 1e-6


def test_copies_of_the_base_are_refused(tmp_path: Path) -> None:
    """PEFT saves the whole embeddings beside an adapted head, and loading them would overwrite the shared base."""
    save_peft("llama-tied", tmp_path / "peft", save_embeddings=True, target_modules=["lm_head"])
    with pytest.raises(errors.AdapterUnsupported, match="save_embedding_layers=False") as fault:
        converted("llama-tied", tmp_path / "peft")
    assert fault.value.names == ["base_model.model.lm_head.base_layer.weight"]


@pytest.mark.parametrize("config", [{"bias": "all"}, {"bias": "lora_only"}, {"lora_bias": True}])
def test_trained_biases_are_refused(config: dict[str, Any], tmp_path: Path) -> None:
    save_peft("qwen2", tmp_path / "peft", target_modules=ATTENTION, **config)
    with pytest.raises(errors.AdapterUnsupported, match=r"bias"):
        converted("qwen2", tmp_path / "peft")


def test_biases_of_other_modules_are_refused_as_biases(tmp_path: Path) -> None:
    save_peft("qwen2", tmp_path / "peft", target_modules=["o_proj"], bias="all")
    with pytest.raises(errors.AdapterUnsupported, match="bias none") as fault:
        converted("qwen2", tmp_path / "peft")
    assert "base_model.model.model.layers.0.self_attn.k_proj.bias" in fault.value.names


def test_bias_without_a_bias_is_nothing(tmp_path: Path) -> None:
    expected = save_peft("llama", tmp_path / "peft", target_modules=ATTENTION, bias="all")
    converted("llama", tmp_path / "peft").save(tmp_path / "converted")
    assert max(differences(states_after("llama", tmp_path / "converted"), expected)) < 1e-6


def test_dora_without_its_magnitudes(tmp_path: Path) -> None:
    save_peft("llama", tmp_path / "peft", target_modules=ATTENTION, use_dora=True)
    tensors = load_file(tmp_path / "peft" / WEIGHTS)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    lost = next(name for name in tensors if "magnitude" in name)
    write(tmp_path / "less", {name: tensor for name, tensor in tensors.items() if name != lost}, config)
    with pytest.raises(errors.AdapterIncomplete, match="magnitude"):
        converted("llama", tmp_path / "less")
    write(tmp_path / "not-said", tensors, {**config, "use_dora": False})
    with pytest.raises(errors.AdapterConfigInvalid, match="use_dora"):
        converted("llama", tmp_path / "not-said")


def test_dora_on_experts_is_refused(tmp_path: Path) -> None:
    save_peft("qwen3.5", tmp_path / "peft", target_modules=["in_proj_z"], use_dora=True)
    tensors = load_file(tmp_path / "peft" / WEIGHTS)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    # z has as many rows as v.
    write(
        tmp_path / "v",
        {name.replace("in_proj_z", "in_proj_v"): tensors[name] for name in tensors},
        {**config, "target_modules": None},
    )
    with pytest.raises(errors.AdapterUnsupported, match="DoRA"):
        converted("qwen3.5", tmp_path / "v")


def write(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS)
    (folder / "adapter_config.json").write_text(json.dumps(config))
