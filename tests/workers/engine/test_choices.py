"""Choices scored and answers given: equal to transformers on each text alone, beside other jobs, under adapters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from bathyscope_workers.adapters.skeleton import Skeleton
from bathyscope_workers.models.device import Device
from bathyscope_workers.models.load import load_resident
from bathyscope_workers.models.spec import ModelSpec
from tests.workers.adapters.attaching import load_with_peft, peft_adapter
from tests.workers.engine.test_adapters import run

TOLERANCE = 1e-4

QUESTIONS: list[dict[str, Any]] = [
    {"prompt": "The capital of France is", "choices": [" Paris", " Rome", " the city of Paris."], "answer": 0},
    {"prompt": "What is two plus two? It is ", "choices": ["four", "two", "4"], "answer": 0},  # may share the space
    {"prompt": "deep wat", "choices": ["er", "er, small fish", " 🐟", "🐟🐠"], "answer": 1},  # merges with the prompt
    {"prompt": "fish 🐟", "choices": ["🐟 a\u0301", "\u0301", "\n\n", "  x"], "answer": 3},
    {"prompt": "The capital of France is" * 6, "choices": [" A", " B", " C", " D"], "answer": 2},
]


def reference(model: Any, tokenizer: Any, prompt: str, choice: str) -> tuple[list[float], bool]:
    """Log-probabilities of the tokens that cover a character of the choice, from a plain call on the text alone."""
    encoded = tokenizer(prompt + choice, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    mine = [place for place, (_, end) in enumerate(encoded["offset_mapping"]) if end > len(prompt)]
    with torch.inference_mode():
        logprobs = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), dim=-1)
    shared = ids[: mine[0]] != tokenizer(prompt)["input_ids"]
    return [float(logprobs[place - 1, ids[place]]) for place in mine], shared


def expected_line(model: Any, tokenizer: Any, question: dict[str, Any]) -> dict[str, Any]:
    scores = [reference(model, tokenizer, question["prompt"], choice)[0] for choice in question["choices"]]
    sums = np.array([sum(one) for one in scores])
    means = np.array([np.mean(one) for one in scores])
    picked = int(sums.argmax())
    return {
        "logprobs": sums,
        "logprobs_per_token": means,
        "tokens": [len(one) for one in scores],
        "picked": picked,
        "correct": picked == question["answer"],
        "confidence": float(np.exp(sums[picked]) / np.exp(sums).sum()),
        "picked_per_token": int(means.argmax()),
        "confidence_per_token": float(np.exp(means.max()) / np.exp(means).sum()),
    }


def assert_line(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in ("tokens", "picked", "correct", "picked_per_token"):
        assert found[name] == expected[name], name
    for name in ("logprobs", "logprobs_per_token", "confidence", "confidence_per_token"):
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=TOLERANCE, err_msg=name)


def lines(event: dict[str, Any]) -> list[dict[str, Any]]:
    assert event["ev"] == "done", event
    choices = event["result"]["choices"]
    text = Path(choices["choices_path"]).read_bytes()
    index = np.fromfile(choices["choices_index_path"], "<i8")
    found = [json.loads(line) for line in text.splitlines()]
    assert [json.loads(text[a:b]) for a, b in pairwise(index)] == found
    return found


@pytest.fixture(scope="module")
def tiny(tiny_dir: Path) -> ModelSpec:
    return ModelSpec("tiny", str(tiny_dir))


@pytest.fixture(scope="module")
def plain_tiny(tiny_dir: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(tiny_dir).eval(), AutoTokenizer.from_pretrained(tiny_dir)


@pytest.mark.parametrize("budget", [512, 30])
def test_choices_equal_transformers_on_each_text_alone(
    start_engine: Any, tiny: ModelSpec, plain_tiny: tuple[Any, Any], budget: int
) -> None:
    engine = start_engine(batch_tokens=budget)
    engine.run("a", tiny, QUESTIONS, layers=[1, -1], score_choices=True)
    event = engine.finished("a")["a"]
    found = lines(event)
    assert [line["index"] for line in found] == list(range(len(QUESTIONS)))
    for line, question in zip(found, QUESTIONS, strict=True):
        assert_line(line, expected_line(*plain_tiny, question))
    shared = sum(reference(*plain_tiny, one["prompt"], choice)[1] for one in QUESTIONS for choice in one["choices"])
    assert shared > 0
    [scored] = event["result"]["choices"]["scored"]
    assert scored == {
        "answered": len(QUESTIONS),
        "correct": sum(line["correct"] for line in found),
        "confidence": pytest.approx(np.mean([line["confidence"] for line in found])),
        "shared": shared,
    }


def test_states_are_those_of_the_prompts_alone(start_engine: Any, tiny: ModelSpec, max_relative_error: Any) -> None:
    engine = start_engine()
    prompts = [question["prompt"] for question in QUESTIONS]
    for fields in ({"layers": "all"}, {"layers": [2], "pooling": "none"}, {"layers": [0, -1], "pooling": "mean"}):
        name = fields.get("pooling", "last")
        plain = engine.extract(f"plain-{name}", tiny, prompts, **fields)
        asked = engine.extract(f"asked-{name}", tiny, QUESTIONS, score_choices=True, **fields)
        unscored = engine.extract(f"unscored-{name}", tiny, QUESTIONS, **fields)
        for other in (asked, unscored):
            assert torch.equal(plain["token_ids"], other["token_ids"])
            assert torch.equal(plain["offsets"], other["offsets"])
            assert max_relative_error(other["hidden_states"], plain["hidden_states"]) < 1e-5


def test_choices_that_differ_in_their_last_token_cost_one_pass_over_the_prompt(
    start_engine: Any, tiny: ModelSpec
) -> None:
    engine = start_engine()
    engine.run("a", tiny, [QUESTIONS[4]], layers=[-1], score_choices=True)
    [line] = lines(engine.finished("a")["a"])
    batches = [batch for one in engine.log if one["ev"] == "beat" for batch in one.get("batches", [])]
    assert sum(batch[1] for batch in batches) == 1
    assert len(line["logprobs"]) == 4


def test_smollm2(start_engine: Any, smollm2: ModelSpec, smollm2_resident: Any) -> None:
    model, tokenizer = smollm2_resident.model, smollm2_resident.tokenizer
    engine = start_engine()
    engine.run("a", smollm2, QUESTIONS, layers=[15], score_choices=True)
    found = lines(engine.finished("a")["a"])
    for line, question in zip(found, QUESTIONS, strict=True):
        assert_line(line, expected_line(model, tokenizer, question))
    assert found[0]["correct"]


def test_neighbours_keep_their_numbers(
    start_engine: Any, tiny: ModelSpec, max_relative_error: Callable[..., float]
) -> None:
    texts = [f"What is {word}? " + "deep water " * number for number, word in enumerate(["small", "deep", "light"])]
    engine = start_engine()
    alone = engine.extract("alone", tiny, texts, layers=[2, 4])["hidden_states"]
    engine.run("long", tiny, ["The capital of France is Paris. " * 20] * 200, layers=[4])
    engine.run("asked", tiny, QUESTIONS, layers=[1], score_choices=True, owner="one")  # few, to end with others
    engine.run("beside", tiny, texts, layers=[2, 4], owner="two")
    engine.run("words", tiny, [{"prompt": "deep", "answer": "x"}], layers=[1], score_choices=True, owner="three")
    ended = engine.finished("long", "asked", "beside", "words")
    assert any({"asked", "beside"} <= set(event["ids"]) for event in engine.log if event["ev"] == "running")
    from safetensors.torch import load_file

    assert max_relative_error(load_file(ended["beside"]["result"]["path"])["hidden_states"], alone) < 1e-5
    apart = engine.run("apart", tiny, QUESTIONS, layers=[1], score_choices=True) or engine.finished("apart")
    for one, other in zip(lines(ended["asked"]), lines(apart["apart"]), strict=True):
        np.testing.assert_allclose(one["logprobs"], other["logprobs"], rtol=0, atol=TOLERANCE)


PROMPTS = ["The capital of France is", "2 + 2 =", "Once upon a time, there was a small fish that", "Q: How deep?\nA:"]


def greedy(model: Any, tokenizer: Any, prompt: str, bound: int) -> tuple[list[int], float]:
    """What transformers' generate gives for a prompt alone, and the mean log-probability of its tokens."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=bound,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    tokens = out.sequences[0, ids.shape[1] :].tolist()
    each = [
        float(torch.log_softmax(step[0].double(), -1)[token]) for step, token in zip(out.logits, tokens, strict=True)
    ]
    return tokens, float(np.mean(each))


