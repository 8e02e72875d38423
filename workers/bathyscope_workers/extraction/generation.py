"""Answers in words: at each step the likeliest token, until the model ends, a stop text comes, or the bound.

A few prompts of one variant are answered at a time, with a cache of keys and values, which lives from one step to the
next: between two steps other jobs' batches run, and a job that is cancelled is simply not continued. Prompts of unequal
length are padded on the left, with a mask and with positions that do not count the padding; where the model takes no
positions, or texts are run alone, only equal lengths share, or none do.

No setting of the checkpoint's for sampling (temperature, penalties) has a say, only its tokens that end a text.
"""

from __future__ import annotations

import inspect
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bathyscope_workers.adapters.bank import Share
from bathyscope_workers.extraction.choices import Answer

if TYPE_CHECKING:
    from bathyscope_workers.extraction.extraction import Extraction

_MOST_ROWS = 32


@dataclass(slots=True)
class _Batch:
    """Prompts that are being answered together."""

    variant: int
    inputs: list[int]
    ids: torch.Tensor
    """(rows, tokens) to read next: the prompts, then the token just given."""
    mask: torch.Tensor | None
    """(rows, tokens so far), where prompts are padded."""
    given: list[list[int]]
    """Tokens of each answer so far."""
    logprobs: list[float]
    open: list[bool]
    """Whether each goes on."""
    stopped: list[bool]
    """By itself or at a stop text."""
    cache: Any = None


@dataclass(slots=True)
class Worked:
    """What one call of `Generation.work` did."""

    answers: int = 0
    tokens: int = 0
    padded: int = 0


