"""Choices and the model's own confidence through HTTP, the SDK and the command line; probes on them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

import bathyscope
from bathyscope.cli._app import app
from tests.service.test_adapters import added, archive
from tests.service.test_manners import problem
from tests.service.test_probes import predict, train
from tests.stack import Stack, stack

QUESTIONS: list[dict[str, Any]] = [
    {"prompt": "The capital of France is", "choices": [" Paris", " Rome"], "answer": 0},
    {"prompt": "What is two plus two? It is ", "choices": ["four", "🐟", "two"], "answer": 1},
    {"prompt": "What is two plus two? It is", "answer": "four"},
]
SCORING: dict[str, Any] = {"model": "tiny", "layers": [2], "score_choices": True, "max_new_tokens": 3}


@pytest.fixture(scope="module")
def scored(live: Stack) -> dict[str, Any]:
    return live.extract(QUESTIONS, **SCORING)


def test_scores_are_given_whole_and_in_part(live: Stack, scored: dict[str, Any], tiny_dir: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    link = scored["links"]["choices"]
    assert link == f"/v1/extractions/{scored['id']}/choices"
    answer = live.client.get(link)
    assert answer.headers["content-type"] == "application/json"
    assert int(answer.headers["content-length"]) == len(answer.content)
    data = answer.json()["data"]
    assert [line["index"] for line in data] == [0, 1, 2]
    assert scored["scored"]["answered"] == 3
    assert scored["scored"]["correct"] == sum(line["correct"] for line in data)
    assert scored["scored"]["shared"] > 0, "the space before four is a part of its token"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_dir), AutoTokenizer.from_pretrained(tiny_dir)
    prompt, choices = QUESTIONS[0]["prompt"], QUESTIONS[0]["choices"]
    length = len(tokenizer(prompt)["input_ids"])
    for number, choice in enumerate(choices):
        ids = tokenizer(prompt + choice, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            logprobs = torch.log_softmax(model(ids).logits[0], -1)
        total = sum(float(logprobs[place - 1, ids[0, place]]) for place in range(length, ids.shape[1]))
        assert data[0]["logprobs"][number] == pytest.approx(total, abs=1e-4)
        assert data[0]["logprobs_per_token"][number] == pytest.approx(total / (ids.shape[1] - length), abs=1e-4)
    for rows, part in (("1-2", data[1:]), ("0", data[:1]), ("2", data[2:])):
        cut = live.client.get(link, params={"rows": rows})
        assert cut.json()["data"] == part
        assert int(cut.headers["content-length"]) == len(cut.content)
        assert cut.headers["etag"] != answer.headers["etag"]
    same = live.client.get(link, headers={"If-None-Match": answer.headers["etag"]})
    assert (same.status_code, same.content) == (304, b"")
    for query in ({"rows": "2-3"}, {"rows": "x"}, {"variant": "base"}):
        problem(live.client.get(link, params=query), 422, "invalid-request")


def test_an_extraction_without_scores_has_none(live: Stack) -> None:
    plain = live.extract(QUESTIONS, model="tiny", layers=[2])
    assert plain["scored"] is None
    assert "choices" not in plain["links"]
    problem(live.client.get(f"/v1/extractions/{plain['id']}/choices"), 404, "not-found")


def test_scores_go_with_their_extraction(live: Stack) -> None:
    made = live.extract(QUESTIONS[:1], **SCORING)
    folder = live.data_dir / "artifacts" / "blobs" / made["id"]
    assert len(list(folder.glob("*"))) == 3
    assert live.client.delete(made["links"]["self"]).status_code == 204
    problem(live.client.get(made["links"]["choices"]), 404, "not-found")
    assert not list(folder.glob("*"))


ASK = {"prompt": "a", "choices": ["b", "c"], "answer": 0}


@pytest.mark.parametrize(
    ("bad", "pointer"),
    [
        ({**ASK, "choices": ["b"]}, "/inputs/1/choices"),
        ({**ASK, "choices": ["b", ""]}, "/inputs/1/choices/1"),
        ({**ASK, "choices": ["b", "c", "b"]}, "/inputs/1/choices"),
        ({**ASK, "choices": [f"c{number}" for number in range(65)]}, "/inputs/1/choices"),
        ({**ASK, "answer": 2}, "/inputs/1/answer"),
        ({**ASK, "answer": -1}, "/inputs/1/answer"),
        ({**ASK, "answer": "b"}, "/inputs/1/answer"),
        ({"prompt": "a", "answer": 0}, "/inputs/1/answer"),
        ({"prompt": "a", "answer": " "}, "/inputs/1/answer"),
        ({"prompt": "a", "choices": ["b", "c"]}, "/inputs/1/answer"),
        ({**ASK, "prompt": ["a"]}, "/inputs/1/prompt"),
        ("a text", "/inputs/1"),
        ({"token_ids": [1]}, "/inputs/1"),
    ],
)
def test_bad_questions_are_refused_at_once(live: Stack, bad: Any, pointer: str) -> None:
    answer = live.post("/v1/extractions", {**SCORING, "inputs": [ASK, bad]})
    assert answer.status_code == 422, answer.text
    assert answer.json()["errors"][0]["pointer"].startswith(pointer)


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [({"stop": [""]}, "/stop/0"), ({"max_new_tokens": 0}, "/max_new_tokens"), ({"match": "fuzzy"}, "/match")],
)
def test_bad_options_are_refused_at_once(live: Stack, fields: dict[str, Any], pointer: str) -> None:
    document = problem(live.post("/v1/extractions", {**SCORING, "inputs": [ASK], **fields}), 422, "invalid-request")
    assert document["errors"][0]["pointer"] == pointer


@pytest.mark.parametrize(
    ("bad", "pointer"),
    [
        ({**ASK, "choices": ["b", "deep " * 600]}, "/inputs/1/choices/1"),
        ({"prompt": "deep " * 600, "answer": "b"}, "/inputs/1"),
    ],
)
def test_what_is_too_long_fails_the_job_with_its_pointer(live: Stack, bad: Any, pointer: str) -> None:
    job = live.post("/v1/extractions", {**SCORING, "inputs": [ASK, bad]}).json()
    assert (job["status"], job["error"]["status"]) == ("failed", 422)
    assert [error["pointer"] for error in job["error"]["errors"]] == [pointer]


def test_an_encoder_scores_nothing(live: Stack) -> None:
    job = live.post("/v1/extractions", {**SCORING, "model": "minilm", "inputs": [ASK]}).json()
    assert job["status"] == "failed"
    assert job["error"]["errors"][0]["pointer"] == "/score_choices"


def test_choices_count_towards_the_tokens_of_a_request(live: Stack) -> None:
    long = {"prompt": "word " * 1600, "choices": [f" {number}" for number in range(64)], "answer": 0}
    body = {**SCORING, "model": "smollm2", "inputs": [long] * 300}
    document = problem(live.post("/v1/extractions", body), 413, "too-large")
    assert document["estimate"] > document["limit"]


# --- probes -----------------------------------------------------------------------------------------------


def test_the_sdk_gives_scores_as_objects_and_arrays(live: Stack, scored: dict[str, Any]) -> None:
    with bathyscope.Client(live.url) as client:
        states = client.extractions.get(scored["id"])
        choices = states.choices()
        assert (len(choices), choices[0].index, choices[-1].answer is not None) == (3, 0, True)
        assert isinstance(states.scored, bathyscope.types.Scored)
        assert choices.accuracy == pytest.approx(states.scored.correct / 3)
        assert choices.correct.dtype == bool
        assert choices.confidence.mean() == pytest.approx(states.scored.confidence)
        assert choices.logprobs.shape == (3, 3)
        assert np.isnan(choices.logprobs).tolist() == [[False, False, True], [False] * 3, [False, True, True]]
        assert choices.picked[2] == -1
        picked = choices[1].picked
        assert picked == int(np.argmax(choices.logprobs[1]))
        assert [one.index for one in states.choices(rows=slice(1, 3))] == [1, 2]
        assert [one.index for one in states.choices(rows="1")] == [1]
        assert repr(choices) == f"<Choices of 3 questions, {states.scored.correct} right>"

    async def later() -> list[int]:
        async with bathyscope.AsyncClient(live.url) as client:
            states = await client.extractions.get(scored["id"])
            return [one.index for one in await states.choices(rows=-1)]

    assert asyncio.run(later()) == [2]


def test_the_command_line_writes_scores_beside_the_states(live: Stack, tmp_path: Path) -> None:
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    words = ["extract", "--url", live.url, "--model", "tiny", "--layers", "2", "--input", str(tmp_path / "asked.jsonl")]
    words += ["--output", str(tmp_path / "states.npy"), "--choices", str(tmp_path / "choices.jsonl")]
    ended = CliRunner().invoke(app, words)
    assert ended.exit_code == 0, ended.output
    found = [json.loads(line) for line in (tmp_path / "choices.jsonl").read_text().splitlines()]
    assert [line["index"] for line in found] == [0, 1, 2]
    assert f"{sum(line['correct'] for line in found)} of 3 right" in ended.output


def test_a_confidence_probe_on_arithmetic(live: Stack) -> None:
    count = 60
    with bathyscope.Client(live.url) as client:
        questions = bathyscope.datasets.arithmetic(count, difficulty=1)
        states = client.extractions.create(model="smollm2", inputs=questions, layers=[10, 20], score_choices=True).wait(
            timeout=500
        )
        choices = states.choices()
        assert isinstance(states.scored, bathyscope.types.Scored)
        assert 0.3 < choices.accuracy < 1, "neither always right nor always wrong"
        probe = client.probes.create(
            extraction=states, labels="correct", C=[0.01], folds=3, bootstrap=100, baselines=["model_confidence"]
        ).wait(timeout=300)
        fresh = probe.predict(bathyscope.datasets.arithmetic(3, difficulty=1, seed=1))
    assert probe.classes == [False, True]
    assert fresh.array().shape == (3, 2)
    report = probe.report.model_dump()["confidence"]
    correct, confidence = choices.correct, choices.confidence
    assert (report["rows"], report["accuracy"]["value"]) == (count, pytest.approx(choices.accuracy))
    order = np.argsort(-confidence, kind="stable")
    risks = np.cumsum(~correct[order]) / np.arange(1, count + 1)
    assert report["model"]["aurc"]["value"] == pytest.approx(risks.mean(), abs=1e-9)
    within = report["model"]["auroc"]["value"]
    assert within == pytest.approx(roc_auc_score(correct, confidence), abs=0.15), "compared within folds"
    assert report["probe"]["auroc"] == probe.report.held_out.auroc.model_dump()
    assert report["probe"]["ece"] == probe.report.held_out.ece.model_dump()
    for side in ("probe", "model"):
        mine = report[side]
        curve = mine["risk_coverage"]
        assert curve["coverage"][-1] == 1
        assert curve["risk"][-1] == pytest.approx(1 - choices.accuracy)
        assert report["optimal_aurc"] <= mine["aurc"]["value"] <= 1
        assert mine["excess_aurc"]["value"] == pytest.approx(mine["aurc"]["value"] - report["optimal_aurc"])
        for figure in (mine["aurc"], mine["auroc"], mine["brier"], *mine["accuracy_at_coverage"].values()):
            assert figure["low"] <= figure["value"] <= figure["high"]
    assert report["difference"]["aurc"]["value"] == pytest.approx(
        report["probe"]["aurc"]["value"] - report["model"]["aurc"]["value"]
    )


WORDS = ["cold", "warm", "dark", "bright", "deep", "flat"]
MIXED = [
    {"prompt": f"The water is {word}, number {number}", "choices": [" a", " deep"], "answer": number % 2}
    for number in range(6)
    for word in WORDS
]


@pytest.mark.parametrize("source", ["extraction", "job", "data"])
def test_labels_come_from_the_choices(live: Stack, source: str) -> None:
    body: dict[str, Any] = {"labels": "correct", "C": [1.0], "bootstrap": 0, "folds": 3}
    if source == "data":
        body["data"] = {**SCORING, "inputs": MIXED}
    elif source == "job":
        body["extraction"] = live.post("/v1/extractions", {**SCORING, "inputs": MIXED}, wait=0).json()["id"]
    else:
        body["extraction"] = live.extract(MIXED, **SCORING)["id"]
    probe = train(live, **body)
    states = live.client.get(f"/v1/extractions/{probe['extraction']}").json()
    counts = [len(MIXED) - states["scored"]["correct"], states["scored"]["correct"]]
    assert probe["report"]["class_counts"] == counts
    assert min(counts) > 0
    assert probe["report"]["confidence"]["rows"] == len(MIXED)
    assert len(predict(live, probe, inputs=MIXED[:2])["probabilities"]) == 2


def test_labels_need_scores(live: Stack) -> None:
    plain = live.extract(MIXED, model="tiny", layers=[2])
    job = live.post("/v1/extractions", {"model": "tiny", "inputs": MIXED}, wait=0).json()
    for source in (
        {"extraction": plain["id"]},
        {"extraction": job["id"]},
        {"data": {"model": "tiny", "inputs": MIXED}},
    ):
        document = problem(live.post("/v1/probes", {**source, "labels": "correct"}), 422, "invalid-request")
        assert document["errors"][0]["pointer"] == "/labels"
        assert "score_choices" in document["errors"][0]["detail"]
        body = {**source, "labels": [0, 1] * 18, "baselines": ["length", "model_confidence"]}
        document = problem(live.post("/v1/probes", body), 422, "invalid-request")
        assert document["errors"][0]["pointer"] == "/baselines/1"


def test_confidence_goes_with_labels_that_say_where_the_model_is_right(live: Stack) -> None:
    states = live.extract(MIXED, **SCORING)
    correct = [line["correct"] for line in live.client.get(states["links"]["choices"]).json()["data"]]

    def probe(labels: Any) -> Any:
        body = {"extraction": states["id"], "labels": labels, "C": [0.01], "folds": 2, "bootstrap": 50}
        return live.job(live.post("/v1/probes", body | {"baselines": ["model_confidence"]}).json()["id"])

    reports = [
        live.client.get(probe(labels)["resource"]).json()["report"]["confidence"]
        for labels in ("correct", correct, [int(one) for one in correct])
    ]
    assert reports[0] == reports[1] == reports[2]
    assert reports[0]["accuracy"]["value"] == pytest.approx(sum(correct) / len(correct))
    for labels in (["right" if one else "wrong" for one in correct], [not one for one in correct]):
        ended = probe(labels)
        assert [error["pointer"] for error in ended["error"]["errors"]] == ["/baselines/0"]


def test_a_model_that_is_always_right_or_always_wrong_teaches_nothing(live: Stack) -> None:
    made = live.extract(MIXED, **SCORING)
    picked = [line["picked"] for line in live.client.get(made["links"]["choices"]).json()["data"]]
    for answers, word in ((picked, "right"), ([1 - one for one in picked], "wrong")):
        inputs = [{**one, "answer": answer} for one, answer in zip(MIXED, answers, strict=True)]
        states = live.extract(inputs, **SCORING)
        assert states["scored"]["correct"] == (len(MIXED) if word == "right" else 0)
        answer = live.post("/v1/probes", {"extraction": states["id"], "labels": "correct"})
        document = problem(answer, 422, "invalid-request")
        assert document["errors"][0]["pointer"] == "/labels"
        assert f"{word} on all 36" in document["errors"][0]["detail"]
        job = live.post("/v1/probes", {"data": {**SCORING, "inputs": inputs}, "labels": "correct"}).json()
        ended = live.job(job["id"])
        assert ended["error"]["errors"] == document["errors"]


def test_a_paired_extraction_has_scores_of_each_variant(tmp_path: Path, models: str) -> None:
    with stack(tmp_path, noop=True, models=models, worker__adopt_seconds=0) as noop:
        adapter = added(noop.client, archive("one"))
        states = noop.extract(MIXED, adapter=["base", adapter["id"]], **SCORING)
        assert [one["correct"] for one in states["scored"]] == [18, 35]
        link = states["links"]["choices"]
        document = problem(noop.client.get(link), 422, "invalid-request")
        assert document["errors"][0]["pointer"] == "/variant"
        for number, name in enumerate(("base", adapter["id"])):
            data = noop.client.get(link, params={"variant": name}).json()["data"]
            assert [line["index"] for line in data] == list(range(36))
            assert sum(line["correct"] for line in data) == states["scored"][number]["correct"]
            part = noop.client.get(link, params={"variant": name, "rows": "3-4"}).json()["data"]
            assert part == data[3:5]
        with bathyscope.Client(noop.url) as client:
            tuned = client.extractions.get(states["id"]).choices(variant=client.adapters.get(adapter["id"]))
        assert tuned.correct.sum() == 35
