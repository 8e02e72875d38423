"""Texts for measuring: sentences of common words, the same on every machine, no text twice.

Each call with another `variant` gives other words with the same lengths, so that no cache of a later round can answer
from an earlier one. A text's length is counted with the model's own tokenizer.
"""

from __future__ import annotations

import random
from collections.abc import Callable

WORDS: list[str] = """
about above across after again against almost along already always among animal answer appear around arrive autumn
because become before begin behind believe below between beyond boat body both bottom bread break bridge bring brother
build carry catch cause centre century change child choose circle city clear climb close cloud coast cold colour come
common cost could country course cover cross current dark daughter decide deep depth describe different distance door
down draw drink during early earth east enough evening every face fall family farm father field fight find fire fish
floor flow flower follow food foot force forest form four friend from garden give glass gold good grass great green
ground group grow half hand happen harbour hard have hear heart heat heavy help high hill history hold home horse hour
house human hundred idea inside iron island join journey keep kind king know lake land language large last late laugh
lead learn leave letter level light line listen little live long look lost love make many mark market mean measure
meet middle might mile mind minute moment money moon morning mother mountain mouth move much music name near need
never new night north nothing number ocean often open order other over page paper part pass past path people perhaps
place plain plan plant point power press price question quick quiet rain reach read reason remember rest rich ride
right rise river road rock room root round run sail salt same sand save school sea season second seem send serve seven
shadow shape ship shore short show side silver simple since sister sleep slow small snow some song soon sound south
speak spring stand star start state station stone story strange stream street strong study summer sun surface table
tell thing think third thousand through time today together town trade travel tree true turn under until valley
village voice wait walk wall want warm watch water wave weather west what wheel while white whole wide wild wind
window winter wire wood word work world write year young
""".split()  # noqa: SIM905  a list would take a line a word
"""Of which all texts are made."""

LENGTHS = (5, 170)
"""Tokens of the shortest and the longest text of the mixed corpus."""


def mixed(count: int, parts: int, count_tokens: Callable[[str], int], variant: int) -> list[list[str]]:
    """`count` texts of 5 to 170 tokens in `parts` of the same mixture of lengths, each in an order of its own.

    A batch of eight in the given order therefore holds short and long texts, as texts in the wild do.
    """
    rng = random.Random(7919 * variant + 1)
    each = count // parts
    shortest, longest = LENGTHS
    found: list[list[str]] = []
    for _ in range(parts):
        lengths = [shortest + round(place * (longest - shortest) / max(1, each - 1)) for place in range(each)]
        rng.shuffle(lengths)
        found.append([_text(rng, length, count_tokens) for length in lengths])
    return found


def short(count: int, variant: int) -> list[str]:
    """`count` texts of one sentence, 6 to 14 words."""
    rng = random.Random(104729 * variant + 2)
    return [_sentence(rng, rng.randint(6, 14)) + f" It was number {number}." for number in range(count)]


def _text(rng: random.Random, length: int, count_tokens: Callable[[str], int]) -> str:
    """Sentences up to `length` tokens; a word may take two, so now and then one token less."""
    words: list[str] = []
    while len(words) < length:
        words += _sentence(rng, rng.randint(6, 16)).split(" ")
    words = words[:length]
    while count_tokens(" ".join(words)) > length:
        words.pop()
    return " ".join(words)


def _sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words)).capitalize() + "."
