"""The ways to Redis, and what happens when it is away, restarted, full, or forgets its scripts."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import time
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from redis.asyncio import Redis, RedisCluster

from bathyscope.errors import OutOfSpace, SetupError, Unavailable
from bathyscope_backplane.broker import Broker, BrokerLimits, connect
from tests.backplane.conftest import SERVERS

PEM = serialization.Encoding.PEM


async def a_job_through(broker, new_job):
    job = new_job(lane="fetch")
    await broker.submit(job)
    (lease,) = (await broker.take("w", [job.lane], 1, lease_ms=30_000, engine_idle=True)).leases
    assert await broker.finish(lease.ref, resource=None, timings={})
    assert (await broker.get(job.id)).status == "succeeded"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def program(*command: str, port: int):
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        for _ in range(1_000):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("scheme", ["unix", "valkey+unix", "redis+unix"])
async def test_a_socket(server, new_job, scheme):
    client = connect(server.url.replace("unix", scheme, 1))
    await a_job_through(Broker(client, namespace="socket"), new_job)
    await client.aclose()


async def test_a_server_by_host_with_a_password(binary, tmp_path, new_job):
    port = free_port()
    with program(binary, "--port", str(port), "--dir", str(tmp_path), "--requirepass", "a:b@c", port=port):
        for url in (f"redis://:a%3Ab%40c@127.0.0.1:{port}/2", f"valkey://default:a%3Ab%40c@localhost:{port}"):
            client = connect(url)
            await a_job_through(Broker(client), new_job)
            await client.aclose()
        client = connect(f"redis://127.0.0.1:{port}", retries=0)
        with pytest.raises(Unavailable):
            await Broker(client).get("job_1")
        await client.aclose()


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """A certificate authority of our own, and the options of a server with a certificate for 127.0.0.1 from it."""
    folder = tmp_path_factory.mktemp("tls")
    now = datetime.now(UTC)

    def certify(name, key, issuer, signer, extension):
        made = x509.CertificateBuilder(subject_name=name, issuer_name=issuer, public_key=key.public_key())
        made = made.serial_number(x509.random_serial_number()).add_extension(extension, critical=False)
        made = made.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
        # What strict checks of Python 3.13 ask for.
        made = made.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        made = made.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
        return made.sign(signer, hashes.SHA256())

    def named(text):
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    root_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root = named("authority")
    files = {
        "ca.pem": certify(root, root_key, root, root_key, x509.BasicConstraints(True, None)).public_bytes(PEM),
        "server.pem": certify(
            named("server"),
            key,
            root,
            root_key,
            x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]),
        ).public_bytes(PEM),
        "server.key": key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def tls(authority):
    """Options of a server, and the program: Debian's is built with TLS, the embedded one is not."""
    if "redis" not in SERVERS:
        pytest.skip("Debian's redis-server is not here")
    options = {"tls-cert-file": "server.pem", "tls-key-file": "server.key", "tls-ca-cert-file": "ca.pem"}
    words = [word for name, file in options.items() for word in (f"--{name}", str(authority / file))]
    return SERVERS["redis"], [*words, "--tls-auth-clients", "no"], f"ssl_ca_certs={authority / 'ca.pem'}"


async def test_a_server_with_tls(tls, tmp_path, new_job):
    binary, options, trusted = tls
    port = free_port()
    with program(binary, "--port", "0", "--tls-port", str(port), "--dir", str(tmp_path), *options, port=port):
        client = connect(f"rediss://127.0.0.1:{port}?{trusted}")
        await a_job_through(Broker(client), new_job)
        await client.aclose()
        # Neither a stranger's certificate, nor that of another host, nor a connection without.
        for url in (f"rediss://127.0.0.1:{port}", f"rediss://localhost:{port}?{trusted}", f"redis://127.0.0.1:{port}"):
            client = connect(url, retries=0)
            with pytest.raises(Unavailable):
                await Broker(client).get("job_1")
            await client.aclose()


