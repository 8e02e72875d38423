"""Questions: prompts with choices, of which each is scored, or with an answer in words, which the model is to give.

Prompt and choice are one text, tokenised together. A token that covers any character of the choice is the choice's,
also one that begins in the prompt; what comes before is read and not scored. The score of a choice is the sum of the
log-probabilities of its tokens, each after all tokens before it.

What a forward pass reads are sequences. A token's probability needs the tokens before it only, so a choice needs its
text up to the last token, and a decoder gives the same for the beginning of a longer text: a sequence that begins
another one is not run. For choices of one token that leaves the prompt alone, which gives its hidden states and all the
scores in one pass. Where a model's numbers depend on the whole of what it reads (texts that run alone), every text is
run as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from bathyscope import errors
from bathyscope_workers.extraction.matching import matches
from bathyscope_workers.extraction.spec import ExtractionSpec
from bathyscope_workers.extraction.tokens import MAX_FAULTS, Ids, InputReader, Prepared

FILE_NAME, INDEX_NAME = "choices.jsonl", "choices.index"


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said."""

    text: str
    logprob: float
    """Sum over the tokens it gave, the one that ended it included."""
    tokens: int
    """How many those are, at least one."""
    ended: bool
    """By itself or at a stop text, not at the bound."""


@dataclass(slots=True)
class _Read:
    """What a chunk of inputs asks."""

    sequences: list[Ids] = field(default_factory=list)
    carried: list[int] = field(default_factory=list)
    """Of each sequence the input whose states come from it, or -1."""
    sequence: list[int] = field(default_factory=list)
    """Of each token that is scored: where it is read,"""
    position: list[int] = field(default_factory=list)
    """after which position there,"""
    token: list[int] = field(default_factory=list)
    """and what it is."""


