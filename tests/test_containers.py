"""Dockerfiles, docker-compose.yml and the Kubernetes manifests: read by the real tools, and true to the code.

No engine and no cluster runs here. `docker compose config`, `kubectl kustomize` and hadolint come in wheels; the
manifests are checked against Kubernetes' own schemas; names in them are looked up in the settings, routes and metrics.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from moto.server import ThreadedMotoServer
from pydantic import BaseModel

from bathyscope.cli._app import run as command_line
from bathyscope_backplane.artifacts import ArtifactStore
from bathyscope_backplane.embedded import find_binary
from bathyscope_backplane.settings import Settings, load_settings
from bathyscope_service.app import create_app
from tests.stack import Stack, free_port

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
OVERLAYS = ["cpu", "gpu"]
SCHEMAS = "1.37"
RESERVE = 30
"""Seconds that a worker may need beyond its drain: a take under way has 20."""


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    words = [str(part) for part in command]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=120, **options)


def environment_file(kind: str = "compose") -> str:
    made = run("sh", ROOT / "docker" / "secrets.sh", kind)
    assert made.returncode == 0, made.stderr
    return made.stdout


def config(env: Path, *options: str) -> subprocess.CompletedProcess[str]:
    words = [BIN / "docker-compose", "--project-directory", ROOT, "--env-file", env, "--profile", "*", "config"]
    return run(*words, *options, env={"PATH": os.environ["PATH"]})


@pytest.fixture(scope="module")
def compose(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    env = tmp_path_factory.mktemp("compose") / ".env"
    env.write_text(environment_file())
    told = config(env, "--format", "json")
    assert told.returncode == 0, told.stderr
    assert "warning" not in told.stderr.lower()
    return dict(json.loads(told.stdout))


@pytest.fixture(scope="module", params=OVERLAYS)
def manifests(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    told = run(BIN / "kubectl", "kustomize", ROOT / "docker" / "kubernetes" / "overlays" / request.param)
    assert told.returncode == 0, told.stderr
    return [document for document in yaml.safe_load_all(told.stdout) if document]


@pytest.fixture(scope="module")
def ingress() -> list[dict[str, Any]]:
    folder = ROOT / "docker" / "kubernetes" / "components" / "ingress"
    return [dict(document) for document in yaml.safe_load_all((folder / "ingress.yaml").read_text())]


@pytest.fixture(scope="module")
def paths() -> dict[str, Any]:
    return dict(create_app(Settings(), loopback=True).openapi()["paths"])


def of_kind(manifests: list[dict[str, Any]], *kinds: str) -> list[dict[str, Any]]:
    return [document for document in manifests if document["kind"] in kinds]


def pods(manifests: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    found = of_kind(manifests, "Deployment", "StatefulSet")
    return {document["metadata"]["name"]: document["spec"]["template"]["spec"] for document in found}


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    text = re.sub(r"^\s*#.*\n", "", dockerfile.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in text.splitlines() if line.strip()]


def last(dockerfile: Path, operation: str) -> str:
    return [rest for name, rest in instructions(dockerfile) if name == operation][-1]


def variables(dockerfile: Path) -> dict[str, str]:
    """What the final image sets."""
    return dict(part.split("=", 1) for part in shlex.split(last(dockerfile, "ENV")))


def load(monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]) -> Settings:
    """The settings of a process with these variables; each of Bathyscope's must be a setting."""
    for name in [name for name in os.environ if name.startswith("BATHYSCOPE_")]:
        monkeypatch.delenv(name)
    for name, value in given.items():
        if name.startswith("BATHYSCOPE_"):
            group: type[BaseModel] = Settings
            *groups, setting = name.removeprefix("BATHYSCOPE_").lower().split("__")
            for part in groups:
                group = group.model_fields[part].annotation  # type: ignore[assignment]
            assert setting in group.model_fields, name
            monkeypatch.setenv(name, str(value))
    return load_settings()


def seconds(text: str) -> float:
    """A duration as compose prints it: `1m40s`."""
    return sum(float(n) * {"h": 3600, "m": 60, "s": 1}[unit] for n, unit in re.findall(r"([\d.]+)([hms])", text))


