"""Which adapter a file means, and what in the file means nothing to a server."""

from __future__ import annotations

from bathyscope.errors import FieldError, InvalidRequest
from bathyscope.types.experiments import ExperimentConfig

_SCHEMES = ("tinker://", "hf://", "s3://", "file://")


def adapter_of(config: ExperimentConfig) -> tuple[str | None, list[str]]:
    """The adapter's id or source, null for the base alone; and notices of what had no effect.

    Raises `InvalidRequest` where the file names two adapters, or one only by a path of its writer's machine.
    """
    notices: list[str] = []
    model, tinker = config.model, config.tinker
    named: list[tuple[str, str]] = []
    if model.adapter is not None:
        named.append(("/model/adapter", model.adapter))
    if tinker.checkpoint_path is not None:
        if tinker.enabled:
            named.append(("/tinker/checkpoint_path", tinker.checkpoint_path))
        else:
            notices.append("tinker.checkpoint_path is left out, since tinker.enabled is false.")
    if model.tinker_lora_path is not None:
        if model.tinker_lora_path.startswith(_SCHEMES):
            named.append(("/model/tinker_lora_path", model.tinker_lora_path))
        elif named:
            notices.append(
                f"model.tinker_lora_path is a folder of another machine; the same adapter is taken from {named[-1][1]}."
            )
        elif not tinker.enabled and tinker.checkpoint_path is not None:
            notices.append("model.tinker_lora_path is a folder of another machine and is left out with tinker.")
        else:
            detail = (
                "a folder of your own machine is out of the service's reach: name the checkpoint in "
                "tinker.checkpoint_path, or upload the adapter and give its id as model.adapter"
            )
            raise InvalidRequest(
                "The adapter cannot be reached.", errors=[FieldError(pointer="/model/tinker_lora_path", detail=detail)]
            )
    for place, other in named[1:]:
        if other != named[0][1]:
            raise InvalidRequest(
                "The file names two adapters.",
                errors=[FieldError(pointer=place, detail=f"{named[0][0][1:].replace('/', '.')} names another")],
            )
    source: str | None
    pointer, source = named[0] if named else ("", None)
    if pointer == "/tinker/checkpoint_path" and not str(source).startswith("tinker://"):
        detail = "it begins with tinker://; other sources go to model.adapter"
        raise InvalidRequest(
            "The checkpoint is not one of Tinker.", errors=[FieldError(pointer=pointer, detail=detail)]
        )
    if source is not None and "://" in source and not source.startswith(_SCHEMES):
        detail = f"give the id of an adapter (ad_…), or a source that begins with {', '.join(_SCHEMES)}"
        raise InvalidRequest("The adapter is not named.", errors=[FieldError(pointer=pointer, detail=detail)])
    for name, given in (
        ("tinker.output_dir", tinker.output_dir),
        ("extraction.cache_dir", config.extraction.cache_dir),
    ):
        if given is not None:
            notices.append(f"{name} is a folder of another machine; the service keeps what it makes by itself.")
    if not tinker.download_weights and source is not None:
        notices.append("tinker.download_weights has no effect: the service fetches what it needs.")
    return source, notices
