"""With two keys, neither reaches anything of the other's: every route of the OpenAPI document is tried.

The test walks the document. Ids in paths are those of things that Anna made, and Bert asks; fields
of bodies that take an id are given hers. Whatever the test has not been told of (a parameter, a field that may be a
text, a body) fails it, so that a new noun is not forgotten.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx2
import pytest

from bathyscope_backplane.ids import new_id
from tests.service.test_keys import as_user, make_key
from tests.stack import Stack

TEXTS = [f"annas text number {number}" for number in range(8)]
MARKS = ["annas text", "annas-metadata", "annas-name", "annas-idempotency"]

HERS = {
    "job_id": "job",
    "adapter_id": "ad",
    "extraction_id": "ext",
    "probe_id": "prb",
    "prediction_id": "prd",
    "dataset_id": "ds",
    "comparison_id": "cmp",
    "experiment_id": "exp",
}
"""Parameters of paths that are ids, and their prefix."""

NOUNS = {
    "jobs": "job",
    "adapters": "ad",
    "extractions": "ext",
    "probes": "prb",
    "predictions": "prd",
    "datasets": "ds",
    "comparisons": "cmp",
    "experiments": "exp",
}
"""What is listed, and the prefix of its ids."""

SHARED = {"name"}
"""Parameters that name what belongs to everybody: models."""

BODIES: dict[tuple[str, str], dict[str, Any]] = {
    ("post", "/v1/adapters"): {"source": "hf://berts/adapter", "base_model": "tiny"},
    ("post", "/v1/comparisons"): {"model": "tiny", "inputs": ["berts"] * 8, "labels": [0, 1] * 4, "folds": 2},
    ("post", "/v1/datasets"): {},
    ("post", "/v1/experiments"): {"model": {"name": "tiny"}},
    ("post", "/v1/extractions"): {"model": "tiny", "inputs": ["berts"]},
    ("post", "/v1/probes"): {"labels": [0, 1] * 4, "folds": 2},
    ("post", "/v1/probes/{probe_id}/predict"): {"inputs": ["berts"]},
    ("post", "/v1/models/{name}/load"): {},
    ("post", "/v1/models/{name}/unload"): {},
    ("post", "/v1/jobs/{job_id}/cancel"): {},
    ("post", "/v1/jobs/{job_id}/replay"): {},
}
"""A body with which each POST would work on one's own things; fields that take ids apart."""

ID_FIELDS = {"extraction", "adapter", "also", "id", "variants"}
"""Fields of bodies that take the id of something that belongs to a key."""

PLAIN_FIELDS = {
    *("model", "quantization", "layers", "pooling", "template", "truncation", "dtype", "compute_dtype", "match"),
    *("priority", "webhook", "task", "estimator", "calibration", "baselines", "name", "role", "content", "prompt"),
    *("answer", "choices", "labels", "groups", "split", "inputs", "messages", "metadata", "source", "base_model"),
    *("file", "threshold", "stop", "covariance"),
    *("format", "columns", "category", "config", "revision", "dataset"),
    *("quantizations", "checkpoint_path", "tinker_lora_path", "output_dir", "cache_dir"),
    *("variant",),  # of one's own extraction, among whose variants it is looked for
}
"""Fields that may be texts and are no ids."""

DATA = {"model": "tiny", "inputs": ["berts"] * 8}

