"""The digest of a download, worked out beside its arrival."""

from __future__ import annotations

import hashlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hashlib import _Hash

_HASHED_AT_ONCE, _AHEAD = 2**20, 16
"""Bytes that are handed to the thread that sums them up, and how many such pieces may wait for it."""


class Digest:
    """The SHA-256 of what arrives, against the one that is expected; a thread sums a large one up as it arrives.

    Where none is expected nothing is summed up.
    """

    def __init__(self, expected: str | None) -> None:
        self._expected = expected
        self._hash = hashlib.sha256()
        self._waiting: list[bytes] = []
        self._size = 0
        self._begun: deque[Future[None]] = deque()
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Digest:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def update(self, chunk: bytes) -> None:
        """The next of it."""
        if self._expected is None:
            return
        self._waiting.append(chunk)
        self._size += len(chunk)
        if self._size >= _HASHED_AT_ONCE:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(1, "bathyscope-digest")
            while len(self._begun) >= _AHEAD:  # what arrives faster than it is summed up waits here, not in memory
                self._begun.popleft().result()
            self._begun.append(self._pool.submit(_sum_up, self._hash, self._waiting))
            self._waiting, self._size = [], 0

    def restart(self) -> None:
        """All of it comes again."""
        self._finish()
        self._hash = hashlib.sha256()

    def fits(self) -> bool:
        """Whether the whole is what was expected."""
        self._finish()
        return self._expected is None or self._hash.hexdigest() == self._expected

    def _finish(self) -> None:
        while self._begun:
            self._begun.popleft().result()
        _sum_up(self._hash, self._waiting)
        self._waiting, self._size = [], 0


def _sum_up(digest: _Hash, chunks: list[bytes]) -> None:
    for chunk in chunks:
        digest.update(chunk)
