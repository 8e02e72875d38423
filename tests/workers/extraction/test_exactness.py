"""Values equal what a plain `model(..., output_hidden_states=True)` gives for each text alone.

In float32: per token vector, norm of the difference over norm of the reference at most 1e-5.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from bathyscope_workers.models.source import locate
from bathyscope_workers.models.spec import ModelSpec

BOUND = 1e-5
TEXTS = [
    "A",
    "🌊",
    "The capital of France is",
    "Emoji 👩‍🚀🧑🏽‍🔬 and 深海 and ñandú, mixed with words.",
    "def f(x):\n\treturn x ** 2\n" * 6,
    "The lantern fish rises at dusk. " * 25,
]
Plain = Callable[[Any, list[int]], torch.Tensor]
Error = Callable[[torch.Tensor, torch.Tensor], float]


@pytest.fixture(scope="module")
def smollm2_plain(smollm2: ModelSpec) -> Any:
    """Loaded by transformers itself, apart from any engine."""
    return AutoModelForCausalLM.from_pretrained(locate(smollm2).folder, dtype=torch.float32)


def per_input(tensors: dict[str, torch.Tensor]) -> list[tuple[list[int], torch.Tensor]]:
    """Token ids and states of each input of a result with pooling none."""
    bounds = list(zip(tensors["offsets"][:-1].tolist(), tensors["offsets"][1:].tolist(), strict=True))
    return [(tensors["token_ids"][a:b].tolist(), tensors["hidden_states"][a:b]) for a, b in bounds]


def test_every_layer_of_every_token(
    start_engine: Any, smollm2: ModelSpec, smollm2_plain: Any, plain_states: Plain, max_relative_error: Error
) -> None:
    """Two owners' jobs at once, so that their rows share batches."""
    engine = start_engine()
    long = {
        "token_ids": [int(one) for one in torch.randint(10, 49000, (2000,), generator=torch.Generator().manual_seed(1))]
    }
    engine.run("a", smollm2, [*TEXTS, long], layers="all", pooling="none", owner="key_a")
    engine.run("b", smollm2, TEXTS[::-1], layers="every:7", pooling="none", owner="key_b")
    ended = engine.finished("a", "b")
    assert any(len(event["ids"]) == 2 for event in engine.log if event["ev"] == "running"), "no batch was shared"
    from safetensors.torch import load_file

    found = {name: load_file(event["result"]["path"]) for name, event in ended.items()}
    tokenizer = engine.engine.residency.peek(smollm2.key).tokenizer
    worst = 0.0
    expected: list[torch.Tensor] = []
    for index, (ids, states) in enumerate(per_input(found["a"])):
        if index < len(TEXTS):
            assert ids == tokenizer(TEXTS[index])["input_ids"]
        expected.append(plain_states(smollm2_plain, ids))
        worst = max(worst, max_relative_error(states, expected[-1]))
    assert len(expected[-1]) == 2000
    for (_, states), want in zip(per_input(found["b"]), expected[len(TEXTS) - 1 :: -1], strict=True):
        worst = max(worst, max_relative_error(states, want[:, [0, 7, 14, 21, 28, 30]]))
    assert worst <= BOUND


def test_an_encoder(start_engine: Any, minilm: ModelSpec, plain_states: Plain, max_relative_error: Error) -> None:
    model = AutoModel.from_pretrained(minilm.source, dtype=torch.float32)
    texts = [text[:800] for text in TEXTS]
    engine = start_engine()
    tensors = engine.extract("a", minilm, texts, layers="all", pooling="none")
    for ids, states in per_input(tensors):
        assert max_relative_error(states, plain_states(model, ids)) <= BOUND
    mean = engine.extract("b", minilm, texts, layers=[-1], pooling="mean")["hidden_states"]
    want = torch.stack([states[:, -1].double().mean(0) for _, states in per_input(tensors)])
    assert max_relative_error(mean[:, 0], want) <= BOUND