WAYS: dict[tuple[str, str], list[Callable[[dict[str, Any], str], dict[str, Any]]]] = {
    ("/v1/probes", "extraction"): [lambda body, hers: {**body, "extraction": hers}],
    ("/v1/probes/{probe_id}/predict", "extraction"): [lambda body, hers: {"extraction": hers}],
    ("/v1/probes/{probe_id}/predict", "also"): [lambda body, hers: {**body, "also": [hers]}],
    ("/v1/extractions", "adapter"): [
        lambda body, hers: {**body, "adapter": hers},
        lambda body, hers: {**body, "adapter": ["base", hers]},
    ],
    ("/v1/probes", "adapter"): [lambda body, hers: {**body, "data": {**DATA, "adapter": hers}}],
    ("/v1/comparisons", "variants"): [lambda body, hers: {**body, "variants": ["base", hers]}],
    ("/v1/comparisons", "adapter"): [lambda body, hers: {**body, "quantizations": ["none", "8bit"], "adapter": hers}],
    ("/v1/comparisons", "id"): [
        lambda body, hers: {"model": "tiny", "quantizations": ["none", "8bit"], "dataset": {"id": hers}}
    ],
    ("/v1/experiments", "adapter"): [lambda body, hers: {"model": {"name": "tiny", "adapter": hers}}],
    ("/v1/experiments", "id"): [lambda body, hers: {**body, "dataset": {"id": hers}}],
    ("/v1/extractions", "id"): [lambda body, hers: {"model": "tiny", "dataset": {"id": hers}}],
    ("/v1/probes", "id"): [lambda body, hers: {**body, "data": {"model": "tiny", "dataset": {"id": hers}}}],
}
"""How each of these fields is given an id."""

ADMINS_ONLY = {"/v1/jobs/{job_id}/replay", "/v1/models/{name}/load", "/v1/models/{name}/unload", "/v1/audit"}


