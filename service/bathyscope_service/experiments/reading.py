"""From the text of a file to a checked configuration.

YAML is read by its events, and less of it than there is: no aliases or anchors, no tags, no key twice, bounded depth
and size; of plain words only `true`, `false`, `null` and numbers are values, as in YAML 1.2, so that `no` stays a word.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator
from typing import Any

import yaml  # type: ignore[import-untyped]
from pydantic import BaseModel

from bathyscope.errors import FieldError, InvalidRequest, MalformedBody
from bathyscope.types.experiments import ExperimentConfig

MAX_BYTES = 256 * 1024
MAX_DEPTH = 12
MAX_NODES = 20_000

_MOST_ERRORS = 50
_WORDS = {"true": True, "false": False, "null": None, "~": None, "": None}
_INT = re.compile(r"[-+]?[0-9]{1,40}")
_FLOAT = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")


def from_yaml(data: bytes) -> Any:
    """The content of a YAML file. Raises `MalformedBody`, with the line."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MalformedBody(f"The file is not UTF-8: byte {error.start} does not fit.") from None
    try:
        return _Reader(text).read()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        what = getattr(error, "problem", None) or "it cannot be read"
        raise MalformedBody(f"The file is not YAML; {where}{what}.") from None


def _parsed(text: str) -> Iterator[Any]:
    """The events of a text. Raises `yaml.YAMLError`."""
    loader = yaml.SafeLoader(text)
    while True:
        try:
            event = loader.get_event()
        except (ValueError, OverflowError):  # the parser makes a character of whatever number follows \U
            raise yaml.MarkedYAMLError(
                problem="an escape names no character of Unicode", problem_mark=loader.get_mark()
            ) from None
        if event is None:
            return
        yield event


class _Reader:
    """Values of a document's events, so that nothing is built which is refused."""

    def __init__(self, text: str) -> None:
        self._events = _parsed(text)
        self._nodes = 0

    def read(self) -> Any:
        """The only document."""
        value: Any = None
        documents = 0
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise _refused(event, "it holds more than one document")
                value = self._value(next(self._events), 0)
        return value

    def _value(self, event: Any, depth: int) -> Any:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise _refused(event, f"it holds more than {MAX_NODES:,} values")
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise _refused(event, "anchors and aliases are not read; write the value out")
        if getattr(event, "tag", None) not in (None, "!"):
            raise _refused(event, "tags are not read; leave it out")
        if depth > MAX_DEPTH:
            raise _refused(event, f"it is nested more than {MAX_DEPTH} deep")
        if isinstance(event, yaml.ScalarEvent):
            return _scalar(event)
        if isinstance(event, yaml.SequenceStartEvent):
            found = []
            while not isinstance(item := next(self._events), yaml.SequenceEndEvent):
                found.append(self._value(item, depth + 1))
            return found
        pairs: dict[str, Any] = {}
        while not isinstance(key := next(self._events), yaml.MappingEndEvent):
            if not isinstance(key, yaml.ScalarEvent):
                raise _refused(key, "a key is a word")
            if key.anchor is not None or key.tag not in (None, "!"):
                raise _refused(key, "anchors and tags are not read")
            name = _characters(key)
            if name in pairs:
                raise _refused(key, f"the key {name[:80]!r} is there twice")
            pairs[name] = self._value(next(self._events), depth + 1)
        return pairs


def _characters(event: Any) -> str:
    """The text of a scalar, where two escapes of a surrogate pair are one character, as they are in JSON."""
    text: str = event.value
    try:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError:
        raise _refused(event, "an escape is one half of a surrogate pair") from None


def _scalar(event: Any) -> Any:
    text = _characters(event)
    if event.style is not None:  # quoted, or a block
        return text
    if text.lower() in _WORDS and (text.islower() or text in ("", "~")):
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        number = float(text)
        if not math.isfinite(number):
            raise _refused(event, "the number is too large")
        return number
    return text


def _refused(event: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


def refuse_unknown(content: Any) -> None:
    """Raise `InvalidRequest` for keys that mean nothing, each with the nearest that does."""
    if not isinstance(content, dict):
        raise InvalidRequest(
            "The file describes no experiment.",
            errors=[FieldError(pointer="", detail="it is a mapping of sections; `model` with a `name` is the least")],
        )
    found = [
        FieldError(pointer=pointer, detail=detail)
        for pointer, detail in _unknown(content, ExperimentConfig, "", _all_keys())
    ][:_MOST_ERRORS]
    if found:
        raise InvalidRequest("The file has keys that are not known.", errors=found)


def _unknown(
    content: dict[str, Any], model: type[BaseModel], pointer: str, keys: list[str]
) -> Iterator[tuple[str, str]]:
    for key, value in content.items():
        place = f"{pointer}/{key[:80].replace('~', '~0').replace('/', '~1')}"
        if key not in model.model_fields:
            yield place, _detail(key, list(model.model_fields), keys)
            continue
        section = model.model_fields[key].annotation
        if model is ExperimentConfig and isinstance(value, dict) and isinstance(section, type):
            yield from _unknown(value, section, place, keys)


def _detail(key: str, here: list[str], keys: list[str]) -> str:
    near = difflib.get_close_matches(key, here, 1, 0.6)
    if near:
        return f"there is no key {key[:80]!r} here; did you mean {near[0]!r}?"
    words = [name.rpartition(".")[2] for name in keys]
    if (elsewhere := difflib.get_close_matches(key, words, 1, 0.75)) and elsewhere[0]:
        whole = keys[words.index(elsewhere[0])]
        return f"there is no key {key[:80]!r} here; did you mean {whole!r}?"
    nearest = max(here, key=lambda name: difflib.SequenceMatcher(None, key, name).ratio())
    return f"there is no key {key[:80]!r} here; the nearest is {nearest!r}, and all are {', '.join(here)}"


def _all_keys() -> list[str]:
    found: list[str] = []
    for name, field in ExperimentConfig.model_fields.items():
        found.append(name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += [f"{name}.{inner}" for inner in field.annotation.model_fields]
    return found
