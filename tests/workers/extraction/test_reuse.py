"""The key of a row: equal for what gives equal states, and for nothing else. And what is never reused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bathyscope_workers.extraction.batch import run_batch
from bathyscope_workers.extraction.cache import CacheOptions, RowCache
from bathyscope_workers.extraction.extraction import Extraction
from bathyscope_workers.extraction.reuse import RowIdentity, row_key, tokens_digest
from bathyscope_workers.extraction.spec import ExtractionSpec
from bathyscope_workers.extraction.template import ChatRenderer
from bathyscope_workers.models.resident import Resident

# Texts that would run into one another, were they only joined.
WORDS = st.text(alphabet='ab"\\,:{}[]\x00é', max_size=4)
POSITIONS = st.one_of(
    st.none(),
    st.tuples(st.integers(-9, 9), st.none() | st.integers(-9, 9)).map(lambda span: {"span": list(span)}),
    st.lists(st.integers(-9, 9), min_size=1, max_size=3).map(lambda tokens: {"tokens": tokens}),
)
IDENTITIES = st.builds(
    RowIdentity,
    owner=WORDS,
    model=WORDS,
    revision=WORDS,
    quantization=st.sampled_from(["none", "8bit", "4bit"]),
    llm_int8_threshold=st.none() | st.floats(0, 10),
    adapter=st.none() | WORDS,
    compute_dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    device=WORDS,
    attention=WORDS,
    style=WORDS,
    pooling=st.sampled_from(["last", "mean", "max", "first", "none"]),
    positions=POSITIONS,
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    versions=st.dictionaries(WORDS, WORDS, max_size=2),
)
IDS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=6).map(lambda ids: np.array(ids, dtype=np.int32))


def key(identity: RowIdentity, ids: np.ndarray[Any, Any]) -> bytes:
    return row_key(identity.digest(), tokens_digest(ids))


@given(one=IDENTITIES, other=IDENTITIES, ids=IDS, others=IDS)
def test_keys_are_equal_for_equal_rows_and_for_no_others(
    one: RowIdentity, other: RowIdentity, ids: np.ndarray[Any, Any], others: np.ndarray[Any, Any]
) -> None:
    assert (key(one, ids) == key(other, others)) == (one == other and np.array_equal(ids, others))


@given(one=IDENTITIES, other=IDENTITIES, name=st.sampled_from([field.name for field in fields(RowIdentity)]), ids=IDS)
def test_every_part_counts(one: RowIdentity, other: RowIdentity, name: str, ids: np.ndarray[Any, Any]) -> None:
    changed = replace(one, **{name: getattr(other, name)})
    assert (key(one, ids) == key(changed, ids)) == (getattr(one, name) == getattr(other, name))
    assert key(one, ids) == key(replace(one), ids.copy())
    assert key(one, ids) != key(one, np.append(ids, np.int32(0)))


@given(versions=st.dictionaries(WORDS, WORDS, min_size=2, max_size=4), one=IDENTITIES, ids=IDS)
def test_the_order_in_which_versions_are_told_does_not(
    versions: dict[str, str], one: RowIdentity, ids: np.ndarray[Any, Any]
) -> None:
    backwards = dict(reversed(versions.items()))
    assert key(replace(one, versions=versions), ids) == key(replace(one, versions=backwards), ids)


@pytest.fixture
def run(tmp_path: Path, smollm2_resident: Resident) -> Any:
    cache = RowCache(CacheOptions(tmp_path / "cache", 64 * 2**20))
    renderer = ChatRenderer()
    count = iter(range(100))

    def extract(inputs: list[Any], resident: Resident = smollm2_resident, **fields: Any) -> tuple[torch.Tensor, Any]:
        """The states and the result; `computed` rows went through the model."""
        scratch = tmp_path / str(next(count))
        scratch.mkdir()
        variants = fields.pop("variants", (None,))
        made = Extraction(
            ExtractionSpec.from_wire(fields),
            resident,
            inputs=inputs,
            inputs_path=None,
            scratch=str(scratch),
            renderer=renderer,
            variants=variants,
            owner="anna",
            cache=cache,
        )
        while not made.tokenise_step():
            pass
        computed, at_once = 0, made.done_rows
        while not made.complete:
            queue = next(queue for queue in made.queues if queue)
            rows = queue.take(512)
            run_batch([(made, rows)], budget=512)
            made.computed(rows)
            computed += len(rows)
        while not made.fill_step():
            pass
        states = made.states.clone()
        result = made.finish()
        result.tokens |= {"rows": computed, "done_at_once": at_once}
        return states, result

    yield extract
    cache.close()
    renderer.close()


TEXTS = ["The capital of France is", "Fish", "The capital of France is", "deep " * 60, "Fish"]


@pytest.mark.parametrize("pooling", ["last", "mean", "none"])
def test_states_are_those_of_each_text_alone(run: Callable[..., tuple[torch.Tensor, Any]], pooling: str) -> None:
    fields = {"layers": [0, 15, 30], "pooling": pooling}
    alone = {text: run([text], **fields)[0] for text in dict.fromkeys(TEXTS)}
    states, result = run(TEXTS, **fields)
    assert torch.equal(states, torch.cat([alone[text] for text in TEXTS]))
    assert result.tokens["rows"] == 0
    assert result.tokens["done_at_once"] == len(TEXTS), "progress counts what was there"
    assert result.cache == {"hits": 3, "duplicates": 2}


def test_variants_are_rows_of_their_own(run: Callable[..., tuple[torch.Tensor, Any]]) -> None:
    states, result = run(TEXTS, layers=[3], variants=(None, None))
    assert torch.equal(states[:5], states[5:])
    assert result.relative_change == [[0.0], [0.0]], "rows that were filled are compared as well"
    assert result.cache["duplicates"] == 4


def test_rows_that_depend_on_their_batch_are_not_reused(
    run: Callable[..., tuple[torch.Tensor, Any]], smollm2_resident: Resident, monkeypatch: pytest.MonkeyPatch
) -> None:
    style = replace(smollm2_resident.style, mask=not smollm2_resident.style.mask)
    monkeypatch.setattr(smollm2_resident, "batched_style", style)
    for _ in range(2):
        result = run(TEXTS, layers=[3], batch_invariant=False)[1]
        assert result.cache == {"hits": 0, "duplicates": 0}
        assert result.tokens["rows"] == len(TEXTS)
    assert run(TEXTS, layers=[3])[1].tokens["rows"] == 3
