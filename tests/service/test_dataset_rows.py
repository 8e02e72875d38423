from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from bathyscope.errors import InvalidRequest, TooLarge
from bathyscope_service.datasets.reading import Format
from bathyscope_service.datasets.rows import Summary, take_rows

TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=40)
ROWS = st.lists(st.fixed_dictionaries({"input": TEXT, "label": st.booleans(), "group": TEXT}), min_size=1, max_size=20)
SHARED = settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])


def take(
    folder: Path, data: bytes, form: Format = "jsonl", columns: dict[str, str] | None = None, **bounds: int
) -> Any:
    """The summary and the rows as they are kept."""
    source, target = folder / "source", folder / "target"
    source.write_bytes(data)
    limits = {"max_rows": 100_000, "max_bytes": 2**28} | bounds
    summary = take_rows(source, form, target, columns=columns or {}, **limits)
    kept = [
        {name: json.loads(value) for name, value in row.items() if value is not None}
        for row in parquet.read_table(target).to_pylist()
    ]
    target.unlink()
    return summary, kept


def refused(folder: Path, data: bytes, form: Format = "jsonl", **others: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        take(folder, data, form, **others)
    assert not (folder / "target").exists(), "nothing is kept"
    return caught.value


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


@SHARED
@given(rows=ROWS)
def test_rows_come_back_as_they_went(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    summary, kept = take(tmp_path, jsonl(rows))
    assert kept == rows
    assert summary.rows == len(rows)
    assert summary.columns == ["input", "label", "group"]
    assert sum(summary.labels.values()) == len(rows)
    assert summary.groups == len({row["group"] for row in rows})
    table = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), table)
    same, kept = take(tmp_path, table.getvalue(), "parquet") if len(rows) < 3 else (summary, kept)
    assert (kept, same.sha256) == (rows, summary.sha256)


