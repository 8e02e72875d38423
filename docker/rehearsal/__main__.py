"""Builds and runs the images without a container engine, as far as that goes: `sudo .venv/bin/python docker/rehearsal`.

Each Dockerfile is read and carried out: its COPY and RUN lines in a root folder of its own, entered by chroot, into
which this machine's system folders are bound read-only in place of the base image. Then queue, front end and worker run
as docker-compose.yml says, with its environment: in namespaces of their own (mounts, processes, network), as user 10001
without capabilities, on a read-only root with only /data and /tmp to write to. What is asked of them is printed.

What this does not show: the base images, the overlay file system, the engine's own networks, CUDA, and the store's
image, in whose place moto's server stands. Needs root, Linux, and the project's `all` and `test` extras.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from images import ROOT, UID, Build, Container, Stage, inside, new_root, path, run, say

BIN = Path(sys.prefix) / "bin"
SERVICE = "http://127.0.0.1:8000"
MODELS = """[[models]]
name = "tiny"
source = "/etc/bathyscope/tiny"
"""
MAKE_TINY = """
import sys, torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
raw = ByteLevelBPETokenizer()
raw.train_from_iterator(["The capital of France is Paris."], vocab_size=270, special_tokens=["<s>", "</s>"])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw._tokenizer, eos_token="</s>", model_max_length=512)
tokenizer.save_pretrained(sys.argv[1])
torch.manual_seed(0)
shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4)
LlamaForCausalLM(LlamaConfig(vocab_size=300, max_position_embeddings=512, **shape)).save_pretrained(sys.argv[1])
"""


def ask(path: str, key: str, body: Any = None, **headers: str) -> Any:
    """One request to the front end."""
    data = json.dumps(body).encode() if body is not None else None
    headers |= {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = urllib.request.Request(SERVICE + path, data, headers)
    with urllib.request.urlopen(request, timeout=90) as answer:
        return json.loads(answer.read())


def succeeded(job: dict[str, Any]) -> dict[str, Any]:
    """The job, which must have succeeded."""
    if job["status"] != "succeeded":
        raise SystemExit(f"{job['id']} is {job['status']}: {job['error']}; see the logs of the working folder.")
    return job


def wait_for(what: Callable[[], bool], name: str, seconds: float = 120) -> None:
    """Until it is so."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, urllib.error.URLError):
            if what():
                return
        time.sleep(0.2)
    raise SystemExit(f"{name} did not come about within {seconds:.0f} s")


@contextlib.contextmanager
def bucket() -> Iterator[None]:
    """moto's S3 server where the environment expects the store."""
    import boto3

    server = subprocess.Popen([str(BIN / "moto_server"), "-H", "127.0.0.1", "-p", "8333"], stderr=subprocess.DEVNULL)
    try:
        client = boto3.client(
            "s3", endpoint_url="http://127.0.0.1:8333", aws_access_key_id="a", aws_secret_access_key="b",
            region_name="us-east-1",
        )  # fmt: skip

        def made() -> bool:
            with contextlib.suppress(Exception):
                client.create_bucket(Bucket="bathyscope")
                return True
            return False

        wait_for(made, "the bucket")
        yield
    finally:
        server.terminate()
        server.wait()


def report(images: dict[str, Stage]) -> None:
    """What came in."""
    for name, stage in images.items():
        words = ["python", "-c", "import importlib.metadata as m; print(*sorted(d.name for d in m.distributions()))"]
        packages = run(*inside(stage.root, words, environment=stage.environment, build=True)).split()
        torch = [package for package in packages if package in ("torch", "transformers", "bitsandbytes")]
        size = run("du", "-sm", stage.root / "opt/bathyscope").split()[0]
        say(f"{name}: {len(packages)} packages, {size} MB below /opt/bathyscope, of torch's: {torch or 'none'}")


def compose() -> dict[str, Any]:
    """docker-compose.yml with fresh secrets, as the real `docker compose config` resolves it."""
    with tempfile.NamedTemporaryFile("w", suffix=".env") as file:
        file.write(run("sh", ROOT / "docker/secrets.sh"))
        file.flush()
        words = [BIN / "docker-compose", "--project-directory", ROOT, "--env-file", file.name, "--profile", "*"]
        found: dict[str, Any] = json.loads(run(*words, "config", "--format", "json"))
        return found


