"""Inputs: texts in the forms in which they come, and questions."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator

from bathyscope.types._base import RequestModel


class Message(RequestModel):
    """One turn of a chat."""

    role: str = Field(min_length=1, max_length=64)
    """`system`, `user`, `assistant` or whatever the model's template knows."""

    content: str
    """What was said."""


class MessagesInput(RequestModel):
    """A chat, rendered with the model's own template."""

    messages: list[Message] = Field(min_length=1, max_length=1024)
    """The turns, oldest first."""


class TokenIdsInput(RequestModel):
    """A text that is tokenised already; nothing is added to it."""

    token_ids: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field(fail_fast=True)
    """Ids of the model's own vocabulary."""


class PromptInput(RequestModel):
    """A question with its answer, for labels that say whether the model is right. Hidden states are the prompt's."""

    prompt: str
    """What comes before the choice or the answer."""

    choices: list[Annotated[str, Field(min_length=1)]] | None = Field(default=None, min_length=2, max_length=64)
    """The possible continuations, each as it follows the prompt (with its space); without them the model's own greedy
    answer is matched."""

    answer: int | Annotated[str, Field(min_length=1, max_length=4096)]
    """The right choice's index, from 0, or, without choices, the right answer's text."""

    @field_validator("choices", mode="after")
    @classmethod
    def _no_choice_twice(cls, choices: list[str] | None) -> list[str] | None:
        if choices is not None and len(set(choices)) != len(choices):
            twice = next(number for number, one in enumerate(choices) if one in choices[:number])
            raise ValueError(f"choice {twice} is the same as choice {choices.index(choices[twice])}")
        return choices

    @field_validator("answer", mode="after")
    @classmethod
    def _answer_fits(cls, answer: int | str, info: ValidationInfo) -> int | str:
        if "choices" not in info.data:  # they are faulty themselves
            return answer
        choices = info.data["choices"]
        if choices is None:
            if isinstance(answer, int) or not answer.strip():
                raise ValueError("without choices it is the right answer in words")
        elif isinstance(answer, str) or not 0 <= answer < len(choices):
            raise ValueError(f"with {len(choices)} choices it is one of 0 to {len(choices) - 1}")
        return answer


def _input_tag(value: Any) -> str:
    if isinstance(value, str):
        return "input:text"
    members = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    for member, tag in (
        ("messages", "input:messages"),
        ("token_ids", "input:token_ids"),
        ("prompt", "input:prompt"),
    ):
        if member in members:
            return tag
    return "input:unknown"


Input = Annotated[
    Annotated[str, Tag("input:text")]
    | Annotated[MessagesInput, Tag("input:messages")]
    | Annotated[TokenIdsInput, Tag("input:token_ids")]
    | Annotated[PromptInput, Tag("input:prompt")],
    Discriminator(
        _input_tag,
        custom_error_type="input_kind",
        custom_error_message=(
            'an input is a string, {"messages": […]}, {"token_ids": […]} or {"prompt": …, "answer": …}'
        ),
    ),
]
"""One text, in any of the four forms."""
