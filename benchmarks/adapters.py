"""Random adapters for a model, and a model engine in this process to run them in."""

from __future__ import annotations

import json
import random
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from bathyscope_workers.adapters.conversion import convert
from bathyscope_workers.adapters.conversion.converted import Converted, Tensors, digest_of
from bathyscope_workers.adapters.conversion.fuse import Lazy
from bathyscope_workers.adapters.skeleton import Skeleton
from bathyscope_workers.adapters.source import SourceAdapter
from bathyscope_workers.adapters.stored import StoredAdapter
from bathyscope_workers.engine.channel import Channel
from bathyscope_workers.engine.model_engine import ModelEngine, ModelEngineSettings
from bathyscope_workers.engine.protocol import encode, receive
from bathyscope_workers.models.spec import ModelSpec


def make(model: Path, folder: Path, *, count: int, rank: int) -> list[StoredAdapter]:
    """Adapters of every matrix of the blocks, equal in shape and with different numbers, converted and saved."""
    skeleton = Skeleton.read(model)
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for path, fact in skeleton.modules.items():
        if fact.kind == "linear" and fact.shape is not None and ".layers." in path:
            out, inner = fact.shape
            tensors[f"base_model.model.{path}.lora_A.weight"] = (
                torch.randn(rank, inner, generator=generator) / inner**0.5
            )
            tensors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * 0.02
    source = folder / "source"
    source.mkdir(parents=True)
    save_file(tensors, source / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "bias": "none", "r": rank, "lora_alpha": 32, "target_modules": "all-linear"}
    (source / "adapter_config.json").write_text(json.dumps(said))
    converted = convert(SourceAdapter.open(source), skeleton)
    return [_other(converted, folder / str(number), number) for number in range(count)]


def _other(converted: Converted, folder: Path, seed: int) -> StoredAdapter:
    generator = torch.Generator().manual_seed(seed)
    orders = {name: torch.randperm(converted.tensors.shape(name)[1], generator=generator) for name in converted.tensors}

    def lazy(name: str) -> Lazy:
        return Lazy(
            converted.tensors.shape(name),
            converted.tensors.dtype(name),
            lambda: converted.tensors[name][:, orders[name]].contiguous(),
        )

    tensors = Tensors({name: lazy(name) for name in converted.tensors})
    result = replace(converted, tensors=tensors, digest=digest_of(converted.peft_config, tensors))
    result.save(folder)
    return StoredAdapter.open(folder, result.digest)


class Engine:
    """A model engine in a thread, with the scheduling and batches that a worker has."""

    def __init__(self, model: Path, folder: Path) -> None:
        self._folder = folder
        self._spec = ModelSpec("bench", str(model), compute_dtype="float32")
        self._socket, other = socket.socketpair()
        self._channel = Channel(other, on_close=lambda: None)
        self._channel.start()
        self._engine = ModelEngine(self._channel, ModelEngineSettings(force_cpu=True))
        self._thread = threading.Thread(target=self._engine.run, name="engine", daemon=True)
        self._thread.start()
        self._events = receive(self._socket)
        self._jobs = 0

    def run(self, work: Sequence[tuple[StoredAdapter | None, list[int]]], layer: int) -> NDArray[np.float32]:
        """Texts as token ids, each a job of its own under its adapter, sent in order and all at once: the state of the
        last token at a layer, a row for each."""
        names = []
        for adapter, ids in work:
            self._jobs += 1
            names.append(f"job_{self._jobs}")
            scratch = self._folder / names[-1]
            scratch.mkdir()
            job = {
                "id": names[-1],
                "kind": "extraction",
                "resident": self._spec.to_wire(),
                "scratch": str(scratch),
                "spec": {"layers": [layer]},
                "inputs": [{"token_ids": ids}],
                "variants": [adapter and {"digest": adapter.digest, "path": str(adapter.folder)}],
            }
            self._socket.sendall(encode({"op": "run", "job": job}))
        paths: dict[str, str] = {}
        for event in self._events:
            if event["ev"] == "failed":
                raise RuntimeError(f"a job failed: {event['problem']}")
            if event["ev"] == "done":
                paths[event["id"]] = event["result"]["path"]
                if len(paths) == len(names):
                    break
        return np.stack([load_file(paths[name])["hidden_states"][0, 0].numpy() for name in names])

    def close(self) -> None:
        """End it."""
        self._socket.close()
        self._thread.join(30)
        self._channel.close()


@contextmanager
def engine(model: Path) -> Iterator[Engine]:
    """An engine that ends with the block; what its jobs wrote is removed."""
    with tempfile.TemporaryDirectory(prefix="bathyscope-bench-engine-") as folder:
        made = Engine(model, Path(folder))
        try:
            yield made
        finally:
            made.close()


def shuffled(adapters: Sequence[StoredAdapter], texts: Sequence[list[int]], seed: int) -> list[Any]:
    """Each text with an adapter, in turn, in random order."""
    work = [(adapters[number % len(adapters)], ids) for number, ids in enumerate(texts)]
    random.Random(seed).shuffle(work)
    return work
