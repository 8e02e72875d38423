"""Many LoRA adapters on one base model at the same time, each row of a batch under its own.

A LoRA adds `scale * B(A(x))` to the output of a linear module (Hu et al. 2021, arXiv:2106.09685); DoRA besides scales
each output feature (Liu et al. 2024, arXiv:2402.09353), by what is a constant once training is over. Every module that
some adapter targets gets one forward hook; attaching an adapter after that is an entry in a table, so the hundredth
costs what the first did, and the base's own weights, quantized or not, are never touched. During a batch the hooks are
told which rows belong to which adapter; outside of `serving` they add nothing.

Why not PEFT's mixed batches: its context has no `finally`, so an exception thrown through it leaves the next batch
under the old adapter, and each `add_adapter` walks the whole model. Its DoRA computes the constant in every pass, from
weights that bitsandbytes has repacked (4bit on CPU: another matrix) and in a way that spoils an 8bit base on CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

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
    gain: torch.Tensor | None = None
    """(out,), of DoRA: what the output, without its bias, is multiplied with; `b` has been already."""

    @property
    def nbytes(self) -> int:
        """Memory of all of it."""
        return self.a.nbytes + self.b.nbytes + (0 if self.gain is None else self.gain.nbytes)


def with_magnitude(module: nn.Module, pair: LoraPair, magnitude: torch.Tensor) -> LoraPair:
    """A DoRA pair: each row of W + scale B A is brought to the length that `magnitude` (out,) says.

    B is multiplied in place: it is a part of an allocation that A keeps alive.
    """
    gain = magnitude / torch.linalg.vector_norm(matrix_of(module) + pair.scale * (pair.b @ pair.a), dim=1)
    return LoraPair(pair.a, pair.b.mul_(gain[:, None]), pair.scale, gain)


@dataclass(frozen=True, slots=True)
class Share:
    """Consecutive rows of a batch that run under one adapter."""

    adapter: str | None
    """Digest of an attached adapter; None is the base."""
    first: int
    """First row."""
    rows: int
    """How many."""


class RowsNotApart(RuntimeError):
    """A module's input does not tell which of its vectors belong to which row of the batch."""


class Bank:
    """The adapters attached to one model. For one thread, as the model is."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._sites: dict[str, _Site] = {}
        """By module path."""
        self._batch = _Batch()
        self._attached: dict[str, tuple[str, ...]] = {}
        """Paths of each adapter's modules."""

    def attach(self, digest: str, pairs: Mapping[str, LoraPair]) -> None:
        """Make an adapter available; `pairs` by module path below the model.

        The matrices go to their module's device and are kept in float32, as PEFT keeps them, whatever the base
        computes in. Raises `KeyError` for a path that is no linear module and `ValueError` for shapes that do not fit;
        then nothing is attached.
        """
        if digest in self._attached:
            return
        fitted: dict[str, LoraPair] = {}
        for path, pair in pairs.items():
            module = linear_module(self._model, path)
            out, inner = matrix_shape(module)
            if pair.a.shape != (pair.b.shape[1], inner) or pair.b.shape[0] != out:
                raise ValueError(f"{path} is ({out}, {inner}); A {tuple(pair.a.shape)}, B {tuple(pair.b.shape)}")
            device = next(module.parameters()).device
            a, b, gain = (
                None if part is None else part.detach().to(device, torch.float32).contiguous()
                for part in (pair.a, pair.b, pair.gain)
            )
            assert a is not None and b is not None  # noqa: PT018
            fitted[path] = LoraPair(a, b, pair.scale, gain)
        for path, pair in fitted.items():
            if path not in self._sites:
                self._sites[path] = _Site(path, linear_module(self._model, path), self._batch)
            self._sites[path].pairs[digest] = pair
        self._attached[digest] = tuple(fitted)

    def detach(self, digest: str) -> None:
        """Give an adapter's memory back; hooks that no adapter needs are removed."""
        for path in self._attached.pop(digest, ()):
            site = self._sites[path]
            del site.pairs[digest]
            if not site.pairs:
                site.remove()
                del self._sites[path]

    def __contains__(self, digest: str) -> bool:
        """Whether an adapter is attached."""
        return digest in self._attached

    @property
    def memory_bytes(self) -> int:
        """Of all attached adapters."""
        return sum(pair.nbytes for site in self._sites.values() for pair in site.pairs.values())

    @contextmanager
    def serving(self, shares: Sequence[Share], seq: int) -> Iterator[None]:
        """The next forward passes, of batches `seq` tokens wide, run under these adapters, row by row.

        The shares cover the batch in order. Whatever happens inside, afterwards the model is the base alone. A forward
        pass raises `RowsNotApart` where several shares meet a module that does not see the batch row by row.
        """
        missing = {share.adapter for share in shares} - self._attached.keys() - {None}
        if missing:
            raise KeyError(f"not attached: {sorted(str(one) for one in missing)}")
        batch = self._batch
        batch.rows, batch.seq = sum(share.rows for share in shares), seq
        batch.shares = [(share.adapter, share.first, share.rows) for share in shares if share.adapter is not None]
        batch.whole = shares[0].adapter if len(shares) == 1 else None
        try:
            yield
        finally:
            batch.shares, batch.whole = [], None


