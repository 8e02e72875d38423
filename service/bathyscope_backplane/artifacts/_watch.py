"""Telling how long the calls of a store take."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, TypeVar

from bathyscope.errors import Unavailable

Watch = Callable[[str, float, bool], None]
"""Gets an operation, its seconds, and whether the store was out of reach."""

Kind = TypeVar("Kind", bound=type[Any])


def watched(*operations: str) -> Callable[[Kind], Kind]:
    """Have instances of a class tell their attribute `watch`, when it is set, of these asynchronous methods."""

    def decorate(kind: Kind) -> Kind:
        for operation in operations:
            setattr(kind, operation, _timed(operation, getattr(kind, operation)))
        return kind

    return decorate


def _timed(operation: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    async def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        watch: Watch | None = self.watch
        if watch is None:
            return await method(self, *args, **kwargs)
        started, failed = time.perf_counter(), False
        try:
            return await method(self, *args, **kwargs)
        except Unavailable:
            failed = True
            raise
        finally:
            watch(operation, time.perf_counter() - started, failed)

    return call
