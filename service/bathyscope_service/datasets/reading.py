"""Rows of a file as it was uploaded, one at a time: JSONL, CSV and Parquet, each with the number of its line.

Nothing here holds more than one row. What is faulty is raised as `Fault` or gathered by the caller; a fault after which
the rest of the file makes no sense has `last` set.
"""

from __future__ import annotations

import csv
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

import orjson

Format = Literal["jsonl", "csv", "parquet"]

ROW_BYTES = 2**20
"""Most bytes of one row."""

_SECONDS = 180.0
"""How long a Parquet file may take."""


class Fault(ValueError):
    """What is wrong with one line of a file."""

    def __init__(self, line: int, detail: str, *, last: bool = False) -> None:
        super().__init__(detail)
        self.line = line
        self.detail = detail
        self.last = last


Found = tuple[int, "dict[str, Any] | Fault"]
"""Line (from 1; of Parquet the row) and what is there."""


def rows_of(path: Path, form: Format) -> Iterator[Found]:
    """The rows of a file, in order."""
    if form == "parquet":
        yield from _parquet(path)
        return
    with path.open("rb") as file:
        yield from _csv(file) if form == "csv" else _jsonl(file)


def _text(line: int, data: bytes) -> str:
    try:
        text = data.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise Fault(
            line, f"byte {error.start + 1} of the line (0x{data[error.start]:02x}) is not UTF-8; save the file as UTF-8"
        ) from None
    if "\0" in text:
        raise Fault(line, "it holds a NUL character; is this a text file in UTF-8?")
    return text


def _lines(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    line = 0
    while data := file.readline(ROW_BYTES + 1):
        line += 1
        if len(data) > ROW_BYTES:
            raise Fault(line, f"the line has more than {ROW_BYTES:,} bytes", last=True)
        yield line, data


def _object(line: int, data: bytes | str) -> dict[str, Any]:
    try:
        found = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise Fault(line, f"it is not JSON: {error.msg} (column {error.colno})") from None
    if not isinstance(found, dict):
        raise Fault(line, 'a row is a JSON object, as {"input": "…", "label": 1}')
    return found


def _jsonl(file: IO[bytes]) -> Iterator[Found]:
    try:
        for line, data in _lines(file):
            try:
                if text := _text(line, data).strip():
                    yield line, _object(line, text)
            except Fault as fault:
                yield line, fault
    except Fault as fault:
        yield fault.line, fault


def _csv(file: IO[bytes]) -> Iterator[Found]:
    """Cells are text, whatever they begin with; an empty cell is none."""
    held = 0

    def texts() -> Iterator[str]:
        nonlocal held
        for line, data in _lines(file):
            held += len(data)
            if held > ROW_BYTES:
                raise Fault(line, f"a row has more than {ROW_BYTES:,} bytes; is a quotation mark missing?", last=True)
            yield _text(line, data)

    reader = csv.reader(texts(), strict=True)
    header: list[str] | None = None
    begun = 1
    while True:
        held = 0
        try:
            cells = next(reader, None)
        except Fault as fault:
            fault.last = True
            yield fault.line, fault
            return
        except csv.Error as error:
            yield begun, Fault(begun, f"it is not CSV: {error}", last=True)
            return
        if cells is None:
            return
        line, begun = begun, reader.line_num + 1
        if not cells:
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            if len(header) > 1024 or len(set(header)) < len(header) or "" in header:
                yield line, Fault(line, "the first line names the columns, each once", last=True)
                return
        elif len(cells) != len(header):
            yield line, Fault(line, f"it has {len(cells)} cells and the first line names {len(header)} columns")
        else:
            yield line, {name: cell for name, cell in zip(header, cells, strict=True) if cell}


def _parquet(path: Path) -> Iterator[Found]:
    command = [sys.executable, "-m", "bathyscope_service.datasets.parquet_child", str(path)]
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    ending = threading.Timer(_SECONDS, child.kill)
    ending.start()
    line = 0
    try:
        assert child.stdout is not None
        while data := child.stdout.readline(ROW_BYTES + 1):
            if len(data) > ROW_BYTES:
                yield line + 1, Fault(line + 1, f"the row has more than {ROW_BYTES:,} bytes", last=True)
                return
            if not data.endswith(b"\n"):
                break  # the process ended within a row
            line += 1
            try:
                yield line, _object(line, data)
            except Fault as fault:
                yield line, Fault(line, f"it has a value that is no text, number or list: {fault.detail}")
        status = child.wait()
        if status == 3:
            yield line + 1, Fault(line + 1, "the file is not Parquet, or broken from here on", last=True)
        elif status:
            yield (
                line + 1,
                Fault(line + 1, "from here on it takes more memory or time to read than any dataset may", last=True),
            )
    finally:
        ending.cancel()
        child.kill()
        child.wait()
        if child.stdout is not None:
            child.stdout.close()