class Rehearsal:
    """The stack of docker-compose.yml, run and asked for work, in a network of its own."""

    def __init__(self, place: Path, images: dict[str, Stage]) -> None:
        self._images = images
        self._place = place
        self._services = compose()["services"]
        self._running: list[Container] = []
        for name in ("queue", "service", "worker"):
            folder = place / "volumes" / name
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            os.chown(folder, int(UID), int(UID))
        self._lists = place / "lists"
        shutil.rmtree(self._lists, ignore_errors=True)
        self._lists.mkdir()
        (place / "logs").mkdir(exist_ok=True)

    def go(self) -> None:
        """From the queue's start to the last SIGTERM."""
        run("ip", "link", "set", "lo", "up")
        self._make_model()
        try:
            self._backends()
            with bucket():
                self._front()
                self._work()
                self._drain()
        finally:
            for container in self._running:
                container.kill()

    def _start(self, name: str, image: Stage, service: str, command: list[str] | None = None) -> Container:
        given = {key: str(value) for key, value in self._services[service]["environment"].items()}
        volume = "worker" if service.startswith("worker") else service
        container = Container(
            image.root,
            [*image.entry, *(image.command if command is None else command)],
            {**image.environment, **given},
            {"/data": self._place / "volumes" / volume, "/etc/bathyscope": self._lists},
            self._place / "logs" / f"{name}.log",
        )
        self._running.append(container)
        return container

    def _make_model(self) -> None:
        worker = self._images["worker"]
        words = ["python", "-c", MAKE_TINY, "/etc/bathyscope/tiny"]
        run(*inside(worker.root, words, environment={**worker.environment, "HOME": "/tmp"}, build=True))
        shutil.copytree(worker.root / "etc/bathyscope/tiny", self._lists / "tiny")
        run("chmod", "-R", "a+rX", self._lists)
        (self._lists / "models.toml").write_text(MODELS)

    def _backends(self) -> None:
        from bathyscope_backplane.embedded import find_binary

        root = new_root(self._place / "queue")
        (root / "opt/queue").mkdir()
        shutil.copy2(find_binary(), root / "opt/queue/valkey-server")
        shutil.copy2(str(shutil.which("redis-cli")), root / "opt/queue/valkey-cli")
        words = [word.replace("$$", "$") for word in self._services["queue"]["command"]]
        queue = self._start("queue", Stage(root, {"PATH": f"/opt/queue:{path()}"}), "queue", words)
        check = self._services["queue"]["healthcheck"]["test"][1].replace("$$", "$")
        wait_for(lambda: queue.well(["sh", "-c", check]), "the queue")
        policy = queue.exec(["valkey-cli", "config", "get", "appendfsync"]).stdout.split()
        say(f"queue: healthy by its own check, {' '.join(policy)}; user {queue.exec(['id', '-u']).stdout.strip()}")

    def _front(self) -> None:
        image = self._images["service"]
        refused = self._start("refused", image, "service")
        refused.process.wait(60)
        say(f"service without a key: {refused.log.read_text().strip().splitlines()[-1]}")
        words = ["keys", "create", "ops", "--scope", "admin", "--json"]
        maker = self._start("keys", image, "service", words)
        if maker.process.wait(60) != 0:
            raise SystemExit(maker.log.read_text())
        self.key: str = json.loads(maker.log.read_text())["key"]
        say("keys create ops --scope admin: made")
        self.service = self._start("service", image, "service")
        wait_for(lambda: self.service.well(image.check), "a healthy service")
        ready = self.service.exec(["bathyscope", "health", "service", "--ready"])
        say(f"service: {' '.join(image.check)}: well; --ready without a worker: {ready.stdout.strip()}")

    def _work(self) -> None:
        image = self._images["worker"]
        self.worker = self._start("worker", image, "worker-cpu")
        wait_for(lambda: bool(ask("/readyz", "")["ready"]), "/readyz")
        say(f"/readyz: {ask('/readyz', '')}")
        say(f"worker: {' '.join(image.check)}: {self.worker.exec(image.check).stdout.strip()}")
        body = {"model": "tiny", "inputs": ["The capital of France is Paris."], "layers": [0, 2, -1]}
        job = ask("/v1/extractions", self.key, body, Prefer="wait=60")
        made = ask(succeeded(job)["resource"], self.key)
        say(f"extraction: {job['status']}, shape {made['shape']}, sha256 {made['sha256'][:12]}…, artifacts on S3")
        for name, container in (("service", self.service), ("worker", self.worker)):
            told = container.exec(["sh", "-c", "grep -E '^(Uid|Cap|NoNew)' /proc/1/status; touch /opt/bathyscope/x"])
            state = {line.split()[0]: line.split()[1] for line in told.stdout.splitlines()}
            caps = {value for key, value in state.items() if key.startswith("Cap")}
            if (state["Uid:"], state["NoNewPrivs:"], caps) != (UID, "1", {"0" * 16}):
                raise SystemExit(f"{name} runs with too much: {state}")
            say(f"{name}: user {UID}, no capabilities, no new privileges; {told.stderr.strip()}")
        processes = self.worker.exec(
            ["sh", "-c", "grep -h '^State:.*Z' /proc/[0-9]*/status | wc -l; ls -d /proc/[0-9]*"]
        )
        zombies, *rest = processes.stdout.split()
        engine = self.worker.exec(["sh", "-c", "grep -l bathyscope_workers.engine /proc/[0-9]*/cmdline"]).stdout.split()
        say(f"worker: {len(rest)} processes, {zombies} zombies; kill -9 of an engine")
        self.worker.exec(["kill", "-9", engine[0].split("/")[2]])
        job = ask("/v1/extractions", self.key, {**body, "inputs": ["again"]}, Prefer="wait=60")
        zombies = self.worker.exec(["sh", "-c", "grep -h '^State:.*Z' /proc/[0-9]*/status | wc -l"]).stdout.strip()
        say(f"worker: next extraction {succeeded(job)['status']}, {zombies} zombies")

    def _drain(self) -> None:
        job = self._begin(2_000)
        say(f"SIGTERM to the worker with a job under way: {self.worker.stop(160)}; the job: {self._state(job)}")
        ready = self.service.exec(["bathyscope", "health", "service", "--ready"])
        say(f"service --ready without a worker: {ready.stdout.strip()}")
        another = self._another("second")
        job = self._begin(20_000)
        say(f"SIGTERM twice to the next one: {another.stop(160, twice=True)}; the job: {self._state(job)}")
        another = self._another("third")
        wait_for(lambda: ask(f"/v1/jobs/{job}", self.key)["status"] not in ("queued", "running"), "the job's end", 500)
        succeeded(ask(f"/v1/jobs/{job}", self.key))
        say(f"a third worker: the job {self._state(job)}; SIGTERM when idle: {another.stop(160)}")
        say(f"SIGTERM to the service: {self.service.stop(20)}")
        say(f"SIGTERM to the queue: {self._running[0].stop(30)}")

    def _begin(self, count: int) -> str:
        """A job of so many texts, running."""
        texts = [f"{number} " * 60 for number in range(count)]
        job: str = ask("/v1/extractions", self.key, {"model": "tiny", "inputs": texts, "layers": [4]})["id"]
        wait_for(lambda: ask(f"/v1/jobs/{job}", self.key)["status"] == "running", "a running job")
        return job

    def _state(self, job: str) -> str:
        found = ask(f"/v1/jobs/{job}", self.key)
        return f"{found['status']}, attempt {found['attempt']} of {found['max_attempts']}"

    def _another(self, name: str) -> Container:
        image = self._images["worker"]
        made = self._start(name, image, "worker-cpu")
        wait_for(lambda: made.well(image.check), "another worker")
        return made


