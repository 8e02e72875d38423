"""`python -m benchmarks.peer NAME FOLDER THREADS`: one other library with its model loaded, in a process of its own.

It says `{"ready": version}`, or `{"failed": reason}` and ends. Each line on standard input is
`{"texts", "layers", "out"}`; the answer is `{"seconds"}` once the states (texts, layers, hidden; the last tokens') lie
in the .npy file `out`. Each library is used as its own documentation has it, in batches of eight where it takes any.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from benchmarks.reference import States

Run = Callable[[Sequence[str], Sequence[int]], States]
_BATCH = 8


def nnsight(folder: str) -> Run:
    """One trace a batch; blocks above the highest layer are not run (`tracer.stop`)."""
    from nnsight import LanguageModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    auto: Any = AutoModelForCausalLM
    # A loaded model with its tokenizer: the library's own loading asks the hub for what a folder does not hold.
    model: Any = LanguageModel(
        auto.from_pretrained(folder, dtype=torch.float32), tokenizer=AutoTokenizer.from_pretrained(folder)
    )

    def run(texts: Sequence[str], layers: Sequence[int]) -> States:
        blocks = model.model.layers
        saved: list[Any] = []
        # The library reads these statements' source: one `with` of all three it does not understand.
        with torch.inference_mode(), model.trace() as tracer:  # noqa: SIM117
            with tracer.invoke(list(texts)):
                for layer in sorted(layers):
                    saved.append(blocks[layer - 1].output.save())
                tracer.stop()
        found = dict(zip(sorted(layers), (one[0] if isinstance(one, tuple) else one for one in saved), strict=True))
        assert model.tokenizer.padding_side == "left"
        return _array(torch.stack([found[layer][:, -1] for layer in layers], 1))

    return _in_batches(run)


def lmprobe(folder: str) -> Run:
    """Its extractor with the backend that it takes by default, and its own pooling."""
    from lmprobe.extraction import ActivationExtractor
    from lmprobe.pooling import pool_last_token

    extractor = ActivationExtractor(folder, device="cpu", layers=[0], batch_size=_BATCH, dtype=torch.float32)

    def run(texts: Sequence[str], layers: Sequence[int]) -> States:
        states, mask = extractor.extract_batch(list(texts), [layer - 1 for layer in layers])
        return _array(pool_last_token(states, mask).reshape(len(texts), len(layers), -1))

    return _in_batches(run)


def transformer_lens(folder: str) -> Run:
    """`run_with_cache` for the two hooks, a text at a time, stopping at the highest layer."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM, AutoTokenizer

    auto: Any = AutoModelForCausalLM
    bridge: Any = TransformerBridge.boot_transformers(
        folder,
        hf_model=auto.from_pretrained(folder, dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        device="cpu",
        dtype=torch.float32,
    )

    @torch.inference_mode()
    def run(texts: Sequence[str], layers: Sequence[int]) -> States:
        names = [f"blocks.{layer - 1}.hook_out" for layer in layers]
        rows = []
        for text in texts:
            tokens = bridge.to_tokens(text, prepend_bos=False)
            _, cache = bridge.run_with_cache(tokens, names_filter=names, stop_at_layer=max(layers))
            rows.append(torch.stack([cache[name][0, -1] for name in names]))
        return _array(torch.stack(rows))

    return run


def sentence_transformers(folder: str) -> Run:
    """The encoder with mean pooling: one layer, the last, whatever `layers` says; it sorts by length itself."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, device="cpu", local_files_only=True)

    def run(texts: Sequence[str], layers: Sequence[int]) -> States:
        return np.asarray(model.encode(list(texts), batch_size=32, show_progress_bar=False))[:, None]

    return run


PEERS: dict[str, tuple[str, Callable[[str], Run]]] = {
    "nnsight": ("nnsight", nnsight),
    "lmprobe": ("lmprobe", lmprobe),
    "TransformerLens": ("transformer-lens", transformer_lens),
    "sentence-transformers": ("sentence-transformers", sentence_transformers),
}
"""By name: the distribution, and what makes it ready."""


def _in_batches(run: Run) -> Run:
    def whole(texts: Sequence[str], layers: Sequence[int]) -> States:
        parts = [run(texts[start : start + _BATCH], layers) for start in range(0, len(texts), _BATCH)]
        return np.concatenate(parts)

    return whole


def _array(states: torch.Tensor) -> States:
    return np.asarray(states.detach().float().numpy())


def main() -> int:
    """Serve until standard input ends."""
    name, folder, threads = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the library prints is no answer

    def say(**answer: object) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    torch.set_num_threads(int(threads))
    distribution, make = PEERS[name]
    try:
        run = make(folder)
        run(["It is loaded.", "And it runs once."], [1])
        say(ready=version(distribution))
    except Exception as error:
        say(failed=f"{type(error).__name__}: {error}"[:300])
        return 1
    for line in sys.stdin:
        asked = json.loads(line)
        started = time.perf_counter()
        try:
            states = run(asked["texts"], asked["layers"])
        except Exception as error:
            say(failed=f"{type(error).__name__}: {error}"[:300])
            continue
        seconds = time.perf_counter() - started
        np.save(asked["out"], states)
        say(seconds=seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
