"""HTTP/1.1 on the socket, with bounds on what a client can hold or make the service hold.

uvicorn's httptools protocol bounds neither the head of a request, nor how long it takes to arrive, nor pipelined
requests, nor a reader that never reads. `bounded(limits)` is that protocol with these added:

- URL, number of header fields and bytes of the head: `414` and `431` before the application is called.
- A head must be complete `head_seconds` after its first byte (after the connection, for the first one): `408`.
- A response that nobody reads ends with its connection after `stall_seconds`; a body that goes on after its response
  is read and dropped for ten seconds, so that the client gets to see the answer.
- Past `max_connections` the connection that has been idle longest is closed; with none idle the new one gets `503`.
- What is not HTTP gets a `400` problem document and is closed.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, ClassVar

import httptools
import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from bathyscope.errors import HeadersTooLarge, MalformedRequest, ProblemError, RequestTimeout, Unavailable, UrlTooLong
from bathyscope_backplane.settings import Limits
from bathyscope_service.problems import MEDIA_TYPE

_LINGER_SECONDS = 10.0
_STALL_BYTES = 16 * 1024
"""A reader that takes less than this in `stall_seconds` reads too slowly to be waited for."""
_PIPELINED = 16
"""Requests of one connection that may wait for the one before them."""

_log = logging.getLogger(__name__)


def bounded(limits: Limits) -> type[HttpToolsProtocol]:
    """The protocol class under these limits, for `uvicorn.Config(http=…)`."""
    return type("BoundedProtocol", (_Protocol,), {"limits": limits})


class _Protocol(HttpToolsProtocol):
    limits: ClassVar[Limits]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._running: RequestResponseCycle | None = None
        """The request that is being answered; `cycle` is the one read last."""
        self._head_bytes = 0
        self._frame_bytes = 0
        """Of a chunked body what is neither content nor a fair share of chunk sizes: extensions and trailers."""
        self._in_head = False
        self._in_body = False
        self._refusal: ProblemError | None = None
        self._deadline: asyncio.TimerHandle | None = None
        """Of a head that is arriving, or of a body that goes on after its response."""
        self._stall: asyncio.TimerHandle | None = None
        self._idle_since = self.loop.time()

    # --- connections --------------------------------------------------------------------------------------

    @property
    def _busy(self) -> bool:
        return bool(self.pipeline) or (self._running is not None and not self._running.response_complete)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Make room for the new connection, or turn it away."""
        super().connection_made(transport)
        self._set_deadline(self.limits.head_seconds)
        most = self.limits.max_connections
        if len(self.connections) <= most:
            return
        others = (one for one in self.connections if isinstance(one, _Protocol) and one is not self and not one._busy)
        oldest = min(others, key=lambda one: one._idle_since, default=None)
        if oldest is None:
            self._refuse(Unavailable(f"All of the {most:,} connections are busy; try again soon.", retry_after=5))
        else:
            oldest.transport.abort()  # closed politely it would be kept until the other end has read what is left

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell every request of the connection, pipelined ones too, and forget the timers."""
        super().connection_lost(exc)
        self._clear_deadline()
        self._unset_keepalive_if_required()
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
        self.pipeline.clear()
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()

    # --- reading ------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Parse; refuse a head that grows without end."""
        if self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        if self._in_body:
            self._frame_bytes += len(data)
        else:
            self._head_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self._refuse(self._refusal or MalformedRequest("This is not a request of HTTP/1.1 that can be read."))
            return
        except httptools.HttpParserUpgrade:  # nothing is upgraded to here; what follows cannot be parsed
            self.cycle.keep_alive = False
        size = self._frame_bytes if self._in_body else self._head_bytes
        if size > self.limits.max_header_bytes:
            self._refuse(self._too_large(size))
        elif not self._in_body and not self._busy and not self._deadline and not self.timeout_keep_alive_task:
            self._set_deadline(self.limits.head_seconds)

    def on_message_begin(self) -> None:
        """A head begins."""
        self._in_head = True
        self._head_bytes = 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header field; fields of a trailer are dropped."""
        if self._in_body:
            return
        if len(self.headers) >= self.limits.max_headers:
            most = self.limits.max_headers
            self._stop(HeadersTooLarge(f"The request has more than {most} header fields.", limit=most))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is there: judge it, then begin."""
        limits = self.limits
        if len(self.url) > limits.max_url_bytes:
            size, most = len(self.url), limits.max_url_bytes
            self._stop(UrlTooLong(f"The URL has {size:,} bytes and the limit is {most:,}.", estimate=size, limit=most))
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > limits.max_header_bytes:
            self._stop(self._too_large(size))
        version = self.parser.get_http_version()
        if version not in ("1.0", "1.1"):
            self._stop(MalformedRequest(f"HTTP/{version} is not spoken here; HTTP/1.1 is."))
        hosts = sum(name == b"host" for name, _ in self.headers)
        if hosts > 1 or (not hosts and version == "1.1"):
            self._stop(MalformedRequest("A request of HTTP/1.1 has one Host header."))
        if len(self.pipeline) >= _PIPELINED:
            self._stop(MalformedRequest(f"More than {_PIPELINED} requests were sent ahead of their answers."))
        self._in_head, self._in_body, self._frame_bytes = False, True, 0
        self._clear_deadline()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Content: a byte of it may come with sixteen of chunk sizes."""
        self._frame_bytes = max(0, self._frame_bytes - 17 * len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The body is there; where its response was sent before, the connection is idle from now on."""
        self._in_body = False
        self._head_bytes = 0
        super().on_message_complete()
        if self.cycle.response_complete:
            self._clear_deadline()
            self._rest()

    def _stop(self, problem: ProblemError) -> None:
        """Leave the parser: it reports an error, and `data_received` sends this problem."""
        self._refusal = problem
        raise problem

    def _too_large(self, size: int) -> HeadersTooLarge:
        most = self.limits.max_header_bytes
        return HeadersTooLarge(
            f"The request's head has {size:,} bytes or more and the limit is {most:,}.", estimate=size, limit=most
        )

    def _refuse(self, problem: ProblemError) -> None:
        """Answer with a problem and close; in the middle of another answer just close."""
        running = self._running
        if self._in_body and running is not None and running is self.cycle and not running.response_started:
            running.disconnected = True  # its body cannot be read on: this is its answer
            running.message_event.set()
            alone = True
        else:
            alone = not self._busy
        if alone and not self.transport.is_closing():
            content = orjson.dumps({**problem.problem(), "instance": "/"})
            lines = [STATUS_LINE[problem.status]]
            lines += [b"%b: %b\r\n" % (name, value) for name, value in self.server_state.default_headers]
            if problem.retry_after is not None:
                lines.append(b"retry-after: %d\r\n" % round(problem.retry_after))
            lines.append(b"content-type: %b\r\ncache-control: no-store\r\n" % MEDIA_TYPE.encode())
            lines.append(b"content-length: %d\r\nconnection: close\r\n\r\n" % len(content))
            self.transport.write(b"".join(lines) + content)
        _log.debug("connection refused: %s", problem.detail)
        self.transport.close()

    # --- answering ----------------------------------------------------------------------------------------

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        """Go on with the next request, or wait for one: not for ever for the rest of a body that nobody wants."""
        super().on_response_complete()
        self._idle_since = self.loop.time()
        if self._in_body and self.cycle.response_complete and not self.transport.is_closing():
            self._set_deadline(_LINGER_SECONDS)

    def _rest(self) -> None:
        self._unset_keepalive_if_required()
        if not self.transport.is_closing():
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def timeout_keep_alive_handler(self) -> None:
        """The connection was idle for long; one whose last answer was never read would not end by a polite close."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def pause_writing(self) -> None:
        """The other end does not read: see whether it goes on."""
        super().pause_writing()
        self._watch(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """It read."""
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _watch(self, size: int) -> None:
        self._stall = self.loop.call_later(self.limits.stall_seconds, self._check_reader, size)

    def _check_reader(self, size: int) -> None:
        self._stall = None
        left = self.transport.get_write_buffer_size()
        if size - left < _STALL_BYTES:
            self.transport.abort()
        else:
            self._watch(left)

    # --- deadlines ----------------------------------------------------------------------------------------

    def _set_deadline(self, seconds: float) -> None:
        self._clear_deadline()
        self._deadline = self.loop.call_later(seconds, self._late)

    def _clear_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self) -> None:
        self._deadline = None
        if self._in_head:
            seconds = self.limits.head_seconds
            self._refuse(
                RequestTimeout(f"The request's head did not arrive within {seconds:g} seconds.", limit=seconds)
            )
        else:
            self.transport.close()
