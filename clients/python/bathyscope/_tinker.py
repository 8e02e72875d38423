"""`client.tinker`: what Tinker users know, in their words.

Questions about Tinker go from here to Tinker, with the caller's own key, through its SDK (the extra `tinker`) and under
deadlines of ours: the SDK itself tries again for minutes, for an hour when an account is paused. Weights are fetched
and converted by the service, which is given the key for that job alone.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bathyscope._asking import CAPABILITIES, Asker, awaited, not_downloadable
from bathyscope._connection import AsyncConnection, Connection
from bathyscope._export import export
from bathyscope._fields import adapter_body
from bathyscope._http import Operation, path
from bathyscope._objects import Adapter
from bathyscope._operations import get, outcome, submit, wait
from bathyscope._progress import Report, progress_bar
from bathyscope.errors import InvalidRequest

if TYPE_CHECKING:
    import tinker


def _supported_models(asker: Asker, timeout: float) -> list[Any]:
    return list(asker.ask(lambda client: client.get_server_capabilities(), timeout, CAPABILITIES).supported_models)


def _checkpoints(asker: Asker, run: str, timeout: float) -> list[Any]:
    if not run:
        raise InvalidRequest("name the training run; it is what follows tinker:// in the path of a checkpoint")
    route = f"training_runs/{run}/checkpoints"
    return list(asker.ask(lambda client: client.list_checkpoints(run), timeout, route).checkpoints)


def _archive_urls(asker: Asker, checkpoint: str, timeout: float) -> dict[str, str]:
    """Signed URLs of a checkpoint's files, by name."""
    run, kind, name = _parts(checkpoint)
    deadline = time.monotonic() + timeout
    if kind == "external_weights":
        return _signed(asker, run, f"{kind}/{name}", timeout)
    found = [str(one.checkpoint_id) for one in _checkpoints(asker, run, timeout)]
    sibling = f"external_weights/{name}"
    if sibling in found:
        return _signed(asker, run, sibling, max(1.0, deadline - time.monotonic()))
    if kind == "sampler_weights" and (url := asker.archive(run, f"{kind}/{name}", deadline)) is not None:
        return {"archive.tar": url}
    raise not_downloadable(checkpoint, name, run, found)


def _signed(asker: Asker, run: str, checkpoint: str, timeout: float) -> dict[str, str]:
    route = f"training_runs/{run}/checkpoints/{checkpoint}/external_weights_urls"
    where = f"tinker://{run}/{checkpoint}"
    return dict(asker.ask(lambda client: client.get_external_weights_urls(where), timeout, route).urls)


def _parts(checkpoint: str) -> tuple[str, str, str]:
    parts = checkpoint.removeprefix("tinker://").split("/")
    kinds = ("weights", "external_weights", "sampler_weights")
    if not checkpoint.startswith("tinker://") or len(parts) != 3 or not all(parts) or parts[1] not in kinds:
        raise InvalidRequest(f"{checkpoint!r} is not a checkpoint; one is tinker://RUN/external_weights/NAME")
    return parts[0], parts[1], parts[2]


def _convert(
    connection: Connection | AsyncConnection,
    api_key: str | None,
    checkpoint: str,
    base_model: str | None,
    output_dir: str | os.PathLike[str],
    cleanup_archive: bool,
    timeout: float | None,
    report: Report | None,
) -> Operation[Path]:
    """Have the service fetch and convert a checkpoint, then write it below `output_dir`."""
    body, _ = adapter_body(checkpoint, None, {"base_model": base_model})
    headers = connection.target.credentials(checkpoint)
    if api_key is not None:
        headers["X-Tinker-Api-Key"] = api_key
    job = yield from submit(path("v1", "adapters"), body, connection.retry, headers=headers)
    job = yield from wait(job, connection.retry, timeout=timeout, report=report)
    target = outcome(job)
    adapter = yield from get(Adapter, target, connection.retry)
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    final = yield from export(target, connection.retry, folder / "peft_adapter", keep_archive=not cleanup_archive)
    info = folder / "checkpoint_info.json"
    partial = info.with_name(f".{info.name}.part")
    partial.write_text(json.dumps(checkpoint_info(checkpoint, adapter, final), indent=2) + "\n", encoding="utf-8")
    partial.replace(info)
    return final


def checkpoint_info(checkpoint: str, adapter: Any, folder: Path) -> dict[str, Any]:
    """What is known of a checkpoint that was downloaded; null stands for what is not."""
    told: Mapping[str, Any] = adapter.tinker or {}
    if told.get("path") != checkpoint:
        told = {}  # equal weights were there before, from elsewhere
    said: Mapping[str, Any] = told.get("user_metadata") or {}
    return {
        "tinker_path": checkpoint,
        "base_model": str(told.get("base_model") or adapter.base_model).partition(":")[0],
        "training_dataset": said.get("training_dataset") or said.get("dataset"),
        "training_date": told.get("time"),
        "local_path": str(folder),
        "rank": adapter.rank,
        "digest": adapter.digest,
    }


