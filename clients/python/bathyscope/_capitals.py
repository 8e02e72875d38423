"""Statements whose truth a language model knows and their wording does not give away.

The 150 most populous countries that have a capital are shuffled within their continent and paired. Each pair makes
four statements, "The capital of X is Y." with the right capitals and with the two swapped. So every country and
every capital occurs once in a true and once in a false statement of its own pair, and nothing but knowing which
belongs to which tells them apart. Rows of a pair share countries and capitals and belong on one side of a split:
`group` is the pair. Wrong capitals drawn at random would leak, since a capital's other occurrences, with other
labels, would sit on the other side.
"""

from __future__ import annotations

import csv
import random
from importlib.resources import files
from typing import NamedTuple


class Statement(NamedTuple):
    """One sentence about a country's capital."""

    text: str
    """`The capital of France is Paris.`"""

    label: bool
    """Whether it is true."""

    group: str
    """The pair of countries it belongs to, as `France / Spain`."""


def capitals(seed: int = 0) -> list[Statement]:
    """Statements about capitals, four a pair in the order true, true, swapped, swapped; the same for the same seed.

    74 pairs, 296 statements: a continent with an odd number leaves one country out. No network: the names are those of
    GeoNames (geonames.org, CC BY 4.0), which ship in `data/capitals.csv`.
    """
    continents: dict[str, list[tuple[str, str]]] = {}
    table = files("bathyscope").joinpath("data", "capitals.csv").read_text(encoding="utf-8")
    for row in csv.DictReader(table.splitlines()):
        continents.setdefault(row["continent"], []).append((row["country"], row["capital"]))
    shuffler = random.Random(seed)
    statements = []
    for _, countries in sorted(continents.items()):
        shuffler.shuffle(countries)
        for (country_a, capital_a), (country_b, capital_b) in zip(countries[::2], countries[1::2], strict=False):
            group = f"{country_a} / {country_b}"
            statements += [
                Statement(f"The capital of {country} is {capital}.", label, group)
                for country, capital, label in (
                    (country_a, capital_a, True),
                    (country_b, capital_b, True),
                    (country_a, capital_b, False),
                    (country_b, capital_a, False),
                )
            ]
    return statements
