"""Dockerfiles carried out by chroot, and what they made run as a container would."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
UID = "10001"
DROP = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "--no-new-privs"]
DROP += ["--bounding-set=-all", "--inh-caps=-all"]
DEVICES = ("null", "zero", "full", "random", "urandom")


def say(text: str) -> None:
    """One line of the transcript."""
    print(text, flush=True)


def run(*command: str | Path, **options: Any) -> str:
    """The output of a command that must succeed."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)
    if done.returncode != 0:
        raise SystemExit(f"{shlex.join(map(str, command))}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return done.stdout


@dataclass
class Stage:
    """One stage of a Dockerfile, carried out so far."""

    root: Path
    environment: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, str] = field(default_factory=dict)
    folder: str = "/"
    user: str = ""
    entry: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    check: list[str] = field(default_factory=list)


class Build:
    """A Dockerfile, carried out."""

    def __init__(self, dockerfile: Path, place: Path, arguments: dict[str, str]) -> None:
        self._place = place
        self._given = arguments
        self._global: dict[str, str] = {}
        self._stages: dict[str, Stage] = {}
        self._allowed = [
            line[1:].rstrip("/") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")
        ]
        self.stage: Stage | None = None
        text = re.sub(r"^\s*#.*\n", "", dockerfile.read_text(), flags=re.MULTILINE)
        for line in re.sub(r"\\\n", " ", text).splitlines():
            if line.strip():
                operation, _, rest = line.strip().partition(" ")
                getattr(self, f"_{operation.lower()}")(rest.strip())

    def _from(self, rest: str) -> None:
        name = rest.partition(" AS ")[2] or "final"
        self.stage = self._stages[name] = Stage(new_root(self._place / name))
        say(f"  stage {name}, in place of {self._expand(rest.split()[0])}: this machine's Debian and Python")

    def _arg(self, rest: str) -> None:
        name, _, default = rest.partition("=")
        target = self._global if self.stage is None else self.stage.arguments
        target[name] = self._given.get(name, default)

    def _env(self, rest: str) -> None:
        for part in shlex.split(rest):
            name, _, value = part.partition("=")
            self._now.environment[name] = self._expand(value)

    def _workdir(self, rest: str) -> None:
        self._now.folder = rest
        (self._now.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)

    def _copy(self, rest: str) -> None:
        parts = rest.split()
        origin = ROOT
        if parts[0].startswith("--from="):
            origin = self._stages[parts.pop(0).removeprefix("--from=")].root
        *sources, target = parts
        base = target if target.startswith("/") else f"{self._now.folder}/{target}"
        for source in sources:
            inside = source.lstrip("/")
            if origin == ROOT and not any(inside == name or inside.startswith(name + "/") for name in self._allowed):
                raise SystemExit(f"{source} is not in the build context: see .dockerignore.")
            path, place = origin / inside, self._now.root / base.lstrip("/")
            if path.is_dir():
                shutil.copytree(
                    path,
                    place,
                    symlinks=True,
                    dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("__pycache__") if origin == ROOT else None,
                )
            else:
                shutil.copy2(path, place / path.name if target.endswith("/") else place)

    def _run(self, rest: str) -> None:
        say(f"  RUN {' '.join(rest.split())}")
        stage = self._now
        run(
            *inside(stage.root, ["sh", "-c", f"cd {stage.folder} && {rest}"], environment=self._variables(), build=True)
        )

    def _user(self, rest: str) -> None:
        self._now.user = rest

    def _entrypoint(self, rest: str) -> None:
        self._now.entry = json.loads(rest)

    def _cmd(self, rest: str) -> None:
        self._now.command = json.loads(rest)

    def _healthcheck(self, rest: str) -> None:
        self._now.check = json.loads(rest.partition(" CMD ")[2])

    def _ignore(self, rest: str) -> None:
        """Says nothing about the files."""

    _label = _expose = _stopsignal = _ignore

    @property
    def _now(self) -> Stage:
        assert self.stage is not None
        return self.stage

    def _variables(self) -> dict[str, str]:
        stage = self._now
        pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        return {"PATH": path(), **pip, **stage.arguments, **stage.environment}

    def _expand(self, text: str) -> str:
        known = self._global if self.stage is None else {**self._global, **self._variables()}
        return re.sub(r"\$\{?(\w+)\}?", lambda match: known.get(match[1], ""), text)


