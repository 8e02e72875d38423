"""Hidden states through HTTP: equal to what transformers gives for each text alone, in every format."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import load as load_safetensors

from tests.stack import Stack

TEXTS = [
    "The capital of France is Paris.",
    "a",
    "Fish 🐟🐠 and 深海 in one line\n\twith tabs",
    "word " * 80,
    "Pressure grows by one bar every ten metres. " * 9,
    " ",
]


def tensors(live: Stack, extraction: dict[str, Any], **query: str) -> dict[str, np.ndarray[Any, Any]]:
    answer = live.client.get(extraction["links"]["hidden_states"], params=query)
    assert answer.status_code == 200, answer.text
    return dict(load_safetensors(answer.content))


def npy(live: Stack, extraction: dict[str, Any], **query: str) -> np.ndarray[Any, Any]:
    answer = live.client.get(extraction["links"]["hidden_states"], params={"format": "npy", **query})
    assert answer.status_code == 200, answer.text
    return np.load(io.BytesIO(answer.content))


def reference(folder: Path, texts: list[str], *, encoder: bool = False) -> list[np.ndarray[Any, Any]]:
    """`(tokens, layers, hidden)` of each text alone, from transformers itself."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    kind = AutoModel if encoder else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    with torch.inference_mode():
        for text in texts:
            states = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states
            found.append(torch.stack([layer[0] for layer in states], dim=1).numpy())
    return found


def assert_close(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any], bound: float = 1e-5) -> None:
    """Per token vector: norm of the difference over norm of the reference."""
    assert found.shape == expected.shape
    error = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert error.max() <= bound, error.max()


@pytest.fixture(scope="module")
def tiny_states(live: Stack) -> dict[str, Any]:
    return live.extract(TEXTS, model="tiny")


def test_every_layer_equals_transformers_for_each_text_alone(
    live: Stack, tiny_dir: Path, tiny_states: dict[str, Any]
) -> None:
    expected = reference(tiny_dir, TEXTS)
    assert tiny_states["shape"] == [len(TEXTS), 5, 32]
    assert_close(npy(live, tiny_states), np.stack([states[-1] for states in expected]))


@pytest.mark.parametrize("pooling", ["mean", "max", "first"])
def test_pooling(live: Stack, tiny_dir: Path, pooling: str) -> None:
    expected = reference(tiny_dir, TEXTS)
    pool = {"mean": lambda x: x.mean(0), "max": lambda x: x.max(0), "first": lambda x: x[0]}[pooling]
    found = npy(live, live.extract(TEXTS, model="tiny", pooling=pooling))
    assert_close(found, np.stack([pool(states) for states in expected]), 2e-5)


def test_all_tokens_come_with_their_offsets_and_ids(live: Stack, tiny_dir: Path) -> None:
    from transformers import AutoTokenizer

    expected = reference(tiny_dir, TEXTS)
    extraction = live.extract(TEXTS, model="tiny", pooling="none", layers=[-1, 0])
    found = tensors(live, extraction)
    assert extraction["layers"] == [4, 0]
    lengths = np.diff(found["offsets"])
    assert list(lengths) == [len(states) for states in expected]
    assert_close(found["hidden_states"], np.concatenate([states[:, [4, 0]] for states in expected]))
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    assert list(found["token_ids"]) == [token for text in TEXTS for token in tokenizer(text)["input_ids"]]


def test_a_real_encoder(live: Stack, minilm_dir: Path) -> None:
    texts = ["Deep water.", "a", "light " * 300, "🐟"]
    expected = reference(minilm_dir, texts, encoder=True)
    extraction = live.extract(texts, model="minilm", pooling="none")
    assert_close(tensors(live, extraction)["hidden_states"], np.concatenate(expected))


def test_the_four_formats_agree_to_the_bit(live: Stack, tiny_states: dict[str, Any]) -> None:
    whole = tensors(live, tiny_states)["hidden_states"]
    assert np.array_equal(npy(live, tiny_states), whole)
    link = tiny_states["links"]["hidden_states"]
    table = pa.ipc.open_stream(live.client.get(link, params={"format": "arrow"}).content).read_all()
    assert table.column("index").to_pylist() == list(range(len(TEXTS)))
    rows = np.array(table.column("hidden_states").to_pylist(), np.float32).reshape(whole.shape)
    assert np.array_equal(rows, whole)
    content = live.client.get(link, params={"format": "json"}).json()
    assert np.array_equal(np.array(content["hidden_states"], np.float32), whole)
    assert content["shape"] == list(whole.shape)


