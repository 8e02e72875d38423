"""The embedded server: found again, started once, killed and restarted, with long paths, without a binary."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis

from bathyscope.errors import SetupError
from bathyscope_backplane.embedded import EmbeddedServer, find_binary


def client(server: EmbeddedServer) -> redis.Redis:
    return redis.Redis.from_url(server.url, decode_responses=True)


@pytest.fixture
def server(binary, tmp_path):
    it = EmbeddedServer(tmp_path, binary=binary)
    yield it
    it.stop()


def test_it_starts_stops_and_keeps_what_it_was_told(server):
    assert not server.is_alive()
    assert server.pid is None
    assert server.start() == server.url
    assert server.is_alive()
    with client(server) as redis_:
        redis_.set("key", "value")
        assert redis_.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert redis_.config_get("appendfsync") == {"appendfsync": "always"}
        assert redis_.config_get("port") == {"port": "0"}
    server.stop()
    assert not server.is_alive()
    assert not list(server.folder.glob("server.sock"))
    server.stop()
    server.start()
    with client(server) as redis_:
        assert redis_.get("key") == "value"


def test_nobody_else_may_enter(server):
    server.start()
    assert server.folder.stat().st_mode & 0o077 == 0
    assert (server.folder / "server.sock").stat().st_mode & 0o077 == 0


def test_a_running_server_is_found_and_used(server):
    server.start()
    pid = server.pid
    again = EmbeddedServer(server.folder.parent, binary=server.binary)
    assert again.start() == server.url
    assert again.pid == server.pid == pid
    again.stop()
    assert not server.is_alive()


def test_it_outlives_a_parent_that_is_killed(server):
    program = f"""
import time
from bathyscope_backplane.embedded import EmbeddedServer
print(EmbeddedServer({str(server.folder.parent)!r}, binary={str(server.binary)!r}).start(), flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline().strip() == server.url
        pid = server.pid
        parent.kill()
    assert server.is_alive()
    server.start()
    assert server.pid == pid


def test_after_kill_nine_the_next_start_brings_everything_back(server):
    server.start()
    for round_ in range(3):
        with client(server) as redis_:
            redis_.rpush("list", round_)
        os.kill(server.pid, signal.SIGKILL)
        server.start()
        with client(server) as redis_:
            assert redis_.lrange("list", 0, -1) == [str(number) for number in range(round_ + 1)]


def test_leftovers_of_a_dead_server_do_not_mislead(server, binary):
    """A pid that is another process by now, and a socket that nobody listens on."""
    server.folder.mkdir(mode=0o700)
    (server.folder / "server.pid").write_text(str(os.getpid()))
    (server.folder / "server.sock").touch()
    (server.folder / "server.lock").touch()
    assert server.pid is None
    server.stop()
    server.start()
    assert server.pid != os.getpid()
    with client(server) as redis_:
        assert redis_.ping()


def test_many_that_start_at_once_get_one_server(server):
    barrier = threading.Barrier(8)

    def start(_: int) -> int | None:
        one = EmbeddedServer(server.folder.parent, binary=server.binary)
        barrier.wait()
        one.start()
        return one.pid

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(start, range(8)))) == 1


def test_a_long_path_gets_a_short_private_socket(binary, tmp_path):
    server = EmbeddedServer(tmp_path / ("long" * 30), binary=binary)
    try:
        url = server.start()
        folder = Path(url.removeprefix("unix://")).parent
        assert len(url) < 110
        assert folder.stat().st_mode & 0o077 == 0
        assert EmbeddedServer(tmp_path / ("long" * 30)).start() == url
        os.kill(server.pid, signal.SIGKILL)
        assert server.start() == url
        # A folder that others can write is not trusted the next time.
        os.kill(server.pid, signal.SIGKILL)
        folder.chmod(0o777)
        moved = server.start()
        assert moved != url
        with client(server) as redis_:
            assert redis_.ping()
        folder.chmod(0o700)
        shutil.rmtree(folder)
    finally:
        server.stop()
    assert not Path(moved.removeprefix("unix://")).parent.exists()


def test_a_path_of_odd_letters(binary, tmp_path):
    with EmbeddedServer(tmp_path / "two words 'ü' #1%20", binary=binary) as server, client(server) as redis_:
        assert redis_.set("key", "value")


def test_a_stopped_process_is_ended_all_the_same(server, monkeypatch):
    monkeypatch.setattr("bathyscope_backplane.embedded._STOP_S", 0.4)
    server.start()
    os.kill(server.pid, signal.SIGSTOP)
    server.stop()
    assert not server.is_alive()


def test_a_damaged_file_is_told_in_a_sentence(server):
    server.start()
    with client(server) as redis_:
        redis_.set("key", "value" * 100)
    server.stop()
    (part,) = server.folder.glob("appendonlydir/*.incr.aof")
    data = bytearray(part.read_bytes())
    data[5:9] = b"\x00\xff\x00\xff"
    part.write_bytes(bytes(data))
    with pytest.raises(SetupError, match="ended as it started"):
        server.start()


def test_a_binary_that_is_none_is_told_in_a_sentence(tmp_path):
    for path in (tmp_path / "nothing", "/bin/false"):
        with pytest.raises(SetupError, match="embedded server"):
            EmbeddedServer(tmp_path, binary=path).start()


def test_without_any_server_the_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setenv("PATH", tempfile.gettempdir())
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(SetupError, match=r"bathyscope\[embedded\].*BATHYSCOPE_REDIS_URL"):
        find_binary()


def test_an_old_server_of_the_path_is_not_taken(monkeypatch, tmp_path):
    for name, version in (("valkey-server", "6.2.14"), ("redis-server", "7.0.15")):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\necho 'Redis server v={version} sha=0'\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert find_binary() == tmp_path / "redis-server"