def linear_module(model: nn.Module, path: str) -> nn.Module:
    """The linear module of a path. Raises `KeyError`."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise KeyError(path) from None
    if not is_linear(module):
        raise KeyError(path)
    return module


def is_linear(module: nn.Module) -> bool:
    """bitsandbytes' layers are `nn.Linear` too; GPT-2's `Conv1D` multiplies by a matrix held as [in, out]."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear module, whatever way its weight is packed."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    inner, out = module.get_parameter("weight").shape
    return out, inner


def matrix_of(module: nn.Module) -> torch.Tensor:
    """The (out, in) matrix that a linear module multiplies with, in float32, whatever it is quantized to."""
    weight: Any = module.get_parameter("weight")
    if type(weight).__name__ == "Int8Params":
        state: Any = module.state
        # The scales move from the weight to the state in the first pass.
        scales: torch.Tensor = weight.SCB if state.SCB is None else state.SCB
        return torch.Tensor.float(weight.data) * (scales.float() / 127)[:, None]
    if type(weight).__name__ == "Params4bit":
        # Asked of the module itself: on CPU the packed weights have a layout of bitsandbytes' own.
        _, inner = matrix_shape(module)
        bias = getattr(module, "bias", None)
        parts = []
        with torch.inference_mode():
            for part in torch.split(torch.eye(inner, device=weight.device), _COLUMNS):
                columns = module(part).float()
                parts.append(columns if bias is None else columns - bias.float())
        return torch.cat(parts).t().clone()
    matrix: torch.Tensor = weight.detach().float()
    return matrix if isinstance(module, nn.Linear) else matrix.t()


_COLUMNS = 256
"""Of a matrix that are asked for at once."""


def by_row(states: torch.Tensor, rows: int, seq: int) -> int | None:
    """How many entries of the first axis each row of a batch has; None when that cannot be told from the shape.

    1 for (rows, …, in), `seq` for (rows * seq, in): a block may flatten its rows first.
    """
    if states.dim() > 2:
        return 1 if states.shape[0] == rows else None
    return seq if states.shape[0] == rows * seq else None


@dataclass(slots=True)
class _Batch:
    rows: int = 0
    seq: int = 0
    shares: list[tuple[str, int, int]] = field(default_factory=list)
    """(adapter, first row, rows), without those of the base."""
    whole: str | None = None
    """The adapter of all rows, when there is but one share."""


class _Site:
    """One module with its hook."""

    def __init__(self, path: str, module: nn.Module, batch: _Batch) -> None:
        self.pairs: dict[str, LoraPair] = {}
        self._path = path
        self._bias: torch.Tensor | None = getattr(module, "bias", None)
        self._batch = batch
        self._handle = module.register_forward_hook(self._hook, with_kwargs=True)

    def __deepcopy__(self, _memo: dict[int, Any]) -> _Site:
        """A copy of the module keeps its hook; the matrices are not copied with it."""
        return self

    def remove(self) -> None:
        """Take the hook away."""
        self._handle.remove()

    def _hook(
        self, _module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor], output: torch.Tensor
    ) -> None:
        batch = self._batch
        if not batch.shares:
            return
        states = args[0] if args else next(iter(kwargs.values()))
        if batch.whole is not None:
            if (pair := self.pairs.get(batch.whole)) is not None:
                self._apply(output, states, pair)
            return
        mine = [share for share in batch.shares if share[0] in self.pairs]
        if not mine:
            return
        each = by_row(states, batch.rows, batch.seq)
        if each is None:
            raise RowsNotApart(
                f"{self._path} sees {tuple(states.shape)} for {batch.rows} rows of {batch.seq} tokens: which belong "
                "to which row cannot be told"
            )
        for adapter, first, rows in mine:
            here = slice(first * each, (first + rows) * each)
            self._apply(output[here], states[here], self.pairs[adapter])

    def _apply(self, output: torch.Tensor, states: torch.Tensor, pair: LoraPair) -> None:
        """Make the adapter's output of the base's, in place."""
        low = nn.functional.linear(states.to(pair.a.dtype), pair.a)  # (…, rank)
        if pair.gain is not None:
            bias = 0.0 if self._bias is None else self._bias.float()
            scaled = (output.float() - bias) * pair.gain + bias
            output.copy_(scaled.add_(nn.functional.linear(low, pair.b), alpha=pair.scale))
        elif output.dtype == low.dtype and output.is_contiguous():
            output.view(-1, output.shape[-1]).addmm_(low.reshape(-1, low.shape[-1]), pair.b.t(), alpha=pair.scale)
        else:
            # Of a mixed pair computed in the wider dtype: rounded once.
            output.add_(nn.functional.linear(low, pair.b), alpha=pair.scale)