def main() -> None:
    """Build, then run in a network namespace of its own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--place", type=Path, default=Path("/var/tmp/bathyscope-rehearsal"), help="working folder")
    parser.add_argument("--only", choices=["build", "run"], help="one half; `run` takes what was built before")
    options = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("Mounts need root: run this with sudo.")
    place: Path = options.place.resolve()
    saved = place / "images.json"
    if options.only != "run":
        images = {}
        for name, arguments in (("service", {}), ("worker", {"TORCH": "cpu"})):
            given = " ".join(f"--build-arg {key}={value}" for key, value in arguments.items())
            say(f"docker build -f docker/{name}.Dockerfile {given}")
            made = Build(ROOT / f"docker/{name}.Dockerfile", place / name, arguments).stage
            if made is None or made.user != f"{UID}:{UID}":
                raise SystemExit(f"docker/{name}.Dockerfile does not end as user {UID}.")
            images[name] = made
        saved.write_text(json.dumps({name: {**vars(stage), "root": str(stage.root)} for name, stage in images.items()}))
        report(images)
    if options.only != "build":
        if os.environ.get("REHEARSAL_NETWORK") is None:
            again = [sys.executable, str(Path(__file__).parent), "--place", str(place), "--only", "run"]
            environment = {**os.environ, "REHEARSAL_NETWORK": "own"}
            raise SystemExit(subprocess.run(["unshare", "--net", *again], env=environment, check=False).returncode)
        loaded = json.loads(saved.read_text())
        Rehearsal(place, {name: Stage(**{**of, "root": Path(of["root"])}) for name, of in loaded.items()}).go()


if __name__ == "__main__":
    main()
