"""Datasets through HTTP."""

from __future__ import annotations

import concurrent.futures
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.files import paths_below
from tests.service.test_keys import as_user, make_key
from tests.service.test_manners import problem
from tests.stack import Stack, stack

ROWS = [{"input": f"text {at}", "label": at % 2 == 0, "group": f"g{at // 4}", "split": "train"} for at in range(2500)]


def send(
    client: httpx2.Client, data: bytes, form: str = "jsonl", headers: dict[str, str] | None = None, **fields: Any
) -> httpx2.Response:
    return client.post(
        "/v1/datasets",
        files={"file": ("rows", data)},
        data={"format": form, **fields},
        headers=headers or {},
        timeout=180,
    )


def lines(rows: list[Any]) -> bytes:
    return b"\n".join(json.dumps(row).encode() for row in rows)


def files(stack: Stack) -> set[Path]:
    """What of datasets lies in the data folder: blobs, manifests, uploads in the making."""
    paths = (path for folder in ("artifacts", "uploads") for path in paths_below(stack.data_dir / folder))
    return {path for path in paths if path.is_file() and ("/ds_" in str(path) or "/uploads/" in str(path))}


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory, models: str) -> Iterator[Stack]:
    """A service with keys, and no worker."""
    with stack(tmp_path_factory.mktemp("datasets"), workers=0, models=models) as made:
        yield made


@pytest.fixture(scope="module")
def anna(keyed: Stack) -> Iterator[httpx2.Client]:
    with as_user(keyed, make_key(keyed, "anna")) as client:
        yield client


def test_rows_are_kept_paged_and_deleted(keyed: Stack, anna: httpx2.Client) -> None:
    before = files(keyed)
    made = send(anna, lines(ROWS), name="mine", metadata='{"a": 1}')
    assert made.status_code == 201, made.text
    dataset = made.json()
    assert dataset["rows"] == 2500
    assert dataset["columns"] == ["input", "label", "group", "split"]
    assert dataset["labels"] == {"true": 1250, "false": 1250}
    assert (dataset["groups"], dataset["splits"], dataset["metadata"]) == (625, {'"train"': 2500}, {"a": 1})
    path = made.headers["location"]
    assert anna.get(path).json() == dataset
    assert dataset["id"] in [one["id"] for one in anna.get("/v1/datasets").json()["data"]]
    read: list[Any] = []
    cursor = None
    while True:
        page = anna.get(f"{path}/rows", params={"limit": 190, **({"cursor": cursor} if cursor else {})}).json()
        read += page["data"]
        if (cursor := page["next_cursor"]) is None:
            break
    assert read == [{"index": at, **row} for at, row in enumerate(ROWS)]
    problem(anna.get(f"{path}/rows", params={"cursor": "x"}), 422, "invalid-request")
    assert len(files(keyed) - before) == 2
    assert anna.delete(path).status_code == 204
    problem(anna.get(path), 404, "not-found")
    problem(anna.get(f"{path}/rows"), 404, "not-found")
    assert files(keyed) == before


def test_every_format_and_kind_of_row(anna: httpx2.Client) -> None:
    questions = [
        {
            "input": {"prompt": "1 + 1 =", "choices": [" 2", " 3"], "answer": 0},
            "label": None,
            "group": 1,
            "split": None,
        },
        {
            "input": {"prompt": "2 + 2 =", "choices": [" 5", " 4"], "answer": 1},
            "label": None,
            "group": 2,
            "split": None,
        },
    ]
    flat = [{**row["input"], "group": row["group"]} for row in questions]  # type: ignore[dict-item]
    table = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(flat), table)
    text = 'prompt,choices,answer,label,group\n"1 + 1 =","["" 2"","" 3""]",0,1,a\n'
    for form, data in (("jsonl", lines(flat)), ("parquet", table.getvalue())):
        made = send(anna, data, form)
        assert made.status_code == 201, made.text
        rows = anna.get(f"{made.headers['location']}/rows").json()["data"]
        assert [{**row, "index": at} for at, row in enumerate(questions)] == rows
        assert made.json()["questions"] == 2
    made = send(anna, text.encode(), "csv")
    assert anna.get(f"{made.headers['location']}/rows").json()["data"] == [
        {"index": 0, "input": questions[0]["input"], "label": 1, "group": "a", "split": None}
    ]


def test_formula_like_cells_stay_text(anna: httpx2.Client) -> None:
    cells = ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "007", "1e5", "TRUE", "null"]
    data = "input,group\n" + "".join(f'"{cell}","{cell}"\n' for cell in cells)
    made = send(anna, data.encode(), "csv")
    rows = anna.get(f"{made.headers['location']}/rows").json()["data"]
    assert [row["input"] for row in rows] == cells
    assert [row["group"] for row in rows] == cells


def bomb(characters: int, rows: int) -> bytes:
    """A small Parquet file of so many rows of one long text."""
    table = io.BytesIO()
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["a" * characters]))
    parquet.write_table(pa.table({"input": texts}), table, compression="zstd")
    assert table.tell() < 100_000
    return table.getvalue()


