"""Mixed lengths through HTTP and SDK, against the transformers loop: one text at a time, and batches of 8 in order."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bathyscope.types import ComputeDtype
from benchmarks import arithmetic, corpus
from benchmarks.bench import Bench
from benchmarks.measure import Rounds, Spread, alternately, over
from benchmarks.reference import Reference, States, relative_errors
from benchmarks.report import Comparison, Goal, Limit, Row

LAYERS = [8, 15]
TEXTS, PARTS, ROUNDS = 128, 4, 3
EXACT = 1e-5


@dataclass(frozen=True, slots=True)
class _Goals:
    ratio: float
    """Times the float32 loop in batches of 8."""
    share: float
    """Of the arithmetic limit."""
    loop: str
    """The loop's dtype that the ratio is meant against."""


_GOALS = {"float32": _Goals(6.0, 0.75, "float32"), "bfloat16": _Goals(12.0, 0.5, "float32")}


@dataclass(slots=True)
class _Contest:
    """The contenders of one row. Each measures tokens a second of its own; padding does not count as tokens."""

    bench: Bench
    dtype: ComputeDtype
    exact: Reference
    """float32, which the errors are measured against."""
    own: Reference
    """The loop in the row's dtype."""
    loop_parts: int
    """Parts of the texts that the loops run in one round."""
    states: dict[str, dict[int, States]] = field(default_factory=lambda: defaultdict(dict))
    """What each contender found, by round."""
    _texts: dict[int, list[list[str]]] = field(default_factory=dict)

    def texts(self, number: int) -> list[list[str]]:
        """The texts of a round in their parts."""
        if number not in self._texts:
            self._texts[number] = corpus.mixed(TEXTS, PARTS, self.exact.count, number)
        return self._texts[number]

    def lengths(self, number: int) -> list[int]:
        """Tokens of each text of a round."""
        return [self.exact.count(text) for part in self.texts(number) for text in part]

    def service(self, number: int) -> float:
        """Submit to numpy array: all texts, always."""
        texts = [text for part in self.texts(number) for text in part]

        return self._rate("service", number, texts, lambda: self._extract(texts))

    def one_at_a_time(self, number: int) -> float:
        """The loop, a text a call."""
        texts = self._for_loops(number)
        return self._rate("one", number, texts, lambda: self.own.one_at_a_time(texts, LAYERS))

    def in_batches(self, number: int) -> float:
        """The loop, eight texts a call."""
        texts = self._for_loops(number)
        return self._rate("eight", number, texts, lambda: self.own.in_batches(texts, LAYERS))

    def float32_batches(self, number: int) -> float:
        """The float32 loop beside a bfloat16 row."""
        texts = self._for_loops(number)
        return self._rate("float32", number, texts, lambda: self.exact.in_batches(texts, LAYERS))

    def matrices(self, _number: int) -> float:
        """Multiply-adds a second."""
        return arithmetic.matrix_rate(self.own.model, max(LAYERS))

    def errors(self, name: str, exact: str) -> NDArray[np.float64]:
        """Relative errors of all vectors that both found."""
        found = []
        for number, expected in self.states[exact].items():
            states = self.states[name][number]
            if len(states) > len(expected):  # the service ran all parts, the loops one of them
                start = (number % PARTS) * len(expected)
                states = states[start : start + len(expected)]
            found.append(relative_errors(states, expected).ravel())
        return np.concatenate(found)

    def _for_loops(self, number: int) -> list[str]:
        parts = self.texts(number)
        return parts[number % PARTS] if self.loop_parts == 1 else [text for part in parts for text in part]

    def _extract(self, texts: list[str]) -> States:
        return self.bench.extract(texts, self.dtype, layers=LAYERS).hidden_states()

    def _rate(self, name: str, number: int, texts: list[str], call: Callable[[], States]) -> float:
        tokens = sum(self.exact.count(text) for text in texts)
        started = time.perf_counter()
        self.states[name][number] = call()
        return tokens / (time.perf_counter() - started)


def float32(bench: Bench) -> Row:
    """The row in float32."""
    return _run(bench, "float32")


def bfloat16(bench: Bench) -> Row:
    """The row in bfloat16."""
    return _run(bench, "bfloat16")


