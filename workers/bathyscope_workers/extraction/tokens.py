"""Inputs to token ids.

A string gets the special tokens that the model's own tokenizer adds, and none of them twice when the text
brings them itself. Messages go through the chat template, whose output is tokenised as it is. Token ids are
taken as they are. Truncation keeps the special tokens that the tokenizer added, as the tokenizer's own does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bathyscope import errors
from bathyscope_workers.extraction.spec import ExtractionSpec
from bathyscope_workers.extraction.template import ChatRenderer, TemplateFault
from bathyscope_workers.models.resident import Resident

Ids = NDArray[np.int32]

MAX_FAULTS = 20
"""Bad inputs named in one problem."""


class TextEncoder:
    """A model's tokenizer, thousands of texts at a time."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._fast = getattr(tokenizer, "backend_tokenizer", None)
        if self._fast is not None:
            # Checkpoints bring settings of their own here (all-MiniLM-L6-v2 cuts at 128 tokens).
            self._fast.no_truncation()
            self._fast.no_padding()
        self.prefix, self.suffix = self._added()

    def encode(self, texts: Sequence[str], *, special: bool) -> list[Ids]:
        """Token ids of each text, with the special tokens the tokenizer adds or without."""
        if not texts:
            return []
        if self._fast is not None:
            found = self._fast.encode_batch_fast(list(texts), add_special_tokens=special)
            rows = [np.array(one.ids, dtype=np.int32) for one in found]
        else:
            lists = self._tokenizer(list(texts), add_special_tokens=special, padding=False, truncation=False)
            rows = [np.array(one, dtype=np.int32) for one in lists["input_ids"]]
        return [self._once(row) for row in rows] if special else rows

    def encode_with_ends(self, texts: Sequence[str], *, special: bool) -> list[tuple[Ids, NDArray[np.int64]]]:
        """Of each text its token ids, and behind which character each token ends (0 for added special tokens).

        Raises errors.InvalidRequest for a tokenizer that does not tell.
        """
        if self._fast is None:
            raise errors.InvalidRequest(
                "the model's tokenizer does not say where its tokens lie",
                errors=[{"pointer": "/score_choices", "detail": "choices are scored with a fast tokenizer only"}],
            )
        rows = []
        for one in self._fast.encode_batch(list(texts), add_special_tokens=special):
            ids = np.array(one.ids, dtype=np.int32)
            ends = np.array([end for _, end in one.offsets], dtype=np.int64)
            kept = self._single(ids) if special else slice(None)
            rows.append((ids[kept], ends[kept]))
        return rows

    def spans(self, text: str, *, special: bool) -> NDArray[np.int64] | None:
        """Where each token begins and ends in the text, (tokens, 2), [-1, -1] for one that is added; null for a
        tokenizer that does not tell."""
        if self._fast is None:
            return None
        found = self._fast.encode(text, add_special_tokens=special)
        spans = np.array(found.offsets, dtype=np.int64).reshape(-1, 2)
        # Which sequence a token is of; those that are added are of none.
        spans[np.array([one is None for one in found.sequence_ids], dtype=bool)] = -1
        return spans[self._single(np.array(found.ids, dtype=np.int32))] if special else spans

    def truncate(self, ids: Ids, length: int, side: str, *, special: bool) -> Ids:
        """`length` tokens: content dropped from the `left` or the `right`, added special tokens kept."""
        prefix, suffix = (len(self.prefix), len(self.suffix)) if special else (0, 0)
        if length <= prefix + suffix:
            prefix = suffix = 0
        content = ids[prefix : len(ids) - suffix]
        room = length - prefix - suffix
        kept = content[:room] if side == "right" else content[len(content) - room :]
        return np.concatenate([ids[:prefix], kept, ids[len(ids) - suffix :]])

    def _added(self) -> tuple[list[int], list[int]]:
        """The special tokens put before and after a text."""
        probe = "a"
        plain = self._raw(probe, special=False)
        full = self._raw(probe, special=True)
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return full[:start], full[start + len(plain) :]
        return [], []

    def _raw(self, text: str, *, special: bool) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=special)["input_ids"])

    def _once(self, ids: Ids) -> Ids:
        """Drop an added special token next to the same one from the text: `<s><s>Once` is `<s>Once`."""
        return ids[self._single(ids)]

    def _single(self, ids: Ids) -> slice:
        start, end = 0, len(ids)
        many = len(self.prefix) + len(self.suffix)
        if self.prefix and end > many and ids[len(self.prefix)] == self.prefix[-1]:
            start = 1
        if self.suffix and end - start > many and ids[end - len(self.suffix) - 1] == self.suffix[0]:
            end -= 1
        return slice(start, end)


