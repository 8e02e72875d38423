"""A model in memory, ready to be run, and what is known of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from bathyscope_workers.adapters.attached import Adapters
from bathyscope_workers.models.forward import Forward, Style
from bathyscope_workers.models.head import Head
from bathyscope_workers.models.past import Kept
from bathyscope_workers.models.selftest import SelfTest
from bathyscope_workers.models.spec import ModelSpec


@dataclass(slots=True)
class ResidentFacts:
    """What the `loaded` event tells of a model."""

    num_layers: int
    """Blocks; layers are numbered 0 (embeddings) to this (after the final norm)."""
    hidden_size: int
    architecture: str
    """Class of the model, `LlamaForCausalLM` say."""
    causal: bool
    """A decoder; otherwise an encoder."""
    max_length: int | None
    """Tokens: the model's own maximum and the registry's, whichever is less."""
    vocab_size: int
    """Rows of the embedding matrix: token ids are below it."""
    memory_bytes: int
    """Measured after the load: parameters, buffers and quantization states."""
    memory_growth_bytes: int
    """How much the process (CPU: resident set, CUDA: allocations) grew by; mapped files count when first touched."""
    fraction_quantized: float
    """Share of the parameters held in 8 or 4 bits."""
    quantization: str
    llm_int8_threshold: float | None
    """Of an 8bit model."""
    compute_dtype: str
    """Resolved."""
    revision: str
    has_chat_template: bool
    has_tokenizer: bool
    style: str
    """How texts are run, as the self-test chose it."""
    batch_tokens: int
    """Padded tokens a batch, as `tuning` measured."""
    load_seconds: float
    self_test: dict[str, Any] = field(default_factory=dict)

    def to_wire(self) -> dict[str, Any]:
        """A JSON object."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


class Resident:
    """A loaded model with its tokenizer. Not safe for use by two threads at once."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        model: Any,
        forward: Forward,
        tokenizer: Any,
        style: Style,
        batched_style: Style,
        self_test: SelfTest,
        facts: ResidentFacts,
        branching: bool = False,
    ) -> None:
        self.spec = spec
        """With the compute dtype resolved; `spec.key` is the resident's key."""
        self.model = model
        self.forward = forward
        self.tokenizer = tokenizer
        """None for a folder without one: its inputs are token ids."""
        self.style = style
        """Keeps each text's states what they are alone, as exactly as the compute dtype allows."""
        self.batched_style = batched_style
        """For requests that say `batch_invariant: false`: the same but for 8bit models, whose texts then mix."""
        self.self_test = self_test
        self.facts = facts
        self.branching = branching
        """Whether texts that begin alike may run as a tree: in `style`, the self-test tried it."""
        self.kept = Kept()
        """Beginnings that texts still to be run go on from."""
        self.token_budget: int | None = None
        """Lowered when a batch ran out of memory; None while the engine's own budget holds."""
        self.text_encoder: object | None = None
        """What the extraction keeps with the tokenizer, see `extraction.tokens.encoder_of`."""

    @cached_property
    def adapters(self) -> Adapters:
        """The adapters attached to it."""
        return Adapters(
            self.model,
            device=self.forward.device,
            vocab_size=self.facts.vocab_size,
            compute_dtype=self.facts.compute_dtype,
        )

    @cached_property
    def head(self) -> Head:
        """States to logits. Raises `errors.InvalidRequest` for a model that gives no probabilities."""
        return Head(
            self.model,
            self.forward,
            name=self.spec.name,
            compute_dtype=self.facts.compute_dtype,
            vocab_size=self.facts.vocab_size,
        )

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        """Token ids that end an answer, by the checkpoint's generation config, else by its tokenizer."""
        config = getattr(self.model, "generation_config", None)
        named = getattr(config, "eos_token_id", None)
        if named is None:
            named = getattr(self.tokenizer, "eos_token_id", None)
        return frozenset(named if isinstance(named, list) else [] if named is None else [named])

    @property
    def memory_bytes(self) -> int:
        """Of the model and the adapters attached to it."""
        return self.facts.memory_bytes + self.adapters.memory_bytes

    @property
    def key(self) -> str:
        """`name:quantization:compute dtype`."""
        return self.spec.key

    @cached_property
    def chat_template(self) -> str | None:
        """The Jinja source of the default chat template."""
        if self.tokenizer is None or not self.tokenizer.chat_template:
            return None
        try:
            return str(self.tokenizer.get_chat_template())
        except ValueError:  # several templates, none of them the default
            return None
