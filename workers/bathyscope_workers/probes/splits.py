"""Who is tested with whom: folds in which no group and no duplicate sits on both sides.

Rows are first tied into *clusters*, transitively: rows of one group, rows whose inputs are the same, and rows whose
inputs are nearly the same (`near_duplicates`). A cluster goes to one fold as a whole, whatever the kind of split:

- `stratified` and `grouped`: clusters are dealt out in a seeded random order, large ones first, each to the fold that
  has least of its classes so far (greedy minimisation of sum over folds and classes of the squared share of the class
  that the fold holds); ties go to the fold with fewer rows. With clusters of one row this is plain stratification.
  The values of a regression are cut into quantiles and dealt like classes. `grouped` is what this is called when groups
  are given; asked for by name, it insists on them.
- `random`: in a seeded random order, each to the fold with fewest rows; the classes fall as they fall.
- given: the caller's own.

Where an order leaves a fold without a class, others are tried before the request is refused.
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

from bathyscope._fold_checks import check_folds, fixes_a_line, given_folds, torn
from bathyscope._targets import Targets, encode_groups, first_seen_codes, refused
from bathyscope_workers.probes.near_duplicates import NearDuplicates

_ORDERS = 32
"""Random orders tried before folds are said to be impossible."""

_QUANTILES = 10
"""Parts at most into which the values of a regression are cut, to be dealt evenly."""

Kind = Literal["given", "random", "stratified", "grouped"]
KINDS = ("random", "stratified", "grouped")
"""Splits that are asked for by name."""


@dataclass(frozen=True)
class Folds:
    """Which rows are held out together."""

    kind: Kind
    """How they came about."""

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
    split: Sequence[Any] | str | None = None,
    keys: Sequence[Hashable] | None = None,
    near: NearDuplicates | None = None,
    seed: int = 0,
) -> Folds:
    """Folds for the rows of `targets`.

    `groups`, `keys` (see `input_keys`) and `near` name what must stay together, one a row. `split` is `random`,
    `stratified` or `grouped`, or the caller's own: for each row `train` or `test`, or the number of its fold (`train`
    rows are then trained on in every fold). None is `grouped` with groups, else `stratified`.
    Raises `InvalidRequest` pointing at `/labels`, `/groups`, `/folds` or `/split`.
    """
    rows = len(targets.codes)
    group_codes = np.arange(rows) if groups is None else encode_groups(groups, rows)
    clusters, notes = _tie(targets, group_codes, keys, near)
    if split is not None and not isinstance(split, str):
        assignment, count = given_folds(targets, group_codes, split)
        leaking = torn(clusters, assignment)
        if len(leaking):
            notes.append(
                f"Leakage: the split given has {len(leaking)} rows whose input, or one that is nearly the same, is on "
                "the other side too: held-out figures are too good."
            )
        return Folds("given", assignment, clusters, count, seed, tuple(notes))
    kind = _kind(split, groups is not None)
    pointer = "/labels" if groups is None else "/groups"
    check_folds(targets, clusters, folds, pointer, every_class=kind != "random")
    strata = _strata(targets, folds)
    for attempt in range(_ORDERS):
        rng = np.random.default_rng([seed, attempt])
        assignment = _deal(strata, clusters, folds, rng, evenly=kind != "random")
        if _usable(targets, assignment, folds, held_out=kind != "random"):
            break
    else:
        needed = "rows of every class" if targets.classes else "rows, and the rest values that differ"
        raise refused(
            pointer,
            f"no way was found to give each of {folds} folds {needed}; ask for fewer folds, or give more and smaller "
            "groups",
        )
    return Folds(kind, assignment, clusters, folds, seed, tuple(notes))


def inner_folds(targets: Targets, outer: Folds, train: NDArray[np.int64], fold: int, *, folds: int = 3) -> Folds:
    """Folds of the training rows alone, by which a layer and a penalty are chosen for one outer fold.

    Indices of the result count within `train`. As many folds as there are clusters of the rarest class, at most
    `folds`, dealt evenly. Raises `InvalidRequest` where not even two are possible.
    """
    part = targets.of(train)
    clusters = first_seen_codes(outer.clusters[train].tolist())
    per_class = min(len(np.unique(clusters[part.codes == code])) for code in range(max(len(targets.classes), 1)))
    for count in range(min(folds, per_class), 1, -1):
        strata = _strata(part, count)
        for attempt in range(_ORDERS):
            rng = np.random.default_rng([outer.seed, 1 + fold, count, attempt])
            assignment = _deal(strata, clusters, count, rng)
            if _usable(part, assignment, count):
                return Folds("grouped", assignment, clusters, count, outer.seed)
    raise refused(
        "/folds",
        "the training rows of a fold cannot be split again, which is how a layer, a penalty and a calibrator are "
        "chosen without the held-out rows: give more rows or groups of the rarest class, or ask for one layer, one C "
        "and no calibration",
    )


def _kind(asked: str | None, grouped: bool) -> Kind:
    if asked is None:
        return "grouped" if grouped else "stratified"
    if asked not in KINDS:
        raise refused("/split", f"a split is {', '.join(KINDS)}, or one entry a row; it is {asked!r}")
    if asked == "grouped" and not grouped:
        raise refused("/split", "a grouped split needs groups: name one a row, or ask for stratified")
    return asked  # type: ignore[return-value]


def _tie(
    targets: Targets, groups: NDArray[np.int64], keys: Sequence[Hashable] | None, near: NearDuplicates | None
) -> tuple[NDArray[np.int64], list[str]]:
    """Clusters: connected components of "same group", "same input" and "nearly the same input"."""
    rows = len(groups)
    joined, notes = first_seen_codes(groups.tolist()), []
    if keys is not None:
        if len(keys) != rows:
            raise ValueError(f"{len(keys)} keys for {rows} rows")
        inputs = first_seen_codes(keys)
        distinct = int(inputs.max()) + 1
        if distinct < rows:
            joined = _join(joined, inputs)
            notes.append(
                f"{rows - distinct} of {rows} rows repeat the input of an earlier row exactly; repeats stay on one "
                "side of every split."
            )
            conflicts = (
                len({(int(a), a_label) for a, a_label in zip(inputs, targets.y.tolist(), strict=True)}) - distinct
            )
            if conflicts:
                notes.append(f"Inputs that occur with more than one label: {conflicts}.")
    if near is not None:
        if len(near.clusters) != rows:
            raise ValueError(f"near-duplicates of {len(near.clusters)} inputs for {rows} rows")
        before = int(joined.max()) + 1
        joined = _join(joined, near.clusters)
        tied = before - int(joined.max()) - 1
        if tied:
            notes.append(
                f"Inputs that are nearly the same tie {before} groups or inputs to {before - tied}, each of which "
                "stays on one side of every split."
            )
        if near.alike and not len(np.unique(groups)) < rows:
            notes.append(
                f"{near.alike} inputs are, but for some words, the same as more than a fifth of the others. Of one "
                "template they are rightly told apart; copies of one text are not: name groups, which stay together."
            )
        if not near.complete:
            notes.append("So many inputs share phrases that not every pair was compared for being nearly the same.")
    return joined, notes


def _join(one: NDArray[np.int64], other: NDArray[np.int64]) -> NDArray[np.int64]:
    """The finest clusters of which those of both are parts."""
    size = int(one.max()) + 1
    whole = size + int(other.max()) + 1
    edges = coo_array((np.ones(len(one)), (one, size + other)), shape=(whole, whole))
    _, component = connected_components(edges, directed=False)
    return first_seen_codes(component[one].tolist())


def _strata(targets: Targets, folds: int) -> NDArray[np.int64]:
    """What is dealt evenly: classes, or quantiles of a regression's values with a few rows a fold each."""
    if targets.values is None:
        return targets.codes
    parts = int(np.clip(len(targets.values) // (2 * folds), 1, _QUANTILES))
    ranks = np.empty(len(targets.values), dtype=np.int64)
    ranks[np.argsort(targets.values, kind="stable")] = np.arange(len(ranks))
    return ranks * parts // len(ranks)


def _deal(
    strata: NDArray[np.int64], clusters: NDArray[np.int64], folds: int, rng: np.random.Generator, *, evenly: bool = True
) -> NDArray[np.int64]:
    """Deal clusters to folds; the fold of each row. Not `evenly` looks at the number of rows only."""
    if not evenly:
        strata = np.zeros_like(strata)
    total = int(clusters.max()) + 1
    content = np.zeros((total, int(strata.max()) + 1))
    np.add.at(content, (clusters, strata), 1.0)
    sizes = content.sum(axis=1)
    order = rng.permutation(total)
    order = order[np.argsort(-sizes[order], kind="stable")]
    share = 1.0 / content.sum(axis=0) ** 2
    held = np.zeros((folds, content.shape[1]))
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


def _usable(targets: Targets, assignment: NDArray[np.int64], folds: int, *, held_out: bool = True) -> bool:
    """Whether every training side can be learned from, and (`held_out`) every fold has each class."""
    if targets.values is not None:
        sizes = np.bincount(assignment, minlength=folds)
        return bool(sizes.min() > 0) and all(fixes_a_line(targets.values[assignment != fold]) for fold in range(folds))
    counts = np.zeros((folds, len(targets.classes)), dtype=np.int64)
    np.add.at(counts, (assignment, targets.codes), 1)
    if held_out:
        return bool(counts.min() > 0)
    return bool((counts.sum(axis=0) - counts).min() > 0 and counts.sum(axis=1).min() > 0)
