"""Jobs without a model, one after another."""

import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from bathyscope import errors
from bathyscope_workers.engine.channel import Channel
from bathyscope_workers.engine.cpu_engine import CpuEngine
from bathyscope_workers.engine.handlers import JobContext, resolve
from bathyscope_workers.engine.protocol import RunJob, encode, receive


def add(job: RunJob, context: JobContext) -> dict[str, Any]:
    context.progress("adding", 1, 1, "sums")
    return {"sum": sum(job.spec["numbers"])}


def refuse(job: RunJob, context: JobContext) -> dict[str, Any]:
    raise errors.InvalidRequest("no labels")


def crash(job: RunJob, context: JobContext) -> dict[str, Any]:
    raise ZeroDivisionError("inner detail")


def forever(job: RunJob, context: JobContext) -> dict[str, Any]:
    while True:
        context.beat()


HANDLERS = {"add": add, "refuse": refuse, "crash": crash, "forever": forever}


class Client:
    def __init__(self) -> None:
        self.socket, other = socket.socketpair()
        self.socket.settimeout(60)
        self.channel = Channel(other, on_close=lambda: None)
        self.channel.start()
        self.thread = threading.Thread(target=CpuEngine(self.channel, registry=HANDLERS).run)
        self.thread.start()
        self.events = receive(self.socket)

    def send(self, **command: Any) -> None:
        self.socket.sendall(encode(command))

    def run(self, identifier: str, kind: str, **spec: Any) -> None:
        self.send(op="run", job={"id": identifier, "kind": kind, "spec": spec})

    def until(self, *kinds: str) -> dict[str, Any]:
        return next(event for event in self.events if event["ev"] in kinds)


@pytest.fixture
def client() -> Iterator[Client]:
    made = Client()
    yield made
    made.socket.close()
    made.thread.join(timeout=30)
    assert not made.thread.is_alive()
    made.channel.close()


def test_one_after_another(client: Client) -> None:
    assert client.until("ready")["kind"] == "cpu"
    client.run("a", "add", numbers=[1, 2])
    client.run("b", "add", numbers=[3, 4])
    assert client.until("running")["ids"] == ["a"]
    assert client.until("done")["result"] == {"sum": 3}
    assert client.until("running")["ids"] == []
    assert client.until("running")["ids"] == ["b"]
    done = client.until("done")
    assert done["result"] == {"sum": 7}
    assert done["timings"]["total"] >= 0


def test_failures(client: Client) -> None:
    client.run("a", "refuse")
    client.run("b", "crash")
    client.run("c", "unheard-of")
    first, second, third = (client.until("failed") for _ in range(3))
    assert (first["problem"]["type"], first["retry"]) == ("/problems/invalid-request", False)
    assert (second["problem"]["type"], second["retry"]) == ("/problems/internal-error", True)
    assert "inner detail" not in str(second)
    assert "unheard-of" in third["problem"]["detail"]


@pytest.mark.parametrize("command", ["cancel", "drop_all", "shutdown"])
def test_a_running_job_is_stopped(client: Client, command: str) -> None:
    client.run("a", "forever")
    client.run("waiting", "forever")
    client.until("beat")
    if command == "cancel":
        client.send(op="cancel", id="waiting")
        client.send(op="cancel", id="a")
        assert {client.until("cancelled")["id"] for _ in range(2)} == {"a", "waiting"}
        client.run("b", "add", numbers=[1])
        assert client.until("done")["id"] == "b"
    elif command == "drop_all":
        client.send(op="drop_all")
        client.run("b", "add", numbers=[1])
        assert client.until("done", "cancelled")["id"] == "b"
    else:
        client.send(op="shutdown")
        client.thread.join(timeout=30)
        assert not client.thread.is_alive()


def test_handlers_by_name() -> None:
    found: Callable[..., Any] | None = resolve({"x": "json:dumps"}, "x")
    assert found is not None
    assert found([1]) == "[1]"
    assert resolve({}, "x") is None
