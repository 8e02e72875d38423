"""Asking probes: several in one pass, token by token, at thresholds, under the right identity, after a restart."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save_file

import bathyscope
from tests.service.test_extractions import npy
from tests.service.test_manners import problem
from tests.service.test_probes import INPUTS, LABELS, predict, train
from tests.stack import Stack, stack

TEXTS = ["The water is cold today 🐟.", "Calm  and deep,\ntonight", "é flat"]
THREE = [("low", "middle", "high")[k % 3] for k in range(8) for _ in range(10)]


@pytest.fixture(scope="module")
def mean(live: Stack) -> dict[str, Any]:
    return live.extract(INPUTS, model="tiny", pooling="mean")


@pytest.fixture(scope="module")
def every(live: Stack) -> dict[str, Any]:
    """Every token of the same texts."""
    return live.extract(INPUTS, model="tiny", pooling="none")


@pytest.fixture(scope="module")
def day(live: Stack, mean: dict[str, Any]) -> dict[str, Any]:
    return train(live, extraction=mean["id"], labels=LABELS, C=[1.0], bootstrap=0, layers=[2])


@pytest.fixture(scope="module")
def low(live: Stack, mean: dict[str, Any]) -> dict[str, Any]:
    return train(live, extraction=mean["id"], labels=THREE, C=[1.0], bootstrap=0, layers=[1])


@pytest.fixture(scope="module")
def last(live: Stack) -> dict[str, Any]:
    states = live.extract(INPUTS, model="tiny", pooling="last")
    return train(live, extraction=states["id"], labels=LABELS, C=[1.0], bootstrap=0, layers=[4])


def local(live: Stack, probe: dict[str, Any], folder: Path) -> Any:
    """The probe, downloaded and loaded by the client."""
    path = folder / "probe.safetensors"
    path.write_bytes(live.client.get(probe["links"]["weights"]).content)
    return bathyscope.Probe.load(path)


# --- several probes ---


def test_several_probes_read_stored_states(
    live: Stack, mean: dict[str, Any], day: dict[str, Any], low: dict[str, Any]
) -> None:
    alone, other = (predict(live, one, extraction=mean["id"]) for one in (day, low))
    both = predict(live, day, extraction=mean["id"], also=[low["id"]])
    assert both["probabilities"] == alone["probabilities"]
    [further] = both["also"]
    assert (further["probe"], further["layer"], further["task"]) == (low["id"], 1, "multiclass")
    for name in ("probabilities", "labels", "classes", "identity"):
        assert further[name] == other[name]
    assert (both["layer"], both["task"]) == (2, "binary")


def test_several_probes_read_new_inputs_in_one_pass(
    live: Stack, day: dict[str, Any], low: dict[str, Any], last: dict[str, Any]
) -> None:
    """Of different layers and poolings, at the price of one: the job's tokens are counted once."""
    both = predict(live, day, inputs=TEXTS, also=[low["id"], last["id"]])
    for found, probe in zip((both, *both["also"]), (day, low, last), strict=True):
        alone = predict(live, probe, inputs=TEXTS)
        assert np.allclose(found["probabilities"], alone["probabilities"], atol=1e-5)
        assert (found["labels"], found["identity"]) == (alone["labels"], probe["identity"])
        assert found["transfer"] is False
    assert both["also"][1]["identity"]["pooling"] == "last"


def test_lists_describe_them_without_their_numbers(live: Stack, day: dict[str, Any], low: dict[str, Any]) -> None:
    made = predict(live, day, inputs=TEXTS, also=[low["id"]], per_token=True)
    listed = live.client.get("/v1/predictions", params={"limit": 1}).json()["data"][0]
    assert listed["id"] == made["id"]
    assert (listed["probabilities"], listed["also"][0]["probabilities"]) == ([], [])
    assert "tokens" not in listed


@pytest.mark.parametrize("also", [["self"], ["low", "low"]])
def test_a_probe_named_twice_is_refused(live: Stack, day: dict[str, Any], low: dict[str, Any], also: list[str]) -> None:
    ids = [{"self": day, "low": low}[name]["id"] for name in also]
    document = problem(
        live.post(f"/v1/probes/{day['id']}/predict", {"inputs": TEXTS, "also": ids}), 422, "invalid-request"
    )
    assert document["errors"][0]["pointer"] == f"/also/{len(also) - 1}"


