"""Mixtures of experts whose experts the base holds as 3-D parameters: Qwen3-MoE, Qwen3.5-MoE and their like.

`experts.gate_up_proj` is [experts, 2 * intermediate, hidden], `experts.down_proj` [experts, hidden, intermediate].
Tinker's w1 is the gate, w3 the up and w2 the down projection, each for all experts in one 3-D tensor; adapters of the
years before hold `experts.7.gate_proj` and so on, one expert each.
"""

from __future__ import annotations

import re

from bathyscope_workers.adapters.conversion import dense
from bathyscope_workers.adapters.conversion.places import Place
from bathyscope_workers.adapters.skeleton import ModuleFact, Skeleton

_EXPERTS = re.compile(
    r"(?P<owner>.+\.experts)(?:\.(?P<expert>\d{1,6}))?\.(?P<leaf>w1|w2|w3|gate_proj|up_proj|down_proj)"
)
_GATE, _UP = ("w1", "gate_proj"), ("w3", "up_proj")


def place(module: str, skeleton: Skeleton) -> Place | None:
    """A module of the same name, else rows of the experts' parameters."""
    found = _EXPERTS.fullmatch(module)
    if found is None:
        return dense.place(module, skeleton)
    owner = skeleton.locate(found["owner"])
    fact = skeleton.modules.get(owner)
    if fact is None or "gate_up_proj" not in fact.parameters or "down_proj" not in fact.parameters:
        return dense.place(module, skeleton)
    expert = int(found["expert"]) if found["expert"] else None
    if expert is not None and expert >= fact.parameters["down_proj"][0]:
        return None
    if found["leaf"] in _GATE:
        return Place(f"{owner}.gate_up_proj", _gate_rows(fact), expert)
    if found["leaf"] in _UP:
        return Place(f"{owner}.gate_up_proj", _up_rows(fact), expert)
    return Place(f"{owner}.down_proj", None, expert)


def _gate_rows(fact: ModuleFact) -> slice:
    rows = fact.parameters["gate_up_proj"][2 if fact.transposed else 1]
    return slice(0, rows, 2) if fact.interleaved else slice(0, rows // 2, 1)


def _up_rows(fact: ModuleFact) -> slice:
    rows = fact.parameters["gate_up_proj"][2 if fact.transposed else 1]
    return slice(1, rows, 2) if fact.interleaved else slice(rows // 2, rows, 1)
