"""Webhooks from end to end: real services, a real receiver, real kills."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

import bathyscope
from bathyscope_backplane.broker import Broker, NewJob, connect
from bathyscope_backplane.ids import new_id
from bathyscope_backplane.settings import Settings
from bathyscope_backplane.vault import Vault
from tests.service.receiver import Delivery, Receiver, receiver
from tests.service.test_manners import problem
from tests.stack import Stack, free_port, stack

BODY = {"model": "tiny", "inputs": ["a"], "layers": [0]}
QUICK = {
    "webhooks__allow_private": True,
    "webhooks__backoff_seconds": 0.05,
    "webhooks__timeout_seconds": 1,
    "webhooks__attempts": 4,
    "log_level": "info",
}


@pytest.fixture(scope="module")
def hooked(tmp_path_factory: pytest.TempPathFactory, models: str) -> Iterator[Stack]:
    """Two front ends that may send to this machine, and a worker."""
    made = Stack(tmp_path_factory.mktemp("hooked"), models=models, noop=True, **QUICK)
    made.second_port = free_port()  # type: ignore[attr-defined]
    try:
        made.start("service2", "service", BATHYSCOPE_PORT=str(made.second_port))  # type: ignore[attr-defined]
        yield made.up()
    finally:
        made.down()


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory, models: str) -> Iterator[Stack]:
    """A front end that may not, and no worker: a job ends when it is cancelled."""
    yield from alone(tmp_path_factory.mktemp("strict"), models=models, **{**QUICK, "webhooks__allow_private": False})


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory, models: str) -> Iterator[Stack]:
    """A front end with keys that may send to this machine, and no worker."""
    yield from alone(tmp_path_factory.mktemp("keyed"), models=models, **QUICK)


def alone(folder: Path, **settings: Any) -> Iterator[Stack]:
    with stack(folder, workers=0, **settings) as made:
        yield made


@pytest.fixture
def target() -> Iterator[Receiver]:
    with receiver() as made:
        yield made


def submit(stack: Stack, url: str, **fields: Any) -> str:
    answer = stack.client.post("/v1/extractions", json={**BODY, "webhook": url, **fields})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def cancelled(stack: Stack, url: str) -> str:
    job_id = submit(stack, url)
    assert stack.client.post(f"/v1/jobs/{job_id}/cancel").status_code == 200
    return job_id


def put_cancelled(stack: Stack, url: str, count: int) -> list[str]:
    """Jobs that are entered past the service, and have ended."""
    new = [
        NewJob(id=new_id("job"), kind="extraction", lane="none", owner="local", payload="{}", webhook=url)
        for _ in range(count)
    ]

    async def put() -> None:
        redis = connect(stack.environment["BATHYSCOPE_REDIS_URL"])
        broker = Broker(redis)
        for job in new:
            await broker.submit(job)
            await broker.cancel(job.id)
        await redis.aclose()

    asyncio.run(put())
    return [job.id for job in new]


def settled(client: httpx2.Client, job_id: str) -> dict[str, Any]:
    """The job's webhook once nothing more is to come."""
    for _ in range(600):
        job = client.get(f"/v1/jobs/{job_id}").json()
        if job["webhook"]["state"] not in ("waiting", "pending"):
            return dict(job["webhook"])
        time.sleep(0.05)
    raise AssertionError(job)


def signed_with(delivery: Delivery, secret: str) -> bool:
    """Whether the signature is that of the contract, told without any code of the project."""
    at, v1 = (part.partition("=")[2] for part in delivery.headers["bathyscope-signature"].split(","))
    expected = hmac.new(secret.encode(), at.encode() + b"." + delivery.body, hashlib.sha256).hexdigest()
    return hmac.compare_digest(expected, v1) and abs(time.time() - int(at)) < 300


def local_secret(stack: Stack) -> str:
    return Vault.open(Settings(data_dir=stack.data_dir)).webhook_secret("local", "")


def test_the_operator_is_told_the_secret(keyed: Stack) -> None:
    assert cli(keyed, "keys", "webhook-secret").strip() == local_secret(keyed)
    assert local_secret(keyed).startswith("whsec_")


