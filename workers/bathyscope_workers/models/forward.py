"""One forward pass through a decoder or encoder, keeping just the hidden states that are asked for.

Layer k is entry k of HuggingFace's `hidden_states`: 0 the input of the first block, k the output of block k
(counted from 1), the last one the output of the final norm. Hooks on the blocks hand each asked state to a
callback while it is alive, so what is not pooled is never copied. Blocks above the highest asked layer are not
run: for the length of the call the module list is exchanged for one whose upper blocks pass their input
through. (Lowering `config.num_hidden_layers` does the same for most architectures, but not for those that loop
over every block.) No exception is thrown through the model to stop it: contexts around it may not survive one.

Whether all this gives the numbers of a plain call depends on the architecture, so it is not assumed: the
self-test tries the styles of `styles()` in order and keeps the first that does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bathyscope_workers.models.past import Tree, TreeCache

Consume = Callable[[int, torch.Tensor], None]
"""Called with a layer number and its states (batch, seq, hidden), which it must copy from, not keep."""


@dataclass(frozen=True, slots=True)
class Style:
    """How a model is run so that a text in a batch has the states it has alone."""

    capture: Literal["hooks", "outputs"]
    """`outputs` asks the model for every layer: slower, for architectures where hooks see something else."""
    mask: bool
    """Pass an attention mask. Tokens of a causal decoder do not see the padding on their right without one."""
    alone: bool
    """Each text by itself."""

    def __str__(self) -> str:
        """For logs and facts."""
        return f"{self.capture}, {'mask' if self.mask else 'no mask'}{', texts alone' if self.alone else ''}"


def styles(*, causal: bool, has_blocks: bool) -> list[Style]:
    """The styles worth trying, fastest first; the last is the plain call itself."""
    tried: list[Style] = []
    for capture in ("hooks", "outputs") if has_blocks else ("outputs",):
        if causal and capture == "hooks":
            tried.append(Style(capture, mask=False, alone=False))
        tried.append(Style(capture, mask=True, alone=False))
        tried.append(Style(capture, mask=not causal, alone=True))
    return tried


class Forward:
    """Runs the inner model (no LM head) of a resident."""

    def __init__(self, inner: nn.Module, *, num_layers: int, causal: bool, pad_id: int, device: torch.device) -> None:
        self.inner = inner
        self.num_layers = num_layers
        self.causal = causal
        self.pad_id = pad_id
        self.device = device
        self._blocks = _find_blocks(inner, num_layers)
        self._shortened: dict[int, nn.ModuleList] = {}
        self._tuple_width = 0
        """Length of the tuple that a block returns; 0 when it returns a tensor. Seen in the first full pass."""
        parameters = inspect.signature(inner.forward).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        self._constants: dict[str, Any] = {"return_dict": True} if "return_dict" in parameters or takes_any else {}
        if "use_cache" in parameters:
            self._constants["use_cache"] = False

    @property
    def has_blocks(self) -> bool:
        """Whether a list of blocks was found, so that hooks can be tried."""
        return self._blocks is not None

    def __call__(
        self,
        ids: NDArray[np.int64],  # (batch, seq), right-padded
        lengths: NDArray[np.int64],  # (batch,)
        layers: Collection[int],
        consume: Consume,
        style: Style,
    ) -> None:
        """Run the blocks up to the highest of `layers`, handing each asked state to `consume`.

        States of padded positions are garbage. Whatever happens, the model is left as it was found.
        """
        arguments = dict(self._constants)
        arguments["input_ids"] = self._moved(ids)
        if style.mask and int(lengths.min()) < ids.shape[1]:
            mask = np.arange(ids.shape[1])[None, :] < lengths[:, None]
            arguments["attention_mask"] = self._moved(mask.astype(np.int64))
        with torch.inference_mode():
            if style.capture == "hooks":
                self._with_hooks(arguments, layers, consume)
            else:
                states = self.inner(**arguments, output_hidden_states=True).hidden_states
                for layer in sorted(layers):
                    consume(layer, states[layer])

    def branches(self, tree: Tree, layers: Collection[int], consume: Consume) -> TreeCache:
        """Run a tree as `__call__` runs texts, through hooks; the states of its lanes are (lanes, width, hidden)."""
        cache = TreeCache(tree, self.num_layers, self.device)
        arguments = self._constants | {
            "input_ids": torch.from_numpy(tree.ids).to(self.device),
            "position_ids": torch.from_numpy(tree.positions).to(self.device),
            "past_key_values": cache,
            "use_cache": True,
        }
        if tree.mask is not None:
            arguments["attention_mask"] = torch.from_numpy(tree.mask).to(self.device)
        with torch.inference_mode():
            self._with_hooks(arguments, layers, consume)
        return cache

    def _moved(self, numbers: NDArray[np.int64]) -> torch.Tensor:
        """On the model's device; to a GPU from pinned memory, so that the copy waits for nothing."""
        tensor = torch.from_numpy(numbers)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def pad(self, rows: list[NDArray[np.int32]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows of token ids as one right-padded array (batch, seq) and their lengths (batch,)."""
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        ids = np.full((len(rows), int(lengths.max())), self.pad_id, dtype=np.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = row
        return ids, lengths

    def _with_hooks(self, arguments: dict[str, Any], layers: Collection[int], consume: Consume) -> None:
        assert self._blocks is not None
        parent, name, blocks = self._blocks
        top = max(layers)
        active = blocks if top >= self.num_layers else self._up_to(top, blocks)
        handles = []
        try:
            if active is not blocks:
                setattr(parent, name, active)
            for layer in layers:
                if layer == 0:
                    handles.append(active[0].register_forward_pre_hook(_input_hook(consume), with_kwargs=True))
                elif layer < self.num_layers:
                    handles.append(active[layer - 1].register_forward_hook(self._output_hook(layer, consume)))
            output = self.inner(**arguments)
            if top >= self.num_layers:
                consume(self.num_layers, output[0])
        finally:
            for handle in handles:
                handle.remove()
            if active is not blocks:
                setattr(parent, name, blocks)

    def _up_to(self, top: int, blocks: nn.ModuleList) -> nn.ModuleList:
        """The first `top` blocks, then modules that pass their input through."""
        if top not in self._shortened:
            passing: list[nn.Module] = [_PassThrough(block, self._tuple_width) for block in blocks[top:]]
            self._shortened[top] = nn.ModuleList([*blocks[:top], *passing])
        return self._shortened[top]

    def _output_hook(self, layer: int, consume: Consume) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, tuple):
                self._tuple_width = len(output)
                output = output[0]
            consume(layer, output)

        return hook


class _PassThrough(nn.Module):
    """Stands in for a block that is not run; attributes a model reads from its blocks are the block's own."""

    def __init__(self, block: nn.Module, tuple_width: int) -> None:
        super().__init__()
        self._tuple_width = tuple_width
        # In a tuple, so that the block is not registered as a child.
        self._block = (block,)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        return (states, *[None] * (self._tuple_width - 1)) if self._tuple_width else states


def _input_hook(consume: Consume) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        consume(0, args[0] if args else kwargs["hidden_states"])

    return hook


def _find_blocks(inner: nn.Module, num_layers: int) -> tuple[nn.Module, str, nn.ModuleList] | None:
    """The module that holds the list of blocks, the list's name there, and the list; the outermost of that length."""
    found: tuple[int, nn.Module, str, nn.ModuleList] | None = None
    for path, module in inner.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            parent_path, _, name = path.rpartition(".")
            depth = path.count(".")
            if found is None or depth < found[0]:
                found = (depth, inner.get_submodule(parent_path), name, module)
    return found[1:] if found else None
