"""A small random model, made in a second; the soak works it too."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_tiny(folder: Path, corpus: list[str], *, chat_template: str | None = None, blocks: int = 4) -> Path:
    """A random Llama with a byte-level tokenizer that knows every text."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    raw = ByteLevelBPETokenizer()
    raw.train_from_iterator(corpus, vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False)
    untyped: Any = PreTrainedTokenizerFast
    tokenizer = untyped(tokenizer_object=raw._tokenizer, eos_token="</s>", model_max_length=512)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
