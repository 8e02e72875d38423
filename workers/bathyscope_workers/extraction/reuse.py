"""What an extraction need not compute: rows that equal another of the same request, and rows that the cache holds.

Both go by token ids: equal ids under equal adapters have equal states. Of equal rows the first is computed, or read
from the cache, and copied to the others at the end. The others never reach the queues, nor do rows that were read.

Where the numbers of a row depend on those it shares a batch with (an 8bit model under `batch_invariant: false`), and
where rows are scored as well as stored (`score_choices`), every row is computed.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from bathyscope_workers.extraction.cache import JOB_SHARE, RowCache
from bathyscope_workers.extraction.cache_record import Block
from bathyscope_workers.models.versions import versions

if TYPE_CHECKING:
    from bathyscope_workers.extraction.extraction import Extraction

_FORMAT = 1
"""Raised whenever rows come to mean something else, or their numbers change by more than rounding."""
_DIGEST_BYTES = 20
_STEP_SECONDS = 0.02
_STEP_ROWS, _STEP_BYTES = 128, 16 * 2**20


@dataclass(frozen=True, slots=True)
class RowIdentity:
    """All that the states of a row depend on, apart from its tokens and the layer."""

    owner: str
    """Id of the API key; empty where the operator lets keys share."""
    model: str
    revision: str
    """Other weights have another one."""
    quantization: str
    llm_int8_threshold: float | None
    adapter: str | None
    """Digest."""
    compute_dtype: str
    device: str
    """`cpu`, or the name of the GPU."""
    attention: str
    """Implementation of the attention."""
    style: str
    """How texts are run, as the self-test chose it."""
    pooling: str
    positions: Mapping[str, Any] | None
    dtype: str
    """Of the result: a number that was rounded has lost what another type would keep."""
    versions: Mapping[str, str]

    def digest(self) -> bytes:
        """Equal for equal identities only."""
        content = json.dumps([_FORMAT, asdict(self)], sort_keys=True, ensure_ascii=True).encode()
        return hashlib.blake2b(content, digest_size=_DIGEST_BYTES, person=b"identity").digest()


def tokens_digest(ids: NDArray[np.int32]) -> bytes:
    """Equal for equal token ids only."""
    return hashlib.blake2b(
        np.ascontiguousarray(ids, dtype="<i4").data, digest_size=_DIGEST_BYTES, person=b"tokens"
    ).digest()


def row_key(identity: bytes, tokens: bytes) -> bytes:
    """The key of a row in the cache, from the two digests."""
    return hashlib.blake2b(identity + tokens, digest_size=_DIGEST_BYTES, person=b"row").digest()


def identity_of(extraction: Extraction, adapter: str | None, owner: str) -> RowIdentity:
    """Of an extraction's rows under an adapter."""
    resident, spec = extraction.resident, extraction.spec
    facts, device = resident.facts, resident.forward.device
    config = getattr(resident.model, "config", None)
    return RowIdentity(
        owner=owner,
        model=resident.spec.name,
        revision=facts.revision,
        quantization=facts.quantization,
        llm_int8_threshold=facts.llm_int8_threshold,
        adapter=adapter,
        compute_dtype=facts.compute_dtype,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        attention=str(getattr(config, "_attn_implementation", None)),
        style=str(extraction.style),
        pooling=spec.pooling,
        positions=spec.positions.to_wire() if spec.positions else None,
        dtype=spec.dtype,
        versions=versions(),
    )