def test_a_finished_job_is_told_signed_and_as_it_is_read(hooked: Stack, target: Receiver) -> None:
    url = f"http://127.0.0.1:{target.port}/hook?key=s3cret"
    answer = hooked.client.post("/v1/extractions", json={**BODY, "webhook": url})
    assert "s3cret" not in json.dumps(answer.json()["request"])
    assert answer.json()["webhook"]["url"] == url
    job_id = answer.json()["id"]
    (delivery,) = target.wait_for(1)
    assert delivery.path == "/hook?key=s3cret"
    assert delivery.headers["content-type"] == "application/json"
    assert delivery.headers["user-agent"] == f"bathyscope/{bathyscope.__version__}"
    secret = local_secret(hooked)
    assert signed_with(delivery, secret)
    assert not signed_with(delivery, secret + "x")
    webhook = settled(hooked.client, job_id)
    assert (webhook["state"], webhook["attempts"], webhook["last_status"]) == ("delivered", 1, 204)
    assert webhook["delivered_at"] is not None
    assert webhook["next_attempt_at"] is None
    told, read = json.loads(delivery.body), hooked.client.get(f"/v1/jobs/{job_id}").json()
    assert read["status"] == "succeeded"
    assert told.pop("webhook")["state"] == "pending"
    del read["webhook"]
    assert told == read
    job = bathyscope.webhooks.verify(delivery.body, delivery.headers["bathyscope-signature"], secret)
    assert (job.id, job.status, job.webhook and job.webhook.url) == (job_id, "succeeded", url)
    assert len(target.deliveries) == 1


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/probes", {"data": {**BODY, "inputs": ["a", "b"] * 10}, "labels": [0, 1] * 10}),
        ("/v1/models/tiny/load", {}),
    ],
)
def test_any_post_that_makes_a_job_takes_one(hooked: Stack, target: Receiver, path: str, body: dict[str, Any]) -> None:
    answer = hooked.post(path, {**body, "webhook": f"http://127.0.0.1:{target.port}/"})
    assert answer.status_code in (200, 202), answer.text
    (delivery,) = target.wait_for(1)
    assert json.loads(delivery.body)["id"] == answer.json()["id"]
    assert "webhook" not in json.loads(delivery.body)["request"]


def test_it_is_tried_again_until_it_is_taken(hooked: Stack, target: Receiver) -> None:
    target.answers = [500, None, b"", 200]  # an error, no answer in time, a broken connection
    job_id = submit(hooked, f"http://127.0.0.1:{target.port}/")
    deliveries = target.wait_for(4)
    webhook = settled(hooked.client, job_id)
    assert (webhook["state"], webhook["attempts"], webhook["last_status"]) == ("delivered", 4, 200)
    assert len({delivery.headers["bathyscope-delivery"] for delivery in deliveries}) == 1
    assert all(signed_with(delivery, local_secret(hooked)) for delivery in deliveries)
    assert [json.loads(delivery.body)["webhook"]["last_status"] for delivery in deliveries] == [None, 500, None, None]


def test_it_is_given_up_with_a_note_and_the_job_stands(hooked: Stack, target: Receiver) -> None:
    target.answers = [503]
    job_id = submit(hooked, f"http://127.0.0.1:{target.port}/")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = submit(hooked, f"http://127.0.0.1:{closed.getsockname()[1]}/")
        webhook = settled(hooked.client, job_id)
        assert (webhook["state"], webhook["attempts"], webhook["last_status"]) == ("failed", 4, 503)
        assert "503" in webhook["detail"]
        assert webhook["next_attempt_at"] is None
        webhook = settled(hooked.client, nobody)
        assert (webhook["state"], webhook["attempts"], webhook["last_status"]) == ("failed", 4, None)
        assert "connected" in webhook["detail"]
    assert len(target.deliveries) == 4
    for one in (job_id, nobody):
        assert hooked.client.get(f"/v1/jobs/{one}").json()["status"] == "succeeded"


