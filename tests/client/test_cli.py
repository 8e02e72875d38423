"""The commands that speak with a service, and what becomes of errors."""

from __future__ import annotations

import functools
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
from safetensors.numpy import save as to_safetensors
from typer.testing import CliRunner

import bathyscope
from bathyscope.cli._app import app, run


@pytest.fixture
def command(wire: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command whose requests are answered by `wire`: exit status, stdout, stderr."""
    client = functools.partial(bathyscope.Client, transport=httpx2.MockTransport(wire))
    monkeypatch.setattr(bathyscope, "Client", client)

    def call(*arguments: str) -> tuple[int, str, str]:
        code = run(list(arguments))
        return (code, *capsys.readouterr())

    return call


MODEL = {
    "name": "smollm2",
    "source": "gguf",
    "quantizations": ["none", "8bit"],
    "residency": "hot",
    "memory_bytes": 538_000_000,
    "num_layers": 30,
    "hidden_size": 576,
    "architecture": "LlamaForCausalLM",
    "self_test": {"passed": True},
}


def test_models_as_a_table_and_as_json(command: Any, wire: Any, answers: Any) -> None:
    wire.then(answers.ok({"data": [MODEL], "next_cursor": None}))
    code, out, _ = command("models", "list", "--url", "http://x.test", "--api-key", "k")
    assert code == 0
    for word in ("smollm2", "hot", "none, 8bit", "538.0 MB", "passed"):
        assert word in out
    assert wire.requests[0].headers["authorization"] == "Bearer k"
    assert wire.requests[0].url.host == "x.test"
    code, out, _ = command("models", "list", "--json")
    assert json.loads(out)[0]["name"] == "smollm2"


def test_loading_a_model(command: Any, wire: Any, answers: Any) -> None:
    done = answers.job("succeeded", kind="model", request={"action": "load", "model": "smollm2"})
    wire.then(answers.ok(answers.job(kind="model"), 202), answers.ok(done), answers.ok(MODEL))
    assert command("models", "load", "smollm2", "--quantization", "8bit") == (0, "smollm2 is hot, 538.0 MB.\n", "")
    assert wire.body(0) == {"quantization": "8bit", "compute_dtype": "auto"}
    assert wire.calls[-1] == "GET /v1/models/smollm2"
    wire.answers = [answers.ok(answers.job(kind="model"), 202)]
    assert command("models", "load", "smollm2", "--no-wait") == (0, "job_1\n", "")


def test_jobs(command: Any, wire: Any, answers: Any) -> None:
    failed = answers.job(
        "failed",
        error={"type": "/problems/invalid-input", "title": "T", "status": 422, "detail": "bad \x1b[31mtext"},
        timings={"queue": 0.25},
    )
    wire.then(answers.ok({"data": [failed], "next_cursor": None}))
    code, out, _ = command("jobs", "list", "--kind", "extraction", "--status", "failed", "--limit", "5")
    assert code == 0
    assert "bad" in out
    assert "\x1b" not in out
    assert wire.calls == ["GET /v1/jobs?kind=extraction&status=failed&limit=5"]
    wire.answers = [answers.ok(failed)]
    code, out, _ = command("jobs", "show", "job_1")
    assert "status         failed" in out
    assert "queue 0.25 s" in out
    code, out, _ = command("jobs", "show", "job_1", "--json")
    assert json.loads(out)["id"] == "job_1"
    assert command("jobs", "cancel", "job_1")[0] == 0
    assert command("jobs", "replay", "job_1")[0] == 0
    assert wire.calls[-2:] == ["POST /v1/jobs/job_1/cancel", "POST /v1/jobs/job_1/replay"]


def test_nothing_to_show_is_said_on_stderr(command: Any, wire: Any, answers: Any) -> None:
    wire.then(answers.ok({"data": [], "next_cursor": None}))
    assert command("jobs", "list") == (0, "", "No jobs.\n")
    assert command("jobs", "list", "--json") == (0, "[]\n", "")


@pytest.fixture
def extraction_wire(wire: Any, answers: Any) -> Any:
    import hashlib

    import numpy as np

    content = to_safetensors({"hidden_states": np.zeros((3, 2, 4), np.float32)})
    made = answers.extraction(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    return wire.then(
        answers.ok(answers.job(), 202),
        answers.ok(answers.job("succeeded")),
        answers.ok(made),
        httpx2.Response(200, content=content),
    )


def test_extract_texts(command: Any, extraction_wire: Any, tmp_path: Path) -> None:
    output = tmp_path / "states.safetensors"
    code, out, err = command("extract", "one", "two", "-o", str(output), "--layers", "8,-1", "--tokens", "-1,-5")
    assert (code, err) == (1, "bathyscope: the request is not valid\n" + err.partition("\n")[2])
    assert "positions.tokens goes with pooling none" in err
    code, out, err = command(
        "extract", "one", "two", "-o", str(output), "--layers", "8,-1", "--tokens", "-1,-5", "--pooling", "none"
    )
    assert (code, err) == (0, "")
    assert out == f"{output}: 3 x 2 x 4 float32, {output.stat().st_size} B, layers 0, 1\n"
    sent = extraction_wire.body(0)
    assert sent["inputs"] == ["one", "two"]
    assert sent["layers"] == [8, -1]
    assert sent["positions"] == {"tokens": [-1, -5]}
    assert sent["model"] == "smollm2"


@pytest.mark.parametrize(
    ("name", "content", "inputs"),
    [
        ("a.txt", "one\r\n\ntwo é\n", ["one", "two é"]),
        (
            "a.jsonl",
            '"one"\n\n{"text": "two"}\n{"input": {"token_ids": [1]}, "label": 1}\n{"prompt": "p", "answer": "a"}\n',
            ["one", "two", {"token_ids": [1]}, {"prompt": "p", "answer": "a"}],
        ),
    ],
)
def test_extract_a_file(
    command: Any, extraction_wire: Any, tmp_path: Path, name: str, content: str, inputs: list[Any]
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    code, _, err = command("extract", "-i", str(tmp_path / name), "-o", str(tmp_path / "a.safetensors"), "--json")
    assert (code, err) == (0, "")
    assert extraction_wire.body(0)["inputs"] == inputs


def test_extract_from_stdin(
    command: Any, extraction_wire: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    assert command("extract", "-o", str(tmp_path / "a.npy"))[0] == 0
    assert extraction_wire.body(0)["inputs"] == ["one", "two"]
    assert extraction_wire.calls[-1].endswith("hidden_states?format=npy")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nope"], "nope"),
        (["extract", "a", "--layers", "x"], "--layers"),
        (["extract", "a", "-o", "a.txt"], ".safetensors"),
        (["extract", "a", "-o", "no/such/folder/a.npy"], "no folder"),
        (["extract", "a", "--pooling", "sum"], "sum"),
        (["extract", "a", "--bogus"], "--bogus"),
        (["jobs", "show"], "JOB"),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_2(command: Any, arguments: list[str], words: str) -> None:
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("bathyscope: ")
    assert err.count("\n") == 1
    assert words in err


def test_failures_are_one_sentence_and_exit_1(
    command: Any, wire: Any, answers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire.then(answers.problem("not-found", 404, "There is no job job_9."))
    assert command("jobs", "show", "job_9") == (1, "", "bathyscope: There is no job job_9.\n")
    broken = tmp_path / "a.jsonl"
    broken.write_text("{")
    code, _, err = command("extract", "-i", str(broken))
    assert code == 1
    assert "line 1 is not JSON" in err
    code, _, err = command("extract", "-i", str(tmp_path / "none.txt"))
    assert (code, err) == (1, f"bathyscope: {tmp_path / 'none.txt'}: No such file or directory\n")
    wire.answers = [RuntimeError("odd")]
    code, _, err = command("jobs", "list")
    assert (code, err.count("\n")) == (1, 1)
    assert "RuntimeError: odd" in err
    monkeypatch.setenv("BATHYSCOPE_DEBUG", "1")
    assert "Traceback" in command("jobs", "list")[2]


def test_help_of_every_command() -> None:
    runner = CliRunner()
    for arguments in (
        [],
        *(["up"], ["demo"], ["extract"], ["service"], ["worker"]),
        *(["models"], ["models", "list"], ["models", "load"], ["models", "import"]),
        *(["jobs"], ["jobs", "list"], ["jobs", "show"], ["jobs", "cancel"], ["jobs", "replay"]),
        *(["keys"], ["keys", "create"], ["keys", "list"], ["keys", "revoke"]),
    ):
        found = runner.invoke(app, [*arguments, "--help"])
        assert found.exit_code == 0, (arguments, found.output)
        assert "Usage: " in found.output
    for name in ("up", "service"):
        text = runner.invoke(app, [name, "--help"], env={"COLUMNS": "200"}).output
        for option in ("--config", "--host", "--port", "--data-dir", "BATHYSCOPE_DATA_DIR"):
            assert option in text
    assert runner.invoke(app, ["--version"]).output == f"bathyscope {bathyscope.__version__}\n"


def cli(*arguments: str, **environment: str) -> list[str]:
    return [sys.executable, "-W", "error", "-m", "bathyscope.cli", *arguments]


def test_the_exit_status_of_the_process() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        failed = subprocess.run(cli("jobs", "list", "--url", url), capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert failed.stderr.startswith(f"bathyscope: {url} could not be reached")
    assert failed.stderr.count("\n") == 1
    assert subprocess.run(cli("nope"), capture_output=True, check=False).returncode == 2
    assert subprocess.run(cli("--version"), capture_output=True, check=False).returncode == 0


def test_ctrl_c_exits_130_without_a_traceback() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        running = subprocess.Popen(
            cli("jobs", "list", "--url", url),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell starts background jobs with SIGINT ignored, and a test run may be one.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        asked, _ = silent.accept()
        with asked:
            asked.recv(10)  # it has asked, and waits
            time.sleep(0.2)
            running.send_signal(signal.SIGINT)
            _, err = running.communicate(timeout=20)
    assert running.returncode == 130
    assert "Traceback" not in err


def test_a_reader_that_goes_away_is_no_fault() -> None:
    code = (
        "import sys, httpx2, functools, bathyscope\n"
        "page = {'data': [{'name': 'm' * 500, 'source': 'hub', 'quantizations': []}] * 2000}\n"
        "answer = httpx2.MockTransport(lambda request: httpx2.Response(200, json=page))\n"
        "bathyscope.Client = functools.partial(bathyscope.Client, transport=answer)\n"
        "from bathyscope.cli import main\n"
        "sys.argv = ['bathyscope', 'models', 'list', '--json']\n"
        "main()\n"
    )
    running = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stdout is not None
    running.stdout.read(10)
    running.stdout.close()
    assert running.stderr is not None
    assert running.stderr.read() == ""
    running.stderr.close()
    assert running.wait(20) in (0, 1)


def test_without_typer_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['typer'] = None; from bathyscope.cli import main; main()"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert found.stderr == "The command line needs typer: pip install 'bathyscope[cli]'.\n"


def test_without_the_server_it_says_what_to_install(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bathyscope_backplane.settings", None)
    code, _, err = command("worker")
    assert code == 1
    assert "pip install 'bathyscope[service]'" in err


def test_a_bad_setting_is_one_sentence(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "BATHYSCOPE_CONFIG", "")  # put back afterwards: `--config` sets it for children
    config = tmp_path / "config.toml"
    config.write_text("prot = 3\n")
    code, _, err = command("service", "--config", str(config))
    assert code == 1
    assert err == "bathyscope: The setting prot is not known; did you mean port?\n"
