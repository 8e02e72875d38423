"""Where webhooks may be sent: every spelling of every address that is not the public internet's is refused."""

from __future__ import annotations

import ipaddress
import socket

import hypothesis.strategies as st
import pytest
from hypothesis import example, given

from bathyscope.errors import InvalidRequest
from bathyscope_backplane.addresses import is_public
from bathyscope_service.webhooks.targets import check_target, parse

PRIVATE = [
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.2.0/24",
    "192.88.99.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "224.0.0.0/4",
    "240.0.0.0/4",
]
PRIVATE_V6 = [
    "::/128",
    "::1/128",
    "64:ff9b:1::/48",
    "100::/64",
    "2001::/32",
    "2001:db8::/32",
    "2002::/16",
    "3fff::/20",
    "5f00::/16",
    "fc00::/7",
    "fe80::/10",
    "fec0::/10",
    "ff00::/8",
]
FULL_WIDTH = {ord("0") + k: ord("０") + k for k in range(10)} | {ord("."): ord("。")}


def of(networks: list[str]) -> st.SearchStrategy[int]:
    ranges = [ipaddress.ip_network(network) for network in networks]
    return st.sampled_from(ranges).flatmap(
        lambda net: st.integers(int(net.network_address), int(net.broadcast_address))
    )


@st.composite
def spelt(draw: st.DrawFn, addresses: st.SearchStrategy[int]) -> tuple[str, ipaddress.IPv4Address]:
    """An IPv4 address as resolvers read it: one to four parts, each decimal, octal or hexadecimal."""
    number = draw(addresses)
    parts = draw(st.integers(1, 4))
    values = [number >> (8 * (3 - k)) & 0xFF for k in range(parts - 1)]
    values.append(number & (1 << (8 * (5 - parts))) - 1)
    text = ".".join(draw(st.sampled_from(["{:d}", "0{:o}", "0x{:x}", "0X{:02X}", "000{:o}"])).format(v) for v in values)
    text += draw(st.sampled_from(["", "."]))
    if draw(st.booleans()):
        text = text.translate(FULL_WIDTH)
    return text, ipaddress.IPv4Address(number)


def url_of(host: str) -> str:
    return f"http://{host}:8080/hook?x=1"


def refused(url: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_target(url, allow_private=False)
    assert [fault["pointer"] for fault in caught.value.errors] == ["/webhook"]


@given(spelt(of(PRIVATE)))
def test_a_private_address_is_refused_in_every_spelling(address: tuple[str, ipaddress.IPv4Address]) -> None:
    refused(url_of(address[0]))
    assert parse(url_of(address[0])).address == address[1]


@given(spelt(st.integers(0, 2**32 - 1)))
def test_a_spelling_counts_as_the_address_that_it_is(address: tuple[str, ipaddress.IPv4Address]) -> None:
    target = parse(url_of(address[0]))
    assert target.address == address[1]
    assert target.host == str(address[1])
    # And so does the system's own resolver, which has no say in it any more.
    plain = address[0].translate({wide: narrow for narrow, wide in FULL_WIDTH.items()}).rstrip(".")
    assert socket.getaddrinfo(plain, None, flags=socket.AI_NUMERICHOST)[0][4][0] == target.host


@given(of(PRIVATE), st.sampled_from([("::ffff:0:0", 0), ("::", 0), ("64:ff9b::", 0), ("2002::", 80)]), st.booleans())
def test_a_private_address_inside_another_is_refused(inner: int, carrier: tuple[str, int], exploded: bool) -> None:
    prefix, shift = carrier
    address = ipaddress.IPv6Address(int(ipaddress.IPv6Address(prefix)) + (inner << shift))
    refused(url_of(f"[{address.exploded if exploded else address}]"))


@given(of(PRIVATE_V6))
def test_private_ipv6_is_refused(number: int) -> None:
    refused(url_of(f"[{ipaddress.IPv6Address(number)}]"))


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost/",
        "http://LOCALHOST:8080",
        "https://localhost./",
        "https://a.localhost/",
        "http://ⓛocalhost/",
        "http://loc\u00adalhost/",
        "http://127.1",
        "http://0x7f.1",
        "http://[::ffff:7f00:1]",
        "http://[::ffff:127.0.0.1]",
        "http://%31%32%37.0.0.1/",
        "http://127.0.0.1%2f@example.com/",
        "http://example.com@127.0.0.1/",
        "http://user:password@example.com/",
        "http://example.com\\@127.0.0.1/",
        "http://[fe80::1%25eth0]/",
        "http://[::1",
        "http://1.2.3.4.5/",
        "http://1.2.3.400/",
        "http://example.com/#fragment",
        "http://exa\tmple.com/",
        "http:///path",
        "http://example.com:/",
        "http://example.com:0/",
        "http://example.com:22/",
        "http://example.com:25/",
        "http://example.com:65536/",
        "http://a..example/",
        "http://-a.example/",
        "ftp://example.com/",
        "file:///etc/passwd",
        "javascript:alert(1)",
        "//example.com/",
        "example.com",
        "https://168.63.129.16/",
        "https://x.example/\ud800",
        "",
    ],
)
def test_what_is_no_webhook(url: str) -> None:
    refused(url)


@pytest.mark.parametrize(
    ("url", "spelling"),
    [
        ("https://example.com", "https://example.com/"),
        ("HTTPS://Example.COM.:443/Hook?Key=Ab%2F1", "https://example.com/Hook?Key=Ab%2F1"),
        ("http://exämple.com:8080/é?ü", "http://xn--exmple-cua.com:8080/%C3%A9?%C3%BC"),
        ("https://1.1.1.1/x", "https://1.1.1.1/x"),
        ("https://[2606:4700:4700:0::1111]:8443/x", "https://[2606:4700:4700::1111]:8443/x"),
        ("https://[64:ff9b::1.1.1.1]/", "https://[64:ff9b::101:101]/"),
        ("https://hooks.example?a=b", "https://hooks.example/?a=b"),
    ],
)
def test_what_is_one(url: str, spelling: str) -> None:
    assert check_target(url, allow_private=False).url == spelling


def test_the_operator_may_allow_private_ones() -> None:
    for url in ("http://127.0.0.1:8080/", "http://localhost/", "http://[::1]/"):
        assert check_target(url, allow_private=True).url


@given(st.text(max_size=60) | st.from_regex(r"https?://[^ ]{1,40}"))
@example("http://[::%eth0]/")
@example("http://0x/")
def test_any_text_is_a_target_or_refused_and_reads_the_same_again(text: str) -> None:
    try:
        target = check_target(text, allow_private=False)
    except InvalidRequest:
        return
    assert parse(target.url) == target
    assert target.url.isascii()
    assert target.url.isprintable()
    assert target.address is None or is_public(target.address)
