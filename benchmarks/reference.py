"""The loop that people write: transformers, `output_hidden_states=True`, one text or a padded batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

States = NDArray[np.float32]
"""`(texts, layers, hidden)`."""


class Reference:
    """The same model as the worker's, in this process, with the same number of threads."""

    def __init__(self, folder: Path, dtype: str, threads: int) -> None:
        quiet: Any = logging
        quiet.disable_progress_bar()
        torch.set_num_threads(threads)
        self.dtype = dtype
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        auto: Any = AutoModelForCausalLM
        self.model: Any = auto.from_pretrained(folder, dtype=_DTYPES[dtype], local_files_only=True)
        self.model.eval()

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.tokenizer(text)["input_ids"])

    @torch.inference_mode()
    def one_at_a_time(self, texts: Sequence[str], layers: Sequence[int]) -> States:
        """States of each text's last token, each text in a call of its own."""
        rows = []
        for text in texts:
            batch = self.tokenizer(text, return_tensors="pt")
            states = self.model(**batch, output_hidden_states=True).hidden_states
            rows.append(torch.stack([states[layer][0, -1] for layer in layers]))
        return _array(torch.stack(rows))

    @torch.inference_mode()
    def in_batches(self, texts: Sequence[str], layers: Sequence[int], size: int = 8) -> States:
        """The same in batches in the order given, padded on the right."""
        parts = []
        for start in range(0, len(texts), size):
            batch = self.tokenizer(list(texts[start : start + size]), return_tensors="pt", padding=True)
            states = self.model(**batch, output_hidden_states=True).hidden_states
            last = batch["attention_mask"].sum(1) - 1
            rows = torch.arange(len(last))
            parts.append(torch.stack([states[layer][rows, last] for layer in layers], 1))
        return _array(torch.cat(parts))

    @torch.inference_mode()
    def all_tokens(self, texts: Sequence[str], size: int = 8) -> list[torch.Tensor]:
        """All layers of all tokens in batches in the order given: of each text (tokens, layers, hidden)."""
        found: list[torch.Tensor] = []
        for start in range(0, len(texts), size):
            batch = self.tokenizer(list(texts[start : start + size]), return_tensors="pt", padding=True)
            states = torch.stack(self.model(**batch, output_hidden_states=True).hidden_states, 2)
            lengths = batch["attention_mask"].sum(1).tolist()
            found += [one[:length].clone() for one, length in zip(states, lengths, strict=True)]
        return found

    @torch.inference_mode()
    def partial(self, text: str, top: int) -> torch.Tensor:
        """The least that gives `hidden_states[top]` of one text: the lowest blocks, no output head, nothing copied."""
        ids = self.tokenizer(text, return_tensors="pt")["input_ids"]
        decoder = self.model.get_decoder()
        blocks = decoder.config.num_hidden_layers
        found: list[torch.Tensor] = []
        hook = decoder.layers[top - 1].register_forward_hook(lambda _module, _inputs, output: found.append(output))
        decoder.config.num_hidden_layers = top  # the decoder's loop runs that many
        try:
            decoder(input_ids=ids, use_cache=False)
        finally:
            decoder.config.num_hidden_layers = blocks
            hook.remove()
        return found[0]


def relative_errors(found: NDArray[Any], expected: NDArray[Any]) -> NDArray[np.float64]:
    """`|a - b| / |b|` of each state vector (the last axis)."""
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    return np.asarray(np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1))


def _array(states: torch.Tensor) -> States:
    return np.asarray(states.float().numpy())
