import re
from collections import Counter, defaultdict

from bathyscope.datasets import Statement, capitals

SENTENCE = re.compile(r"^The capital of (.+) is (.+)\.$")


def by_group(statements: list[Statement]) -> dict[str, list[tuple[str, str, bool]]]:
    groups: dict[str, list[tuple[str, str, bool]]] = defaultdict(list)
    for text, label, group in statements:
        match = SENTENCE.match(text)
        assert match is not None, text
        groups[group].append((match[1], match[2], label))
    return groups


def test_counts() -> None:
    statements = capitals()
    assert len(statements) == 296
    assert sum(statement.label for statement in statements) == 148
    assert Counter(len(rows) for rows in by_group(statements).values()) == {4: 74}
    assert len({statement.text for statement in statements}) == 296


def test_each_country_and_capital_is_once_true_and_once_false_within_its_pair() -> None:
    groups = by_group(capitals())
    seen: list[str] = []
    for rows in groups.values():
        countries: dict[str, list[bool]] = defaultdict(list)
        cities: dict[str, list[bool]] = defaultdict(list)
        for country, capital, label in rows:
            countries[country].append(label)
            cities[capital].append(label)
        assert len(countries) == len(cities) == 2
        assert all(sorted(labels) == [False, True] for labels in (*countries.values(), *cities.values()))
        seen += countries
    assert len(seen) == len(set(seen)) == 148


def test_truths_are_true() -> None:
    texts = {statement.text: statement.label for statement in capitals()}
    assert texts["The capital of France is Paris."] is True
    assert texts["The capital of Japan is Tokyo."] is True
    assert [text for text, label in texts.items() if "France" in text and not label] != []


def test_seeds() -> None:
    assert capitals(3) == capitals(3)
    assert capitals(3) != capitals(4)
