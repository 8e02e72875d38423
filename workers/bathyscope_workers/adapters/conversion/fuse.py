"""Pieces that are parts of one matrix of the base become one update of it.

With W = [W1; W2] and updates s B1 A1 and s B2 A2, the update of the whole is s [[B1, 0], [0, B2]] [A1; A2]: A's rows
one under the other, each B in its own rows and columns, the ranks added up. Where the rows of the parts alternate
(gpt-oss), B's rows do. Experts in one 3-D parameter do so one by one; PEFT holds them as A [experts * r, in] and
B [out, r * experts].
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import torch

from bathyscope import errors
from bathyscope_workers.adapters.config import MAX_RANK
from bathyscope_workers.adapters.conversion.pieces import Piece, target_shape
from bathyscope_workers.adapters.skeleton import Skeleton
from bathyscope_workers.adapters.source import DTYPES, SourceAdapter

Kind = Literal["linear", "embedding", "parameter"]


@dataclass(frozen=True, slots=True)
class Lazy:
    """A tensor that is made when it is asked for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Update:
    """The adapter's update of one matrix or parameter of the base: scale * B A."""

    target: str
    """Path of the module, or of the parameter."""
    kind: Kind
    """How PEFT adapts it: a module of its own, or a parameter."""
    rank: int
    """Of each expert, where there are several."""
    alpha: float
    scale: float
    sources: int
    """How many tensors of the file it is made of."""
    parts: dict[str, Lazy]
    """By PEFT's word for them: `lora_A`, `lora_B`, `lora_embedding_A`, `lora_magnitude_vector`, …"""


def fuse(source: SourceAdapter, skeleton: Skeleton, pieces: Sequence[Piece]) -> list[Update]:
    """One update for each target, sorted by target. Raises AdapterTensorsInvalid and AdapterUnsupported."""
    by_target: dict[str, list[Piece]] = defaultdict(list)
    for piece in pieces:
        by_target[piece.place.target].append(piece)
    return [_update(source, skeleton, target, by_target[target]) for target in sorted(by_target)]


def _update(source: SourceAdapter, skeleton: Skeleton, target: str, pieces: list[Piece]) -> Update:
    pieces = sorted(pieces, key=_order)
    names = [name for piece in pieces for name in (piece.a, piece.b, piece.magnitude) if name]
    dtype = reduce(torch.promote_types, (DTYPES[source.tensors[name].dtype] for name in names))
    fact = skeleton.modules.get(target)
    first = pieces[0]
    if fact is not None and len(pieces) == 1 and first.place.rows is None:
        return _single(source, fact.kind == "embedding", target, first)
    if any(piece.magnitude for piece in pieces):
        raise errors.AdapterUnsupported(
            f"{target} holds several modules of the adapter or several experts, where DoRA is not applied; train "
            "without use_dora",
            names=names,
        )
    rows_of = _by_rows(pieces)
    rank = sum(group[0].rank for group in rows_of)
    if rank > MAX_RANK * len(rows_of):
        raise errors.AdapterTensorsInvalid(f"{target} would have rank {rank}; train with a lower rank", names=names)
    scale = max(piece.scale for piece in pieces)
    if any(piece.scale != scale for piece in pieces):
        dtype = torch.promote_types(dtype, torch.float32)  # B is multiplied, and is not to be rounded again
    alpha = _alpha(source, scale, rank)
    experts, out, inner = target_shape(skeleton, target)

    def make_a() -> torch.Tensor:
        stacks = [_stack(source, group, "a", experts).to(dtype) for group in rows_of]  # (E, r, in) each
        return torch.cat(stacks, dim=1).reshape(experts * rank, inner)

    def make_b() -> torch.Tensor:
        whole = torch.zeros(experts, out, rank, dtype=dtype)
        column = 0
        for group in rows_of:
            stack = _stack(source, group, "b", experts).to(dtype)  # (E, rows, r)
            for expert, factor in _factors(group, scale, experts):
                stack[expert] *= factor
            whole[:, group[0].place.rows or slice(None), column : column + group[0].rank] = stack
            column += group[0].rank
        return whole.permute(1, 2, 0).reshape(out, rank * experts).contiguous()

    parts = {
        "lora_A": Lazy((experts * rank, inner), dtype, make_a),
        "lora_B": Lazy((out, rank * experts), dtype, make_b),
    }
    return Update(target, "linear" if fact else "parameter", rank, alpha, scale, len(names), parts)


def _single(source: SourceAdapter, embedding: bool, target: str, piece: Piece) -> Update:
    """A module of the adapter that is a module of the base: its tensors as they are."""
    roles = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    named = dict(zip(roles, (piece.a, piece.b), strict=True))
    if piece.magnitude:
        named["lora_magnitude_vector"] = piece.magnitude
    parts = {role: unread(source, name) for role, name in named.items()}
    alpha = _alpha(source, piece.scale, piece.rank)
    return Update(target, "embedding" if embedding else "linear", piece.rank, alpha, piece.scale, len(named), parts)


def unread(source: SourceAdapter, name: str) -> Lazy:
    """A tensor of the file as it is."""
    fact = source.tensors[name]
    return Lazy(fact.shape, DTYPES[fact.dtype], lambda: source.read(name))


def _alpha(source: SourceAdapter, scale: float, rank: int) -> float:
    return scale * (math.sqrt(rank) if source.config.use_rslora else rank)


def _order(piece: Piece) -> tuple[int, int, str]:
    rows = piece.place.rows
    return (rows.start if rows else 0, -1 if piece.place.expert is None else piece.place.expert, piece.module)


def _by_rows(pieces: list[Piece]) -> list[list[Piece]]:
    """Pieces of the same rows together: one for all experts, or one for each. Raises AdapterTensorsInvalid."""
    groups: dict[int | None, list[Piece]] = defaultdict(list)
    for piece in pieces:
        groups[piece.place.rows.start if piece.place.rows else None].append(piece)
    for group in groups.values():
        if len({piece.rank for piece in group}) > 1:
            raise errors.AdapterTensorsInvalid(
                f"the experts beside {group[0].a} have different ranks, which one parameter cannot hold; "
                "train them with one rank",
                names=[piece.a for piece in group],
            )
    return list(groups.values())


def _stack(source: SourceAdapter, group: list[Piece], side: Literal["a", "b"], experts: int) -> torch.Tensor:
    """(E, r, in) of A or (E, rows, r) of B; experts that the adapter does not name have zeros. A fresh tensor."""
    first = group[0]
    tensor = source.read(first.a if side == "a" else first.b)
    if first.form == "flat":
        if side == "a":
            return tensor.reshape(experts, first.rank, -1)
        return tensor.reshape(tensor.shape[0], first.rank, experts).permute(2, 0, 1).contiguous()
    if first.form == "stacked":
        return tensor.expand(experts, *tensor.shape[1:]).contiguous()
    if first.place.expert is None:
        return tensor[None]
    stack = torch.zeros(experts, *tensor.shape, dtype=tensor.dtype)
    for piece in group:
        other = source.read(piece.a if side == "a" else piece.b)
        if other.dtype != stack.dtype:
            stack = stack.to(torch.promote_types(stack.dtype, other.dtype))
        stack[piece.place.expert or 0] = other
    return stack


def _factors(group: list[Piece], scale: float, experts: int) -> list[tuple[int, float]]:
    """What B of each expert is multiplied with, where its scale is not the whole's."""
    if group[0].place.expert is None:
        return [(expert, group[0].scale / scale) for expert in range(experts) if group[0].scale != scale]
    return [(piece.place.expert or 0, piece.scale / scale) for piece in group if piece.scale != scale]
