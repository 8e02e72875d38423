"""Which part of an input's text each token is, for answers that go token by token.

One JSON line an input: `rendered` (the text, of an input that went through the chat template, else null) and `tokens`,
each `[text, start, end, special]`. Characters are counted in Unicode code points, in the input or the rendered text. A
token that the tokenizer added is called by its name and lies nowhere; of inputs that came as token ids all lie nowhere.
Where several tokens make up one character, each has that character.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from bathyscope_workers.extraction.tokens import Ids, InputReader, Prepared

FILE_NAME = "token_texts.jsonl"

Place = tuple[str | None, int | None, int | None, bool | None]
"""Text, first character, character after the last, whether it is a special token."""


class TokenTexts:
    """Writes the file in `folder`, some inputs at a time."""

    def __init__(self, reader: InputReader, folder: Path) -> None:
        self._reader = reader
        self._tokenizer: Any = reader.tokenizer
        self._special = _special_ids(self._tokenizer) if self._tokenizer is not None else frozenset()
        self._names: dict[int, str] = {}
        self._path = folder / FILE_NAME

    def read(self, prepared: Sequence[Prepared], rows: Sequence[Ids]) -> None:
        """Note the tokens of the next inputs, of which `rows` are the ids."""
        with self._path.open("ab") as file:
            for one, ids in zip(prepared, rows, strict=True):
                rendered = None if one.special else one.text
                places = self._places(one, ids) if len(ids) else []
                file.write(orjson.dumps({"rendered": rendered, "tokens": places}) + b"\n")

    def _places(self, one: Prepared, ids: Ids) -> list[Place]:
        if self._tokenizer is None:
            return [(None, None, None, None)] * len(ids)
        text = one.text
        spans = None if text is None else self._reader.encoder.spans(text, special=one.special)
        if spans is None or text is None:
            return [(self._name(number), None, None, number in self._special) for number in ids.tolist()]
        spans = spans[self._reader.kept(len(spans), special=one.special)]
        return [
            (text[start:end], start, end, number in self._special)
            if start >= 0
            else (self._name(number), None, None, True)
            for (start, end), number in zip(spans.tolist(), ids.tolist(), strict=True)
        ]

    def _name(self, number: int) -> str:
        if number not in self._names:
            self._names[number] = self._tokenizer.decode([number])
        return self._names[number]


def _special_ids(tokenizer: Any) -> frozenset[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {number for number, token in added.items() if token.special}


def read_token_texts(folder: Path) -> list[dict[str, Any]]:
    """What was written there, one object an input."""
    return [orjson.loads(line) for line in (folder / FILE_NAME).read_bytes().splitlines()]
