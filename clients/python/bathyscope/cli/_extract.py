"""`bathyscope extract`: texts in, hidden states out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from bathyscope import Extraction, types
from bathyscope.cli._options import ApiKey, AsJson, Url, client_of, print_json, size
from bathyscope.errors import InvalidInput

_FORMATS = (".safetensors", ".npy", ".arrow", ".json")


def extract(
    texts: Annotated[
        list[str] | None, typer.Argument(help="The texts; without any they come from --input.", show_default=False)
    ] = None,
    model: Annotated[str, typer.Option("--model", "-m", help="Name of the base model.")] = "smollm2",
    source: Annotated[
        str | None,
        typer.Option(
            "--input",
            "-i",
            help="A .txt file with a text a line, a .jsonl file with an input a line, or - for texts on stdin.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File to write: .safetensors, .npy, .arrow or .json.")
    ] = Path("hidden_states.safetensors"),
    layers: Annotated[str, typer.Option(help="`all`, `every:4`, or numbers as 8,16,-1.")] = "all",
    pooling: Annotated[
        Literal["last", "mean", "max", "first", "none"], typer.Option(help="How a text becomes one vector.")
    ] = "last",
    span: Annotated[
        str | None, typer.Option(help="Pool only these tokens, a,b: from a up to before b.", show_default=False)
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Just these tokens, as -1,-5; with --pooling none.", show_default=False)
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="Id of an adapter.", show_default=False)] = None,
    quantization: Annotated[Literal["none", "8bit", "4bit"], typer.Option(help="How the weights are held.")] = "none",
    template: Annotated[
        Literal["none", "chat"], typer.Option(help="`chat` makes each text a user message of the model's template.")
    ] = "none",
    generation_prompt: Annotated[bool, typer.Option(help="End the template with the assistant's header.")] = True,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of a text.", show_default="the model's")
    ] = None,
    truncation: Annotated[
        Literal["error", "left", "right"], typer.Option(help="What happens to longer texts.")
    ] = "error",
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"], typer.Option(help="Type of the numbers written.")
    ] = "float32",
    compute_dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Type the model computes in.")
    ] = "auto",
    batch_invariant: Annotated[bool, typer.Option(help="With 8bit, run each text alone.")] = True,
    choices: Annotated[
        Path | None,
        typer.Option(
            help="Also score the choices of the inputs (a .jsonl file of prompts) and write them to this .jsonl file.",
            show_default=False,
        ),
    ] = None,
    match: Annotated[
        Literal["exact", "normalised"], typer.Option(help="How an answer in words is compared with the right one.")
    ] = "normalised",
    max_new_tokens: Annotated[int, typer.Option(min=1, max=1024, help="Most tokens of an answer in words.")] = 32,
    stop: Annotated[
        list[str] | None, typer.Option(help="A text that ends an answer in words; may be repeated.", show_default=False)
    ] = None,
    priority: Annotated[Literal["high", "normal", "low"], typer.Option(help="Place in the queue.")] = "normal",
    webhook: Annotated[
        str | None, typer.Option(help="URL that gets the finished job in a signed POST.", show_default=False)
    ] = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Extract hidden states of texts and write them to a file."""
    if output.suffix not in _FORMATS:
        raise typer.BadParameter(
            f"the suffix must be one of {', '.join(_FORMATS)}, not {output.suffix!r}", param_hint="--output"
        )
    for file, name in ((output, "--output"), (choices, "--choices")):
        if file is not None and not file.parent.is_dir():
            raise typer.BadParameter(f"there is no folder {file.parent}", param_hint=name)
    inputs = list(_inputs(texts or [], source))
    if not inputs:
        raise typer.BadParameter("there are none: give them as arguments, or a file with --input", param_hint="texts")
    positions = {
        name: _numbers(name, given) for name, given in (("span", span), ("tokens", tokens)) if given is not None
    }
    with client_of(url, api_key) as client:
        job = client.extractions.create(
            model=model,
            inputs=inputs,
            layers=layers if layers == "all" or layers.startswith("every:") else _numbers("layers", layers),
            pooling=pooling,
            positions=positions or None,
            adapter=adapter,
            quantization=quantization,
            template=template,
            add_generation_prompt=generation_prompt,
            max_length=max_length,
            truncation=truncation,
            dtype=dtype,
            compute_dtype=compute_dtype,
            batch_invariant=batch_invariant,
            score_choices=choices is not None,
            match=match,
            max_new_tokens=max_new_tokens,
            stop=stop or [],
            priority=priority,
            webhook=webhook,
        )
        try:
            states = job.wait(progress=True)
        except KeyboardInterrupt:
            typer.echo(f"{job.id} goes on; `bathyscope jobs cancel {job.id}` ends it.", err=True)
            raise
        states.save(output)
        if choices is not None:
            _write_choices(choices, states)
    if as_json:
        print_json(states.model_dump(mode="json"))
        return
    shape = " x ".join(str(extent) for extent in states.shape)
    typer.echo(f"{output}: {shape} {states.dtype}, {size(output.stat().st_size)}, layers {_runs(states.layers)}")
    if choices is not None and isinstance(states.scored, types.Scored):
        scored = states.scored
        typer.echo(f"{choices}: {scored.correct} of {scored.answered} right, mean confidence {scored.confidence:.2f}")


def _write_choices(path: Path, states: Extraction) -> None:
    """A question's scores a line."""
    with path.open("w", encoding="utf-8") as file:
        for scores in states.choices():
            file.write(scores.model_dump_json(exclude_none=True) + "\n")


def _inputs(texts: list[str], source: str | None) -> Iterator[Any]:
    if source is None and not texts and not sys.stdin.isatty():
        source = "-"
    yield from texts
    if source == "-":
        yield from _lines(sys.stdin)
    elif source is not None and Path(source).suffix in (".jsonl", ".ndjson"):
        with Path(source).open(encoding="utf-8") as file:
            yield from _json_lines(source, file)
    elif source is not None:
        with Path(source).open(encoding="utf-8") as file:
            yield from _lines(file)


def _lines(file: Iterable[str]) -> Iterator[str]:
    for line in file:
        if text := line.rstrip("\r\n"):
            yield text


def _json_lines(source: str, file: Iterable[str]) -> Iterator[Any]:
    """An input a line: a string, an input object, or an object that has one as `input` or `text`."""
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise InvalidInput(f"{source}, line {number} is not JSON: {error}.") from error
        if isinstance(value, dict):
            value = value.get("input", value.get("text", value))
        yield value


def _numbers(name: str, given: str) -> list[int]:
    try:
        return [int(part) for part in given.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"whole numbers separated by commas are needed, not {given!r}", param_hint=f"--{name}"
        ) from None


def _runs(layers: list[int]) -> str:
    """Layer numbers, in short when they follow each other."""
    if len(layers) > 3 and layers == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers))