def _run(bench: Bench, dtype: ComputeDtype) -> Row:
    bench.warm(dtype)
    own = bench.reference(dtype)
    contest = _Contest(bench, dtype, bench.reference("float32"), own, loop_parts=PARTS if bench.full else 1)
    warmup = corpus.mixed(8, 1, own.count, 999)[0]
    for reference in {id(one): one for one in (contest.exact, own)}.values():
        reference.in_batches(warmup, LAYERS)
    bench.extract(warmup, dtype, layers=LAYERS)
    contenders = {
        "service": contest.service,
        "one": contest.one_at_a_time,
        "eight": contest.in_batches,
        "matrices": contest.matrices,
    }
    if dtype != "float32":
        contenders["float32"] = contest.float32_batches
    found = alternately(ROUNDS, contenders, own=bench.own(), patience=bench.patience)
    return _row(contest, found)


def _row(contest: _Contest, found: Rounds) -> Row:
    dtype, goals = contest.dtype, _GOALS[contest.dtype]
    work = arithmetic.work_of(contest.own.model, max(LAYERS))
    lengths = contest.lengths(0)
    per_token = work.of(lengths) / sum(lengths)
    limit = Spread([rate / per_token for rate in found["matrices"].values])
    share = over(found["service"], limit)
    service = f"service, {dtype}"
    comparisons = [_compared(service, f"loop, one at a time, {dtype}", found["service"], found["one"])]
    comparisons.append(_compared(service, f"loop, batches of 8, {dtype}", found["service"], found["eight"]))
    if "float32" in found:
        comparisons.append(_compared(service, "loop, batches of 8, float32", found["service"], found["float32"]))
    against_loop = comparisons[-1]
    at_limit = over(limit, against_loop.theirs_measured)
    # Batches of float32 differ from single texts by a few 1e-6: nothing beside the errors of bfloat16.
    exact = "one" if dtype == "float32" else "float32"
    errors = contest.errors("service", exact)
    row = Row(
        name=f"mixed-{dtype}",
        title=f"{TEXTS} texts of {min(lengths)} to {max(lengths)} tokens, layers 8 and 15, last token, submit to array",
        comparisons=comparisons,
        limits=[Limit("matrix products", share)],
    )
    if dtype == "float32":
        row.goals.append(Goal(f"max relative error <= {EXACT:g}", f"{errors.max():.2g}", bool(errors.max() <= EXACT)))
    row.goals.append(
        Goal(
            f">= {goals.ratio:g} x the {goals.loop} loop in 8s",
            against_loop.ratio.show("{:.2f}"),
            against_loop.ratio.median >= goals.ratio,
        )
    )
    row.goals.append(Goal(f">= {goals.share:.0%} of the arithmetic", share.show("{:.0%}"), share.median >= goals.share))
    row.notes = [
        f"arithmetic limit {limit.show('{:.0f}')} tokens/s: {per_token / 1e6:.1f} M multiply-adds a token "
        f"({work.projections / 1e6:.1f} M in matrices) at {_gflops(found['matrices'])} GFLOP/s",
        f"at that limit the ratio to the {goals.loop} loop in 8s would be {at_limit.show('{:.1f}')}",
        f"relative error of {len(errors)} vectors against the float32 loop: max {errors.max():.2g}, "
        f"median {np.median(errors):.2g}",
        f"{contest.bench.threads} threads each; {found.said()}; in each the service runs all {TEXTS} texts, the loops "
        + ("all too" if contest.loop_parts > 1 else f"{TEXTS // PARTS} of them with the same mixture of lengths"),
    ]
    if dtype != "float32":
        own = contest.errors("eight", exact)
        row.notes.append(f"the {dtype} loop's own error: max {own.max():.2g}, median {np.median(own):.2g}")
    row.details = {
        "tokens_per_second": {name: found[name].as_json() for name in found.values if name != "matrices"},
        "all_rounds": {"values": found.values, "foreign_cores": found.foreign, "kept": found.kept},
        "multiply_adds_per_second": found["matrices"].as_json(),
        "multiply_adds_per_token": per_token,
        "errors": {"max": float(errors.max()), "median": float(np.median(errors)), "vectors": len(errors)},
    }
    return row


def _compared(ours: str, theirs: str, ours_measured: Spread, theirs_measured: Spread) -> Comparison:
    return Comparison(ours, theirs, "tokens/s", ours_measured, theirs_measured, over(ours_measured, theirs_measured))


def _gflops(rates: Spread) -> str:
    return Spread([2 * rate / 1e9 for rate in rates.values]).show("{:.0f}")