@dataclass
class Anna:
    """What one key has."""

    key: str
    ids: dict[str, list[str]] = field(default_factory=dict)
    secrets: list[str] = field(default_factory=list)
    """What must not show in any answer to another."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, models: str) -> Iterator[Stack]:
    made = Stack(tmp_path_factory.mktemp("shared"), models=models, noop=True)
    try:
        yield made.up()
    finally:
        made.down()


def finished(client: httpx2.Client, path: str, body: Any, **headers: str) -> dict[str, Any]:
    answer = client.post(path, json=body, headers={"Prefer": "wait=60", **headers}, timeout=90)
    assert answer.status_code == 200, answer.text
    job: dict[str, Any] = answer.json()
    assert job["status"] == "succeeded", job["error"]
    return job


def scoring(texts: list[str]) -> dict[str, Any]:
    """An extraction of which everything can be read."""
    asked = [{"prompt": text, "choices": ["a", "b"], "answer": 0} for text in texts]
    return {"model": "tiny", "inputs": asked, "layers": [1, 2], "score_choices": True}


def make_one_of_each(stack: Stack, name: str, marked: bool) -> Anna:
    owner = Anna(make_key(stack, name))
    extra: dict[str, Any] = {"metadata": {"project": "annas-metadata"}} if marked else {}
    with as_user(stack, owner.key) as client:
        inputs = TEXTS if marked else [f"berts text {number}" for number in range(8)]
        extraction = finished(
            client,
            "/v1/extractions",
            {**scoring(inputs), **extra},
            **({"Idempotency-Key": "annas-idempotency"} if marked else {}),
        )
        ext = extraction["resource"].rpartition("/")[2]
        training = {"extraction": ext, "labels": [0, 1] * 4, "folds": 2, "bootstrap": 10, **extra}
        probe = finished(client, "/v1/probes", {**training, **({"name": "annas-name"} if marked else {})})
        prb = probe["resource"].rpartition("/")[2]
        prediction = finished(client, f"/v1/probes/{prb}/predict", {"inputs": inputs[:2]})
        prd = prediction["resource"].rpartition("/")[2]
        adapter = client.post(
            "/v1/adapters",
            files={"file": b"annas text" if marked else b"berts text"},
            data={"base_model": "tiny", **({"name": "annas-name"} if marked else {})},
            headers={"Prefer": "wait=60"},
            timeout=90,
        ).json()
        assert adapter["status"] == "succeeded", adapter
        ad = adapter["resource"].rpartition("/")[2]
        digest = client.get(adapter["resource"]).json()["digest"]
        rows = "\n".join(json.dumps({"input": text, "label": at % 2}) for at, text in enumerate(inputs))
        dataset = client.post(
            "/v1/datasets",
            files={"file": rows.encode()},
            data={"format": "jsonl", **({"name": "annas-name"} if marked else {})},
        ).json()
        pair = {"model": "tiny", "variants": ["base", ad], "inputs": inputs, "labels": [0, 1] * 4, **extra}
        named = {"name": "annas-name"} if marked else {}
        few = {"layers": [1, 2], "folds": 2, "bootstrap": 10, "near_duplicates": None}
        comparison = finished(client, "/v1/comparisons", {**pair, **few, **named})
        study = {
            "experiment": named,
            "model": {"name": "tiny", "adapter": ad},
            "dataset": {"id": dataset["id"]},
            "extraction": {"layers": [1, 2]},
            "probe": {"folds": 2, "near_duplicates": None},
        }
        experiment = finished(client, "/v1/experiments", study)
        owner.ids = {
            "job": [one["id"] for one in (extraction, probe, prediction, adapter, comparison, experiment)],
            "cmp": [comparison["resource"].rpartition("/")[2]],
            "exp": [experiment["resource"].rpartition("/")[2]],
            "ad": [ad],
            "ext": [ext],
            "prb": [prb],
            "prd": [prd],
            "ds": [dataset["id"]],
        }
        # Comparisons and experiments have made more than these.
        made = [entry["id"] for noun in NOUNS for entry in client.get(f"/v1/{noun}").json()["data"]]
        owner.secrets = [*made, *itertools.chain(*owner.ids.values()), client.get("/v1/whoami").json()["id"]]
        if marked:
            owner.secrets += [*MARKS, digest]
    return owner


@pytest.fixture(scope="module")
def anna(shared: Stack) -> Anna:
    return make_one_of_each(shared, "anna", marked=True)


@pytest.fixture(scope="module")
def bert(shared: Stack, anna: Anna) -> Anna:
    return make_one_of_each(shared, "bert", marked=False)


@pytest.fixture(scope="module")
def document(shared: Stack) -> dict[str, Any]:
    found: dict[str, Any] = shared.client.get("/openapi.json").json()
    return found


class Stranger:
    """Bert's client; every answer to it is searched for Anna's things."""

    def __init__(self, client: httpx2.Client, anna: Anna) -> None:
        self._client = client
        self._anna = anna

    def ask(self, method: str, path: str, named: str = "", **request: Any) -> httpx2.Response:
        """The answer, of which `named` is the id that was asked for and so may come back."""
        answer = self._client.request(method, path, **request)
        said = (answer.text + json.dumps(dict(answer.headers))).replace(named, "…") if named else answer.text
        for secret in self._anna.secrets:
            assert secret not in said, (method, path, secret)
        return answer


@pytest.fixture
def stranger(shared: Stack, anna: Anna, bert: Anna) -> Iterator[Stranger]:
    with as_user(shared, bert.key) as client:
        yield Stranger(client, anna)


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any], list[str]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            given = {one["name"]: one["schema"] for one in operation.get("parameters", []) if one["in"] == "path"}
            filled = path
            if "/plots/" in path:  # of the pictures that there are the first
                choices = given.pop("name")
                filled = path.replace("{name}", (choices.get("enum") or [choices["const"]])[0])
            yield method, filled, operation, list(given)


def is_unbuilt(answer: httpx2.Response) -> bool:
    if answer.status_code != 501:
        return False
    return not answer.content or answer.json()["type"] == "/problems/not-built"  # a HEAD has no body


VARIANTS: list[dict[str, str]] = [
    {},
    {"Prefer": "wait=30"},
    {"Range": "bytes=0-99"},
    {"If-None-Match": "*"},
    {"Accept": "application/json"},
    {"Last-Event-ID": "0-1"},
]


def test_no_id_in_a_path_reaches_anothers_things(
    shared: Stack, document: dict[str, Any], anna: Anna, stranger: Stranger
) -> None:
    with as_user(shared, anna.key) as owner:
        before = snapshot(owner, document, anna)
    tried = 0
    for method, path, operation, names in operations(document):
        if not names or set(names) <= SHARED:
            continue
        if not set(names) <= set(HERS):
            answer = stranger.ask(method, path.replace("{", "").replace("}", ""))
            assert is_unbuilt(answer), f"{method} {path}: the test knows no id for {names}"
            continue
        [name] = names
        body = BODIES.get((method, path))
        assert method != "post" or body is not None, f"{method} {path}: the test knows no body for it"
        request = {"json": body} if "requestBody" in operation else {}
        methods = [method, "head"] if method == "get" else [method]
        for hers, verb, headers in itertools.product(anna.ids[HERS[name]], methods, VARIANTS):
            never = new_id(HERS[name])  # type: ignore[arg-type]
            foreign = stranger.ask(verb, path.replace(f"{{{name}}}", hers), hers, headers=headers, **request)
            missing = stranger.ask(verb, path.replace(f"{{{name}}}", never), never, headers=headers, **request)
            assert foreign.status_code == (403 if path in ADMINS_ONLY else missing.status_code), (verb, path)
            if is_unbuilt(foreign):
                continue
            assert foreign.status_code == (403 if path in ADMINS_ONLY else 404), (verb, path, foreign.text)
            assert foreign.text.replace(hers, "…") == missing.text.replace(never, "…")
            assert told(foreign) == told(missing)
            tried += 1
    assert tried > 50
    with as_user(shared, anna.key) as owner:
        assert snapshot(owner, document, anna) == before


def told(answer: httpx2.Response) -> dict[str, str]:
    """The headers that could tell something."""
    return {name: value for name, value in answer.headers.items() if name not in ("date", "x-request-id")}


def snapshot(owner: httpx2.Client, document: dict[str, Any], anna: Anna) -> dict[str, bytes]:
    """Everything of Anna's as she reads it herself; all of it can be read."""
    found = {}
    for method, path, _, names in operations(document):
        if method != "get" or not set(names) <= set(HERS) or not names or path.endswith("/events") or "/plots/" in path:
            continue
        for hers in anna.ids[HERS[names[0]]]:
            answer = owner.get(path.replace(f"{{{names[0]}}}", hers))
            if not is_unbuilt(answer):
                assert answer.status_code == 200, (path, answer.text)
                found[f"{path} {hers}"] = answer.content
    assert len(found) >= 7
    return found


