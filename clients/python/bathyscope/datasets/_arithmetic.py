"""Sums and differences with choices, made here: no download, the same for the same seed."""

from __future__ import annotations

import random
from typing import TypedDict

from bathyscope.errors import InvalidRequest

CHOICES = 4


class Question(TypedDict):
    """An input of an extraction with `score_choices`."""

    prompt: str
    """The examples, if any, and the question."""

    choices: list[str]
    """Possible continuations, each with its leading space."""

    answer: int
    """Index of the right one."""


def arithmetic(count: int, difficulty: int = 2, seed: int = 0, *, shots: int = 2) -> list[Question]:
    """Sums and differences with four choices: `37 + 48 =` and ` 85`, ` 95`, ` 84`, ` 58`.

    `difficulty` (1 to 8) is the number of digits of the operands, and from 4 on there are three of them instead of two.
    Wrong choices are what one gets by a slip: a digit that is off by up to three, so a carry forgotten too, or two
    digits swapped; they have as many digits as the right one where there are enough such numbers, so that the length
    tells nothing.
    `shots` solved examples of the same kind come before each question, others each time.

    No question comes twice. Raises `InvalidRequest` where there are not so many.
    """
    if count < 1 or not 1 <= difficulty <= 8 or not 0 <= shots <= 16:
        raise InvalidRequest("give a count of 1 at least, a difficulty of 1 to 8 and 0 to 16 shots")
    chance = random.Random(f"{seed}/{difficulty}/{shots}")
    seen: set[str] = set()
    found: list[Question] = []
    misses = 0
    while len(found) < count:
        problem, value = _problem(chance, difficulty)
        if problem in seen:
            misses += 1
            if misses > 1000:
                raise InvalidRequest(
                    f"of difficulty {difficulty} there are about {len(found)} different questions, and {count} are "
                    "asked for; raise the difficulty"
                )
            continue
        misses = 0
        seen.add(problem)
        examples = [_problem(chance, difficulty) for _ in range(shots)]
        lines = [f"{example} = {result}" for example, result in examples if example != problem]
        choices = [value, *_slips(chance, value)]
        chance.shuffle(choices)
        found.append(
            {
                "prompt": "\n".join([*lines, f"{problem} ="]),
                "choices": [f" {choice}" for choice in choices],
                "answer": choices.index(value),
            }
        )
    return found


def _problem(chance: random.Random, difficulty: int) -> tuple[str, int]:
    """A sum or difference of numbers of so many digits, not below zero, and its value."""
    low, high = (0, 9) if difficulty == 1 else (10 ** (difficulty - 1), 10**difficulty - 1)
    text = str(value := chance.randint(low, high))
    for _ in range(2 if difficulty > 3 else 1):
        operand = chance.randint(low, high)
        if chance.random() < 0.5 and operand <= value:
            text, value = f"{text} - {operand}", value - operand
        else:
            text, value = f"{text} + {operand}", value + operand
    return text, value


def _slips(chance: random.Random, value: int) -> list[int]:
    """`CHOICES` - 1 different wrong numbers near `value`, of as many digits where there are enough."""
    digits = str(value)
    slips = {value + sign * step * 10**place for place in range(len(digits)) for step in (1, 2, 3) for sign in (1, -1)}
    slips |= {int(digits[:at] + digits[at + 1] + digits[at] + digits[at + 2 :]) for at in range(len(digits) - 1)}
    wrong = sorted(slip for slip in slips if slip >= 0 and slip != value)
    alike = [slip for slip in wrong if len(str(slip)) == len(digits)]
    if len(alike) >= CHOICES - 1:
        return chance.sample(alike, CHOICES - 1)
    others = [slip for slip in wrong if slip not in alike]
    return [*alike, *chance.sample(others, CHOICES - 1 - len(alike))]
