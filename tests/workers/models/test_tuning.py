"""The size of batches that is measured when a model is loaded."""

from typing import Any

import pytest
import torch

from bathyscope_workers.models import tuning
from bathyscope_workers.models.forward import Style

HOOKS = Style("hooks", mask=False, alone=False)


class Pass:
    """A forward pass that takes a given time for so many tokens, by a clock of its own."""

    num_layers = 24
    device = torch.device("cpu")

    def __init__(self, seconds: dict[int, float], monkeypatch: pytest.MonkeyPatch, limit: int = 10**9) -> None:
        self.seconds, self.now, self.asked, self.limit = seconds, 0.0, [], limit
        monkeypatch.setattr(tuning.time, "perf_counter", lambda: self.now)

    def __call__(self, ids: Any, lengths: Any, layers: list[int], consume: Any, style: Style) -> None:
        assert (lengths == ids.shape[1]).all()
        assert layers == [3]
        if ids.size > self.limit:
            raise torch.OutOfMemoryError("no")
        self.asked.append(ids.size)
        self.now += self.seconds[ids.size]


def tuned(forward: Pass, style: Style = HOOKS, longest: int | None = 2048) -> int:
    return tuning.batch_tokens(forward, style, vocab_size=50, longest=longest, tick=lambda: None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({256: 0.05, 512: 0.1, 1024: 0.2}, 512),
        ({256: 0.05, 512: 0.1, 1024: 0.192}, 512),
        ({256: 0.05, 512: 0.1, 1024: 0.15}, 1024),
        ({256: 0.04, 512: 0.1, 1024: 0.19}, 256),
        ({256: 0.002, 512: 0.009, 1024: 0.009}, 512),
    ],
    ids=["as fast", "hardly faster", "larger is faster", "smaller is faster", "too small a model"],
)
def test_another_size_is_taken_only_where_it_is_clearly_faster(
    seconds: dict[int, float], best: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tuned(Pass(seconds, monkeypatch)) == best


def test_a_small_model_is_not_worth_more_than_two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Pass({512: 0.001}, monkeypatch)
    tuned(forward)
    assert forward.asked == [512, 512]


def test_what_does_not_fit_leaves_the_smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuned(Pass({256: 0.05, 512: 0.1}, monkeypatch, limit=512)) == 256


def test_texts_that_run_alone_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Pass({}, monkeypatch)
    assert tuned(forward, Style("hooks", mask=False, alone=True)) == 512
    assert forward.asked == []


def test_short_limits_bound_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuned(Pass({512: 0.001}, monkeypatch), longest=16) == 512
