"""`rank_pattern` and `alpha_pattern` of a stranger's config, without running a stranger's regular expressions.

PEFT matches every key as `(.*\\.)?(KEY)$` against a module's path; a key can be any regular expression, also one that
never ends. What people write is module paths with a few wildcards: literals, `\\.`, `.`, `.*`, `.+`, `\\d`, `\\d+`,
`[0-9]+`. These are read into tokens and matched in time proportional to key times path; other keys are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

_TOKEN = re.compile(
    r"(?P<any>\.(?P<any_many>[*+])?)|(?P<digit>(?:\\d|\[0-9\])(?P<digit_many>[*+])?)|\\(?P<escaped>[.\-_])"
    r"|(?P<literal>[A-Za-z0-9_\-])"
)


class PatternFault(ValueError):
    """A key that is not evaluated here; the message is the key."""


@dataclass(frozen=True, slots=True)
class _Token:
    kind: Literal["any", "digit", "literal"]
    text: str
    least: int
    """Zero for `*`, else one."""
    many: bool

    def takes(self, character: str) -> bool:
        if self.kind == "any":
            return True
        if self.kind == "digit":
            return character.isascii() and character.isdigit()
        return character == self.text


class Pattern:
    """One key."""

    MAX_REPEATS = 8
    """`*` and `+` in it: time goes with their number."""

    def __init__(self, key: str) -> None:
        self._anchored = key.startswith("^")
        body = key.removeprefix("^").removesuffix("$")
        self._tokens: list[_Token] = []
        position = 0
        while position < len(body):
            found = _TOKEN.match(body, position)
            if found is None:
                raise PatternFault(key)
            position = found.end()
            repeat = found["any_many"] or found["digit_many"]
            least, many = (0 if repeat == "*" else 1), repeat is not None
            if found["any"]:
                self._tokens.append(_Token("any", "", least, many))
            elif found["digit"]:
                self._tokens.append(_Token("digit", "", least, many))
            else:
                self._tokens.append(_Token("literal", found["escaped"] or found["literal"], 1, False))
        if not self._tokens:
            raise PatternFault(key)
        repeats = sum(token.many for token in self._tokens)
        if repeats > self.MAX_REPEATS:
            raise PatternFault(key)
        self.has_wildcard = repeats > 0
        self.length = len(self._tokens)
        # Sets of states as the bits of a number. State i: the first i tokens are done, so a token that repeats takes
        # on in the state behind it.
        self._many = sum(1 << index + 1 for index, token in enumerate(self._tokens) if token.many)
        self._optional = sum(1 << index for index, token in enumerate(self._tokens) if token.least == 0)
        self._takers: dict[str, int] = {}

    def matches(self, path: str) -> bool:
        """Whether the key names this module, or the end of its path after a dot."""
        if not self.has_wildcard:
            start = len(path) - len(self._tokens)
            if start < 0 or (start and (self._anchored or path[start - 1] != ".")):
                return False
            return all(token.takes(character) for token, character in zip(self._tokens, path[start:], strict=True))
        states = self._closure(1)
        for index, character in enumerate(path):
            if index and path[index - 1] == "." and not self._anchored:
                states = self._closure(states | 1)
            takers = self._takers_of(character)
            states = self._closure((states & takers) << 1 | (states & self._many & takers << 1))
            if not states and self._anchored:
                return False
        return bool(states >> self.length & 1)

    def _takers_of(self, character: str) -> int:
        """States whose next token takes the character."""
        found = self._takers.get(character)
        if found is None:
            found = sum(1 << index for index, token in enumerate(self._tokens) if token.takes(character))
            self._takers[character] = found
        return found

    def _closure(self, states: int) -> int:
        while more := (states & self._optional) << 1 & ~states:
            states |= more
        return states


class Patterns:
    """The keys of one field, in their order: the first that matches counts, as in PEFT."""

    MAX_WILDCARDS = 64
    """Keys with `*` or `+` cost most."""
    MAX_TOKENS = 65_536
    """Of all keys together: what a module's path is held against. One key for each of a thousand modules fits."""

    def __init__(self, values: Mapping[str, float]) -> None:
        self._values = [(Pattern(key), value) for key, value in values.items()]
        wild = [key for key, (pattern, _) in zip(values, self._values, strict=True) if pattern.has_wildcard]
        if len(wild) > self.MAX_WILDCARDS:
            raise PatternFault(wild[self.MAX_WILDCARDS])
        tokens = 0
        for key, (pattern, _) in zip(values, self._values, strict=True):
            tokens += pattern.length
            if tokens > self.MAX_TOKENS:
                raise PatternFault(key)

    def get(self, paths: Iterable[str], default: float) -> float:
        """The value for a module that is known by these paths."""
        known = list(paths)
        for pattern, value in self._values:
            if any(pattern.matches(path) for path in known):
                return value
        return default
