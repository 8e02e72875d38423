"""Folds that are impossible whatever the inputs are: by labels, groups and a split of the caller's own.

The front end refuses by these at once what a worker would refuse after the states were made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bathyscope._targets import Targets, encode_groups, encode_labels, refused, spread_out

MAX_FOLDS = 50
"""Folds of a split of the caller's own."""

MIN_TRAINING_ROWS = 3
"""Of a regression's training side: fewer fix no line."""


def check_rows(
    labels: Sequence[Any],
    *,
    task: str = "auto",
    groups: Sequence[Any] | None = None,
    split: Sequence[Any] | str | None = None,
    folds: int = 5,
) -> str:
    """The task that labels are: `binary`, `multiclass` or `regression`.

    Raises `InvalidRequest` for labels, groups and a split, one entry a row each, of which no probe can be
    learned. Where inputs repeat, or are nearly the same, a worker may find more.
    """
    targets = encode_labels(labels, len(labels), task=task)
    codes = np.arange(len(labels)) if groups is None else encode_groups(groups, len(labels))
    if split is not None and not isinstance(split, str):
        given_folds(targets, codes, split)
    else:
        check_folds(targets, codes, folds, "/labels" if groups is None else "/groups", every_class=split != "random")
    return targets.task


def check_folds(
    targets: Targets, clusters: NDArray[np.int64], folds: int, pointer: str, *, every_class: bool = True
) -> None:
    """Raise `InvalidRequest` where so many folds cannot each hold a cluster of every class, whoever deals them.

    Not `every_class` asks only that each class can be learned in every fold: some of it is outside, whichever is held
    out. `clusters` are those of the rows; `pointer` is `/groups` where they are groups of the caller's.
    """
    if not 2 <= folds <= len(clusters):
        raise refused("/folds", f"folds is between 2 and the number of rows ({len(clusters)}); it is {folds}")
    total = int(clusters.max()) + 1
    what = "groups" if pointer == "/groups" else "different inputs"
    tied = "" if total == len(clusters) else "; repeated and nearly equal inputs count once (see near_duplicates)"
    if total < folds:
        more = "name more" if pointer == "/groups" else "give more inputs that differ"
        remedy = f"; ask for at most {total} folds" if total > 1 else f", and 2 at least are needed; {more}"
        raise refused(pointer, f"there are {total} {what} for {folds} folds{remedy}{tied}")
    for code, label in enumerate(targets.classes):
        members = targets.codes == code
        held = len(np.unique(clusters[members]))
        if not every_class:
            if held < 2:
                raise refused(
                    pointer,
                    f"class {label!r} has {int(members.sum())} rows in one of the {what}, so the fold that holds them "
                    f"would be scored by a probe that never saw it; give more of that class{tied}",
                )
        elif held < folds:
            fewer = f", or ask for at most {held} folds" if held > 1 else ""
            raise refused(
                pointer,
                f"class {label!r} has {int(members.sum())} rows in {held} {what}, so one of {folds} folds would have "
                f"none of it; give more of that class{fewer}{tied}",
            )


def given_folds(targets: Targets, groups: NDArray[np.int64], split: Sequence[Any]) -> tuple[NDArray[np.int64], int]:
    """The fold of each row by a split of the caller's own, -1 for `train`, and the number of folds.

    Raises `InvalidRequest` for one that tears a group, or leaves a side that cannot be learned from or scored.
    """
    rows = len(targets.codes)
    if len(split) != rows:
        raise refused("/split", f"give one entry a row: there are {len(split)} for {rows} rows")
    for row, name in enumerate(split):
        number = isinstance(name, int | np.integer) and not isinstance(name, bool)
        if not number and name not in ("train", "test"):
            raise refused(f"/split/{row}", "an entry is train, test or the number of a fold")
    names = sorted({name for name in split if name != "train"}, key=lambda name: (str(type(name)), name))
    if len(names) > MAX_FOLDS:
        raise refused("/split", f"the split names {len(names)} folds; at most {MAX_FOLDS} are fitted")
    if not names or (len(names) == 1 and "train" not in split):
        raise refused("/split", "the split leaves no rows to train on or none to test on: name both")
    index: dict[Any, int] = {name: fold for fold, name in enumerate(names)} | {"train": -1}
    assignment = np.array([index[name] for name in split], dtype=np.int64)
    apart = torn(groups, assignment)
    if len(apart):
        raise refused(
            f"/split/{apart[0]}",
            f"{len(apart)} rows have rows of their own group on the other side of the split: keep each whole",
        )
    for fold, name in enumerate(names):
        for side, mask in (("held-out", assignment == fold), ("training", assignment != fold)):
            present = np.bincount(targets.codes[mask], minlength=max(len(targets.classes), 1))
            if present.min() == 0:
                missing = targets.classes[int(present.argmin())]
                raise refused("/split", f"the {side} rows of {name!r} have no row of class {missing!r}: put some there")
            if targets.values is not None and side == "training" and not fixes_a_line(targets.values[mask]):
                raise refused(
                    "/split",
                    f"the training rows of {name!r} have too few different values to learn from: put more there",
                )
    return assignment, len(names)


def torn(clusters: NDArray[np.int64], assignment: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of clusters that lie in more than one fold."""
    size = int(clusters.max()) + 1
    low, high = np.full(size, np.iinfo(np.int64).max), np.full(size, np.iinfo(np.int64).min)
    np.minimum.at(low, clusters, assignment)
    np.maximum.at(high, clusters, assignment)
    return np.flatnonzero((low != high)[clusters])


def fixes_a_line(values: NDArray[np.float64]) -> bool:
    """Whether a regression can be learned from these values."""
    return len(values) >= MIN_TRAINING_ROWS and spread_out(values)
