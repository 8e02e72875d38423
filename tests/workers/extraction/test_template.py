"""Chat templates come from strangers."""

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from bathyscope_workers.extraction.template import ChatRenderer, TemplateFault
from bathyscope_workers.models.resident import Resident

MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "How deep is it? 🌊"},
    {"role": "assistant", "content": "Deep."},
    {"role": "user", "content": "{{ 7 * 7 }}"},
]


@pytest.fixture(scope="module")
def renderer() -> Iterator[ChatRenderer]:
    made = ChatRenderer(seconds=20, memory_bytes=256 * 2**20, max_characters=1_000_000)
    yield made
    made.close()


@pytest.fixture(scope="module")
def hasty() -> Iterator[ChatRenderer]:
    made = ChatRenderer(seconds=1.5, memory_bytes=256 * 2**20)
    yield made
    made.close()


def render(renderer: ChatRenderer, template: str, messages: list[dict[str, Any]] | None = None) -> str:
    return renderer.render(
        template, messages or MESSAGES, special_tokens={"bos_token": "<s>"}, add_generation_prompt=True
    )


@pytest.mark.parametrize("prompt", [True, False])
def test_as_transformers_renders_it(renderer: ChatRenderer, smollm2_resident: Resident, prompt: bool) -> None:
    tokenizer = smollm2_resident.tokenizer
    assert smollm2_resident.chat_template is not None
    got = renderer.render(
        smollm2_resident.chat_template,
        MESSAGES,
        special_tokens=tokenizer.special_tokens_map,
        add_generation_prompt=prompt,
    )
    assert got == tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=prompt)


def test_what_templates_use(renderer: ChatRenderer) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
        "{{ m | tojson }}{% endfor %}"
        "{% set n = namespace(x=1) %}{% set n.x = 2 %}{{ n.x }}{{ strftime_now('%Y') | length }}"
    )
    assert render(renderer, template).startswith('<s>{"role": "user", "content": "How deep is it? 🌊"}')
    assert render(renderer, template).endswith("24")


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for i in range(10**9) %}x{% endfor %}", "range"),
        ("{{ ''.__class__.__mro__ }}", "unsafe|undefined|refused"),
        ("{{ 'a' * 10**10 }}", "memory"),
        ("{{ ('a' * 10**7) * 5 }}", "characters"),
        ("{% if %}", "refused"),
    ],
)
def test_what_is_refused(renderer: ChatRenderer, template: str, why: str) -> None:
    with pytest.raises(TemplateFault, match=why):
        render(renderer, template)
    assert render(renderer, "fine") == "fine"


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a %}{% endfor %}{% endfor %}",
        "{{ 9 ** (9 ** 9) }}",
        "{% for a in range(99999) %}{{ range(99999) | sum }}{% endfor %}",
    ],
)
def test_what_never_ends(hasty: ChatRenderer, template: str) -> None:
    assert render(hasty, "warm") == "warm"
    started = time.monotonic()
    with pytest.raises(TemplateFault, match=r"did not finish|memory"):
        render(hasty, template)
    assert time.monotonic() - started < 10
    assert render(hasty, "fine") == "fine"


def test_a_child_that_was_killed_is_replaced(renderer: ChatRenderer) -> None:
    assert render(renderer, "one") == "one"
    assert renderer._child is not None
    os.kill(renderer._child.pid, signal.SIGKILL)
    assert render(renderer, "two") == "two"


def test_long_conversations_pass(renderer: ChatRenderer) -> None:
    long = [{"role": "user", "content": "x" * 900_000}]
    assert len(render(renderer, "{{ messages[0].content }}", long)) == 900_000
