"""Adapters in the cpu engine: fetched, unpacked, read and converted, all below the job's scratch folder.

The job's `spec` holds `source` (as the request wrote it, null for an upload) and `base_model` (the name of the model
that the request asks for, or null). Beside it the supervisor gives

- `reach`: `Reach.of(settings.adapters, credentials).to_wire()`; memory and pipe alone ever hold it;
- `models`: the models that an adapter may be for, as `ModelSpec.to_wire()`; just one when the request names it;
- `archive_path`: of an upload, the archive as a file of this machine.

The result names the base model, which is one of `models`, and the files of a PEFT folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bathyscope import errors
from bathyscope_backplane.adapter_sources import base_model_name, parse_source
from bathyscope_workers.adapters import sources
from bathyscope_workers.adapters.sources._reach import Reach
from bathyscope_workers.adapters.sources._task import TEMPORARY, CallTimeout, Fetched, Task
from bathyscope_workers.adapters.unpacking import Limits, check_folder, unpack
from bathyscope_workers.engine.handlers import JobContext
from bathyscope_workers.engine.protocol import RunJob
from bathyscope_workers.models.source import LoadFault, locate
from bathyscope_workers.models.spec import ModelSpec

if TYPE_CHECKING:
    from bathyscope_workers.adapters.conversion import Converted
    from bathyscope_workers.adapters.source import SourceAdapter

_MAX_NOTES = 100
_MAX_NOTED = 20


def convert(job: RunJob, context: JobContext) -> dict[str, Any]:
    """The handler of an adapter: from its source to a PEFT folder in scratch, or a problem that says why not."""
    reach = Reach.from_wire(job.extra["reach"])
    models = [ModelSpec.from_wire(wire) for wire in job.extra["models"]]
    scratch = Path(job.scratch)
    task = Task(reach, scratch, beat=context.beat, progress=context.progress)
    folder = scratch / "files"
    try:
        fetched = _fetch(job, folder, task)
        return _convert(job, fetched, folder, models, task, context)
    finally:
        # Not left to whoever removes the scratch folder: the disk may be short of the room until then.
        shutil.rmtree(folder, ignore_errors=True)
        for name in TEMPORARY:
            (scratch / name).unlink(missing_ok=True)


def _fetch(job: RunJob, folder: Path, task: Task) -> Fetched:
    given = job.extra.get("archive_path")
    if given is not None:
        fetched = Fetched(archive=Path(given))
    else:
        folder.mkdir()
        fetched = sources.fetch(parse_source(job.spec["source"]), folder, task)
    if fetched.archive is not None:
        limits = Limits(total_bytes=task.reach.max_bytes)
        unpacked = unpack(fetched.archive, folder, limits, beat=task.beat)
        fetched.notes += unpacked.notes
        if fetched.archive.parent == task.scratch:
            fetched.archive.unlink()  # an upload's may be the store's own file
    elif fetched.others:
        shown = ", ".join(fetched.others[:_MAX_NOTED])
        fetched.notes.append(f"source: left out {len(fetched.others)} other files: {shown}"[:2000])
    check_folder(folder, others=fetched.others)
    return fetched


def _convert(
    job: RunJob, fetched: Fetched, folder: Path, models: list[ModelSpec], task: Task, context: JobContext
) -> dict[str, Any]:
    # Here, since they import torch: a source that is refused before does not wait for it.
    from bathyscope_workers.adapters.conversion import convert as convert_onto
    from bathyscope_workers.adapters.skeleton import Skeleton
    from bathyscope_workers.adapters.source import SourceAdapter

    plain = SourceAdapter.open(folder, base_model=job.spec.get("base_model"))
    model = _base(job.spec.get("base_model"), fetched, plain, models)
    _check_rank(fetched, plain)
    # One name for one base, so that the same weights have one digest wherever they come from.
    adapter = _watched(plain, _identity(model) or model.name, task, context)
    skeleton = _skeleton(model, task, Skeleton.read)
    try:
        converted = convert_onto(adapter, skeleton, beat=task.beat)
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise errors.PeftMissing(
            "The worker lacks the package `peft`; install it with pip install 'bathyscope[worker]'."
        ) from None
    target = Path(job.scratch) / "peft"
    converted.save(target)
    return {
        "base_model": model.name,
        "path": str(target),
        "files": [_facts(path, task) for path in sorted(target.iterdir())],
        **_described(converted),
        "format": adapter.layout,
        "conversion": [*fetched.notes, *converted.notes][:_MAX_NOTES],
        "tinker": fetched.facts,
    }


def _described(converted: Converted) -> dict[str, Any]:
    config = converted.peft_config
    return {
        "digest": converted.digest,
        "rank": max((target.rank for target in converted.targets), default=0),
        "alpha": float(config["lora_alpha"]),
        "target_modules": [target.name for target in converted.targets],
        "tensors": {"read": converted.read, "applied": converted.applied},
        "exclusive": not converted.plain,
    }


def _base(named: str | None, fetched: Fetched, adapter: SourceAdapter, models: list[ModelSpec]) -> ModelSpec:
    """The model that the adapter is for. What Tinker says is held against the name; a config's word is only noted."""
    if named is not None:
        model = next((model for model in models if model.name == named), None)
        if model is None:
            raise errors.ModelUnknown(f"{named} is not offered here; GET /v1/models lists what is.")
        if fetched.base_model and not _same(fetched.base_model, model):
            if _identity(model) is not None:
                raise errors.AdapterBaseMismatch(
                    f"Tinker says that this was trained on {fetched.base_model}, and base_model is {named}; name the "
                    "base that it was trained on",
                    tinker=fetched.base_model,
                )
            fetched.notes.append(f"base: Tinker says {fetched.base_model}; {named} is the request's")
        return model
    said = fetched.base_model or adapter.base_model
    if not said:
        raise errors.AdapterBaseMismatch("the adapter names no base model; give base_model in the request")
    model = next((model for model in models if _same(said, model)), None)
    if model is None:
        raise errors.AdapterBaseMismatch(
            f"the adapter was trained on {said[:200]}, which is not offered here; have the operator add it, or give "
            "base_model if it is offered under another name",
        )
    return model


