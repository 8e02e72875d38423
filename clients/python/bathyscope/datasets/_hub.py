"""Datasets of the hub, row by row, through the `datasets` library.

Rows are streamed: only the split that is asked for is fetched, and no more of it at a time than a piece. Nothing of a
dataset is run; its files are Parquet, Arrow, JSON, CSV or text of its own repository, whatever its configuration names.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from bathyscope.datasets._mmlu import subjects_of
from bathyscope.datasets._rows import Rows, drawn, fault
from bathyscope.errors import DatasetOutOfReach, NotBuilt
from bathyscope.types import DatasetRef, Input

Row = dict[str, Any]
"""`input`, and of `label`, `group`, `split` and `category` what there is."""

_BUILDERS = frozenset({"parquet", "arrow", "json", "csv", "text"})
_COLUMNS = ("input", "prompt", "choices", "answer", "label", "group", "split")
_INPUT: TypeAdapter[Any] = TypeAdapter(Input)
_CALL_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class _Known:
    """A dataset with a name of its own."""

    repository: str
    config: str
    splits: tuple[str, ...]
    default: str
    row: Callable[[Mapping[str, Any]], Row]


def _mmlu(row: Mapping[str, Any]) -> Row:
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"], strict=True))
    question = {
        "prompt": f"{row['question'].strip()}\n{listed}\nAnswer:",
        "choices": [" A", " B", " C", " D"],
        "answer": row["answer"],
    }
    return {"input": question, "category": row.get("subject") or ""}


def _truthful_qa(row: Mapping[str, Any]) -> Row:
    targets = row["mc1_targets"]
    question = {
        "prompt": f"Q: {row['question'].strip()}\nA:",
        "choices": [f" {choice.strip()}" for choice in targets["choices"]],
        "answer": list(targets["labels"]).index(1),
    }
    return {"input": question}


def _gsm8k(row: Mapping[str, Any]) -> Row:
    """The number after `####` is the answer; the way to it is left out."""
    answer = row["answer"].rpartition("####")[2].strip().replace(",", "")
    return {"input": {"prompt": f"Question: {row['question'].strip()}\nAnswer:", "answer": answer}}


KNOWN: dict[str, _Known] = {
    "mmlu": _Known("cais/mmlu", "all", ("test", "validation", "dev", "auxiliary_train"), "test", _mmlu),
    "truthful_qa": _Known("truthfulqa/truthful_qa", "multiple_choice", ("validation",), "validation", _truthful_qa),
    "gsm8k": _Known("openai/gsm8k", "main", ("train", "test"), "test", _gsm8k),
}


@dataclass(frozen=True, slots=True)
class Source:
    """Which rows of the hub a `DatasetRef` means, apart from which of them are taken."""

    repository: str
    config: str | None
    split: str
    revision: str | None
    row: Callable[[Mapping[str, Any]], Row]


def source_of(ref: DatasetRef) -> Source:
    """Where the rows are. Raises `InvalidRequest` for a split or a category that is not there."""
    known = KNOWN.get(ref.name or "")
    if known is None:
        columns = ref.columns
        return Source(
            (ref.name or "").removeprefix("hub:"),
            ref.config,
            ref.split or "test",
            ref.revision,
            lambda row: _mapped(row, columns),
        )
    split = ref.split or known.default
    if ref.name == "mmlu" and split == "train":
        split = "auxiliary_train"
    if split not in known.splits:
        raise fault("split", f"{ref.name} has no split {split!r}; it has {', '.join(known.splits)}")
    if ref.category is not None and subjects_of(ref.category) is None:
        raise fault("category", "stem, humanities, social_sciences, other, or one of MMLU's 57 subjects")
    return Source(known.repository, known.config, split, ref.revision, known.row)


def hub_rows(source: Source, most: int, folder: Path | None = None) -> Iterator[Row]:
    """The first `most` rows of a dataset of the hub, each checked; with a `folder` of `folder/ORG/NAME` in its place.

    Raises `DatasetOutOfReach`, `InvalidRequest` for what the dataset has not, and `NotBuilt` without the library.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise NotBuilt(
            "Datasets of the hub are read with the `datasets` library: install bathyscope[datasets]."
        ) from error
    from datasets.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()
    # Without a folder the library would take one of the repository's name that lies here.
    path, revision = (
        (str((folder / source.repository).resolve()), None)
        if folder is not None
        else (source.repository, _found(source))
    )
    prefix = f"{path}/" if folder is not None else f"hf://datasets/{source.repository}@{revision}/"
    if folder is not None and not Path(path).is_dir():
        raise fault("name", f"the service's folder of datasets has no {source.repository}")
    try:
        builder = datasets.load_dataset_builder(path, source.config, revision=revision, token=False)
    except ValueError as error:
        raise fault("config", _said(error)) from error
    except Exception as error:
        raise _of(error, source) from error
    kind = type(builder).__module__.rpartition(".")[2]
    files = {split: list(names) for split, names in (builder.config.data_files or {}).items()}
    if kind not in _BUILDERS or not files:
        raise fault("name", f"its files are of kind {kind}; Parquet, Arrow, JSON, CSV and text are read")
    if not all(str(name).startswith(prefix) for names in files.values() for name in names):
        raise fault("name", "its configuration names files elsewhere than in its own repository")
    if source.split not in files:
        raise fault("split", f"there is no split {source.split!r}; there are {', '.join(map(str, files))}")
    try:
        for number, row in enumerate(builder.as_streaming_dataset(split=source.split)):
            if number == most:
                return
            yield _checked(number, row, source.row)
    except datasets.exceptions.DatasetGenerationError as error:
        raise _of(error.__cause__ or error, source) from error
    except (OSError, TimeoutError) as error:
        raise _of(error, source) from error


