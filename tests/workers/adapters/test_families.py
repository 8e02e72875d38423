"""Adapters of every family: what PEFT applies after conversion is what merging the weights exactly gives."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from bathyscope_workers.adapters.conversion import Converted, convert
from bathyscope_workers.adapters.skeleton import Skeleton
from bathyscope_workers.adapters.source import SourceAdapter
from bathyscope_workers.models.device import Device
from bathyscope_workers.models.load import load_resident
from bathyscope_workers.models.spec import ModelSpec
from tests.workers.adapters.tinker_layout import (
    CASES,
    Case,
    differences,
    merge,
    states_of,
    tinker_tensors,
    write_tinker,
)


def skeleton_of(case: Case) -> Skeleton:
    return Skeleton.of(case.config(), name=case.name, auto_class=case.auto_class)


def load_with_peft(model: Any, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(model, folder).eval()


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param  # type: ignore[no-any-return]


def converted(case: Case, folder: Path) -> Converted:
    return convert(SourceAdapter.open(folder), skeleton_of(case))


def test_converted_equals_the_exact_merge(case: Case, tmp_path: Path) -> None:
    model, merged = case.build(), case.build()
    edits = case.edits(model)
    tensors = tinker_tensors(model, edits)
    folder = write_tinker(tmp_path / "tinker", tensors)
    merge(merged, edits, tensors)
    expected, plain = states_of(merged), states_of(model)

    result = converted(case, folder)
    assert result.read == result.applied == len(tensors)
    result.save(tmp_path / "peft")
    embeddings = model.get_input_embeddings().weight.clone()
    got = states_of(load_with_peft(model, tmp_path / "peft"))

    # The adapter matters to every layer but the embeddings, which no adapter here touches.
    effect = differences(plain, expected)
    assert effect[0] == 0
    assert min(effect[1:]) > 0.02
    assert max(differences(got, expected)) < 1e-5
    assert torch.equal(model.get_input_embeddings().weight, embeddings)


def test_a_raw_load_is_wrong(case: Case, tmp_path: Path) -> None:
    """Why the conversion exists: PEFT loads Tinker's folder, at most warns, and gives other numbers."""
    model, merged = case.build(), case.build()
    edits = case.edits(model)
    tensors = tinker_tensors(model, edits)
    folder = write_tinker(tmp_path / "tinker", tensors)
    merge(merged, edits, tensors)
    wrong = differences(states_of(load_with_peft(model, folder)), states_of(merged))
    assert wrong[-1] > 0.1
    if case.raw_drops_only_the_head:
        assert max(wrong[:-1]) < 1e-5
    else:
        assert min(wrong[1:]) > 0.1


def test_a_raw_load_is_right_without_the_head(tmp_path: Path) -> None:
    """Where the names happen to be PEFT's own. The conversion gives the same."""
    case = next(case for case in CASES if case.name == "qwen3")
    model, merged, again = case.build(), case.build(), case.build()
    edits = [edit for edit in case.edits(model) if edit.module != "model.unembed_tokens"]
    tensors = tinker_tensors(model, edits)
    folder = write_tinker(tmp_path / "tinker", tensors)
    merge(merged, edits, tensors)
    expected = states_of(merged)
    assert max(differences(states_of(load_with_peft(model, folder)), expected)) < 1e-5
    converted(case, folder).save(tmp_path / "peft")
    assert max(differences(states_of(load_with_peft(again, tmp_path / "peft")), expected)) < 1e-5


def test_a_part_of_a_fused_matrix_alone(tmp_path: Path) -> None:
    """Rows that no tensor is for stay the base's."""
    kept = ("in_proj_k", "w3", "w2", "shared_expert.up_proj")
    case = next(case for case in CASES if case.name == "qwen3.5-moe")
    model, merged = case.build(), case.build()
    edits = [edit for edit in case.edits(model) if edit.module.endswith(kept)]
    tensors = tinker_tensors(model, edits)
    folder = write_tinker(tmp_path / "tinker", tensors)
    merge(merged, edits, tensors)
    converted(case, folder).save(tmp_path / "peft")
    got = states_of(load_with_peft(model, tmp_path / "peft"))
    assert max(differences(got, states_of(merged))) < 1e-5


@pytest.mark.parametrize("name", ["llama", "qwen3.5", "qwen3.5-vision", "deepseek-v3"])
def test_other_wrappings_of_the_text_model(name: str, tmp_path: Path) -> None:
    """Names as on the other class of a family (`language_model.`), and shortened by one `model.`, mean the same."""
    case = next(case for case in CASES if case.name == name)
    model = case.build()
    tensors = tinker_tensors(model, case.edits(model))
    one = converted(case, write_tinker(tmp_path / "one", tensors))
    for index, wrapping in enumerate(("model.language_model.", "language_model.model.", "")):
        renamed = {
            key.replace("base_model.model.model.", f"base_model.model.{wrapping}"): tensors[key] for key in tensors
        }
        assert converted(case, write_tinker(tmp_path / f"{index}", renamed)).digest == one.digest


