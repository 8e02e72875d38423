"""Tiny random models of every family, and adapters for them as Tinker writes them.

What each tensor of Tinker's layout does to the base is written down here once more, by hand and apart from the
converter: each edit names the weight of the base and the part of it (a view) that B A is added to.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers as hf
from safetensors.torch import save_file
from torch import nn

RANK, ALPHA = 4, 32
PREFIX = "base_model.model."

View = Callable[[torch.Tensor], torch.Tensor]


def whole(weight: torch.Tensor) -> torch.Tensor:
    return weight


def rows(start: int, stop: int) -> View:
    return lambda weight: weight[..., start:stop, :]


def columns(step_from: int) -> View:
    """gpt-oss holds [experts, in, out], with gate and up alternating."""
    return lambda weight: weight[:, :, step_from::2].transpose(1, 2)


def transposed(weight: torch.Tensor) -> torch.Tensor:
    return weight.transpose(1, 2)


@dataclass(frozen=True)
class Edit:
    """One module as Tinker trains it."""

    module: str
    """In Tinker's words, without `base_model.model.`."""
    weight: str
    """Parameter of the base."""
    view: View = whole
    """The part of it: [out, in], or [experts, out, in]."""


@dataclass(frozen=True)
class Case:
    name: str
    config: Callable[[], Any]
    edits: Callable[[Any], list[Edit]]
    auto_class: Any = None
    raw_drops_only_the_head: bool = False
    """What PEFT's own loading of Tinker's folder does to this family: all is right but the logits."""

    def build(self) -> Any:
        """A random model whose adapters can make a difference."""
        torch.manual_seed(0)
        model = (self.auto_class or hf.AutoModelForCausalLM).from_config(self.config())
        model.eval().requires_grad_(False)
        return model


SMALL: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MIXTURE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
LINEAR: dict[str, Any] = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
DEEPSEEK: dict[str, Any] = {
    **{name: value for name, value in SMALL.items() if name != "head_dim"},
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
}


def attention(layer: str, base: str, leaves: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")) -> list[Edit]:
    return [Edit(f"{layer}.self_attn.{leaf}", f"{base}.self_attn.{leaf}.weight") for leaf in leaves]


def mlp(layer: str, base: str, owner: str = "mlp") -> list[Edit]:
    return [
        Edit(f"{layer}.{owner}.{leaf}", f"{base}.{owner}.{leaf}.weight")
        for leaf in ("gate_proj", "up_proj", "down_proj")
    ]


def experts(layer: str, base: str, intermediate: int = 12) -> list[Edit]:
    fused = f"{base}.mlp.experts.gate_up_proj"
    return [
        Edit(f"{layer}.mlp.experts.w1", fused, rows(0, intermediate)),
        Edit(f"{layer}.mlp.experts.w3", fused, rows(intermediate, 2 * intermediate)),
        Edit(f"{layer}.mlp.experts.w2", f"{base}.mlp.experts.down_proj"),
    ]


def linear_attention(layer: str, base: str) -> list[Edit]:
    # Keys: 2 heads of 4; values: 4 heads of 4.
    parts = {"in_proj_q": rows(0, 8), "in_proj_k": rows(8, 16), "in_proj_v": rows(16, 32)}
    edits = [
        Edit(f"{layer}.linear_attn.{leaf}", f"{base}.linear_attn.in_proj_qkv.weight", view)
        for leaf, view in parts.items()
    ]
    return edits + [
        Edit(f"{layer}.linear_attn.{leaf}", f"{base}.linear_attn.{leaf}.weight") for leaf in ("in_proj_z", "out_proj")
    ]


UNEMBED = Edit("model.unembed_tokens", "lm_head.weight")


def dense_edits(model: Any) -> list[Edit]:
    found = [UNEMBED]
    for layer in ("model.layers.0", "model.layers.1"):
        found += attention(layer, layer) + mlp(layer, layer)
    return found


def qwen3_moe_edits(model: Any) -> list[Edit]:
    found = [UNEMBED]
    for layer in ("model.layers.0", "model.layers.1"):
        found += attention(layer, layer) + experts(layer, layer)
    return found


def gpt_oss_edits(model: Any) -> list[Edit]:
    found = [UNEMBED]
    for layer in ("model.layers.0", "model.layers.1"):
        found += [
            Edit(f"{layer}.attn.{leaf}", f"{layer}.self_attn.{leaf}.weight")
            for leaf in ("q_proj", "k_proj", "v_proj", "o_proj")
        ]
        found += [
            Edit(f"{layer}.mlp.experts.w1", f"{layer}.mlp.experts.gate_up_proj", columns(0)),
            Edit(f"{layer}.mlp.experts.w3", f"{layer}.mlp.experts.gate_up_proj", columns(1)),
            Edit(f"{layer}.mlp.experts.w2", f"{layer}.mlp.experts.down_proj", transposed),
        ]
    return found


def qwen3_5_edits(model: Any, *, mixture: bool = False, base: str = "model.") -> list[Edit]:
    found = [UNEMBED]
    for index in range(2):
        layer, own = f"model.layers.{index}", f"{base}layers.{index}"
        found += linear_attention(layer, own) if index == 0 else attention(layer, own)
        found += experts(layer, own) + mlp(layer, own, "mlp.shared_expert") if mixture else mlp(layer, own)
    return found


def deepseek_edits(model: Any, *, base: str = "model.") -> list[Edit]:
    found = [UNEMBED]
    for index in range(2):
        layer, own = f"model.layers.{index}", f"{base}layers.{index}"
        found += attention(layer, own, ("q_a_proj", "kv_a_proj_with_mqa", "o_proj"))
        found += experts(layer, own) + mlp(layer, own, "mlp.shared_experts") if index else mlp(layer, own)
    return found


def vision_config(*, mixture: bool = False) -> Any:
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
        "num_position_embeddings": 16,
    }
    if mixture:
        text = hf.Qwen3_5MoeTextConfig(**SMALL, **LINEAR, **MIXTURE, shared_expert_intermediate_size=12)
        return hf.Qwen3_5MoeConfig(text_config=text.to_dict(), vision_config=vision, tie_word_embeddings=False)
    return hf.Qwen3_5Config(
        text_config=hf.Qwen3_5TextConfig(**SMALL, **LINEAR).to_dict(), vision_config=vision, tie_word_embeddings=False
    )