@SHARED
@given(rows=st.lists(st.fixed_dictionaries({"input": TEXT, "group": TEXT}), min_size=1, max_size=20))
def test_cells_of_csv_stay_the_texts_that_they_are(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    sheet = io.StringIO(newline="")
    writer = csv.DictWriter(sheet, ["input", "group"], quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    assert take(tmp_path, sheet.getvalue().encode(), "csv")[1] == rows


@SHARED
@given(data=st.binary(max_size=200), form=st.sampled_from(["jsonl", "csv"]))
def test_any_bytes_are_rows_or_a_refusal(tmp_path: Path, data: bytes, form: Format) -> None:
    try:
        summary, kept = take(tmp_path, data, form)
    except InvalidRequest:
        assert refused(tmp_path, data, form).errors
    else:
        assert summary.rows == len(kept) > 0


def test_formulas_stay_text(tmp_path: Path) -> None:
    cells = ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "007", "1e5", "true", '{"prompt": 1}']
    sheet = io.StringIO(newline="")
    csv.writer(sheet).writerows([["input", "label"], *([cell, "yes"] for cell in cells)])
    assert [row["input"] for row in take(tmp_path, sheet.getvalue().encode(), "csv")[1]] == cells


def test_labels_and_questions_of_csv(tmp_path: Path) -> None:
    data = b'\xef\xbb\xbfprompt,choices,answer,label,split\r\nOne?,"["" A"","" B""]",1,0.5,train\r\nTwo?,,7,2,test\r\n'
    summary, kept = take(tmp_path, data, "csv")
    assert kept == [
        {"input": {"prompt": "One?", "choices": [" A", " B"], "answer": 1}, "label": 0.5, "split": "train"},
        {"input": {"prompt": "Two?", "answer": "7"}, "label": 2, "split": "test"},
    ]
    assert (summary.questions, summary.splits) == (2, {'"train"': 1, '"test"': 1})


@pytest.mark.parametrize(
    "broken", [b'{"input": "x"', b'{"input": "\xff"}', b"[]", b'{"input": NaN}', b'{"inptu": "x"}']
)
def test_the_broken_line_is_named(tmp_path: Path, broken: bytes) -> None:
    lines = [b'{"input": "text %d"}' % number for number in range(10_000)]
    lines[7340] = broken
    error = refused(tmp_path, b"\n".join(lines))
    assert [fault["pointer"] for fault in error.errors] == ["/file/lines/7341"]
    assert "7,341" in str(error)


def test_a_broken_line_of_csv_counts_the_lines_within_cells(tmp_path: Path) -> None:
    error = refused(tmp_path, b'input,label\n"two\nlines",1\nplain,1\nplain\n', "csv")
    assert [fault["pointer"] for fault in error.errors] == ["/file/lines/5"]
    error = refused(tmp_path, b"input,label\nplain,1\n\xe9t\xe9,1\n", "csv")  # Latin-1
    assert [fault["pointer"] for fault in error.errors] == ["/file/lines/3"]
    assert "UTF-8" in str(error)
    assert "UTF-8" in str(refused(tmp_path, "input\nplain\n".encode("utf-16"), "csv"))
    assert "line 2" in str(refused(tmp_path, b'input\n"' + b"a\n" * 2**20, "csv"))


@pytest.mark.parametrize(
    ("second", "word"),
    [
        ({"input": "x"}, "no label"),
        ({"input": "x", "label": True}, "truth value"),
        ({"input": "x", "label": 1, "group": "g"}, "a group"),
        ({"input": "x", "label": [1]}, "label"),
        ({"input": "", "label": 1}, "input"),
        ({"input": "x", "prompt": "x", "answer": "y", "label": 1}, "either"),
        ({"prompt": "x", "choices": [" A", " A"], "answer": 0, "label": 1}, "same as"),
        ({"prompt": "x", "choices": [" A", " B"], "answer": 2, "label": 1}, "0 to 1"),
        ({"input": {"messages": []}, "label": 1}, "messages"),
    ],
)
def test_rows_that_do_not_fit(tmp_path: Path, second: dict[str, Any], word: str) -> None:
    error = refused(tmp_path, jsonl([{"input": "x", "label": 1}, second]))
    assert [fault["pointer"] for fault in error.errors] == ["/file/lines/2"]
    assert word in str(error)


def test_bounds(tmp_path: Path) -> None:
    assert len(refused(tmp_path, b"nothing\n" * 100_000).errors) == 20
    assert "no rows" in str(refused(tmp_path, b"\n \n"))
    assert "bytes" in str(refused(tmp_path, b'{"input": "' + b"a" * 2**21))
    assert refused(tmp_path, b'{"input":' + b"[" * 100_000).errors
    eleven = jsonl([{"input": f"text {number}"} for number in range(11)])
    assert refused(tmp_path, eleven, max_bytes=50).errors[0]["pointer"] == "/file/lines/7"
    with pytest.raises(TooLarge):
        take(tmp_path, eleven, max_rows=10)
    assert not (tmp_path / "target").exists()


def test_columns_are_renamed_and_others_left_out(tmp_path: Path) -> None:
    rows = [{"statement": "x", "is_true": True, "source": "y"}]
    assert "columns" in str(refused(tmp_path, jsonl(rows)))
    assert take(tmp_path, jsonl(rows), columns={"input": "statement", "label": "is_true"})[1] == [
        {"input": "x", "label": True}
    ]


def test_parquet_bombs(tmp_path: Path) -> None:
    source = tmp_path / "bomb"
    huge = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, pa.int32()), pa.array(["a" * 30_000_000]))
    parquet.write_table(pa.table({"input": huge}), source, compression="zstd")
    assert source.stat().st_size < 100_000, "small, and 600 GB once it is read"
    assert refused(tmp_path, source.read_bytes(), "parquet").errors
    good = io.BytesIO()
    parquet.write_table(pa.table({"input": ["a", "b"]}), good)
    for data in (b"", b"PAR1", b"PAR1" * 1000, good.getvalue()[:-9], good.getvalue()[::-1]):
        assert refused(tmp_path, data, "parquet").errors
    strange = io.BytesIO()
    parquet.write_table(pa.table({"input": [b"\xff"]}), strange)
    assert [fault["pointer"] for fault in refused(tmp_path, strange.getvalue(), "parquet").errors] == ["/file/rows/1"]


def test_a_hundred_thousand_rows_in_flat_memory(tmp_path: Path) -> None:
    """The peak of a process that reads 100,000 rows of 500 bytes is little above that of one that reads 5,000."""
    program = (
        "import sys, resource; from pathlib import Path; from bathyscope_service.datasets.rows import take_rows\n"
        "s = take_rows(Path(sys.argv[1]), 'jsonl', Path(sys.argv[1] + '.out'), columns={}, max_rows=10**5,"
        " max_bytes=2**30)\n"
        "print(s.rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = []
    for rows in (5_000, 100_000):
        path = tmp_path / str(rows)
        with path.open("w") as file:
            file.writelines(f'{{"input": "{number:0500d}", "label": {number % 2}}}\n' for number in range(rows))
        said = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
        count, peak = said.stdout.split()
        assert int(count) == rows
        peaks.append(int(peak))
    assert peaks[1] - peaks[0] < 25_000, "KiB; the file has 50 MB"


def test_the_same_rows_have_the_same_digest(tmp_path: Path) -> None:
    first: Summary = take(tmp_path, jsonl([{"input": "x", "label": "a"}]))[0]
    assert first.sha256 == take(tmp_path, b"label,input\na,x\n", "csv")[0].sha256
    assert first.sha256 != take(tmp_path, b"label,input\na,y\n", "csv")[0].sha256