@dataclass(slots=True)
class Generation:
    """The answers of one extraction that are still to be given."""

    extraction: Extraction
    _pending: list[tuple[int, int]] = field(default_factory=list)
    """(variant, place among the open questions), the next one last."""
    _lengths: list[int] = field(default_factory=list)
    """Tokens of each open question's prompt."""
    _batch: _Batch | None = None
    _most: int = _MOST_ROWS
    done: int = 0
    total: int = 0

    def __post_init__(self) -> None:
        """Longest first, so that what does not fit shows at once; one variant after the other."""
        extraction = self.extraction
        assert extraction.questions is not None
        self._lengths = [len(prompt) for prompt in extraction.questions.open_prompts]
        by_length = sorted(range(len(self._lengths)), key=self._lengths.__getitem__)
        self._pending = [
            (variant, place) for variant in reversed(range(len(extraction.variants))) for place in by_length
        ]
        self.total = len(self._pending)

    @property
    def waiting(self) -> bool:
        """Whether anything is left to do."""
        return self._batch is not None or bool(self._pending)

    def work(self, budget: int, seconds: float) -> Worked:
        """Go on for about `seconds`: one token at least. `budget` bounds rows times tokens of those begun together."""
        deadline = time.monotonic() + seconds
        worked = Worked()
        if self._batch is None:
            self._batch = self._begin(budget)
        batch = self._batch
        adapter = self.extraction.variants[batch.variant]
        rows = len(batch.inputs)
        adapters = self.extraction.resident.adapters
        with nullcontext() if adapter is None else adapters.serving([Share(adapter, 0, rows)], batch.ids.shape[1]):
            while True:
                worked.padded += batch.ids.numel()
                # Of the first pass the padding is known; later every row reads one token.
                worked.tokens += (
                    batch.ids.numel() if batch.mask is None or batch.cache is not None else int(batch.mask.sum())
                )
                self._step(batch)
                if not any(batch.open) or time.monotonic() >= deadline:
                    break
        if not any(batch.open):
            self._keep(batch)
            self._batch = None
            self.done += rows
            worked.answers = rows
        return worked

    def again(self) -> bool:
        """Forget the answers under way, to be begun anew, fewer at a time; False when it was a single one."""
        batch, self._batch = self._batch, None
        if batch is None:
            return False
        assert self.extraction.questions is not None
        places = {index: place for place, index in enumerate(self.extraction.questions.open)}
        self._pending += [(batch.variant, places[index]) for index in reversed(batch.inputs)]
        self._most = max(1, len(batch.inputs) // 2)
        return len(batch.inputs) > 1

    def _begin(self, budget: int) -> _Batch:
        extraction, questions = self.extraction, self.extraction.questions
        assert questions is not None
        accepts = inspect.signature(extraction.resident.model.forward).parameters
        variant, place = self._pending.pop()
        places, longest = [place], self._lengths[place]
        whole = longest + extraction.spec.max_new_tokens
        most = 1 if extraction.style.alone else max(1, min(self._most, budget // whole))
        while len(places) < most and self._pending and self._pending[-1][0] == variant:
            length = self._lengths[self._pending[-1][1]]
            if length != longest and ("position_ids" not in accepts or 2 * length < longest):
                break
            places.append(self._pending.pop()[1])
        forward = extraction.resident.forward
        ids = np.full((len(places), longest), forward.pad_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, one in enumerate(places):
            prompt = questions.open_prompts[one]
            ids[row, longest - len(prompt) :] = prompt
            mask[row, longest - len(prompt) :] = 1
        return _Batch(
            variant,
            [questions.open[one] for one in places],
            torch.from_numpy(ids).to(forward.device),
            None if mask.all() else torch.from_numpy(mask).to(forward.device),
            given=[[] for _ in places],
            logprobs=[0.0] * len(places),
            open=[True] * len(places),
            stopped=[False] * len(places),
        )

    def _step(self, batch: _Batch) -> None:
        """One more token of each answer."""
        resident = self.extraction.resident
        arguments: dict[str, Any] = {"input_ids": batch.ids, "use_cache": True, "return_dict": True}
        if "logits_to_keep" in inspect.signature(resident.model.forward).parameters:
            arguments["logits_to_keep"] = 1
        if batch.cache is not None:
            arguments["past_key_values"] = batch.cache
        if batch.mask is not None:
            positions = (batch.mask.cumsum(-1) - 1).clamp_min(0)[:, -batch.ids.shape[1] :]
            arguments |= {"attention_mask": batch.mask, "position_ids": positions}
        with torch.inference_mode():
            output = resident.model(**arguments)
            logits = output.logits[:, -1].float()  # (rows, vocabulary)
            chosen = logits.argmax(-1)
            logprobs = logits.gather(1, chosen[:, None])[:, 0] - torch.logsumexp(logits, dim=-1)
        batch.cache = getattr(output, "past_key_values", None)
        for row, (token, logprob) in enumerate(zip(chosen.tolist(), logprobs.double().tolist(), strict=True)):
            if batch.open[row]:
                batch.given[row].append(token)
                batch.logprobs[row] += logprob
                batch.stopped[row] = self._ends(batch.given[row])
                batch.open[row] = not batch.stopped[row] and len(batch.given[row]) < self.extraction.spec.max_new_tokens
        given = chosen[:, None].to(batch.ids.device)
        # A model that keeps no such cache reads the whole anew.
        batch.ids = given if batch.cache is not None else torch.cat([batch.ids, given], dim=1)
        if batch.mask is not None:
            batch.mask = torch.cat([batch.mask, batch.mask.new_ones(len(batch.open), 1)], dim=1)

    def _ends(self, given: list[int]) -> bool:
        if given[-1] in self.extraction.resident.end_tokens:
            return True
        stop = self.extraction.spec.stop
        return bool(stop) and any(one in self._text(given) for one in stop)

    def _text(self, given: list[int]) -> str:
        decoded: str = self.extraction.resident.tokenizer.decode(given, skip_special_tokens=True)
        return decoded

    def _keep(self, batch: _Batch) -> None:
        assert self.extraction.questions is not None
        kept = self.extraction.questions.answered[batch.variant]
        for row, index in enumerate(batch.inputs):
            text = self._text(batch.given[row])
            ends = [text.index(one) for one in self.extraction.spec.stop if one in text]
            text = text[: min(ends)] if ends else text
            kept[index] = Answer(text, batch.logprobs[row], len(batch.given[row]), batch.stopped[row])
