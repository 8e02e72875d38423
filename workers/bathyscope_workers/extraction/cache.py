"""Rows of results that were computed before, on the worker's disk.

A row's key is a digest of all that its numbers depend on but the layer (`reuse`). Its layers come in groups, one for
each time that some were added, so that a row with more layers serves one that asks for fewer, and further ones join it:
`rows` holds a record (`cache_record`) under the key and the number of the group. `stamps` says when a row was last
used, `used` is the same in the order of time: when there is no room, rows go from its beginning. The file that holds
the three is the matter of `cache_file`.

Nothing here fails a job: what cannot be read is computed, what cannot be written is left out.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from bathyscope_workers.extraction.cache_file import CacheFile
from bathyscope_workers.extraction.cache_record import Block, Damaged, held_layers, parse, record, size_of

T = TypeVar("T")

MIN_BYTES = 2**20
"""A smaller cache is none."""
JOB_SHARE = 4
"""A job may put one part in so many of the cache, lest it drive out all that others put."""
_ROW_SHARE = 64
_GROUPS = 255
_FULL_AT = 0.85
"""Part of the map that may be in use: a change needs free pages for its copies, a long row needs them in one piece."""
_EVICTED_AT_ONCE = 512
_TOUCHED = 2000
_AT_ONCE_BYTES = 4 * 2**20
"""Of a transaction."""
_WRITING_PART, _CREDIT_SECONDS = 0.1, 0.5
"""Which part of the time that the device computes may go into writing, and how much of it is saved up."""


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """What an engine is told of its cache."""

    folder: Path
    max_bytes: int
    min_free_bytes: int = 0
    """Bytes of the disk that it leaves free."""
    shared: bool = False
    """Whether rows of one API key serve another."""


@dataclass(slots=True)
class CacheCounts:
    """What happened since it was last told."""

    hits: int = 0
    misses: int = 0
    duplicates: int = 0
    evicted: int = 0


@dataclass(slots=True)
class _Layers:
    """How a group's layers fit those that are asked for."""

    source: list[int] = field(default_factory=list)
    target: list[int] = field(default_factory=list)
    whole: bool = False
    """All of them, in the same order."""
    rest: tuple[int, ...] = ()
    """Those that it has not."""


