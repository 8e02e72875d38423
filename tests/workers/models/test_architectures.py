"""Hidden states of many architectures, through the extraction's forward pass, against a plain call."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bathyscope_workers.models.device import Device
from bathyscope_workers.models.load import load_resident
from bathyscope_workers.models.resident import Resident
from bathyscope_workers.models.spec import ModelSpec

COMMON = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**COMMON, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
HYBRID = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
}
# A sliding window shorter than the texts.
WINDOW = {"sliding_window": 6}

DECODERS: dict[str, dict[str, Any]] = {
    "Llama": GROUPED,
    "Qwen3": GROUPED,
    "Mistral": {**GROUPED, **WINDOW},
    "Gemma3Text": {**GROUPED, **WINDOW, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
    "GPT2": {
        "vocab_size": 120,
        "n_embd": 32,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "GptOss": {
        **GROUPED,
        **WINDOW,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "Qwen3Moe": {**GROUPED, **EXPERTS},
    "Qwen3_5Text": {**GROUPED, **HYBRID},
    "Qwen3Next": {**GROUPED, **EXPERTS, **HYBRID, "shared_expert_intermediate_size": 16},
    "Lfm2": {**COMMON, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"] * 2, "block_multiple_of": 8},
    "Mamba": {"vocab_size": 120, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 4, "pad_token_id": 0},
}
ENCODERS: dict[str, dict[str, Any]] = {
    "Bert": COMMON,
    "Roberta": {**COMMON, "max_position_embeddings": 202, "pad_token_id": 1, "bos_token_id": 0},
    "ModernBert": {**COMMON, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2, "classifier_pooling": "mean"},
    "DistilBert": {"vocab_size": 120, "dim": 32, "hidden_dim": 48, "n_layers": 4, "n_heads": 4, "pad_token_id": 0},
}

Tiny = Callable[..., ModelSpec]
Plain = Callable[[Any, list[int]], torch.Tensor]


@pytest.fixture(scope="module", params=[*DECODERS, *ENCODERS])
def resident(request: pytest.FixtureRequest, tiny_model: Tiny) -> Resident:
    family = request.param
    spec = tiny_model(family, encoder=family in ENCODERS, **(DECODERS | ENCODERS)[family])
    return load_resident(spec, Device.pick(force_cpu=True))


def test_the_self_test_passes(resident: Resident) -> None:
    report = resident.self_test.to_wire()
    assert report["passed"]
    assert report["max_relative_error"] <= 1e-5
    assert [layer["layer"] for layer in report["layers"]] == list(range(resident.facts.num_layers + 1))
    assert min(layer["cosine"] for layer in report["layers"]) > 0.999999


def test_every_layer_from_a_mixed_batch(
    resident: Resident,
    plain_states: Plain,
    random_ids: Callable[[int, int], list[int]],
    max_relative_error: Callable[[torch.Tensor, torch.Tensor], float],
) -> None:
    """Lengths 1 to 150 in one batch, stopping at each layer in turn."""
    texts = [random_ids(seed, length) for seed, length in enumerate((1, 2, 9, 40, 150))]
    expected = [plain_states(resident.model, ids) for ids in texts]
    forward, style = resident.forward, resident.style
    batches = [[text] for text in texts] if style.alone else [texts]
    numbers = iter(range(len(texts)))
    for batch in batches:
        places = [next(numbers) for _ in batch]
        ids, lengths = forward.pad([torch.tensor(text).to(torch.int32).numpy() for text in batch])
        for top in range(forward.num_layers + 1):
            found: dict[int, torch.Tensor] = {}
            wanted = {0, top // 2, top}
            forward(
                ids, lengths, wanted, lambda layer, states, found=found: found.update({layer: states.clone()}), style
            )
            assert set(found) == wanted
            for layer, states in found.items():
                for row, place in enumerate(places):
                    got = states[row, : lengths[row]]
                    assert max_relative_error(got, expected[place][:, layer]) <= 1e-5, (top, layer)


def test_the_model_is_left_as_it_was(resident: Resident) -> None:
    modules = [id(module) for module in resident.model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in resident.model.modules()]
    ids, lengths = resident.forward.pad([torch.tensor([3, 4, 5]).to(torch.int32).numpy()])

    def refuse(layer: int, states: torch.Tensor) -> None:
        raise ArithmeticError("in the middle of a block")

    with pytest.raises(ArithmeticError):
        resident.forward(ids, lengths, [1], refuse, resident.style)
    assert [id(module) for module in resident.model.modules()] == modules
    assert [len(one._forward_hooks) + len(one._forward_pre_hooks) for one in resident.model.modules()] == hooks


def test_decoders_batch_without_a_mask(tiny_model: Tiny) -> None:
    """The fast style holds for the common decoders; a fallback would pass unnoticed otherwise."""
    for family in ("Llama", "Qwen3", "Mistral", "Gemma3Text", "GPT2", "GptOss", "Qwen3Moe", "Qwen3_5Text"):
        resident = load_resident(tiny_model(family, **DECODERS[family]), Device.pick(force_cpu=True))
        assert str(resident.style) == "hooks, no mask", family
