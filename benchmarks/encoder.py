"""A small random encoder of MiniLM's shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from benchmarks import corpus

LAYERS, WIDTH, HEADS, INNER = 6, 384, 12, 1536


@dataclass(frozen=True, slots=True)
class Encoder:
    """Its folder, and the model itself."""

    folder: Path
    """As `AutoModel` reads it; sentence-transformers adds the mean by itself."""
    model: Any
    count: Callable[[str], int]
    """Tokens of a text."""


def make(folder: Path) -> Encoder:
    """Write it; the vocabulary is that of the corpus."""
    words = sorted({*corpus.WORDS, *(str(digit) for digit in range(10)), *"abcdefghijklmnopqrstuvwxyz.,?!"})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *words, *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz0123456789")]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=512,
    )
    torch.manual_seed(7)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=INNER,
        max_position_embeddings=512,
    )
    model = BertModel(config).eval()
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return Encoder(folder, model, lambda text: len(fast(text)["input_ids"]))
