"""GGUF files, converted once to a folder of safetensors.

transformers reads GGUF by itself but takes half a minute each time; the converted folder loads in seconds.
The folder's name holds the digest of the source file, so other weights never meet an old conversion. It is made
under a temporary name and renamed when whole: a crash leaves no half model, and when two processes convert at
once, a lock makes the second wait and find the work done.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_LAYOUT = 1
"""Raised when what a conversion writes changes, so that older folders are made again."""


def digest(path: Path) -> str:
    """First 16 hex digits of the file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def convert(path: Path, digest: str, *, name: str, data_dir: Path) -> Path:
    """The folder `<data_dir>/models/<name>-<digest>`, made from the GGUF file unless it is there."""
    models = data_dir / "models"
    models.mkdir(parents=True, exist_ok=True)
    safe_name = re.sub(r"[^A-Za-z0-9._-]+", "--", name).strip(".") or "model"
    folder = models / f"{safe_name}-{digest}-{_LAYOUT}"
    if folder.is_dir():
        return folder
    with _locked(models / f".{folder.name}.lock"):
        if folder.is_dir():
            return folder
        for stale in models.glob(f".{folder.name}.tmp-*"):  # of a process that crashed: we hold the lock
            shutil.rmtree(stale, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.tmp-", dir=models))
        try:
            write_folder(path, temporary)
            temporary.chmod(0o755)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def write_folder(path: Path, folder: Path) -> None:
    """Read a GGUF file and write model and tokenizer in HuggingFace format, dequantized."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, local_files_only=True, dtype="auto"
    )
    # The weights are dequantized now; left in place, these two would have the copy read as GGUF again.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; the kernel releases it when the holder dies."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        while True:  # not one long wait: a process that does nothing at all is taken for hung
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
        yield
    finally:
        os.close(descriptor)