class RowCache:
    """The cache of one engine. It is opened beside other work; until then nothing is found in it."""

    def __init__(self, options: CacheOptions) -> None:
        self.options = options
        self.counts = CacheCounts()
        self._file = CacheFile(options.folder, options.max_bytes, options.min_free_bytes)
        self._touched: dict[bytes, None] = {}
        self._credit = _CREDIT_SECONDS
        self._fits: dict[tuple[bytes, tuple[int, ...]], _Layers] = {}

    @property
    def ready(self) -> bool:
        """Whether rows can be read and written."""
        return self._file.ready

    def close(self) -> None:
        """Let go of it."""
        self.tidy()
        self._file.close()

    # --- reading ------------------------------------------------------------------------------------------

    def load(self, keys: Sequence[bytes], layers: tuple[int, ...], targets: Sequence[Block]) -> list[bool]:
        """Copy rows that have all these layers to their targets; which of them there were."""
        if not self.ready:
            return [False] * len(keys)
        found: list[bool] = []

        def look(txn: Any) -> None:
            for key, target in zip(keys, targets, strict=True):
                found.append(self._load_row(txn, key, layers, target))

        self._file.read(look)
        # What was copied before a fault had its sum checked.
        return found + [False] * (len(keys) - len(found))

    def _load_row(self, txn: Any, key: bytes, layers: tuple[int, ...], target: Block) -> bool:
        lacking = layers
        pieces: list[tuple[Block, _Layers, tuple[int, ...]]] = []
        for group in range(_GROUPS):
            value = txn.get(key + bytes((group,)))
            if value is None:
                return False
            held, block = parse(key, value)
            if block.shape[0] != target.shape[0] or block.shape[2] != target.shape[2]:
                raise Damaged("a record has another shape than its key says")
            fit = self._fit(held, lacking)
            if fit.source:
                pieces.append((block, fit, lacking))
                lacking = fit.rest
                if not lacking:
                    break
        else:
            return False
        for block, fit, wanted in pieces:
            if fit.whole and wanted == layers:
                target[...] = block
            elif wanted == layers:
                target[:, fit.target] = block[:, fit.source]
            else:
                target[:, [layers.index(wanted[place]) for place in fit.target]] = block[:, fit.source]
        self._touched[key] = None
        return True

    def _fit(self, held: bytes, wanted: tuple[int, ...]) -> _Layers:
        fit = self._fits.get((held, wanted))
        if fit is None:
            has = np.frombuffer(held, dtype="<u2").tolist()
            fit = _Layers(whole=tuple(has) == wanted, rest=tuple(one for one in wanted if one not in has))
            for place, layer in enumerate(wanted):
                if layer in has:
                    fit.source.append(has.index(layer))
                    fit.target.append(place)
            if len(self._fits) > 1000:
                self._fits.clear()
            self._fits[held, wanted] = fit
        return fit

    # --- writing ------------------------------------------------------------------------------------------

    def earn(self, seconds: float) -> None:
        """The device has computed for so long: a part of that may go into writing."""
        self._credit = min(self._credit + _WRITING_PART * seconds, _CREDIT_SECONDS)

    def store(self, keys: Sequence[bytes], layers: tuple[int, ...], blocks: Sequence[Block]) -> int:
        """Add rows, of each the layers that it has not yet, as long as there is time for it.

        Gives the bytes that were written.
        """
        most = max(2**16, self.options.max_bytes // _ROW_SHARE)
        at_once = min(_AT_ONCE_BYTES, self.options.max_bytes // 16)
        written = first = 0
        while first < len(keys) and self._credit > 0 and not self._file.resting and self.ready:
            started, last, size = time.monotonic(), first, 0
            while last < len(keys) and (last == first or size + blocks[last].nbytes <= at_once):
                size += blocks[last].nbytes
                last += 1
            some = [(key, block) for key, block in zip(keys[first:last], blocks[first:last], strict=True)]
            written += self._store([(key, block) for key, block in some if block.nbytes <= most], layers)
            self._credit -= time.monotonic() - started
            first = last
        return written

    def _store(self, rows: Sequence[tuple[bytes, Block]], layers: tuple[int, ...]) -> int:
        wanted = sum(size_of(block.nbytes) for _, block in rows)

        def put(txn: Any) -> int:
            if not self._has_room(txn, wanted):
                return 0
            stamp, written = _now(), 0
            for key, block in rows:
                written += self._store_row(txn, key, layers, block)
                self._stamp(txn, key, stamp)
                self._touched.pop(key, None)
            return written

        return self._change(put, 0) if rows else 0

    def _store_row(self, txn: Any, key: bytes, layers: tuple[int, ...], block: Block) -> int:
        lacking = dict.fromkeys(layers)
        for group in range(_GROUPS):
            name = key + bytes((group,))
            value = txn.get(name, db=self._file.rows)
            if value is None:
                break
            for layer in np.frombuffer(held_layers(value), dtype="<u2").tolist():
                lacking.pop(layer, None)
        else:
            return 0
        if not lacking:
            return 0
        if len(lacking) < len(layers):
            block = block[:, [place for place, layer in enumerate(layers) if layer in lacking]]
        made = record(key, tuple(lacking), block)
        txn.put(name, made, db=self._file.rows)
        return len(made)

    def tidy(self) -> bool:
        """Note when the rows that were read were used, some at a time, after what is urgent; whether more are left."""
        if self._touched:
            if self.ready:
                self._touch()
            else:
                self._touched.clear()
        return bool(self._touched)

    @property
    def untold(self) -> bool:
        """Whether something happened since `take_counts`."""
        return any(asdict(self.counts).values())

    def take_counts(self) -> dict[str, int]:
        """What happened since the last call, and `bytes` in use; nothing when nothing did."""
        if not self.untold:
            return {}
        counts, self.counts = asdict(self.counts), CacheCounts()
        return {**counts, "bytes": self.used_bytes}

    def _touch(self) -> None:
        some = list(self._touched)[:_TOUCHED]
        for key in some:
            del self._touched[key]

        def stamp_all(txn: Any) -> None:
            stamp = _now()
            for key in some:
                self._stamp(txn, key, stamp, known=True)

        self._change(stamp_all, None)

    def _stamp(self, txn: Any, key: bytes, stamp: bytes, *, known: bool = False) -> None:
        before = txn.get(key, db=self._file.stamps)
        if before is not None:
            txn.delete(bytes(before) + key, db=self._file.used)
        elif known:  # another worker made room meanwhile
            return
        txn.put(key, stamp, db=self._file.stamps)
        txn.put(stamp + key, b"", db=self._file.used)

    # --- room ---------------------------------------------------------------------------------------------

    @property
    def used_bytes(self) -> int:
        """Of the pages that hold something."""
        return self._file.used_bytes

    def _has_room(self, txn: Any, wanted: int) -> bool:
        """Whether so many bytes fit; makes room for them."""
        most = int(self.options.max_bytes * _FULL_AT)
        if wanted > most:
            return False
        used = self._file.used_in(txn)
        if used + wanted > most:
            used -= self._evict(txn, used + wanted - most)
            if used + wanted > most:
                return False
        return self._file.disk_has_room(used, wanted)

    def _evict(self, txn: Any, wanted: int) -> int:
        """Remove the rows used longest ago, about so many bytes of them; gives how many bytes went."""
        freed = rows = 0
        with txn.cursor(db=self._file.used) as cursor:
            if not cursor.first():
                return 0
            while freed < wanted and rows < _EVICTED_AT_ONCE:
                name = bytes(cursor.key())
                key = name[8:]
                for group in range(_GROUPS):
                    value = txn.get(key + bytes((group,)), db=self._file.rows)
                    if value is None:
                        break
                    freed += size_of(len(value))
                    txn.delete(key + bytes((group,)), db=self._file.rows)
                txn.delete(key, db=self._file.stamps)
                self._touched.pop(key, None)
                rows += 1
                if not cursor.delete() or not cursor.key():
                    break
        self.counts.evicted += rows
        return freed

    def _change(self, work: Callable[[Any], T], otherwise: T) -> T:
        return self._file.change(work, otherwise, lambda txn: self._evict(txn, self.options.max_bytes // 8))


def _now() -> bytes:
    return struct.pack(">Q", time.time_ns() // 1_000_000)
