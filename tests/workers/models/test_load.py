"""What a load measures, tests and refuses."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bathyscope import errors
from bathyscope_workers.models import selftest
from bathyscope_workers.models.device import Device
from bathyscope_workers.models.forward import Style
from bathyscope_workers.models.load import estimate_bytes, load_resident
from bathyscope_workers.models.resident import Resident
from bathyscope_workers.models.source import LoadFault, folder_digest, locate
from bathyscope_workers.models.spec import ModelSpec

CPU = Device.pick(force_cpu=True)


def fault(spec: ModelSpec) -> LoadFault:
    with pytest.raises(LoadFault) as raised:
        load_resident(spec, CPU)
    return raised.value


def test_smollm2(smollm2_resident: Resident) -> None:
    facts = smollm2_resident.facts
    assert (facts.num_layers, facts.hidden_size, facts.vocab_size, facts.max_length) == (30, 576, 49152, 8192)
    assert (facts.architecture, facts.compute_dtype, facts.fraction_quantized) == ("LlamaForCausalLM", "float32", 0.0)
    assert facts.memory_bytes == pytest.approx(538_060_288, rel=0.001)
    assert facts.has_chat_template
    assert facts.self_test["passed"]
    assert facts.self_test["max_relative_error"] <= 1e-5
    assert facts.self_test["against_unquantized"] is None
    assert json.loads(json.dumps(facts.to_wire())) == facts.to_wire()
    assert smollm2_resident.key == "HuggingFaceTB/SmolLM2-135M-Instruct:none:float32"


def test_an_encoder_is_run_with_a_mask(minilm_resident: Resident) -> None:
    assert not minilm_resident.facts.causal
    assert minilm_resident.facts.max_length == 512
    assert str(minilm_resident.style) == "hooks, mask"
    assert minilm_resident.facts.self_test["passed"]


def test_the_self_test_sees_a_missing_mask(minilm_resident: Resident) -> None:
    forward = minilm_resident.forward
    rows = selftest.token_rows(lambda text: minilm_resident.tokenizer(text)["input_ids"], 30522, 512)
    expected = selftest.reference(minilm_resident.model, rows, forward.device, lambda: None)
    wrong = selftest.compare(selftest.run(forward, rows, Style("hooks", mask=False, alone=False)), expected)
    assert wrong.max_relative_error > 0.01
    assert not selftest.passes(wrong, compute_dtype="float32", quantized=False)
    right = selftest.compare(selftest.run(forward, rows, Style("hooks", mask=True, alone=False)), expected)
    assert selftest.passes(right, compute_dtype="float32", quantized=False)


def test_a_model_that_hooks_misread_falls_back(
    tiny_model: Callable[..., ModelSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An architecture whose hidden_states are not what its blocks give."""
    from transformers.models.llama.modeling_llama import LlamaModel

    plain = LlamaModel.forward

    def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = plain(self, *args, **kwargs)
        if output.hidden_states is not None:
            output.hidden_states = tuple(state * 2 for state in output.hidden_states)
        return output

    monkeypatch.setattr(LlamaModel, "forward", scaled)
    spec = tiny_model(
        "Llama", vocab_size=99, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    resident = load_resident(spec, CPU)
    assert str(resident.style) == "outputs, mask"
    assert resident.facts.self_test["passed"]


@pytest.mark.parametrize(("quantization", "most"), [("8bit", 0.2), ("4bit", 0.45)])
def test_quantized(smollm2: ModelSpec, smollm2_resident: Resident, quantization: Any, most: float) -> None:
    resident = load_resident(replace(smollm2, quantization=quantization), CPU)
    facts = resident.facts
    assert 0.75 < facts.fraction_quantized < 0.85  # all but the embeddings
    assert facts.memory_bytes < smollm2_resident.facts.memory_bytes / 2
    against = facts.self_test["against_unquantized"]
    assert facts.self_test["passed"]
    assert len(against["layers"]) == 31
    assert resident.self_test.against_unquantized is not None
    assert 0.001 < resident.self_test.against_unquantized.median < most
    # bitsandbytes' outlier columns depend on the batch, NF4 does not.
    assert resident.style.alone == (quantization == "8bit")
    assert not resident.batched_style.alone
    if quantization == "8bit":
        assert facts.llm_int8_threshold == 6.0
        assert facts.self_test["max_relative_error"] == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_says_what_it_costs(minilm: ModelSpec, tmp_path: Path, dtype: Any) -> None:
    spec = replace(minilm, compute_dtype=dtype, data_dir=str(tmp_path))
    alone = load_resident(spec, CPU, room_bytes=0)
    assert alone.facts.self_test["against_float32"] is None
    resident = load_resident(spec, CPU)
    against = resident.facts.self_test["against_float32"]
    assert resident.facts.self_test["against_unquantized"] is None
    exact = load_resident(replace(spec, compute_dtype="float32"), CPU)
    assert exact.facts.self_test["against_float32"] is None
    # Of the same texts, by the models themselves.
    rows = selftest.token_rows(lambda text: exact.tokenizer(text)["input_ids"], exact.facts.vocab_size, None)
    own, expected = (
        selftest.last_tokens(selftest.reference(one.model, rows, torch.device("cpu"), lambda: None))
        for one in (resident, exact)
    )
    errors = [
        float(((a[:, layer] - b[:, layer]).norm(dim=-1) / b[:, layer].norm(dim=-1)).max())
        for layer in range(exact.facts.num_layers + 1)
        for a, b in [(torch.cat(own), torch.cat(expected))]
    ]
    assert [one["relative_error"] for one in against["layers"]] == pytest.approx(errors, rel=1e-3)
    assert 1e-5 < against["max_relative_error"] < (0.2 if dtype == "bfloat16" else 0.02)


def test_the_unquantized_states_are_kept(smollm2: ModelSpec, smollm2_resident: Resident) -> None:
    rows = selftest.token_rows(lambda text: smollm2_resident.tokenizer(text)["input_ids"], 49152, None)
    kept = selftest.ReferenceStates(
        smollm2.data_dir,
        name=smollm2.name,
        revision=smollm2_resident.facts.revision,
        compute_dtype="float32",
        rows=rows,
    ).load()
    assert kept is not None
    expected = selftest.reference(smollm2_resident.model, rows, torch.device("cpu"), lambda: None)
    assert selftest.compare(kept, selftest.last_tokens(expected)).max_relative_error <= 1e-5


def test_an_unquantized_model_that_does_not_fit_is_not_compared(minilm: ModelSpec, tmp_path: Path) -> None:
    spec = replace(minilm, quantization="8bit", llm_int8_threshold=0.0, data_dir=str(tmp_path))
    assert load_resident(spec, CPU, room_bytes=0).facts.self_test["against_unquantized"] is None
    compared = load_resident(spec, CPU)
    assert compared.facts.self_test["against_unquantized"]["max_relative_error"] > 0
    assert not compared.style.alone


def test_estimates_are_near(smollm2: ModelSpec, smollm2_resident: Resident) -> None:
    folder = locate(smollm2).folder
    measured = smollm2_resident.facts.memory_bytes
    assert estimate_bytes(folder, smollm2.resolved("cpu")) == pytest.approx(measured, rel=0.02)
    halved = estimate_bytes(folder, replace(smollm2, compute_dtype="bfloat16"))
    assert halved == pytest.approx(measured / 2, rel=0.02)


def test_the_registry_bounds_the_length(tiny_llama: ModelSpec) -> None:
    assert load_resident(tiny_llama, CPU).facts.max_length == 256
    assert load_resident(replace(tiny_llama, max_length=10), CPU).facts.max_length == 10


def test_other_weights_are_another_revision(tiny_llama: ModelSpec, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    before = folder_digest(Path(tiny_llama.source))
    copy = tmp_path / "copy"
    shutil.copytree(tiny_llama.source, copy)
    assert folder_digest(copy) == before
    tensors = load_file(copy / "model.safetensors")
    save_file({name: tensor + 0.001 for name, tensor in tensors.items()}, copy / "model.safetensors", {"format": "pt"})
    assert folder_digest(copy) != before


def test_pickled_weights_are_refused(tiny_llama: ModelSpec, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_llama.source, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    found = fault(replace(tiny_llama, source=str(folder)))
    assert isinstance(found.problem, errors.ModelLoadFailed)
    assert "pickle" in str(found)
    assert not found.retry


def test_what_is_not_there(tiny_llama: ModelSpec, tmp_path: Path) -> None:
    assert "there is no folder" in str(fault(replace(tiny_llama, source=str(tmp_path / "none"))))
    assert "there is no file" in str(fault(replace(tiny_llama, source=str(tmp_path / "none.gguf"))))
    assert "no config.json" in str(fault(replace(tiny_llama, source=str(tmp_path))))


def test_code_of_a_repository_is_never_run(tiny_llama: ModelSpec, tmp_path: Path) -> None:
    folder = tmp_path / "custom"
    shutil.copytree(tiny_llama.source, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "made-up", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert isinstance(fault(replace(tiny_llama, source=str(folder))).problem, errors.ModelLoadFailed)
    assert not (tmp_path / "ran").exists()


def test_the_hub_out_of_reach(tiny_llama: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    found = fault(replace(tiny_llama, source="hf://nobody/nothing"))
    assert found.retry
    assert "nobody/nothing could not be fetched" in str(found)
    assert "give a folder as source" in str(found)
