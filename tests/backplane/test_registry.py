"""The operator's list of models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bathyscope.errors import ModelUnknown, SetupError
from bathyscope_backplane.registry import ModelEntry, ModelFacts, ModelRegistry, append_model, facts_of_config
from bathyscope_backplane.settings import Settings, load_settings


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.delenv("BATHYSCOPE_CONFIG", raising=False)
    return load_settings(data_dir=tmp_path)


def test_the_packaged_model_is_offered_with_its_facts(settings: Settings) -> None:
    entry = ModelRegistry.load(settings).get("smollm2")
    assert entry.facts == ModelFacts(
        architecture="LlamaForCausalLM", num_layers=30, hidden_size=576, vocab_size=49152, max_length=8192
    )
    assert ModelRegistry.load(settings.model_copy(update={"packaged_model": False})).names() == []


def test_file_and_environment(settings: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"n_layer": 2, "n_embd": 8, "architectures": ["GPT2LMHeadModel"]}))
    settings.models_path.write_text(
        '[[models]]\nname = "org/a"\nsource = "hf://org/a@main"\nquantizations = ["4bit"]\n'
    )
    registry = ModelRegistry.load(settings.model_copy(update={"models": f"b={folder}"}))
    assert registry.names() == ["b", "org/a", "smollm2"]
    hub = registry.get("org/a")
    assert (hub.source, hub.revision, hub.kind) == ("hf://org/a", "main", "hub")
    facts = registry.get("b").facts
    assert facts is not None
    assert (facts.num_layers, facts.hidden_size) == (2, 8)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models = 3", "no ..models"),
        ("[[models]]\nname = 'a b'\nsource = 'x'", "name"),
        ("[[models]]\nname = 'a'", "source"),
        ("[[models]]\nname = 'a'\nsource = 'x'\nquantization = ['4bit']", "quantization"),
        ("[[models]]\nname = 'a'\nsource = 'hf://o/a@x'\nrevision = 'y'", "one revision"),
        ("[[models]]\nname = 'a'\nsource = '/a'\nrevision = 'y'", "only a hub"),
        ("[[model]]\nname = 'a'", "unknown table"),
        ("[[", "cannot be read"),
    ],
)
def test_a_faulty_list_is_named_in_one_sentence(settings: Settings, text: str, said: str) -> None:
    settings.models_path.write_text(text)
    with pytest.raises(SetupError, match=said) as caught:
        ModelRegistry.load(settings)
    assert "\n" not in str(caught.value)


def test_a_hub_id_is_usable_only_if_allowed(settings: Settings) -> None:
    with pytest.raises(ModelUnknown):
        ModelRegistry.load(settings).get("Qwen/Qwen3-8B")
    open_registry = ModelRegistry.load(settings.model_copy(update={"allow_any_hub_model": True}))
    assert open_registry.get("Qwen/Qwen3-8B").source == "hf://Qwen/Qwen3-8B"
    for name in (
        "../etc",
        "a/../b",
        "/etc/passwd",
        "a/b/c",
        "org/..",
        "a:b/c",
        "",
        "org/name\n",
        "org\n/name",
        "örg/name",
    ):
        with pytest.raises(ModelUnknown):
            open_registry.get(name)


def test_what_is_appended_is_read_again(tmp_path: Path, settings: Settings) -> None:
    quoted = ModelEntry(name='we"ird\\x', source="/models/ö 🐟", llm_int8_threshold=0.0, quantizations=["8bit"])
    known = ModelEntry(name="b", source="hf://o/b", facts=ModelFacts(num_layers=2, hidden_size=4))
    path = settings.models_path
    append_model(path, quoted.model_copy(update={"facts": ModelFacts(num_layers=1, hidden_size=2)}))
    append_model(path, ModelEntry(name="b", source="hf://o/old"))
    append_model(path, known)
    registry = ModelRegistry.load(settings)
    assert registry.get("b") == known
    assert registry.get(quoted.name).source == quoted.source
    assert registry.get(quoted.name).llm_int8_threshold == 0.0


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_hidden_layers": 3, "hidden_size": 5, "max_position_embeddings": 9}, (3, 5, 9)),
        ({"text_config": {"num_hidden_layers": 3, "hidden_size": 5}}, (3, 5, None)),
        ({"num_hidden_layers": "3", "hidden_size": 5}, None),
        ({}, None),
    ],
)
def test_facts_of_a_config(config: dict[str, object], expected: tuple[int, int, int | None] | None) -> None:
    facts = facts_of_config(config)
    assert (facts and (facts.num_layers, facts.hidden_size, facts.max_length)) == expected
