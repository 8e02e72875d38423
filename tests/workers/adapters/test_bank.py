"""Rows under several adapters in one batch equal the rows alone, and those of weights merged exactly."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from bathyscope_workers.adapters.bank import Bank, LoraPair, Share

PATHS = [
    f"layers.{layer}.{name}"
    for layer in range(3)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.down_proj")
]


@pytest.fixture(scope="module")
def model() -> LlamaModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaModel(config).eval()


def hooks(model: LlamaModel) -> int:
    return sum(len(model.get_submodule(path)._forward_hooks) for path in PATHS)


def random_pairs(model: LlamaModel, seed: int, rank: int) -> dict[str, LoraPair]:
    made = torch.Generator().manual_seed(seed)
    pairs = {}
    for path in PATHS:
        module = model.get_submodule(path)
        a = torch.randn(rank, module.in_features, generator=made)
        b = torch.randn(module.out_features, rank, generator=made) * 0.1
        pairs[path] = LoraPair(a, b, 2.0 / rank)
    return pairs


def merged(model: LlamaModel, pairs: dict[str, LoraPair]) -> LlamaModel:
    twin = copy.deepcopy(model)
    for path in PATHS:  # a copy keeps the hooks of the bank
        twin.get_submodule(path)._forward_hooks.clear()
    with torch.no_grad():
        for path, pair in pairs.items():
            twin.get_submodule(path).weight += pair.scale * pair.b @ pair.a
    return twin


def states(model: LlamaModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return torch.stack(model(ids, output_hidden_states=True).hidden_states)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def test_each_row_runs_under_its_own_adapter(model: LlamaModel) -> None:
    bank = Bank(model)
    adapters = {f"d{seed}": random_pairs(model, seed, rank=2 + seed) for seed in range(4)}
    for digest, pairs in adapters.items():
        bank.attach(digest, pairs)
    twins = {None: model, **{digest: merged(model, pairs) for digest, pairs in adapters.items()}}
    ids = torch.randint(100, (6, 9))
    order = ["d2", None, "d0", "d0", "d3", None]
    with bank.serving([Share(adapter, row, 1) for row, adapter in enumerate(order)], ids.shape[1]):
        found = states(model, ids)
    for row, adapter in enumerate(order):
        assert error(found[:, row], states(twins[adapter], ids[row : row + 1])[:, 0]) < 1e-5
    assert error(found[:, 0], states(model, ids[:1])[:, 0]) > 1e-3
    bank.detach("d0")
    with pytest.raises(KeyError), bank.serving([Share("d0", 0, 6)], 9):
        pass
    for digest in list(adapters):
        bank.detach(digest)
    assert bank.memory_bytes == 0
    assert not hooks(model)


def test_a_failure_inside_leaves_the_base(model: LlamaModel) -> None:
    bank = Bank(model)
    bank.attach("d", random_pairs(model, 7, rank=4))
    ids = torch.randint(100, (2, 5))
    before = states(model, ids)

    def fail(*_: object) -> None:
        raise MemoryError

    handle = model.layers[1].register_forward_hook(fail)
    with pytest.raises(MemoryError), bank.serving([Share("d", 0, 2)], 5):
        states(model, ids)
    handle.remove()
    assert torch.equal(states(model, ids), before)
    bank.detach("d")


def test_what_does_not_fit_is_not_attached_in_part(model: LlamaModel) -> None:
    bank = Bank(model)
    pairs = random_pairs(model, 1, rank=4)
    wrong = {**pairs, PATHS[-1]: LoraPair(torch.zeros(4, 31), torch.zeros(32, 4), 1.0)}
    with pytest.raises(ValueError, match=r"down_proj"):
        bank.attach("d", wrong)
    with pytest.raises(KeyError):
        bank.attach("d", {**pairs, "layers.0.mlp": pairs[PATHS[0]]})
    assert "d" not in bank
    assert not hooks(model)


def test_random_batches_of_many_adapters(model: LlamaModel) -> None:
    drawn = random.Random(3)
    bank = Bank(model)
    adapters = {f"d{seed}": random_pairs(model, seed, rank=drawn.choice([1, 2, 8])) for seed in range(12)}
    twins = {None: copy.deepcopy(model), **{digest: merged(model, pairs) for digest, pairs in adapters.items()}}
    for digest, pairs in adapters.items():
        bank.attach(digest, pairs)
    for _ in range(20):
        order = sorted(drawn.choices([None, *adapters], k=drawn.randint(1, 8)), key=str)
        shares = [Share(name, order.index(name), order.count(name)) for name in dict.fromkeys(order)]
        ids = torch.randint(100, (len(order), drawn.randint(1, 12)))
        with bank.serving(shares, ids.shape[1]):
            found = states(model, ids)
        for row, name in enumerate(order):
            assert error(found[:, row], states(twins[name], ids[row : row + 1])[:, 0]) < 1e-5