def test_probes_that_cannot_share_a_pass(live: Stack, day: dict[str, Any]) -> None:
    path = f"/v1/probes/{day['id']}/predict"
    missing = live.post(path, {"inputs": TEXTS, "also": ["prb_00000000000000000000000000"]})
    assert problem(missing, 404, "not-found")["errors"][0]["pointer"] == "/also/0"

    states = live.extract(INPUTS, model="tiny", pooling="mean", template="chat")
    chat = train(live, extraction=states["id"], labels=LABELS, C=[1.0], bootstrap=0, layers=[2])
    document = problem(live.post(path, {"inputs": TEXTS, "also": [chat["id"]]}), 409, "identity-mismatch")
    assert document["differs"] == ["template"]
    assert chat["id"] in document["detail"]
    moved = predict(live, day, inputs=TEXTS, also=[chat["id"]], transfer=True)
    assert (moved["transfer"], moved["also"][0]["transfer"]) == (False, True)
    assert moved["also"][0]["identity"] == day["identity"]

    states = live.extract(INPUTS, model="tiny", pooling="mean", max_length=64, truncation="left")
    cut = train(live, extraction=states["id"], labels=LABELS, C=[1.0], bootstrap=0, layers=[2])
    document = problem(live.post(path, {"inputs": TEXTS, "also": [cut["id"]]}), 409, "identity-mismatch")
    assert sorted(document["differs"]) == ["max_length", "truncation"]

    states = live.extract(INPUTS, model="minilm", pooling="mean", layers=[2])
    wide = train(live, extraction=states["id"], labels=LABELS, C=[1.0], bootstrap=0)
    for source in ({"inputs": TEXTS}, {"extraction": day["extraction"]}):
        answer = live.post(path, {**source, "also": [wide["id"]], "transfer": True})
        document = problem(answer, 422, "invalid-request")
        assert document["errors"][0]["pointer"] == "/also/0"
        assert "384" in document["errors"][0]["detail"]


# --- token by token ---


def test_tokens_lie_in_the_text(live: Stack, day: dict[str, Any], tmp_path: Path) -> None:
    found = predict(live, day, inputs=TEXTS, per_token=True)
    assert found["rendered"] == [None] * 3
    probe = local(live, day, tmp_path)
    states = live.extract(TEXTS, model="tiny", pooling="none", layers=[2])
    expected = probe.predict_tokens(npy(live, states)[:, 0])[:, 1]
    scores = [token["score"] for tokens in found["tokens"] for token in tokens]
    assert np.allclose(scores, expected, atol=1e-5)
    for text, tokens in zip(TEXTS, found["tokens"], strict=True):
        assert all(token["text"] == text[token["start"] : token["end"]] for token in tokens)
        assert not any(token["special"] for token in tokens)
        held = {place for token in tokens for place in range(token["start"], token["end"])}
        assert {place for place, letter in enumerate(text) if not letter.isspace()} <= held
        assert [token["start"] for token in tokens] == sorted(token["start"] for token in tokens)
    fish = [token for token in found["tokens"][0] if token["text"] == "🐟"]
    assert len(fish) >= 1
    assert {(token["start"], token["end"]) for token in fish} == {(24, 25)}
    # the inputs as a whole are read as ever
    assert np.allclose(found["probabilities"], predict(live, day, inputs=TEXTS)["probabilities"], atol=1e-5)


def test_tokens_of_a_chat_lie_in_the_rendered_text(live: Stack, day: dict[str, Any]) -> None:
    chat = {"messages": [{"role": "user", "content": "How deep?"}]}
    found = predict(live, day, inputs=[chat, "plain", {"token_ids": [40, 41]}], per_token=True)
    rendered = found["rendered"][0]
    assert rendered == "<s>user: How deep?</s><s>assistant: "
    assert found["rendered"][1:] == [None, None]
    first, second, third = found["tokens"]
    assert all(token["text"] == rendered[token["start"] : token["end"]] for token in first)
    assert [token["text"] for token in first if token["special"]] == ["<s>", "</s>", "<s>"]
    assert "".join(token["text"] for token in second) == "plain"
    assert [(token["id"], token["start"], token["end"]) for token in third] == [(40, None, None), (41, None, None)]
    assert all(token["text"] for token in third)