def kimi_config() -> Any:
    """Kimi-K2.5: DeepSeek-V3's text model behind a vision tower, its experts in one group."""
    text = hf.DeepseekV3Config(**{**DEEPSEEK, "n_group": 1, "n_routed_experts": 6}, tie_word_embeddings=False)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    return hf.Kimi_K25Config(
        text_config=text.to_dict(), vision_config=vision, projection_hidden_size=16, tie_word_embeddings=False
    )


def gpt_oss_config() -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return hf.GptOssConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, rope_parameters=rope)


CASES = [
    Case("llama", lambda: hf.LlamaConfig(**SMALL), dense_edits, raw_drops_only_the_head=True),
    Case(
        "llama-tied",
        lambda: hf.LlamaConfig(**SMALL, tie_word_embeddings=True),
        dense_edits,
        raw_drops_only_the_head=True,
    ),
    Case(
        "qwen2", lambda: hf.Qwen2Config(**SMALL, tie_word_embeddings=False), dense_edits, raw_drops_only_the_head=True
    ),
    Case(
        "qwen3", lambda: hf.Qwen3Config(**SMALL, tie_word_embeddings=False), dense_edits, raw_drops_only_the_head=True
    ),
    Case(
        "qwen3-tied",
        lambda: hf.Qwen3Config(**SMALL, tie_word_embeddings=True),
        dense_edits,
        raw_drops_only_the_head=True,
    ),
    Case("mistral", lambda: hf.MistralConfig(**SMALL), dense_edits, raw_drops_only_the_head=True),
    Case("gemma2", lambda: hf.Gemma2Config(**SMALL), dense_edits, raw_drops_only_the_head=True),
    Case("gemma3", lambda: hf.Gemma3TextConfig(**SMALL), dense_edits, raw_drops_only_the_head=True),
    Case("qwen3-moe", lambda: hf.Qwen3MoeConfig(**SMALL, **MIXTURE), qwen3_moe_edits),
    Case("gpt-oss", gpt_oss_config, gpt_oss_edits),
    Case("qwen3.5", lambda: hf.Qwen3_5TextConfig(**SMALL, **LINEAR), qwen3_5_edits),
    Case("qwen3.5-tied", lambda: hf.Qwen3_5TextConfig(**SMALL, **LINEAR, tie_word_embeddings=True), qwen3_5_edits),
    Case(
        "qwen3.5-vision",
        vision_config,
        lambda model: qwen3_5_edits(model, base="model.language_model."),
        hf.AutoModelForImageTextToText,
    ),
    Case(
        "qwen3.5-moe",
        lambda: hf.Qwen3_5MoeTextConfig(
            **SMALL, **LINEAR, **MIXTURE, shared_expert_intermediate_size=12, tie_word_embeddings=False
        ),
        lambda model: qwen3_5_edits(model, mixture=True),
    ),
    Case(
        "qwen3.5-moe-vision",
        lambda: vision_config(mixture=True),
        lambda model: qwen3_5_edits(model, mixture=True, base="model.language_model."),
        hf.AutoModelForImageTextToText,
    ),
    Case("deepseek-v3", lambda: hf.DeepseekV3Config(**DEEPSEEK), deepseek_edits),
    Case(
        "kimi-k2.5",
        kimi_config,
        lambda model: deepseek_edits(model, base="model.language_model."),
        hf.AutoModelForImageTextToText,
    ),
]
"""Every family, all with every module that Tinker trains on it."""