def test_a_black_hole_holds_up_only_itself(hooked: Stack, target: Receiver) -> None:
    with receiver("127.0.0.2") as hole:
        hole.answers = [None]

        def told() -> set[str]:
            return {json.loads(delivery.body)["id"] for delivery in hole.deliveries}

        put_cancelled(hooked, f"http://127.0.0.2:{hole.port}/", 200)
        hole.wait_for(4)
        put_cancelled(hooked, f"http://127.0.0.1:{target.port}/", 10)
        target.wait_for(10)
        assert len(told()) < 200, "the black hole's queue went first"
        assert hole.most_held <= 2 * 4, "of each front end"
        hole.answers = [204]
        hole.released.set()
        with hole.came:
            assert hole.came.wait_for(lambda: len(told()) == 200, 60)


def test_a_front_end_that_dies_in_the_middle_is_followed_by_another(hooked: Stack, target: Receiver) -> None:
    target.answers = [None, 204]
    job_id = submit(hooked, f"http://127.0.0.1:{target.port}/")
    (first,) = target.wait_for(1)
    names = [name for name in ("service", "service2") if speaks_from(hooked.processes[name].pid, first.peer)]
    assert len(names) == 1
    hooked.kill(names[0])
    survivor = hooked.second_port if names[0] == "service" else hooked.port  # type: ignore[attr-defined]
    try:
        second = target.wait_for(2)[1]
        assert second.headers["bathyscope-delivery"] == first.headers["bathyscope-delivery"]
        assert json.loads(second.body)["id"] == job_id
        with httpx2.Client(base_url=f"http://127.0.0.1:{survivor}") as client:
            assert settled(client, job_id)["attempts"] == 2
        assert len(target.deliveries) == 2
    finally:
        extra = {"BATHYSCOPE_PORT": str(hooked.second_port)} if names[0] == "service2" else {}  # type: ignore[attr-defined]
        hooked.start(names[0], "service", **extra)
        hooked.wait_alive()


def speaks_from(pid: int, port: int) -> bool:
    return any(one.laddr.port == port for one in psutil.Process(pid).net_connections() if one.laddr)


def test_a_front_end_that_is_stopped_gives_back_what_it_cannot_end(
    tmp_path: Path, models: str, target: Receiver
) -> None:
    target.answers = [None, 204]
    # Were it not given back, nobody would take it before a claim of a minute and more has lapsed.
    for patient in alone(tmp_path, models=models, **{**QUICK, "webhooks__timeout_seconds": 60}):
        (job_id,) = put_cancelled(patient, f"http://127.0.0.1:{target.port}/", 1)
        target.wait_for(1)
        patient.processes["service"].terminate()
        assert patient.processes["service"].wait(60) is not None
        patient.up(workers=0)
        target.wait_for(2)
        webhook = settled(patient.client, job_id)
        assert (webhook["state"], webhook["attempts"]) == ("delivered", 1)


def test_logs_name_the_host_and_no_more(hooked: Stack, target: Receiver) -> None:
    job_id = submit(hooked, f"http://127.0.0.1:{target.port}/private/path?key=s3cret")
    assert settled(hooked.client, job_id)["state"] == "delivered"
    logs = "".join(path.read_text() for path in hooked.logs.glob("*.log"))
    assert "webhook.delivered" in logs
    numbers = [httpx2.get(f"http://127.0.0.1:{port}/metrics").text for port in (hooked.port, hooked.second_port)]  # type: ignore[attr-defined]
    assert 'bathyscope_webhook_attempts_total{outcome="delivered"}' in "".join(numbers)
    assert job_id in logs
    assert "s3cret" not in logs
    assert "private/path" not in logs


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/",
        "http://0x7f.1:8080/",
        "https://localhost/",
        "http://[::ffff:10.0.0.1]/",
        "http://user@a.com/",
    ],
)
def test_a_literal_private_address_is_refused_and_leaves_no_trace(strict: Stack, url: str) -> None:
    before = strict.client.get("/v1/jobs").json()
    for path, body, pointer in (
        ("/v1/extractions", {**BODY, "webhook": url}, "/webhook"),
        ("/v1/models/tiny/load", {"webhook": url}, "/webhook"),
        ("/v1/probes", {"data": BODY, "labels": [1], "webhook": url}, "/webhook"),
        ("/v1/probes", {"data": {**BODY, "webhook": url}, "labels": [1]}, "/data/webhook"),
    ):
        document = problem(strict.client.post(path, json=body), 422, "invalid-request")
        assert [fault["pointer"] for fault in document["errors"]] == [pointer]
    assert strict.client.get("/v1/jobs").json() == before