@dataclass(slots=True)
class Prepared:
    """An input on its way: a text to encode, or ids."""

    index: int
    text: str | None = None
    special: bool = True
    ids: Ids | None = None


class InputReader:
    """Turns wire inputs into token ids, collecting what is wrong with them."""

    def __init__(
        self, resident: Resident, spec: ExtractionSpec, renderer: ChatRenderer, *, first_input: int = 0
    ) -> None:
        """`first_input`: where the inputs begin in the request's, which is what faults are told in."""
        self.first_input = first_input
        self._resident = resident
        self._spec = spec
        self._renderer = renderer
        self._encoder = encoder_of(resident)
        own = resident.facts.max_length
        asked = spec.max_length
        self.max_length = min(own, asked) if own and asked else own or asked
        """Tokens: what the request, the registry and the model allow, whichever is least."""
        if spec.template == "chat":
            self._template()  # refuse before any input is read
        self.faults: list[errors.FieldError] = []

    def read(self, first: int, inputs: Sequence[Any]) -> list[Ids]:
        """Token ids of each input; `first` is the index of the first of them.

        Faulty inputs are noted in `faults` and give no tokens; past `MAX_FAULTS` they are raised. Raises
        errors.InvalidRequest where the model cannot take this kind of input at all.
        """
        return self.encode(self.prepare(first, inputs))

    def prepare(self, first: int, inputs: Sequence[Any]) -> list[Prepared]:
        """The text of each input, rendered where it goes through the chat template; see `read`."""
        return [self._prepare(first + place, item) for place, item in enumerate(inputs)]

    def encode(self, prepared: Sequence[Prepared]) -> list[Ids]:
        """Token ids of prepared inputs; see `read`."""
        for special in (True, False):
            texts = [one for one in prepared if one.text is not None and one.special is special]
            if texts:
                encoded = self.encoder.encode([one.text or "" for one in texts], special=special)
                for one, ids in zip(texts, encoded, strict=True):
                    one.ids = ids
        rows = [self._finish(one) for one in prepared]
        if len(self.faults) >= MAX_FAULTS:
            self.raise_faults()
        return rows

    def raise_faults(self) -> None:
        """Raise errors.InvalidInput when there were faulty inputs."""
        if self.faults:
            faults = sorted(self.faults, key=lambda fault: int(fault["pointer"].split("/")[2]))[:MAX_FAULTS]
            what = "an input cannot be used" if len(faults) == 1 else f"{len(faults)} inputs cannot be used"
            raise errors.InvalidInput(what, errors=faults)

    def fault(self, index: int, detail: str, *, within: str = "") -> None:
        """Note what is wrong with an input, or with what the pointer `within` it names."""
        self.faults.append({"pointer": f"/inputs/{self.first_input + index}{within}", "detail": detail})

    def _prepare(self, index: int, item: Any) -> Prepared:
        if isinstance(item, dict) and isinstance(item.get("prompt"), str):
            item = item["prompt"]
        if isinstance(item, str):
            if self._spec.template == "none":
                return Prepared(index, text=item)
            return self._render(index, [{"role": "user", "content": item}])
        if isinstance(item, dict) and isinstance(item.get("messages"), list):
            return self._render(index, item["messages"])
        if isinstance(item, dict) and isinstance(item.get("token_ids"), list):
            return Prepared(index, ids=self._given_ids(index, item["token_ids"]), special=False)
        self.fault(index, 'an input is a string, {"messages": [...]}, {"token_ids": [...]} or {"prompt": ...}')
        return Prepared(index)

    def _render(self, index: int, messages: list[Any]) -> Prepared:
        if not messages or not all(isinstance(one, dict) and isinstance(one.get("role"), str) for one in messages):
            self.fault(index, "messages are objects with role and content, at least one")
            return Prepared(index)
        try:
            text = self._renderer.render(
                self._template(),
                # Keys without a value are left out, as transformers' own call does.
                [{key: value for key, value in one.items() if value is not None} for one in messages],
                special_tokens=self._resident.tokenizer.special_tokens_map,
                add_generation_prompt=self._spec.add_generation_prompt,
            )
        except TemplateFault as fault:
            self.fault(index, str(fault))
            if fault.bounds:
                self.raise_faults()
            return Prepared(index)
        return Prepared(index, text=text, special=False)

    def _given_ids(self, index: int, given: list[Any]) -> Ids | None:
        vocab_size = self._resident.facts.vocab_size
        if not all(isinstance(one, int) and not isinstance(one, bool) for one in given):
            self.fault(index, "token ids are whole numbers")
            return None
        wrong = next((one for one in given if not 0 <= one < vocab_size), None)
        if wrong is not None:
            self.fault(index, f"token id {wrong} is not in the vocabulary, whose ids are 0 to {vocab_size - 1}")
            return None
        return np.array(given, dtype=np.int32)

    def _finish(self, one: Prepared) -> Ids:
        ids = one.ids
        nothing = np.zeros(0, dtype=np.int32)
        if ids is None:
            return nothing
        if not len(ids):
            self.fault(one.index, "gives no tokens; an input needs at least one")
            return nothing
        if one.text is not None and int(ids.max()) >= self._resident.facts.vocab_size:
            self.fault(one.index, "holds a token for which this model has no embedding")
            return nothing
        if self.max_length is None or len(ids) <= self.max_length:
            return ids
        if self._spec.truncation == "error":
            self.fault(
                one.index,
                f"has {len(ids)} tokens, the limit is {self.max_length}: shorten it, raise max_length where the "
                'model allows, or set truncation to "left" or "right"',
            )
            return nothing
        if self._encoder is None:
            return ids[: self.max_length] if self._spec.truncation == "right" else ids[-self.max_length :]
        return self._encoder.truncate(
            ids, self.max_length, self._spec.truncation, special=one.special and one.text is not None
        )

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer as it was loaded, null where it has none."""
        return self._resident.tokenizer

    def kept(self, tokens: int, *, special: bool) -> Ids:
        """Which of a text's tokens truncation leaves."""
        places = np.arange(tokens, dtype=np.int32)
        if self.max_length is None or tokens <= self.max_length:
            return places
        return self.encoder.truncate(places, self.max_length, self._spec.truncation, special=special)

    def _template(self) -> str:
        template = self._resident.chat_template
        if template is None:
            raise errors.InvalidRequest(
                f"{self._resident.spec.name} has no chat template",
                errors=[
                    {
                        "pointer": "/template",
                        "detail": "send strings with template none: this model has no chat template",
                    }
                ],
            )
        return template

    @property
    def encoder(self) -> TextEncoder:
        """The model's tokenizer. Raises errors.InvalidRequest where it has none."""
        if self._encoder is None:
            raise errors.InvalidRequest(
                f"{self._resident.spec.name} has no tokenizer",
                errors=[{"pointer": "/inputs", "detail": "send token_ids: this model's folder holds no tokenizer"}],
            )
        return self._encoder


def encoder_of(resident: Resident) -> TextEncoder | None:
    """The resident's encoder, made once."""
    if resident.tokenizer is None:
        return None
    if resident.text_encoder is None:
        resident.text_encoder = TextEncoder(resident.tokenizer)
    found = resident.text_encoder
    assert isinstance(found, TextEncoder)
    return found