def is_pinned(image: str) -> bool:
    name, _, tag = image.partition("@")[0].rpartition(":")
    return bool(name) and bool(re.search(r"\d+\.\d+", tag))


def commands(compose: dict[str, Any], manifests: list[dict[str, Any]]) -> Iterator[list[str]]:
    """Every call of the command line that a probe makes."""
    for dockerfile in DOCKERFILES:
        yield json.loads(last(dockerfile, "HEALTHCHECK").partition(" CMD ")[2])
    for service in compose["services"].values():
        kind, *words = service["healthcheck"]["test"]
        if kind == "CMD":
            yield words
    for pod in pods(manifests).values():
        for container in pod["containers"]:
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                words = container.get(probe, {}).get("exec", {}).get("command", [""])
                if words[0] == "bathyscope":
                    yield words


# --- images


def test_there_are_two_dockerfiles() -> None:
    assert [path.name for path in DOCKERFILES] == ["service.Dockerfile", "worker.Dockerfile"]


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_hadolint_has_nothing_to_say(dockerfile: Path) -> None:
    told = run(BIN / "hadolint", "--no-color", "--failure-threshold", "info", dockerfile)
    assert told.returncode == 0, told.stdout
    assert not told.stdout


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_an_image_runs_unprivileged_and_is_told_apart_by_versions(dockerfile: Path) -> None:
    lines = instructions(dockerfile)
    bases = {rest.removeprefix("BASE=") for name, rest in lines if name == "ARG" and rest.startswith("BASE=")}
    assert all(is_pinned(base) for base in bases)
    assert all(rest.startswith("${BASE}") for name, rest in lines if name == "FROM")
    assert last(dockerfile, "USER") == "10001:10001"
    assert last(dockerfile, "STOPSIGNAL") == "SIGTERM"
    entry = json.loads(last(dockerfile, "ENTRYPOINT"))
    assert entry == ["dumb-init", "--single-child", "--", "bathyscope"]
    assert json.loads(last(dockerfile, "CMD")) == [dockerfile.stem]
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f'org.opencontainers.image.version="{version}"' in dockerfile.read_text()
    for name, rest in lines:
        if name == "RUN" and "install" in rest and "pip" in rest:
            assert "--no-cache-dir" in rest
            assert "--constraint constraints.txt" in rest or "--no-deps" in rest or "torch==" in rest


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_everything_is_written_below_the_volume(dockerfile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = variables(dockerfile)
    settings = load(monkeypatch, given)
    assert settings.data_dir == Path("/data")
    assert given["HOME"] == "/data"
    assert given.get("HF_HOME", "/data/huggingface").startswith("/data/")
    assert given["PYTHONDONTWRITEBYTECODE"] == "1"
    if dockerfile.stem == "service":
        assert settings.host == "0.0.0.0"
        assert last(dockerfile, "EXPOSE") == str(settings.port)


def test_torch_is_the_one_that_the_constraints_name() -> None:
    names = {
        rest.partition("=")[0]: rest.partition("=")[2] for name, rest in instructions(DOCKERFILES[1]) if "=" in rest
    }
    pinned = re.findall(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert [names["TORCH_VERSION"]] == pinned
    text = (ROOT / "constraints.txt").read_text()
    assert "\ndumb-init==" in text


@pytest.mark.parametrize("extra", ["service", "worker"])
def test_the_requirements_are_those_of_the_extra(extra: str) -> None:
    told = run(sys.executable, ROOT / "docker" / "requirements.py", extra, cwd=ROOT)
    assert told.returncode == 0, told.stderr
    names = {re.split(r"[\[<>=!~; ]", line)[0] for line in told.stdout.splitlines()}
    document = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = document["optional-dependencies"]
    own = re.compile(r"bathyscope\[(.*)\]")
    named = [name for line in extras[extra] if (found := own.match(line)) for name in found[1].split(",")]
    wanted = [*document["dependencies"], *extras[extra], *(line for name in named for line in extras[name])]
    assert names == {re.split(r"[\[<>=!~; ]", line)[0] for line in wanted} - {"bathyscope"}
    assert ("torch" in names) == (extra == "worker")
    dockerfile = next(path for path in DOCKERFILES if path.stem == extra)
    assert f"requirements.py {extra} >" in dockerfile.read_text()
    assert run(sys.executable, ROOT / "docker" / "requirements.py", "nonsense", cwd=ROOT).returncode == 1


def test_the_build_context_holds_what_is_copied_and_nothing_else() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert next(line for line in lines if not line.startswith("#")) == "*"
    allowed = {line[1:].rstrip("/") for line in lines if line.startswith("!")}
    copied = set()
    for dockerfile in DOCKERFILES:
        for name, rest in instructions(dockerfile):
            if name == "COPY" and not rest.startswith("--from"):
                copied |= set(rest.split()[:-1])
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)


def test_the_probes_call_commands_that_exist(compose: dict[str, Any], manifests: list[dict[str, Any]]) -> None:
    found = {tuple(words) for words in commands(compose, manifests)}
    assert ("bathyscope", "health", "service") in found
    assert ("bathyscope", "health", "worker") in found
    for words in found:
        assert words[0] == "bathyscope"
        assert command_line([*words[1:], "--help"]) == 0
    assert all(words[1:3] in {("health", "service"), ("health", "worker")} for words in found)


# --- compose


def test_compose_refuses_to_run_without_secrets(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("")
    told = config(tmp_path / ".env", "--quiet")
    assert told.returncode != 0
    assert "sh docker/secrets.sh > .env" in told.stderr


def test_the_secrets_are_fresh_and_fit() -> None:
    one, other = (dict(line.split("=", 1) for line in environment_file().splitlines() if "=" in line) for _ in "12")
    for name in ("QUEUE_PASSWORD", "STORE_ACCESS_KEY", "STORE_SECRET_KEY", "MASTER_KEY"):
        assert len(one[name]) >= 20
        assert one[name] != other[name]
    assert len(base64.b64decode(one["MASTER_KEY"], validate=True)) == 32
    assert re.fullmatch(r"[0-9a-f]+", one["QUEUE_PASSWORD"]), "it stands in a URL"
    assert run("sh", ROOT / "docker" / "secrets.sh", "nonsense").returncode == 2


def test_compose_services_are_hardened(compose: dict[str, Any]) -> None:
    assert set(compose["services"]) == {"queue", "store", "service", "worker-cpu", "worker-gpu"}
    for name, service in compose["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["healthcheck"]["test"], name
        assert is_pinned(service["image"]), name
        assert any(mount.startswith("/tmp") for mount in service["tmpfs"]), name
        assert "privileged" not in service, name
        if name != "store":  # it drops its privileges by itself
            assert "cap_add" not in service, name


def test_queue_and_store_are_reached_from_within_only(compose: dict[str, Any]) -> None:
    assert compose["networks"]["data"]["internal"] is True
    for name in ("queue", "store"):
        assert "ports" not in compose["services"][name]
        assert list(compose["services"][name]["networks"]) == ["data"]
    [port] = compose["services"]["service"]["ports"]
    assert port["host_ip"] == "127.0.0.1"
    for name in ("service", "worker-cpu", "worker-gpu"):
        conditions = {on: how["condition"] for on, how in compose["services"][name]["depends_on"].items()}
        assert conditions == {"queue": "service_healthy", "store": "service_healthy"}


def test_the_profiles_choose_the_worker(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert [services[f"worker-{kind}"]["profiles"] for kind in ("cpu", "gpu")] == [["cpu"], ["gpu"]]
    [device] = services["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    for service in services.values():
        if "build" in service:
            assert (ROOT / service["build"]["dockerfile"]).is_file()
    assert services["worker-cpu"]["build"]["args"] == {"TORCH": "cpu"}
    assert services["worker-cpu"]["image"].endswith("-cpu")
    gpu = services["worker-gpu"]
    assert gpu["image"].endswith(f"-{gpu['build']['args']['TORCH']}")


@pytest.mark.parametrize("name", ["service", "worker-cpu", "worker-gpu"])
def test_compose_sets_what_are_settings(name: str, compose: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    service = compose["services"][name]
    dockerfile = ROOT / service["build"]["dockerfile"]
    settings = load(monkeypatch, {**variables(dockerfile), **service["environment"]})
    assert settings.redis_url is not None
    assert "@queue:6379/" in settings.redis_url
    assert settings.master_key is not None
    targets = {mount["target"] for mount in service["volumes"]}
    assert str(settings.data_dir) in targets
    assert str(settings.models_path) in targets
    grace = seconds(service["stop_grace_period"])
    assert grace >= (20 if name == "service" else settings.worker.grace_seconds + RESERVE)
    if name == "service":
        assert [port["target"] for port in service["ports"]] == [settings.port]


def test_the_listed_models_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from bathyscope_backplane.registry import ModelRegistry

    for path in (ROOT / "docker/models.toml", ROOT / "docker/kubernetes/base/models.toml"):
        settings = load(monkeypatch, {"BATHYSCOPE_MODELS_FILE": path, "BATHYSCOPE_PACKAGED_MODEL": "false"})
        assert ModelRegistry.load(settings).get("smollm2").source.startswith("hf://")


def test_the_store_of_compose_is_an_s3_store(compose: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        address = "http://{}:{}".format(*server.get_host_and_port())
        given = dict(compose["services"]["service"]["environment"])
        given["BATHYSCOPE_STORE_OPTIONS"] = given["BATHYSCOPE_STORE_OPTIONS"].replace("http://store:8333", address)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, given[name])
        settings = load(monkeypatch, given)
        bucket = compose["services"]["store"]["environment"]["S3_BUCKET"]
        boto3.client("s3", endpoint_url=address, region_name="us-east-1").create_bucket(Bucket=bucket)
        store = ArtifactStore(settings.artifacts_url, settings.store_options)

        async def twice() -> tuple[bool, bool]:
            return await store.commit("manifests/a.json", b"1"), await store.commit("manifests/a.json", b"2")

        assert asyncio.run(twice()) == (True, False)
    finally:
        server.stop()


def queue_commands() -> list[tuple[str, list[str]]]:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["queue"]["command"]
    [queue] = [
        document["spec"]["template"]["spec"]["containers"][0]["command"]
        for document in yaml.safe_load_all((ROOT / "docker/kubernetes/components/queue/queue.yaml").read_text())
        if document["kind"] == "StatefulSet"
    ]
    return [("compose", [word.replace("$$", "$") for word in compose]), ("kubernetes", queue)]


@pytest.mark.parametrize(
    ("where", "command"), queue_commands(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_the_queue_keeps_every_job_and_asks_for_its_password(where: str, command: list[str], tmp_path: Path) -> None:
    import redis

    (tmp_path / "valkey-server").symlink_to(find_binary())
    socket = tmp_path / "q"
    script = command[-1].replace("dir /data", f"dir {tmp_path}\nport 0\nunixsocket {socket}")
    assert script != command[-1]
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "REDISCLI_AUTH": "a-password"}
    process = subprocess.Popen([*command[:-1], script], env=environment, stdout=subprocess.DEVNULL)
    try:
        client = redis.Redis(unix_socket_path=str(socket), password="a-password", decode_responses=True)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with contextlib.suppress(redis.ConnectionError):
                if client.ping():
                    break
            time.sleep(0.05)
        wanted = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}
        for name, value in wanted.items():
            assert client.config_get(name) == {name: value}
        assert int(client.config_get("maxmemory")["maxmemory"]) > 0
        arguments = Path(f"/proc/{process.pid}/cmdline").read_bytes()
        assert b"valkey-server" in arguments, "the server itself gets the signals"
        assert b"a-password" not in arguments
        with pytest.raises(redis.AuthenticationError):
            redis.Redis(unix_socket_path=str(socket)).ping()
        client.close()
    finally:
        process.terminate()
        process.wait(30)


# --- Kubernetes


def test_the_manifests_are_valid(manifests: list[dict[str, Any]], ingress: list[dict[str, Any]]) -> None:
    foreign = {"ScaledObject", "ServiceMonitor"}
    for document in [*manifests, *ingress]:
        if document["kind"] not in foreign:
            kubernetes_validate.validate(document, SCHEMAS, strict=True)
        if document["kind"] not in ("Namespace", "Ingress"):
            assert document["metadata"]["namespace"] == "bathyscope"
    names = {(document["kind"], document["metadata"]["name"]) for document in manifests}
    assert {("Deployment", "service"), ("Deployment", "worker"), ("StatefulSet", "queue")} <= names


def test_pods_are_hardened(manifests: list[dict[str, Any]]) -> None:
    for name, pod in pods(manifests).items():
        assert pod["automountServiceAccountToken"] is False, name
        assert pod["enableServiceLinks"] is False, "a Service's variables could be taken for settings"
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        [container] = pod["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }, name
        assert is_pinned(container["image"]), name
        assert {"/data", "/tmp"} <= {mount["mountPath"] for mount in container["volumeMounts"]}, name
        assert container["resources"]["limits"]["memory"], name
        assert container["livenessProbe"], name


def test_kubernetes_sets_what_are_settings(manifests: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    secret = dict(line.split("=", 1) for line in environment_file("kubernetes").splitlines() if "=" in line)
    maps = {document["metadata"]["name"]: document["data"] for document in of_kind(manifests, "ConfigMap")}
    for name in ("service", "worker"):
        pod = pods(manifests)[name]
        [container] = pod["containers"]
        dockerfile = ROOT / "docker" / f"{name}.Dockerfile"
        assert container["args"] == json.loads(last(dockerfile, "CMD"))
        given: dict[str, Any] = {**variables(dockerfile)}
        for source in container["envFrom"]:
            if "configMapRef" in source:
                given |= maps[source["configMapRef"]["name"]]
            else:
                assert source["secretRef"] == {"name": "bathyscope"}
                given |= secret
        given |= {item["name"]: item.get("value", "a-pod") for item in container["env"]}
        settings = load(monkeypatch, given)
        assert settings.redis_url is not None
        assert settings.redis_url.endswith("@queue:6379/0")
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert settings.models_path.parent == Path(mounts["models"])
        [models] = [volume["configMap"]["name"] for volume in pod["volumes"] if volume["name"] == "models"]
        assert settings.models_path.name in maps[models]
        if name == "worker":
            assert pod["terminationGracePeriodSeconds"] >= settings.worker.grace_seconds + RESERVE
        else:
            assert [port["containerPort"] for port in container["ports"]] == [settings.port]
            assert pod["terminationGracePeriodSeconds"] >= container["lifecycle"]["preStop"]["sleep"]["seconds"] + 15


def test_probes_and_services_lead_somewhere(
    manifests: list[dict[str, Any]], ingress: list[dict[str, Any]], paths: dict[str, Any]
) -> None:
    ports = {
        name: {port["name"]: port["containerPort"] for port in pod["containers"][0].get("ports", [])}
        for name, pod in pods(manifests).items()
    }
    for name, pod in pods(manifests).items():
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            http = pod["containers"][0].get(probe, {}).get("httpGet")
            if http is not None:
                assert "get" in paths[http["path"]]
                assert http["port"] in ports[name]
    services = {document["metadata"]["name"]: document["spec"] for document in of_kind(manifests, "Service")}
    for spec in services.values():
        target = spec["selector"]["app.kubernetes.io/name"]
        assert all(port["targetPort"] in ports[target] for port in spec["ports"])
    [rule] = ingress[0]["spec"]["rules"]
    backend = rule["http"]["paths"][0]["backend"]["service"]
    assert backend["port"]["name"] in {port["name"] for port in services[backend["name"]]["ports"]}
    for monitor in of_kind(manifests, "ServiceMonitor"):
        [endpoint] = monitor["spec"]["endpoints"]
        assert "get" in paths[endpoint["path"]]
        assert endpoint["authorization"]["credentials"].keys() == {"name", "key"}
        labels = monitor["spec"]["selector"]["matchLabels"].items()
        assert any(
            labels <= service["metadata"]["labels"].items() and endpoint["port"] in ports[service["metadata"]["name"]]
            for service in of_kind(manifests, "Service")
        )


def test_the_front_end_stays_up_while_nodes_are_drained(manifests: list[dict[str, Any]]) -> None:
    [budget] = of_kind(manifests, "PodDisruptionBudget")
    deployments = {document["metadata"]["name"]: document for document in of_kind(manifests, "Deployment")}
    assert deployments["service"]["spec"]["replicas"] >= 2
    template = deployments["service"]["spec"]["template"]["metadata"]["labels"]
    assert budget["spec"]["selector"]["matchLabels"].items() <= template.items()
    policies = {document["metadata"]["name"]: document["spec"] for document in of_kind(manifests, "NetworkPolicy")}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    [source] = policies["queue"]["ingress"][0]["from"]
    assert source["podSelector"]["matchExpressions"][0]["values"] == ["service", "worker"]


def test_keda_scales_on_metrics_that_exist(manifests: list[dict[str, Any]], live: Stack) -> None:
    told = live.client.get("/metrics").text
    known = set(re.findall(r"^# TYPE (\S+)", told, re.MULTILINE))
    scaled = of_kind(manifests, "ScaledObject")
    deployments = {document["metadata"]["name"]: document for document in of_kind(manifests, "Deployment")}
    for document in scaled:
        spec = document["spec"]
        assert "replicas" not in deployments[spec["scaleTargetRef"]["name"]]["spec"], "they are KEDA's"
        assert 0 <= spec["minReplicaCount"] <= spec["maxReplicaCount"]
        named = set()
        for trigger in spec["triggers"]:
            assert trigger["type"] == "prometheus"
            metadata = trigger["metadata"]
            assert set(metadata) <= {"serverAddress", "query", "threshold", "activationThreshold"}
            assert all(isinstance(value, str) for value in metadata.values())
            assert float(metadata["threshold"]) > 0
            named |= set(re.findall(r"bathyscope_\w+", metadata["query"]))
        assert named >= {"bathyscope_lane_depth", "bathyscope_lane_oldest_seconds"}
        assert named <= known
    assert bool(scaled) == ("gpu" in str(manifests))


def test_no_file_holds_a_secret() -> None:
    files = [ROOT / "docker-compose.yml", *(path for path in (ROOT / "docker").rglob("*") if path.is_file())]
    for path in files:
        if path.suffix != ".pyc":
            found = re.findall(r"\b[0-9a-f]{20,}\b|\bbsk_\w+|\bAKIA\w+|\b[A-Za-z0-9+/]{43}=", path.read_text())
            assert not found, path
            assert "kind: Secret" not in path.read_text(), path
    assert "/.env" in (ROOT / ".gitignore").read_text().splitlines()


# --- bathyscope health


def health(live: Stack, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return run(BIN / "bathyscope", "health", *words, env={**live.environment, **settings})


def test_health_of_a_service(live: Stack) -> None:
    assert health(live, "service").returncode == 0
    told = health(live, "service", "--ready")
    assert told.stdout == "The service, Redis and the store answer.\n"
    told = health(live, "service", BATHYSCOPE_PORT=str(free_port()))
    assert (told.returncode, told.stderr.count("\n")) == (1, 1)


def test_health_of_a_worker(live: Stack) -> None:
    assert health(live, "worker").returncode == 0, "found by its host"
    assert health(live, "worker", BATHYSCOPE_WORKER__NAME="worker0").returncode == 0
    told = health(live, "worker", BATHYSCOPE_WORKER__NAME="another")
    assert told.returncode == 1
    assert "another" in told.stderr


def test_an_outage_of_redis_speaks_against_no_worker(live: Stack, tmp_path: Path) -> None:
    told = health(live, "worker", BATHYSCOPE_REDIS_URL=f"unix://{tmp_path}/none")
    assert told.returncode == 0
    assert "Redis does not answer" in told.stdout