async def test_a_cluster_with_tls(tls, tmp_path, new_job, until):
    binary, options, trusted = tls
    port = free_port()
    bus = ("--cluster-enabled", "yes", "--cluster-port", str(free_port()), "--tls-cluster", "yes")
    with program(binary, "--port", "0", "--tls-port", str(port), "--dir", str(tmp_path), *bus, *options, port=port):
        ca = trusted.partition("=")[2]
        await cluster_of(until, Redis(port=port, host="127.0.0.1", ssl=True, ssl_ca_certs=ca))
        client = connect(f"rediss+cluster://127.0.0.1:{port}?{trusted}")
        await a_job_through(Broker(client), new_job)
        await client.aclose()


async def cluster_of(until, *nodes):
    """Makes a cluster of some nodes; each gets its share of the slots."""
    share = 16384 // len(nodes)
    for number, node in enumerate(nodes):
        last = 16383 if number == len(nodes) - 1 else (number + 1) * share - 1
        await node.execute_command("CLUSTER", "ADDSLOTSRANGE", number * share, last)
    for node in nodes[1:]:
        at = nodes[0].connection_pool.connection_kwargs
        info = await nodes[0].config_get("cluster-port")
        await node.execute_command("CLUSTER", "MEET", "127.0.0.1", at["port"], next(iter(info.values())))
    for node in nodes:

        async def whole(node=node):
            info = await node.execute_command("CLUSTER", "INFO")
            return b"cluster_state:ok" in info and b"cluster_known_nodes:%d\r" % len(nodes) in info

        await until(whole)
        await node.aclose()