def assignments(environment: dict[str, str]) -> list[str]:
    """As `env` takes them."""
    return [f"{name}={value}" for name, value in environment.items()]


def path() -> str:
    """Where the base image's commands are."""
    return f"{sys.base_prefix}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def new_root(root: Path) -> Path:
    """A root folder with what a base image would hold; the binds are made when it is entered."""
    if root.exists():
        shutil.rmtree(root)
    for name in ("proc", "dev", "tmp", "data", "opt", "root", "run", "var/tmp", "usr", sys.base_prefix.lstrip("/")):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "tmp").chmod(0o1777)
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    for device in DEVICES:
        (root / "dev" / device).touch()
    shutil.copytree("/etc", root / "etc", symlinks=True, ignore_dangling_symlinks=True)
    (root / "etc/hosts").write_text("127.0.0.1 localhost queue store\n")
    (root / "etc/bathyscope").mkdir()
    for folder in Path("/opt").iterdir():
        (root / "opt" / folder.name).mkdir(exist_ok=True)
    return root


def inside(
    root: Path,
    command: list[str],
    *,
    environment: dict[str, str],
    build: bool = False,
    binds: dict[str, Path] | None = None,
) -> list[str]:
    """A command line that runs `command` in a root: while building as root with the network, else as a container."""
    host = ["/usr", sys.base_prefix, *(f"/opt/{folder.name}" for folder in Path("/opt").iterdir())]
    lines = ["set -e", f"mount --bind {root} {root}"]
    for source in host:
        if not sys.base_prefix.startswith("/usr/") or source == "/usr" or not source.startswith("/usr/"):
            lines += [f"mount --bind {source} {root}{source}", f"mount -o remount,bind,ro {root}{source}"]
    lines += [f"mount --bind /dev/{device} {root}/dev/{device}" for device in DEVICES]
    lines.append(f"mount -t proc proc {root}/proc")
    for target, source in (binds or {}).items():
        lines.append(f"mount --bind {source} {root}{target}")
        if target != "/data":
            lines.append(f"mount -o remount,bind,ro {root}{target}")
    if not build:
        lines += [f"mount -t tmpfs -o mode=1777 tmpfs {root}/tmp", f"mount -o remount,bind,ro {root}"]
    words = ["chroot", str(root), *([] if build else DROP), "env", "-i", *assignments(environment), *command]
    lines.append(f"exec {shlex.join(words)}")
    return ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", "\n".join(lines)]


class Container:
    """A running process 1 with a root, namespaces and user of its own. What it says goes into `log`."""

    def __init__(
        self, root: Path, command: list[str], environment: dict[str, str], binds: dict[str, Path], log: Path
    ) -> None:
        self.environment = environment
        self.log = log
        words = inside(root, command, environment=environment, binds=binds)
        with log.open("wb") as file:
            self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=file, stderr=file)

    @property
    def pid(self) -> int:
        """Process 1, as this machine counts it."""
        outer = self.process.pid
        return int(Path(f"/proc/{outer}/task/{outer}/children").read_text().split()[0])

    def exec(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        """What `docker exec` does."""
        words = ["nsenter", f"--target={self.pid}", "--mount", "--pid", "--root", "--wdns=/", *DROP]
        words += ["env", "-i", *assignments(self.environment), *command]
        return subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)

    def well(self, command: list[str]) -> bool:
        """Whether a command in it succeeds."""
        with contextlib.suppress(OSError, IndexError):  # it has not begun, or has ended
            return self.exec(command).returncode == 0
        return False

    def stop(self, seconds: float, *, twice: bool = False) -> str:
        """SIGTERM to process 1, or two of them; the exit status, and how long it took, in words."""
        began = time.monotonic()
        os.kill(self.pid, signal.SIGTERM)
        if twice:
            time.sleep(2)
            with contextlib.suppress(OSError, IndexError):
                os.kill(self.pid, signal.SIGTERM)
        status = self.process.wait(seconds)
        return f"exit status {status} after {time.monotonic() - began:.1f} s"

    def kill(self) -> None:
        """End whatever is left: with process 1 goes all of its namespace."""
        with contextlib.suppress(OSError, IndexError):
            os.kill(self.pid, signal.SIGKILL)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
