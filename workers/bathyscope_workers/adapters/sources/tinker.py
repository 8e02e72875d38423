"""Checkpoints of Tinker.

- `external_weights/NAME`: a signed URL for each file.
- `weights/NAME`: Tinker has no download for it. A session is started on it, which is billed, it is saved there as an
  external checkpoint, encrypted with age for a key that only this process has, fetched, and deleted again.
- `sampler_weights/NAME`: what recipes save beside it under the same name; else the archive route of SDKs before 0.36,
  which the server may have given up.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

import structlog

from bathyscope import errors
from bathyscope_backplane.adapter_sources import TinkerSource, base_model_name
from bathyscope_backplane.tinker_answers import base_retired
from bathyscope_workers.adapters.sources import _files
from bathyscope_workers.adapters.sources._download import Denied, Link, download
from bathyscope_workers.adapters.sources._task import ARCHIVE, SEALED, Fetched, Task
from bathyscope_workers.adapters.sources._tinker_archive import archive_link
from bathyscope_workers.adapters.sources._tinker_sdk import TinkerSdk
from bathyscope_workers.adapters.sources._wire import Wire
from bathyscope_workers.adapters.unpacking import WANTED, WEIGHTS

_RENEW_SECONDS = 300.0
"""Signed URLs are renewed so long before they expire."""
_TTL_SECONDS = 3600
"""Of the temporary checkpoint, should it not be deleted; Tinker takes no less."""
_CLEAN_UP_SECONDS = 20.0
_NAMED = 20
_MAX_SAID = 32
"""Entries of a run's own metadata that are kept, each of a few hundred letters."""

_log = structlog.get_logger(__name__)


def fetch(source: TinkerSource, into: Path, task: Task) -> Fetched:
    """Leave a checkpoint's files in `into`, an empty folder. Raises problems."""
    key = task.reach.tinker_api_key
    if not key:
        raise errors.TinkerNotSetUp(
            "There is no key for Tinker: send one in the header X-Tinker-Api-Key, or have the operator set "
            "adapters.tinker_api_key (BATHYSCOPE_ADAPTERS__TINKER_API_KEY)."
        )
    with TinkerSdk(task, key) as sdk:
        fetching = _Fetching(source, into, task, sdk, key)
        if source.kind == "external_weights":
            fetching.external(source)
        elif source.kind == "weights":
            fetching.training(source)
        else:
            fetching.sampler()
        return fetching.result