def _found(source: Source) -> str:
    """The commit that a revision stands for, which also says soon whether the hub is there."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        found = HfApi(token=False).dataset_info(source.repository, revision=source.revision, timeout=_CALL_SECONDS)
    except RevisionNotFoundError as error:
        raise fault("revision", f"{source.repository} has no revision {source.revision!r}") from error
    except RepositoryNotFoundError as error:
        raise fault("name", f"the hub has no {source.repository}, or it is private") from error
    except Exception as error:
        raise _of(error, source) from error
    if found.gated:
        raise fault("name", f"{source.repository} is gated: it is read by those whom its owner lets; upload its rows")
    if found.sha is None:
        raise DatasetOutOfReach(f"The hub did not say which commit {source.repository} is at.", retry_after=30)
    return found.sha


def _of(error: BaseException, source: Source) -> Exception:
    """What becomes of a fault of the library."""
    if isinstance(error, FileNotFoundError):
        return fault("name", f"{source.repository} has no files of rows")
    if isinstance(error, OSError) or type(error).__module__.split(".")[0] in ("httpx", "httpx2", "huggingface_hub"):
        return DatasetOutOfReach(
            f"{source.repository} could not be read from the hub ({type(error).__name__}); try again later, or upload "
            "its rows.",
            retry_after=30,
        )
    return fault("name", f"the library cannot read {source.repository}: {_said(error)}")


def _said(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _checked(number: int, row: Any, shaped: Callable[[Mapping[str, Any]], Row]) -> Row:
    try:
        found = shaped(row)
        _INPUT.validate_python(found["input"])
    except KeyError as error:
        raise fault(
            "columns", f"there is no column {error}; there are {', '.join(map(repr, list(row)[:20]))}"
        ) from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise fault("columns", f"row {number + 1:,} is no input: {first['msg']}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise fault("columns", f"row {number + 1:,} has not the form that is expected: {_said(error)}") from None
    return found


def _mapped(row: Mapping[str, Any], columns: Mapping[Any, str] | None) -> Row:
    """A row by its columns; without a mapping those that have the names of what a row may have."""
    given = columns or {name: name for name in _COLUMNS if name in row}
    if not {"input", "prompt"} & set(given):
        raise KeyError("input")
    found = {name: row[column] for name, column in given.items()}
    shaped: Row = {name: found[name] for name in ("label", "group", "split") if name in found}
    for name, value in shaped.items():
        if not isinstance(value, bool | int | str | float) or (name != "label" and isinstance(value, bool | float)):
            raise ValueError(f"its {name} is no text or number")
    if "input" in found:
        given_input = found["input"]
        return {"input": {"messages": given_input} if isinstance(given_input, list) else given_input, **shaped}
    question: Row = {"prompt": found["prompt"], "answer": found.get("answer")}
    if (choices := found.get("choices")) is not None:
        names = None
        if isinstance(choices, dict):  # as ARC has them
            names, choices = list(choices["label"]), choices["text"]
        question["answer"] = _place(question["answer"], names, len(choices))
        spaced = not question["prompt"][-1:].isspace()
        question["choices"] = [
            f" {choice}" if spaced and not choice[:1].isspace() else choice for choice in map(str, choices)
        ]
    elif not isinstance(question["answer"], str):
        question["answer"] = str(question["answer"])
    return {"input": question, **shaped}


def _place(answer: Any, names: list[Any] | None, count: int) -> Any:
    """The index of the right choice, which may be given by its letter or name."""
    if isinstance(answer, str) and names is not None and answer in names:
        return names.index(answer)
    if isinstance(answer, str) and len(answer) == 1 and answer in string.ascii_uppercase[:count]:
        return string.ascii_uppercase.index(answer)
    return int(answer) if isinstance(answer, str) and answer.isascii() and answer.isdigit() else answer


def taken(rows: Iterator[Row], ref: DatasetRef) -> Rows:
    """Of a source's rows those that `ref` asks for. Raises `InvalidRequest` where there are none."""
    subjects = subjects_of(ref.category) if ref.category is not None else None
    found = [row for row in rows if subjects is None or row.get("category") in subjects]
    if not found:
        raise fault("category" if subjects else "name", "there are no such rows")
    places = drawn(len(found), ref.limit, ref.seed)
    kept = found if places is None else [found[place] for place in places]

    def column(name: str) -> list[Any] | None:
        return [row[name] for row in kept] if all(name in row for row in kept) else None

    return Rows([row["input"] for row in kept], column("label"), column("group"), column("split"))
