"""What the front end can tell about an extraction before it is queued: is it offered, valid, not too large."""

from __future__ import annotations

from typing import Any

from bathyscope.errors import FieldError, InvalidInput, InvalidRequest, ModelUnknown, NotBuilt, TooLarge
from bathyscope.types import (
    ExtractionOptions,
    ExtractionRequest,
    Input,
    MessagesInput,
    PromptInput,
    Quantization,
    TokenIdsInput,
)
from bathyscope_backplane.registry import ModelEntry, ModelFacts
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


def refuse_unbuilt(body: ExtractionRequest) -> None:
    """Raise `NotBuilt` for the parts of the contract that this version does not offer."""
    later = {
        "adapter": body.adapter is not None,
        "dataset": body.dataset is not None,
        "score_choices": body.score_choices,
        "inputs with a prompt": any(isinstance(item, PromptInput) for item in body.inputs or []),
    }
    for name, asked in later.items():
        if asked:
            raise NotBuilt(f"{name[0].upper()}{name[1:]} is part of the contract and not offered by this version.")


def check(entry: ModelEntry, options: ExtractionOptions, inputs: list[Input], limits: Limits) -> None:
    """Refuse what cannot be done, or would be too large, before anything is queued.

    Raises `InvalidRequest` and `InvalidInput` (422) with pointers, `TooLarge` (413) with estimate and limit.
    """
    if len(inputs) > limits.max_rows:
        raise TooLarge(
            f"{len(inputs):,} inputs are over the limit of {limits.max_rows:,}; split them over several requests.",
            estimate=len(inputs),
            limit=limits.max_rows,
        )
    _check_inputs(inputs, entry.facts)
    if entry.facts is None:
        return  # the worker checks again once it knows the model
    layers = _count_layers(options, entry.facts.num_layers)
    estimate = layers * entry.facts.hidden_size * _ITEM_BYTES[options.dtype] * _vectors(entry.facts, options, inputs)
    if estimate > limits.max_result_bytes:
        raise TooLarge(
            f"The result is estimated at {estimate:,} bytes and the limit is {limits.max_result_bytes:,}: ask for "
            "fewer layers or inputs, a pooling other than none, or dtype float16.",
            estimate=estimate,
            limit=limits.max_result_bytes,
        )


def _check_inputs(inputs: list[Input], facts: ModelFacts | None) -> None:
    found: list[FieldError] = []
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
        if len(found) == 50:
            break
    if found:
        raise InvalidInput("An input gives the model nothing it can read.", errors=found)


def _count_layers(options: ExtractionOptions, num_layers: int) -> int:
    if options.layers == "all":
        return num_layers + 1
    if isinstance(options.layers, str):
        step = int(options.layers.partition(":")[2])
        return len({*range(0, num_layers + 1, step), num_layers})
    resolved: set[int] = set()
    found: list[FieldError] = []
    for number, layer in enumerate(options.layers):
        index = layer + num_layers + 1 if layer < 0 else layer
        if not 0 <= index <= num_layers:
            detail = f"this model's layers are 0 to {num_layers}, or -{num_layers + 1} to -1"
            found.append(FieldError(pointer=f"/layers/{number}", detail=detail))
        elif index in resolved:
            found.append(FieldError(pointer=f"/layers/{number}", detail=f"layer {index} is named twice"))
        resolved.add(index)
    if found:
        raise InvalidRequest("The layers do not fit the model.", errors=found[:50])
    return len(resolved)


def _vectors(facts: ModelFacts, options: ExtractionOptions, inputs: list[Input]) -> int:
    """Vectors of one layer: one an input, or with pooling none an upper bound of the tokens."""
    if options.pooling != "none":
        return len(inputs)
    if options.positions is not None and options.positions.tokens is not None:
        return len(inputs) * len(options.positions.tokens)
    bound = min(filter(None, (options.max_length, facts.max_length)), default=None)
    total = 0
    for item in inputs:
        tokens = _token_bound(item)
        total += tokens if bound is None else min(tokens, bound)
    return total


def _token_bound(item: Any) -> int:
    """At least as many tokens as the input can have: a token is at least one byte of UTF-8."""
    if isinstance(item, TokenIdsInput):
        return len(item.token_ids)
    if isinstance(item, MessagesInput):
        return sum(len(turn.content.encode()) + len(turn.role) + 16 for turn in item.messages) + 64
    return len(item.encode()) + _SPECIAL_TOKENS if isinstance(item, str) else _SPECIAL_TOKENS
