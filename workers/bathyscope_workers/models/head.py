"""From the last hidden state to logits, for chosen tokens only.

What a model does after its decoder is more than one matrix in some architectures (a cap on the logits, a scale), so it
is not written again here: the model's own forward runs with a stand-in for the decoder that passes on what it is given.
Logits at every token of a batch would take gigabytes with a large vocabulary, so the states are chosen first.

Whether that gives the logits of a plain call depends on the architecture and is not assumed: it is tried on a text when
the head is first asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from bathyscope import errors
from bathyscope_workers.models.forward import Forward

_CHUNK_BYTES = 64 * 2**20
"""Of logits in float32 at a time."""

_TOLERANCE = {"float32": 1e-4}
_LOW_PRECISION_TOLERANCE = 0.1
"""Largest difference of a log-probability from a plain call's."""


class Head:
    """The language-model head of a resident. Raises `errors.InvalidRequest` for a model that has none."""

    def __init__(self, model: Any, forward: Forward, *, name: str, compute_dtype: str, vocab_size: int) -> None:
        self._model = model
        self._forward = forward
        self._dtype = next(model.parameters()).dtype
        self.vocab_size = vocab_size
        path: str = next((path for path, module in model.named_modules() if module is forward.inner), "")
        if not forward.causal or not path or model.get_output_embeddings() is None:
            raise _no_head(name, "it is no causal language model with a head")
        parent, _, self._attribute = path.rpartition(".")
        self._parent: nn.Module = model.get_submodule(parent)
        self._check(name, compute_dtype)

    @property
    def chunk(self) -> int:
        """States whose logits are held at a time."""
        return max(1, _CHUNK_BYTES // (4 * self.vocab_size))

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Logits (states, vocabulary) in float32 of states after the final norm, (states, hidden)."""
        own = self._parent._modules[self._attribute]
        try:
            self._parent._modules[self._attribute] = _PassOn()
            with torch.inference_mode():
                logits: torch.Tensor = self._model(inputs_embeds=states[None], use_cache=False, return_dict=True).logits
        finally:
            self._parent._modules[self._attribute] = own
        return logits[0].float()

    def log_probabilities(
        self, states: torch.Tensor, which: NDArray[np.int64], tokens: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Log-probability (natural) of each of `tokens` after the state `which` says, both (targets,), `which` rising.

        States are (states, hidden). The softmax is over the whole vocabulary, in float32.
        """
        found = np.empty(len(tokens))
        for start in range(0, len(states), self.chunk):
            first, last = np.searchsorted(which, [start, start + self.chunk])
            logits = self(states[start : start + self.chunk])
            device = logits.device
            row = torch.from_numpy(which[first:last] - start).to(device)
            token = torch.from_numpy(tokens[first:last]).to(device)
            values = logits[row, token] - torch.logsumexp(logits, dim=-1)[row]
            found[first:last] = values.double().cpu().numpy()
        return found

    def _check(self, name: str, compute_dtype: str) -> None:
        """Compare with a plain call on a few tokens."""
        ids = torch.arange(1, min(7, self.vocab_size), device=self._forward.device)[None]
        try:
            with torch.inference_mode():
                expected = torch.log_softmax(self._model(input_ids=ids, use_cache=False).logits[0].float(), dim=-1)
                states = self._forward.inner(input_ids=ids, use_cache=False)[0][0]
                found = torch.log_softmax(self(states), dim=-1)
                difference = float((found - expected.to(found.device)).abs().nan_to_num(torch.inf).max())
        except (TypeError, AttributeError, ValueError, KeyError) as error:
            raise _no_head(name, "its head cannot be run apart from its decoder") from error
        if difference > _TOLERANCE.get(compute_dtype, _LOW_PRECISION_TOLERANCE):
            raise _no_head(name, "its head, run apart from its decoder, gives other probabilities")


@dataclass
class _Output(BaseModelOutputWithPast):
    """Has no router logits, cross attentions and whatever else some decoder gives besides: they are null."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _PassOn(nn.Module):
    """In the decoder's place: its output is what it was given as embeddings."""

    def forward(self, *_args: Any, inputs_embeds: torch.Tensor, **_kwargs: Any) -> Any:
        return _Output(last_hidden_state=inputs_embeds)


def _no_head(name: str, why: str) -> errors.InvalidRequest:
    return errors.InvalidRequest(
        f"{name} gives no probabilities of tokens: {why}",
        errors=[{"pointer": "/score_choices", "detail": f"this model scores no choices: {why}"}],
    )