@pytest.mark.parametrize("which", ["tiny", "smollm2"])
def test_answers_equal_transformers_generate(
    start_engine: Any,
    tiny: ModelSpec,
    plain_tiny: tuple[Any, Any],
    smollm2: ModelSpec,
    smollm2_resident: Any,
    which: str,
) -> None:
    spec = tiny if which == "tiny" else smollm2
    model, tokenizer = plain_tiny if which == "tiny" else (smollm2_resident.model, smollm2_resident.tokenizer)
    engine = start_engine()
    expected = [greedy(model, tokenizer, prompt, 12) for prompt in PROMPTS]
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens, _ in expected]
    asked = [
        {"prompt": prompt, "answer": texts[number] if number % 2 else "something else"}
        for number, prompt in enumerate(PROMPTS)
    ]
    engine.run("a", spec, asked, layers=[1], score_choices=True, max_new_tokens=12, match="exact")
    for number, (line, (tokens, mean)) in enumerate(zip(lines(engine.finished("a")["a"]), expected, strict=True)):
        assert line["answer"] == texts[number]
        assert line["tokens"] == [len(tokens)]
        assert line["correct"] is bool(number % 2)
        assert (line["picked"], line["ended"]) == (None, tokens[-1] == model.generation_config.eos_token_id)
        assert line["logprobs_per_token"] == [pytest.approx(mean, abs=TOLERANCE)]
        assert line["confidence"] == pytest.approx(np.exp(mean), abs=TOLERANCE)


