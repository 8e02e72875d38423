"""What to extract: the fields of `POST /v1/extractions` that the engine reads. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from bathyscope import errors

Pooling = Literal["last", "mean", "max", "first", "none"]
Truncation = Literal["error", "left", "right"]
Template = Literal["none", "chat"]
OutputDtype = Literal["float32", "float16", "bfloat16"]
Match = Literal["exact", "normalised"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "pooling": ("last", "mean", "max", "first", "none"),
    "truncation": ("error", "left", "right"),
    "template": ("none", "chat"),
    "dtype": ("float32", "float16", "bfloat16"),
    "match": ("exact", "normalised"),
}


@dataclass(frozen=True, slots=True)
class Positions:
    """Which tokens of each input count: one of `span` and `tokens`; negative numbers count from the end."""

    span: tuple[int, int | None] | None = None
    """[a, b): what is pooled is restricted to it. A missing b is the end."""
    tokens: tuple[int, ...] | None = None
    """Just these tokens, in this order; with pooling `none` only."""

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any] | None) -> Positions | None:
        """Read `{"span": [a, b]}` or `{"tokens": [...]}`; raises errors.InvalidRequest."""
        if not wire:
            return None
        span, tokens = wire.get("span"), wire.get("tokens")
        if (span is None) == (tokens is None):
            raise _invalid("/positions", "give either span or tokens")
        if span is not None:
            if len(span) != 2 or not _is_int(span[0]) or not (span[1] is None or _is_int(span[1])):
                raise _invalid("/positions/span", "a span is [first, end), two whole numbers")
            return cls(span=(span[0], span[1]))
        assert tokens is not None
        if not tokens or not all(_is_int(token) for token in tokens):
            raise _invalid("/positions/tokens", "at least one whole number, negative ones count from the end")
        return cls(tokens=tuple(tokens))

    def to_wire(self) -> dict[str, Any]:
        """As in the request."""
        return {"span": list(self.span)} if self.span is not None else {"tokens": list(self.tokens or ())}


@dataclass(frozen=True, slots=True)
class ExtractionSpec:
    """An extraction's request, checked as far as it can be without the model."""

    layers: tuple[int, ...] | str
    """As asked for: layer numbers (negative from the end), `all`, or `every:N`."""
    pooling: Pooling = "last"
    positions: Positions | None = None
    template: Template = "none"
    """`chat` turns each string into one user message; messages always go through the chat template."""
    add_generation_prompt: bool = True
    max_length: int | None = None
    truncation: Truncation = "error"
    dtype: OutputDtype = "float32"
    """Of the output."""
    batch_invariant: bool = True
    """False lets texts of an 8bit model share batches although their states then depend on each other."""
    per_token: bool = False
    """Note which part of its text each token is (`token_texts`)."""
    score_choices: bool = False
    """Score the choices of inputs that have some, and have the model answer those that have none."""
    max_new_tokens: int = 32
    """Bound of such an answer."""
    match: Match = "normalised"
    """How it is compared with the right one."""
    stop: tuple[str, ...] = ()
    """Texts that end it; it is cut before them."""

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> ExtractionSpec:
        """Read a request body (fields it does not know are others'); raises errors.InvalidRequest."""
        for name, choices in _CHOICES.items():
            if name in wire and wire[name] not in choices:
                raise _invalid(f"/{name}", f"one of {', '.join(choices)}, not {wire[name]!r}")
        layers = wire.get("layers", "all")
        if isinstance(layers, str):
            if layers != "all" and not _every(layers):
                raise _invalid("/layers", f'a list of layer numbers, "all" or "every:N" with N from 1, not {layers!r}')
        elif not layers or not all(_is_int(layer) for layer in layers):
            raise _invalid("/layers", 'at least one whole number, or "all" or "every:N"')
        else:
            layers = tuple(layers)
        max_length = wire.get("max_length")
        if max_length is not None and (not _is_int(max_length) or max_length < 1):
            raise _invalid("/max_length", "a whole number of tokens, at least 1")
        new_tokens = wire.get("max_new_tokens")
        if new_tokens is not None and (not _is_int(new_tokens) or new_tokens < 1):
            raise _invalid("/max_new_tokens", "a whole number of tokens, at least 1")
        stop = wire.get("stop") or ()
        if isinstance(stop, str) or not all(isinstance(one, str) and one for one in stop):
            raise _invalid("/stop", "a list of texts, none of them empty")
        positions = Positions.from_wire(wire.get("positions"))
        pooling = wire.get("pooling") or "last"
        if positions is not None and positions.tokens is not None and pooling != "none":
            raise _invalid("/positions/tokens", "goes with pooling none only: each named token is kept")

        def given(name: str, default: Any) -> Any:
            return default if wire.get(name) is None else wire[name]

        return cls(
            layers=layers,
            pooling=cast(Pooling, pooling),
            positions=positions,
            template=given("template", "none"),
            add_generation_prompt=bool(given("add_generation_prompt", True)),
            max_length=max_length,
            truncation=given("truncation", "error"),
            dtype=given("dtype", "float32"),
            batch_invariant=bool(given("batch_invariant", True)),
            per_token=bool(given("per_token", False)),
            score_choices=bool(given("score_choices", False)),
            max_new_tokens=given("max_new_tokens", 32),
            match=given("match", "normalised"),
            stop=tuple(stop),
        )

    def resolve_layers(self, num_layers: int) -> list[int]:
        """Numbers from 0 to `num_layers` in the order asked for.

        0 is the embeddings, `num_layers` (the number of blocks) the state after the final norm. `every:N` is
        0, N, 2N, … and the last. Raises errors.InvalidRequest with the pointer of a layer that does not exist
        or is named twice.
        """
        if isinstance(self.layers, str):
            step = _every(self.layers) or 1
            found = list(range(0, num_layers + 1, step))
            return found if found[-1] == num_layers else [*found, num_layers]
        resolved: list[int] = []
        for index, asked in enumerate(self.layers):
            layer = asked + num_layers + 1 if asked < 0 else asked
            pointer = f"/layers/{index}"
            if not 0 <= layer <= num_layers:
                raise _invalid(
                    pointer, f"this model's layers are 0 to {num_layers} (or -{num_layers + 1} to -1), not {asked}"
                )
            if layer in resolved:
                raise _invalid(pointer, f"layer {layer} is named twice")
            resolved.append(layer)
        return resolved


def _every(layers: str) -> int | None:
    head, _, step = layers.partition(":")
    return int(step) if head == "every" and step.isascii() and step.isdigit() and int(step) > 0 else None


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _invalid(pointer: str, detail: str) -> errors.InvalidRequest:
    return errors.InvalidRequest("the extraction is not valid", errors=[{"pointer": pointer, "detail": detail}])
