"""Files of experiments, read without a service."""

# ruff: noqa: E501

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bathyscope.errors import InvalidRequest, MalformedBody
from bathyscope.types import ExperimentConfig
from bathyscope_backplane.settings import Limits
from bathyscope_service.bodies import content_of
from bathyscope_service.experiments.adapter import adapter_of
from bathyscope_service.experiments.reading import MAX_DEPTH, from_yaml, refuse_unknown

LLAMA = b"""\
experiment: {name: "tinker-finetuned-probe", seed: 42}
model: {name: "meta-llama/Llama-3.1-8B", quantization: "8bit", tinker_lora_path: "weights/mmlu_finetuned/peft_adapter"}
tinker: {enabled: true, checkpoint_path: "tinker://abc123/sampler_weights/final", download_weights: true, output_dir: "weights/mmlu_finetuned"}
extraction: {layers: [8, 16, 24, 31], cache_dir: "cache/tinker_model"}
"""


def config(text: bytes) -> ExperimentConfig:
    content = from_yaml(text)
    refuse_unknown(content)
    return ExperimentConfig.model_validate(content)


def test_a_file_as_people_have_it() -> None:
    found = config(LLAMA)
    assert (found.experiment.name, found.experiment.seed) == ("tinker-finetuned-probe", 42)
    assert found.dataset.name == "capitals"
    assert found.probe.estimator == "logistic"
    source, notices = adapter_of(found)
    assert source == "tinker://abc123/sampler_weights/final"
    assert [notice.split(" ")[0] for notice in notices] == [
        "model.tinker_lora_path",
        "tinker.output_dir",
        "extraction.cache_dir",
    ]


@pytest.mark.parametrize(
    ("text", "pointer", "says"),
    [
        (b"model: {name: a}\nextractoin: {}", "/extractoin", "'extraction'"),
        (b"model: {nam: a}", "/model/nam", "'name'"),
        (b"model: {name: a}\nprobe: {bootstap: 5}", "/probe/bootstap", "'evaluation.bootstrap'"),
        (b"model: {name: a}\nlayers: [1]", "/layers", "'extraction.layers'"),
        (b"model: {name: a}\nexperiment: {zzzz: 1}", "/experiment/zzzz", "all are name, seed"),
        (b"[1, 2]", "", "mapping"),
    ],
)
def test_an_unknown_key_names_the_nearest(text: bytes, pointer: str, says: str) -> None:
    with pytest.raises(InvalidRequest) as found:
        refuse_unknown(from_yaml(text))
    [error] = found.value.errors or []
    assert error["pointer"] == pointer
    assert says in error["detail"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"a: &x 1\nb: *x", "anchors and aliases"),
        (b"a: !!python/object:os.system x", "tags"),
        (b"a: 1\na: 2", "there twice"),
        (b"a: 1\n---\nb: 2", "more than one document"),
        (b"[" * (MAX_DEPTH + 2) + b"]" * (MAX_DEPTH + 2), "nested"),
        (b"{[1]: 2}", "a key is a word"),
        (b"a: [1, 2", "line 1"),
        (b"a: \xff", "UTF-8"),
        (b"a: 1e999", "too large"),
        (b"a: \x00", "not YAML"),
        (b'a: 1\nb: "\\ud800"', "line 2, column 4: an escape .* surrogate pair"),
        (b'"\\udfff": 1', "line 1, column 1: .* surrogate pair"),
        (b'a: 1\nb: "\\U00110000"', "line 2, column 7: an escape names no character"),
        (b'"\\UFFFFFFFF": 1', "line 1, column 4: an escape names no character"),
    ],
)
def test_what_is_refused_says_why(text: bytes, says: str) -> None:
    with pytest.raises(MalformedBody, match=says):
        from_yaml(text)


def test_two_escapes_may_be_one_character_as_in_json() -> None:
    text = b'{"\\ud83d\\ude00": "\\ud83d\\ude00"}'
    assert from_yaml(text) == json.loads(text) == {"\U0001f600": "\U0001f600"}


def test_words_stay_words() -> None:
    assert from_yaml(b"{a: no, b: 2024-01-01, c: 0x10, d: true, e: ~, f: '1', g: 1.5e3, h: True}") == {
        "a": "no",
        "b": "2024-01-01",
        "c": "0x10",
        "d": True,
        "e": None,
        "f": "1",
        "g": 1500.0,
        "h": "True",
    }


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**15), 10**15)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(blacklist_categories=["Cs", "Cc"]), max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abcxyz_", min_size=1), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text("abcxyz_", min_size=1), VALUES, max_size=5))
def test_json_says_the_same_as_yaml(content: dict[str, Any]) -> None:
    text = json.dumps(content, ensure_ascii=False).encode()
    try:
        assert from_yaml(text) == content_of(text, Limits()) == content
    except MalformedBody as error:
        assert "nested" in str(error["detail"])  # noqa: PT017


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=200)
    | st.text("{}[]:,&*!|>%@-'\"# ab1\n\t", max_size=80).map(str.encode)
    | st.lists(st.sampled_from(["\\u", "\\U", "\\x", "d8", "dc", "00", "11", "ff", "a"]), max_size=12).map(
        lambda escapes: f'"{"".join(escapes)}"'.encode()
    )
)
def test_anything_else_is_a_malformed_body_or_an_unknown_key(text: bytes) -> None:
    try:
        content = from_yaml(text)
    except MalformedBody:
        return
    json.dumps(content, ensure_ascii=False).encode()
    if not (isinstance(content, dict) and not content):
        with pytest.raises(InvalidRequest):
            refuse_unknown(content)


def test_two_adapters_are_refused() -> None:
    text = b"model: {name: a, adapter: ad_1}\ntinker: {checkpoint_path: 'tinker://r/weights/1'}"
    with pytest.raises(InvalidRequest) as found:
        adapter_of(config(text))
    assert [one["pointer"] for one in found.value.errors or []] == ["/tinker/checkpoint_path"]


def test_a_path_alone_is_refused_with_the_remedy() -> None:
    with pytest.raises(InvalidRequest) as found:
        adapter_of(config(b"model: {name: a, tinker_lora_path: weights/x}"))
    [error] = found.value.errors or []
    assert (error["pointer"], "checkpoint_path" in error["detail"]) == ("/model/tinker_lora_path", True)


def test_tinker_can_be_turned_off() -> None:
    source, notices = adapter_of(
        config(
            b"model: {name: a, tinker_lora_path: w}\ntinker: {enabled: false, checkpoint_path: 'tinker://r/weights/1'}"
        )
    )
    assert source is None
    assert len(notices) == 2
