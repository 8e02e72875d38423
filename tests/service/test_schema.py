"""The running service against its own OpenAPI document, by schemathesis: generated requests, good and bad, and links.

`BATHYSCOPE_SCHEMA_EXAMPLES` (10) is the number of generated requests of each operation and phase; a few hundred take
some minutes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from tests.stack import Stack, stack

_EXAMPLES = os.environ.get("BATHYSCOPE_SCHEMA_EXAMPLES", "10")
_HOOKS = Path(__file__).with_name("schema_hooks.py")


@pytest.fixture(scope="module")
def noop(tmp_path_factory: pytest.TempPathFactory, models: str) -> Iterator[Stack]:
    with stack(tmp_path_factory.mktemp("schema"), noop=True, models=models, datasets__hub=False) as running:
        yield running


def seeds(noop: Stack) -> dict[str, str]:
    """One of each thing, for requests that read something."""

    def made(path: str, body: Any) -> dict[str, Any]:
        job = noop.post(path, body).json()
        assert job["status"] == "succeeded", job
        return dict(noop.client.get(job["resource"]).json())

    added = noop.client.post(
        "/v1/adapters",
        files={"file": str(time.monotonic_ns()).encode()},
        data={"base_model": "tiny"},
        headers={"Prefer": "wait=60"},
    ).json()
    assert added["status"] == "succeeded", added
    states = made("/v1/extractions", {"model": "tiny", "inputs": ["a", "b", "c", "d"]})
    probe = made("/v1/probes", {"extraction": states["id"], "labels": [0, 1, 0, 1], "folds": 2})
    made(f"/v1/probes/{probe['id']}/predict", {"inputs": ["e"]})
    sent = noop.client.post("/v1/datasets", files={"file": b'{"input": "a"}'}, data={"format": "jsonl"})
    return {
        "ADAPTER_ID": added["resource"].rpartition("/")[2],
        "DATASET_ID": sent.json()["id"],
        "EXTRACTION_ID": states["id"],
        "JOB_ID": states["job"],
        "PROBE_ID": probe["id"],
    }


def configuration(document: dict[str, Any]) -> dict[str, Any]:
    """All checks, each operation's documented 4xx among the accepted answers to good and to bad requests."""
    operations = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            refusals = [status for status in operation["responses"] if status.startswith("4")]
            later = [status for status in ("501", "502", "503") if status in operation["responses"]]
            operations.append(
                {
                    "include-name": f"{method.upper()} {path}",
                    "checks": {
                        "not_a_server_error": {"expected-statuses": ["2xx", "3xx", "4xx", *later]},
                        "positive_data_acceptance": {"expected-statuses": ["2xx", "3xx", *refusals, *later]},
                        "negative_data_rejection": {"expected-statuses": [*refusals, *later]},
                    },
                }
            )
    return {"hooks": str(_HOOKS), "operations": operations}


# Links first, while what the lists begin with is still there: the other phases delete much of it.
@pytest.mark.parametrize(("phases", "links"), [("stateful", 10), ("examples,coverage,fuzzing", 0)])
def test_every_answer_is_as_documented(noop: Stack, tmp_path: Path, phases: str, links: int) -> None:
    known = [seeds(noop) for _ in range(5 if links else 1)][-1]
    document = noop.client.get("/openapi.json").json()
    config = tmp_path / "schemathesis.toml"
    config.write_text(tomli_w.dumps(configuration(document)))
    examples = str(8 * int(_EXAMPLES) if links else _EXAMPLES)
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(config)),
            *("run", f"{noop.url}/openapi.json", "--max-examples", examples, "--seed", "1", "--phases", phases),
            *("--checks", "all", "--no-color", "--continue-on-failure", "--request-timeout", "90"),
            *("--max-response-time", "90"),
        ],
        env={**os.environ, **{f"SCHEMA_{name}": value for name, value in known.items()}},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    report = ended.stdout[-20_000:] + ended.stderr[-4000:] + noop.said()
    assert ended.returncode == 0, report
    if not links:
        assert f"Tested: {sum(map(len, document['paths'].values()))}" in ended.stdout, report
    else:  # covered, of those that are declared and inferred
        assert int(ended.stdout.partition("API Links:")[2].split()[0]) >= links, report
    assert noop.client.get("/healthz").status_code == 200
    assert "request.fault" not in noop.said()
