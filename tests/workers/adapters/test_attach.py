"""Adapters attached to a base: what they give, and that the base is the base when they do not run."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from bathyscope import errors
from bathyscope_workers.adapters.bank import RowsNotApart, Share
from bathyscope_workers.adapters.skeleton import Skeleton
from bathyscope_workers.adapters.stored import StoredAdapter
from tests.workers.adapters.attaching import adapters_of, load_with_peft, peft_adapter, tinker_adapter
from tests.workers.adapters.tinker_layout import CASES, SMALL, TOKENS, Case, differences, merge, states_of

EXACT = 1e-5
BY_NAME = {case.name: case for case in CASES}
EXCLUSIVE = {"qwen3-moe", "gpt-oss", "qwen3.5-moe", "qwen3.5-moe-vision", "deepseek-v3", "kimi-k2.5"}
"""Families whose adapters train experts, which are parameters."""


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param  # type: ignore[no-any-return]


def shape_of(model: nn.Module) -> list[tuple[str, int, tuple[str, ...], int]]:
    """Every module by path, with its identity, its parameters in their order, and its hooks."""
    return [
        (path, id(module), tuple(module._parameters), len(module._forward_hooks))
        for path, module in model.named_modules(remove_duplicate=False)
    ]


def serve(model: Any, adapters: Any, digest: str | None) -> list[torch.Tensor]:
    with adapters.serving([Share(digest, 0, 1)], TOKENS.shape[1]):
        return states_of(model)


def test_attached_equals_the_exact_merge(case: Case, tmp_path: Path) -> None:
    stored, edits, tensors = tinker_adapter(case, tmp_path)
    model, merged = case.build(), case.build()
    merge(merged, edits, tensors)
    plain, before = states_of(model), shape_of(model)
    adapters = adapters_of(model)
    attached = adapters.attach(stored)
    assert attached.mixable == (case.name not in EXCLUSIVE)
    assert max(differences(serve(model, adapters, stored.digest), states_of(merged))) < EXACT
    assert all(torch.equal(a, b) for a, b in zip(states_of(model), plain, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(serve(model, adapters, None), plain, strict=True))
    assert attached.memory_bytes == adapters.memory_bytes == stored.float32_bytes
    adapters.detach(stored.digest)
    assert shape_of(model) == before
    assert adapters.memory_bytes == 0


@pytest.mark.parametrize("name", sorted(BY_NAME.keys() - EXCLUSIVE))
def test_rows_of_one_batch_under_their_own_adapters(name: str, tmp_path: Path) -> None:
    case = BY_NAME[name]
    model = case.build()
    adapters = adapters_of(model)
    twins: dict[str | None, Any] = {None: case.build()}
    for seed in (1, 2):
        stored, edits, tensors = tinker_adapter(case, tmp_path / str(seed), seed=seed)
        twins[stored.digest] = case.build()
        merge(twins[stored.digest], edits, tensors)
        assert adapters.attach(stored).mixable
    one, two = (digest for digest in twins if digest)
    order = [None, one, one, two, None]
    shares = [Share(None, 0, 1), Share(one, 1, 2), Share(two, 3, 1), Share(None, 4, 1)]
    ids = torch.randint(SMALL["vocab_size"], (5, 7), generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), adapters.serving(shares, 7):
        out = model(input_ids=ids, output_hidden_states=True, use_cache=False)
    found = [*out.hidden_states, out.logits]
    for row, digest in enumerate(order):
        with torch.no_grad():
            alone = twins[digest](input_ids=ids[row : row + 1], output_hidden_states=True, use_cache=False)
        expected = [*alone.hidden_states, alone.logits]
        assert max(differences([layer[row : row + 1] for layer in found], expected)) < EXACT


@pytest.mark.parametrize("name", sorted(EXCLUSIVE))
def test_a_shared_experts_linear_modules_alone_do_mix(name: str, tmp_path: Path) -> None:
    """Without the experts' own parameters an adapter of these families is plain, flattened rows or not."""
    case = BY_NAME[name]
    model = case.build()
    edits = [edit for edit in case.edits(model) if ".experts." not in edit.module]
    adapters = adapters_of(model)
    stored, _, tensors = tinker_adapter(case, tmp_path, edits=edits)
    assert adapters.attach(stored).mixable
    merged = case.build()
    merge(merged, edits, tensors)
    ids = torch.cat([TOKENS, TOKENS.flip(1), TOKENS.roll(3, 1)])
    with torch.no_grad(), adapters.serving([Share(None, 0, 1), Share(stored.digest, 1, 2)], ids.shape[1]):
        found = model(input_ids=ids, output_hidden_states=True).hidden_states
        for row, twin in enumerate((case.build(), merged, merged)):
            expected = twin(input_ids=ids[row : row + 1], output_hidden_states=True).hidden_states
            assert max(differences([layer[row : row + 1] for layer in found], list(expected))) < EXACT


