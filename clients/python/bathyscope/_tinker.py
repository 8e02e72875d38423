"""`client.tinker`: what Tinker users know, in their words.

Questions about Tinker go from here to Tinker, with the caller's own key, through its SDK (the extra `tinker`) and under
deadlines of ours: the SDK itself tries again for minutes, for an hour when an account is paused. Weights are fetched
and converted by the service, which is given the key for that job alone.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import httpx2

from bathyscope._connection import AsyncConnection, Connection
from bathyscope._export import export
from bathyscope._fields import adapter_body
from bathyscope._http import Operation, path
from bathyscope._objects import Adapter
from bathyscope._operations import get, outcome, submit, wait
from bathyscope._progress import Report, progress_bar
from bathyscope.errors import (
    BathyscopeError,
    InvalidRequest,
    SetupError,
    TinkerBilling,
    TinkerForbidden,
    TinkerKeyRefused,
    TinkerNotDownloadable,
    TinkerNotFound,
    TinkerOutOfReach,
)

if TYPE_CHECKING:
    import tinker

T = TypeVar("T")

_URL = "https://tinker.thinkingmachines.dev/services/tinker-prod"
_ARCHIVE_PAUSE = 5.0
"""Seconds between two questions for an archive that is being made."""

_PROBLEMS: dict[int, tuple[type[BathyscopeError], str]] = {
    401: (TinkerKeyRefused, "Tinker does not accept this key; give another as tinker_api_key, or in TINKER_API_KEY."),
    402: (TinkerBilling, "The account of this key is paused for billing; settle that in Tinker's console."),
    403: (TinkerForbidden, "Tinker accepts this key and does not permit this with it."),
    404: (TinkerNotFound, "Tinker has no such run or checkpoint, or it is another account's."),
}


class _Asker:
    """Asks Tinker. Each question runs in a thread of its own, which is left behind when it takes too long."""

    def __init__(self, api_key: str | None) -> None:
        self._api_key = api_key

    @property
    def key(self) -> str | None:
        """The key in use; null where the SDK is to find it by itself."""
        return self._api_key or os.environ.get("TINKER_API_KEY")

    def module(self) -> Any:
        """Tinker's SDK."""
        try:
            import tinker
        except ModuleNotFoundError as error:
            raise SetupError(
                f"This needs {error.name}, which is not installed: pip install 'bathyscope[tinker]'."
            ) from error
        return tinker

    def ask(self, question: Callable[[Any], T], timeout: float) -> T:
        """What `question` returns of a `RestClient`, within so many seconds."""
        sdk = self.module()

        def call() -> T:
            # Named, since the SDK keeps one connection for each pair of address and key.
            client = sdk.RestClient(base_url=os.environ.get("TINKER_BASE_URL"), api_key=self._api_key)
            answer = question(client)
            return answer.result(timeout=timeout) if hasattr(answer, "result") else answer

        return self.within(call, timeout)

    def within(self, call: Callable[[], T], timeout: float) -> T:
        """What `call` returns, or the error that stands for what went wrong."""
        outcome: list[T] = []
        faults: list[BaseException] = []

        def run() -> None:
            try:
                outcome.append(call())
            except BaseException as error:
                faults.append(error)

        thread = threading.Thread(target=run, name="tinker", daemon=True)
        thread.start()
        thread.join(timeout)
        if outcome:
            return outcome[0]
        if not faults or isinstance(faults[0], TimeoutError):
            raise TinkerOutOfReach(f"Tinker did not answer within {timeout:g} seconds; try again, or give it more.")
        raise _problem(faults[0]) from faults[0]

    def archive_urls(self, checkpoint: str, timeout: float) -> dict[str, str]:
        """Signed URLs of a checkpoint's files, by name."""
        run, kind, name = _parts(checkpoint)
        deadline = time.monotonic() + timeout
        if kind == "external_weights":
            return _urls(self.ask(lambda client: client.get_external_weights_urls(checkpoint), timeout))
        found = [one.checkpoint_id for one in self.checkpoints(run, timeout)]
        sibling = f"external_weights/{name}"
        if sibling in found:
            path = f"tinker://{run}/{sibling}"
            left = max(1.0, deadline - time.monotonic())
            return _urls(self.ask(lambda client: client.get_external_weights_urls(path), left))
        if kind == "sampler_weights" and (url := self._legacy(run, f"{kind}/{name}", deadline)) is not None:
            return {"archive.tar": url}
        raise TinkerNotDownloadable(
            f"{checkpoint} has no files that can be downloaded; save it with "
            f"TrainingClient.save_weights_external({name!r}), and ask for tinker://{run}/external_weights/{name}. "
            f"The run has: {', '.join(found) or 'nothing'}.",
            exists=found,
        )

    def checkpoints(self, run: str, timeout: float) -> list[Any]:
        """The checkpoints of a run."""
        found: list[Any] = list(self.ask(lambda client: client.list_checkpoints(run), timeout).checkpoints)
        return found

    def _legacy(self, run: str, checkpoint: str, deadline: float) -> str | None:
        """The archive that Tinker once gave sampler checkpoints as; null where it does not any more."""
        base = (os.environ.get("TINKER_BASE_URL") or _URL).rstrip("/")
        headers = {"Accept": "application/json", **({"X-API-Key": self.key} if self.key else {})}
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TinkerOutOfReach("Tinker has not made the checkpoint's archive in time; try again in a while.")
            try:
                answer = httpx2.get(
                    f"{base}/api/v1/training_runs/{run}/checkpoints/{checkpoint}/archive",
                    headers=headers,
                    follow_redirects=False,
                    timeout=left,
                )
            except httpx2.HTTPError as error:
                raise TinkerOutOfReach(f"Tinker cannot be reached: {type(error).__name__}.") from error
            if answer.status_code == 302:
                return answer.headers.get("location")
            if answer.status_code == 200:
                try:
                    return str(answer.json()["url"])
                except (ValueError, KeyError, TypeError):
                    return None
            if answer.status_code != 503:
                return None
            time.sleep(min(_ARCHIVE_PAUSE, max(0.0, deadline - time.monotonic())))


