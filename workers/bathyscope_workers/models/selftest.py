"""Whether a loaded model gives a text the same hidden states in a padded batch as alone.

The reference is a plain `model(..., output_hidden_states=True)` on each text by itself. The texts then go
through the extraction's own forward pass as one padded batch, once to the top and once stopped half-way. Per
token vector, the relative error is the norm of the difference over the norm of the reference; per layer, the
largest over all tokens is reported, with the smallest cosine.

The test also chooses how the model is run (`forward.styles`): the first style that passes. In float32 passing
means an error of at most 1e-5 everywhere. In lower precision rounding alone moves single tokens further (and
in a mixture of experts may send one to another expert), while a wrong mask or position moves them all, so there
the median over tokens decides and the maximum is published as the bound.

Texts that begin alike may then run as a tree (`models.past`), if one made of the same texts passes by the same measure.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bathyscope_workers.models.forward import Forward, Style
from bathyscope_workers.models.past import Past
from bathyscope_workers.models.tree import LANE_TOKENS, lay

TEXTS: tuple[str, ...] = (
    "The",
    "The capital of France is",
    "Below the photic zone 🌊 pressure rises by one atmosphere every ten metres.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "Die Tiefsee ist kälter als 4 °C; 深海は暗く、冷たく、そして静かだ。",
    "She counted the lanterns twice, once on the way down and once on the way up, and both times there was one "
    "more than the log had promised, which nobody on the bridge was willing to explain to her.",
)
MAX_TOKENS = 64
"""Of each text, so that the test costs the same on every model."""
_KEPT_TOKENS = 16
"""Last tokens of each text that are compared with the unquantized model's, or with float32."""

FLOAT32_TOLERANCE = 1e-5
_MEDIAN_TOLERANCE = {"float16": 0.02, "bfloat16": 0.05}
_QUANTIZED_MEDIAN_TOLERANCE = 0.25

States = list[torch.Tensor]
"""One a text: (seq, layers + 1, hidden)."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Errors of one run against a reference, per layer."""

    cosine: list[float]
    relative_error: list[float]
    median: float
    """Of the relative error over tokens, in the worst layer."""

    @property
    def max_relative_error(self) -> float:
        """Over all layers."""
        return max(self.relative_error)

    def to_wire(self) -> dict[str, Any]:
        """`layers` and `max_relative_error` as in the API."""
        rows = zip(self.cosine, self.relative_error, strict=True)
        return {
            "layers": [
                {"layer": layer, "cosine": cosine, "relative_error": error}
                for layer, (cosine, error) in enumerate(rows)
            ],
            "max_relative_error": self.max_relative_error,
        }


@dataclass(slots=True)
class SelfTest:
    """What was found at load."""

    texts: int
    comparison: Comparison
    passed: bool
    against_unquantized: Comparison | None = None
    against_float32: Comparison | None = None

    def to_wire(self) -> dict[str, Any]:
        """The `self_test` of `/v1/models`."""
        against, rounded = self.against_unquantized, self.against_float32
        return {
            "texts": self.texts,
            **self.comparison.to_wire(),
            "against_unquantized": None if against is None else against.to_wire(),
            "against_float32": None if rounded is None else rounded.to_wire(),
            "passed": self.passed,
        }


def token_rows(
    encode: Callable[[str], Sequence[int]] | None, vocab_size: int, limit: int | None
) -> list[NDArray[np.int32]]:
    """The texts as token ids; without a tokenizer, arbitrary ids of about the same lengths."""
    most = min(MAX_TOKENS, limit or MAX_TOKENS)
    if encode is None:
        random = np.random.default_rng(0)
        lengths = (1, 5, 17, 20, 33, MAX_TOKENS)
        return [random.integers(0, vocab_size, size=min(length, most), dtype=np.int32) for length in lengths]
    rows = [np.array(encode(text)[:most], dtype=np.int32) for text in TEXTS]
    return [row for row in rows if len(row)]


def reference(model: Any, rows: list[NDArray[np.int32]], device: torch.device, tick: Callable[[], None]) -> States:
    """Every layer of each text alone, from a plain call of the model."""
    states: States = []
    with torch.inference_mode():
        for row in rows:
            ids = torch.from_numpy(row.astype(np.int64))[None].to(device)
            output = model(input_ids=ids, output_hidden_states=True)
            states.append(torch.stack([state[0].to(device) for state in output.hidden_states], dim=1))
            tick()
    return states


def run(forward: Forward, rows: list[NDArray[np.int32]], style: Style) -> States:
    """The same through the extraction's forward pass; the lower half of the layers from a run that stops there."""
    found: States = []

    def collect(batch: list[int], layers: Sequence[int]) -> None:
        ids, lengths = forward.pad([rows[index] for index in batch])

        def consume(layer: int, states: torch.Tensor) -> None:
            if not found:
                for row in rows:
                    shape = (len(row), forward.num_layers + 1, states.shape[-1])
                    found.append(torch.full(shape, torch.nan, dtype=states.dtype, device=states.device))
            for place, index in enumerate(batch):
                found[index][:, layer] = states[place, : len(rows[index])].to(found[index].device)

        forward(ids, lengths, layers, consume, style)

    batches = [[index] for index in range(len(rows))] if style.alone else [list(range(len(rows)))]
    half = forward.num_layers // 2
    for batch in batches:
        collect(batch, range(forward.num_layers + 1))
        # The states of the first run are overwritten: a wrong early stop must show.
        collect(batch, range(half + 1))
    return found