KINDS: dict[str, dict[str, Any]] = {
    "dora": {"target_modules": ["q_proj", "down_proj", "lm_head"], "use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "layers.1.mlp.down_proj", "norm"]},
    "rslora": {"target_modules": ["q_proj", "up_proj"], "use_rslora": True},
    "everything": {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("kind", ["rslora", "dora"])
def test_memory_that_is_counted_is_all_that_is_held(kind: str, tmp_path: Path) -> None:
    case = BY_NAME["llama"]
    stored = peft_adapter(case.build(), Skeleton.of(case.config(), name=case.name), tmp_path, **KINDS[kind])
    adapters = adapters_of(case.build())
    attached = adapters.attach(stored)
    pairs = [pair for site in adapters._bank._sites.values() for pair in site.pairs.values()]
    storages = [part.untyped_storage() for pair in pairs for part in (pair.a, pair.b, pair.gain) if part is not None]
    held = {storage.data_ptr(): storage.nbytes() for storage in storages}
    assert sum(held.values()) == attached.memory_bytes == stored.float32_bytes


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma3"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_equal_peft(family: str, kind: str, tmp_path: Path) -> None:
    case = BY_NAME[family]
    skeleton = Skeleton.of(case.config(), name=case.name)
    stored = peft_adapter(case.build(), skeleton, tmp_path, **KINDS[kind])
    expected = states_of(load_with_peft(case.build(), stored.folder))
    model = case.build()
    plain, before = states_of(model), shape_of(model)
    adapters = adapters_of(model)
    # Beside another, which must not be seen.
    other, _, _ = tinker_adapter(case, tmp_path / "other", seed=5)
    adapters.attach(other)
    attached = adapters.attach(stored)
    assert attached.mixable == (kind in ("rslora", "dora"))
    found = serve(model, adapters, stored.digest)
    assert max(differences(found, plain)) > 0.02
    assert max(differences(found, expected)) < EXACT
    assert all(torch.equal(a, b) for a, b in zip(states_of(model), plain, strict=True))
    if not attached.mixable:
        with (
            pytest.raises(ValueError, match="alone"),
            adapters.serving([Share(None, 0, 1), Share(stored.digest, 1, 1)], 5),
        ):
            pass
    for digest in (stored.digest, other.digest):
        adapters.detach(digest)
    assert shape_of(model) == before
    assert not hasattr(model, "peft_config")
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss"])
def test_experts_in_part_after_and_before_experts_whole(name: str, tmp_path: Path) -> None:
    """Adapters of different parameters of one module, which PEFT does not hold at once and whose wrappers nest."""
    case = BY_NAME[name]
    model = case.build()
    edits = case.edits(model)
    down = [edit for edit in edits if edit.module.endswith("w2")]
    up = [edit for edit in edits if edit.module.endswith(("w1", "w3"))]
    adapters = adapters_of(model)
    for round_ in range(2):
        for number, some in enumerate((up, down, edits)):
            stored, _, tensors = tinker_adapter(case, tmp_path / f"{round_}-{number}", edits=some, seed=number + 1)
            adapters.attach(stored)
            merged = case.build()
            merge(merged, some, tensors)
            assert max(differences(serve(model, adapters, stored.digest), states_of(merged))) < EXACT
            if round_:
                adapters.detach(stored.digest)


@pytest.mark.parametrize("name", ["llama", "gpt-oss", "deepseek-v3"])
def test_a_failure_inside_leaves_the_base(name: str, tmp_path: Path) -> None:
    case = BY_NAME[name]
    model = case.build()
    adapters = adapters_of(model)
    stored, _, _ = tinker_adapter(case, tmp_path)
    adapters.attach(stored)
    under, plain, before = serve(model, adapters, stored.digest), states_of(model), shape_of(model)
    for place in ("model.layers.1.mlp", "model.layers.0.self_attn", "model.norm"):
        handle = model.get_submodule(place).register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            serve(model, adapters, stored.digest)
        handle.remove()
        assert all(torch.equal(a, b) for a, b in zip(states_of(model), plain, strict=True))
        assert shape_of(model) == before
        again = serve(model, adapters, stored.digest)
        assert all(torch.equal(a, b) for a, b in zip(again, under, strict=True))


class Gathered(nn.Module):
    """A mixture of two experts that are linear modules: each sees the tokens that were sent to it."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.experts = nn.ModuleList([inner, nn.Linear(inner.in_features, inner.out_features, bias=False)])

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        flat = states.reshape(-1, states.shape[-1])
        chosen = flat[:, 0] > 0
        out = torch.zeros(flat.shape[0], self.experts[0].out_features)  # type: ignore[arg-type]
        for number, expert in enumerate(self.experts):
            here = chosen == bool(number)
            out[here] = expert(flat[here])
        return out.reshape(*states.shape[:-1], -1)


def test_modules_that_see_gathered_tokens_do_not_mix(tmp_path: Path) -> None:
    case = BY_NAME["llama"]
    stored, _, _ = tinker_adapter(case, tmp_path)
    model = case.build()
    block = model.model.layers[0].mlp
    block.down_proj = Gathered(block.down_proj)
    renamed = replace(
        stored,
        targets=tuple(
            replace(target, name=target.name.replace("0.mlp.down_proj", "0.mlp.down_proj.experts.0"))
            for target in stored.targets
        ),
    )
    adapters = adapters_of(model)
    assert not adapters.attach(renamed).mixable
    assert max(differences(serve(model, adapters, renamed.digest), states_of(model))) > 0.02
    with pytest.raises(RowsNotApart), adapters.serving([Share(None, 0, 1), Share(renamed.digest, 1, 1)], 12):
        model(input_ids=torch.cat([TOKENS, TOKENS]))


def test_memory_that_runs_out_while_attaching(tmp_path: Path) -> None:
    """Nothing of the adapter stays, and it attaches another time."""
    case = BY_NAME["llama"]
    stored, _, _ = tinker_adapter(case, tmp_path)
    model = case.build()
    adapters = adapters_of(model)

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    before = shape_of(model)
    handle = model.model.norm.register_forward_hook(full)
    with pytest.raises(torch.OutOfMemoryError):
        adapters.attach(stored)
    handle.remove()
    assert stored.digest not in adapters
    assert shape_of(model) == before
    assert adapters.attach(stored).mixable


def test_gpt2_mixes(tmp_path: Path) -> None:
    """Weights held as [in, out]."""
    config = hf.GPT2Config(vocab_size=48, n_positions=64, n_embd=16, n_layer=2, n_head=4, initializer_range=0.15)
    case = Case("gpt2", lambda: config, lambda model: [])
    skeleton = Skeleton.of(config, name="gpt2")
    stored = peft_adapter(case.build(), skeleton, tmp_path, target_modules=["c_attn", "c_proj"])
    model = case.build()
    adapters = adapters_of(model)
    assert adapters.attach(stored).mixable
    expected = states_of(load_with_peft(case.build(), stored.folder))
    assert max(differences(serve(model, adapters, stored.digest), expected)) < EXACT


def tensors_alive() -> int:
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_memory_goes_with_the_adapter(tmp_path: Path) -> None:
    """No tensor of a detached adapter is left anywhere."""
    for name, kind in (("llama", None), ("gpt-oss", None), ("llama", KINDS["dora"]), ("llama", KINDS["everything"])):
        case = BY_NAME[name]
        model = case.build()
        folder = tmp_path / f"{name}-{kind and sorted(kind)}"
        if kind is None:
            stored, _, _ = tinker_adapter(case, folder)
        else:
            stored = peft_adapter(case.build(), Skeleton.of(case.config(), name=name), folder, **kind)
        adapters = adapters_of(model)
        gc.collect()
        before = tensors_alive()
        adapters.attach(stored)
        serve(model, adapters, stored.digest)
        adapters.detach(stored.digest)
        gc.collect()
        assert tensors_alive() <= before


# --- refused ----------------------------------------------------------------------------------------------


@pytest.fixture
def llama(tmp_path: Path) -> StoredAdapter:
    stored, _, _ = tinker_adapter(BY_NAME["llama"], tmp_path / "llama")
    return stored


def refuse(model: Any, stored: StoredAdapter, kind: type[errors.AdapterInvalid]) -> errors.AdapterInvalid:
    before = shape_of(model)
    adapters = adapters_of(model)
    with pytest.raises(kind) as caught:
        adapters.attach(stored)
    assert shape_of(model) == before
    assert stored.digest not in adapters
    assert adapters.memory_bytes == 0
    return caught.value


def test_a_base_without_the_modules(llama: StoredAdapter) -> None:
    error = refuse(BY_NAME["gpt-oss"].build(), llama, errors.AdapterTensorsUnmatched)
    assert error.extra["names"][0] == "model.layers.0.mlp.down_proj"
    assert error.extra["count"] == 6


def test_a_base_of_another_width(llama: StoredAdapter) -> None:
    other = hf.AutoModelForCausalLM.from_config(hf.LlamaConfig(**{**SMALL, "intermediate_size": 32}))
    error = refuse(other, llama, errors.AdapterBaseMismatch)
    assert "mlp" in error.extra["names"][0]


def test_files_that_are_not_the_digests(llama: StoredAdapter) -> None:
    refuse(BY_NAME["llama"].build(), StoredAdapter.open(llama.folder, "0" * 64), errors.AdapterIncomplete)
    path = llama.folder / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    refuse(BY_NAME["llama"].build(), llama, errors.AdapterIncomplete)
    path.write_bytes(content[:-4])
    with pytest.raises(errors.AdapterIncomplete):
        StoredAdapter.open(llama.folder, llama.digest)


def test_a_folder_that_was_not_converted(tmp_path: Path) -> None:
    tinker_adapter(BY_NAME["llama"], tmp_path)
    with pytest.raises(errors.AdapterIncomplete, match="not converted"):
        StoredAdapter.open(tmp_path / "tinker", "0" * 64)


def test_experts_on_a_base_without_them(tmp_path: Path) -> None:
    stored, _, _ = tinker_adapter(BY_NAME["qwen3-moe"], tmp_path)
    refuse(BY_NAME["llama"].build(), stored, errors.AdapterTensorsUnmatched)
