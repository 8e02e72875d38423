"""Nothing is computed twice, through HTTP: equal inputs, the same request again, fewer layers and more of them.

What went through the model is counted by the worker itself (`bathyscope_batch_rows_sum`), not believed of the answer.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.service.test_adapters import added
from tests.service.test_adapters_many import TEXTS as ADAPTER_TEXTS
from tests.service.test_adapters_many import make, one_thread
from tests.service.test_extractions import assert_close, npy, reference
from tests.service.test_keys import make_key, run_keys
from tests.service.test_metrics import metrics, value
from tests.stack import Stack, stack

TEXTS = [f"{'fathom ' * (number % 7)}sounding number {number}" for number in range(24)]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory, models: str) -> Iterator[Stack]:
    """An installation whose worker has computed nothing yet."""
    with stack(tmp_path_factory.mktemp("reuse"), models=models, cache__max_bytes=64 * 2**20) as running:
        yield running


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def computed(running: Stack, **headers: str) -> float:
    """Rows that went through the model so far; a worker tells its numbers with its next heartbeat."""
    time.sleep(2.5)
    return value(metrics(running, **headers), "bathyscope_batch_rows_sum")


def test_the_same_again_and_fewer_layers_and_more(fresh: Stack, tiny_dir: Path) -> None:
    before = computed(fresh)
    first = fresh.extract(TEXTS, model="tiny", layers=[1, 3])
    states = npy(fresh, first)
    assert first["cache"] == {"hits": 0, "duplicates": 0}
    assert first["cache_hits"] == 0
    assert computed(fresh) == before + len(TEXTS)

    again = fresh.extract(TEXTS, model="tiny", layers=[1, 3])
    assert again["cache"] == {"hits": len(TEXTS), "duplicates": 0}
    assert again["cache_hits"] == len(TEXTS)
    assert again["tokens"] == {**first["tokens"], "computed": 0}
    assert np.array_equal(npy(fresh, again), states)

    fewer = fresh.extract(TEXTS[::-1], model="tiny", layers=[3])
    assert fewer["cache"]["hits"] == len(TEXTS)
    assert np.array_equal(npy(fresh, fewer), states[::-1, 1:])
    assert computed(fresh) == before + len(TEXTS)

    more = fresh.extract(TEXTS[:5], model="tiny", layers=[3, 2])
    assert more["cache"]["hits"] == 0
    whole = fresh.extract(TEXTS[:6], model="tiny", layers=[2, 1, 3])
    assert whole["cache"]["hits"] == 5, "layers of three requests make up one"
    assert computed(fresh) == before + len(TEXTS) + 5 + 1
    expected = reference(tiny_dir, TEXTS[:6])
    assert_close(npy(fresh, whole), np.stack([one[-1][[2, 1, 3]] for one in expected]))


@pytest.mark.parametrize("pooling", ["last", "mean", "none"])
def test_equal_inputs_run_once(fresh: Stack, tiny_dir: Path, pooling: str) -> None:
    one, other = f"a trench, {pooling}", f"a seamount and its guyot, {pooling}"
    order = [one, other, one, one, other, one]
    before = computed(fresh)
    made = fresh.extract(order, model="tiny", pooling=pooling)
    assert made["cache"] == {"hits": 0, "duplicates": 4}
    assert computed(fresh) == before + 2
    expected = reference(tiny_dir, order)
    found = npy(fresh, made)
    match pooling:
        case "last":
            assert_close(found, np.stack([states[-1] for states in expected]))
        case "mean":
            assert_close(found, np.stack([states.mean(0) for states in expected]), 2e-5)
        case "none":
            assert_close(found, np.concatenate(expected))
    again = fresh.extract(order, model="tiny", pooling=pooling)
    assert again["cache"] == {"hits": 2, "duplicates": 4}
    assert again["cache_hits"] == len(order)
    assert np.array_equal(npy(fresh, again), found)


def test_what_the_numbers_depend_on_is_asked_anew(fresh: Stack) -> None:
    asked: dict[str, Any] = {"model": "tiny", "layers": [2]}
    texts = [f"brine pool {number}" for number in range(3)]
    fresh.extract(texts, **asked)
    assert fresh.extract(texts, **asked)["cache"]["hits"] == 3
    for change in (
        {"pooling": "mean"},
        {"positions": {"span": [0, 2]}},
        {"dtype": "float16"},
        {"compute_dtype": "bfloat16"},
        {"max_length": 3, "truncation": "right"},
        {"template": "chat"},
    ):
        assert fresh.extract(texts, **asked, **change)["cache"]["hits"] == 0, change
        assert fresh.extract(texts, **asked, **change)["cache_hits"] == 3, change
    ids = fresh.extract([{"token_ids": [5, 6, 7]}], **asked)
    assert ids["cache"]["hits"] == 0
    assert fresh.extract([{"token_ids": [5, 6, 7]}], **asked, metadata={"of": "another"})["cache"]["hits"] == 1


def test_variants_find_the_rows_of_their_own_adapter(fresh: Stack, tiny_dir: Path, tmp_path: Path) -> None:
    with one_thread():
        made = make(tiny_dir, tmp_path, {"r": 8, "target_modules": ["q_proj", "down_proj"]}, [1, 2])
    first, second = (added(fresh.client, made[seed].archive)["id"] for seed in (1, 2))
    number, base = len(ADAPTER_TEXTS), reference(tiny_dir, ADAPTER_TEXTS)
    wanted = {
        "base": np.stack([states[-1] for states in base]),
        first: np.stack([states[:, -1] for states in made[1].states]),
        second: np.stack([states[:, -1] for states in made[2].states]),
    }
    seen: dict[str, np.ndarray[Any, Any]] = {}
    for asked, hits in (
        (["base", first], 0),
        ([first, second], number),
        ([second, "base", first], 3 * number),
        ([first], number),
    ):
        adapter = asked if len(asked) > 1 else asked[0]
        answered = fresh.extract([*ADAPTER_TEXTS, ADAPTER_TEXTS[0]], model="tiny", adapter=adapter)
        assert answered["cache"] == {"hits": hits, "duplicates": len(asked)}, asked
        states = npy(fresh, answered)
        for name, found in zip(asked, states if len(asked) > 1 else [states], strict=True):
            assert np.array_equal(found[-1], found[0])
            assert_close(found[:-1], wanted[name])
            assert np.array_equal(found, seen.setdefault(name, found)), "to the bit"


def test_choices_are_scored_every_time(fresh: Stack) -> None:
    question = {"prompt": "The deepest trench is the", "choices": [" Mariana", " Java"], "answer": 0}
    for _ in range(2):
        assert fresh.extract([question, question], model="tiny", score_choices=True)["cache_hits"] == 0


def test_it_outlives_a_killed_worker_and_a_damaged_file(fresh: Stack) -> None:
    texts = [f"hydrothermal vent {number}" for number in range(8)]
    states = npy(fresh, fresh.extract(texts, model="tiny"))
    fresh.kill("worker0")
    fresh.start("worker0", "worker", BATHYSCOPE_WORKER__NAME="worker0")
    again = fresh.extract(texts, model="tiny")
    assert again["cache"]["hits"] == 8
    assert np.array_equal(npy(fresh, again), states)

    fresh.kill("worker0")
    file = fresh.data_dir / "cache" / "0" / "data.mdb"
    content = bytearray(file.read_bytes())
    content[8192:] = b"\xa5" * (len(content) - 8192)
    file.write_bytes(content)
    fresh.start("worker0", "worker", BATHYSCOPE_WORKER__NAME="worker0")
    anew = fresh.extract(texts, model="tiny")
    assert anew["cache"]["hits"] == 0
    assert_close(npy(fresh, anew), states)
    assert fresh.extract(texts, model="tiny")["cache"]["hits"] == 8
    assert "cache.dropped" in fresh.said()


@pytest.mark.parametrize("shared", [False, True])
def test_keys_share_nothing_unless_the_operator_says_so(tmp_path: Path, models: str, shared: bool) -> None:
    with stack(tmp_path, models=models, cache__max_bytes=64 * 2**20, cache__shared=shared) as running:
        anna, bert = make_key(running, "anna"), make_key(running, "bert")
        meter = bearer(make_key(running, "meter", "--scope", "metrics"))
        texts = [f"a secret of the deep {number}" for number in range(6)]

        def hits(key: str) -> int:
            headers = {**bearer(key), "Prefer": "wait=60"}
            answer = running.client.post("/v1/extractions", json={"model": "tiny", "inputs": texts}, headers=headers)
            assert answer.status_code == 200, answer.text
            made = running.client.get(answer.json()["resource"], headers=bearer(key)).json()
            assert made["cache_hits"] == made["cache"]["hits"]
            return int(made["cache"]["hits"])

        before = computed(running, **meter)
        assert hits(anna) == 0
        assert hits(bert) == (6 if shared else 0)
        assert computed(running, **meter) == before + (6 if shared else 12)
        assert hits(anna) == hits(bert) == 6
        run_keys(running, "revoke", "anna")
        assert hits(make_key(running, "anna")) == (6 if shared else 0), "a name that is given again is another key"