def branches(rows: list[NDArray[np.int32]]) -> tuple[list[NDArray[np.int32]], int]:
    """Texts that all begin with half of the longest one, and how many tokens that is; none where it is too short."""
    longest = max(rows, key=len)
    trunk = longest[: len(longest) // 2].tolist()
    found = sorted({(*trunk, *row.tolist())[: len(longest)] for row in rows})
    return [np.array(one, dtype=np.int32) for one in found], len(trunk) if len(found) > 1 else 0


def run_branches(forward: Forward, rows: list[NDArray[np.int32]], trunk: int) -> tuple[States, States]:
    """Texts that begin with the same `trunk` tokens as a tree; and behind a kept trunk, each in a lane of its own."""
    together: States = []
    apart: States = []

    def collect(found: States, past: Past | None, top: int) -> Past:
        reused = 0 if past is None else trunk
        laid = lay(
            rows,
            [0, *(_common(one, other) for one, other in pairwise(rows))],
            [reused] * len(rows),
            past,
            pad_id=forward.pad_id,
            keep=(0, trunk),
            lane_tokens=LANE_TOKENS if past is None else 1,
        )

        def consume(layer: int, states: torch.Tensor) -> None:
            flat = states.reshape(-1, states.shape[-1])
            if not found:
                shape = (forward.num_layers + 1, flat.shape[-1])
                found.extend(flat.new_full((len(row) - reused, *shape), torch.nan) for row in rows)
            for place, path in enumerate(laid.paths):
                found[place][:, layer] = flat[torch.from_numpy(path[reused:]).to(flat.device)].to(found[place].device)

        return forward.branches(laid.tree, range(top + 1), consume).kept(rows[0][:trunk], {})

    past = collect(together, None, forward.num_layers)
    # As in `run`: a wrong early stop must show.
    collect(together, None, forward.num_layers // 2)
    collect(apart, past, forward.num_layers)
    collect(apart, past, forward.num_layers // 2)
    return together, apart


def _common(first: NDArray[np.int32], second: NDArray[np.int32]) -> int:
    most = min(len(first), len(second))
    return int(np.append(first[:most] == second[:most], False).argmin())


def compare(states: States, expected: States) -> Comparison:
    """Per layer over the tokens of all texts: smallest cosine, largest relative error."""
    got = torch.cat(states).float()  # (tokens, layers, hidden)
    want = torch.cat(expected).float().to(got.device)
    difference, norm = (got - want).norm(dim=-1), want.norm(dim=-1)  # (tokens, layers)
    error = (difference / norm.clamp_min(1e-30)).nan_to_num(torch.inf)
    cosine = torch.nn.functional.cosine_similarity(got, want, dim=-1).nan_to_num(-1.0)
    # The embedding of a padding token is all zeros: equal, though it has no direction.
    cosine = torch.where((difference == 0) & (norm == 0), 1.0, cosine)
    return Comparison(
        cosine=[round(value, 9) for value in cosine.amin(0).tolist()],
        relative_error=error.amax(0).tolist(),
        median=float(error.median(0).values.max()),
    )


def passes(comparison: Comparison, *, compute_dtype: str, quantized: bool) -> bool:
    """Whether a style keeps a text's states what they are alone."""
    if compute_dtype == "float32" and not quantized:
        return comparison.max_relative_error <= FLOAT32_TOLERANCE
    tolerance = _QUANTIZED_MEDIAN_TOLERANCE if quantized else _MEDIAN_TOLERANCE.get(compute_dtype, 0.05)
    return comparison.median <= tolerance


def last_tokens(states: States) -> States:
    """What is kept of a model's states to compare a quantized one with."""
    return [state[-_KEPT_TOKENS:].float().cpu() for state in states]


class ReferenceStates:
    """An unquantized model's states, kept on disk so that it need not be loaded for every one compared with it."""

    def __init__(
        self, data_dir: str, *, name: str, revision: str, compute_dtype: str, rows: list[NDArray[np.int32]]
    ) -> None:
        identity = hashlib.sha256(f"{revision}\0{compute_dtype}\0".encode())
        for row in rows:
            identity.update(row.tobytes() + b"\0")
        safe = re.sub(r"[^A-Za-z0-9._-]+", "--", name)
        self.path = (
            Path(data_dir) / "self-test" / f"{safe}-{identity.hexdigest()[:24]}.safetensors" if data_dir else None
        )

    def load(self) -> States | None:
        """The states, or None when they were never kept or cannot be read."""
        if self.path is None or not self.path.is_file():
            return None
        try:
            tensors = load_file(self.path)
        except (OSError, SafetensorError):
            return None
        return [tensors[f"text_{index}"] for index in range(len(tensors))]

    def save(self, states: States) -> None:
        """Keep the states; the file appears whole or not at all."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.path.parent, prefix=".tmp-") as folder:
            temporary = Path(folder) / "states.safetensors"
            save_file({f"text_{index}": state.contiguous() for index, state in enumerate(states)}, temporary)
            temporary.rename(self.path)