async def test_a_cluster_of_three(binary, tmp_path, new_job, until):
    ports = [free_port() for _ in range(3)]
    with ExitStack() as stack:
        for port in ports:
            (folder := tmp_path / str(port)).mkdir()
            bus = ("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
            stack.enter_context(program(binary, "--port", str(port), "--dir", str(folder), *bus, port=port))
        await cluster_of(until, *(Redis(port=port) for port in ports))
        # Whichever node a namespace falls to, and whichever node is asked first.
        nodes = set()
        for number, namespace in enumerate(["bathyscope", "a", "b", "c", "d", "e"]):
            client = connect(f"redis+cluster://127.0.0.1:{ports[number % 3]}")
            broker = Broker(client, namespace=namespace)
            await a_job_through(broker, new_job)
            job = new_job()
            await broker.submit(job)
            async with await broker.subscribe() as listener, listener.job(job.id) as waiter:
                await broker.cancel(job.id)
                assert await waiter.wait(30)
            nodes.add(client.get_node_from_key(f"{{{namespace}}}:jobs").port)
            await client.aclose()
        assert nodes == set(ports)


async def test_a_cluster(binary, tmp_path, new_job, until):
    """One node that holds all slots says of every key where it is, as a cluster does."""
    port = free_port()
    bus = ("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
    with program(binary, "--port", str(port), "--dir", str(tmp_path), *bus, port=port):
        await cluster_of(until, Redis(port=port))
        client = connect(f"redis+cluster://127.0.0.1:{port},127.0.0.1:{free_port()}")
        assert isinstance(client, RedisCluster)
        broker = Broker(client)
        await a_job_through(broker, new_job)
        job = new_job()
        await broker.submit(job)
        async with await broker.subscribe() as listener, listener.job(job.id) as waiter:
            await broker.cancel(job.id)
            assert await waiter.wait(30)
        await client.aclose()


async def test_sentinels(binary, tmp_path, new_job):
    port, guard = free_port(), free_port()
    (tmp_path / "sentinel.conf").write_text(f"port {guard}\nsentinel monitor main 127.0.0.1 {port} 1\n")
    with (
        program(binary, "--port", str(port), "--dir", str(tmp_path), port=port),
        program(binary, str(tmp_path / "sentinel.conf"), "--sentinel", port=guard),
    ):
        client = connect(f"redis+sentinel://127.0.0.1:{free_port()},127.0.0.1:{guard}/main/0")
        await a_job_through(Broker(client), new_job)
        await client.aclose()


async def test_a_failover_loses_nothing_that_the_replica_has(binary, tmp_path, new_job, until):
    first, second, guard = free_port(), free_port(), free_port()
    for port in (first, second):
        (tmp_path / str(port)).mkdir()
    (tmp_path / "sentinel.conf").write_text(
        f"port {guard}\nsentinel monitor main 127.0.0.1 {first} 1\n"
        "sentinel down-after-milliseconds main 300\nsentinel failover-timeout main 2000\n"
    )

    def server(port, *words):
        command = (binary, "--port", str(port), "--dir", str(tmp_path / str(port)), "--repl-diskless-sync-delay", "0")
        return program(*command, *words, port=port)

    with (
        server(first) as master,
        server(second, "--replicaof", f"127.0.0.1 {first}"),
        program(binary, str(tmp_path / "sentinel.conf"), "--sentinel", port=guard),
    ):
        watcher = Redis(port=guard, decode_responses=True)

        async def guarded():
            known = await watcher.sentinel_slaves("main")
            return bool(known) and known[0]["master-link-status"] == "ok"

        await until(guarded)
        client = connect(f"redis+sentinel://127.0.0.1:{guard}/main")
        broker = Broker(client)
        job = new_job(lane="kept")
        await broker.submit(job)
        await client.wait(1, 10_000)
        async with await broker.subscribe() as listener, listener.bell() as bell:
            os.kill(master.pid, signal.SIGKILL)

            async def served():
                try:
                    taken = await broker.take("w", ["kept"], 1, lease_ms=30_000, engine_idle=True)
                except Unavailable:
                    return False
                return [lease.job_id for lease in taken.leases] == [job.id]

            await until(served)
            await until(lambda: listener.connected)
            while await bell.wait(0.2):
                pass
            await broker.submit(new_job())
            assert await bell.wait(30)
        await client.aclose()
        await watcher.aclose()


async def test_sentinels_with_tls(tls, tmp_path, new_job):
    binary, options, trusted = tls
    port, guard = free_port(), free_port()
    lines = [" ".join(pair).removeprefix("--") for pair in zip(options[::2], options[1::2], strict=True)]
    monitor = f"sentinel monitor main 127.0.0.1 {port} 1\n"
    (tmp_path / "sentinel.conf").write_text(
        "\n".join(["port 0", f"tls-port {guard}", "tls-replication yes", *lines, monitor])
    )
    with (
        program(binary, "--port", "0", "--tls-port", str(port), "--dir", str(tmp_path), *options, port=port),
        program(binary, str(tmp_path / "sentinel.conf"), "--sentinel", port=guard),
    ):
        client = connect(f"rediss+sentinel://127.0.0.1:{guard}/main?{trusted}")
        await a_job_through(Broker(client), new_job)
        await client.aclose()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "http://h",
        "localhost:6379",
        "redis+sentinel://h",
        "redis+sentinel://h/s/x",
        "redis+cluster://",
        "redis://h:x",
    ],
)
def test_other_urls_are_refused_with_a_sentence(url):
    with pytest.raises(SetupError, match=r"URL"):
        connect(url)


def test_a_client_of_bytes_is_refused():
    with pytest.raises(ValueError, match="decode_responses"):
        Broker(Redis())


async def test_every_method_says_unavailable(tmp_path, new_job):
    client = connect(f"unix://{tmp_path}/nobody.sock", retries=0)
    broker = Broker(client)
    for call in (
        broker.submit(new_job()),
        broker.take("w", ["cpu"], 1, lease_ms=1, engine_idle=True),
        broker.cancel("job_1"),
        broker.reap(),
        broker.get("job_1"),
        broker.payload("job_1"),
        broker.tombstone("job_1"),
        broker.list(None),
        broker.events("job_1"),
        broker.stats(),
        broker.position("job_1"),
        broker.dead_letters(),
    ):
        with pytest.raises(Unavailable) as caught:
            await call
        assert caught.value.retry_after
        assert str(tmp_path) not in str(caught.value)
    await client.aclose()


