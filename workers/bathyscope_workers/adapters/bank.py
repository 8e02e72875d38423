"""Many LoRA adapters on one base model at the same time, each row of a batch under its own.

A LoRA adds `scale * B(A(x))` to the output of a linear module (Hu et al. 2021, arXiv:2106.09685). Every module that
some adapter targets gets one forward hook for good; attaching an adapter after that is an entry in a table, so the
hundredth costs what the first did, and the base's own weights, quantized or not, are never touched. During a batch the
hooks are told which rows belong to which adapter; outside of `serving` they add nothing.

Why not PEFT's mixed batches: its context has no `finally`, so an exception thrown through it leaves the next batch
under the old adapter, and each `add_adapter` walks the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class LoraPair:
    """The two matrices of one module."""

    a: torch.Tensor
    """(rank, in)"""
    b: torch.Tensor
    """(out, rank)"""
    scale: float
    """alpha / rank, or alpha / sqrt(rank) for rsLoRA."""

    @property
    def nbytes(self) -> int:
        """Memory of both."""
        return self.a.nbytes + self.b.nbytes


@dataclass(frozen=True, slots=True)
class Share:
    """Consecutive rows of a batch that run under one adapter."""

    adapter: str | None
    """Digest of an attached adapter; None is the base."""
    first: int
    """First row."""
    rows: int
    """How many."""


class Bank:
    """The adapters attached to one model. For one thread, as the model is."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._sites: dict[str, _Site] = {}
        """By module path."""
        self._batch = _Batch()
        self._bytes: dict[str, int] = {}

    def attach(self, digest: str, pairs: Mapping[str, LoraPair]) -> None:
        """Make an adapter available; `pairs` by module path below the model.

        The matrices go to their module's device and are kept in float32, as PEFT keeps them, whatever the base
        computes in. Raises `KeyError` for a path that is no module and `ValueError` for shapes that do not fit; then
        nothing is attached.
        """
        if digest in self._bytes:
            return
        fitted: dict[str, LoraPair] = {}
        for path, pair in pairs.items():
            module = self._module(path)
            inner, outer = module.in_features, module.out_features
            if pair.a.shape != (pair.b.shape[1], inner) or pair.b.shape[0] != outer:
                raise ValueError(f"{path} is ({outer}, {inner}); A {tuple(pair.a.shape)}, B {tuple(pair.b.shape)}")
            device = next(module.parameters()).device
            fitted[path] = LoraPair(
                pair.a.detach().to(device, torch.float32).contiguous(),
                pair.b.detach().to(device, torch.float32).contiguous(),
                pair.scale,
            )
        for path, pair in fitted.items():
            if path not in self._sites:
                self._sites[path] = _Site(self._module(path), self._batch)
            self._sites[path].pairs[digest] = pair
        self._bytes[digest] = sum(pair.nbytes for pair in fitted.values())

    def detach(self, digest: str) -> None:
        """Give an adapter's memory back; hooks that no adapter needs are removed."""
        if self._bytes.pop(digest, None) is None:
            return
        for path, site in list(self._sites.items()):
            site.pairs.pop(digest, None)
            if not site.pairs:
                site.remove()
                del self._sites[path]

    def __contains__(self, digest: str) -> bool:
        """Whether an adapter is attached."""
        return digest in self._bytes

    @property
    def memory_bytes(self) -> int:
        """Of all attached adapters."""
        return sum(self._bytes.values())

    @contextmanager
    def serving(self, shares: Sequence[Share]) -> Iterator[None]:
        """The next forward passes run under these adapters, row by row; the shares cover the batch in order.

        Whatever happens inside, afterwards the model is the base alone.
        """
        missing = {share.adapter for share in shares} - self._bytes.keys() - {None}
        if missing:
            raise KeyError(f"not attached: {sorted(str(one) for one in missing)}")
        self._batch.rows = sum(share.rows for share in shares)
        self._batch.shares = [share for share in shares if share.adapter is not None]
        try:
            yield
        finally:
            self._batch.shares = []

    def _module(self, path: str) -> nn.Linear:
        try:
            module = self._model.get_submodule(path)
        except AttributeError:
            raise KeyError(path) from None
        if not isinstance(module, nn.Linear):  # bitsandbytes' layers are nn.Linear too
            raise KeyError(path)
        return module


@dataclass(slots=True)
class _Batch:
    rows: int = 0
    shares: list[Share] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.shares = []


class _Site:
    """One module with its hook."""

    def __init__(self, module: nn.Module, batch: _Batch) -> None:
        self.pairs: dict[str, LoraPair] = {}
        self._batch = batch
        self._handle = module.register_forward_hook(self._hook)

    def remove(self) -> None:
        """Take the hook away."""
        self._handle.remove()

    def _hook(self, _module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
        batch = self._batch
        if not batch.shares:
            return None
        states = args[0]
        # (batch, seq, in), or (batch * seq, in) where a block flattens its rows first
        each, rest = divmod(states.shape[0], batch.rows)
        whole = len(batch.shares) == 1 and batch.shares[0].rows == batch.rows
        if rest and not whole:
            raise RuntimeError(
                f"{states.shape[0]} rows of states for {batch.rows} rows of the batch cannot be told apart"
            )
        for share in batch.shares:
            pair = self.pairs.get(share.adapter or "")
            if pair is None:
                continue
            if whole:
                _add(output, states, pair)
            else:
                here = slice(share.first * each, (share.first + share.rows) * each)
                _add(output[here], states[here], pair)
        return output


def _add(output: torch.Tensor, states: torch.Tensor, pair: LoraPair) -> None:
    low = torch.nn.functional.linear(states.to(pair.a.dtype), pair.a)
    # In place, and of a mixed pair computed in the wider dtype: rounded once.
    output.add_(torch.nn.functional.linear(low, pair.b), alpha=pair.scale)