def test_a_private_address_found_at_delivery_is_not_sent_to(strict: Stack) -> None:
    name = socket.gethostname()
    try:
        found = {where[4][0] for where in socket.getaddrinfo(name, None)}
    except OSError:
        pytest.skip("this machine's own name does not resolve")
    with receiver("0.0.0.0") as target:
        job_id = cancelled(strict, f"http://{name}:{target.port}/")
        webhook = settled(strict.client, job_id)
        assert (webhook["state"], webhook["attempts"], webhook["last_status"]) == ("refused", 1, None)
        assert not any(address in webhook["detail"] for address in found)
        assert target.deliveries == []


def test_what_is_in_the_queue_is_judged_by_whoever_delivers_it(strict: Stack) -> None:
    """A literal address that another setting once let in is not sent to either."""
    with receiver() as target:
        (job_id,) = put_cancelled(strict, f"http://127.0.0.1:{target.port}/", 1)
        assert settled(strict.client, job_id)["state"] == "refused"
        assert target.deliveries == []


def cli(stack: Stack, *words: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", "bathyscope.cli", *words],
        env=stack.environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout


def test_each_key_signs_with_a_secret_of_its_own(keyed: Stack, target: Receiver) -> None:
    made = {
        name: json.loads(cli(keyed, "keys", "create", name, "--json", *options))
        for name, options in {"anna": (), "bert": (), "boss": ("--scope", "admin")}.items()
    }
    clients = {
        name: httpx2.Client(base_url=keyed.url, headers={"Authorization": f"Bearer {key['key']}"})
        for name, key in made.items()
    }
    url = f"http://127.0.0.1:{target.port}/hook?key=s3cret"
    jobs = {}
    for name in ("anna", "bert"):
        jobs[name] = clients[name].post("/v1/extractions", json={**BODY, "webhook": url}).json()["id"]
        clients[name].post(f"/v1/jobs/{jobs[name]}/cancel")
    for delivery in target.wait_for(2):
        name = "anna" if json.loads(delivery.body)["id"] == jobs["anna"] else "bert"
        other = "bert" if name == "anna" else "anna"
        assert signed_with(delivery, made[name]["webhook_secret"])
        assert not signed_with(delivery, made[other]["webhook_secret"])
        assert json.loads(delivery.body)["status"] == "cancelled"
    assert cli(keyed, "keys", "webhook-secret", "anna").strip() == made["anna"]["webhook_secret"]
    # An admin sees the job, and of the URL no more than where it leads.
    seen = clients["boss"].get(f"/v1/jobs/{jobs['anna']}").json()
    assert seen["webhook"]["url"] == f"http://127.0.0.1:{target.port}"
    assert "s3cret" not in json.dumps(seen)
    assert "s3cret" not in clients["boss"].get("/v1/jobs").text
    assert clients["anna"].get(f"/v1/jobs/{jobs['anna']}").json()["webhook"]["url"] == url

    # A key that is gone signs nothing any more.
    job = clients["bert"].post("/v1/extractions", json={**BODY, "webhook": url}).json()["id"]
    cli(keyed, "keys", "revoke", "bert")
    clients["boss"].post(f"/v1/jobs/{job}/cancel")
    webhook = settled(clients["boss"], job)
    assert (webhook["state"], webhook["last_status"]) == ("failed", None)
    assert "revoked" in webhook["detail"]
    assert len(target.deliveries) == 2
    for client in clients.values():
        client.close()
