"""`adapter_config.json` from strangers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file

from bathyscope import errors
from bathyscope_workers.adapters.config import AdapterConfig, parse_config, read_config
from bathyscope_workers.adapters.patterns import PatternFault, Patterns
from bathyscope_workers.adapters.source import SourceAdapter

GOOD: dict[str, Any] = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}


def test_what_peft_writes_is_read(tmp_path: Path) -> None:
    LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], task_type="CAUSAL_LM", lora_dropout=0.1).save_pretrained(
        tmp_path
    )
    config, notes = read_config(tmp_path / "adapter_config.json")
    assert (config.r, config.lora_alpha, config.target_modules) == (8, 16, ["q_proj"])
    assert any("lora_dropout" in note and "task_type" in note for note in notes)


def test_what_would_import_a_class_is_dropped() -> None:
    said = {"base_model_class": "Evil", "parent_library": "os"}
    config, notes = parse_config({**GOOD, "auto_mapping": said})
    assert "Evil" not in repr(config)
    assert notes == ["config: dropped auto_mapping, without effect on what the adapter computes"]


UNSUPPORTED: dict[str, dict[str, Any]] = {
    "no peft_type": {"peft_type": None},
    "another method": {"peft_type": "IA3"},
    "a method that is no text": {"peft_type": ["LORA"]},
    "replicated layers": {"layer_replication": [[0, 4], [2, 5]]},
    "activated LoRA": {"alora_invocation_tokens": [1, 2]},
    "trainable tokens": {"trainable_token_indices": [5]},
    "PiSSA": {"init_lora_weights": "pissa_niter_4"},
    "OLoRA": {"init_lora_weights": "olora"},
    "an unknown init": {"init_lora_weights": {"a": 1}},
    "LoftQ": {"loftq_config": {"loftq_bits": 4}},
    "biases of B": {"lora_bias": True},
    "tied adapters": {"ensure_weight_tying": True},
    "megatron": {"megatron_config": {"a": 1}},
    "remote code": {"auto_map": {"AutoModel": "evil--model"}},
    "a field of next year": {"hyper_rank": 3},
    "an expression that never ends": {"alpha_pattern": {"(a+)+b": 3}},
    "a look-ahead": {"rank_pattern": {"(?=x)q_proj": 3}},
    "keys that are long together": {"rank_pattern": {"q" * 500 + str(index): 3 for index in range(1000)}},
    "a hundred wildcards": {"alpha_pattern": {f".*{index}": 3 for index in range(100)}},
}

INVALID: dict[str, dict[str, Any]] = {
    "rank of a million": {"r": 1_000_000},
    "rank zero": {"r": 0},
    "negative rank": {"r": -8},
    "rank as a text": {"r": "8"},
    "rank as a fraction": {"r": 8.5},
    "rank true": {"r": True},
    "rank null": {"r": None},
    "alpha zero": {"lora_alpha": 0},
    "negative alpha": {"lora_alpha": -1},
    "alpha of 1e300": {"lora_alpha": 1e300},
    "alpha beyond floats": {"lora_alpha": 10**400},
    "alpha as a text": {"lora_alpha": "16"},
    "bias of a new kind": {"bias": "some"},
    "targets as numbers": {"target_modules": [1]},
    "targets by the thousand": {"target_modules": ["a"] * 30_000},
    "a target of 10,000 characters": {"target_modules": ["a" * 10_000]},
    "an expression of 100,000 characters": {"target_modules": "a" * 100_000},
    "a pattern's rank zero": {"rank_pattern": {"q_proj": 0}},
    "a pattern that is a list": {"rank_pattern": ["q_proj"]},
    "patterns by the thousand": {"rank_pattern": {f"m{index}": 4 for index in range(5000)}},
    "modules to save as a text": {"modules_to_save": "lm_head"},
    "DoRA perhaps": {"use_dora": "yes"},
    "layers as texts": {"layers_to_transform": ["0"]},
    "a base that is a list": {"base_model_name_or_path": ["a"]},
}


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_unsupported(what: str) -> None:
    with pytest.raises(errors.AdapterUnsupported) as fault:
        parse_config({**GOOD, **UNSUPPORTED[what]})
    assert fault.value.names


@pytest.mark.parametrize("what", INVALID)
def test_invalid(what: str) -> None:
    with pytest.raises(errors.AdapterConfigInvalid) as fault:
        parse_config({**GOOD, **INVALID[what]})
    assert fault.value.names == list(INVALID[what])
    assert next(iter(INVALID[what])) in fault.value.detail
    assert len(fault.value.detail) <= 500


@pytest.mark.parametrize("field", ["r", "lora_alpha"])
def test_rank_and_alpha_are_not_guessed_beside_a_config(field: str) -> None:
    with pytest.raises(errors.AdapterConfigInvalid, match=field):
        parse_config({name: value for name, value in GOOD.items() if name != field})


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"null",
        b'"LORA"',
        b"{",
        b"\xff\xfe{}",
        b'{"r": NaN}',
        b'{"lora_alpha": Infinity}',
        b'{"r": 8, "r": 9}',
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"a":' * 20 + b"1" + b"}" * 20,
        b'{"r": ' + b"9" * 5000 + b"}",
        b" " * (5 << 20),
    ],
    ids=lambda raw: repr(raw[:12]),
)
def test_files_that_are_no_config(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_bytes(raw)
    with pytest.raises(errors.AdapterConfigInvalid, match=r"adapter_config\.json"):
        read_config(path)


def write_pair(folder: Path, ranks: list[int]) -> Path:
    tensors = {}
    for index, rank in enumerate(ranks):
        tensors[f"base_model.model.model.layers.{index}.self_attn.q_proj.lora_A.weight"] = torch.ones(rank, 16)
        tensors[f"base_model.model.model.layers.{index}.self_attn.q_proj.lora_B.weight"] = torch.ones(16, rank)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_a_missing_config_is_built(tmp_path: Path) -> None:
    source = SourceAdapter.open(write_pair(tmp_path, [4, 4]), base_model="Qwen/Qwen3-8B")
    assert (source.config.r, source.config.lora_alpha) == (4, 32)
    assert source.base_model == "Qwen/Qwen3-8B"
    assert "rank 4 is the tensors', alpha 32 is what Tinker uses" in source.notes[0]


def test_a_missing_config_that_the_tensors_do_not_tell(tmp_path: Path) -> None:
    with pytest.raises(errors.AdapterConfigMissing, match="2 different ranks"):
        SourceAdapter.open(write_pair(tmp_path, [4, 8]))


def test_a_rank_beyond_the_bound_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(errors.AdapterTensorsInvalid, match="rank 2000"):
        SourceAdapter.open(write_pair(tmp_path, [2000]))


@pytest.mark.parametrize(
    ("said", "asked", "base", "noted"),
    [
        (None, "Qwen/Qwen3-8B", "Qwen/Qwen3-8B", "names no base model"),
        ("Qwen/Qwen3-8B:peft:262144", "qwen/qwen3-8b", "qwen/qwen3-8b", None),
        ("Qwen/Qwen3-8B-Base", "Qwen/Qwen3-8B", "Qwen/Qwen3-8B", "names the base model Qwen/Qwen3-8B-Base"),
        ("Qwen/Qwen3-8B", None, "Qwen/Qwen3-8B", None),
        (None, None, None, None),
    ],
)
def test_base_model(said: str | None, asked: str | None, base: str | None, noted: str | None, tmp_path: Path) -> None:
    folder = write_pair(tmp_path, [8])
    (folder / "adapter_config.json").write_text(json.dumps({**GOOD, "base_model_name_or_path": said}))
    source = SourceAdapter.open(folder, base_model=asked)
    assert source.base_model == base
    assert [noted in note for note in source.notes] == ([True] if noted else []) if noted else not source.notes


PIECES = st.lists(
    st.sampled_from(["q_proj", "layers", "0", "12", "x", ".", r"\.", ".*", r"\d+", r"\d", "[0-9]+", "self_attn", ".+"]),
    min_size=1,
    max_size=6,
).map("".join)
PATHS = st.lists(
    st.sampled_from(["q_proj", "layers", "0", "12", "x", "self_attn", "model"]), min_size=1, max_size=5
).map(".".join)


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, min_size=1, max_size=3, unique=True), PATHS)
def test_patterns_match_as_in_peft(keys: list[str], path: str) -> None:
    values = {key: index + 1 for index, key in enumerate(keys)}
    for key in keys:
        try:
            re.compile(key)
        except re.error:
            assume(False)
    try:
        patterns = Patterns(values)
    except PatternFault:
        assume(False)
    assert patterns.get([path], 0) == values.get(get_pattern_key(keys, path), 0)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2000) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    [*AdapterConfig.model_fields, "init_lora_weights", "auto_mapping", "loftq_config", "velora_config", "x"]
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(FIELDS, VALUES, max_size=5), st.booleans())
def test_any_config_is_read_or_refused(fields: dict[str, Any], good: bool) -> None:
    try:
        config, _ = parse_config({**GOOD, **fields} if good else fields)
    except errors.AdapterInvalid as fault:
        json.dumps(fault.problem())
        return
    assert 1 <= config.r <= 1024
    assert 0 < config.lora_alpha <= 65536
