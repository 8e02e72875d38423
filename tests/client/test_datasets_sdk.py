"""Datasets in the SDK and the CLI: uploaded ones against a real service, named ones made or read here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import bathyscope
from bathyscope import errors, types
from bathyscope.datasets import (
    MMLU_CATEGORIES,
    ArithmeticDataset,
    CapitalsDataset,
    GSM8KDataset,
    HubDataset,
    MMLUDataset,
    NamedDataset,
    TruthfulQADataset,
    _hub,
    _sets,
    arithmetic,
    capitals,
)
from tests.hub_folder import SUBJECTS, write_hub
from tests.stack import Stack, stack


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, models: str) -> Iterator[Stack]:
    """A service without a worker."""
    with stack(tmp_path_factory.mktemp("sdk"), workers=0, models=models) as made:
        yield made


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The library reads a folder of repositories, which it does as it reads the hub's."""
    folder = write_hub(tmp_path / "hub")
    monkeypatch.setattr(_sets, "hub_rows", lambda source, most: _hub.hub_rows(source, most, folder))
    return folder


def rows_file(folder: Path, count: int = 250, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps({"input": f"text {at}", "label": at % 2}) + "\n" for at in range(count)))
    return path


def test_sent_read_named_and_deleted(alone: Stack, tmp_path: Path) -> None:
    with bathyscope.Client(alone.url) as client:
        dataset = client.datasets.create(file=rows_file(tmp_path), name="mine", metadata={"a": [1]})
        assert isinstance(dataset, types.Dataset)
        assert (dataset.rows, dataset.name, dataset.metadata) == (250, "mine", {"a": [1]})
        assert [row.input for row in client.datasets.rows(dataset)] == [f"text {at}" for at in range(250)]
        assert [row.index for row in client.datasets.rows(dataset.id, limit=3)] == [0, 1, 2]
        assert client.datasets.get(dataset.id) == dataset
        assert dataset.id in [one.id for one in client.datasets.list()]
        for named in (dataset, dataset.id, {"id": dataset.id}, types.DatasetRef(id=dataset.id)):
            job = client.extractions.create(model="tiny", dataset=named)
            assert client.jobs.get(job.id).request["inputs"] == 250
        for shipped, count in ((CapitalsDataset(limit=8), 8), ("capitals", 296), ({"name": "arithmetic"}, 400)):
            job = client.extractions.create(model="tiny", dataset=shipped)  # type: ignore[arg-type]
            assert client.jobs.get(job.id).request["inputs"] == count
            assert client.probes.create(data={"model": "tiny", "dataset": "capitals"}).id.startswith("job_")
        client.datasets.delete(dataset.id)
        with pytest.raises(errors.NotFound):
            client.datasets.get(dataset.id)
        with pytest.raises(errors.NotFound):
            client.extractions.create(model="tiny", dataset=dataset)


def test_what_is_refused(alone: Stack, tmp_path: Path) -> None:
    path = rows_file(tmp_path)
    broken = path.read_text().splitlines()
    broken[76] = "{"
    path.write_text("\n".join(broken))
    with bathyscope.Client(alone.url) as client:
        with pytest.raises(errors.InvalidRequest, match="line 77") as refused:
            client.datasets.create(file=path)
        assert [one["pointer"] for one in refused.value.errors] == ["/file/lines/77"]
        with pytest.raises(errors.InvalidRequest, match="format"):
            client.datasets.create(file=tmp_path / "rows.xlsx")
        with pytest.raises(errors.InvalidRequest, match="cannot be read"):
            client.datasets.create(file=tmp_path / "none.csv")
        with pytest.raises(errors.InvalidRequest, match="labels"):
            client.probes.create(data={"model": "tiny", "inputs": ["a"]})
        assert list(client.datasets.list()) == []


async def test_awaited(alone: Stack, tmp_path: Path) -> None:
    async with bathyscope.AsyncClient(alone.url) as client:
        dataset = await client.datasets.create(file=rows_file(tmp_path, name="rows"), format="jsonl")
        assert [row.label async for row in client.datasets.rows(dataset, limit=2)] == [0, 1]
        assert [one.id async for one in client.datasets.list(limit=1)] == [dataset.id]
        await client.datasets.delete(dataset.id)


