"""From a spec's source to a folder of safetensors in HuggingFace format.

Hub repositories are read through huggingface_hub's own cache (and from it alone when the hub is out of reach);
GGUF files are converted once, see `gguf`; folders are used where they lie. Weights are safetensors: a folder
that holds pickles only is refused.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from bathyscope import errors
from bathyscope_workers.models import gguf
from bathyscope_workers.models.spec import ModelSpec

_SAMPLES, _SAMPLE_BYTES = 32, 1 << 16
_HEADER_BYTES = 100_000_000
"""What safetensors itself takes at most."""


@dataclass(frozen=True, slots=True)
class Source:
    """A model's files."""

    folder: Path
    revision: str
    """Commit of the hub, `gguf:<digest>` or `folder:<digest>`: other weights have another revision."""


class LoadFault(Exception):
    """Why a load failed: the problem to tell, and whether the same load may succeed later."""

    def __init__(self, problem: errors.ProblemError, *, retry: bool) -> None:
        super().__init__(str(problem))
        self.problem = problem
        self.retry = retry


def locate(spec: ModelSpec) -> Source:
    """Fetch, convert or find the files of a model. Raises LoadFault."""
    try:
        return _locate(spec)
    except PermissionError as error:
        raise failed(spec, f"{error.filename or spec.source} may not be read by the worker") from error


def _locate(spec: ModelSpec) -> Source:
    if spec.source.startswith("hf://"):
        return _from_hub(spec)
    path = Path(spec.source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise failed(spec, f"there is no file {path}; correct the model's source in the registry")
        digest = gguf.digest(path)
        return Source(gguf.convert(path, digest, name=spec.name, data_dir=Path(spec.data_dir)), f"gguf:{digest}")
    if not path.is_dir():
        raise failed(spec, f"there is no folder {path}; a source is a folder, a .gguf file or hf://org/name")
    _require_safetensors(spec, path)
    return Source(path, f"folder:{folder_digest(path)}")


def failed(spec: ModelSpec, why: str, *, retry: bool = False) -> LoadFault:
    """The LoadFault that says why in one sentence."""
    return LoadFault(errors.ModelLoadFailed(f"{spec.name}: {why}", model=spec.name), retry=retry)


def folder_digest(folder: Path) -> str:
    """Digest of configuration, tokenizer and weights, the weights by their headers and evenly spaced samples.

    Reading 2 MB of each file instead of all of it keeps a load of a large model fast; any training changes
    some sampled weight.
    """
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.jinja"), *folder.glob("*.model")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            for index in range(_SAMPLES + 1):
                file.seek(max(0, size - _SAMPLE_BYTES) * index // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def weight_sizes(folder: Path) -> list[tuple[str, list[int]]]:
    """Names and shapes of every tensor in the folder's safetensors, from their headers alone.

    Raises ValueError for a file that is none.
    """
    found: list[tuple[str, list[int]]] = []
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > _HEADER_BYTES:  # a length from strangers: nothing is reserved for it
                raise ValueError(f"{path.name} is no safetensors file")
            header = json.loads(file.read(length))
        try:
            found += [(name, entry["shape"]) for name, entry in header.items() if name != "__metadata__"]
        except (AttributeError, KeyError, TypeError):
            raise ValueError(f"the header of {path.name} describes no tensors") from None
    return found


def _from_hub(spec: ModelSpec) -> Source:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    repo = spec.source.removeprefix("hf://")
    try:
        folder = Path(
            snapshot_download(
                repo,
                revision=spec.revision,
                allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"],
                ignore_patterns=["*/*", "consolidated*"],  # other formats of the same weights
            )
        )
    except GatedRepoError as error:
        raise failed(spec, f"{repo} is gated: accept its terms on the hub and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise failed(spec, f"the hub has no repository {repo}, or HF_TOKEN does not open it") from error
    except RevisionNotFoundError as error:
        raise failed(spec, f"{repo} has no revision {spec.revision}") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise failed(
            spec,
            f"{repo} could not be fetched ({_first_line(error)}); with no way to the hub, download it "
            "beforehand or give a folder as source",
            retry=True,
        ) from error
    _require_safetensors(spec, folder)
    return Source(folder, folder.name)


def _require_safetensors(spec: ModelSpec, folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise failed(spec, f"{folder} holds no config.json, so it is no model in HuggingFace format")
    if not any(folder.glob("*.safetensors")):
        raise failed(
            spec, "it holds no safetensors weights; pickled weights (.bin, .pt) can run code and are not loaded"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