@pytest.fixture(scope="module")
def outlying(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    """Wide enough for 4bit on CPU, and with features beyond the outlier threshold of 8bit."""
    folder = tmp_path_factory.mktemp("outlying") / "model"
    shutil.copytree(tiny_dir, folder)
    config = AutoConfig.from_pretrained(tiny_dir)
    config.hidden_size, config.head_dim = 64, 16
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for block in model.model.layers:
        block.input_layernorm.weight.data[::9] = 4.0
    model.save_pretrained(folder)
    return ModelSpec("outlying", str(folder))


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_quantized_model_scores_as_its_own_plain_calls_do(
    start_engine: Any, outlying: ModelSpec, plain_tiny: tuple[Any, Any], quantization: Any
) -> None:
    spec = replace(outlying, quantization=quantization)
    model, tokenizer = load_resident(spec, Device.pick(force_cpu=True)).model, plain_tiny[1]
    engine = start_engine()
    open_prompt = "The capital of France is"
    engine.run(
        "a",
        spec,
        [*QUESTIONS, {"prompt": open_prompt, "answer": "x"}],
        layers=[-1],
        score_choices=True,
        max_new_tokens=6,
    )
    *found, answer = lines(engine.finished("a")["a"])
    for line, question in zip(found, QUESTIONS, strict=True):
        assert_line(line, expected_line(model, tokenizer, question))
    whole = AutoModelForCausalLM.from_pretrained(outlying.source).eval()
    assert not np.allclose(
        found[0]["logprobs"], expected_line(whole, tokenizer, QUESTIONS[0])["logprobs"], atol=10 * TOLERANCE
    )
    tokens, mean = greedy(model, tokenizer, open_prompt, 6)
    assert answer["answer"] == tokenizer.decode(tokens, skip_special_tokens=True)
    assert answer["logprobs_per_token"] == [pytest.approx(mean, abs=TOLERANCE)]


def test_each_variant_of_a_pair(
    start_engine: Any, tiny: ModelSpec, tiny_dir: Path, plain_tiny: tuple[Any, Any], tmp_path: Path
) -> None:
    def fresh() -> Any:
        return AutoModelForCausalLM.from_pretrained(tiny_dir).eval()

    skeleton = Skeleton.read(tiny_dir)
    plain = peft_adapter(fresh(), skeleton, tmp_path / "plain", target_modules=["q_proj", "down_proj", "lm_head"])
    whole = peft_adapter(
        fresh(), skeleton, tmp_path / "whole", target_modules=["v_proj"], modules_to_save=["lm_head"], seed=2
    )
    variants = [None, plain, whole]
    twins = [plain_tiny[0], *(load_with_peft(fresh(), one.folder) for one in (plain, whole))]
    asked = [*QUESTIONS, {"prompt": "deep water, small", "answer": "fish"}]
    engine = start_engine(batch_tokens=100)
    run(engine, "pair", tiny, asked, variants, paired=True, layers=[-1], score_choices=True, max_new_tokens=5)
    event = engine.finished("pair")["pair"]
    found = lines(event)
    assert len(found) == 3 * len(asked)
    assert len(event["result"]["choices"]["scored"]) == 3
    picked: list[list[float]] = []
    for number, model in enumerate(twins):
        mine = found[number * len(asked) : (number + 1) * len(asked)]
        for line, question in zip(mine, QUESTIONS, strict=False):
            assert_line(line, expected_line(model, plain_tiny[1], question))
        own = model if model is twins[0] else model.get_base_model()
        tokens, mean = greedy(own, plain_tiny[1], asked[-1]["prompt"], 5)
        assert mine[-1]["tokens"] == [len(tokens)]
        assert mine[-1]["logprobs_per_token"] == [pytest.approx(mean, abs=TOLERANCE)]
        picked.append(mine[0]["logprobs"])
    assert not np.allclose(picked[0], picked[1], atol=1e-3)
    assert not np.allclose(picked[0], picked[2], atol=1e-3)


def test_padded_prompts_are_answered_as_alone(start_engine: Any, tiny: ModelSpec, plain_tiny: tuple[Any, Any]) -> None:
    prompts = ["deep water " * number + "and light" for number in range(2, 7)]
    engine = start_engine()
    asked = [{"prompt": prompt, "answer": "x"} for prompt in prompts]
    engine.run("a", tiny, asked, layers=[1], score_choices=True, max_new_tokens=9)
    for prompt, line in zip(prompts, lines(engine.finished("a")["a"]), strict=True):
        tokens, mean = greedy(*plain_tiny, prompt, 9)
        assert line["answer"] == plain_tiny[1].decode(tokens, skip_special_tokens=True)
        assert line["logprobs_per_token"] == [pytest.approx(mean, abs=TOLERANCE)]


def test_an_answer_ends_at_a_stop_text_and_is_matched(start_engine: Any, smollm2: ModelSpec) -> None:
    prompt = "The capital of France is"
    engine = start_engine()
    for how, right, correct in (
        ("normalised", "the paris!", True),
        ("exact", "Paris", True),
        ("exact", "paris", False),
        ("normalised", "Lyon", False),
    ):
        asked = [{"prompt": prompt, "answer": right}]
        fields = {"layers": [1], "score_choices": True, "max_new_tokens": 20, "match": how}
        engine.run(f"{how}-{right}", smollm2, asked, stop=[".", ",", "\n"], **fields)
        [line] = lines(engine.finished(f"{how}-{right}")[f"{how}-{right}"])
        assert (line["answer"].strip(), line["ended"], line["correct"]) == ("Paris", True, correct)
        assert line["tokens"][0] < 5


def test_cancelled_in_the_middle_of_an_answer_while_another_job_is_served(start_engine: Any, tiny: ModelSpec) -> None:
    engine = start_engine()
    asked = [{"prompt": f"deep water {number}", "answer": "x"} for number in range(300)]
    engine.run("words", tiny, asked, layers=[1], score_choices=True, max_new_tokens=400)
    while (event := engine.next())["ev"] != "progress" or event["stage"] != "generate":
        assert event["ev"] != "done"
    engine.run("text", tiny, ["The capital of France is Paris."], layers=[1], owner="another")
    assert engine.until("done", "failed")["id"] == "text"
    engine.send(op="cancel", id="words")
    assert engine.finished("words")["words"]["ev"] == "cancelled"
    assert not list((engine._folder / "words").iterdir())
    assert engine.extract("after", tiny, ["a"], layers=[1])["hidden_states"].shape == (1, 1, 32)


def test_memory_that_runs_out_answers_fewer_at_a_time(start_engine: Any, tiny: ModelSpec) -> None:
    asked = [{"prompt": f"deep water {number}", "answer": "x"} for number in range(6)]
    engine = start_engine()
    engine.run("before", tiny, asked, layers=[1], score_choices=True, max_new_tokens=4)
    want = lines(engine.finished("before")["before"])
    resident = engine.engine.residency.peek("tiny:none:float32")

    def fault(_module: Any, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    resident.model.get_input_embeddings().register_forward_pre_hook(fault)
    engine.run("smaller", tiny, asked, layers=[1], score_choices=True, max_new_tokens=4)
    assert [line["answer"] for line in lines(engine.finished("smaller")["smaller"])] == [one["answer"] for one in want]


TWO = ["a", "b"]


@pytest.mark.parametrize(
    ("bad", "fields", "pointer"),
    [
        ("a text", {}, "/inputs/1"),
        ({"prompt": "", "choices": TWO, "answer": 0}, {}, "/inputs/1"),
        ({"prompt": "a", "choices": TWO, "answer": 2}, {}, "/inputs/1/answer"),
        ({"prompt": "a", "choices": TWO, "answer": "a"}, {}, "/inputs/1/answer"),
        ({"prompt": "a", "answer": 1}, {}, "/inputs/1/answer"),
        ({"prompt": "deep " * 60, "choices": ["a", " deep water" * 60], "answer": 0}, {}, "/inputs/1/choices/1"),
        (
            {"prompt": "deep " * 8, "choices": TWO, "answer": 0},
            {"max_length": 4, "truncation": "right"},
            "/inputs/1/choices/0",
        ),
        ({"prompt": "deep " * 160, "answer": "x"}, {"max_new_tokens": 1000}, "/inputs/1"),
    ],
)
def test_bad_questions_are_named(
    start_engine: Any, tiny: ModelSpec, bad: Any, fields: dict[str, Any], pointer: str
) -> None:
    good = {"prompt": "a", "choices": TWO, "answer": 0}
    problem = start_engine().refused("a", tiny, [good, bad], layers=[1], score_choices=True, **fields)
    assert problem["type"] == "/problems/invalid-input"
    assert problem["errors"][0]["pointer"] == pointer


def test_truncation_from_the_left_keeps_the_choice(
    start_engine: Any, tiny: ModelSpec, plain_tiny: tuple[Any, Any]
) -> None:
    question = {"prompt": "The capital of France is", "choices": [" Paris", " four"], "answer": 0}
    engine = start_engine()
    engine.run("a", tiny, [question], layers=[1], score_choices=True, max_length=8, truncation="left")
    [line] = lines(engine.finished("a")["a"])
    model, tokenizer = plain_tiny
    for number, choice in enumerate(question["choices"]):
        ids = tokenizer(f"{question['prompt']}{choice}")["input_ids"][-8:]
        with torch.inference_mode():
            logprobs = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0], dim=-1)
        scored = range(len(ids) - line["tokens"][number], len(ids))
        assert line["logprobs"][number] == pytest.approx(
            sum(float(logprobs[place - 1, ids[place]]) for place in scored), abs=TOLERANCE
        )


