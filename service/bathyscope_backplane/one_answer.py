"""What front end and workers say of questions that a model has all right or all wrong."""

from __future__ import annotations

from bathyscope.errors import FieldError, InvalidRequest


def refuse_one_answer(correct: int, answered: int) -> None:
    """Raise `InvalidRequest` where the model is right on every question, or wrong on every one."""
    if 0 < correct < answered:
        return
    which, remedy = ("right", "harder") if correct else ("wrong", "easier")
    detail = f"the model is {which} on all {answered} inputs, so there is nothing to learn; ask {remedy} questions"
    raise InvalidRequest("Labels are all the same.", errors=[FieldError(pointer="/labels", detail=detail)])
