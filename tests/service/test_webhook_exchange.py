"""One delivery against servers that mean well, and servers that do not."""

from __future__ import annotations

import asyncio
import ipaddress
import itertools
import socket
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from bathyscope_backplane.addresses import Address, is_public
from bathyscope_service.webhooks.exchange import Exchange, Outcome
from bathyscope_service.webhooks.targets import parse
from tests.service.receiver import Receiver, receiver

OUTSIDE = ipaddress.ip_address("127.0.0.2")
INSIDE = ipaddress.ip_address("127.0.0.1")


def outside(address: Address) -> bool:
    """For tests on one machine: 127.0.0.2 is the internet, and 127.0.0.1 what must not be reached."""
    return address not in (INSIDE, ipaddress.ip_address("::1"))


class Names:
    """A name server whose answer changes from one question to the next; the last one stays."""

    def __init__(self, *answers: list[Address]) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    async def __call__(self, host: str) -> list[Address]:
        self.asked.append(host)
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


@pytest.fixture
def good() -> Iterator[Receiver]:
    with receiver(str(OUTSIDE)) as made:
        yield made


@pytest.fixture
def secret(good: Receiver) -> Iterator[Receiver]:
    """What listens on the inside, at the same port: it must never be reached."""
    with receiver(str(INSIDE), good.port) as made:
        yield made
        assert made.deliveries == []


async def post(url: str, names: Names | None = None, timeout_s: float = 10, **options: object) -> Outcome:
    exchange = Exchange(timeout_s=timeout_s, **{"allowed": outside, "resolve": names, **options})  # type: ignore[arg-type]
    async with asyncio.timeout(30):
        return await exchange.post(parse(url), {"Content-Type": "application/json"}, b'{"id": 1}')


async def test_what_the_name_means_later_does_not_matter(good: Receiver, secret: Receiver) -> None:
    names = Names([OUTSIDE], [INSIDE])
    # The system's own answer for this name is the inside too.
    outcome = await post(f"http://localhost:{good.port}/x?y=1", names)
    assert (outcome.state, outcome.status) == ("delivered", 204)
    assert names.asked == ["localhost"]
    (delivery,) = good.deliveries
    assert (delivery.path, delivery.body) == ("/x?y=1", b'{"id": 1}')
    assert delivery.headers["host"] == f"localhost:{good.port}"
    assert delivery.headers["content-type"] == "application/json"
    again = await post(f"http://localhost:{good.port}/x", names)
    assert (again.state, again.status) == ("refused", None)
    assert "127" not in again.detail


async def test_of_several_addresses_only_an_allowed_one_is_connected_to(good: Receiver, secret: Receiver) -> None:
    nobody = ipaddress.ip_address("127.0.0.3")
    outcome = await post(f"http://mixed.example:{good.port}/", Names([INSIDE, nobody, OUTSIDE]))
    assert outcome.state == "delivered"
    assert len(good.deliveries) == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "2130706433", "[::1]", "[::ffff:127.0.0.1]", "localhost"])
async def test_the_rule_for_the_internet_holds_at_delivery_too(secret: Receiver, host: str) -> None:
    outcome = await post(f"http://{host}:{secret.port}/", allowed=is_public)  # with the system's own resolver
    assert (outcome.state, outcome.status) == ("refused", None)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_not_followed(good: Receiver, secret: Receiver, status: int) -> None:
    with receiver(str(OUTSIDE)) as elsewhere:
        for to in (f"http://127.0.0.1:{good.port}/", f"http://127.0.0.2:{elsewhere.port}/"):
            good.answers = [
                f"HTTP/1.1 {status} Moved\r\nLocation: {to}\r\nContent-Length: 0\r\n\r\n".encode(),
            ]
            outcome = await post(f"http://127.0.0.2:{good.port}/")
            assert (outcome.state, outcome.status) == ("again", status)
        assert elsewhere.deliveries == []


