"""Logistic regression for many training sets of one layer and many penalties, sharing what can be shared.

- The states are centred and scaled once in float64 for all training sets; means and deviations of each come from two
  products with the sets' indicators.
- Each training set has one Gram matrix, in float32, for all its penalties, which are solved from the strongest to the
  weakest, each from the one before (`_newton_cg`).
- The result is finished in float64: scores come from the float64 states, a Newton step on the float32 Gram matrix
  corrects them, and so on until the gradient certifies the scores. The objective F, as a function of the weights, is
  strongly convex with modulus 1, so weights with gradient g are within |g| of the best ones, and the scores of a row z
  within |z||g|.
- What float32 cannot finish (a huge C on states that hardly differ) is reported as unfinished, for a slower solver.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bathyscope_workers.probes.estimators._base import Codes, Floats, Standardizer
from bathyscope_workers.probes.estimators._exact import SCORE_TOLERANCE, Solution
from bathyscope_workers.probes.estimators._newton_cg import Problems, Solved, newton_step, solve

Rows = NDArray[np.int64]

_LEAST = 1e-10

_FINE = 3e-4
_MAX_ROUNDS = 8
_BYTES = 2**28
"""Of Gram matrices and factorisations that are kept at a time."""


class SharedStates:
    """States of one layer (rows, hidden), prepared for many training sets."""

    def __init__(self, X: Floats, *, standardize: bool, device: torch.device) -> None:
        overall = Standardizer.fit(X)
        self._raw = X
        self.overall = overall
        self._standardize = standardize
        # Cloned, since numpy aligns its memory by chance, and the last bits of products depend on that.
        self.exact = torch.from_numpy(overall.transform(X)).clone().to(device)  # (rows, hidden), float64
        self.rough = self.exact.float()

    def standardizers(self, trainings: Sequence[Rows]) -> list[Standardizer]:
        """Of each training set, as `Standardizer.fit(X[rows])` gives."""
        member = torch.zeros(len(trainings), len(self.exact), dtype=torch.float64, device=self.exact.device)
        for number, rows in enumerate(trainings):
            member[number, torch.from_numpy(rows).to(member.device)] = 1 / len(rows)
        means = (member @ self.exact).cpu().numpy()
        squares = (member @ self.exact.square()).cpu().numpy()
        found = []
        for rows, mean, square in zip(trainings, means, squares, strict=True):
            raw_mean = self.overall.mean + self.overall.scale * mean
            if not self._standardize:
                found.append(Standardizer(raw_mean, np.ones_like(raw_mean)))
                continue
            variance = square - np.square(mean)
            # Where the difference has lost digits, or nothing is left of it, from the states themselves.
            lost = variance <= 1e-6 * square
            scale = self.overall.scale * np.sqrt(np.where(lost, 1.0, variance))
            if lost.any():
                again = Standardizer.fit(self._raw[np.ix_(rows, np.flatnonzero(lost))])
                raw_mean[lost], scale[lost] = again.mean, again.scale
            found.append(Standardizer(raw_mean, scale))
        return found


@torch.inference_mode()
def solve_path(
    shared: SharedStates,
    trainings: Sequence[Rows],
    standardizers: Sequence[Standardizer],
    y: Codes,
    classes: int,
    strengths: Sequence[float],
) -> list[list[Solution]]:
    """Fit each training set (rows of the shared states, every class among them) with each C.

    `y` holds the codes of all rows. The result is by training set, then by C in the order given; "converged" means that
    decision values are certain to be within `SCORE_TOLERANCE`.
    """
    found: dict[int, list[Solution]] = {}
    among_rows = [len(rows) <= shared.exact.shape[1] for rows in trainings]
    for kind in (True, False):
        places = [place for place, one in enumerate(among_rows) if one == kind]
        longest = max((len(trainings[place]) for place in places), default=1)
        width = longest if kind else shared.exact.shape[1]
        count = max(1, _BYTES // (4 * longest * width * (1 + len(strengths))))
        for first in range(0, len(places), count):
            some = places[first : first + count]
            sets = _Sets(
                shared, [trainings[place] for place in some], [standardizers[place] for place in some], y, classes
            )
            found.update(zip(some, sets.solve(strengths, among_rows=kind), strict=True))
    return [found[place] for place in range(len(trainings))]


def side_by_side(device: torch.device) -> bool:
    """Whether several training sets share each operation. On the CPU one at a time has its Gram matrix in the cache."""
    return device.type != "cpu"


class _Sets:
    """Training sets that are finished and checked together; shorter ones are padded."""

    def __init__(
        self,
        shared: SharedStates,
        trainings: Sequence[Rows],
        standardizers: Sequence[Standardizer],
        y: Codes,
        classes: int,
    ) -> None:
        device = shared.exact.device
        self.counts = [len(rows) for rows in trainings]
        longest = max(self.counts)
        self.shared = shared
        self.rows = torch.zeros(len(trainings), longest, dtype=torch.int64, device=device)
        self.mask = torch.zeros(len(trainings), 1, longest, device=device)
        for number, rows in enumerate(trainings):
            self.rows[number, : len(rows)] = torch.from_numpy(rows)
            self.mask[number, 0, : len(rows)] = 1
        mean = np.stack([(one.mean - shared.overall.mean) / shared.overall.scale for one in standardizers])
        unit = np.stack([shared.overall.scale / one.scale for one in standardizers])
        self.mean, self.unit = torch.from_numpy(mean).to(device), torch.from_numpy(unit).to(device)  # (sets, hidden)
        codes = torch.from_numpy(y).to(device)[self.rows]
        columns = torch.ones(1, dtype=torch.int64) if classes == 2 else torch.arange(classes)
        self.targets = (codes[:, None] == columns.to(device)[:, None]).float()  # (sets, columns, rows)

    def solve(self, strengths: Sequence[float], *, among_rows: bool) -> list[list[Solution]]:
        """By training set, then by C in the order given. `among_rows` seeks a in place of the weights."""
        order = np.argsort(strengths)
        C = torch.tensor([float(strengths[place]) for place in order], dtype=torch.float64, device=self.mask.device)
        step = len(self.rows) if side_by_side(self.mask.device) else 1
        parts = [_Part(self, slice(first, first + step), C, among_rows) for first in range(0, len(self.rows), step)]
        coef, intercept, bound = self._finish(parts, C)
        return [
            [
                (coef[number, place], intercept[number, place], bool(bound[number, place] <= SCORE_TOLERANCE))
                for place in np.argsort(order)
            ]
            for number in range(len(coef))
        ]

    def _finish(self, parts: Sequence[_Part], C: Tensor) -> tuple[Floats, Floats, Floats]:
        """In float64: coefficients (sets, penalties, columns, hidden), intercepts, and bounds on the relative error of
        scores (sets, penalties)."""
        x = torch.cat([part.x for part in parts]).double()
        b = torch.cat([part.b for part in parts]).double()
        reach = torch.cat([part.reach for part in parts])[:, None]
        strength = C[:, None, None]
        among_rows = parts[0].gram is not None
        before = torch.full(x.shape[:2], torch.inf, dtype=torch.float64, device=x.device)
        for number in range(_MAX_ROUNDS + 1):
            coef = self._weights(x) if among_rows else x
            scores = self._scores(coef, b)
            p = torch.sigmoid(scores) if x.shape[2] == 1 else torch.softmax(scores, dim=2)
            pull = strength * self.mask[:, None] * (self.targets[:, None] - p)
            residual, drift = (pull if among_rows else self._weights(pull)) - x, pull.sum(dim=3)
            gradient = torch.cat([part.norms(residual[part.sets]) for part in parts])
            curvature = (strength * self.mask[:, None] * p * (1 - p)).sum(dim=3)
            shift = drift.abs() / curvature.clamp_min(torch.finfo(torch.float64).tiny)
            spread = (scores - b[..., None]).abs().amax(dim=(2, 3)).clamp(_LEAST, 1)
            bound = (reach * gradient + shift.amax(dim=2)) / spread
            bound = torch.where(bound.isfinite(), bound, torch.inf)
            improving = (bound > SCORE_TOLERANCE) & (bound < before / 2)
            if number == _MAX_ROUNDS or not improving.any():
                break
            before = bound
            for part in parts:
                part.refine(x, b, p, residual, drift, improving)
        if x.shape[2] > 1:  # a shift of all classes' intercepts changes no probability
            b -= b.mean(dim=2, keepdim=True)
        return coef.cpu().numpy(), b.cpu().numpy(), bound.cpu().numpy()

    def _weights(self, a: Tensor) -> Tensor:
        """Zᵀa in float64, (sets, penalties, columns, hidden)."""
        sets, penalties, columns, _ = a.shape
        spread = torch.zeros(sets, penalties, columns, len(self.shared.exact), dtype=a.dtype, device=a.device)
        spread.scatter_add_(3, self.rows[:, None, None].expand(a.shape), a)
        raw = spread.reshape(-1, spread.shape[3]) @ self.shared.exact
        raw = raw.reshape(sets, penalties, columns, -1) - a.sum(dim=3, keepdim=True) * self.mean[:, None, None]
        return raw * self.unit[:, None, None]

    def _scores(self, coef: Tensor, b: Tensor) -> Tensor:
        """Scores of the training rows in float64, (sets, penalties, columns, rows)."""
        scaled = coef * self.unit[:, None, None]
        everywhere = scaled.reshape(-1, scaled.shape[3]) @ self.shared.exact.T
        offset = b - (scaled * self.mean[:, None, None]).sum(dim=3)
        everywhere = everywhere.reshape(*coef.shape[:3], -1) + offset[..., None]
        return everywhere.gather(3, self.rows[:, None, None].expand(*coef.shape[:3], -1))


class _Part:
    """Training sets that are solved side by side in float32, along the path of penalties."""

    def __init__(self, sets: _Sets, part: slice, C: Tensor, among_rows: bool) -> None:
        self.sets = part
        self._longest = max(sets.counts[part])  # of these sets: what others are solved beside changes no bit
        mask, unit = sets.mask[part][..., : self._longest], sets.unit[part].float()
        Z = (sets.shared.rough[sets.rows[part, : self._longest]] - sets.mean[part].float()[:, None]).mul_(unit[:, None])
        if len(mask) > 1:
            Z *= mask.transpose(1, 2)
        self.reach = torch.linalg.vector_norm(Z, dim=2).amax(dim=1).double()  # of the longest row, (sets,)
        self.gram = _gram(Z) if among_rows else None
        targets = sets.targets[part][..., : self._longest]
        self._path = [
            Problems(None if among_rows else Z, self.gram, targets, mask, torch.full_like(mask[:, :, :1], strength))
            for strength in C.tolist()
        ]
        rates = (targets.sum(dim=2) / mask.sum(dim=2)).clamp(1e-6, 1 - 1e-6)
        b = torch.logit(rates) if rates.shape[1] == 1 else rates.log() - rates.log().mean(dim=1, keepdim=True)
        found = [Solved(self._path[0].gather(torch.zeros_like(targets)), b)]
        for problems in self._path:
            found.append(solve(problems, found[-1]))
        self._solved = found[1:]
        self.x = torch.stack([one.x for one in self._solved], dim=1)  # (sets, penalties, columns, rows or hidden)
        if among_rows:
            self.x = torch.nn.functional.pad(self.x, (0, sets.rows.shape[1] - self._longest))
        self.b = torch.stack([one.b for one in self._solved], dim=1)  # (sets, penalties, columns)

    def norms(self, residual: Tensor) -> Tensor:
        """Norms of the gradients that residuals (sets, penalties, columns, rows or hidden) stand for."""
        if self.gram is None:
            return residual.square().sum(dim=(2, 3)).sqrt()
        problems, shape = self._path[0], residual.shape
        rough = problems.clean(residual[..., : self._longest].flatten(1, 2)).float()
        squares = (rough * problems.lift(rough)).sum(dim=2).reshape(shape[:3])
        return squares.sum(dim=2).clamp_min(0).sqrt().double()

    def refine(self, x: Tensor, b: Tensor, p: Tensor, residual: Tensor, drift: Tensor, wanted: Tensor) -> None:
        """Add a Newton step to `x` and `b` (of all sets) for each penalty of these sets that is `wanted`."""
        width = x.shape[3] if self.gram is None else self._longest
        for place, (problems, solved) in enumerate(zip(self._path, self._solved, strict=True)):
            if wanted[self.sets, place].any():
                step = newton_step(
                    problems,
                    p[self.sets, place, :, : self._longest].float(),
                    problems.clean(residual[self.sets, place, :, :width]).float(),
                    drift[self.sets, place].float(),
                    tolerance=_FINE,
                    preconditioner=solved.preconditioner,
                )
                x[self.sets, place, :, :width] += step.x
                b[self.sets, place] += step.b


def _gram(Z: Tensor) -> Tensor:
    """ZZᵀ of each set, (sets, rows, rows). On the CPU by numpy, which computes one triangle only."""
    if Z.device.type != "cpu":
        return Z @ Z.transpose(1, 2)
    with np.errstate(over="ignore", invalid="ignore"):  # then nothing is certified
        return torch.stack([torch.from_numpy(each @ each.T) for each in Z.numpy()])
