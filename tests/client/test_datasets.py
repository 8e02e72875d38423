from __future__ import annotations

import re

import pytest

import bathyscope
from bathyscope.datasets import arithmetic
from bathyscope.errors import InvalidRequest


@pytest.mark.parametrize(("difficulty", "shots"), [(1, 2), (2, 0), (3, 1), (5, 2), (8, 16)])
def test_the_right_choice_is_right_and_the_others_are_not(difficulty: int, shots: int) -> None:
    questions = arithmetic(40, difficulty, shots=shots)
    assert len({question["prompt"].splitlines()[-1] for question in questions}) == 40
    for question in questions:
        *examples, problem = question["prompt"].splitlines()
        assert len(examples) <= shots
        for example in examples:
            left, _, right = example.partition(" = ")
            assert eval(left) == int(right)
        assert re.fullmatch(rf"\d{{1,{difficulty}}}( [+-] \d{{1,{difficulty}}})+ =", problem)
        assert problem.removesuffix(" =") not in " ".join(examples)
        value = eval(problem.removesuffix(" ="))
        assert [int(choice) == value for choice in question["choices"]].index(True) == question["answer"]
        assert len(set(question["choices"])) == 4
        assert all(re.fullmatch(r" \d+", choice) for choice in question["choices"])


def test_the_length_of_a_choice_tells_nothing() -> None:
    questions = arithmetic(200, 3)
    alike = sum(len({len(choice) for choice in question["choices"]}) == 1 for question in questions)
    assert alike > 190
    places = [question["answer"] for question in questions]
    assert min(map(places.count, range(4))) > 25


def test_seeds_and_wire() -> None:
    assert arithmetic(20, 2, 5) == arithmetic(20, 2, 5)
    assert arithmetic(20, 2, 5) != arithmetic(20, 2, 6)
    for question in arithmetic(5):
        bathyscope.types.PromptInput.model_validate(question)


@pytest.mark.parametrize("arguments", [(0, 1), (1, 0), (1, 9), (500, 1)])
def test_what_cannot_be_made(arguments: tuple[int, int]) -> None:
    with pytest.raises(InvalidRequest):
        arithmetic(*arguments)
