"""Rows checked one by one and written down as every dataset is kept: Parquet with `input`, `label`, `group`, `split`.

`input` and `label` are JSON, so that each keeps its kind; `group` and `split` too. What a dataset lacks is null in
every row: a label, a group or a split is there in all rows or in none.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import orjson
import pyarrow as pa
from pyarrow import parquet
from pydantic import Field, StrictInt, StrictStr, TypeAdapter, ValidationError

from bathyscope.errors import FieldError, InvalidRequest, TooLarge
from bathyscope.types import Input
from bathyscope_backplane.datasets.stored import EXTRAS, GROUP_BYTES, SCHEMA
from bathyscope_service.datasets.reading import Fault, Format, rows_of

COLUMNS = ("input", "prompt", "choices", "answer", "label", "group", "split")

MOST_FAULTS = 20
"""Faults that are told; the file is read no further after them."""

_GROUP_ROWS = 1000
_MOST_CLASSES = 100
_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,15})(\.[0-9]{1,17})?([eE][+-]?[0-9]{1,2})?")

_INPUT: TypeAdapter[Any] = TypeAdapter(Input)
_NAMES: TypeAdapter[Any] = TypeAdapter(StrictInt | Annotated[StrictStr, Field(min_length=1, max_length=256)])


@dataclass(slots=True)
class Summary:
    """What is said of a dataset."""

    rows: int = 0
    columns: list[str] = field(default_factory=list)
    """Those of `label`, `group` and `split` that it has, after `input`."""

    labels: dict[str, int] | None = None
    """Rows of each label, as JSON; null without labels or with more than 100 different ones."""

    groups: int | None = None
    splits: dict[str, int] | None = None
    questions: int = 0
    """Rows with a prompt and an answer."""

    characters: int = 0
    """Of all rows as JSON."""

    sha256: str = ""
    """Over the rows as JSON lines, so that the same rows have the same digest whatever file they came in."""


def take_rows(
    source: Path, form: Format, target: Path, *, columns: Mapping[Any, str], max_rows: int, max_bytes: int
) -> Summary:
    """Check the rows of `source` and write them to `target`, which is gone where this raises.

    `columns` says which column of the file is which of `COLUMNS`; with it the others are left out, without it an
    unknown one is a fault. Raises `InvalidRequest` with the faults by line, and `TooLarge`.
    """
    try:
        return _take(source, form, target, columns, max_rows, max_bytes)
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def _take(
    source: Path, form: Format, target: Path, columns: Mapping[Any, str], max_rows: int, max_bytes: int
) -> Summary:
    faults: list[Fault] = []
    taken = _Taken()
    pending: list[dict[str, str | None]] = []
    pending_bytes = 0
    with parquet.ParquetWriter(target, SCHEMA, compression="zstd") as writer:
        for line, found in rows_of(source, form):
            try:
                if isinstance(found, Fault):
                    raise found
                row = taken.row(line, _normal(line, _named(line, found, columns), texts=form == "csv"))
            except Fault as fault:
                faults.append(fault)
                if fault.last or len(faults) == MOST_FAULTS:
                    break
                continue
            if taken.summary.rows > max_rows:
                raise TooLarge(
                    f"The file has more than {max_rows:,} rows, the most that a dataset may have.", limit=max_rows
                )
            size = sum(len(value) for value in row.values() if value)
            taken.summary.characters += size
            if taken.summary.characters > max_bytes:
                faults.append(Fault(line, f"up to here the rows have more than {max_bytes:,} characters in all"))
                break
            if faults:
                continue
            pending.append(row)
            pending_bytes += size
            if len(pending) == _GROUP_ROWS or pending_bytes > GROUP_BYTES:
                writer.write_batch(pa.RecordBatch.from_pylist(pending, SCHEMA))
                pending, pending_bytes = [], 0
        if pending:
            writer.write_batch(pa.RecordBatch.from_pylist(pending, SCHEMA))
    if not faults and not taken.summary.rows:
        faults.append(Fault(1, "the file has no rows"))
    if faults:
        raise _refusal(faults, form)
    return taken.ended()


def _refusal(faults: list[Fault], form: Format) -> InvalidRequest:
    unit = "row" if form == "parquet" else "line"
    first = faults[0]
    more = f", and {len(faults) - 1} more faults" if len(faults) > 1 else ""
    errors: list[FieldError] = [
        {"pointer": f"/file/{unit}s/{fault.line}", "detail": f"{unit} {fault.line:,}: {fault.detail}"[:500]}
        for fault in faults
    ]
    return InvalidRequest(f"The file was not taken: {unit} {first.line:,}: {first.detail[:300]}{more}.", errors=errors)


def _named(line: int, row: dict[str, Any], columns: Mapping[Any, str]) -> dict[str, Any]:
    if columns:
        return {name: row[given] for name, given in columns.items() if row.get(given) is not None}
    for name in row:
        if name not in COLUMNS:
            raise Fault(line, f"the column {name[:64]!r} is not known; give `columns` or use {', '.join(COLUMNS)}")
    return {name: value for name, value in row.items() if value is not None}


def _normal(line: int, row: dict[str, Any], *, texts: bool) -> dict[str, Any]:
    """The row as input, label, group and split. `texts`: from a file that has nothing but texts."""
    if texts:
        row = _from_texts(line, row)
    question = {name: row.pop(name) for name in ("prompt", "choices", "answer") if name in row}
    if question and "input" in row:
        raise Fault(line, "a row has either an `input` or a `prompt` with its `answer`")
    given = question or row.get("input")
    if given is None or given == "":
        raise Fault(line, "it has no `input`, and no `prompt`")
    try:
        _INPUT.validate_python(given)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in fault["loc"] if not str(part).startswith("input:"))
        raise Fault(line, f"{where or 'input'}: {fault['msg']}") from None
    row["input"] = given
    label = row.get("label")
    if label is not None and not isinstance(label, bool | int | float | str):
        raise Fault(line, "label: a class as a boolean, a number or a text")
    if isinstance(label, str) and not 0 < len(label) <= 256:
        raise Fault(line, "label: a text of 1 to 256 characters")
    for name in ("group", "split"):
        if name in row:
            try:
                _NAMES.validate_python(row[name])
            except ValidationError:
                raise Fault(line, f"{name}: a whole number or a text of 1 to 256 characters") from None
    return row


def _from_texts(line: int, row: dict[str, Any]) -> dict[str, Any]:
    """The cells that are not texts by their meaning: choices are a list, their answer and a label may be a number."""
    if "choices" in row:
        try:
            row["choices"] = orjson.loads(row["choices"])
        except orjson.JSONDecodeError:
            raise Fault(line, 'choices: a JSON list, as [" A", " B"]') from None
        if "answer" in row and row["answer"].isascii() and row["answer"].isdigit() and len(row["answer"]) < 4:
            row["answer"] = int(row["answer"])
    if "label" in row and _NUMBER.fullmatch(row["label"]):
        row["label"] = orjson.loads(row["label"])
    return row


@dataclass(slots=True)
class _Taken:
    """What must be the same in all rows, and the counts."""

    summary: Summary = field(default_factory=Summary)
    has: tuple[bool, ...] | None = None
    kind: str = ""
    labels: Counter[str] = field(default_factory=Counter)
    groups: set[bytes] = field(default_factory=set)
    splits: Counter[str] = field(default_factory=Counter)
    digest: Any = field(default_factory=hashlib.sha256)

    def row(self, line: int, row: dict[str, Any]) -> dict[str, str | None]:
        """The row as it is kept. Raises `Fault`."""
        has = tuple(name in row for name in EXTRAS)
        if self.has is None:
            self.has = has
        for name, now, first in zip(EXTRAS, has, self.has, strict=True):
            if now != first:
                raise Fault(line, f"it has {'a' if now else 'no'} {name}, unlike the first row; all rows do or none")
        label = row.get("label")
        kind = {bool: "truth value", str: "text"}.get(type(label), "number")
        if label is not None:
            self.kind = self.kind or kind
            if kind != self.kind:
                raise Fault(line, f"label: a {kind}, and that of the first row is a {self.kind}")
        kept = {"input": _json(row["input"])} | {name: _json(row[name]) if name in row else None for name in EXTRAS}
        self.summary.rows += 1
        self.summary.questions += isinstance(row["input"], dict) and "prompt" in row["input"]
        if kept["label"] is not None and len(self.labels) <= _MOST_CLASSES:
            self.labels[kept["label"]] += 1
        if kept["group"] is not None:
            self.groups.add(hashlib.blake2b(kept["group"].encode(), digest_size=16).digest())
        if kept["split"] is not None:
            if len(self.splits) == _MOST_CLASSES and kept["split"] not in self.splits:
                raise Fault(line, f"split: more than {_MOST_CLASSES} different ones")
            self.splits[kept["split"]] += 1
        self.digest.update(orjson.dumps(kept) + b"\n")
        return kept

    def ended(self) -> Summary:
        summary, has = self.summary, self.has or (False,) * len(EXTRAS)
        summary.columns = ["input", *(name for name, there in zip(EXTRAS, has, strict=True) if there)]
        summary.labels = dict(self.labels) if has[0] and len(self.labels) <= _MOST_CLASSES else None
        summary.groups = len(self.groups) if has[1] else None
        summary.splits = dict(self.splits) if has[2] else None
        summary.sha256 = self.digest.hexdigest()
        return summary


def _json(value: Any) -> str:
    return orjson.dumps(value).decode()
