"""What the front end can tell about an extraction before it is queued: is it offered, valid, not too large."""

from __future__ import annotations

from typing import Any

from bathyscope.errors import FieldError, InvalidInput, InvalidRequest, ModelUnknown, TooLarge
from bathyscope.types import (
    ExtractionOptions,
    ExtractionRequest,
    Input,
    MessagesInput,
    PromptInput,
    Quantization,
    TokenIdsInput,
)
from bathyscope_backplane.registry import ModelEntry
from bathyscope_backplane.settings import Limits
from bathyscope_service.context import Context

_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_SPECIAL_TOKENS = 4
"""Allowance for what a tokenizer adds to a text, in tokens."""


async def model_entry(context: Context, name: str, quantization: Quantization) -> ModelEntry:
    """The model asked for. Raises `ModelUnknown` and `InvalidRequest` with their pointers."""
    try:
        entry = await context.plane.workers.entry(context.plane.registry, name)
    except ModelUnknown as error:
        error.errors = [FieldError(pointer="/model", detail="name a model of GET /v1/models")]
        raise
    if quantization not in entry.quantizations:
        raise InvalidRequest(
            f"The model {name!r} is not offered in quantization {quantization!r}.",
            errors=[FieldError(pointer="/quantization", detail=f"one of {', '.join(entry.quantizations)}")],
        )
    return entry


def lane_of(entry: ModelEntry, options: ExtractionOptions) -> str:
    """The queue of a model as the request wants it."""
    dtype = options.compute_dtype if options.compute_dtype != "auto" else entry.compute_dtype
    return f"model:{entry.name}:{options.quantization}:{dtype}"


def wire_rows(inputs: list[Input]) -> list[Any]:
    """The inputs as JSON values, one each."""
    return [item if isinstance(item, str) else item.model_dump() for item in inputs]


def check(entry: ModelEntry, options: ExtractionOptions, inputs: list[Input], limits: Limits, variants: int = 1) -> int:
    """Refuse what cannot be done, or would be too large, before anything is queued; the result's estimated bytes.

    The estimate is 0 while nothing is known of the model.

    Raises `InvalidRequest` and `InvalidInput` (422) with pointers, `TooLarge` (413) with estimate and limit.
    """
    refuse_rows(len(inputs), limits.max_rows)
    asks = options if isinstance(options, ExtractionRequest) and options.score_choices else None
    if asks is not None:
        _check_questions(inputs)
    _check_inputs(inputs, entry, options)
    tokens = _tokens(entry, options, inputs)
    read = tokens + (_question_tokens(entry, asks, inputs) if asks is not None else 0)
    if read > limits.max_tokens:
        raise TooLarge(
            f"The inputs are estimated at {read:,} tokens and the limit is {limits.max_tokens:,}: split them over "
            "several requests, or set max_length with a truncation.",
            estimate=read,
            limit=limits.max_tokens,
        )
    if entry.facts is None:
        return 0  # the worker checks again once it knows the model
    layers = len(resolve_layers(options.layers, entry.facts.num_layers))
    vectors = variants * _vectors(options, inputs, tokens)
    estimate = layers * entry.facts.hidden_size * _ITEM_BYTES[options.dtype] * vectors
    if estimate > limits.max_result_bytes:
        raise TooLarge(
            f"The result is estimated at {estimate:,} bytes and the limit is {limits.max_result_bytes:,}: ask for "
            "fewer layers, inputs or variants, a pooling other than none, or dtype float16.",
            estimate=estimate,
            limit=limits.max_result_bytes,
        )
    return estimate


def refuse_rows(rows: int, limit: int) -> None:
    """Raise `TooLarge` for more inputs than one request may have."""
    if rows > limit:
        raise TooLarge(
            f"{rows:,} inputs are over the limit of {limit:,}; split them over several requests.",
            estimate=rows,
            limit=limit,
        )


def _check_questions(inputs: list[Input]) -> None:
    """Raise `InvalidInput` where there is nothing to score."""
    detail = 'score_choices needs {"prompt": …, "choices": […], "answer": 0} or {"prompt": …, "answer": "…"}'
    found = [
        FieldError(pointer=f"/inputs/{number}", detail=detail)
        for number, item in enumerate(inputs)
        if not isinstance(item, PromptInput)
    ]
    if found:
        raise InvalidInput("An input asks no question.", errors=found[:50])


