"""Inputs to token ids, as the model's own tokenizer does it."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from bathyscope import errors
from bathyscope_workers.extraction.spec import ExtractionSpec
from bathyscope_workers.extraction.template import ChatRenderer
from bathyscope_workers.extraction.tokens import InputReader, TextEncoder
from bathyscope_workers.models.resident import Resident

TEXTS = ["Hello", "The capital of France is", "🌊 tiefe See — 深海\n\ttabs", "a" * 500, "  spaces  ", "<|im_end|>"]


@pytest.fixture(scope="module")
def renderer() -> Iterator[ChatRenderer]:
    made = ChatRenderer(seconds=20)
    yield made
    made.close()


def read(resident: Resident, renderer: ChatRenderer, inputs: list[Any], **spec: Any) -> list[list[int]]:
    reader = InputReader(resident, ExtractionSpec.from_wire({"layers": [1], **spec}), renderer)
    rows = reader.read(0, inputs)
    reader.raise_faults()
    return [row.tolist() for row in rows]


def faults(resident: Resident, renderer: ChatRenderer, inputs: list[Any], **spec: Any) -> dict[str, str]:
    with pytest.raises(errors.InvalidInput) as raised:
        read(resident, renderer, inputs, **spec)
    return {error["pointer"]: error["detail"] for error in raised.value.errors}


def test_strings(smollm2_resident: Resident, minilm_resident: Resident, renderer: ChatRenderer) -> None:
    for resident in (smollm2_resident, minilm_resident):
        want = [list(resident.tokenizer(text)["input_ids"]) for text in TEXTS]
        assert read(resident, renderer, TEXTS) == want


def test_longer_than_the_checkpoint_says(minilm_resident: Resident, renderer: ChatRenderer) -> None:
    """all-MiniLM's tokenizer.json cuts at 128 tokens; the model takes 512."""
    assert len(read(minilm_resident, renderer, ["deep " * 300])[0]) == 302


def test_messages_and_chat(smollm2_resident: Resident, renderer: ChatRenderer) -> None:
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    tokenizer = smollm2_resident.tokenizer

    def want(messages: list[dict[str, str]], prompt: bool) -> list[int]:
        found = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
        return [int(one) for one in found]

    got = read(smollm2_resident, renderer, [{"messages": conversation}, "Hi"], add_generation_prompt=False)
    assert got == [want(conversation, False), list(tokenizer("Hi")["input_ids"])]
    chat = read(smollm2_resident, renderer, [{"messages": conversation}, "Hi"], template="chat")
    assert chat == [want(conversation, True), want([{"role": "user", "content": "Hi"}], True)]


def test_token_ids_are_taken_as_they_are(smollm2_resident: Resident, renderer: ChatRenderer) -> None:
    assert read(smollm2_resident, renderer, [{"token_ids": [5, 1, 1, 49151]}]) == [[5, 1, 1, 49151]]


def test_no_chat_template(minilm_resident: Resident, renderer: ChatRenderer) -> None:
    messages = {"messages": [{"role": "user", "content": "Hi"}]}
    for inputs, spec in (([messages], {}), (["Hi"], {"template": "chat"})):
        with pytest.raises(errors.InvalidRequest, match="has no chat template"):
            read(minilm_resident, renderer, inputs, **spec)


def test_each_bad_input_is_named(smollm2_resident: Resident, renderer: ChatRenderer) -> None:
    inputs = [
        "fine",
        "",
        {"token_ids": []},
        {"token_ids": [49152]},
        {"token_ids": [-1]},
        {"token_ids": ["1"]},
        {"messages": []},
        {"messages": [{"content": "no role"}]},
        17,
        {"prompt": 3},
        {"messages": [{"role": "user", "content": ["not", "text"]}]},
    ]
    found = faults(smollm2_resident, renderer, inputs)
    assert list(found) == [f"/inputs/{index}" for index in range(1, 11)]
    assert "gives no tokens" in found["/inputs/1"]
    assert "gives no tokens" in found["/inputs/2"]
    assert "49152 is not in the vocabulary, whose ids are 0 to 49151" in found["/inputs/3"]


def test_too_long(smollm2_resident: Resident, renderer: ChatRenderer) -> None:
    found = faults(smollm2_resident, renderer, ["a", "one two three four five"], max_length=3)
    assert list(found) == ["/inputs/1"]
    assert "has 5 tokens, the limit is 3" in found["/inputs/1"]
    assert "truncation" in found["/inputs/1"]
    own = faults(smollm2_resident, renderer, [{"token_ids": [9] * 8193}], max_length=100_000)
    assert "the limit is 8192" in own["/inputs/0"]


def test_many_bad_inputs_are_not_all_listed(smollm2_resident: Resident, renderer: ChatRenderer) -> None:
    assert len(faults(smollm2_resident, renderer, [""] * 500)) == 20


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_is_the_tokenizers_own(
    smollm2_resident: Resident, minilm_resident: Resident, renderer: ChatRenderer, side: str
) -> None:
    text = "The quick brown fox jumps over the lazy dog"
    for resident in (smollm2_resident, minilm_resident):
        got = read(resident, renderer, [text], max_length=6, truncation=side)[0]
        full = list(resident.tokenizer(text)["input_ids"])
        prefix, suffix = full[:1], full[-1:]
        if resident is smollm2_resident:
            assert got == (full[:6] if side == "right" else full[-6:])
        else:  # [CLS] and [SEP] stay
            assert got == prefix + (full[1:5] if side == "right" else full[-5:-1]) + suffix
    ids = list(range(10, 30))
    got = read(minilm_resident, renderer, [{"token_ids": ids}], max_length=6, truncation=side)[0]
    assert got == (ids[:6] if side == "right" else ids[-6:])


@pytest.fixture(scope="module")
def with_bos() -> PreTrainedTokenizerFast:
    """A tokenizer that puts <s> before each text and </s> after it, as Llama's and T5's do."""
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, "deep": 3, "sea": 4, "a": 5}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_special_tokens_come_once(with_bos: PreTrainedTokenizerFast) -> None:
    encoder = TextEncoder(with_bos)
    assert (encoder.prefix, encoder.suffix) == ([0], [1])
    texts = ["deep sea", "<s>deep sea", "deep sea</s>", "<s> deep sea </s>", "", "<s>", "deep <s> sea"]
    got = [row.tolist() for row in encoder.encode(texts, special=True)]
    assert got == [[0, 3, 4, 1]] * 4 + [[0, 1], [0, 1], [0, 3, 0, 4, 1]]


def test_a_chat_template_that_brings_its_own_bos(
    smollm2_resident: Resident, renderer: ChatRenderer, with_bos: PreTrainedTokenizerFast
) -> None:
    with_bos.chat_template = "{{ bos_token }} {{ messages[0].content }}"
    resident = Resident(
        smollm2_resident.spec,
        model=None,
        forward=smollm2_resident.forward,
        tokenizer=with_bos,
        style=smollm2_resident.style,
        batched_style=smollm2_resident.style,
        self_test=smollm2_resident.self_test,
        facts=replace(smollm2_resident.facts, vocab_size=6),
    )
    assert read(resident, renderer, ["deep sea"], template="chat") == [[0, 3, 4]]