def _same(said: str, model: ModelSpec) -> bool:
    names = {model.name, _identity(model)} - {None}
    return base_model_name(said).casefold() in {base_model_name(str(name)).casefold() for name in names}


def _identity(model: ModelSpec) -> str | None:
    """What the model is on the hub, as far as its source or name tell; a local name alone says nothing."""
    if model.source.startswith("hf://"):
        return model.source.removeprefix("hf://").partition("@")[0]
    return model.name if "/" in model.name else None


def _check_rank(fetched: Fetched, adapter: SourceAdapter) -> None:
    if fetched.rank is not None and fetched.rank != adapter.config.r:
        raise errors.AdapterConfigInvalid(
            f"r of adapter_config.json is {adapter.config.r}, and Tinker says that the run has rank {fetched.rank}; "
            "save the checkpoint again",
            names=["r"],
        )


def _watched(plain: SourceAdapter, base: str, task: Task, context: JobContext) -> SourceAdapter:
    """The same adapter, which gives a sign of life for each tensor that is read, so that it can be stopped there."""
    from bathyscope_workers.adapters.source import SourceAdapter

    # Each is read once for the digest and once to be written.
    done, total = 0, 2 * len(plain.tensors)

    class Watched(SourceAdapter):
        def read(self, name: str) -> Any:
            nonlocal done
            done += 1
            context.progress("convert", min(done, total), total, "tensors")
            task.beat()
            return SourceAdapter.read(self, name)

    given = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
    return Watched(**{**given, "base_model": base})


def _skeleton(model: ModelSpec, task: Task, read: Callable[..., Any]) -> Any:
    """The base without its weights, of which a hub model's are not fetched."""
    try:
        folder = _in_thread(task, lambda: _model_folder(model, task))
        return _in_thread(task, lambda: read(folder, name=model.name))
    except LoadFault as fault:
        if fault.retry:
            raise errors.AdapterSourceOutOfReach(str(fault.problem), retry_after=30) from None
        raise fault.problem from None
    except (ValueError, KeyError, AttributeError, TypeError, NotImplementedError) as error:
        raise errors.ModelLoadFailed(
            f"{model.name}: its config.json does not describe a model that can be built ({type(error).__name__})",
            model=model.name,
        ) from error


def _model_folder(model: ModelSpec, task: Task) -> Path:
    if model.source.startswith("hf://"):
        return _hub_config(model)
    path = Path(model.source).expanduser()
    if path.suffix != ".gguf" and (path / "config.json").is_file():
        return path
    return locate(model).folder


def _hub_config(model: ModelSpec) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    repo, _, revision = model.source.removeprefix("hf://").partition("@")
    try:
        return Path(hf_hub_download(repo, "config.json", revision=model.revision or revision or None)).parent
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError):
        raise errors.ModelLoadFailed(
            f"{model.name}: the hub does not give out {repo} to this worker; set HF_TOKEN, or correct the registry",
            model=model.name,
        ) from None
    except Exception as error:  # of whichever HTTP library the hub's is built on
        raise errors.AdapterSourceOutOfReach(
            f"config.json of {repo} could not be fetched ({type(error).__name__}); try again later.", retry_after=30
        ) from None


def _in_thread(task: Task, call: Callable[[], Any]) -> Any:
    try:
        return task.within(call, task.seconds_left)
    except CallTimeout:
        task.beat()  # raises: it is the whole fetch whose time is over
        raise errors.AdapterSourceOutOfReach("The adapter could not be read in time; try again later.") from None


def _facts(path: Path, task: Task) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            task.beat()
            digest.update(piece)
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest.hexdigest()}