def _longest(entry: ModelEntry, options: ExtractionOptions) -> int | None:
    """Most tokens of one input, null while unknown."""
    own = entry.facts.max_length if entry.facts is not None else None
    return min(filter(None, (options.max_length, entry.max_length, own)), default=None)


def _check_inputs(inputs: list[Input], entry: ModelEntry, options: ExtractionOptions) -> None:
    found: list[FieldError] = []
    facts, longest = entry.facts, _longest(entry, options)
    for number, item in enumerate(inputs):
        if not isinstance(item, TokenIdsInput):
            continue
        if not item.token_ids:
            found.append(FieldError(pointer=f"/inputs/{number}", detail="it holds no token"))
        elif facts is not None and facts.vocab_size is not None and max(item.token_ids) >= facts.vocab_size:
            found.append(
                FieldError(
                    pointer=f"/inputs/{number}/token_ids", detail=f"the model's token ids end at {facts.vocab_size - 1}"
                )
            )
        elif options.truncation == "error" and longest is not None and len(item.token_ids) > longest:
            detail = f"has {len(item.token_ids)} tokens, the limit is {longest}: shorten it, or set truncation"
            found.append(FieldError(pointer=f"/inputs/{number}", detail=detail))
        if len(found) == 50:
            break
    if found:
        raise InvalidInput("An input is not one that the model can read.", errors=found)


def resolve_layers(layers: list[int] | str, num_layers: int) -> list[int]:
    """The layer numbers that a request's `layers` stand for. Raises `InvalidRequest` for those that do not fit."""
    if layers == "all":
        return list(range(num_layers + 1))
    if isinstance(layers, str):
        step = int(layers.partition(":")[2])
        return sorted({*range(0, num_layers + 1, step), num_layers})
    resolved: dict[int, None] = {}
    found: list[FieldError] = []
    for number, layer in enumerate(layers):
        index = layer + num_layers + 1 if layer < 0 else layer
        if not 0 <= index <= num_layers:
            detail = f"this model's layers are 0 to {num_layers}, or -{num_layers + 1} to -1"
            found.append(FieldError(pointer=f"/layers/{number}", detail=detail))
        elif index in resolved:
            found.append(FieldError(pointer=f"/layers/{number}", detail=f"layer {index} is named twice"))
        resolved[index] = None
    if found:
        raise InvalidRequest("The layers do not fit the model.", errors=found[:50])
    return list(resolved)


def _vectors(options: ExtractionOptions, inputs: list[Input], tokens: int) -> int:
    """Vectors of one layer: one an input, or with pooling none an upper bound of the tokens."""
    if options.pooling != "none":
        return len(inputs)
    if options.positions is not None and options.positions.tokens is not None:
        return len(inputs) * len(options.positions.tokens)
    return tokens


def _tokens(entry: ModelEntry, options: ExtractionOptions, inputs: list[Input]) -> int:
    """An upper bound of the tokens of all inputs: their bytes, or the longest text for each, whichever is less."""
    bound = _longest(entry, options)
    total = 0
    for item in inputs:
        tokens = token_bound(item)
        total += tokens if bound is None else min(tokens, bound)
    return total


def _question_tokens(entry: ModelEntry, options: ExtractionRequest, inputs: list[Input]) -> int:
    """An upper bound of the tokens that are read beyond the prompts: each choice behind its prompt, or the answer."""
    bound = _longest(entry, options)
    total = 0
    for item in inputs:
        if not isinstance(item, PromptInput):
            continue
        prompt = token_bound(item)
        for choice in item.choices or ():
            tokens = prompt + len(choice.encode())
            total += tokens if bound is None else min(tokens, bound)
        total += 0 if item.choices else options.max_new_tokens
    return total


def token_bound(item: Any) -> int:
    """At least as many tokens as the input can have: a token is at least one byte of UTF-8."""
    if isinstance(item, PromptInput):
        item = item.prompt
    if isinstance(item, TokenIdsInput):
        return len(item.token_ids)
    if isinstance(item, MessagesInput):
        return sum(len(turn.content.encode()) + len(turn.role) + 16 for turn in item.messages) + 64
    return len(item.encode()) + _SPECIAL_TOKENS if isinstance(item, str) else _SPECIAL_TOKENS
