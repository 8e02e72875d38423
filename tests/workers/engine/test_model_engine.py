"""The loop: jobs that share batches, progress, cancel, drop, eviction, failures that stay with their job."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from bathyscope import errors
from bathyscope_workers.engine.handlers import JobContext
from bathyscope_workers.engine.protocol import RunJob
from bathyscope_workers.extraction.extraction import ExtractionResult
from bathyscope_workers.models.spec import ModelSpec

Ids = Callable[[int, int], list[int]]


def inputs(random_ids: Ids, count: int, length: int = 20) -> list[dict[str, list[int]]]:
    return [{"token_ids": random_ids(seed, length)} for seed in range(count)]


def test_load_run_and_what_is_told(start_engine: Any, tiny_llama: ModelSpec, random_ids: Ids) -> None:
    engine = start_engine()
    ready = engine.next()
    assert ready["ev"] == "ready"
    assert ready["kind"] == "model"
    assert ready["device"] == "cpu"
    assert {"torch", "transformers"} <= set(ready["versions"])
    engine.send(op="load", resident=tiny_llama.to_wire())
    loaded = engine.until("loaded")
    assert (loaded["key"], loaded["asked"]) == ("tiny/llama:none:float32", "tiny/llama:none:auto")
    assert loaded["facts"]["self_test"]["passed"]
    assert (loaded.pop("seconds") > 0, loaded.pop("swapped")) == (True, False)
    engine.send(op="load", resident=tiny_llama.to_wire())
    assert engine.until("loaded") == loaded, "every load is answered, and took time once"
    engine.run("job_1", "tiny/llama:none:float32", inputs(random_ids, 1), layers=[1, -1])
    done = engine.until("done")
    assert [event["ev"] for event in engine.log[-3:]] == ["running", "beat", "done"]
    assert engine.log[-3]["ids"] == ["job_1"]
    assert engine.next() == {"ev": "running", "ids": []}
    result, timings = done["result"], done["timings"]
    assert result["shape"] == [1, 2, 32]
    assert result["layers"] == [1, 4]
    assert result["tokens"] == {"total": 20, "computed": 20, "kept": 20}
    assert set(timings) == {"load", "tokenise", "inference", "total"}
    assert timings["total"] >= timings["inference"] > 0
    path = Path(result["path"])
    assert path.stat().st_size == result["bytes"]
    place = result["tensors"]["hidden_states"]
    raw = bytearray(path.read_bytes()[place["offset"] : place["offset"] + place["bytes"]])
    assert torch.equal(torch.frombuffer(raw, dtype=torch.float32).view(1, 2, 32), load_file(path)["hidden_states"])
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["model"] == "tiny/llama"
    assert json.loads(metadata["layers"]) == [1, 4]
    assert metadata["compute_dtype"] == "float32"
    assert metadata["revision"] == loaded["facts"]["revision"]


def test_inputs_from_a_file(start_engine: Any, tiny_llama: ModelSpec, random_ids: Ids, tmp_path: Path) -> None:
    items = inputs(random_ids, 2500, length=3)
    path = tmp_path / "inputs.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    engine = start_engine()
    tensors = engine.extract("job_1", tiny_llama, path, layers=[0])
    assert tensors["hidden_states"].shape == (2500, 1, 32)
    assert tensors["token_ids"].tolist() == [one for item in items for one in item["token_ids"]]


def test_jobs_that_come_together_share_batches(start_engine: Any, tiny_llama: ModelSpec, random_ids: Ids) -> None:
    engine = start_engine()
    engine.send(op="load", resident=tiny_llama.to_wire())
    engine.until("loaded")
    names = [f"job_{index}" for index in range(6)]
    for index, name in enumerate(names):
        engine.run(name, tiny_llama, inputs(random_ids, 1 + index), layers=[4, index % 4], owner=f"key_{index}")
    ended = engine.finished(*names)
    assert any(len(event["ids"]) > 1 for event in engine.log if event["ev"] == "running")
    for index, name in enumerate(names):
        together = load_file(ended[name]["result"]["path"])["hidden_states"]
        given = inputs(random_ids, 1 + index)
        alone = engine.extract(f"alone_{index}", tiny_llama, given, layers=[4, index % 4], solo=True)
        torch.testing.assert_close(together, alone["hidden_states"], rtol=1e-4, atol=1e-6)


def test_a_new_job_joins_at_the_next_batch(start_engine: Any, tiny_llama: ModelSpec, random_ids: Ids) -> None:
    engine = start_engine(batch_tokens=40)
    engine.run("big", tiny_llama, inputs(random_ids, 3000), layers=[4], owner="key_a")
    engine.until("running")
    engine.run("small", tiny_llama, inputs(random_ids, 1), layers=[4], owner="key_b")
    assert engine.until("done")["id"] == "small"
    assert engine.until("done")["id"] == "big"


def test_progress_of_long_jobs_only(start_engine: Any, tiny_llama: ModelSpec, random_ids: Ids) -> None:
    engine = start_engine(batch_tokens=20)
    engine.run("long", tiny_llama, inputs(random_ids, 700), layers=[4])
    engine.finished("long")
    told = [event for event in engine.log if event["ev"] == "progress" and event["stage"] == "forward"]
    seconds = next(event["timings"]["total"] for event in engine.log if event["ev"] == "done")
    assert 1 <= len(told) <= seconds / 0.5 + 1
    assert [event["done"] for event in told] == sorted(event["done"] for event in told)
    assert all(event["total"] == 700 and event["unit"] == "inputs" for event in told)
    assert sum(event["ev"] == "beat" for event in engine.log) >= 700


def test_cancel_between_batches(start_engine: Any, tiny_llama: ModelSpec, random_ids: Ids) -> None:
    engine = start_engine(batch_tokens=20)
    engine.run("job_1", tiny_llama, inputs(random_ids, 5000), layers=[4])
    engine.until("beat")
    while engine.next()["ev"] != "running":
        pass
    engine.send(op="cancel", id="job_1")
    engine.send(op="cancel", id="unknown")
    assert engine.finished("job_1")["job_1"]["ev"] == "cancelled"
    assert not list((engine._folder / "job_1").iterdir())
    assert engine.extract("job_2", tiny_llama, inputs(random_ids, 2), layers=[4])["hidden_states"].shape == (2, 1, 32)


def test_drop_all_answers_nothing(start_engine: Any, tiny_llama: ModelSpec, random_ids: Ids) -> None:
    engine = start_engine(batch_tokens=20)
    for name in ("job_1", "job_2"):
        engine.run(name, tiny_llama, inputs(random_ids, 2000), layers=[4])
    engine.until("running")
    engine.send(op="drop_all")
    engine.extract("job_3", tiny_llama, inputs(random_ids, 1), layers=[4])
    assert {event["id"] for event in engine.log if event["ev"] in ("done", "failed", "cancelled")} == {"job_3"}


def test_an_evicted_model_comes_back(start_engine: Any, tiny_llama: ModelSpec, random_ids: Ids) -> None:
    engine = start_engine()
    engine.send(op="load", resident=tiny_llama.to_wire())
    size = engine.until("loaded")["facts"]["memory_bytes"]
    small = start_engine(memory_bytes=size * 3 // 2)
    first, second = tiny_llama, replace(tiny_llama, name="tiny/other")
    for turn, spec in enumerate((first, second, first)):
        small.extract(f"job_{turn}", spec if turn < 2 else spec.key, inputs(random_ids, 1), layers=[1])
    told = [(event["ev"], event["key"]) for event in small.log if event["ev"] in ("loaded", "unloaded")]
    one, other = "tiny/llama:none:float32", "tiny/other:none:float32"
    assert told == [("loaded", one), ("unloaded", one), ("loaded", other), ("unloaded", other), ("loaded", one)]
    # Two at once, with room for one: the second waits for the first to end.
    small.run("a", first, inputs(random_ids, 300), layers=[4])
    small.run("b", second, inputs(random_ids, 3), layers=[4])
    assert [small.until("done")["id"] for _ in "ab"] == ["a", "b"]
    loads = [event["swapped"] for event in small.log if event["ev"] == "loaded" and "seconds" in event]
    assert loads == [False, True, True, True]


def test_beats_tell_every_row_once(start_engine: Any, tiny_llama: ModelSpec, random_ids: Ids) -> None:
    engine = start_engine(batch_tokens=40)
    engine.extract("job_1", tiny_llama, inputs(random_ids, 30), layers=[4])
    batches = [batch for event in engine.log if event["ev"] == "beat" for batch in event.get("batches", [])]
    [done] = [event for event in engine.log if event["ev"] == "done"]
    assert {batch[0] for batch in batches} == {"tiny/llama:none:float32"}
    assert sum(batch[1] for batch in batches) == 30
    assert sum(batch[2] for batch in batches) == done["result"]["tokens"]["total"]
    assert sum(batch[3] for batch in batches) == done["result"]["tokens"]["computed"]
    assert all(rows >= 1 and 0 < tokens <= padded for _, rows, tokens, padded, _ in batches)
    assert len(batches) > 1
    assert set(done["stages"]) == {"load", "tokenise", "forward"}


def test_unload_waits_for_its_jobs(start_engine: Any, tiny_llama: ModelSpec, random_ids: Ids) -> None:
    engine = start_engine(batch_tokens=20)
    engine.run("job_1", tiny_llama, inputs(random_ids, 300), layers=[4])
    engine.until("running")
    engine.send(op="unload", key=tiny_llama.key)
    engine.send(op="unload", key="never:none:auto")
    assert engine.until("unloaded")["reason"] == "missing"
    assert engine.finished("job_1")["job_1"]["ev"] == "done"
    unloaded = next((event for event in engine.log if event.get("reason") == "asked"), None) or engine.until("unloaded")
    assert unloaded == {"ev": "unloaded", "key": "tiny/llama:none:float32", "reason": "asked"}


def test_a_model_that_does_not_load(start_engine: Any, tiny_llama: ModelSpec, tmp_path: Path) -> None:
    engine = start_engine()
    broken = replace(tiny_llama, name="tiny/broken", source=str(tmp_path / "none"))
    engine.send(op="load", resident=broken.to_wire())
    failed = engine.until("load_failed")
    assert failed["problem"]["type"] == "/problems/model-load-failed"
    assert (failed["key"], failed["asked"], failed["retry"]) == ("tiny/broken:none:float32", broken.key, False)
    assert engine.refused("job_1", broken, [{"token_ids": [1]}], layers=[1]) == failed["problem"]
    assert engine.refused("job_2", "nobody:none:auto", [{"token_ids": [1]}])["type"] == "/problems/model-unknown"
    engine.send(op="load", resident={"name": "a:b", "source": "/x"})
    assert engine.until("load_failed")["problem"]["type"] == "/problems/invalid-request"
    assert engine.extract("job_3", tiny_llama, [{"token_ids": [1]}], layers=[1])["hidden_states"].shape == (1, 1, 32)


def test_bad_requests_fail_their_job_alone(start_engine: Any, tiny_llama: ModelSpec, random_ids: Ids) -> None:
    engine = start_engine()
    cases: dict[str, tuple[list[Any], dict[str, Any], str]] = {
        "range": ([{"token_ids": [1]}], {"layers": [5]}, "/layers/0"),
        "twice": ([{"token_ids": [1]}], {"layers": [4, -1]}, "/layers/1"),
        "empty": ([{"token_ids": [1]}, {"token_ids": []}], {"layers": [1]}, "/inputs/1"),
        "long": ([{"token_ids": [1] * 257}], {"layers": [1]}, "/inputs/0"),
        "text": (["no tokenizer"], {"layers": [1]}, "/inputs"),
        "none": ([], {"layers": [1]}, "/inputs"),
    }
    engine.run("good", tiny_llama, inputs(random_ids, 50), layers="all")
    for name, (given, fields, _) in cases.items():
        engine.run(name, tiny_llama, given, **fields)
    ended = engine.finished("good", *cases)
    assert ended["good"]["ev"] == "done"
    for name, (_, _, pointer) in cases.items():
        assert ended[name]["ev"] == "failed", name
        assert ended[name]["problem"]["errors"][0]["pointer"] == pointer
        assert ended[name]["retry"] is False


@pytest.fixture
def broken_forward(tiny_llama: ModelSpec) -> Callable[[Any, Callable[[torch.Tensor], None]], Any]:
    """Puts a fault into the model itself, for token ids that trigger it."""

    def install(engine: Any, fault: Callable[[torch.Tensor], None]) -> Any:
        engine.send(op="load", resident=tiny_llama.to_wire())
        engine.until("loaded")
        resident = engine.engine.residency.peek(tiny_llama.key)
        embeddings = resident.model.get_input_embeddings()
        embeddings.register_forward_pre_hook(lambda module, args: fault(args[0]))
        return resident

    return install


def test_memory_runs_out_in_a_large_batch(
    start_engine: Any, tiny_llama: ModelSpec, random_ids: Ids, broken_forward: Any
) -> None:
    engine = start_engine(batch_tokens=320)
    want = engine.extract("before", tiny_llama, inputs(random_ids, 40), layers="all")["hidden_states"]

    def fault(ids: torch.Tensor) -> None:
        if ids.numel() > 100:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    resident = broken_forward(engine, fault)
    got = engine.extract("halved", tiny_llama, inputs(random_ids, 40), layers="all")["hidden_states"]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert resident.token_budget <= 160, "later batches are smaller from the start"


def test_memory_runs_out_for_one_text(
    start_engine: Any, tiny_llama: ModelSpec, random_ids: Ids, broken_forward: Any
) -> None:
    engine = start_engine()

    def fault(ids: torch.Tensor) -> None:
        if ids.shape[1] > 50:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    broken_forward(engine, fault)
    engine.run("large", tiny_llama, [{"token_ids": random_ids(0, 60)}, {"token_ids": random_ids(1, 40)}], layers=[4])
    engine.run("small", tiny_llama, [{"token_ids": random_ids(1, 45)}], layers=[4], owner="key_b")
    ended = engine.finished("large", "small")
    assert ended["large"]["problem"]["type"] == "/problems/out-of-memory"
    assert "60 tokens" in ended["large"]["problem"]["detail"]
    assert ended["small"]["ev"] == "done"


def test_a_poisonous_row_fails_its_own_job(
    start_engine: Any, tiny_llama: ModelSpec, random_ids: Ids, broken_forward: Any
) -> None:
    engine = start_engine(batch_tokens=4096)

    def fault(ids: torch.Tensor) -> None:
        if (ids == 111).any():
            raise RuntimeError("a kernel that dislikes this token")

    broken_forward(engine, fault)
    # One that holds the loop for a moment, so that the next three meet in a batch.
    engine.run("first", tiny_llama, inputs(random_ids, 1000, length=100), layers=[4])
    for name, ids in {"good": [1, 2, 3], "poison": [1, 111, 3], "fine": [4, 5, 6]}.items():
        engine.run(name, tiny_llama, [{"token_ids": ids}], layers=[4], owner=name)
    ended = engine.finished("first", "good", "poison", "fine")
    assert [ended[name]["ev"] for name in ("first", "good", "poison", "fine")] == ["done", "done", "failed", "done"]
    assert ended["poison"]["problem"]["type"] == "/problems/internal-error"
    assert "kernel" not in json.dumps(ended["poison"]["problem"]), "no inner text reaches the caller"


def test_a_result_over_the_limit(start_engine: Any, tiny_llama: ModelSpec, random_ids: Ids) -> None:
    engine = start_engine()
    job = {"kind": "extraction", "resident": tiny_llama.to_wire(), "spec": {"layers": "all"}, "max_result_bytes": 1280}
    for name, count in (("fits", 2), ("large", 3)):
        scratch = engine._folder / name
        scratch.mkdir()
        engine.send(op="run", job={**job, "id": name, "scratch": str(scratch), "inputs": inputs(random_ids, count)})
    ended = engine.finished("fits", "large")
    assert ended["fits"]["ev"] == "done"
    assert ended["large"]["problem"]["type"] == "/problems/too-large"
    assert ended["large"]["problem"]["limit"] == 1280


def test_a_finisher_turns_states_into_a_prediction(start_engine: Any, tiny_llama: ModelSpec, random_ids: Ids) -> None:
    def finish(job: RunJob, result: ExtractionResult, context: JobContext) -> dict[str, Any]:
        context.beat()
        if job.extra["probe"] == "missing":
            raise errors.NotFound("there is no such probe")
        states = load_file(result.path)["hidden_states"]
        return {"labels": (states[:, 0].sum(-1) > 0).tolist(), "layers": result.layers}

    engine = start_engine(finishers={"prediction": finish})
    scratch = engine._folder / "p"
    scratch.mkdir()
    job = {
        "id": "p",
        "kind": "prediction",
        "resident": tiny_llama.to_wire(),
        "spec": {"layers": [2]},
        "scratch": str(scratch),
    }
    engine.send(op="run", job={**job, "inputs": inputs(random_ids, 3), "probe": "prb_1"})
    result = engine.finished("p")["p"]["result"]
    assert len(result["labels"]) == 3
    assert result["layers"] == [2]
    (scratch / "hidden_states.safetensors").unlink()
    engine.send(op="run", job={**job, "inputs": inputs(random_ids, 3), "probe": "missing"})
    assert engine.finished("p")["p"]["problem"]["type"] == "/problems/not-found"


def test_int8_texts_run_alone_unless_asked(start_engine: Any, minilm: ModelSpec) -> None:
    texts = ["deep", "the sea is deep", "the sea is very deep and the night is long"]
    spec = replace(minilm, quantization="8bit")
    engine = start_engine()
    together = engine.extract("a", spec, texts, layers="all")["hidden_states"]
    for index, text in enumerate(texts):
        alone = engine.extract(f"b{index}", spec, [text], layers="all")["hidden_states"]
        assert torch.equal(together[index], alone[0])
    mixed = engine.extract("c", spec, texts, layers="all", batch_invariant=False)["hidden_states"]
    assert not torch.equal(mixed, together)