@pytest.mark.parametrize("pooling", ["last", "none"])
def test_layers_and_rows_are_cut_out_exactly(live: Stack, pooling: str) -> None:
    extraction = live.extract(TEXTS, model="tiny", pooling=pooling)
    whole = tensors(live, extraction)
    part = tensors(live, extraction, layers="3,0", rows="1-3")
    offsets = whole["offsets"]
    first, last = (1, 4) if pooling == "last" else (int(offsets[1]), int(offsets[4]))
    assert np.array_equal(part["hidden_states"], whole["hidden_states"][first:last][:, [3, 0]])
    assert np.array_equal(part["token_ids"], whole["token_ids"][offsets[1] : offsets[4]])
    assert np.array_equal(part["offsets"], offsets[1:5] - offsets[1])
    assert np.array_equal(npy(live, extraction, layers="-1", rows="2"), part_of(whole, offsets, pooling))
    arrow = live.client.get(
        extraction["links"]["hidden_states"], params={"format": "arrow", "layers": "3,0", "rows": "1-3"}
    )
    table = pa.ipc.open_stream(arrow.content).read_all()
    flat = np.concatenate([np.array(row, np.float32) for row in table.column("hidden_states").to_pylist()])
    assert np.array_equal(flat, part["hidden_states"].reshape(-1))
    assert table.column("index").to_pylist() == [1, 2, 3]


def part_of(whole: dict[str, Any], offsets: Any, pooling: str) -> Any:
    first, last = (2, 3) if pooling == "last" else (int(offsets[2]), int(offsets[3]))
    return whole["hidden_states"][first:last][:, [4]]


def test_ranges_and_validators(live: Stack, tiny_states: dict[str, Any]) -> None:
    link = tiny_states["links"]["hidden_states"]
    whole = live.client.get(link)
    etag = whole.headers["etag"]
    assert whole.headers["accept-ranges"] == "bytes"
    part = live.client.get(link, headers={"Range": "bytes=100-299", "If-Range": etag})
    assert part.status_code == 206
    assert part.content == whole.content[100:300]
    assert part.headers["content-range"] == f"bytes 100-299/{len(whole.content)}"
    assert live.client.get(link, headers={"Range": "bytes=-50"}).content == whole.content[-50:]
    assert live.client.get(link, headers={"Range": "bytes=40-"}).content == whole.content[40:]
    assert live.client.get(link, headers={"Range": "bytes=0-1", "If-Range": '"other"'}).status_code == 200
    beyond = live.client.get(link, headers={"Range": f"bytes={len(whole.content)}-"})
    assert beyond.status_code == 416
    assert beyond.json()["type"] == "/problems/range-not-satisfiable"
    assert live.client.get(link, headers={"If-None-Match": etag}).status_code == 304
    assert live.client.get(link, params={"format": "npy"}).headers["etag"] != etag
    accepted = live.client.get(link, headers={"Accept": "application/x-npy;q=0.9, text/html"})
    assert accepted.content.startswith(b"\x93NUMPY")
    assert live.client.get(link, headers={"Accept": "text/html"}).status_code == 406


def test_the_digest_is_of_the_whole_artifact(live: Stack, tiny_states: dict[str, Any]) -> None:
    import hashlib

    content = live.client.get(tiny_states["links"]["hidden_states"]).content
    assert hashlib.sha256(content).hexdigest() == tiny_states["sha256"]
    assert len(content) == tiny_states["bytes"]


def test_provenance_stands_in_the_file(live: Stack, tiny_states: dict[str, Any]) -> None:
    content = live.client.get(tiny_states["links"]["hidden_states"]).content
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    notes = header["__metadata__"]
    assert notes["model"] == "tiny"
    assert notes["pooling"] == "last"
    assert json.loads(notes["layers"]) == [0, 1, 2, 3, 4]