def weight_of(model: Any, name: str) -> nn.Parameter:
    """A parameter by name; the head's own name works where it is tied."""
    return dict(model.named_parameters(remove_duplicate=False))[name]


def tinker_tensors(model: Any, edits: list[Edit], rank: int = RANK) -> dict[str, torch.Tensor]:
    """A and B for every edit, random and nowhere zero, in Tinker's names and shapes."""
    torch.manual_seed(1)
    found: dict[str, torch.Tensor] = {}
    for edit in edits:
        shape = edit.view(weight_of(model, edit.weight)).shape
        out, inner = shape[-2:]
        shared_a: tuple[int, ...] = ()
        shared_b: tuple[int, ...] = ()
        if len(shape) == 3:
            # The side that meets the residual stream is shared by all experts.
            shared_a, shared_b = ((shape[0],), (1,)) if edit.module.endswith("w2") else ((1,), (shape[0],))
        found[f"{PREFIX}{edit.module}.lora_A.weight"] = torch.randn(*shared_a, rank, inner) * 0.1
        found[f"{PREFIX}{edit.module}.lora_B.weight"] = torch.randn(*shared_b, out, rank) * 0.1
    return found


def merge(model: Any, edits: list[Edit], tensors: dict[str, torch.Tensor], scale: float = ALPHA / RANK) -> None:
    """Add the adapter to the weights, in float64. A tied head is untied first: Tinker adapts the head alone."""
    for edit in edits:
        a = tensors[f"{PREFIX}{edit.module}.lora_A.weight"].double()
        b = tensors[f"{PREFIX}{edit.module}.lora_B.weight"].double()
        if edit.weight == "lm_head.weight" and model.lm_head.weight is model.get_input_embeddings().weight:
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)
        view = edit.view(weight_of(model, edit.weight))
        view.copy_((view.double() + scale * (b @ a)).float())


def write_tinker(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """A checkpoint's folder as Tinker exports it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    said = {
        "peft_type": "LORA",
        "bias": "none",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": "all-linear",
        "base_model_name_or_path": None,
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(said))
    (folder / "checkpoint_complete").touch()
    return folder


TOKENS = torch.tensor([[3, 9, 27, 33, 5, 15, 45, 39, 21, 1, 8, 40]])


def states_of(model: Any) -> list[torch.Tensor]:
    """Hidden states of every layer, and the logits last."""
    with torch.no_grad():
        out = model(input_ids=TOKENS, output_hidden_states=True, use_cache=False)
    return [*out.hidden_states, out.logits]


def differences(left: list[torch.Tensor], right: list[torch.Tensor]) -> list[float]:
    """Per layer: the largest over the tokens of norm of the difference over norm of the right."""
    assert len(left) == len(right)
    return [float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max()) for a, b in zip(left, right, strict=True)]
