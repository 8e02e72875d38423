"""Keys and values of a beginning that many texts have, kept so that each goes on from there.

Texts that begin alike run as a tree: each token once, in rows of a batch ("lanes") that hold many texts side by side,
with a mask that lets a token see just what comes before it in its own text, and its true position. What was computed by
an earlier pass is a `Past`; all lanes see as much of it as their texts share with it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_DYNAMIC_ROPE = ("dynamic", "longrope")
"""Their angles depend on the longest text of a batch."""


@dataclass(slots=True)
class Past:
    """What is known of a beginning."""

    ids: NDArray[np.int32]
    keys: list[torch.Tensor]
    """Of each block that was run, (1, heads, tokens, width)."""
    values: list[torch.Tensor]
    states: dict[int, torch.Tensor] = field(default_factory=dict)
    """(tokens, hidden) of layers that are pooled over the beginning too."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def top(self) -> int:
        """The highest layer that can be computed with it."""
        return len(self.keys)

    def cut(self, tokens: int) -> Past:
        """Its first tokens. Shares memory with it."""
        return Past(
            self.ids[:tokens],
            [one[:, :, :tokens] for one in self.keys],
            [one[:, :, :tokens] for one in self.values],
            {layer: one[:tokens] for layer, one in self.states.items()},
        )


@dataclass(frozen=True, slots=True)
class Tree:
    """Texts that begin alike, as lanes."""

    ids: NDArray[np.int64]
    """(lanes, width), padded at the end."""
    positions: NDArray[np.int64]
    """(lanes, width), where in its text each token is."""
    mask: NDArray[np.bool_] | None
    """(lanes, 1, width, past + width), what each token sees; None when that is all before it."""
    past: Past | None
    keep: NDArray[np.int64] | None = None
    """(tokens kept,) into past + width of lane `keep_lane`: the beginning to be kept for later passes."""
    keep_lane: int = 0


class TreeCache(DynamicCache):
    """The cache for one pass over a tree; afterwards `kept` gives what it was told to keep."""

    def __init__(self, tree: Tree, layers: int, device: torch.device) -> None:
        super().__init__()
        keep = None if tree.keep is None else torch.from_numpy(tree.keep).to(device)
        past = tree.past
        self.layers = [
            _Layer(
                None if past is None or layer >= past.top else (past.keys[layer], past.values[layer]),
                keep,
                tree.keep_lane,
            )
            for layer in range(layers)
        ]

    def kept(self, ids: NDArray[np.int32], states: dict[int, torch.Tensor]) -> Past:
        """The beginning that was kept, whose ids these are."""
        pairs = [one.kept for one in self.layers if isinstance(one, _Layer) and one.kept is not None]
        return Past(ids, [keys for keys, _ in pairs], [values for _, values in pairs], states)


class _Layer(DynamicLayer):  # type: ignore[no-untyped-call]  # its `__init_subclass__` is
    """Puts the past before the keys and values of a pass, and forgets those but for what is to be kept."""

    def __init__(
        self, past: tuple[torch.Tensor, torch.Tensor] | None, keep: torch.Tensor | None, keep_lane: int
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept: tuple[torch.Tensor, torch.Tensor] | None = None
        self._past, self._keep, self._keep_lane = past, keep, keep_lane

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        both = []
        for number, new in enumerate((key_states, value_states)):
            past = None if self._past is None else self._past[number]
            # One copy for all heads of all lanes: attention takes a single tensor.
            both.append(new if past is None else torch.cat([past.expand(len(new), -1, -1, -1), new], dim=-2))
        keys, values = both
        if self._keep is not None:
            keep, lane = self._keep.to(keys.device), slice(self._keep_lane, self._keep_lane + 1)
            self.kept = keys[lane].index_select(2, keep), values[lane].index_select(2, keep)
        return keys, values

    def get_seq_length(self) -> int:
        return 0 if self._past is None else int(self._past[0].shape[-2])


class Kept:
    """The beginnings that are kept for one model, by whom they belong to and the adapter that they ran under."""

    def __init__(self) -> None:
        self._pasts: list[tuple[str, str | None, Past]] = []
        """The one used last at the end."""

    def __len__(self) -> int:
        return len(self._pasts)

    @property
    def tokens(self) -> int:
        """Of all of them."""
        return sum(len(past) for _, _, past in self._pasts)

    def of(self, owner: str, adapter: str | None) -> list[Past]:
        """Those of one owner and adapter."""
        return [past for name, digest, past in self._pasts if (name, digest) == (owner, adapter)]

    def put(self, owner: str, adapter: str | None, past: Past, *, most: int) -> None:
        """Keep one, in the place of those that it goes on from; older ones go while all together exceed `most` tokens.

        The newest stays however long it is: the pass that made it held as much.
        """
        self._pasts = [
            one
            for one in self._pasts
            if one[:2] != (owner, adapter)
            or one[2].top > past.top
            or not np.array_equal(one[2].ids[: len(past)], past.ids[: len(one[2])])
        ]
        self._pasts.append((owner, adapter, past))
        while len(self._pasts) > 1 and self.tokens > most:
            del self._pasts[0]

    def only(self, owners: Collection[str]) -> None:
        """Forget all that belongs to others."""
        self._pasts = [one for one in self._pasts if one[0] in owners]

    def clear(self) -> bool:
        """Forget all; whether there was any."""
        found = bool(self._pasts)
        self._pasts.clear()
        return found


def may_branch(config: Any) -> bool:
    """Whether every block of a model attends to all that comes before, in a way that a tree's mask can say.

    Read from the configuration, since a window may be wider than any text of the self-test.
    """
    text = config.get_text_config(decoder=True)
    if getattr(text, "_attn_implementation", None) != "sdpa" or _names(text.to_dict(), "rope_type") & {*_DYNAMIC_ROPE}:
        return False
    try:
        layers = DynamicCache(config=text).layers
    except (AttributeError, KeyError, TypeError, ValueError):  # a kind of block that transformers keeps no cache for
        return False
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def _names(config: Any, key: str) -> set[str]:
    """Every value of a key, wherever it is in a configuration; older ones say `type`."""
    if isinstance(config, dict):
        own = {str(value) for name, value in config.items() if name in (key, "type") and isinstance(value, str)}
        return own.union(*(_names(value, key) for value in config.values()))
    return set()
