"""The adapters attached to one resident, and how a batch runs under them.

LoRA and DoRA on linear modules are applied by the bank's hooks; they share batches where the modules see their rows
apart. All else is `exclusive`: modules that stand in for the base's own while a batch of that one adapter runs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bathyscope import errors
from bathyscope_workers.adapters import exclusive
from bathyscope_workers.adapters.apart import rows_apart
from bathyscope_workers.adapters.bank import Bank, LoraPair, Share, linear_module, matrix_shape, with_magnitude
from bathyscope_workers.adapters.conversion.converted import Target
from bathyscope_workers.adapters.stored import StoredAdapter


@dataclass(slots=True)
class Attached:
    """One adapter on one resident."""

    digest: str
    mixable: bool
    """Whether its rows may share a batch with those of the base and of others."""
    memory_bytes: int
    """Measured: what it holds beyond the base's own tensors."""
    last_used: float
    """`time.monotonic()`."""
    exclusive: exclusive.Exclusive | None


class Adapters:
    """By digest. For one thread, as the model is."""

    def __init__(self, model: Any, *, device: torch.device, vocab_size: int, compute_dtype: str) -> None:
        self._model = model
        self._device = device
        self._vocab_size = vocab_size
        self._dtype: torch.dtype = getattr(torch, compute_dtype)
        self._bank = Bank(model)
        self._attached: dict[str, Attached] = {}
        self._apart: frozenset[nn.Module] | None = None
        """Modules that see rows apart; looked up when the first adapter comes."""

    def __contains__(self, digest: str) -> bool:
        """Whether an adapter is attached."""
        return digest in self._attached

    def __iter__(self) -> Iterator[Attached]:
        """Those attached."""
        return iter(self._attached.values())

    @property
    def memory_bytes(self) -> int:
        """Of all of them."""
        return sum(one.memory_bytes for one in self._attached.values())

    def use(self, digest: str) -> bool:
        """Count a use of an adapter; False when it is not attached."""
        found = self._attached.get(digest)
        if found is None:
            return False
        found.last_used = time.monotonic()
        return True

    def attach(self, stored: StoredAdapter) -> Attached:
        """Read an adapter's tensors and make it available. Whole or not at all.

        Raises a subclass of AdapterInvalid with the names of what does not fit this base.
        """
        if (found := self._attached.get(stored.digest)) is not None:
            return found
        by_hook = [one for one in stored.targets if one.kind == "linear"]
        other = [one for one in stored.targets if one.kind != "linear"]
        pairs, room = self._room_for(stored, by_hook)
        rest: dict[str, torch.Tensor] = {}
        for name, tensor in stored.read():
            if name in room:
                room[name].copy_(tensor)
            else:
                rest[name] = tensor
        if stored.config.get("use_dora"):
            pairs = self._with_magnitudes(by_hook, pairs, rest)
        if rest and not other:
            raise errors.AdapterTensorsUnmatched("tensors of the adapter belong to no target", names=sorted(rest))
        alone = None if not other else exclusive.build(self._model, stored.config, other, rest, self._dtype)
        mixable = alone is None and self._sees_rows_apart(pairs)
        self._bank.attach(stored.digest, pairs)
        attached = Attached(
            stored.digest,
            mixable=mixable,
            memory_bytes=sum(pair.nbytes for pair in pairs.values()) + (alone.memory_bytes if alone else 0),
            last_used=time.monotonic(),
            exclusive=alone,
        )
        self._attached[stored.digest] = attached
        return attached

    def detach(self, digest: str) -> bool:
        """Give an adapter's memory back; True where the last of it goes with the next collection of cycles."""
        self._bank.detach(digest)
        found = self._attached.pop(digest, None)
        return found is not None and found.exclusive is not None

    def group(self, digest: str) -> str | None:
        """Rows of equal groups may share a batch: null for adapters that mix with others and with the base."""
        return None if self._attached[digest].mixable else digest

    def stop_mixing(self) -> None:
        """From now on each adapter runs alone: a module was met that does not see rows apart after all."""
        self._apart = frozenset()
        for one in self._attached.values():
            one.mixable = False

    @contextmanager
    def serving(self, shares: Sequence[Share], seq: int) -> Iterator[None]:
        """The next forward passes, of batches `seq` tokens wide, run under these adapters, row by row.

        Whatever happens inside, afterwards the model is the base alone.
        """
        used = [self._attached[share.adapter] for share in shares if share.adapter is not None]
        alone = next((one.exclusive for one in used if one.exclusive is not None), None)
        if alone is not None and len(shares) > 1:
            raise ValueError("an adapter that runs alone shares a batch")
        with nullcontext() if alone is None else alone.applied(), self._bank.serving(shares, seq):
            yield

    def _room_for(
        self, stored: StoredAdapter, targets: Sequence[Target]
    ) -> tuple[dict[str, LoraPair], dict[str, torch.Tensor]]:
        """Pairs of matrices still to be filled, by module path, and the same matrices by the tensors' names.

        All matrices of a device are parts of one allocation, which goes back whole.
        """
        modules: dict[str, nn.Module] = {}
        for target in targets:
            try:
                modules[target.name] = linear_module(self._model, target.name)
            except KeyError:
                continue
        names = [target.name for target in targets if target.name not in modules]
        if names:
            raise errors.AdapterTensorsUnmatched(
                f"this base has no linear module {names[0]}; name the base that the adapter was trained on", names=names
            )
        known = set(stored.names)
        devices: dict[torch.device, list[tuple[Target, int, int]]] = {}
        for target in targets:
            out, inner = matrix_shape(modules[target.name])
            for part, shape in (("lora_A", (target.rank, inner)), ("lora_B", (out, target.rank))):
                name = f"{target.prefix}.{part}.weight"
                if name not in known:
                    raise errors.AdapterIncomplete(f"the adapter lacks {name}; add it again", names=[name])
                if stored.shape(name) != shape:
                    raise errors.AdapterBaseMismatch(
                        f"{name} has shape {list(stored.shape(name))}, and this base needs {list(shape)}; "
                        "name the base model that it was trained on",
                        names=[target.name],
                    )
            device = next(modules[target.name].parameters()).device
            devices.setdefault(device, []).append((target, out, inner))
        pairs: dict[str, LoraPair] = {}
        room: dict[str, torch.Tensor] = {}
        for device, group in devices.items():
            flat = torch.empty(sum(one.rank * (out + inner) for one, out, inner in group), device=device)
            place = 0
            for target, out, inner in group:
                a = flat[place : place + target.rank * inner].view(target.rank, inner)
                place += a.numel()
                b = flat[place : place + out * target.rank].view(out, target.rank)
                place += b.numel()
                room |= {f"{target.prefix}.lora_A.weight": a, f"{target.prefix}.lora_B.weight": b}
                pairs[target.name] = LoraPair(a, b, target.scale)
        return pairs, room

    def _with_magnitudes(
        self, targets: Sequence[Target], pairs: dict[str, LoraPair], rest: dict[str, torch.Tensor]
    ) -> dict[str, LoraPair]:
        """The pairs of a DoRA adapter; its magnitudes are taken out of `rest`."""
        found: dict[str, LoraPair] = {}
        for target in targets:
            names = [f"{target.prefix}.lora_magnitude_vector{end}" for end in ("", ".weight")]
            name = next((one for one in names if one in rest), None)
            pair = pairs[target.name]
            if name is None or rest[name].shape != pair.b.shape[:1]:
                raise errors.AdapterIncomplete(f"the adapter lacks {names[0]}, or it does not fit", names=[names[0]])
            magnitude = rest.pop(name).to(pair.b.device, torch.float32)
            found[target.name] = with_magnitude(linear_module(self._model, target.name), pair, magnitude)
        return found

    def _sees_rows_apart(self, pairs: dict[str, LoraPair]) -> bool:
        if self._apart is None:
            self._apart = rows_apart(self._model, self._device, self._vocab_size)
        return all(linear_module(self._model, path) in self._apart for path in pairs)
