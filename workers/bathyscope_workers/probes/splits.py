"""Who is tested with whom: folds in which no group and no duplicate sits on both sides.

Rows are first tied into *clusters*: rows of one group, and rows whose inputs are exactly the same, transitively.
A cluster goes to one fold as a whole. Clusters are dealt out in a seeded random order, large ones first, each to
the fold that has least of its classes so far (greedy minimisation of sum over folds and classes of the squared
share of the class that the fold holds); ties go to the fold with fewer rows. With clusters of one row this is
plain stratification. Where the greedy order leaves a fold without a class, other orders are tried before the
request is refused.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from bathyscope_workers.probes.targets import Targets, encode_groups, first_seen_codes, refused

_ORDERS = 32
"""Random orders tried before folds are said to be impossible."""

Kind = Literal["given", "stratified", "grouped"]


@dataclass(frozen=True)
class Folds:
    """Which rows are held out together."""

    kind: Kind
    """`given` by the caller, `stratified` row by row, or `grouped` cluster by cluster."""

    assignment: NDArray[np.int64]
    """The fold of each row; -1 for a row that is only ever trained on (a given split's `train`)."""

    clusters: NDArray[np.int64]
    """The cluster of each row: what must stay on one side, and what the bootstrap draws."""

    count: int
    """Number of folds."""

    seed: int
    """Seed of the order in which clusters were dealt."""

    warnings: tuple[str, ...] = field(default=())
    """What a careful reader should know of the split."""

    def __iter__(self) -> Any:
        """Yield (training rows, held-out rows) of each fold, as sorted indices."""
        for fold in range(self.count):
            yield np.flatnonzero(self.assignment != fold), np.flatnonzero(self.assignment == fold)

    @property
    def held_out(self) -> NDArray[np.int64]:
        """The rows that are scored: every row, or those of a given split's test side."""
        return np.flatnonzero(self.assignment >= 0)

    def record(self) -> dict[str, Any]:
        """What the report says of the folds; `sha256` is over the assignment as little-endian int64."""
        return {
            "kind": self.kind,
            "count": self.count,
            "sizes": [int(np.sum(self.assignment == fold)) for fold in range(self.count)],
            "training_only": int(np.sum(self.assignment < 0)),
            "clusters": int(self.clusters.max()) + 1,
            "seed": self.seed,
            "sha256": hashlib.sha256(self.assignment.astype("<i8").tobytes()).hexdigest(),
        }


def input_keys(token_ids: NDArray[Any], offsets: NDArray[Any]) -> list[bytes]:
    """One key an input, equal for inputs of equal tokens.

    `token_ids` (tokens,) and `offsets` (inputs + 1,) are those of an extraction.
    """
    ids = np.ascontiguousarray(token_ids, dtype=np.int64)
    return [hashlib.sha256(ids[start:stop].tobytes()).digest() for start, stop in itertools.pairwise(offsets.tolist())]


def make_folds(
    targets: Targets,
    *,
    folds: int = 5,
    groups: Sequence[Any] | None = None,
    split: Sequence[Any] | None = None,
    keys: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> Folds:
    """Folds for the rows of `targets`.

    `groups` and `keys` (see `input_keys`) name what must stay together, one a row. `split` is the caller's own:
    for each row `train` or `test`, or the number of its fold (`train` rows are then trained on in every fold).
    Raises `InvalidRequest` pointing at `/labels`, `/groups`, `/folds` or `/split`.
    """
    rows = len(targets.codes)
    group_codes = np.arange(rows) if groups is None else encode_groups(groups, rows)
    clusters, notes = _tie(targets, group_codes, keys)
    if split is not None:
        return _given(targets, group_codes, clusters, split, seed, tuple(notes))
    if not 2 <= folds <= rows:
        raise refused("/folds", f"folds is between 2 and the number of rows ({rows}); it is {folds}")
    pointer = "/labels" if groups is None else "/groups"
    _check_possible(targets, clusters, folds, pointer)
    for attempt in range(_ORDERS):
        rng = np.random.default_rng([seed, attempt])
        assignment = _deal(targets.codes, clusters, len(targets.classes), folds, rng)
        if _class_counts(targets, assignment, folds).min() > 0:
            break
    else:
        raise refused(
            pointer,
            f"no way was found to give each of {folds} folds rows of every class; ask for fewer folds, or give "
            "more and smaller groups",
        )
    kind: Kind = "stratified" if clusters.max() + 1 == rows else "grouped"
    return Folds(kind, assignment, clusters, folds, seed, tuple(notes))


def inner_folds(targets: Targets, outer: Folds, train: NDArray[np.int64], fold: int, *, folds: int = 3) -> Folds:
    """Folds of the training rows alone, by which a layer and a penalty are chosen for one outer fold.

    Indices of the result count within `train`. As many folds as there are clusters of the rarest class, at most
    `folds`. Raises `InvalidRequest` where not even two are possible.
    """
    codes = targets.codes[train]
    clusters = first_seen_codes(outer.clusters[train].tolist())
    part = Targets(targets.task, targets.classes, codes)
    per_class = min(len(np.unique(clusters[codes == k])) for k in range(len(targets.classes)))
    for count in range(min(folds, per_class), 1, -1):
        for attempt in range(_ORDERS):
            rng = np.random.default_rng([outer.seed, 1 + fold, count, attempt])
            assignment = _deal(codes, clusters, len(targets.classes), count, rng)
            if _class_counts(part, assignment, count).min() > 0:
                return Folds("grouped", assignment, clusters, count, outer.seed)
    raise refused(
        "/folds",
        "the training rows of a fold cannot be split again, which is how a layer and a penalty are chosen without "
        "the held-out rows: give more rows or groups of the rarest class, or ask for one layer and one C",
    )


def _tie(
    targets: Targets, groups: NDArray[np.int64], keys: Sequence[Hashable] | None
) -> tuple[NDArray[np.int64], list[str]]:
    """Clusters: connected components of "same group" and "same input"."""
    if keys is None:
        return first_seen_codes(groups.tolist()), []
    rows = len(groups)
    if len(keys) != rows:
        raise ValueError(f"{len(keys)} keys for {rows} rows")
    inputs = first_seen_codes(keys)
    n_groups, n_inputs = int(groups.max()) + 1, int(inputs.max()) + 1
    if n_inputs == rows:
        return first_seen_codes(groups.tolist()), []
    size = n_groups + n_inputs
    edges = coo_array((np.ones(rows), (groups, n_groups + inputs)), shape=(size, size))
    _, component = connected_components(edges, directed=False)
    notes = [
        f"{rows - n_inputs} of {rows} rows repeat the input of an earlier row exactly; repeats stay on one side "
        "of every split."
    ]
    labelled = {(int(a), int(b)) for a, b in zip(inputs, targets.codes, strict=True)}
    conflicts = len(labelled) - n_inputs
    if conflicts:
        notes.append(f"Inputs that occur with more than one label: {conflicts}.")
    return first_seen_codes(component[groups].tolist()), notes


def _given(
    targets: Targets,
    groups: NDArray[np.int64],
    clusters: NDArray[np.int64],
    split: Sequence[Any],
    seed: int,
    notes: tuple[str, ...],
) -> Folds:
    rows = len(targets.codes)
    if len(split) != rows:
        raise refused("/split", f"give one entry a row: there are {len(split)} for {rows} rows")
    for row, name in enumerate(split):
        number = isinstance(name, int | np.integer) and not isinstance(name, bool)
        if not number and name not in ("train", "test"):
            raise refused(f"/split/{row}", "an entry is train, test or the number of a fold")
    names = sorted({name for name in split if name != "train"}, key=lambda name: (str(type(name)), name))
    if not names or (len(names) == 1 and "train" not in split):
        raise refused("/split", "the split leaves no rows to train on or none to test on")
    index: dict[Any, int] = {name: fold for fold, name in enumerate(names)} | {"train": -1}
    assignment = np.array([index[name] for name in split], dtype=np.int64)
    torn = _torn(groups, assignment)
    if len(torn):
        raise refused(
            f"/split/{torn[0]}", f"{len(torn)} rows have rows of their own group on the other side of the split"
        )
    for fold, name in enumerate(names):
        for side, mask in (("held-out", assignment == fold), ("training", assignment != fold)):
            present = np.bincount(targets.codes[mask], minlength=len(targets.classes))
            if present.min() == 0:
                missing = targets.classes[int(present.argmin())]
                raise refused("/split", f"the {side} rows of {name!r} have no row of class {missing!r}")
    torn = _torn(clusters, assignment)
    if len(torn):
        notes += (
            f"The split given has {len(torn)} rows whose exact input is on the other side too: held-out figures are "
            "too good.",
        )
    return Folds("given", assignment, clusters, len(names), seed, notes)


def _torn(clusters: NDArray[np.int64], assignment: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of clusters that lie in more than one fold."""
    size = int(clusters.max()) + 1
    low, high = np.full(size, np.iinfo(np.int64).max), np.full(size, np.iinfo(np.int64).min)
    np.minimum.at(low, clusters, assignment)
    np.maximum.at(high, clusters, assignment)
    return np.flatnonzero((low != high)[clusters])


def _check_possible(targets: Targets, clusters: NDArray[np.int64], folds: int, pointer: str) -> None:
    total = int(clusters.max()) + 1
    if total < folds:
        what = "groups" if pointer == "/groups" else "different inputs"
        raise refused(pointer, f"there are {total} {what} for {folds} folds; ask for at most {total} folds")
    for code, label in enumerate(targets.classes):
        members = targets.codes == code
        held = len(np.unique(clusters[members]))
        if held < folds:
            units = "groups" if pointer == "/groups" else "different inputs"
            fewer = f", or ask for at most {held} folds" if held > 1 else ""
            raise refused(
                pointer,
                f"class {label!r} has {int(members.sum())} rows in {held} {units}, so one of {folds} folds would have "
                f"none of it; give more of that class{fewer}",
            )


def _deal(
    codes: NDArray[np.int64], clusters: NDArray[np.int64], classes: int, folds: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Deal clusters to folds; the fold of each row."""
    total = int(clusters.max()) + 1
    content = np.zeros((total, classes))
    np.add.at(content, (clusters, codes), 1.0)
    sizes = content.sum(axis=1)
    order = rng.permutation(total)
    order = order[np.argsort(-sizes[order], kind="stable")]
    share = 1.0 / content.sum(axis=0) ** 2
    held = np.zeros((folds, classes))
    rows = np.zeros(folds)
    fold_of = np.empty(total, dtype=np.int64)
    for cluster in order:
        # Adding g to a fold that holds c raises the sum of squares by 2cg + g²; g² is the same for every fold.
        cost = held @ (content[cluster] * share)
        best = np.flatnonzero(cost <= cost.min() * (1 + 1e-12))
        fold = int(best[np.argmin(rows[best])])
        fold_of[cluster] = fold
        held[fold] += content[cluster]
        rows[fold] += sizes[cluster]
    return fold_of[clusters]


def _class_counts(targets: Targets, assignment: NDArray[np.int64], folds: int) -> NDArray[np.int64]:
    counts = np.zeros((folds, len(targets.classes)), dtype=np.int64)
    np.add.at(counts, (assignment, targets.codes), 1)
    return counts
