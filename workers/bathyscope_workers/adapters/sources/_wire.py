"""Connections for downloads: to addresses that were looked up once and checked, with signs of life while they wait.

What is downloaded is named by a server (signed URLs, redirects). A name is looked up here, every address found is
checked, and the connection is made to a checked one by its number, while the `Host` field, the name in the TLS
handshake and the certificate's check stay the name's own. Proxies of the environment are not used.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

import httpcore2

from bathyscope_backplane.addresses import Address, is_machines_own, is_public
from bathyscope_workers.adapters.sources._task import CallTimeout, Task

_CONNECT_SECONDS = 10.0
_LOOK_UP_SECONDS = 20.0
_TRIED = 4
_SLICE = 0.5
_LOWEST_OPEN_PORT = 1024  # below it only the web's own


class UrlRefused(Exception):
    """A URL that is not fetched, with why. Neither holds the URL: it may be a secret."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What is allowed of the URLs that a server names."""

    plain: bool
    """`http://`, too."""
    private: bool
    """Addresses that are not of the public internet, too, but for a cloud machine's own service."""

    def allow(self, address: Address) -> bool:
        """Whether a connection to it may be made."""
        return is_public(address) or (self.private and not is_machines_own(address))


def look_up(host: str) -> list[Address]:
    """The addresses of a name or of a literal one. Raises OSError."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(
        dict.fromkeys(
            ipaddress.ip_address(where[0])
            for family, _, _, _, where in found
            if family in (socket.AF_INET, socket.AF_INET6) and "%" not in str(where[0])
        )
    )


class Wire:
    """HTTP/1.1 to where a server of `base_url` sends us: no less secure, and no more private, than that itself is."""

    def __init__(self, base_url: str, task: Task) -> None:
        self._task = task
        parts = parse_url(base_url, Rules(plain=True, private=True))
        addresses = _resolve(parts.hostname or "", task)
        self.rules = Rules(plain=parts.scheme == "http", private=not all(is_public(address) for address in addresses))
        self._pool = httpcore2.ConnectionPool(
            network_backend=_Backend(task, self.rules), max_connections=1, http2=False, keepalive_expiry=5.0
        )

    def get(self, url: str, headers: dict[str, str]) -> Any:
        """A streaming GET, as a context manager that gives httpcore2's response. Raises UrlRefused and httpcore2's
        errors."""
        parse_url(url, self.rules)
        seconds = self._task.reach.stall_seconds
        timeout = {"connect": _CONNECT_SECONDS * _TRIED, "read": seconds, "write": seconds, "pool": 5.0}
        given = {
            "Accept": "*/*",
            "Accept-Encoding": "identity",
            "User-Agent": "bathyscope",
            **headers,
        }
        return self._pool.stream("GET", url, headers=list(given.items()), extensions={"timeout": timeout})

    def close(self) -> None:
        """Close the connections."""
        self._pool.close()

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def parse_url(url: str, rules: Rules) -> SplitResult:
    """The parts of a URL that may be fetched as far as its form tells. Raises UrlRefused."""
    if len(url) > 16_384 or not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        raise UrlRefused("it is too long, or holds characters that a URL does not")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise UrlRefused("its host or port cannot be read") from None
    if parts.scheme not in (("https", "http") if rules.plain else ("https",)):
        raise UrlRefused("it is not https")
    if not parts.hostname or parts.username is not None or parts.password is not None:
        raise UrlRefused("it has no host, or a user name")
    if port is not None and port not in (80, 443) and not (rules.private or port >= _LOWEST_OPEN_PORT):
        raise UrlRefused("its port is not one of the web")
    return parts


def _resolve(host: str, task: Task) -> list[Address]:
    try:
        return task.within(lambda: look_up(host), _LOOK_UP_SECONDS)
    except (OSError, UnicodeError, CallTimeout) as error:
        raise httpcore2.ConnectError("the host's name could not be resolved") from error


class _Backend(httpcore2.NetworkBackend):
    """Connects to a checked address of the host."""

    def __init__(self, task: Task, rules: Rules) -> None:
        self._task = task
        self._rules = rules
        self._inner = httpcore2.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        """The first of the addresses that takes the connection."""
        addresses = [address for address in _resolve(host, self._task) if self._rules.allow(address)]
        if not addresses:
            raise UrlRefused("it leads to an address that is not connected to, such as one of a private network")
        fault: Exception = httpcore2.ConnectError("no address")
        for address in addresses[:_TRIED]:
            self._task.beat()
            try:
                stream = self._inner.connect_tcp(str(address), port, timeout=_CONNECT_SECONDS)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                fault = error
                continue
            return _Stream(stream, self._task.beat)
        raise fault


class _Stream(httpcore2.NetworkStream):
    """A stream that gives signs of life while it waits for bytes."""

    def __init__(self, inner: httpcore2.NetworkStream, beat: Callable[[], None]) -> None:
        self._inner = inner
        self._beat = beat

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """As the inner one's, waited for in slices."""
        until = time.monotonic() + (timeout or _CONNECT_SECONDS)
        while True:
            self._beat()
            try:
                return self._inner.read(max_bytes, timeout=_SLICE)
            except httpcore2.ReadTimeout:
                if time.monotonic() > until:
                    raise

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """As the inner one's."""
        self._inner.write(buffer, timeout)

    def close(self) -> None:
        """As the inner one's."""
        self._inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        """As the inner one's."""
        return _Stream(self._inner.start_tls(ssl_context, server_hostname, timeout), self._beat)

    def get_extra_info(self, info: str) -> Any:
        """As the inner one's."""
        return self._inner.get_extra_info(info)
