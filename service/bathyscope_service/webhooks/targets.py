"""Which URLs a webhook may have, and which addresses it may be sent to.

A URL is judged twice. At submission its form is checked, and a literal address in any spelling that a resolver takes
(`127.1`, `0x7f.1`, `2130706433`, `[::ffff:7f00:1]`, full-width digits) counts as the address that it is. At delivery
every address that the name resolves to is checked, and one of those is connected to: what the name resolves to before
or after does not matter.

There is one parser for both, so that what was checked is what is connected to.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass
from urllib.parse import quote

import idna

from bathyscope.errors import FieldError, InvalidRequest
from bathyscope_backplane.addresses import Address, is_public

_URL = re.compile(r"(?P<scheme>https?)://(?P<authority>[^/?#]*)(?P<path>[^?#]*)(?P<query>\?[^#]*)?", re.IGNORECASE)
_AUTHORITY = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]{2,45}\]|[^\[\]:]{1,255})(?::(?P<port>[0-9]{1,5}))?")
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_LOWEST_OPEN_PORT = 1024  # below it only the web's own: a webhook is no way to speak to a mail server
_WEB_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Target:
    """A URL that has the form of a webhook's."""

    scheme: str
    """`http` or `https`."""

    host: str
    """ASCII, lower case, without a final dot; an IPv6 address without its brackets."""

    port: int
    path: str
    """With the query; ASCII."""

    address: Address | None
    """The host, when it is a literal address in some spelling."""

    @property
    def authority(self) -> str:
        """As in the `Host` header: with the port only where it is not the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _WEB_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def origin(self) -> str:
        """The URL without path and query, which may hold a secret."""
        return f"{self.scheme}://{self.authority}"

    @property
    def url(self) -> str:
        """The whole URL, in one spelling."""
        return self.origin + self.path


def check_target(url: str, *, allow_private: bool) -> Target:
    """The target of a webhook. Raises `InvalidRequest` that points at `/webhook`."""
    try:
        target = parse(url)
        if not allow_private:
            if target.address is not None and not is_public(target.address):
                raise ValueError("webhooks are not sent to loopback, link-local, private or reserved addresses")
            if target.host == "localhost" or target.host.endswith(".localhost"):
                raise ValueError("webhooks are not sent to this machine")
    except ValueError as error:
        raise InvalidRequest(
            "The webhook is not a URL that this service sends to.",
            errors=[FieldError(pointer="/webhook", detail=str(error))],
        ) from None
    return target


def parse(url: str) -> Target:
    """The parts of a URL. Raises `ValueError` with what is wrong with it, in words of its own."""
    if any(letter <= " " or letter in "\\\x7f" for letter in url):
        raise ValueError("it holds a space, a control character or a backslash; percent-encode it")
    if "#" in url:
        raise ValueError("it has a fragment, which is never sent; leave it out")
    found = _URL.fullmatch(url)
    if found is None:
        raise ValueError("it must begin with https:// or http://")
    if "@" in found["authority"]:
        raise ValueError("it holds a user name; put a secret into its path or query, or check the signature instead")
    authority = _AUTHORITY.fullmatch(found["authority"])
    if authority is None:
        raise ValueError("its host and port cannot be read")
    scheme = found["scheme"].lower()
    port = int(authority["port"] or _WEB_PORTS[scheme])
    if port not in _WEB_PORTS.values() and not _LOWEST_OPEN_PORT <= port <= 65535:
        raise ValueError("its port must be 80, 443 or one from 1024 to 65535")
    host, address = _host(authority["host"])
    try:
        path = quote((found["path"] or "/") + (found["query"] or ""), safe="!$%&'()*+,/:;=?@-._~[]|^")
    except UnicodeEncodeError:
        raise ValueError("it holds half a character (a lone surrogate)") from None
    return Target(scheme, host, port, path, address)


def _host(text: str) -> tuple[str, Address | None]:
    if text.startswith("["):
        try:
            literal = ipaddress.IPv6Address(text[1:-1])
        except ValueError:
            raise ValueError("its host is no IPv6 address") from None
        return str(literal), literal
    if not text.isascii():
        try:
            text = idna.encode(text, uts46=True).decode()
        except UnicodeError:  # idna's errors are of this kind
            raise ValueError("its host is no domain name") from None
    host = text.lower().removesuffix(".")
    labels = host.split(".")
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError("its host is no domain name")
    # Whatever ends in a number is an IPv4 address to resolvers (and to the URL standard), or nothing.
    if _NUMBER.fullmatch(labels[-1]):
        try:
            address = ipaddress.IPv4Address(socket.inet_aton(host))
        except (OSError, ValueError):
            raise ValueError("its host is no IPv4 address") from None
        return str(address), address
    return host, None