class Tinker:
    """Thinking Machines' training service, for those who use both."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._asker = Asker(connection.target.tinker_api_key)

    def supported_models(self, timeout: float = 60.0) -> list[Any]:
        """The models that Tinker supports now, as its SDK gives them."""
        return _supported_models(self._asker, timeout)

    def checkpoints(self, run: str, timeout: float = 60.0) -> list[Any]:
        """The checkpoints of a training run, as Tinker's SDK gives them."""
        return _checkpoints(self._asker, run, timeout)

    def archive_url(self, path: str, timeout: float = 300.0) -> dict[str, str]:
        """Signed URLs of a checkpoint's files, by name, of whatever kind it has: those of external weights, of the
        external sibling of the same name, or one archive. They expire within minutes.

        Raises `TinkerNotDownloadable`, which names what the run has, for one that has none.
        """
        return _archive_urls(self._asker, path, timeout)

    def create_training_client(
        self, base_model: str, *, timeout: float = 300.0, **options: Any
    ) -> tinker.TrainingClient:
        """Tinker's own `TrainingClient` for a LoRA on `base_model`; `options` are those of its
        `create_lora_training_client` (`rank`, `seed`, …). Starts a session there, which is billed."""
        return _training_client(self._asker, base_model, options, timeout)

    def download_and_convert_weights(
        self,
        tinker_checkpoint: str,
        base_model_name: str | None,
        output_dir: str | os.PathLike[str],
        cleanup_archive: bool = True,
        *,
        timeout: float | None = None,
        progress: bool = False,
    ) -> Path:
        """Have the service fetch a checkpoint and convert it, and write it to `output_dir/peft_adapter`, whose path is
        returned, as PEFT loads it exactly. Beside it `checkpoint_info.json` says where it came from.

        `base_model_name` is a model of the service, null for the one that Tinker names. With `cleanup_archive` false
        the archive stays too. The adapter stays with the service, as one of `client.adapters`. Waits at most `timeout`
        seconds for the conversion (`WaitTimeout`).
        """
        with progress_bar(progress) as report:
            convert = _convert(
                self._connection,
                self._asker.key,
                tinker_checkpoint,
                base_model_name,
                output_dir,
                cleanup_archive,
                timeout,
                report,
            )
            return self._connection.run(convert)


class AsyncTinker:
    """Thinking Machines' training service, for those who use both."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection
        self._asker = Asker(connection.target.tinker_api_key)

    async def supported_models(self, timeout: float = 60.0) -> list[Any]:
        """As `Tinker.supported_models`."""
        return await asyncio.to_thread(_supported_models, self._asker, timeout)

    async def checkpoints(self, run: str, timeout: float = 60.0) -> list[Any]:
        """As `Tinker.checkpoints`."""
        return await asyncio.to_thread(_checkpoints, self._asker, run, timeout)

    async def archive_url(self, path: str, timeout: float = 300.0) -> dict[str, str]:
        """As `Tinker.archive_url`."""
        return await asyncio.to_thread(_archive_urls, self._asker, path, timeout)

    async def create_training_client(
        self, base_model: str, *, timeout: float = 300.0, **options: Any
    ) -> tinker.TrainingClient:
        """As `Tinker.create_training_client`."""
        return await asyncio.to_thread(_training_client, self._asker, base_model, options, timeout)

    async def download_and_convert_weights(
        self,
        tinker_checkpoint: str,
        base_model_name: str | None,
        output_dir: str | os.PathLike[str],
        cleanup_archive: bool = True,
        *,
        timeout: float | None = None,
        progress: bool = False,
    ) -> Path:
        """As `Tinker.download_and_convert_weights`."""
        with progress_bar(progress) as report:
            convert = _convert(
                self._connection,
                self._asker.key,
                tinker_checkpoint,
                base_model_name,
                output_dir,
                cleanup_archive,
                timeout,
                report,
            )
            return await self._connection.run(convert)


def _training_client(
    asker: Asker, base_model: str, options: Mapping[str, Any], timeout: float
) -> tinker.TrainingClient:
    sdk = asker.module()

    def call() -> Any:
        service = sdk.ServiceClient(base_url=asker.base_url, api_key=asker.key)
        return awaited(service.create_lora_training_client(base_model=base_model, **options), timeout)

    client: tinker.TrainingClient = asker.within(call, timeout)
    return client