@pytest.mark.parametrize(
    ("form", "broken", "place"),
    [
        ("jsonl", b"{", "/file/lines/7341"),
        ("jsonl", '{"input": "café"}'.encode("latin-1"), "/file/lines/7341"),
        ("jsonl", '{"input": "café"}'.encode("utf-16"), "/file/lines/7341"),
        ("jsonl", b'{"input": 5}', "/file/lines/7341"),
        ("csv", "café".encode("latin-1"), "/file/lines/7341"),
        ("csv", b"one,two", "/file/lines/7341"),
        ("parquet", bomb(30_000_000, 20_000), "/file/rows/1"),
        ("parquet", bomb(1_000_000, 20_000), "/file/rows/"),
        ("parquet", b"PAR1 and no more", "/file/rows/1"),
    ],
    ids=["json", "latin-1", "utf-16", "number", "csv-latin-1", "csv-cells", "bomb", "long-bomb", "no-parquet"],
)
def test_a_broken_file_is_told_where_and_nothing_is_kept(
    keyed: Stack, anna: httpx2.Client, form: str, broken: bytes, place: str
) -> None:
    before = files(keyed), anna.get("/v1/datasets").json()
    if form == "parquet":
        data = broken
    else:
        rows = lines(ROWS * 4).split(b"\n") if form == "jsonl" else [b"input", *(b"text %d" % at for at in range(9999))]
        rows[7340] = broken
        data = b"\n".join(rows)
    found = problem(send(anna, data, form), 422, "invalid-request")
    assert found["errors"][0]["pointer"].startswith(place), found
    assert re.search("line 7,341|row [0-9,]+", found["detail"]), found
    assert (files(keyed), anna.get("/v1/datasets").json()) == before


def peak(stack: Stack) -> int:
    """Most memory that the service has had, in bytes."""
    status = Path(f"/proc/{stack.processes['service'].pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_a_hundred_thousand_rows_stream_in_flat_memory(
    keyed: Stack, anna: httpx2.Client, tmp_path: Path, form: str
) -> None:
    def content(count: int) -> bytes:
        texts = [f"{at} {'deep water ' * 60}" for at in range(count)]
        if form == "parquet":
            table = io.BytesIO()
            parquet.write_table(pa.table({"input": texts}), table, row_group_size=5000)
            return table.getvalue()
        if form == "csv":
            return "\n".join(["input", *texts]).encode()
        return lines([{"input": text} for text in texts])

    assert send(anna, content(5000), form).status_code == 201
    before = peak(keyed)
    large = content(100_000)
    made = send(anna, large, form)
    assert made.status_code == 201, made.text
    assert made.json()["rows"] == 100_000
    page = anna.get(f"{made.headers['location']}/rows", params={"limit": 1}).json()
    assert page["data"][0]["index"] == 0
    assert peak(keyed) - before < 24 * 2**20, "67 MB of rows"


def test_fields_that_do_not_fit(anna: httpx2.Client) -> None:
    for fields, pointer in (
        ({"form": "xlsx"}, "/format"),
        ({"columns": "{"}, "/columns"),
        ({"columns": '{"inptu": "x"}'}, "/columns"),
        ({"base_model": "x"}, "/base_model"),
    ):
        found = problem(send(anna, b'{"input": "x"}', **fields), 422, "invalid-request")
        assert found["errors"][0]["pointer"].startswith(pointer), found
    problem(anna.post("/v1/datasets", json={}), 415, "unsupported-media")


def test_an_idempotency_key_gives_the_same_dataset(anna: httpx2.Client) -> None:
    key = {"Idempotency-Key": "one"}
    refused = send(anna, b"{", headers=key)
    problem(refused, 422, "invalid-request")
    first = send(anna, b'{"input": "x"}', headers=key)
    assert first.status_code == 201, first.text
    assert "idempotent-replayed" not in first.headers
    again = send(anna, b'{"input": "x"}', headers=key)
    assert (again.status_code, again.json(), again.headers["idempotent-replayed"]) == (201, first.json(), "true")
    problem(send(anna, b'{"input": "y"}', headers=key), 422, "idempotency-mismatch")
    assert send(anna, b'{"input": "x"}').json()["id"] != first.json()["id"]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        both = list(pool.map(lambda _: send(anna, b'{"input": "z"}', headers={"Idempotency-Key": "two"}), range(4)))
    assert len({answer.json()["id"] for answer in both}) == 1
    assert anna.get(f"{both[0].headers['location']}/rows").json()["data"][0]["input"] == "z"
    assert anna.delete(first.headers["location"]).status_code == 204
    problem(send(anna, b'{"input": "x"}', headers=key), 409, "state-conflict")


def test_nobody_sees_anothers_and_the_quota_holds(keyed: Stack, anna: httpx2.Client) -> None:
    hers = send(anna, b'{"input": "x"}').headers["location"]
    with as_user(keyed, make_key(keyed, "bert", "--max-bytes", "6000")) as bert:
        for path in (hers, f"{hers}/rows"):
            problem(bert.get(path), 404, "not-found")
        problem(bert.delete(hers), 404, "not-found")
        assert bert.get("/v1/datasets").json()["data"] == []
        kept = []
        while (answer := send(bert, b'{"input": "x"}')).status_code == 201:
            kept.append(answer.headers["location"])
        problem(answer, 429, "quota-exceeded")
        assert 1 <= len(kept) < 10
        assert len(bert.get("/v1/datasets").json()["data"]) == len(kept)
        assert bert.delete(kept[0]).status_code == 204
        assert send(bert, b'{"input": "x"}').status_code == 201
    assert anna.get(hers).status_code == 200