def test_added_special_tokens_lie_nowhere(live: Stack) -> None:
    states = live.extract(INPUTS, model="minilm", pooling="mean", layers=[3], max_length=12, truncation="right")
    probe = train(live, extraction=states["id"], labels=LABELS, C=[1.0], bootstrap=0)
    text = "The quick brown fox dives into the deep blue water and is not seen again today."
    found = predict(live, probe, inputs=[text], per_token=True)
    [tokens] = found["tokens"]
    assert len(tokens) == 12
    assert [token["text"] for token in tokens if token["special"]] == ["[CLS]", "[SEP]"]
    assert (tokens[0]["start"], tokens[-1]["end"], tokens[0]["special"]) == (None, None, True)
    assert [token["text"] for token in tokens[1:4]] == ["The", "quick", "brown"]
    assert tokens[-2]["text"] == text[tokens[-2]["start"] : tokens[-2]["end"]]
    assert tokens[-2]["end"] < len(text)


def test_further_probes_score_the_same_tokens(live: Stack, day: dict[str, Any], low: dict[str, Any]) -> None:
    found = predict(live, day, inputs=TEXTS, also=[low["id"]], per_token=True)
    [further] = found["also"]
    assert [len(one) for one in further["token_scores"]] == [len(one) for one in found["tokens"]]
    own = predict(live, low, inputs=TEXTS, per_token=True)
    for scores, tokens in zip(further["token_scores"], own["tokens"], strict=True):
        assert np.allclose(scores, [token["score"] for token in tokens], atol=1e-5)
        assert np.allclose(np.sum(scores, axis=1), 1)


def test_a_stored_extraction_of_every_token(
    live: Stack, mean: dict[str, Any], every: dict[str, Any], day: dict[str, Any]
) -> None:
    """It serves a probe on pooled states: its tokens are pooled as the probe's are."""
    pooled = predict(live, day, extraction=mean["id"])
    found = predict(live, day, extraction=every["id"], per_token=True)
    assert np.allclose(found["probabilities"], pooled["probabilities"], atol=1e-5)
    assert (found["identity"], found["transfer"]) == (day["identity"], False)
    token = found["tokens"][0][0]
    assert (token["text"], token["start"], token["special"]) == (None, None, None)
    fresh = predict(live, day, inputs=INPUTS[:3], per_token=True)
    for stored, new in zip(found["tokens"], fresh["tokens"], strict=False):
        assert [one["id"] for one in stored] == [one["id"] for one in new]
        assert np.allclose([one["score"] for one in stored], [one["score"] for one in new], atol=1e-5)


def test_pooled_states_have_no_tokens(live: Stack, mean: dict[str, Any], day: dict[str, Any]) -> None:
    answer = live.post(f"/v1/probes/{day['id']}/predict", {"extraction": mean["id"], "per_token": True})
    document = problem(answer, 422, "invalid-request")
    assert document["errors"][0]["pointer"] == "/per_token"
    assert "pooling none" in document["errors"][0]["detail"]


def test_some_tokens_are_not_the_pooled_states(live: Stack, day: dict[str, Any]) -> None:
    some = live.extract(INPUTS[:4], model="tiny", pooling="none", positions={"tokens": [-1]})
    answer = live.post(f"/v1/probes/{day['id']}/predict", {"extraction": some["id"], "transfer": True})
    assert problem(answer, 422, "invalid-request")["errors"][0]["pointer"] == "/extraction"


def test_the_positions_of_a_probe_are_its_own(live: Stack) -> None:
    states = live.extract(INPUTS, model="tiny", pooling="max", positions={"span": [1, -2]})
    probe = train(live, extraction=states["id"], labels=LABELS, C=[1.0], bootstrap=0, layers=[2])
    alone = predict(live, probe, inputs=TEXTS)
    found = predict(live, probe, inputs=TEXTS, per_token=True)
    assert np.allclose(found["probabilities"], alone["probabilities"], atol=1e-5)
    job = live.post(f"/v1/probes/{probe['id']}/predict", {"inputs": ["a fine day", "a"], "per_token": True}).json()
    assert job["status"] == "failed"
    assert (job["error"]["status"], job["error"]["errors"][0]["pointer"]) == (422, "/inputs/1")


def test_too_many_tokens_are_refused_at_once(live: Stack, day: dict[str, Any]) -> None:
    body = {"inputs": ["deep " * 1000] * 80, "per_token": True}
    document = problem(live.post(f"/v1/probes/{day['id']}/predict", body), 413, "too-large")
    assert document["estimate"] > document["limit"]