def text_fields(schema: Any, document: dict[str, Any], seen: set[str], name: str = "") -> Iterator[str]:
    """Names of the fields of a body, nested ones too, that may be a text or hold one."""
    if "$ref" in schema:
        target = schema["$ref"].rpartition("/")[2]
        if target not in seen:
            yield from text_fields(document["components"]["schemas"][target], document, {*seen, target}, name)
        return
    if schema.get("type") == "string" or (name and not schema.get("type") and not set(schema) & {"anyOf", "oneOf"}):
        yield name
    for part in (*schema.get("anyOf", []), *schema.get("oneOf", []), *schema.get("prefixItems", [])):
        yield from text_fields(part, document, seen, name)
    if isinstance(schema.get("items"), dict):
        yield from text_fields(schema["items"], document, seen, name)
    for inner, of in schema.get("properties", {}).items():
        yield from text_fields(of, document, seen, inner)


def test_no_id_in_a_body_reaches_anothers_things(
    document: dict[str, Any], anna: Anna, bert: Anna, stranger: Stranger
) -> None:
    tried = set()
    for method, path, operation, _ in operations(document):
        if "requestBody" not in operation:
            continue
        body = BODIES.get((method, path))
        assert body is not None, f"{method} {path}: the test knows no body for it"
        contents = operation["requestBody"]["content"]
        found = (text_fields(content["schema"], document, set()) for content in contents.values())
        fields = {name for names in found for name in names if name}  # a file in a body of its own has none
        unknown = fields - ID_FIELDS - PLAIN_FIELDS
        assert not unknown, f"{method} {path}: may {unknown} be ids?"
        where = path.replace("{probe_id}", bert.ids["prb"][0]).replace("{name}", "tiny")
        for name in fields & ID_FIELDS:
            for hers, asking in itertools.product(itertools.chain(*anna.ids.values()), WAYS[path, name]):
                never = new_id(hers.partition("_")[0])  # type: ignore[arg-type]
                foreign = stranger.ask(method, where, hers, json=asking(body, hers))
                missing = stranger.ask(method, where, never, json=asking(body, never))
                assert foreign.status_code == 404, (path, name, foreign.text)
                assert foreign.text.replace(hers, "…") == missing.text.replace(never, "…")
                tried.add((path, name))
    assert tried == set(WAYS)