def test_bfloat16_comes_as_safetensors_only(live: Stack) -> None:
    extraction = live.extract(["deep"], model="tiny", dtype="bfloat16", layers=[2])
    exact = npy(live, live.extract(["deep"], model="tiny", layers=[2]))
    link = extraction["links"]["hidden_states"]
    for format in ("npy", "arrow", "json"):
        answer = live.client.get(link, params={"format": format})
        assert answer.status_code == 406
        assert answer.headers["content-type"] == "application/problem+json"
    content = live.client.get(link).content
    start = 8 + int.from_bytes(content[:8], "little")
    place = json.loads(content[8:start])["hidden_states"]
    assert place["dtype"] == "BF16"
    bits = np.frombuffer(content[start:][slice(*place["data_offsets"])], "<u2").astype(np.uint32) << 16
    assert np.allclose(bits.view(np.float32), exact.reshape(-1), rtol=2**-8)


def test_chat_goes_through_the_models_own_template(live: Stack, tiny_dir: Path) -> None:
    from transformers import AutoTokenizer

    turns = [{"role": "user", "content": "How deep?"}]
    found = tensors(live, live.extract([{"messages": turns}], model="tiny", layers=[0]))
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert list(found["token_ids"]) == list(expected)
    as_string = tensors(live, live.extract(["How deep?"], model="tiny", layers=[0], template="chat"))
    assert list(as_string["token_ids"]) == list(expected)


def test_token_ids_are_taken_as_they_are(live: Stack) -> None:
    found = tensors(live, live.extract([{"token_ids": [5, 9, 5]}], model="tiny", pooling="none", layers=[1]))
    assert list(found["token_ids"]) == [5, 9, 5]


def test_positions_restrict_what_counts(live: Stack) -> None:
    text = "The capital of France is Paris."
    whole = tensors(live, live.extract([text], model="tiny", pooling="none"))["hidden_states"]
    span = npy(live, live.extract([text], model="tiny", pooling="mean", positions={"span": [1, -1]}))
    assert_close(span[0], whole[1:-1].mean(0), 2e-5)
    kept = tensors(live, live.extract([text], model="tiny", pooling="none", positions={"tokens": [-1, 0]}))
    assert_close(kept["hidden_states"], whole[[-1, 0]])
    assert list(kept["offsets"]) == [0, 2]


def test_truncation(live: Stack) -> None:
    ids = list(range(10, 30))
    left = tensors(live, live.extract([{"token_ids": ids}], model="tiny", max_length=5, truncation="left", layers=[0]))
    right = tensors(
        live, live.extract([{"token_ids": ids}], model="tiny", max_length=5, truncation="right", layers=[0])
    )
    assert list(left["token_ids"]) == ids[-5:]
    assert list(right["token_ids"]) == ids[:5]


@pytest.mark.parametrize(
    ("inputs", "options", "pointer"),
    [
        (["fine", ""], {}, "/inputs/1"),
        (["fine", "long " * 600], {}, "/inputs/1"),
        (["fine", "four words are here"], {"max_length": 6}, "/inputs/1"),
        (["a b c", "a"], {"pooling": "none", "positions": {"tokens": [2]}}, "/inputs/1"),
    ],
)
def test_an_input_that_cannot_be_read_fails_the_job_with_its_pointer(
    live: Stack, inputs: list[str], options: dict[str, Any], pointer: str
) -> None:
    job = live.post("/v1/extractions", {"model": "tiny", "inputs": inputs, **options}).json()
    assert job["status"] == "failed", job
    assert job["error"]["status"] == 422
    assert [error["pointer"] for error in job["error"]["errors"]] == [pointer]
    assert job["attempt"] == 1


def test_smollm2_is_exact_for_one_to_two_thousand_tokens_in_one_job(live: Stack) -> None:
    unit = "Sperm whales dive deeper than a thousand metres. "
    texts = ["a", "The capital of France is Paris.", "🐳" * 7, unit * 20, unit * 200, "Is it? " * 60]
    extraction = live.extract(texts, model="smollm2")
    converted = next((live.data_dir / "models").glob("smollm2*/config.json")).parent
    expected = reference(converted, texts)
    assert max(len(states) for states in expected) > 1900
    assert_close(npy(live, extraction), np.stack([states[-1] for states in expected]))