# --- every kind of probe ---


NUMBERS = [float(k % 5) + 0.25 * (row % 3) for k in range(8) for row in range(10)]

KINDS: dict[str, dict[str, Any]] = {
    "isotonic": {"estimator": "lda", "calibration": "isotonic", "labels": LABELS},
    "temperature": {"estimator": "logistic", "calibration": "temperature", "labels": THREE},
    "ridge": {"estimator": "ridge", "labels": NUMBERS},
    "mlp": {"estimator": "mlp", "calibration": "platt", "labels": THREE},
    "mlp of values": {"estimator": "mlp", "labels": NUMBERS},
    "attention": {"estimator": "attention", "calibration": "platt", "labels": LABELS},
    "attention of values": {"estimator": "attention", "labels": NUMBERS},
    "max_mean": {"estimator": "max_mean", "labels": THREE},
}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_of_probe(
    live: Stack, mean: dict[str, Any], every: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    """On stored states the bits of the file in the client's hands; on new inputs the same numbers; token by token."""
    body = KINDS[kind]
    on_tokens = body["estimator"] in ("attention", "max_mean")
    states = every if on_tokens else mean
    probe = train(live, extraction=states["id"], bootstrap=0, layers=[2], folds=3, **body)
    member = "values" if probe["task"] == "regression" else "probabilities"
    loaded = local(live, probe, tmp_path)
    array = npy(live, states)[:, states["layers"].index(2)]
    offsets = None
    if on_tokens:
        offsets = live.client.get(f"/v1/extractions/{states['id']}/hidden_states", params={"format": "safetensors"})
        offsets = load_safetensors(offsets.content)["offsets"]
    stored = predict(live, probe, extraction=states["id"])
    assert loaded.predict(array, offsets).tolist() == stored[member]
    assert len(stored["labels"]) == (0 if member == "values" else len(INPUTS))
    assert stored["labels"] == loaded.labels(loaded.predict(array, offsets))
    fresh = predict(live, probe, inputs=INPUTS[:5], per_token=True)
    assert np.allclose(fresh[member], stored[member][:5], atol=1e-4)
    whole = array if on_tokens else npy(live, every)[:, every["layers"].index(2)]
    scores = loaded.predict_tokens(whole[: sum(len(one) for one in fresh["tokens"])])
    found = [token["score"] for tokens in fresh["tokens"] for token in tokens]
    assert np.allclose(found, scores[:, 1] if probe["task"] == "binary" else scores, atol=1e-4)
    answer = live.client.get(probe["links"]["weights"], params={"format": "onnx"})
    if on_tokens:
        assert problem(answer, 422, "invalid-request")["errors"][0]["pointer"] == "/format"
    else:
        session = onnxruntime.InferenceSession(answer.content, providers=["CPUExecutionProvider"])
        assert np.allclose(session.run(None, {"states": array})[0], stored[member], atol=1e-6, rtol=1e-6)
    card = live.client.get(probe["links"]["weights"], params={"format": "card"}).text
    assert f"`{body['estimator']}`" in card


def test_a_probe_on_tokens_needs_them(live: Stack, mean: dict[str, Any], every: dict[str, Any]) -> None:
    probe = train(live, extraction=every["id"], labels=LABELS, estimator="attention", layers=[2], bootstrap=0, folds=2)
    answer = live.post(f"/v1/probes/{probe['id']}/predict", {"extraction": mean["id"], "transfer": True})
    document = problem(answer, 422, "invalid-request")
    assert document["errors"][0]["pointer"] == "/extraction"
    assert "pooling none" in document["errors"][0]["detail"]


def test_probes_on_tokens_and_on_vectors_share_a_pass(live: Stack, every: dict[str, Any], day: dict[str, Any]) -> None:
    body = {"labels": LABELS, "estimator": "max_mean", "bootstrap": 0, "folds": 2}
    tokens = train(live, extraction=every["id"], layers=[4], **body)
    states = live.extract(INPUTS, model="tiny", pooling="none", positions={"span": [0, -1]}, layers=[3])
    some = train(live, extraction=states["id"], **body)
    for source in ({"inputs": INPUTS[:4]}, {"extraction": every["id"]}):
        both = predict(live, day, also=[tokens["id"], some["id"]], **source)
        for found, probe in zip((both, *both["also"]), (day, tokens, some), strict=True):
            alone = predict(live, probe, **source)
            assert np.allclose(found["probabilities"], alone["probabilities"], atol=1e-5)
            assert found["identity"] == probe["identity"]
    stored = predict(live, some, extraction=states["id"])
    assert np.allclose(stored["probabilities"], both["also"][1]["probabilities"], atol=1e-5)


# --- thresholds ---


def test_decisions(live: Stack, mean: dict[str, Any], day: dict[str, Any], tmp_path: Path) -> None:
    assert predict(live, day, extraction=mean["id"])["decisions"] == []
    probe = local(live, day, tmp_path)
    assert set(probe.thresholds) == {"default", "target_fpr", "youden", "f1"}
    thresholds = {**probe.thresholds, 0.99: 0.99}
    for asked, threshold in thresholds.items():
        found = predict(live, day, extraction=mean["id"], threshold=asked)
        expected = [row[1] >= threshold for row in found["probabilities"]]
        assert (found["threshold"], found["decisions"]) == (threshold, expected)
        assert probe.decisions(np.array(found["probabilities"]), asked) == expected
    assert any(expected)
    assert not all(expected)
    fresh = predict(live, day, inputs=TEXTS, threshold=0.0)
    assert fresh["decisions"] == [True] * 3


@pytest.mark.parametrize("threshold", [1.5, -0.1, "highest", True, "0.5"])
def test_thresholds_that_are_none(live: Stack, day: dict[str, Any], threshold: Any) -> None:
    answer = live.post(f"/v1/probes/{day['id']}/predict", {"inputs": TEXTS, "threshold": threshold})
    assert problem(answer, 422, "invalid-request")["errors"][0]["pointer"] == "/threshold"


def test_only_binary_probes_have_thresholds(live: Stack, day: dict[str, Any], low: dict[str, Any]) -> None:
    for probe, body in ((low, {}), (day, {"also": [low["id"]]})):
        answer = live.post(f"/v1/probes/{probe['id']}/predict", {"inputs": TEXTS, "threshold": 0.5, **body})
        document = problem(answer, 422, "invalid-request")
        assert document["errors"][0]["pointer"] == "/threshold"
        assert low["id"] in document["errors"][0]["detail"]


# --- files ---


def test_onnx_gives_the_services_probabilities(
    live: Stack, mean: dict[str, Any], day: dict[str, Any], low: dict[str, Any]
) -> None:
    for probe in (day, low):
        answer = live.client.get(probe["links"]["weights"], params={"format": "onnx"})
        assert answer.headers["content-type"] == "application/onnx"
        assert ".onnx" in answer.headers["content-disposition"]
        session = onnxruntime.InferenceSession(answer.content, providers=["CPUExecutionProvider"])
        states = npy(live, mean)[:, mean["layers"].index(probe["layer"])]
        [found] = session.run(None, {"states": states})
        expected = predict(live, probe, extraction=mean["id"])["probabilities"]
        assert np.abs(found - expected).max() < 1e-6


def test_the_card_says_what_it_is(live: Stack, mean: dict[str, Any]) -> None:
    name = "`<script>alert(1)</script>` | ## day\nnight"
    probe = train(live, extraction=mean["id"], labels=LABELS, C=[1.0], bootstrap=50, layers=[2], name=name)
    answer = live.client.get(probe["links"]["weights"], params={"format": "card"})
    assert answer.headers["content-type"] == "text/markdown; charset=utf-8"
    text = answer.text
    auroc = probe["report"]["held_out"]["auroc"]
    assert f"| AUROC | {auroc['value']:.4f} | {auroc['low']:.4f} | {auroc['high']:.4f} |" in text
    for wanted in ("`tiny`", mean["id"], "`mean`", "layer 2", "`true`", "bathyscope.Probe.load", "| `default` | 0.5 |"):
        assert wanted in text, wanted
    assert all(" ".join(warning.split())[:20] in text.replace("\\", "") for warning in probe["report"]["warnings"])
    assert "'<script>alert(1)</script>' ¦ ## day night" in text
    assert sum(line.startswith("#") for line in text.splitlines()) == 6


def test_other_formats_are_refused(live: Stack, day: dict[str, Any]) -> None:
    answer = live.client.get(day["links"]["weights"], params={"format": "pickle"})
    assert problem(answer, 422, "invalid-request")["errors"][0]["pointer"] == "/format"


# --- the client ---


def test_the_client(
    live: Stack, mean: dict[str, Any], day: dict[str, Any], low: dict[str, Any], tmp_path: Path
) -> None:
    with bathyscope.Client(live.url) as client:
        probe, other = client.probes.get(day["id"]), client.probes.get(low["id"])
        found = probe.predict(TEXTS, per_token=True, also=[other])
        assert found.tokens is not None
        assert TEXTS[0].startswith(found.tokens[0][0].text or "nothing")
        assert found.also[0].classes == ["high", "low", "middle"]
        assert len(probe.predict(TEXTS, threshold="default").decisions) == 3
        for name in ("probe.safetensors", "probe.onnx", "probe.md"):
            probe.save_weights(tmp_path / name)
        assert (tmp_path / "probe.md").read_text().startswith(f"# Probe {probe.id}")
        onnxruntime.InferenceSession((tmp_path / "probe.onnx").read_bytes(), providers=["CPUExecutionProvider"])
        states = client.extractions.get(mean["id"]).hidden_states(layers=[2])[:, 0]
        read = bathyscope.Probe.load(tmp_path / "probe.safetensors").predict(states)
        assert np.array_equal(read, probe.predict(extraction=mean["id"]).array())


async def test_the_async_client(live: Stack, day: dict[str, Any], last: dict[str, Any], tmp_path: Path) -> None:
    async with bathyscope.AsyncClient(live.url) as client:
        probe = await client.probes.get(day["id"])
        found = await probe.predict(TEXTS, per_token=True, also=last["id"], threshold=0.25)
        assert found.threshold == 0.25
        assert found.also[0].token_scores is not None
        await probe.save_weights(tmp_path / "file", format="card")
        assert (tmp_path / "file").read_text().startswith("# Probe")


# --- a restart ---


@pytest.fixture
def installation(tmp_path: Path, models: str) -> Iterator[Stack]:
    with stack(tmp_path, models=models) as running:
        yield running


def test_the_same_bits_after_a_restart_of_everything(installation: Stack, tmp_path: Path) -> None:
    live = installation
    states = live.extract(INPUTS, model="tiny", pooling="mean", layers=[2, 4])
    probe = train(live, extraction=states["id"], labels=LABELS, C=[1.0], bootstrap=0, calibration="platt")
    before = predict(live, probe, extraction=states["id"])
    weights = live.client.get(probe["links"]["weights"]).content
    for name in ("service", "worker0"):
        live.kill(name)
    live.valkey.stop()
    live.valkey.start()
    live.up()
    assert live.client.get(f"/v1/probes/{probe['id']}").json() == probe
    after = predict(live, probe, extraction=states["id"])
    assert after["id"] != before["id"]
    assert after["probabilities"] == before["probabilities"]
    assert live.client.get(probe["links"]["weights"]).content == weights
    read = local(live, probe, tmp_path).predict(npy(live, states)[:, states["layers"].index(probe["layer"])])
    assert read.tolist() == before["probabilities"]


def test_a_model_that_was_exchanged_is_another(tmp_path: Path, tiny_dir: Path) -> None:
    """Same name, other weights: nothing is predicted under the probe's identity."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_dir, folder)
    (tmp_path / "data").mkdir()
    with stack(tmp_path / "data", models=f"tiny={folder}") as live:
        states = live.extract(INPUTS, model="tiny", pooling="mean", layers=[2])
        probe = train(live, extraction=states["id"], labels=LABELS, C=[1.0], bootstrap=0)
        live.processes["worker0"].terminate()
        live.processes["worker0"].wait(40)
        tensors = load_safetensors((folder / "model.safetensors").read_bytes())
        tensors["model.embed_tokens.weight"] *= 1.5
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        live.start("worker0", "worker")
        live.wait_ready()
        job = live.post(f"/v1/probes/{probe['id']}/predict", {"inputs": TEXTS}).json()
        assert job["status"] == "failed", job
        assert (job["error"]["type"], job["error"]["differs"]) == ("/problems/identity-mismatch", ["revision"])
        moved = predict(live, probe, inputs=TEXTS, transfer=True)
        assert moved["transfer"] is True
        assert moved["identity"]["revision"] != probe["identity"]["revision"]
