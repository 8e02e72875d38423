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
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bathyscope_workers.probes.estimators._base import Codes, Floats, Standardizer
from bathyscope_workers.probes.estimators._exact import Solution
from bathyscope_workers.probes.estimators._newton_cg import Problems, Product, newton_step, solve

Rows = NDArray[np.int64]

SCORE_TOLERANCE = 1e-5
"""How far decision values on the training rows may be from the optimum's, by the bound above."""

_MAX_ROUNDS = 8
_CUDA_BYTES = 2**31
"""Of float32 states and Gram matrices that are on a CUDA device at a time."""


class SharedStates:
    """States of one layer (rows, hidden), prepared for many training sets."""

    def __init__(self, X: Floats, *, standardize: bool, device: torch.device) -> None:
        overall = Standardizer.fit(X)
        self._raw = X
        self.overall = overall
        self._standardize = standardize
        self.exact = torch.from_numpy(overall.transform(X)).to(device)  # (rows, hidden), float64
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
    count = at_once(shared, max(len(rows) for rows in trainings))
    found: list[list[Solution]] = []
    for first in range(0, len(trainings), count):
        some = slice(first, first + count)
        found += _Batch(shared, trainings[some], standardizers[some], y, classes).solve(strengths)
    return found


def at_once(shared: SharedStates, longest: int) -> int:
    """How many training sets of up to `longest` rows are solved side by side."""
    if shared.exact.device.type == "cpu":
        return 1  # whose Gram matrix stays in the cache
    return max(1, _CUDA_BYTES // (4 * longest * (longest + shared.exact.shape[1])))


class _Batch:
    """Training sets that are solved side by side; shorter ones are padded."""

    def __init__(
        self,
        shared: SharedStates,
        trainings: Sequence[Rows],
        standardizers: Sequence[Standardizer],
        y: Codes,
        classes: int,
    ) -> None:
        device = shared.exact.device
        longest = max(len(rows) for rows in trainings)
        self._shared = shared
        self._rows = torch.zeros(len(trainings), longest, dtype=torch.int64, device=device)
        self._mask = torch.zeros(len(trainings), 1, longest, device=device)
        for number, rows in enumerate(trainings):
            self._rows[number, : len(rows)] = torch.from_numpy(rows)
            self._mask[number, 0, : len(rows)] = 1
        mean = np.stack([(one.mean - shared.overall.mean) / shared.overall.scale for one in standardizers])
        unit = np.stack([shared.overall.scale / one.scale for one in standardizers])
        self._mean, self._unit = torch.from_numpy(mean).to(device), torch.from_numpy(unit).to(device)  # (sets, hidden)
        codes = torch.from_numpy(y).to(device)[self._rows]
        columns = torch.ones(1, dtype=torch.int64) if classes == 2 else torch.arange(classes)
        self._targets = (codes[:, None] == columns.to(device)[:, None]).float()  # (sets, columns, rows)
        Z = (shared.rough[self._rows] - self._mean.float()[:, None]).mul_(self._unit.float()[:, None])
        Z *= self._mask.transpose(1, 2)
        self._reach = Z.square().sum(dim=2).amax(dim=1).sqrt().double()  # |z| of the longest row, (sets,)
        self._product: Product
        if Z.shape[1] <= Z.shape[2]:
            self._product = partial(_times, _gram(Z))
        else:
            self._product = partial(_times_outer, Z)

    def solve(self, strengths: Sequence[float]) -> list[list[Solution]]:
        """By training set, then by C in the order given."""
        order = np.argsort(strengths)
        path = [float(strengths[place]) for place in order]
        a, b = self.start()
        found_a, found_b = [], []
        for C in path:
            a, b = solve(self.problems([C]), a, b)
            found_a.append(a)
            found_b.append(b)
        coef, intercept, bound = self.finish(path, torch.stack(found_a, dim=1), torch.stack(found_b, dim=1))
        return [
            [
                (coef[number, place], intercept[number, place], bool(bound[number, place] <= SCORE_TOLERANCE))
                for place in np.argsort(order)
            ]
            for number in range(len(coef))
        ]

    def problems(self, strengths: Sequence[float]) -> Problems:
        """Each training set with each of these penalties, training sets first."""
        sets, count = len(self._rows), len(strengths)

        def product(v: Tensor) -> Tensor:
            return self._product(v.reshape(sets, -1, v.shape[-1])).reshape(v.shape)

        C = torch.tensor(strengths, dtype=torch.float32, device=self._mask.device)
        return Problems(
            product=product,
            targets=self._targets.repeat_interleave(count, dim=0),
            mask=self._mask.repeat_interleave(count, dim=0),
            C=C.repeat(sets)[:, None, None],
        )

    def start(self) -> tuple[Tensor, Tensor]:
        """No weights; intercepts that predict the rates of the classes."""
        rates = (self._targets.sum(dim=2) / self._mask.sum(dim=2)).clamp(1e-6, 1 - 1e-6)
        intercept = torch.logit(rates) if rates.shape[1] == 1 else rates.log() - rates.log().mean(dim=1, keepdim=True)
        return torch.zeros_like(self._targets), intercept

    def finish(self, strengths: Sequence[float], a: Tensor, b: Tensor) -> tuple[Floats, Floats, Floats]:
        """From float32 solutions `a` (sets, penalties, columns, rows), `b` (sets, penalties, columns): coefficients
        (sets, penalties, columns, hidden), intercepts, and the bounds on the error of scores (sets, penalties)."""
        problems = self.problems(strengths)
        exact = self.problems(strengths)
        exact.targets, exact.mask, exact.C = exact.targets.double(), exact.mask.double(), exact.C.double()
        exact.C = torch.tensor(strengths, dtype=torch.float64, device=a.device).repeat(len(a))[:, None, None]
        shape, flat = a.shape, (-1, *a.shape[2:])
        a, b = a.double(), b.double()
        before = torch.full(shape[:2], torch.inf, dtype=torch.float64, device=a.device)
        for number in range(_MAX_ROUNDS + 1):
            coef = self._weights(a)
            scores = self._scores(coef, b)
            p = exact.chances(scores.reshape(flat))
            pull = exact.pull(p)
            residual, drift = pull - a.reshape(flat), pull.sum(dim=2)
            curvature = (exact.C * exact.mask * p * (1 - p)).sum(dim=2).clamp_min(torch.finfo(torch.float64).tiny)
            rough = residual.float()
            gradient = (rough * problems.product(rough)).sum(dim=(1, 2)).clamp_min(0).sqrt().double()
            bound = self._reach[:, None] * gradient.reshape(shape[:2])
            bound += (drift.abs() / curvature).amax(dim=1).reshape(shape[:2])
            bound = torch.where(bound.isfinite(), bound, torch.inf)
            if number == _MAX_ROUNDS or not ((bound > SCORE_TOLERANCE) & (bound < before / 2)).any():
                break
            before = bound
            step = newton_step(problems, p.float(), rough, drift.float(), tolerance=1e-3)
            a, b = a + step.a.double().reshape(shape), b + step.b.double().reshape(b.shape)
        if shape[2] > 1:  # a shift of all classes' intercepts changes no probability
            b -= b.mean(dim=2, keepdim=True)
        return coef.cpu().numpy(), b.cpu().numpy(), bound.cpu().numpy()

    def _weights(self, a: Tensor) -> Tensor:
        """Zᵀa in float64, (sets, penalties, columns, hidden)."""
        sets, penalties, columns, _ = a.shape
        spread = torch.zeros(sets, penalties, columns, len(self._shared.exact), dtype=a.dtype, device=a.device)
        spread.scatter_add_(3, self._rows[:, None, None].expand(a.shape), a)
        raw = spread.reshape(-1, spread.shape[3]) @ self._shared.exact
        raw = raw.reshape(sets, penalties, columns, -1) - a.sum(dim=3, keepdim=True) * self._mean[:, None, None]
        return raw * self._unit[:, None, None]

    def _scores(self, coef: Tensor, b: Tensor) -> Tensor:
        """Scores of the training rows in float64, (sets, penalties, columns, rows)."""
        scaled = coef * self._unit[:, None, None]
        everywhere = scaled.reshape(-1, scaled.shape[3]) @ self._shared.exact.T
        offset = b - (scaled * self._mean[:, None, None]).sum(dim=3)
        everywhere = everywhere.reshape(*coef.shape[:3], -1) + offset[..., None]
        return everywhere.gather(3, self._rows[:, None, None].expand(*coef.shape[:3], -1))


def _times(K: Tensor, v: Tensor) -> Tensor:
    return v @ K


def _times_outer(Z: Tensor, v: Tensor) -> Tensor:
    return (v @ Z) @ Z.transpose(1, 2)


def _gram(Z: Tensor) -> Tensor:
    """ZZᵀ of each set, (sets, rows, rows). On the CPU by numpy, which computes one triangle only."""
    if Z.device.type != "cpu":
        return Z @ Z.transpose(1, 2)
    with np.errstate(over="ignore", invalid="ignore"):  # then nothing is certified
        return torch.stack([torch.from_numpy(each @ each.T) for each in Z.numpy()])