async def test_a_server_that_does_not_answer_is_not_waited_for_long(own_server):
    client = connect(own_server.url, timeout_s=0.2, retries=1)
    broker = Broker(client, patience_s=0.3)
    assert await broker.get("job_1") is None
    os.kill(own_server.pid, signal.SIGSTOP)
    try:
        with pytest.raises(Unavailable):
            await broker.get("job_1")
    finally:
        os.kill(own_server.pid, signal.SIGCONT)
    async with asyncio.timeout(30):
        while True:
            try:
                assert await broker.get("job_1") is None
                break
            except Unavailable:
                await asyncio.sleep(0.05)
    await client.aclose()


async def test_scripts_are_loaded_again_when_the_server_forgot_them(own_server, own_client, new_job):
    broker = Broker(own_client)
    await a_job_through(broker, new_job)
    await own_client.script_flush()
    await a_job_through(broker, new_job)
    own_server.stop()
    own_server.start()
    await a_job_through(broker, new_job)
    assert len((await broker.list(None)).jobs) == 3


async def test_a_short_restart_passes_unnoticed(own_server, own_client, new_job):
    broker = Broker(own_client)
    await a_job_through(broker, new_job)
    own_server.stop()
    restart = asyncio.create_task(asyncio.to_thread(own_server.start))
    await a_job_through(broker, new_job)
    await restart


async def test_a_full_server_refuses_new_jobs_and_still_ends_old_ones(own_client, new_job, audit):
    """Out of memory is told before a script begins: none stops half-way, and what frees memory goes on."""
    broker = Broker(own_client, limits=BrokerLimits(result_ttl_ms=1_000_000))
    for _ in range(4):
        await broker.submit(new_job(max_attempts=1))
    await own_client.config_set("maxmemory", "1")
    for _ in range(3):
        with pytest.raises(OutOfSpace):
            await broker.submit(new_job())
    first, second, third = (await broker.take("w", ["cpu"], 3, lease_ms=30_000, engine_idle=True)).leases
    assert await broker.renew([first.ref], 30_000) == ["held"]
    assert await broker.finish(first.ref, resource=None, timings={})
    assert await broker.fail(second.ref, {"detail": "x"}, retry=True)
    assert await broker.release(third.ref, reason="drain")
    await audit(own_client, broker.prefix)
    broker.clock_skew_ms += 2_000_000
    assert (await broker.reap()).purged == 2
    await own_client.config_set("maxmemory", "0")
    await a_job_through(broker, new_job)
    await audit(own_client, broker.prefix)


async def test_kill_nine_of_the_server_loses_no_acknowledged_job(own_server, own_client, new_job, audit, until):
    broker = Broker(own_client)
    acknowledged, running = [], True

    async def submitting():
        while running:
            job = new_job()
            while True:
                try:
                    await broker.submit(job)
                    break
                except Unavailable:
                    pass
            acknowledged.append(job.id)

    submitters = [asyncio.create_task(submitting()) for _ in range(4)]
    for round_ in range(1, 4):
        wanted = 40 * round_
        await until(lambda wanted=wanted: len(acknowledged) >= wanted)
        os.kill(own_server.pid, signal.SIGKILL)
        await asyncio.to_thread(own_server.start)
    running = False
    await asyncio.gather(*submitters)
    stats = await broker.stats()
    # Each once; nothing else, since what was not acknowledged was sent again under the same id.
    assert stats.jobs["queued"] == len(acknowledged) == len(set(acknowledged))
    await audit(own_client, broker.prefix)
    served = set()
    while leases := (await broker.take("w", ["cpu"], 64, lease_ms=30_000, engine_idle=True)).leases:
        served |= {lease.job_id for lease in leases}
    assert served == set(acknowledged)