class Reuse:
    """The rows of one extraction: call `look_step` until it says True, then compute those of `missing` and tell each
    batch of them to `computed`, then call `fill_step` until it says True."""

    def __init__(self, extraction: Extraction, cache: RowCache | None, owner: str) -> None:
        """`owner` is the id of an API key."""
        self._extraction = extraction
        self._cache = cache
        shared = cache is not None and cache.options.shared
        self._identities = [
            identity_of(extraction, adapter, "" if shared else owner).digest() for adapter in extraction.variants
        ]
        self._layers = tuple(extraction.layers)
        self._bytes: Block = extraction.states.view(torch.uint8).numpy()  # (result's rows, layers, bytes of a vector)
        self._tokens: list[bytes] = []
        """Digest of each sequence."""
        self._first: dict[bytes, int] = {}
        self._leader: list[int] = []
        """Of each sequence the first one that equals it."""
        self._looked = 0
        self._missing: list[list[int]] = [[] for _ in extraction.variants]
        self._budget = cache.options.max_bytes // JOB_SHARE if cache is not None else 0
        self._filled = 0
        self._told = False
        self.hits = 0
        """Rows that came from the cache."""

    @property
    def duplicates(self) -> int:
        """Rows that equal another one of the request."""
        return (len(self._leader) - len(self._first)) * len(self._identities)

    @property
    def missing(self) -> list[NDArray[np.int64]]:
        """Of each variant the sequences to compute, rising."""
        return [np.array(rows, dtype=np.int64) for rows in self._missing]

    # --- what is there ------------------------------------------------------------------------------------

    def look_step(self) -> bool:
        """Look at some more rows; True when all were looked at."""
        deadline = time.monotonic() + _STEP_SECONDS
        while time.monotonic() < deadline:
            if len(self._leader) < self._extraction.sequences:
                self._compare_some()
            elif self._looked < len(self._unique) * len(self._identities):
                self._load_some()
            else:
                return True
        return False

    def _compare_some(self) -> None:
        first = len(self._leader)
        for number in range(first, min(first + 1000, self._extraction.sequences)):
            tokens = tokens_digest(self._extraction.row_ids(number))
            self._tokens.append(tokens)
            self._leader.append(self._first.setdefault(tokens, number))
        if len(self._leader) == self._extraction.sequences:
            leader = np.array(self._leader, dtype=np.int64)
            self._unique = np.fromiter(self._first.values(), dtype=np.int64, count=len(self._first))
            self._followers = np.flatnonzero(leader != np.arange(len(leader)))
            self._leaders = leader[self._followers]
            self._counts = np.bincount(leader, minlength=len(leader))
            """How many sequences each one stands for, itself included."""

    def _load_some(self) -> None:
        variant, start = divmod(self._looked, len(self._unique))
        rows: list[int] = []
        targets: list[Block] = []
        size = 0
        for number in self._unique[start : start + _STEP_ROWS].tolist():
            if size > _STEP_BYTES:
                break
            rows.append(number)
            targets.append(self._block(variant, number))
            size += targets[-1].nbytes
        self._looked += len(rows)
        cache = self._cache
        if cache is None:
            self._missing[variant] += rows
            return
        found = cache.load([self._key(variant, number) for number in rows], self._layers, targets)
        hits = [number for number, there in zip(rows, found, strict=True) if there]
        self._missing[variant] += [number for number, there in zip(rows, found, strict=True) if not there]
        self.hits += len(hits)
        cache.counts.hits += len(hits)
        cache.counts.misses += len(rows) - len(hits)
        self._settle(variant, hits, own=True)

    def _settle(self, variant: int, numbers: list[int], *, own: bool) -> None:
        """These sequences have their states: they count as done with all that equal them."""
        extraction = self._extraction
        stand_for = int(self._counts[numbers].sum())
        extraction.done_rows += stand_for if own else stand_for - len(numbers)
        if own:
            extraction.compare([variant * extraction.sequences + number for number in numbers])

    # --- what was computed --------------------------------------------------------------------------------

    def computed(self, rows: Sequence[int]) -> None:
        """These rows went through the model and are written."""
        by_variant: dict[int, list[int]] = {}
        for row in rows:
            variant, number = divmod(row, self._extraction.sequences)
            by_variant.setdefault(variant, []).append(number)
        for variant, numbers in by_variant.items():
            self._settle(variant, numbers, own=False)
            if self._cache is not None and self._budget > 0:
                keys = [self._key(variant, number) for number in numbers]
                blocks = [self._block(variant, number) for number in numbers]
                self._budget -= self._cache.store(keys, self._layers, blocks)

    def fill_step(self) -> bool:
        """Copy some more rows to those that equal them; True when all are filled. The computed ones are written."""
        deadline = time.monotonic() + _STEP_SECONDS
        total = len(self._followers) * len(self._identities)
        while self._filled < total:
            if time.monotonic() >= deadline:
                return False
            self._fill_some()
        if self._cache is not None and not self._told:
            self._told = True
            self._cache.counts.duplicates += total
        return True

    def _fill_some(self) -> None:
        variant, start = divmod(self._filled, len(self._followers))
        sequences = self._extraction.sequences
        if self._extraction.spec.pooling == "none":
            follower, leader = int(self._followers[start]), int(self._leaders[start])
            self._block(variant, follower)[...] = self._block(variant, leader)
            done = self._followers[start : start + 1]
        else:
            many = max(1, _STEP_BYTES // max(1, self._bytes[:1].nbytes))
            done = self._followers[start : start + many]
            base = self._extraction.first_target(variant * sequences)
            self._bytes[base + done] = self._bytes[base + self._leaders[start : start + many]]
        self._filled += len(done)
        self._extraction.compare((variant * sequences + done).tolist())

    # --- one row ------------------------------------------------------------------------------------------

    def _key(self, variant: int, number: int) -> bytes:
        return row_key(self._identities[variant], self._tokens[number])

    def _block(self, variant: int, number: int) -> Block:
        """A row's place in the result."""
        extraction = self._extraction
        first = extraction.first_target(variant * extraction.sequences + number)
        vectors = extraction.vectors(number)
        return self._bytes[first : first + vectors]
