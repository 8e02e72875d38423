"""Labels and groups as they come over the wire, turned into whole-number codes, or into values for regression.

Classes are ordered (False before True, numbers by value, strings by code point), so that the same labels give
the same codes whatever order the rows are in. In a binary task the second class is the positive one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bathyscope.errors import FieldError, InvalidRequest

Task = Literal["binary", "multiclass", "regression"]
ClassLabel = bool | int | str

MAX_CLASSES = 256
"""More classes than this are taken for a mistake: a regression target, or identifiers."""

LARGEST_VALUE = 1e100
"""A regression target beyond this is refused: its square, summed over the rows, has to be a number."""

SMALLEST_SPREAD = 1e-100
"""The values of a regression lie this far apart at least, or the squares of their differences are 0."""

_TASKS = ("auto", "binary", "multiclass", "regression")

_MAX_ERRORS = 16
"""Faulty rows named in one refusal."""


@dataclass(frozen=True)
class Targets:
    """What a probe learns: classes as codes, or values."""

    task: Task
    """`binary` with two classes, `multiclass` with more, `regression` with values."""

    classes: tuple[ClassLabel, ...]
    """The labels in the order of their codes; none for regression."""

    codes: NDArray[np.int64]
    """One a row: the index of the row's label in `classes`; 0 for regression."""

    values: NDArray[np.float64] | None = None
    """One a row, for regression; None for classes."""

    @property
    def y(self) -> NDArray[Any]:
        """What estimators and metrics take: codes, or the values of a regression."""
        return self.codes if self.values is None else self.values

    @property
    def counts(self) -> list[int]:
        """Rows of each class, in the order of `classes`."""
        return [int(count) for count in np.bincount(self.codes, minlength=len(self.classes))] if self.classes else []

    def of(self, rows: NDArray[Any]) -> Targets:
        """Those of some rows."""
        return replace(self, codes=self.codes[rows], values=None if self.values is None else self.values[rows])


def encode_labels(labels: Sequence[Any], rows: int, *, task: str = "auto") -> Targets:
    """The classes of `labels` and the code of each row, or their values.

    Class labels are booleans, whole numbers (2.0 counts as 2) or strings, all of one kind; for regression they are
    numbers. `auto` means regression when numbers are not whole. Raises `InvalidRequest` pointing at `/labels`,
    `/labels/<row>` or `/task` for a wrong length, a missing value, one out of range, mixed kinds, or labels that are
    all the same.
    """
    if task not in _TASKS:
        raise refused("/task", f"task is one of {', '.join(_TASKS)}; it is {task!r}")
    values = [_plain(label) for label in labels]
    if len(values) != rows:
        raise refused("/labels", f"give one label a row: there are {len(values)} labels for {rows} rows")
    faults = [
        FieldError(pointer=f"/labels/{row}", detail=fault)
        for row, value in enumerate(values)
        if (fault := _fault(value)) is not None
    ]
    if faults:
        raise InvalidRequest(
            f"{len(faults)} of {rows} labels cannot be used: each row needs a boolean, a number or a string.",
            errors=faults[:_MAX_ERRORS],
        )
    kinds = {_kind(value) for value in values}
    if len(kinds) > 1:
        raise refused("/labels", f"labels are of one kind; these mix {' and '.join(sorted(kinds))}: write them alike")
    if task == "regression":
        return _values(values, kinds)
    if kinds == {"numbers"}:
        if any(isinstance(value, float) and not value.is_integer() for value in values):
            if task == "auto":
                return _values(values, kinds)
            raise refused(
                "/labels",
                f"classes are booleans, whole numbers or strings, for a {task} task, and these are not; for values "
                "set task to regression",
            )
        values = [int(value) for value in values]
        _refuse_rows(
            "Classes are whole numbers of 64 bits; use strings for longer ones.",
            "the whole number has more than 64 bits; as a class write it as a string",
            [row for row, value in enumerate(values) if not -(2**63) <= value < 2**64],
        )
    classes = tuple(sorted(set(values)))
    if len(classes) < 2:
        found = f"every label is {classes[0]!r}: give rows of another class too" if classes else "there are no rows"
        raise refused("/labels", f"a probe needs two classes at least; {found}")
    if len(classes) > MAX_CLASSES:
        hint = "; if they are measurements, set task to regression" if kinds == {"numbers"} else ""
        raise refused("/labels", f"there are {len(classes)} different labels; at most {MAX_CLASSES} classes fit{hint}")
    if task == "binary" and len(classes) > 2:
        raise refused("/labels", f"a binary task has two classes; these labels have {len(classes)}: set task to auto")
    index = {label: code for code, label in enumerate(classes)}
    codes = np.fromiter((index[value] for value in values), dtype=np.int64, count=rows)
    return Targets(task="binary" if len(classes) == 2 else "multiclass", classes=classes, codes=codes)