class _Fetching:
    def __init__(self, source: TinkerSource, into: Path, task: Task, sdk: TinkerSdk, key: str) -> None:
        self.source = source
        self.into = into
        self.task = task
        self.sdk = sdk
        self.key = key
        self.result = Fetched(facts={"path": source.text})
        self._checkpoints: list[dict[str, Any]] | None = None

    def external(self, source: TinkerSource) -> None:
        """A signed URL for each file."""
        size = next((found.get("size_bytes") for found in self._listed() if _is(found, source)), None)
        if isinstance(size, int) and size > self.task.reach.max_bytes:
            self.task.expect(size)  # raises: nothing is fetched of what is known to be too large
        self._ask_info(source)
        signed = _Signed(self._call, source.text)
        chosen, self.result.others = _files.choose(signed.names(), WANTED)
        _files.refuse_without(WEIGHTS, chosen, signed.names())
        with Wire(self.task.reach.tinker_url, self.task) as wire:
            for name, place in chosen.items():
                self._download(wire, signed.link(place), self.into / name, name)

    def training(self, source: TinkerSource) -> None:
        """Through a session on it."""
        if not self.task.reach.allow_training_export:
            raise errors.TinkerExportOff(
                f"{source.text} is a training checkpoint: Tinker gives it out only through a training session on it, "
                "which is billed, and the operator has not allowed that (adapters.allow_training_export). Save it with "
                "training_client.save_weights_external(NAME) and add tinker://RUN/external_weights/NAME."
            )
        pyrage = _pyrage()
        self._ask_info(source)
        self._refuse_retired()
        identity = pyrage.x25519.Identity.generate()
        name = f"bathyscope-{secrets.token_hex(8)}"
        made: list[str] = []
        try:
            path = self._call(
                "export",
                seconds=self.task.reach.export_seconds,
                on_event=lambda model: made.append(f"tinker://{model}/external_weights/{name}"),
                path=source.text,
                name=name,
                ttl_seconds=_TTL_SECONDS,
                recipients=[str(identity.to_public())],
            )
            made[:] = [str(path)]
            self._fetch_sealed(made[0], identity, pyrage)
        finally:
            if made:
                self._delete(made[0])
        self.result.notes.append(
            f"tinker: exported {source.checkpoint} through a session of the key's account, encrypted, and deleted the "
            "temporary checkpoint"
        )

    def sampler(self) -> None:
        """Its sibling, else the archive."""
        exists = [str(found.get("checkpoint_id")) for found in self._listed()]
        external, training = (
            TinkerSource(self.source.run, kind, self.source.name) for kind in ("external_weights", "weights")
        )
        for sibling, fetch_it in ((external, self.external), (training, self.training)):
            if sibling.checkpoint in exists and (sibling is external or self.task.reach.allow_training_export):
                self.result.notes.append(f"tinker: fetched {sibling.checkpoint} in place of {self.source.checkpoint}")
                fetch_it(sibling)
                return
        self._ask_info(self.source)
        with Wire(self.task.reach.tinker_url, self.task) as wire:
            link = archive_link(wire, self.task, self.key, self.source)
            if link is None:
                raise self._not_downloadable(exists, training.checkpoint)
            path = self.task.scratch / ARCHIVE
            self._download(wire, link, path, "archive")
        self.result.archive = path
        self.result.notes.append("tinker: fetched through the archive route of SDKs before 0.36")

    def _download(self, wire: Wire, link: Callable[[bool], Link], path: Path, what: str) -> None:
        try:
            download(wire, self.task, path, link, what=what)
        except Denied as denied:
            raise errors.TinkerOutOfReach(
                f"The store that Tinker names answered {denied.status} to a URL signed a moment ago; try again later.",
                retry_after=60,
            ) from None

    # --- what Tinker says --------------------------------------------------------------------------------------

    def _call(self, name: str, /, *, seconds: float | None = None, **rest: Any) -> Any:
        return self.sdk.call(name, seconds=seconds or self.task.reach.call_seconds, **rest)

    def _listed(self) -> list[dict[str, Any]]:
        """The run's checkpoints; of a run that is another's and public, none are listed."""
        if self._checkpoints is None:
            try:
                self._checkpoints = self._call("checkpoints", run=self.source.run)
            except (errors.TinkerNotFound, errors.TinkerForbidden):
                self._checkpoints = []
        return self._checkpoints or []

    def _ask_info(self, source: TinkerSource) -> None:
        """Base model and rank. What has no answer for this kind of checkpoint is asked of its run."""
        try:
            info = self._call("info", path=source.text)
        except (errors.AdapterSourceMissing, errors.TinkerForbidden) as refused:
            try:
                info = self._call("run", run=source.run)
            except (errors.AdapterSourceMissing, errors.TinkerForbidden):
                raise refused from None
        if not info.get("is_lora", True):
            raise errors.AdapterUnsupported(
                f"{source.text} is no LoRA but a whole model; train with create_lora_training_client"
            )
        base = str(info.get("base_model") or "")[:256]
        self.result.base_model = base_model_name(base) or None
        rank = info.get("lora_rank")
        self.result.rank = rank if isinstance(rank, int) else None
        kept = ("base_model", "lora_rank", "train_unembed", "train_mlp", "train_attn")
        self.result.facts = {
            **(self.result.facts or {}),
            **{name: info[name] for name in kept if isinstance(info.get(name), str | int | bool)},
            **self._history(),
        }

    def _history(self) -> dict[str, Any]:
        """When the checkpoint was made, and what its account noted of it or of its run, as far as that is told."""
        found = next((found for found in self._listed() if _is(found, self.source)), {})
        said = found.get("user_metadata")
        if not said:
            with contextlib.suppress(errors.AdapterSourceMissing, errors.TinkerForbidden):
                said = self._call("run", run=self.source.run).get("user_metadata")
        told = {"time": found.get("time"), "user_metadata": _short(said or {})}
        return {name: value for name, value in told.items() if value}

    def _refuse_retired(self) -> None:
        """Before a session is started: only what Tinker supports now can be trained."""
        base = self.result.base_model
        names = [
            base_model_name(str(model.get("model_name") or "")).casefold()
            for model in self._call("models")
            if model.get("trainable") is not False
        ]
        if base and names and base.casefold() not in names:
            raise base_retired(base)

    def _not_downloadable(self, exists: list[str], training: str) -> errors.ProblemError:
        shown = ", ".join(exists[:_NAMED]) or "nothing that this key is shown"
        if training in exists:
            remedy = f"{training} can be fetched where the operator sets adapters.allow_training_export"
        else:
            remedy = f"save it with training_client.save_weights_external({self.source.name!r})"
        return errors.TinkerNotDownloadable(
            f"Tinker does not give out sampler checkpoints any more, and the run has no other one named "
            f"{self.source.name}; it has {shown}. Instead, {remedy}.",
            exists=exists[:200],
        )

    # --- the export ----------------------------------------------------------------------------------------------

    def _fetch_sealed(self, path: str, identity: Any, pyrage: Any) -> None:
        signed = _Signed(self._call, path)
        chosen, self.result.others = _files.choose(signed.names(), [f"{name}.age" for name in WANTED])
        _files.refuse_without(f"{WEIGHTS}.age", chosen, signed.names())
        with Wire(self.task.reach.tinker_url, self.task) as wire:
            for name, place in chosen.items():
                sealed = self.task.scratch / SEALED
                self._download(wire, signed.link(place), sealed, name)
                self._unseal(sealed, self.into / name.removesuffix(".age"), identity, pyrage)
                sealed.unlink()

    def _unseal(self, sealed: Path, path: Path, identity: Any, pyrage: Any) -> None:
        with sealed.open("rb") as source, path.open("xb") as target:
            reader = _Beating(source, self.task)
            try:
                pyrage.decrypt_io(reader, target, [identity])
            except Exception as error:
                if reader.stopped is not None:
                    raise reader.stopped from None
                if isinstance(error, OSError):
                    raise
                raise errors.AdapterIncomplete(
                    f"{path.name} cannot be decrypted with the key that it was exported for; export it again"
                ) from None

    def _delete(self, path: str) -> None:
        """Remove the temporary checkpoint, even when the job was stopped; the least that is left to do is said."""
        patient = Task(self.task.reach, self.task.scratch)
        with TinkerSdk(patient, self.key) as sdk:
            try:
                sdk.call("delete", seconds=_CLEAN_UP_SECONDS, path=path)
            except errors.AdapterSourceMissing:
                return  # it had not been made yet
            except errors.ProblemError as problem:
                _log.warning("tinker.checkpoint_left", slug=problem.slug, expires_in=_TTL_SECONDS)
                self.result.notes.append(f"tinker: {path} could not be deleted; it expires within an hour")


