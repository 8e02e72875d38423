"""Waiting for Redis: within a time, and with errors of this project."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from redis.exceptions import (
    ClusterError,
    ConnectionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    ResponseError,
    TimeoutError,
    TryAgainError,
)

from bathyscope.errors import OutOfSpace, Unavailable

T = TypeVar("T")

RETRY_AFTER_S = 2.0
"""What a client is told to wait when Redis is out of reach: about a restart or a failover."""

_FULL_RETRY_AFTER_S = 30.0

_OUT_OF_REACH = (
    ConnectionError,
    TimeoutError,
    ClusterError,
    RedisClusterException,
    OutOfMemoryError,
    ReadOnlyError,
    TryAgainError,
    NoScriptError,
    OSError,
    # redis-py raises these when a connection is torn down under a reader.
    asyncio.IncompleteReadError,
)
_STATES_OF_THE_SERVER = ("MISCONF", "LOADING", "BUSY", "NOREPLICAS", "MASTERDOWN")


async def answer(awaitable: Awaitable[T], within_s: float) -> T:
    """The reply of Redis.

    Raises `Unavailable` when it cannot be reached, does not answer within `within_s` seconds (retries included),
    or answers that it takes no writes now (read-only, loading), and `OutOfSpace` when its memory or its disk is full.
    What a write did is unknown then; all scripts of the broker may be sent again.
    """
    try:
        async with asyncio.timeout(within_s):
            return await awaitable
    except _OUT_OF_REACH as error:
        raise _unavailable(error) from error
    except ResponseError as error:
        if str(error).startswith(_STATES_OF_THE_SERVER):
            raise _unavailable(error) from error
        raise


def _unavailable(error: BaseException) -> Unavailable:
    if isinstance(error, OutOfMemoryError) or "No space left" in str(error):
        return OutOfSpace(
            "The queue's memory or disk is full; wait until jobs have ended, or let the operator give it more.",
            retry_after=_FULL_RETRY_AFTER_S,
        )
    refuses = isinstance(error, ReadOnlyError) or str(error).startswith(("MISCONF", "NOREPLICAS"))
    # Addresses of the backplane are no business of a client: only the kind of fault is told.
    word = "does not accept writes now" if refuses else "is out of reach"
    return Unavailable(f"The queue {word}; try again in a moment.", retry_after=RETRY_AFTER_S)
