"""HEAD wherever GET is: the same headers, and nothing of the body is made."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Head:
    """ASGI middleware that answers a HEAD as a GET and ends it with its headers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through; a HEAD as a GET."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            if message["type"] != "http.response.start":
                return
            await send(message)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            raise _Answered  # or a stream would be read to its end for nobody

        try:
            await self._app({**scope, "method": "GET", "asked_method": "HEAD"}, receive, send_head)
        except _Answered:
            return


class _Answered(Exception):
    """The headers are sent."""