def test_a_job_that_waits_beside_others_gets_the_same_numbers(live: Stack) -> None:
    alone = npy(live, live.extract(TEXTS, model="tiny"))
    others = [[f"other {k} {number}" for number in range(30)] for k in range(9)]
    others[4] = TEXTS
    jobs = [live.post("/v1/extractions", {"model": "tiny", "inputs": texts}, wait=0).json() for texts in others]
    ended = [live.job(job["id"]) for job in jobs]
    assert all(job["status"] == "succeeded" for job in ended)
    beside = npy(live, live.client.get(ended[4]["resource"]).json())
    assert_close(beside, alone)


def test_deleting(live: Stack) -> None:
    extraction = live.extract(["gone"], model="tiny")
    path = f"/v1/extractions/{extraction['id']}"
    assert live.client.delete(path).status_code == 204
    for where in (path, path + "/hidden_states"):
        assert live.client.get(where).status_code == 404
    assert extraction["id"] not in [entry["id"] for entry in live.client.get("/v1/extractions").json()["data"]]
    assert not list((live.data_dir / "artifacts" / "blobs" / extraction["id"]).glob("*"))


def test_lists_are_newest_first_and_paged(live: Stack) -> None:
    made = [live.extract([f"row {k}"], model="tiny", layers=[0])["id"] for k in range(3)]
    first = live.client.get("/v1/extractions", params={"limit": 2}).json()
    second = live.client.get("/v1/extractions", params={"limit": 2, "cursor": first["next_cursor"]}).json()
    found = [entry["id"] for entry in first["data"] + second["data"]]
    assert found[:3] == made[::-1]


def test_results_tell_their_times(live: Stack, tiny_states: dict[str, Any]) -> None:
    answer = live.client.get(f"/v1/extractions/{tiny_states['id']}")
    for header in ("x-queue-time", "x-load-time", "x-inference-time", "x-total-time"):
        assert float(answer.headers[header]) >= 0
    assert int(answer.headers["x-tokens"]) == tiny_states["tokens"]["total"]


@pytest.mark.parametrize(("options", "limit"), [({}, 512), ({"max_length": 9}, 9)])
def test_too_many_token_ids_are_refused_at_once(live: Stack, options: dict[str, Any], limit: int) -> None:
    inputs = [{"token_ids": [5] * limit}, {"token_ids": [5] * (limit + 1)}]
    answer = live.post("/v1/extractions", {"model": "tiny", "inputs": inputs, **options})
    assert answer.status_code == 422
    assert answer.json()["type"] == "/problems/invalid-input"
    assert [error["pointer"] for error in answer.json()["errors"]] == ["/inputs/1"]
    cut = live.extract(inputs, model="tiny", truncation="left", layers=[0], **options)
    assert cut["tokens"]["total"] == 2 * limit


def test_results_that_are_deleted_while_they_are_read(live: Stack) -> None:
    extraction = live.extract(["gone"], model="tiny", layers=[0])
    for path in (live.data_dir / "artifacts" / "blobs" / extraction["id"]).glob("*"):
        path.unlink()
    for query in ({}, {"format": "npy"}, {"format": "arrow"}, {"format": "json"}, {"rows": "0"}):
        answer = live.client.get(extraction["links"]["hidden_states"], params=query)
        assert answer.status_code == 404, query
        assert answer.json()["type"] == "/problems/not-found"


def test_the_manners_of_ranges_and_validators(live: Stack, tiny_states: dict[str, Any]) -> None:
    link = tiny_states["links"]["hidden_states"]
    whole = live.client.get(link)
    assert live.client.get(link, headers={"Range": "Bytes=0-3"}).content == whole.content[:4]
    beyond = live.client.get(link, headers={"Range": f"bytes={len(whole.content)}-"})
    assert beyond.headers["content-range"] == f"bytes */{len(whole.content)}"
    assert live.client.get(link, headers={"If-None-Match": "*"}).status_code == 304
    head = live.client.head(link)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == whole.headers["content-length"]
    assert head.headers["etag"] == whole.headers["etag"]