def test_a_chat_is_asked_through_its_template(start_engine: Any, tiny: ModelSpec, plain_tiny: tuple[Any, Any]) -> None:
    model, tokenizer = plain_tiny
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "How deep?"}], tokenize=False, add_generation_prompt=True
    )
    engine = start_engine()
    asked = [{"prompt": "How deep?", "choices": ["four", "Paris"], "answer": 1}]
    engine.run("a", tiny, asked, layers=[1], score_choices=True, template="chat")
    [line] = lines(engine.finished("a")["a"])
    assert_line(line, expected_line(model, tokenizer, {**asked[0], "prompt": rendered}))


def test_a_prompt_that_no_template_takes_is_named(start_engine: Any, tiny: ModelSpec) -> None:
    engine = start_engine()
    engine.send(op="load", resident=tiny.to_wire())
    engine.until("loaded")
    engine.engine.residency.peek("tiny:none:float32").__dict__["chat_template"] = "{{ raise_exception('never') }}"
    problem = engine.refused("a", tiny, QUESTIONS[:1], layers=[1], score_choices=True, template="chat")
    assert [error["pointer"] for error in problem["errors"]] == ["/inputs/0"]


def test_a_model_without_a_head_says_so(start_engine: Any, minilm: ModelSpec) -> None:
    problem = start_engine().refused("a", minilm, QUESTIONS, layers=[1], score_choices=True)
    assert problem["errors"][0]["pointer"] == "/score_choices"


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 5.0, "sliding_window": 16}),
        ("Cohere", {"logit_scale": 0.3}),
        ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}),
        ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    ],
)
def test_heads_of_other_architectures(
    tiny_model: Callable[..., ModelSpec], family: str, config: dict[str, Any]
) -> None:
    sizes = {"vocab_size": 120, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    options = {"vocab_size": 120, **config} if family == "GPT2" else {**sizes, **heads, **config}
    spec = tiny_model(family, name=f"head/{family}", **options)
    resident = load_resident(spec, Device.pick(force_cpu=True))
    ids = np.array([[5, 17, 99, 3, 42]])
    with torch.inference_mode():
        want = torch.log_softmax(resident.model(input_ids=torch.from_numpy(ids)).logits[0].float(), -1)
    states: dict[int, torch.Tensor] = {}
    last = resident.facts.num_layers
    resident.forward(
        ids, np.array([5]), [last], lambda layer, found: states.update({layer: found[0].clone()}), resident.style
    )
    tokens = np.array([17, 99, 3, 42])
    found = resident.head.log_probabilities(states[last][:4], np.arange(4), tokens)
    np.testing.assert_allclose(found, [float(want[place, token]) for place, token in enumerate(tokens)], atol=TOLERANCE)
