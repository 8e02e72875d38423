"""One POST to one webhook: resolved once, connected to as resolved, and over by its deadline.

The name is looked up here and nowhere else. Every address found is checked, and the connection is made to a checked one
by its number, while `Host`, the name in the TLS handshake and the certificate's check stay the name's own. It is one
bare HTTP/1.1 exchange: no proxy of the environment, no redirect, no cookie, no decompression, no connection kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import httpcore2

from bathyscope_backplane.addresses import Address, is_public
from bathyscope_service.webhooks.targets import Target

Resolve = Callable[[str], Awaitable[list[Address]]]

_TRIED = 4  # addresses of one name
_BODY_BYTES = 64 * 1024  # of an answer that are read before the connection is closed
_BODY_SECONDS = 2.0
_FAULTS = (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException, OSError)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of an exchange."""

    state: Literal["delivered", "again", "failed", "refused"]
    """`again`: it did not work this time."""

    detail: str
    """A sentence for the job's owner. It tells nothing of the network that the service is in."""

    status: int | None = None
    """Of the answer, when there was one."""


class Refused(Exception):
    """The host leads to no address that may be connected to."""


class Exchange:
    """Makes POSTs.

    `allowed` says which addresses may be connected to, `resolve` finds those of a name, `trust` judges certificates.
    """

    def __init__(
        self,
        *,
        timeout_s: float,
        allowed: Callable[[Address], bool] = is_public,
        resolve: Resolve | None = None,
        trust: ssl.SSLContext | None = None,
    ) -> None:
        self._timeout_s = timeout_s
        self._allowed = allowed
        self._resolve = resolve or Resolver().resolve
        self._trust = trust or httpcore2.default_ssl_context()

    async def post(self, target: Target, headers: Mapping[str, str], body: bytes) -> Outcome:
        """Send a body; never raises for what the other side does."""
        connection: httpcore2.AsyncHTTPConnection | None = None
        try:
            async with asyncio.timeout(self._timeout_s):
                addresses = await self._addresses(target)
                connection = self._connection(target, addresses)
                response = await connection.handle_async_request(_request(target, headers, body))
            await _discard(response)
        except Refused:
            return Outcome("refused", "The host leads to an address that webhooks are not sent to.")
        except TimeoutError:
            return Outcome("again", f"There was no answer within {self._timeout_s:g} seconds.")
        except _FAULTS as error:
            return Outcome("again", _sentence(error))
        finally:
            if connection is not None:
                await connection.aclose()
        if 200 <= response.status < 300:
            return Outcome("delivered", f"The answer was {response.status}.", response.status)
        return Outcome("again", f"The answer was {response.status}, not 2xx.", response.status)

    async def _addresses(self, target: Target) -> list[Address]:
        found = [target.address] if target.address is not None else await self._resolve(target.host)
        allowed = [address for address in dict.fromkeys(found) if self._allowed(address)]
        if not allowed:
            raise Refused
        return allowed[:_TRIED]

    def _connection(self, target: Target, addresses: list[Address]) -> httpcore2.AsyncHTTPConnection:
        return httpcore2.AsyncHTTPConnection(
            httpcore2.Origin(target.scheme.encode(), target.host.encode(), target.port),
            ssl_context=self._trust,
            network_backend=_Pinned(addresses, self._allowed, self._timeout_s / (len(addresses) + 1)),
        )


class _Pinned(httpcore2.AsyncNetworkBackend):
    """Connects to one of the addresses that were checked, whatever host it is asked for."""

    def __init__(self, addresses: list[Address], allowed: Callable[[Address], bool], timeout_s: float) -> None:
        self._addresses = addresses
        self._allowed = allowed
        self._timeout_s = timeout_s
        self._backend = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """The first of the addresses that takes the connection. The peer is asked for once more when it stands."""
        fault: Exception = httpcore2.ConnectError("no address")
        for address in self._addresses:
            try:
                stream = await self._backend.connect_tcp(str(address), port, timeout=self._timeout_s)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                fault = error
                continue
            if self._allowed(ipaddress.ip_address(stream.get_extra_info("server_addr")[0])):
                return stream
            await stream.aclose()
            raise Refused
        raise fault


class Resolver:
    """Looks names up in threads: the system's own look-up takes its time and cannot be called off.

    The threads are not those of the event loop's pool, which a name server that keeps silent would use up, and they do
    not hold up the end of the process. A name that waits for a free one waits within its delivery's deadline.
    """

    def __init__(self, most: int = 128) -> None:
        self._free = asyncio.Semaphore(most)

    async def resolve(self, host: str) -> list[Address]:
        """The addresses of a name, in the system's order of preference. Raises `OSError`."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[list[Address]] = loop.create_future()

        def tell(found: list[Address], error: OSError | None) -> None:
            self._free.release()
            if answer.done():  # nobody waits any more
                return
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(found)

        def look_up() -> None:
            found: list[Address] = []
            fault: OSError | None = None
            try:
                for family, _, _, _, where in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM):
                    if family in (socket.AF_INET, socket.AF_INET6):
                        found.append(ipaddress.ip_address(where[0]))
            except OSError as error:
                fault = error
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(tell, found, fault)

        await self._free.acquire()
        try:
            threading.Thread(target=look_up, name="webhook-lookup", daemon=True).start()
        except RuntimeError as error:
            self._free.release()
            raise OSError("no thread for the look-up") from error
        return await answer


def _request(target: Target, headers: Mapping[str, str], body: bytes) -> httpcore2.Request:
    url = httpcore2.URL(
        scheme=target.scheme.encode(), host=target.host.encode(), port=target.port, target=target.path.encode()
    )
    given = {
        "Host": target.authority,
        "Accept": "*/*",
        "Accept-Encoding": "identity",
        "Connection": "close",
        "Content-Length": str(len(body)),
        **headers,
    }
    return httpcore2.Request("POST", url, headers=list(given.items()), content=body)


async def _discard(response: httpcore2.Response) -> None:
    """Read a small body to its end, as is polite; a large, slow or faulty one is of no interest."""
    read = 0
    with contextlib.suppress(TimeoutError, *_FAULTS):
        async with asyncio.timeout(_BODY_SECONDS), contextlib.aclosing(response.aiter_stream()) as pieces:
            async for piece in pieces:
                read += len(piece)
                if read > _BODY_BYTES:
                    return


def _sentence(error: BaseException) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"The host's certificate is not valid: {cause.verify_message}."
        if isinstance(cause, ssl.SSLError):
            return "TLS could not be agreed upon with the host."
        if isinstance(cause, socket.gaierror):
            return "The host's name could not be resolved."
        cause = cause.__cause__
    if isinstance(error, httpcore2.ConnectTimeout | httpcore2.ConnectError | OSError):
        return "The host could not be connected to."
    if isinstance(error, httpcore2.RemoteProtocolError):
        return "The answer was not HTTP/1.1."
    return "The connection broke off before an answer."