def test_what_is_reported(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "qwen3.5-tied")
    model = case.build()
    folder = write_tinker(tmp_path / "tinker", tinker_tensors(model, case.edits(model)))
    source = SourceAdapter.open(folder, base_model="Qwen/Qwen3.5-4B")
    result = convert(source, skeleton_of(case))
    assert source.layout == "tinker"
    assert result.peft_config["base_model_name_or_path"] == "Qwen/Qwen3.5-4B"
    assert result.peft_config["rank_pattern"] == {"in_proj_qkv": 12}
    assert result.peft_config["alpha_pattern"] == {"in_proj_qkv": 96}
    assert "model.layers.0.linear_attn.in_proj_qkv" in result.peft_config["target_modules"]
    notes = " ".join(result.notes)
    assert "Qwen/Qwen3.5-4B is the request's" in notes
    assert "fused in_proj_k, in_proj_q, in_proj_v into in_proj_qkv of 1 layers" in notes
    assert "lm_head; it is tied to the input embeddings, which stay as they are" in notes
    assert result.plain
    by_name = {target.name: target for target in result.targets}
    assert by_name["model.layers.0.linear_attn.in_proj_qkv"].rank == 12
    assert {target.scale for target in result.targets} == {8.0}


def test_digest_depends_on_content_alone(tmp_path: Path) -> None:
    case = CASES[0]
    model = case.build()
    tensors = tinker_tensors(model, case.edits(model))
    digests = {}
    reordered = dict(reversed(tensors.items()))
    named = {name.replace(".weight", ".other.weight"): tensor for name, tensor in tensors.items()}
    first = next(iter(tensors))
    changed = {**tensors, first: tensors[first].clone()}
    changed[first][0, 0] += 1e-3
    for name, variant in (("plain", tensors), ("reordered", reordered), ("named", named), ("changed", changed)):
        digests[name] = converted(case, write_tinker(tmp_path / name, variant)).digest
    digests["alpha"] = converted(case, write_tinker(tmp_path / "alpha", tensors, lora_alpha=16)).digest
    assert digests["plain"] == digests["reordered"] == digests["named"]
    assert len(set(digests.values())) == 3
    # What was saved is itself an adapter, and converts to itself.
    converted(case, tmp_path / "plain").save(tmp_path / "peft")
    assert converted(case, tmp_path / "peft").digest == digests["plain"]


@pytest.mark.parametrize("name", ["gpt-oss", "deepseek-v3", "qwen3.5-moe"])
def test_what_was_saved_converts_to_itself(name: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == name)
    model = case.build()
    result = converted(case, write_tinker(tmp_path / "tinker", tinker_tensors(model, case.edits(model))))
    result.save(tmp_path / "peft")
    assert converted(case, tmp_path / "peft").digest == result.digest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_types_are_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "qwen3.5")
    model = case.build()
    tensors = {name: tensor.to(dtype) for name, tensor in tinker_tensors(model, case.edits(model)).items()}
    result = converted(case, write_tinker(tmp_path / "tinker", tensors))
    result.save(tmp_path / "peft")
    saved = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {dtype}
    assert saved.keys() == set(result.tensors)
    for name, tensor in result.tensors.items():
        assert torch.equal(saved[name], tensor)


def test_the_skeleton_is_of_the_class_that_the_worker_loads(tmp_path: Path) -> None:
    for case in CASES:
        if case.auto_class is not None:
            continue
        model = case.build()
        model.save_pretrained(tmp_path / case.name)
        spec = ModelSpec(case.name, str(tmp_path / case.name), data_dir=str(tmp_path), compute_dtype="float32")
        loaded = load_resident(spec, Device("cpu", 1, 10**9)) if case.name in ("llama-tied", "qwen3-moe") else None
        skeleton = Skeleton.read(tmp_path / case.name)
        assert skeleton.architecture == type(model).__name__
        if loaded is not None:
            assert skeleton.architecture == type(loaded.model).__name__
            expected = {name for name, _ in loaded.model.named_modules() if name}
            assert set(skeleton.modules) == expected
        assert skeleton.tied == (model.lm_head.weight is model.get_input_embeddings().weight)


@pytest.mark.parametrize("head", ["model.lm_head", "lm_head", "unembed_tokens"])
def test_names_of_the_head(head: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "llama-tied")
    model = case.build()
    tensors = tinker_tensors(model, case.edits(model))
    one = converted(case, write_tinker(tmp_path / "one", tensors))
    renamed = {name.replace("model.unembed_tokens", head): tensor for name, tensor in tensors.items()}
    assert converted(case, write_tinker(tmp_path / "two", renamed)).digest == one.digest


def test_a_skeleton_of_quantized_weights_has_the_names_of_the_plain_model() -> None:
    case = next(case for case in CASES if case.name == "gpt-oss")
    config = case.config()
    config.quantization_config = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    assert Skeleton.of(config, name="a").modules == skeleton_of(case).modules


def test_a_skeleton_takes_no_memory_and_no_code(tmp_path: Path) -> None:
    """32 billion parameters, described in a folder that also offers code to run."""
    config = hf.Qwen3Config(num_hidden_layers=64, hidden_size=5120, intermediate_size=25600, num_attention_heads=64)
    said = config.to_dict() | {"auto_map": {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"}}
    (tmp_path / "config.json").write_text(json.dumps(said))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    skeleton = Skeleton.read(tmp_path)
    assert skeleton.architecture == "Qwen3ForCausalLM"
    assert skeleton.modules["model.layers.63.mlp.up_proj"].shape == (25600, 5120)


def test_gpt2(tmp_path: Path) -> None:
    """Weights held as [in, out]."""
    config = hf.GPT2Config(vocab_size=48, n_positions=64, n_embd=16, n_layer=2, n_head=4, initializer_range=0.15)
    case = Case("gpt2", lambda: config, lambda model: [])
    model, again = case.build(), case.build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(model, LoraConfig(target_modules=["c_attn", "c_proj"], init_lora_weights=False)).eval()
    wrapped.save_pretrained(tmp_path / "saved")
    converted(case, tmp_path / "saved").save(tmp_path / "peft")
    got = states_of(load_with_peft(again, tmp_path / "peft"))
    assert max(differences(got, states_of(wrapped))) < 1e-5