class _Signed:
    """The signed URLs of an external checkpoint, signed again in time."""

    def __init__(self, call: Callable[..., Any], path: str) -> None:
        self._call = call
        self._path = path
        self._renew()

    def names(self) -> list[str]:
        """Paths of the files."""
        return list(self._urls)

    def link(self, name: str) -> Callable[[bool], Link]:
        """The place of a file, for `download`."""

        def current(fresh: bool) -> Link:
            if fresh or self._expires - time.time() < min(_RENEW_SECONDS, self._life / 2):
                self._renew()
            url = self._urls.get(name)
            if url is None:
                raise errors.AdapterIncomplete(f"Tinker lists {name} no more; save the checkpoint again")
            return Link(url)

        return current

    def _renew(self) -> None:
        answer = self._call("urls", path=self._path)
        self._urls: dict[str, str] = {str(name): str(url) for name, url in answer["urls"].items()}
        self._expires = float(answer["expires"])
        self._life = max(self._expires - time.time(), 0.0)


class _Beating:
    """A file that gives signs of life when it is read, and keeps what stopped it: pyrage makes its own error of it."""

    def __init__(self, file: IO[bytes], task: Task) -> None:
        self._file = file
        self._task = task
        self.stopped: BaseException | None = None

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes."""
        try:
            self._task.beat()
        except BaseException as stopped:
            self.stopped = stopped
            raise
        return self._file.read(size)


def _pyrage() -> Any:
    try:
        import pyrage
    except ImportError:
        raise errors.TinkerNotSetUp(
            "The worker lacks the package `pyrage`; install it with pip install 'bathyscope[tinker]'."
        ) from None
    return cast(Any, pyrage)


def _is(found: dict[str, Any], source: TinkerSource) -> bool:
    return found.get("checkpoint_id") == source.checkpoint


def _short(said: dict[str, Any]) -> dict[str, str]:
    """The first entries, cut short: they are kept with the adapter."""
    return {str(name)[:64]: str(value)[:512] for name, value in list(said.items())[:_MAX_SAID]}