def test_pooling_and_positions(start_engine: Any, smollm2: ModelSpec, max_relative_error: Error) -> None:
    engine = start_engine()
    texts = TEXTS[2:5]
    layers = [12, 0, 30]
    whole = per_input(engine.extract("whole", smollm2, texts, layers=layers, pooling="none"))
    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "last": lambda states: states[-1],
        "first": lambda states: states[0],
        "mean": lambda states: states.double().mean(0),
        "max": lambda states: states.amax(0),
    }
    for span, cut in (((0, 0), slice(None)), ((1, 4), slice(1, 4)), ((-3, -1), slice(-3, -1))):
        for pooling, pool in ways.items():
            positions = {} if span == (0, 0) else {"positions": {"span": list(span)}}
            name = f"{pooling}{span[0]}"
            got = engine.extract(name, smollm2, texts, layers=layers, pooling=pooling, **positions)
            want = torch.stack([pool(states[cut]) for _, states in whole])
            assert got["hidden_states"].shape == (len(texts), 3, 576)
            assert max_relative_error(got["hidden_states"], want) <= BOUND, (pooling, span)
            # Pooled results carry all tokens of each input.
            assert got["token_ids"].tolist() == [one for ids, _ in whole for one in ids]
    kept = engine.extract("kept", smollm2, texts, layers=layers, pooling="none", positions={"tokens": [-1, 0, -3]})
    assert kept["offsets"].tolist() == [0, 3, 6, 9]
    for (ids, states), (all_ids, all_states) in zip(per_input(kept), whole, strict=True):
        assert ids == [all_ids[-1], all_ids[0], all_ids[-3]]
        assert max_relative_error(states, all_states[[-1, 0, -3]]) <= BOUND
    span = engine.extract("span", smollm2, texts, layers=layers, pooling="none", positions={"span": [1, 3]})
    for (ids, states), (all_ids, all_states) in zip(per_input(span), whole, strict=True):
        assert ids == all_ids[1:3]
        assert max_relative_error(states, all_states[1:3]) <= BOUND


def test_positions_beyond_an_input(start_engine: Any, smollm2: ModelSpec) -> None:
    engine = start_engine()
    texts = ["The capital of France is", "A"]
    for name, fields in {
        "tokens": {"pooling": "none", "positions": {"tokens": [-2]}},
        "span": {"pooling": "mean", "positions": {"span": [0, 2]}},
        "negative": {"pooling": "mean", "positions": {"span": [-3, -1]}},
        "empty": {"pooling": "last", "positions": {"span": [1, 1]}},
    }.items():
        problem = engine.refused(name, smollm2, texts, layers=[1], **fields)
        assert problem["type"] == "/problems/invalid-input", name
        assert "/inputs/1" in [error["pointer"] for error in problem["errors"]], name


def test_output_dtypes(start_engine: Any, smollm2: ModelSpec, max_relative_error: Error) -> None:
    engine = start_engine()
    full = engine.extract("f", smollm2, TEXTS[:3], layers=[15])["hidden_states"]
    for name, dtype, bound in (("h", torch.float16, 1e-3), ("b", torch.bfloat16, 1e-2)):
        got = engine.extract(name, smollm2, TEXTS[:3], layers=[15], dtype=str(dtype).removeprefix("torch."))[
            "hidden_states"
        ]
        assert got.dtype == dtype
        assert max_relative_error(got, full) <= bound


def test_the_order_of_inputs_is_kept(start_engine: Any, tiny_llama: ModelSpec, random_ids: Any) -> None:
    """However the batches were sorted."""
    engine = start_engine(batch_tokens=64)
    inputs = [{"token_ids": random_ids(seed, 1 + (seed * 7) % 40)} for seed in range(50)]
    together = engine.extract("all", tiny_llama, inputs, layers="all")
    assert together["token_ids"].tolist() == [one for item in inputs for one in item["token_ids"]]
    for place in (0, 13, 49):
        alone = engine.extract(f"one{place}", tiny_llama, [inputs[place]], layers="all")
        torch.testing.assert_close(together["hidden_states"][place], alone["hidden_states"][0], rtol=1e-4, atol=1e-6)
