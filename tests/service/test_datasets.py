"""Datasets through HTTP."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest

from tests.service.test_manners import problem
from tests.stack import Stack

ROWS = [{"input": f"text {at}", "label": at % 2 == 0, "group": f"g{at // 4}", "split": "train"} for at in range(2500)]


def send(live: Stack, data: bytes, form: str = "jsonl", **fields: Any) -> httpx2.Response:
    return live.client.post("/v1/datasets", files={"file": ("rows", data)}, data={"format": form, **fields})


def lines(rows: list[Any]) -> bytes:
    return b"\n".join(json.dumps(row).encode() for row in rows)


def test_rows_are_kept_paged_and_deleted(live: Stack) -> None:
    made = send(live, lines(ROWS), name="mine", metadata='{"a": 1}')
    assert made.status_code == 201, made.text
    dataset = made.json()
    assert dataset["rows"] == 2500
    assert dataset["labels"] == {"true": 1250, "false": 1250}
    assert (dataset["groups"], dataset["splits"], dataset["metadata"]) == (625, {'"train"': 2500}, {"a": 1})
    path = made.headers["location"]
    assert live.client.get(path).json() == dataset
    assert dataset["id"] in [one["id"] for one in live.client.get("/v1/datasets").json()["data"]]
    page = live.client.get(f"{path}/rows", params={"limit": 20, "cursor": "990"}).json()
    assert page == {
        "data": [{"index": at, **ROWS[at]} for at in range(990, 1010)],
        "next_cursor": "1010",
    }
    last = live.client.get(f"{path}/rows", params={"cursor": "2490"}).json()
    assert (len(last["data"]), last["next_cursor"]) == (10, None)
    assert live.client.delete(path).status_code == 204
    problem(live.client.get(path), 404, "not-found")
    problem(live.client.get(f"{path}/rows"), 404, "not-found")


@pytest.mark.parametrize("broken", [b"{", b'{"input": "\xe9"}', b'{"input": 5}'])
def test_a_broken_line_is_said_and_nothing_is_kept(live: Stack, broken: bytes) -> None:
    before = live.client.get("/v1/datasets").json()
    rows = lines(ROWS).split(b"\n") * 4
    rows[7340] = broken
    found = problem(send(live, b"\n".join(rows)), 422, "invalid-request")
    assert [fault["pointer"] for fault in found["errors"]] == ["/file/lines/7341"]
    assert live.client.get("/v1/datasets").json() == before


def test_fields_that_do_not_fit(live: Stack) -> None:
    for fields, pointer in (
        ({"form": "xlsx"}, "/format"),
        ({"columns": "{"}, "/columns"),
        ({"columns": '{"inptu": "x"}'}, "/columns"),
        ({"base_model": "x"}, "/base_model"),
    ):
        found = problem(send(live, b'{"input": "x"}', **fields), 422, "invalid-request")
        assert found["errors"][0]["pointer"].startswith(pointer), found
    problem(live.client.post("/v1/datasets", json={}), 415, "unsupported-media")
