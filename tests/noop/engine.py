"""An engine that computes nothing: `python -m tests.noop.engine --kind model|cpu|fetch --fd N`.

One token is one byte of UTF-8. A state is the position of its layer and the mean byte of what it stands for, so that
results differ where they ought to. A job whose `metadata` (of an extraction) holds `{"noop_seconds": 3}` takes so long
and can be cancelled meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from bathyscope import errors
from bathyscope_workers.engine import comparison_handlers
from bathyscope_workers.engine.channel import Channel
from bathyscope_workers.engine.handlers import JobContext
from bathyscope_workers.engine.process import die_with_parent, ignore_interrupts
from bathyscope_workers.engine.protocol import RunJob
from bathyscope_workers.extraction.spec import ExtractionSpec
from bathyscope_workers.models.spec import ModelSpec
from tests.noop import adapters, results

_BEAT_SECONDS = 0.2
_WIDTHS: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
}
_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64"}


class Stopped(Exception):
    """The job was cancelled or forgotten, or the engine is ending."""


class NoopEngine:
    """Serves one pipe until it closes."""

    def __init__(self, channel: Channel, kind: str) -> None:
        self._channel = channel
        self._kind = kind
        self._jobs: dict[str, RunJob] = {}
        self._residents: dict[str, dict[str, Any]] = {}
        self._stopping = False

    def run(self) -> None:
        """Serve until `shutdown` or until the pipe closes."""
        ready = {"device": "cpu", "device_name": "none", "memory_limit_bytes": 2**30, "versions": {"noop": "1"}}
        self._send("ready", kind=self._kind, pid=os.getpid(), **ready)
        while not self._stopping:
            self._listen(block=not self._jobs)
            if self._jobs and not self._stopping:
                self._work(next(iter(self._jobs.values())))

    def _send(self, event: str, **members: Any) -> None:
        self._channel.send({"ev": event, **members})

    def _listen(self, *, block: bool) -> None:
        while not self._stopping:
            command = self._channel.get(block=block)
            if command is None:
                self._stopping = self._channel.closed
                return
            block = False
            match command["op"]:
                case "run":
                    job = RunJob.from_wire(command["job"])
                    self._jobs[job.id] = job
                case "cancel" if self._jobs.pop(command["id"], None) is not None:
                    self._send("cancelled", id=command["id"])
                case "drop_all":
                    self._jobs.clear()
                case "load":
                    self._load(ModelSpec.from_wire(command["resident"]))
                case "unload":
                    self._unload(command["key"])
                case "shutdown":
                    self._stopping = True

    def _work(self, job: RunJob) -> None:
        started = time.monotonic()
        self._send("running", ids=[job.id])
        try:
            result = self._result(job)
        except Stopped:
            pass
        except errors.ProblemError as error:
            self._jobs.pop(job.id)
            self._send("failed", id=job.id, problem=error.problem(), retry=isinstance(error, errors.Unavailable))
        else:
            self._jobs.pop(job.id)
            seconds = time.monotonic() - started
            timings = {"load": 0.0, "tokenise": 0.0, "inference": seconds, "total": seconds}
            self._send("done", id=job.id, result=result, timings=timings)
        if not self._jobs:
            self._send("running", ids=[])

    def _result(self, job: RunJob) -> dict[str, Any]:
        if job.kind == "probe":
            return results.probe(job)
        if job.kind == "comparison":
            return comparison_handlers.run(job, JobContext(job, beat=lambda: None, progress=lambda *_: None))
        if job.kind == "adapter" and self._kind == "fetch":
            return adapters.fetch(job, lambda seconds: self._pass(job, seconds, "download"))
        if job.kind == "prediction" and self._kind == "cpu":
            rows = job.spec["layout"]["offsets"]["shape"][0] - 1
            return results.prediction(job, job.spec["readings"], rows)
        assert isinstance(job.resident, dict)
        facts = self._load(ModelSpec.from_wire(job.resident), answer=False)
        if job.kind == "adapter":
            return adapters.attach(job, lambda seconds: self._pass(job, seconds, "attach"), facts["num_layers"])
        self._pass_time(job)
        made = self._extract(job, facts)
        if job.kind == "prediction":
            return {
                **results.prediction(job, job.extra["readings"], made["inputs"]),
                "provenance": made["provenance"],
            }
        return made

    def _pass_time(self, job: RunJob) -> None:
        """Take as long as the request says."""
        metadata = job.spec.get("metadata") or {}
        total = metadata.get("noop_seconds", 0)
        if isinstance(total, int | float):
            self._pass(job, total, "forward")

    def _pass(self, job: RunJob, total: float, stage: str) -> None:
        started = time.monotonic()
        while (passed := time.monotonic() - started) < total:
            self._send("progress", id=job.id, stage=stage, done=int(passed), total=int(total) or 1, unit="seconds")
            time.sleep(min(_BEAT_SECONDS, total - passed))
            self._listen(block=False)
            if job.id not in self._jobs or self._stopping:
                raise Stopped

    # --- models ---

    def _load(self, spec: ModelSpec, *, answer: bool = True) -> dict[str, Any]:
        resolved = spec.resolved("cpu")
        facts = self._residents.get(resolved.key)
        if facts is None:
            self._send("loading", key=resolved.key, asked=spec.key)
            facts = self._residents[resolved.key] = _facts(resolved)
            answer = True
        if answer:
            self._send("loaded", key=resolved.key, asked=spec.key, facts=facts)
        return facts

    def _unload(self, asked: str) -> None:
        name, quantization, dtype = asked.rsplit(":", 2)
        key = f"{name}:{quantization}:{'float32' if dtype == 'auto' else dtype}"
        held = self._residents.pop(key, None) is not None
        self._send("unloaded", key=key if held else asked, reason="asked" if held else "missing")

    # --- extractions ---

    def _extract(self, job: RunJob, facts: dict[str, Any]) -> dict[str, Any]:
        spec = ExtractionSpec.from_wire(job.spec)
        layers = spec.resolve_layers(facts["num_layers"])
        numbered = enumerate(_inputs(job), start=job.extra.get("first_input", 0))
        rows = [_tokens(number, item, spec, facts) for number, item in numbered]
        if spec.pooling == "none":
            rows = [_kept(number, row, spec) for number, row in enumerate(rows)]
        offsets = np.cumsum([0, *map(len, rows)], dtype="<i8")
        token_ids = np.concatenate(rows).astype("<i8")
        means = token_ids if spec.pooling == "none" else np.array([row.mean() for row in rows])
        shape = (len(means), len(layers), facts["hidden_size"])
        states = np.broadcast_to(means[:, None, None] / 256 + np.array(layers)[None, :, None], shape)
        variants = job.extra.get("variants") or [None]
        if job.spec.get("paired"):  # each variant adds its number
            states = np.stack([states + number for number in range(len(variants))])
            shape = states.shape
        elif variants != [None]:
            states = states + int(variants[0]["digest"][:4], 16)
        if spec.dtype == "bfloat16":
            stored = (states.astype("<f4").view("<u4") >> 16).astype("<u2")
        else:
            stored = states.astype(_WIDTHS[spec.dtype])
        provenance = _provenance(job, spec, layers, facts)
        path = Path(job.scratch) / "hidden_states.safetensors"
        tensors = {
            "offsets": ("int64", offsets),
            "token_ids": ("int64", token_ids),
            "hidden_states": (spec.dtype, stored),
        }
        places, header_bytes = _write(path, tensors, provenance)
        total = int(offsets[-1])
        return {
            "path": str(path),
            "bytes": path.stat().st_size,
            "header_bytes": header_bytes,
            "tensors": places,
            "shape": list(shape),
            "dtype": spec.dtype,
            "layers": layers,
            "inputs": len(rows),
            "tokens": {"total": total, "computed": total, "kept": total},
            "provenance": provenance,
            "cache": {"hits": 0, "duplicates": 0},
            "relative_change": [[float(number)] * len(layers) for number in range(len(variants))],
            "change": [
                {"sums": [float(number * len(means))] * len(layers), "counts": [len(means)] * len(layers)}
                for number in range(1, len(variants))
            ],
            "choices": results.choices(job, _inputs(job), len(variants)) if spec.score_choices else None,
        }


def _facts(spec: ModelSpec) -> dict[str, Any]:
    config: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        config = json.loads((Path(spec.source) / "config.json").read_text())
    packaged = spec.source.endswith(".gguf")
    return {
        "num_layers": config.get("num_hidden_layers", 30 if packaged else 4),
        "hidden_size": config.get("hidden_size", 576 if packaged else 32),
        "architecture": (config.get("architectures") or ["LlamaForCausalLM"])[0],
        "causal": True,
        "max_length": config.get("max_position_embeddings", 8192 if packaged else 512),
        "vocab_size": config.get("vocab_size", 49152 if packaged else 300),
        "memory_bytes": 2**20,
        "memory_growth_bytes": 2**20,
        "fraction_quantized": 0.0 if spec.quantization == "none" else 0.5,
        "quantization": spec.quantization,
        "llm_int8_threshold": spec.llm_int8_threshold if spec.quantization == "8bit" else None,
        "compute_dtype": spec.compute_dtype,
        "revision": "noop",
        "has_chat_template": True,
        "has_tokenizer": True,
        "style": "noop",
        "load_seconds": 0.0,
        "self_test": {"passed": True, "layers": [], "max_relative_error": 0.0, "against_unquantized": None},
    }


def _inputs(job: RunJob) -> list[Any]:
    if job.inputs is not None:
        return job.inputs
    assert job.inputs_path is not None
    return [orjson.loads(line) for line in Path(job.inputs_path).read_bytes().splitlines()]


def _tokens(number: int, item: Any, spec: ExtractionSpec, facts: dict[str, Any]) -> NDArray[Any]:
    """Token ids of one input. Raises `InvalidInput` where the real engine would."""
    if isinstance(item, str):
        row = np.frombuffer(item.encode(), np.uint8).astype(np.int64)
    elif "token_ids" in item:
        row = np.array(item["token_ids"], np.int64)
        if len(row) and row.max() >= facts["vocab_size"]:
            raise _fault(number, f"token ids are below {facts['vocab_size']}")
    elif "prompt" in item:
        row = np.frombuffer(item["prompt"].encode(), np.uint8).astype(np.int64)
    else:
        row = np.frombuffer(orjson.dumps(item["messages"]), np.uint8).astype(np.int64)
    longest = min(filter(None, (facts["max_length"], spec.max_length)))
    if len(row) > longest:
        if spec.truncation == "error":
            raise _fault(number, f"has {len(row)} tokens, the most are {longest}; set truncation")
        row = row[:longest] if spec.truncation == "right" else row[-longest:]
    if not len(row):
        raise _fault(number, "gives no tokens")
    return row


def _kept(number: int, row: NDArray[Any], spec: ExtractionSpec) -> NDArray[Any]:
    positions = spec.positions
    if positions is None:
        return row
    if positions.tokens is not None:
        if not all(-len(row) <= one < len(row) for one in positions.tokens):
            raise _fault(number, f"has {len(row)} tokens")
        return row[list(positions.tokens)]
    assert positions.span is not None
    kept = row[slice(*positions.span)]
    if not len(kept):
        raise _fault(number, f"has {len(row)} tokens, so the span is empty")
    return kept


def _fault(number: int, detail: str) -> errors.InvalidInput:
    return errors.InvalidInput("An input cannot be used.", errors=[{"pointer": f"/inputs/{number}", "detail": detail}])


def _provenance(job: RunJob, spec: ExtractionSpec, layers: list[int], facts: dict[str, Any]) -> dict[str, Any]:
    assert isinstance(job.resident, dict)
    return {
        "model": job.resident["name"],
        "revision": facts["revision"],
        "quantization": facts["quantization"],
        "llm_int8_threshold": facts["llm_int8_threshold"],
        "compute_dtype": facts["compute_dtype"],
        "num_layers": facts["num_layers"],
        "layers": layers,
        "pooling": spec.pooling,
        "positions": spec.positions.to_wire() if spec.positions else None,
        "template": spec.template,
        "add_generation_prompt": spec.add_generation_prompt,
        "max_length": facts["max_length"],
        "truncation": spec.truncation,
        "dtype": spec.dtype,
        "batch_invariant": spec.batch_invariant,
        "versions": {"noop": "1"},
    }


def _write(
    path: Path, tensors: dict[str, tuple[str, NDArray[Any]]], provenance: dict[str, Any]
) -> tuple[dict[str, dict[str, Any]], int]:
    """The safetensors file; where each tensor lies, and where they begin."""
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in provenance.items()}
    header: dict[str, Any] = {"__metadata__": texts}
    position = 0
    for name, (dtype, array) in tensors.items():
        span = [position, position + array.nbytes]
        header[name] = {"dtype": _CODES[dtype], "shape": list(array.shape), "data_offsets": span}
        position += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    begin = 8 + len(text)
    places = {
        name: {
            "dtype": dtype,
            "shape": list(array.shape),
            "offset": begin + header[name]["data_offsets"][0],
            "bytes": array.nbytes,
        }
        for name, (dtype, array) in tensors.items()
    }
    path.write_bytes(
        b"".join([len(text).to_bytes(8, "little"), text, *(array.tobytes() for _, array in tensors.values())])
    )
    return places, begin


def main() -> None:
    """Serve the pipe."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kind", choices=("model", "cpu", "fetch"), required=True)
    parser.add_argument("--fd", type=int, required=True)
    options, _ = parser.parse_known_args()
    die_with_parent()
    ignore_interrupts()
    channel = Channel(socket.socket(fileno=options.fd), on_close=lambda: os._exit(0))
    channel.start()
    NoopEngine(channel, options.kind).run()


if __name__ == "__main__":
    main()
