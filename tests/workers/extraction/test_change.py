"""How far states are from others."""

import pytest
import torch

from bathyscope_workers.extraction.change import ChangeSum


def test_a_layer_without_a_number_has_none() -> None:
    base = torch.tensor([[[3.0, 4.0], [0.0, 0.0], [1.0, 0.0], [1.0, 0.0]]])  # (vectors, layers, hidden)
    other = torch.tensor([[[3.0, 9.0], [1.0, 0.0], [float("nan"), 0.0], [1e30, 1e30]]])
    change = ChangeSum(5)
    change.add(0, base, other)
    *others, large, unseen = change.means()
    assert (others, unseen) == ([1.0, None, None], None)
    assert large == pytest.approx(2**0.5 * 1e30, rel=1e-6), "beyond what float32 can square"