def test_lists_and_everything_else_show_ones_own(
    shared: Stack, document: dict[str, Any], anna: Anna, bert: Anna, stranger: Stranger
) -> None:
    for method, path, _, names in operations(document):
        if method != "get" or not set(names) <= SHARED:
            continue
        answer = stranger.ask("get", path.replace("{name}", "tiny"))
        if path in ADMINS_ONLY or path == "/metrics":
            assert answer.status_code == 403, path
        elif path == "/v1/tinker/models":
            assert answer.status_code == 503, answer.text  # no key for Tinker is set up
        elif not is_unbuilt(answer):
            assert answer.status_code == 200, (path, answer.text)
    with as_user(shared, anna.key) as owner:
        for noun, prefix in NOUNS.items():
            listed = {entry["id"] for entry in owner.get(f"/v1/{noun}").json()["data"]}
            assert listed >= set(anna.ids[prefix])
            assert not listed & {entry["id"] for entry in stranger.ask("get", f"/v1/{noun}").json()["data"]}
            mine = {entry["id"] for entry in stranger.ask("get", f"/v1/{noun}").json()["data"]}
            assert mine >= set(bert.ids[prefix])
            # Her cursor is a place in his own list.
            cursor = owner.get(f"/v1/{noun}?limit=1").json()["next_cursor"]
            if cursor is not None:
                page = stranger.ask("get", f"/v1/{noun}", params={"cursor": cursor}).json()
                assert {entry["id"] for entry in page["data"]} <= mine


def test_an_idempotency_key_is_a_keys_own_and_a_routes_own(shared: Stack, anna: Anna, stranger: Stranger) -> None:
    body = {**scoring(TEXTS), "metadata": {"project": "annas-metadata"}}
    with as_user(shared, anna.key) as owner:
        again = owner.post("/v1/extractions", json=body, headers={"Idempotency-Key": "annas-idempotency"})
        assert again.headers["idempotent-replayed"] == "true"
        assert again.json()["id"] == anna.ids["job"][0]
        # On another route the same key is another one, whatever the body.
        elsewhere = owner.post(
            f"/v1/probes/{anna.ids['prb'][0]}/predict",
            json={"inputs": ["annas text"]},
            headers={"Idempotency-Key": "annas-idempotency"},
        )
        assert elsewhere.status_code == 202
        anna.ids["job"].append(elsewhere.json()["id"])
        anna.secrets.append(elsewhere.json()["id"])
    other = {"model": "tiny", "inputs": ["berts"]}
    guessed = stranger.ask(
        "post", "/v1/extractions", json=other, headers={"Idempotency-Key": "annas-idempotency", "Prefer": "wait=60"}
    )
    assert guessed.json()["status"] == "succeeded"
    assert "idempotent-replayed" not in guessed.headers


def test_an_admin_key_sees_all(shared: Stack, document: dict[str, Any], anna: Anna, bert: Anna) -> None:
    with as_user(shared, make_key(shared, "boss", "--scope", "admin")) as boss:
        assert snapshot(boss, document, anna)
        assert {*anna.ids["job"], *bert.ids["job"]} <= {job["id"] for job in boss.get("/v1/jobs").json()["data"]}