def _urls(answer: Any) -> dict[str, str]:
    return dict(answer.urls)


def _problem(error: BaseException) -> BaseException:
    """Of Tinker's own errors what this package calls them; its words may hold what was sent, and are not repeated."""
    if isinstance(error, BathyscopeError):
        return error
    status = getattr(error, "status_code", None)
    if status in _PROBLEMS:
        kind, detail = _PROBLEMS[status]
        return kind(detail)
    if status is not None:
        return TinkerOutOfReach(f"Tinker answered with the status {status}; try again later.")
    if type(error).__module__.split(".")[0] != "tinker":
        return error
    if "api_key" in str(error):
        return TinkerKeyRefused("There is no key for Tinker, or not one of its form: give it as tinker_api_key.")
    return TinkerOutOfReach(f"Tinker cannot be asked ({type(error).__name__}); try again in a moment.")


def _parts(checkpoint: str) -> tuple[str, str, str]:
    parts = checkpoint.removeprefix("tinker://").split("/")
    kinds = ("weights", "external_weights", "sampler_weights")
    if not checkpoint.startswith("tinker://") or len(parts) != 3 or not all(parts) or parts[1] not in kinds:
        raise InvalidRequest(f"{checkpoint!r} is not a checkpoint; one is tinker://RUN/external_weights/NAME")
    return parts[0], parts[1], parts[2]


def _convert(
    connection: Connection | AsyncConnection,
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
    said: Mapping[str, Any] = told.get("user_metadata") or {}
    return {
        "tinker_path": checkpoint,
        "base_model": told.get("base_model") or adapter.base_model,
        "training_dataset": told.get("training_dataset") or said.get("training_dataset") or said.get("dataset"),
        "training_date": told.get("training_date") or told.get("time"),
        "local_path": str(folder),
        "rank": adapter.rank,
        "digest": adapter.digest,
    }


class Tinker:
    """Thinking Machines' training service, for those who use both."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._asker = _Asker(connection.target.tinker_api_key)

    def supported_models(self, timeout: float = 60.0) -> list[Any]:
        """The models that Tinker supports now, as its SDK gives them."""
        return list(self._asker.ask(lambda client: client.get_server_capabilities(), timeout).supported_models)

    def checkpoints(self, run: str, timeout: float = 60.0) -> list[Any]:
        """The checkpoints of a training run, as Tinker's SDK gives them."""
        return self._asker.checkpoints(run, timeout)

    def archive_url(self, path: str, timeout: float = 300.0) -> dict[str, str]:
        """Signed URLs of a checkpoint's files, by name, of whatever kind it has: those of external weights, of the
        external sibling of the same name, or one archive. They expire within minutes.

        Raises `TinkerNotDownloadable`, which names what the run has, for one that has none.
        """
        return self._asker.archive_urls(path, timeout)

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
                self._connection, tinker_checkpoint, base_model_name, output_dir, cleanup_archive, timeout, report
            )
            return self._connection.run(convert)


class AsyncTinker:
    """Thinking Machines' training service, for those who use both."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection
        self._asker = _Asker(connection.target.tinker_api_key)

    async def supported_models(self, timeout: float = 60.0) -> list[Any]:
        """As `Tinker.supported_models`."""
        answer = await asyncio.to_thread(self._asker.ask, lambda client: client.get_server_capabilities(), timeout)
        return list(answer.supported_models)

    async def checkpoints(self, run: str, timeout: float = 60.0) -> list[Any]:
        """As `Tinker.checkpoints`."""
        return await asyncio.to_thread(self._asker.checkpoints, run, timeout)

    async def archive_url(self, path: str, timeout: float = 300.0) -> dict[str, str]:
        """As `Tinker.archive_url`."""
        return await asyncio.to_thread(self._asker.archive_urls, path, timeout)

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
                self._connection, tinker_checkpoint, base_model_name, output_dir, cleanup_archive, timeout, report
            )
            return await self._connection.run(convert)


def _training_client(
    asker: _Asker, base_model: str, options: Mapping[str, Any], timeout: float
) -> tinker.TrainingClient:
    sdk = asker.module()

    def call() -> Any:
        made = sdk.ServiceClient(api_key=asker.key).create_lora_training_client(base_model=base_model, **options)
        return made.result(timeout=timeout) if hasattr(made, "result") else made

    client: tinker.TrainingClient = asker.within(call, timeout)
    return client