def test_the_commands(alone: Stack, tmp_path: Path) -> None:
    def command(*words: str, code: int = 0) -> str:
        ended = subprocess.run(
            [sys.executable, "-m", "bathyscope.cli", "datasets", *words, "--url", alone.url],
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == code, ended.stderr
        return ended.stdout if code == 0 else ended.stderr

    table = tmp_path / "t.csv"
    table.write_text("statement,truth,note\n=1+1,1,\x1b[31m\nb,0,x\n")
    columns = ("-c", "input=statement", "-c", "label=truth")
    added = json.loads(command("add", str(table), *columns, "--name", "mine", "--json"))
    assert (added["rows"], added["labels"], added["name"]) == (2, {"1": 1, "0": 1}, "mine")
    assert added["id"] in command("list")
    assert [one["id"] for one in json.loads(command("list", "--json"))] == [added["id"]]
    shown = command("show", added["id"])
    assert "=1+1" in shown
    assert "labels     1 1, 0 1" in shown
    assert [row["input"] for row in json.loads(command("show", added["id"], "--json"))["first"]] == ["=1+1", "b"]
    assert "input=statement" in command("add", str(table), "-c", "input", code=2)
    assert "line 2" in command("add", str(table), code=1)
    assert command("rm", added["id"]) == ""
    assert "deleted" in command("show", added["id"], code=1) or "no dataset" in command("show", added["id"], code=1)


def test_the_shipped_sets_are_here_too() -> None:
    whole = CapitalsDataset()
    assert (whole.inputs, whole.labels, whole.groups) == tuple(map(list, zip(*capitals(), strict=True)))
    few = CapitalsDataset(limit=30, seed=4)
    assert len(few) == 28
    assert len(set(few.groups or [])) == 7
    assert all((few.groups or []).count(group) == 4 for group in few.groups or [])
    assert sum(few.labels) == 14
    questions = ArithmeticDataset(difficulty=3, limit=20, seed=1)
    assert questions.inputs == arithmetic(20, 3, seed=1)
    assert questions.labels == [one["answer"] for one in questions.inputs]
    assert questions.groups is None
    assert len(ArithmeticDataset()) == 400
    assert next(iter(questions)) == (questions.inputs[0], questions.labels[0])
    assert repr(few) == "<CapitalsDataset name=capitals limit=30 seed=4>"


def test_mmlu(hub: Path) -> None:
    assert sum(map(len, MMLU_CATEGORIES.values())) == 57
    assert len({subject for subjects in MMLU_CATEGORIES.values() for subject in subjects}) == 57
    whole = MMLUDataset("test")
    assert (len(whole), whole.groups) == (100, None)
    assert whole.inputs[1] == {
        "prompt": "Question 1 of astronomy?\nA. answer 1\nB. answer 2\nC. answer 3\nD. answer 4\nAnswer:",
        "choices": [" A", " B", " C", " D"],
        "answer": 1,
    }
    assert whole.labels[:5] == [0, 1, 2, 3, 0]
    counts = {category: len(MMLUDataset("test", category)) for category in MMLU_CATEGORIES}
    assert counts == {"stem": 40, "humanities": 20, "social_sciences": 20, "other": 20}
    for subject in SUBJECTS:
        found = MMLUDataset("test", subject)
        assert len(found) == 20
        assert all(f"of {subject}?" in one["prompt"] for one in found.inputs)
    drawn = MMLUDataset("test", limit=30, seed=2)
    assert drawn.inputs == MMLUDataset("test", limit=30, seed=2).inputs
    assert drawn.inputs != MMLUDataset("test", limit=30).inputs
    assert len({one["prompt"].split(" of ")[1].split("?")[0] for one in drawn.inputs}) == 5, "of all subjects"
    assert len(MMLUDataset("train")) == len(MMLUDataset("auxiliary_train")) == 30
    for wrong in (("train", "stem"), ("test", "magic"), ("exam", None)):
        with pytest.raises(errors.InvalidRequest):
            MMLUDataset(*wrong).inputs  # noqa: B018
    with pytest.raises(errors.InvalidRequest):
        MMLUDataset("validation", "virology").inputs  # noqa: B018


def test_others(hub: Path) -> None:
    asked = TruthfulQADataset()
    assert (len(asked), asked.inputs[0]["choices"], asked.labels[0]) == (
        9,
        [" It is.", " It is not.", " Nobody knows."],
        0,
    )
    problems = GSM8KDataset("train")
    assert problems.inputs[2] == {"prompt": "Question: 2 apples?\nAnswer:", "answer": "1002"}
    assert problems.labels[2] == "1002"
    moods = HubDataset("org/moods", "train", columns={"input": "sentence", "label": "mood", "group": "by"})
    assert (moods.inputs[3], moods.labels, moods.groups) == (
        "sentence 3",
        [0, 1] * 4,
        sorted(["w0", "w1", "w2", "w3"] * 2),
    )
    arc = HubDataset("org/arc", columns={"prompt": "question", "choices": "choices", "answer": "answerKey"})
    assert arc.inputs[1] == {"prompt": "What melts 1?", "choices": [" ice", " steam"], "answer": 1}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "choices": ["a", "b"], "answer": "C"},
        {"prompt": "p", "choices": ["a", "b"], "answer": 2},
        {"prompt": "p", "choices": ["a"], "answer": 0},
        {"prompt": None, "choices": ["a", "b"], "answer": 0},
        {"prompt": "p", "answer": ""},
        {"input": 5},
        {"input": "a", "label": [1]},
        {"input": "a", "group": 1.5},
        {"input": [{"role": "user"}]},
        {"other": "a"},
    ],
)
def test_rows_that_are_none(row: dict[str, Any]) -> None:
    with pytest.raises(errors.InvalidRequest, match=r"row 7|no column"):
        _hub._checked(6, row, lambda one: _hub._mapped(one, None))


def test_a_name_that_is_none() -> None:
    with pytest.raises(errors.InvalidRequest):
        HubDataset("no slash")
    with pytest.raises(errors.InvalidRequest):
        NamedDataset("mnist")