class Questions:
    """What the inputs of one extraction ask, and what came out."""

    def __init__(self, spec: ExtractionSpec, reader: InputReader, *, alone: bool, own_max_length: int | None) -> None:
        """`alone`: run each text as it is. `own_max_length`: tokens that the model can read, prompt and answer."""
        self._spec = spec
        self._reader = reader
        self._alone = alone
        self._own_max_length = own_max_length
        self._read = _Read()
        self._counts: list[int] = []
        """Choices of each input; 0 for one that is to be answered in words."""
        self._answers: list[int | str] = []
        self._choice_tokens: list[int] = []
        """Tokens of each choice, those of one input after those of another."""
        self._shared: list[bool] = []
        """Of each choice: whether the prompt's tokens are others before it than they are alone."""
        self.open: list[int] = []
        """Inputs to be answered in words,"""
        self.open_prompts: list[Ids] = []
        """and what is read before the answer."""
        self.answered: list[dict[int, Answer]] = []
        """Of each variant, by input."""

    # --- reading ---

    def read(self, items: Sequence[Any], prepared: Sequence[Prepared], rows: Sequence[Ids]) -> None:
        """Take in the next inputs: as they came, prepared, and the tokens of their prompts (none of a faulty one)."""
        together: list[tuple[int, int, int]] = []
        texts: list[str] = []
        for place, (item, one) in enumerate(zip(items, prepared, strict=True)):
            choices = item.get("choices") if isinstance(item, dict) else None
            for number, choice in enumerate(choices or ()):
                together.append((place, number, len(one.text or "")))
                texts.append(f"{one.text or ''}{choice}")
        found: dict[tuple[int, int], tuple[Ids, int]] = {}
        for special in (True, False):
            wanted = [number for number, (place, _, _) in enumerate(together) if prepared[place].special is special]
            if wanted:
                encoded = self._reader.encoder.encode_with_ends([texts[one] for one in wanted], special=special)
                for number, (ids, ends) in zip(wanted, encoded, strict=True):
                    place, choice_number, length = together[number]
                    behind = np.flatnonzero(ends > length)
                    start, stop = (int(behind[0]), int(behind[-1]) + 1) if len(behind) else (len(ids), len(ids))
                    found[place, choice_number] = (ids[:stop], start)
        for place, (item, one, ids) in enumerate(zip(items, prepared, rows, strict=True)):
            self._question(item, one, ids, found, place)

    def _question(
        self, item: Any, one: Prepared, ids: Ids, found: dict[tuple[int, int], tuple[Ids, int]], place: int
    ) -> None:
        index = one.index
        if not isinstance(item, dict) or "prompt" not in item:
            self._reader.fault(index, "score_choices needs a prompt with choices or with an answer in words")
            return
        choices, answer = item.get("choices"), item.get("answer")
        if choices is None:
            if not isinstance(answer, str) or not answer.strip():
                self._reader.fault(index, "without choices it is the right answer in words", within="/answer")
            elif len(ids):
                self._open_question(one, ids, answer)
            return
        if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
            detail = f"with {len(choices)} choices it is one of 0 to {len(choices) - 1}"
            self._reader.fault(index, detail, within="/answer")
            return
        if not len(ids):  # the prompt is faulty itself
            return
        scored = [self._choice(one, number, *found[place, number]) for number in range(len(choices))]
        whole = [each for each in scored if each is not None]
        if len(whole) < len(choices):
            return
        keys = [each.tobytes() for each, _ in whole]
        for number, key in enumerate(keys):
            if keys.index(key) != number:
                detail = f"it has the same tokens as choice {keys.index(key)}"
                self._reader.fault(index, detail, within=f"/choices/{number}")
                return
        self._counts.append(len(choices))
        self._answers.append(answer)
        self._add(index, ids, whole)

    def _choice(self, one: Prepared, number: int, ids: Ids, start: int) -> tuple[Ids, int] | None:
        """Prompt and choice, cut to what may be read, and where the choice begins; None when it cannot be scored."""
        within = f"/choices/{number}"
        if start == len(ids):
            self._reader.fault(one.index, "gives no tokens of its own", within=within)
            return None
        assert one.ids is not None
        shared = not np.array_equal(ids[:start], self._bare(one, one.ids))
        limit = self._reader.max_length
        if limit is not None and len(ids) > limit:
            kept = self._prefix(one)
            dropped = len(ids) - limit
            if self._spec.truncation != "left" or start - dropped < max(1, kept):
                self._reader.fault(
                    one.index,
                    f"with its prompt it has {len(ids)} tokens, the limit is {limit}: shorten it, raise max_length "
                    'where the model allows, or set truncation to "left", which drops tokens of the prompt',
                    within=within,
                )
                return None
            ids, start = np.concatenate([ids[:kept], ids[kept + dropped :]]), start - dropped
        if start == 0:
            self._reader.fault(
                one.index, "shares its first token with all of the prompt: nothing is before it", within=within
            )
            return None
        self._shared.append(shared)
        return ids, start

    def _open_question(self, one: Prepared, ids: Ids, answer: str) -> None:
        prompt = self._bare(one, ids)
        limit = self._own_max_length
        room = None if limit is None else limit - self._spec.max_new_tokens
        if room is not None and len(prompt) > room:
            kept = self._prefix(one)
            if self._spec.truncation == "error" or room <= kept:
                self._reader.fault(
                    one.index,
                    f"has {len(prompt)} tokens and may be answered with {self._spec.max_new_tokens}, the model's limit "
                    f'is {limit}: shorten it, lower max_new_tokens, or set truncation to "left" or "right"',
                )
                return
            cut = prompt[:room] if self._spec.truncation == "right" else prompt[kept + len(prompt) - room :]
            prompt = cut if self._spec.truncation == "right" else np.concatenate([prompt[:kept], cut])
        if not len(prompt):
            self._reader.fault(one.index, "gives no tokens; an answer needs at least one before it")
            return
        self._counts.append(0)
        self._answers.append(answer)
        self.open.append(one.index)
        self.open_prompts.append(prompt)
        self._add(one.index, ids, [])

    def _bare(self, one: Prepared, ids: Ids) -> Ids:
        """A prompt's tokens without what the tokenizer puts at the end of a text."""
        suffix = len(self._reader.encoder.suffix) if one.special else 0
        return ids[: len(ids) - suffix] if suffix else ids

    def _prefix(self, one: Prepared) -> int:
        return len(self._reader.encoder.prefix) if one.special else 0

    def _add(self, index: int, prompt: Ids, choices: Sequence[tuple[Ids, int]]) -> None:
        """Note which sequences an input needs, and which tokens are scored in them."""
        read = self._read
        needed = [prompt, *(ids if self._alone else ids[:-1] for ids, _ in choices)]
        carriers = list(range(len(needed))) if self._alone else _within(needed)
        first = len(read.sequences)
        kept: dict[int, int] = {}
        for number in carriers:
            if number not in kept:
                kept[number] = first + len(kept)
                read.sequences.append(needed[number])
                read.carried.append(index if number == carriers[0] else -1)
        for number, (ids, start) in enumerate(choices, start=1):
            count = len(ids) - start
            read.sequence += [kept[carriers[number]]] * count
            read.position += range(start - 1, len(ids) - 1)
            read.token += ids[start:].tolist()
            self._choice_tokens.append(count)

    # --- what is run ---

    def lay_out(self, variants: int) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
        """All inputs are read: ids of all sequences, their lengths, and which input's states each carries, or -1."""
        read, self._read = self._read, _Read()
        lengths = np.array([len(one) for one in read.sequences], dtype=np.int64)
        ids = np.concatenate(read.sequences)
        sequence = np.array(read.sequence, dtype=np.int64)
        order = np.argsort(sequence, kind="stable")
        self._by_sequence = order
        self._first = np.searchsorted(sequence[order], np.arange(len(lengths) + 1))
        self._position = np.array(read.position, dtype=np.int64)
        self._token = np.array(read.token, dtype=np.int64)
        self.logprobs = np.full((variants, len(order)), np.nan)
        """Of each scored token, under each variant."""
        self.answered = [{} for _ in range(variants)]
        return ids, lengths, np.array(read.carried, dtype=np.int64)

    def targets(self, sequence: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """The scored tokens that a sequence is read for: their numbers, positions before them, and themselves."""
        numbers = self._by_sequence[self._first[sequence] : self._first[sequence + 1]]
        return numbers, self._position[numbers], self._token[numbers]

    # --- what came out ---

    def write(self, folder: Path) -> dict[str, Any]:
        """Leave the scores in `folder`, a JSON line an input and variant, with an index of where each line begins.

        Gives `choices_path`, `choices_index_path` and `scored`: of each variant the inputs answered, those answered
        right, the mean confidence, and the choices that share a token with their prompt.
        Raises errors.InvalidInput for scores that are not numbers.
        """
        counts = np.array(self._choice_tokens, dtype=np.int64)
        first = np.concatenate([[0], np.cumsum(counts)])[:-1]
        path, starts = folder / FILE_NAME, [0]
        scored: list[dict[str, Any]] = []
        with path.open("wb") as file:
            for values, answered in zip(self.logprobs, self.answered, strict=True):
                sums = np.add.reduceat(values, first) if len(first) else np.zeros(0)
                self._refuse_non_finite(sums, answered)
                correct, confidence = 0, 0.0
                for line in self._lines(sums, counts, answered):
                    written = orjson.dumps(line) + b"\n"
                    starts.append(len(written))
                    file.write(written)
                    correct += line["correct"]
                    confidence += line["confidence"]
                scored.append(
                    {
                        "answered": len(self._counts),
                        "correct": correct,
                        "confidence": confidence / len(self._counts),
                        "shared": sum(self._shared),
                    }
                )
        index = folder / INDEX_NAME
        index.write_bytes(np.cumsum(starts, dtype="<i8").tobytes())
        return {"choices_path": str(path), "choices_index_path": str(index), "scored": scored}

    def _lines(
        self, sums: NDArray[np.float64], counts: NDArray[np.int64], answered: dict[int, Answer]
    ) -> Iterator[dict[str, Any]]:
        start = 0
        for index, (choices, right) in enumerate(zip(self._counts, self._answers, strict=True)):
            if isinstance(right, str):
                answer = answered[index]
                correct = matches(answer.text, right, self._spec.match)
                yield _answer_line(self._reader.first_input + index, answer, correct)
                continue
            here = slice(start, start + choices)
            start += choices
            total, tokens = sums[here], counts[here]
            mean = total / tokens
            picked, by_mean = int(np.argmax(total)), int(np.argmax(mean))
            yield {
                "index": self._reader.first_input + index,
                "logprobs": total.tolist(),
                "logprobs_per_token": mean.tolist(),
                "tokens": tokens.tolist(),
                "picked": picked,
                "correct": picked == right,
                "confidence": _softmax_at(total, picked),
                "picked_per_token": by_mean,
                "correct_per_token": by_mean == right,
                "confidence_per_token": _softmax_at(mean, by_mean),
            }

    def _refuse_non_finite(self, sums: NDArray[np.float64], answered: dict[int, Answer]) -> None:
        owners = np.repeat(np.arange(len(self._counts)), self._counts)
        wrong = set(owners[~np.isfinite(sums)].tolist())
        wrong |= {index for index, answer in answered.items() if not np.isfinite(answer.logprob)}
        if wrong:
            detail = "its log-probabilities are not finite; compute in float32"
            raise errors.InvalidInput(
                f"{len(wrong)} inputs have scores that are not numbers",
                errors=[
                    {"pointer": f"/inputs/{self._reader.first_input + one}", "detail": detail}
                    for one in sorted(wrong)[:MAX_FAULTS]
                ],
            )


def _answer_line(index: int, answer: Answer, correct: bool) -> dict[str, Any]:
    mean = answer.logprob / answer.tokens
    return {
        "index": index,
        "logprobs": [answer.logprob],
        "logprobs_per_token": [mean],
        "tokens": [answer.tokens],
        "picked": None,
        "correct": correct,
        "confidence": float(np.exp(mean)),
        "answer": answer.text,
        "ended": answer.ended,
    }


def _softmax_at(scores: NDArray[np.float64], picked: int) -> float:
    return float(1.0 / np.exp(scores - scores[picked]).sum())


def _within(sequences: Sequence[Ids]) -> list[int]:
    """For each sequence the one to run for it: itself, or a longer one that begins with it."""
    # In the order of their ids what begins with a sequence follows it at once, and big-endian bytes sort as ids do.
    keys = [one.astype(">i4").tobytes() for one in sequences]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    found = [0] * len(keys)
    kept = order[-1]
    for number in reversed(order):
        if not keys[kept].startswith(keys[number]):
            kept = number
        found[number] = kept
    return found