def _values(values: list[Any], kinds: set[str]) -> Targets:
    if kinds != {"numbers"}:
        found = f"these are {kinds.pop()}" if kinds else "there are no rows"
        raise refused("/labels", f"a regression needs numbers; {found}")
    _refuse_rows(
        "Labels are too large to compute with; rescale them.",
        f"the number is beyond {LARGEST_VALUE:g}",
        [row for row, value in enumerate(values) if abs(value) > LARGEST_VALUE],
    )
    numbers = np.array([float(value) for value in values])
    if numbers.min() == numbers.max():
        raise refused(
            "/labels", f"a regression needs labels that differ; every one is {values[0]!r}: give rows of other values"
        )
    if not spread_out(numbers):
        raise refused("/labels", f"all labels lie within {SMALLEST_SPREAD:g} of each other; rescale them")
    return Targets("regression", (), np.zeros(len(numbers), dtype=np.int64), numbers)


def spread_out(values: NDArray[np.float64]) -> bool:
    """Whether values differ by enough to compute with."""
    return bool(values.max() - values.min() >= SMALLEST_SPREAD)


def encode_groups(groups: Sequence[Any], rows: int) -> NDArray[np.int64]:
    """A code for each row's group, numbered by first appearance; 1 and "1" are two groups.

    Raises `InvalidRequest` pointing at `/groups` or `/groups/<row>`.
    """
    values = [_plain(group) for group in groups]
    if len(values) != rows:
        raise refused("/groups", f"give one group a row: there are {len(values)} groups for {rows} rows")
    faults = [
        FieldError(pointer=f"/groups/{row}", detail="a group is a whole number or a string")
        for row, value in enumerate(values)
        if isinstance(value, float) or not isinstance(value, int | str)
    ]
    if faults:
        raise InvalidRequest(f"{len(faults)} of {rows} groups cannot be used.", errors=faults[:_MAX_ERRORS])
    return first_seen_codes([(type(value).__name__, value) for value in values])


def first_seen_codes(values: Sequence[Any]) -> NDArray[np.int64]:
    """Each value's number in the order of first appearance."""
    index: dict[Any, int] = {}
    return np.fromiter((index.setdefault(value, len(index)) for value in values), np.int64, count=len(values))


def _refuse_rows(sentence: str, detail: str, rows: Sequence[int]) -> None:
    if rows:
        errors = [FieldError(pointer=f"/labels/{row}", detail=detail) for row in rows[:_MAX_ERRORS]]
        raise InvalidRequest(sentence, errors=errors)


def refused(pointer: str, detail: str) -> InvalidRequest:
    """A refusal with one fault."""
    return InvalidRequest(detail[0].upper() + detail[1:] + ".", errors=[FieldError(pointer=pointer, detail=detail)])


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _fault(value: Any) -> str | None:
    if value is None:
        return "the label is missing"
    if not isinstance(value, bool | int | float | str):
        return "a label is a boolean, a number or a string"
    if isinstance(value, float) and not math.isfinite(value):
        return "the label is not a finite number"
    return None


def _kind(value: bool | int | float | str) -> str:
    if isinstance(value, bool):
        return "booleans"
    return "strings" if isinstance(value, str) else "numbers"
