"""Texts that begin alike compute their beginning once, and have the states that transformers gives each alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bathyscope_workers.adapters.stored import StoredAdapter
from bathyscope_workers.models.past import TreeCache
from bathyscope_workers.models.source import locate
from bathyscope_workers.models.spec import ModelSpec
from tests.workers.adapters.attaching import converted_for, merged_into, variant_of
from tests.workers.engine.test_adapters import run
from tests.workers.engine.test_model_engine import broken_forward  # noqa: F401
from tests.workers.models.test_architectures import DECODERS

Ids = Callable[[int, int], list[int]]
Plain = Callable[[Any, list[int]], torch.Tensor]
Error = Callable[[torch.Tensor, torch.Tensor], float]
BOUND = 1e-5

WAYS: dict[str, tuple[dict[str, Any], Callable[[torch.Tensor], torch.Tensor]]] = {
    "last": ({"pooling": "last"}, lambda states: states[-1:]),
    "first": ({"pooling": "first"}, lambda states: states[:1]),
    "mean": ({"pooling": "mean"}, lambda states: states.mean(0, keepdim=True)),
    "max": ({"pooling": "max"}, lambda states: states.amax(0, keepdim=True)),
    "none": ({"pooling": "none"}, lambda states: states),
    "span": ({"pooling": "mean", "positions": {"span": [30, -1]}}, lambda states: states[30:-1].mean(0, keepdim=True)),
    "tokens": ({"pooling": "none", "positions": {"tokens": [0, -1, 45]}}, lambda states: states[[0, -1, 45]]),
}


def headed(random_ids: Ids, count: int = 12) -> list[list[int]]:
    """Two headers that begin alike, questions behind them, some that go on from another, and texts of their own."""
    trunk = random_ids(1000, 40)
    headers = [trunk + random_ids(1001 + kind, 30) for kind in range(2)]
    rows = [headers[number % 2] + random_ids(number, 2 + number % 7) for number in range(count)]
    rows += [rows[3] + random_ids(50 + number, 5) for number in range(3)]
    return [*rows, rows[0], headers[0], *(random_ids(60 + number, 50 + number) for number in range(4))]


def given(rows: list[list[int]]) -> list[dict[str, list[int]]]:
    return [{"token_ids": row} for row in rows]


def result_of(engine: Any, name: str) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    event = engine.finished(name)[name]
    assert event["ev"] == "done", event
    return load_file(event["result"]["path"]), event["result"]["tokens"]


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "GPT2"])
@pytest.mark.parametrize("budget", [100, 2000])
def test_every_pooling_equals_transformers(
    start_engine: Any,
    tiny_model: Callable[..., ModelSpec],
    random_ids: Ids,
    plain_states: Plain,
    max_relative_error: Error,
    family: str,
    budget: int,
) -> None:
    spec = tiny_model(family, **DECODERS[family])
    model = AutoModelForCausalLM.from_pretrained(spec.source, dtype=torch.float32)
    rows = headed(random_ids)
    expected = [plain_states(model, row) for row in rows]
    engine = start_engine(batch_tokens=budget)
    for name, (fields, pool) in WAYS.items():
        layers = [4, 0, 2] if name != "max" else [2]
        engine.run(name, spec, given(rows), layers=layers, **fields)
        tensors, tokens = result_of(engine, name)
        want = torch.cat([pool(states[:, layers]) for states in expected])
        assert max_relative_error(tensors["hidden_states"].reshape(want.shape), want) <= BOUND, name
        assert tokens["computed"] < 0.6 * tokens["total"], name
    assert not len(engine.engine.residency.peek(f"{spec.name}:none:float32").kept), "freed with the last job"


def test_jobs_of_one_owner_share_and_those_of_others_do_not(
    start_engine: Any, tiny_llama: ModelSpec, random_ids: Ids, max_relative_error: Error
) -> None:
    engine = start_engine(batch_tokens=110)
    header = random_ids(1, 100)
    texts = {f"{owner}{number}": [*header, number, 5] for owner in "ab" for number in range(6)}
    engine.send(op="load", resident=tiny_llama.to_wire())
    engine.until("loaded")
    # One that holds the loop until the others have come.
    engine.run("first", tiny_llama, given([random_ids(seed, 90) for seed in range(200)]), layers=[4], owner="c")
    for name, row in texts.items():
        engine.run(name, tiny_llama, given([row]), layers="all", pooling="mean", owner=name[0])
    ended = engine.finished("first", *texts)
    computed = {name: ended[name]["result"]["tokens"]["computed"] for name in texts}
    for owner in "ab":
        mine = sorted(count for name, count in computed.items() if name[0] == owner)
        assert mine[-1] == 102, "each owner computes the beginning"
        assert mine[0] <= 2, "and its other jobs do not"
    for name, row in texts.items():
        alone = engine.extract(f"alone-{name}", tiny_llama, given([row]), layers="all", pooling="mean", solo=True)
        got = load_file(ended[name]["result"]["path"])["hidden_states"]
        assert max_relative_error(got, alone["hidden_states"]) <= BOUND


@pytest.mark.parametrize("reason", ["window", "solo", "rope"])
def test_where_it_is_not_used(
    start_engine: Any,
    tiny_model: Callable[..., ModelSpec],
    random_ids: Ids,
    plain_states: Plain,
    max_relative_error: Error,
    reason: str,
) -> None:
    llama = DECODERS["Llama"]
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    spec = {
        # Wider than the texts of the self-test, which could not tell.
        "window": lambda: tiny_model("Mistral", **{**DECODERS["Mistral"], "sliding_window": 68}),
        "solo": lambda: tiny_model("Llama", **llama),
        "rope": lambda: tiny_model("Llama", **llama, rope_parameters=rope),
    }[reason]()
    rows = [list(row) for row in dict.fromkeys(map(tuple, headed(random_ids)))]
    engine = start_engine(batch_tokens=300)
    engine.run("a", spec, given(rows), layers="all", pooling="none", solo=reason == "solo")
    tensors, tokens = result_of(engine, "a")
    assert tokens["computed"] >= tokens["total"]
    model = AutoModelForCausalLM.from_pretrained(spec.source, dtype=torch.float32)
    want = torch.cat([plain_states(model, row) for row in rows])
    assert max_relative_error(tensors["hidden_states"], want) <= BOUND


def test_adapters_have_beginnings_of_their_own(
    start_engine: Any,
    tiny_llama: ModelSpec,
    random_ids: Ids,
    plain_states: Plain,
    max_relative_error: Error,
    tmp_path: Path,
) -> None:
    converted = converted_for(Path(tiny_llama.source), tmp_path / "a")
    adapters: list[StoredAdapter] = [variant_of(converted, tmp_path / f"v{seed}", seed=seed) for seed in range(2)]
    variants: list[StoredAdapter | None] = [None, *adapters]
    rows = headed(random_ids)
    engine = start_engine(batch_tokens=100)
    run(engine, "pair", tiny_llama, given(rows), variants, pooling="mean", paired=True)
    run(engine, "one", tiny_llama, given(rows), [adapters[1]], pooling="last")
    ended = engine.finished("pair", "one")
    pair, one = (load_file(ended[name]["result"]["path"])["hidden_states"] for name in ("pair", "one"))
    for number, variant in enumerate(variants):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama.source, dtype=torch.float32).eval()
        model = model if variant is None else merged_into(model, variant)
        expected = [plain_states(model, row) for row in rows]
        assert max_relative_error(pair[number], torch.stack([states.mean(0) for states in expected])) <= BOUND
    assert max_relative_error(one, torch.stack([states[-1] for states in expected])) <= BOUND
    for name in ("pair", "one"):
        tokens = ended[name]["result"]["tokens"]
        count = len(variants) if name == "pair" else 1
        assert tokens["computed"] < 0.6 * count * tokens["total"]


def test_memory_runs_out_in_a_tree(
    start_engine: Any,
    tiny_llama: ModelSpec,
    random_ids: Ids,
    broken_forward: Any,  # noqa: F811
    max_relative_error: Error,
) -> None:
    rows = headed(random_ids, count=40)
    engine = start_engine(batch_tokens=200)
    want = engine.extract("before", tiny_llama, given(rows), layers="all", pooling="mean")["hidden_states"]
    failed: list[int] = []

    def fault(ids: torch.Tensor) -> None:
        if ids.numel() > 90:
            failed.append(ids.numel())
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    resident = broken_forward(engine, fault)
    engine.run("halved", tiny_llama, given(rows), layers="all", pooling="mean")
    tensors, tokens = result_of(engine, "halved")
    assert failed
    assert max_relative_error(tensors["hidden_states"], want) <= BOUND
    assert resident.token_budget < 200
    assert tokens["computed"] < tokens["total"]


def test_memory_that_holds_one_text_and_nothing_besides(
    start_engine: Any,
    tiny_llama: ModelSpec,
    random_ids: Ids,
    broken_forward: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = headed(random_ids)
    engine = start_engine(batch_tokens=60)
    want = engine.extract("before", tiny_llama, given(rows), layers=[4])["hidden_states"]
    resident = broken_forward(engine, lambda ids: None)
    kept = TreeCache.kept

    def fault(*arguments: Any) -> Any:
        kept(*arguments)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(TreeCache, "kept", fault)
    got = engine.extract("after", tiny_llama, given(rows), layers=[4])["hidden_states"]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert not len(resident.kept)


def test_small_jobs_of_several_owners_share_a_batch_and_no_beginning(
    start_engine: Any, tiny_llama: ModelSpec, random_ids: Ids, max_relative_error: Error
) -> None:
    engine = start_engine()
    stem = random_ids(1, 60)
    rows = [[*stem, number, number] for number in range(4)]
    engine.send(op="load", resident=tiny_llama.to_wire())
    engine.until("loaded")
    engine.run("first", tiny_llama, given([random_ids(seed, 90) for seed in range(300)]), layers=[4], owner="c")
    for owner in "ab":
        engine.run(owner, tiny_llama, given(rows), layers=[4, 1], pooling="mean", owner=owner)
    ended = engine.finished("first", "a", "b")
    assert any(set(event["ids"]) == {"a", "b"} for event in engine.log if event["ev"] == "running")
    assert [ended[owner]["result"]["tokens"]["computed"] for owner in "ab"] == [68, 68]
    alone = engine.extract("alone", tiny_llama, given(rows), layers=[4, 1], pooling="mean", solo=True)
    for owner in "ab":
        got = load_file(ended[owner]["result"]["path"])["hidden_states"]
        assert max_relative_error(got, alone["hidden_states"]) <= BOUND


def test_one_job_is_cancelled_among_others(start_engine: Any, tiny_llama: ModelSpec, random_ids: Ids) -> None:
    header = random_ids(1, 100)
    engine = start_engine(batch_tokens=60)
    rows = [header + random_ids(seed, 8) for seed in range(4000)]
    engine.run("gone", tiny_llama, given(rows), layers=[4], owner="a")
    while engine.next()["ev"] != "running":
        pass
    engine.send(op="cancel", id="gone")
    assert engine.finished("gone")["gone"]["ev"] == "cancelled"
    assert engine.extract("next", tiny_llama, given(rows[:9]), layers=[4])["hidden_states"].shape == (9, 1, 32)
    assert not len(engine.engine.residency.peek("tiny/llama:none:float32").kept)


def test_a_real_model(start_engine: Any, smollm2: ModelSpec, plain_states: Plain, max_relative_error: Error) -> None:
    """States of the questions and scores of their choices, behind a header."""
    from transformers import AutoTokenizer

    header = "".join(
        f"Question: what is the capital of {country}?\nAnswer: {city}\n\n"
        for country, city in (("France", "Paris"), ("Peru", "Lima"), ("Kenya", "Nairobi"), ("Japan", "Tokyo"))
    )
    asked = {
        "Norway": [" Oslo", " Bergen on the sea"],
        "Chile": [" Santiago de Chile", " Lima"],
        "Cuba": [" Havana", " Rome"],
    }
    inputs = [
        {"prompt": f"{header}Question: what is the capital of {country}?\nAnswer:", "choices": choices, "answer": 0}
        for country, choices in asked.items()
    ]
    engine = start_engine()
    engine.run("a", smollm2, inputs, layers=[0, 15, 30], pooling="mean", score_choices=True)
    event = engine.finished("a")["a"]
    got = load_file(event["result"]["path"])["hidden_states"]
    model = AutoModelForCausalLM.from_pretrained(locate(smollm2).folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(locate(smollm2).folder)
    want = torch.stack(
        [plain_states(model, tokenizer(one["prompt"])["input_ids"]).mean(0)[[0, 15, 30]] for one in inputs]
    )
    assert max_relative_error(got, want) <= BOUND
    assert event["result"]["tokens"]["computed"] < 0.6 * event["result"]["tokens"]["total"]
    import json

    for line, one in zip(
        Path(event["result"]["choices"]["choices_path"]).read_text().splitlines(), inputs, strict=True
    ):
        for value, choice in zip(json.loads(line)["logprobs"], one["choices"], strict=True):
            ids = tokenizer(one["prompt"] + choice)["input_ids"]
            start = len(tokenizer(one["prompt"])["input_ids"])
            with torch.inference_mode():
                logprobs = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), dim=-1)
            expected = sum(float(logprobs[at - 1, ids[at]]) for at in range(start, len(ids)))
            np.testing.assert_allclose(value, expected, rtol=0, atol=1e-4)