async def test_no_proxy_of_the_environment_and_no_cookie(
    good: Receiver, secret: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{secret.port}")
    good.answers = [b"HTTP/1.1 200 OK\r\nSet-Cookie: a=b; Path=/\r\nContent-Length: 2\r\n\r\nok"]
    exchange = Exchange(timeout_s=10, allowed=outside, resolve=Names([OUTSIDE]))
    for _ in range(2):
        outcome = await exchange.post(parse(f"http://a.example:{good.port}/"), {}, b"{}")
        assert outcome.state == "delivered"
    assert len(good.deliveries) == 2
    assert all("cookie" not in delivery.headers for delivery in good.deliveries)
    assert all(delivery.headers["accept-encoding"] == "identity" for delivery in good.deliveries)


@pytest.mark.parametrize("status", [100, 199, 400, 404, 410, 429, 500, 503])
async def test_any_other_status_is_tried_again(good: Receiver, status: int) -> None:
    good.answers = [f"HTTP/1.1 {status} X\r\nContent-Length: 0\r\n\r\n".encode()]
    outcome = await post(f"http://127.0.0.2:{good.port}/")
    assert outcome.state == "again"
    assert outcome.status == (status if status >= 200 else None)


GZIP_BOMB = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\n\x1f\x8b\x08\x00"


@pytest.mark.parametrize(
    ("pieces", "state"),
    [
        # The status is all that counts: what follows may be endless, slow, or broken.
        (itertools.chain([b"HTTP/1.1 200 OK\r\n\r\n"], itertools.repeat(b"x" * 65536)), "delivered"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n", b"then nothing", None], "delivered"),
        ([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzzz\r\n"], "delivered"),
        ([GZIP_BOMB], "delivered"),
        ([None], "again"),
        (itertools.chain([b"HTTP/1.1 200 OK\r\n"], itertools.repeat(b"X-Drip: 1\r\n")), "again"),
        (itertools.repeat(b"HTTP/1.1 100 Continue\r\n\r\n"), "again"),
        ([b"HTTP/1.1 200 OK\r\nX: " + b"x" * 10_000_000], "again"),
        ([b"SSH-2.0-OpenSSH_9\r\n", None], "again"),
        ([b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", None], "again"),
        ([b""], "again"),
    ],
    ids=["endless", "stalled", "broken", "gzip", "silent", "drip", "100", "huge head", "ssh", "upgrade", "empty"],
)
async def test_servers_that_mean_harm(pieces: list[bytes | None], state: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            for piece in pieces:
                if piece is None:
                    await reader.read()  # until the other side gives up
                    break
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.001)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, str(OUTSIDE), 0)
    async with server:
        outcome = await post(f"http://127.0.0.2:{server.sockets[0].getsockname()[1]}/", timeout_s=0.5)
    assert outcome.state == state, outcome


async def test_nobody_there_no_name_and_a_name_server_that_keeps_silent() -> None:
    with socket.socket() as closed:
        closed.bind((str(OUTSIDE), 0))
        outcome = await post(f"http://127.0.0.2:{closed.getsockname()[1]}/")
    assert outcome == Outcome("again", "The host could not be connected to.")
    assert await post("http://no-such-name.invalid/") == Outcome("again", "The host's name could not be resolved.")

    async def silent(host: str) -> list[Address]:
        await asyncio.sleep(3600)
        return []

    outcome = await post("http://slow.example/", resolve=silent, timeout_s=0.2)
    assert outcome == Outcome("again", "There was no answer within 0.2 seconds.")


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A self-signed certificate of a name, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "cert.pem", folder / "key.pem"
    paths[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return paths


async def test_certificates_are_checked_for_the_name(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path, "hook.example")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(cert, key)
    trust = ssl.create_default_context(cafile=str(cert))
    with receiver(str(OUTSIDE), tls=server) as target:
        url = f"https://hook.example:{target.port}/x"
        outcome = await post(url, Names([OUTSIDE]))
        assert outcome.state == "again"
        assert "certificate" in outcome.detail
        assert "self-signed" in outcome.detail
        for other in ("other.example", "127.0.0.2"):
            outcome = await post(f"https://{other}:{target.port}/x", Names([OUTSIDE]), trust=trust)
            assert outcome.state == "again"
            assert "certificate" in outcome.detail
        assert target.deliveries == []
        outcome = await post(url, Names([OUTSIDE]), trust=trust)
        assert outcome.state == "delivered"
        assert target.server_name == "hook.example"
        assert target.deliveries[0].headers["host"] == f"hook.example:{target.port}"
    with receiver(str(OUTSIDE)) as plain:
        assert (await post(f"https://hook.example:{plain.port}/", Names([OUTSIDE]))).state == "again"
        assert plain.deliveries == []
