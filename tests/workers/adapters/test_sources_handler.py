"""The engine's handler of adapters: from each source to one PEFT folder; stopped, killed, and refused."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file, save_file

from bathyscope import errors
from bathyscope_workers.adapters.conversion import convert
from bathyscope_workers.adapters.skeleton import Skeleton
from bathyscope_workers.adapters.source import SourceAdapter
from bathyscope_workers.adapters.sources._reach import Reach
from bathyscope_workers.engine.handlers import CPU_HANDLERS, JobContext, JobStopped, resolve
from bathyscope_workers.engine.protocol import FrameDecoder, RunJob, encode
from bathyscope_workers.models.spec import ModelSpec
from tests.hub_standin import HubStandin, Repository
from tests.tinker_standin import Fault, Standin
from tests.workers.adapters.tinker_layout import CASES, RANK, tinker_tensors, write_tinker

KEY = "tml-marker-of-the-request"
BASE = "tiny/qwen3"
CASE = next(case for case in CASES if case.name == "qwen3")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    folder = tmp_path_factory.mktemp("model")
    CASE.config().save_pretrained(folder)
    return ModelSpec(BASE, str(folder))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = CASE.build()
    return write_tinker(tmp_path_factory.mktemp("adapter") / "files", tinker_tensors(built, CASE.edits(built)))


@pytest.fixture
def standin() -> Iterator[Standin]:
    with Standin() as server:
        server.add_key(KEY)
        yield server


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


def job_of(scratch: Path, source: str | None, *models: ModelSpec, base: str | None = BASE, **rest: Any) -> RunJob:
    archive = rest.pop("archive_path", None)
    extra = {
        "reach": {**Reach(call_seconds=20.0, **rest).to_wire()},
        "models": [model.to_wire() for model in models],
        "archive_path": archive,
    }
    spec = {"source": source, "base_model": base}
    return RunJob("job_1", "adapter", spec=spec, scratch=str(scratch), extra=extra)


def run(scratch: Path, source: str | None, *models: ModelSpec, **rest: Any) -> dict[str, Any]:
    job = job_of(scratch, source, *models, **rest)
    handler = resolve(CPU_HANDLERS, "adapter")
    assert handler is not None
    return handler(job, JobContext(job, beat=lambda: None, progress=lambda *_: None))


def checkpoint(standin: Standin, files: Path, *, base: str = BASE, rank: int = RANK) -> str:
    return standin.add_run(base_model=base, rank=rank, key=KEY).add_checkpoint("external_weights", "final", files)


def at(standin: Standin) -> dict[str, Any]:
    return {"tinker_url": standin.url, "tinker_api_key": KEY}


def test_a_checkpoint_of_tinkers_becomes_a_peft_folder(
    standin: Standin, model: ModelSpec, adapter: Path, scratch: Path
) -> None:
    result = run(scratch, checkpoint(standin, adapter, base=f"{BASE}:peft:1"), model, **at(standin))
    converted = convert(SourceAdapter.open(adapter, base_model=BASE), Skeleton.read(Path(model.source), name=BASE))
    assert result["digest"] == converted.digest
    assert result["base_model"] == BASE
    assert result["format"] == "tinker"
    assert (result["rank"], result["alpha"], result["exclusive"]) == (RANK, 32.0, False)
    assert (
        result["tensors"]["read"]
        == result["tensors"]["applied"]
        == len(load_file(adapter / "adapter_model.safetensors"))
    )
    assert result["tinker"]["base_model"] == f"{BASE}:peft:1"
    assert sorted(path.name for path in scratch.iterdir()) == ["peft"]
    for entry in result["files"]:
        content = (Path(result["path"]) / entry["name"]).read_bytes()
        assert entry == {
            "name": entry["name"],
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    json.dumps(result)


def test_the_same_weights_have_one_digest_wherever_they_come_from(
    standin: Standin, model: ModelSpec, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    shutil.make_archive(str(tmp_path / "packed"), "zip", adapter)
    ways: list[tuple[str | None, dict[str, Any]]] = [
        (checkpoint(standin, adapter), at(standin)),
        ("hf://org/one", {}),
        (f"file://{adapter}", {"import_dir": str(adapter.parent)}),
        (f"file://{tmp_path}/packed.zip", {"import_dir": str(tmp_path)}),
        (None, {"archive_path": str(tmp_path / "packed.zip")}),
    ]
    with HubStandin() as hub:
        hub.repositories["org/one"] = Repository({path.name: path.read_bytes() for path in adapter.iterdir()})
        digests = set()
        for number, (source, reach) in enumerate(ways):
            scratch = tmp_path / f"scratch{number}"
            scratch.mkdir()
            result = run(scratch, source, model, hub_url=hub.url, **reach)
            digests.add(result["digest"])
            assert sorted(path.name for path in scratch.iterdir()) == ["peft"]
    assert len(digests) == 1
    assert (tmp_path / "packed.zip").exists()  # an upload's archive is not the handler's


def test_a_base_other_than_tinkers_is_refused(standin: Standin, model: ModelSpec, adapter: Path, scratch: Path) -> None:
    path = checkpoint(standin, adapter, base="tiny/qwen3-base")
    with pytest.raises(errors.AdapterBaseMismatch, match="tiny/qwen3-base"):
        run(scratch, path, model, **at(standin))


def test_a_local_name_of_the_base_says_nothing_of_what_it_is(
    standin: Standin, model: ModelSpec, adapter: Path, scratch: Path
) -> None:
    mine = ModelSpec("mine", model.source)
    result = run(scratch, checkpoint(standin, adapter), mine, base="mine", **at(standin))
    assert result["base_model"] == "mine"
    assert any("Tinker says tiny/qwen3" in note for note in result["conversion"])


def test_the_base_that_tinker_names_is_looked_for(
    standin: Standin, model: ModelSpec, adapter: Path, scratch: Path
) -> None:
    others = [ModelSpec("tiny/other", "/nowhere"), ModelSpec("local", "/nowhere")]
    path = checkpoint(standin, adapter, base="Tiny/Qwen3:peft:262144")
    assert run(scratch, path, *others, model, base=None, **at(standin))["base_model"] == BASE
    shutil.rmtree(scratch / "peft")
    with pytest.raises(errors.AdapterBaseMismatch, match="not offered here"):
        run(scratch, path, *others, base=None, **at(standin))


def test_a_rank_other_than_tinkers_is_refused(standin: Standin, model: ModelSpec, adapter: Path, scratch: Path) -> None:
    with pytest.raises(errors.AdapterConfigInvalid, match="rank 16"):
        run(scratch, checkpoint(standin, adapter, rank=16), model, **at(standin))


def test_broken_weights_are_refused_and_leave_nothing(
    standin: Standin, model: ModelSpec, adapter: Path, scratch: Path, tmp_path: Path
) -> None:
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    tensors = load_file(adapter / "adapter_model.safetensors")
    first = next(iter(tensors))
    nan = {**tensors, first: tensors[first] * float("nan")}
    save_file(nan, tmp_path / "nan.safetensors")
    save_file({f"x.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "renamed.safetensors")
    cases = {
        weights[:-100]: errors.AdapterIncomplete,
        (tmp_path / "nan.safetensors").read_bytes(): errors.AdapterValuesInvalid,
        (tmp_path / "renamed.safetensors").read_bytes(): errors.AdapterTensorsUnmatched,
        b"PK\x03\x04" + weights: errors.AdapterInvalid,
    }
    config = (adapter / "adapter_config.json").read_bytes()
    for content, problem in cases.items():
        run_of = standin.add_run(base_model=BASE, rank=RANK, key=KEY)
        files: dict[str, bytes | Path] = {"adapter_model.safetensors": content, "adapter_config.json": config}
        with pytest.raises(problem):
            run(scratch, run_of.add_checkpoint("external_weights", "final", files), model, **at(standin))
        assert list(scratch.iterdir()) == []


def test_a_job_is_stopped_while_it_converts(standin: Standin, model: ModelSpec, adapter: Path, scratch: Path) -> None:
    job = job_of(scratch, checkpoint(standin, adapter), model, **at(standin))
    seen: list[str] = []

    def progress(stage: str, done: int, total: int, unit: str) -> None:
        seen.append(stage)
        if stage == "convert" and done > total // 2:
            raise JobStopped

    handler = resolve(CPU_HANDLERS, "adapter")
    assert handler is not None
    with pytest.raises(JobStopped):
        handler(job, JobContext(job, beat=lambda: None, progress=progress))
    assert list(scratch.iterdir()) == []


def test_a_job_is_stopped_while_it_unpacks(model: ModelSpec, scratch: Path, tmp_path: Path) -> None:
    """And nothing goes on behind it."""
    with tarfile.open(tmp_path / "upload", "w") as archive:
        entry = tarfile.TarInfo("adapter_model.safetensors")
        entry.size = 64 << 20
        archive.addfile(entry, io.BytesIO(bytes(entry.size)))
    job = job_of(scratch, None, model, archive_path=str(tmp_path / "upload"))
    beats: list[int] = []

    def beat() -> None:
        beats.append(threading.active_count())
        if (scratch / "files" / "adapter_model.safetensors").exists():
            raise JobStopped

    before = threading.active_count()
    handler = resolve(CPU_HANDLERS, "adapter")
    assert handler is not None
    with pytest.raises(JobStopped):
        handler(job, JobContext(job, beat=beat, progress=lambda *_: None))
    assert set(beats) == {before}
    assert list(scratch.iterdir()) == []


# --- in the engine's own process -----------------------------------------------------------------------------------


class Engine:
    """A cpu engine as its supervisor starts it."""

    def __init__(self, home: Path, **environment: str) -> None:
        self._socket, other = socket.socketpair()
        self._socket.settimeout(60)
        self._decoder = FrameDecoder()
        self.events: list[dict[str, Any]] = []
        self.frames = b""
        command = [sys.executable, "-m", "bathyscope_workers.engine", "--kind", "cpu", "--log-level", "debug"]
        self.process = subprocess.Popen(
            [*command, "--fd", str(other.fileno())],
            pass_fds=[other.fileno()],
            stderr=subprocess.PIPE,
            env={**os.environ, "HOME": str(home), "TMPDIR": str(home), "HF_HOME": str(home / "hf"), **environment},
            cwd=home,
        )
        other.close()
        self.log: list[bytes] = []
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        self.log.extend(self.process.stderr)

    def send(self, **command: Any) -> None:
        self._socket.sendall(encode(command))

    def until(self, kind: str) -> dict[str, Any]:
        while True:
            while self.events:
                event = self.events.pop(0)
                if event["ev"] == kind:
                    return event
                assert event["ev"] != "failed", event
            data = self._socket.recv(1 << 16)
            assert data, "the engine closed the pipe"
            self.frames += data
            self.events += self._decoder.feed(data)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()
        self._socket.close()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    (tmp_path / "home").mkdir()
    with contextlib.closing(Engine(tmp_path / "home")) as started:
        started.until("ready")
        yield started


def slow(standin: Standin, adapter: Path) -> str:
    """A checkpoint whose transfer is hanging by the time it is asked for, half of it there."""
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    standin.fail("file", Fault(), Fault(cut_after=len(weights) // 2), Fault(seconds=30.0))
    return checkpoint(standin, adapter)


def wait_for(standin: Standin, requests: int) -> None:
    until = time.monotonic() + 60
    while standin.asked("/files/") < requests:
        assert time.monotonic() < until
        time.sleep(0.05)


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_killed_in_mid_download_nothing_is_left_outside_of_scratch(
    standin: Standin, model: ModelSpec, adapter: Path, scratch: Path, tmp_path: Path, engine: Engine
) -> None:
    engine.send(op="run", job=job_of(scratch, slow(standin, adapter), model, **at(standin)).to_wire())
    wait_for(standin, 3)
    children = psutil.Process(engine.process.pid).children(recursive=True)
    assert children  # the SDK's
    engine.process.send_signal(signal.SIGKILL)
    engine.process.wait()
    assert not psutil.wait_procs(children, timeout=30)[1]
    assert files_below(tmp_path) == ["scratch/files/adapter_config.json", "scratch/files/adapter_model.safetensors"]
    assert KEY not in str(files_below(tmp_path))


def test_a_job_that_is_cancelled_in_mid_download_makes_room_for_the_next(
    standin: Standin, model: ModelSpec, adapter: Path, scratch: Path, tmp_path: Path, engine: Engine
) -> None:
    engine.send(op="run", job=job_of(scratch, slow(standin, adapter), model, **at(standin)).to_wire())
    wait_for(standin, 3)
    engine.send(op="cancel", id="job_1")
    engine.until("cancelled")
    assert files_below(tmp_path) == []
    job = job_of(scratch, checkpoint(standin, adapter), model, **at(standin))
    engine.send(op="run", job=job.to_wire())
    assert engine.until("done")["result"]["base_model"] == BASE
    assert not psutil.Process(engine.process.pid).children()


def test_no_line_and_no_answer_of_the_engine_holds_a_secret(
    standin: Standin, model: ModelSpec, adapter: Path, scratch: Path, engine: Engine
) -> None:
    standin.fail("file", Fault(status=403), times=9)
    job = job_of(scratch, checkpoint(standin, adapter), model, hf_token="hf_marker", **at(standin))
    engine.send(op="run", job=job.to_wire())
    with pytest.raises(AssertionError, match="tinker-out-of-reach"):
        engine.until("done")
    engine.send(op="shutdown")
    engine.process.wait(30)
    engine.close()
    said = engine.frames + b"".join(engine.log)
    secrets = [KEY, "hf_marker", "X-Signature", *standin.state.signed]
    assert not any(secret.encode() in said for secret in secrets)


def test_of_a_base_on_the_hub_the_config_alone_is_fetched(
    standin: Standin, model: ModelSpec, adapter: Path, scratch: Path, tmp_path: Path
) -> None:
    with (
        HubStandin() as hub,
        contextlib.closing(Engine(tmp_path, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0")) as engine,
    ):
        config = (Path(model.source) / "config.json").read_bytes()
        hub.repositories[BASE] = Repository({"config.json": config, "model.safetensors": b"x" * 1000})
        path = checkpoint(standin, adapter)
        job = job_of(scratch, path, ModelSpec(BASE, f"hf://{BASE}"), **at(standin))
        engine.send(op="run", job=job.to_wire())
        assert engine.until("done")["result"]["base_model"] == BASE
        resolved = {place.rpartition("/")[2] for place, _ in hub.requests if "/resolve/" in place}
        assert resolved == {"config.json"}
        shutil.rmtree(scratch / "peft")
        job = job_of(scratch, path, ModelSpec(BASE, "hf://org/none"), **at(standin))
        engine.send(op="run", job=job.to_wire())
        with pytest.raises(AssertionError, match="model-load-failed"):
            engine.until("done")
