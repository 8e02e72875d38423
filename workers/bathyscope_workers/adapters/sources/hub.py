"""Repositories of the HuggingFace hub, in Tinker's own layout or in PEFT's.

The listing with sizes comes first and decides; files are fetched at the commit that it named, by this package's own
bounded download, into scratch. The hub library's cache, which all tokens of a machine share, is not used.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from bathyscope import errors
from bathyscope_backplane.adapter_sources import HubSource
from bathyscope_workers.adapters.sources import _files
from bathyscope_workers.adapters.sources._download import Denied, Link, download
from bathyscope_workers.adapters.sources._task import CallTimeout, Fetched, Task
from bathyscope_workers.adapters.sources._wire import UrlRefused, Wire
from bathyscope_workers.adapters.unpacking import WANTED, WEIGHTS

_HTTP_SECONDS = 20.0


class _NoAnswer(Exception):
    """The hub's library ended with a fault that is no answer of the hub's."""


def fetch(source: HubSource, into: Path, task: Task) -> Fetched:
    """Leave a repository's adapter in `into`, an empty folder. Raises problems."""
    from huggingface_hub import hf_hub_url

    info = _info(source, task)
    listed = _below(source, {entry.rfilename: entry for entry in info.siblings or []})
    chosen, others = _files.choose(listed, WANTED)
    _files.refuse_without(WEIGHTS, chosen, list(listed))
    sizes = {name: _size(listed[path]) for name, path in chosen.items()}
    task.expect(sum(size for size in sizes.values() if size is not None))
    headers = {"Authorization": f"Bearer {task.reach.hf_token}"} if task.reach.hf_token else {}
    try:
        with Wire(task.reach.hub_url, task) as wire:
            for name, path in chosen.items():
                entry = listed[path]
                url = hf_hub_url(source.repo, entry.rfilename, revision=info.sha, endpoint=task.reach.hub_url)
                download(
                    wire,
                    task,
                    into / name,
                    _always(Link(url, headers)),
                    size=sizes[name],
                    what=f"{name} of {source.repo}",
                )
                _check_digest(into / name, entry, task)
    except Denied as denied:
        raise _denied(source, denied.status) from None
    except UrlRefused as refused:
        raise errors.AdapterSourceForbidden(f"The hub names a URL that is not fetched: {refused}.") from None
    result = Fetched(others=others)
    result.notes.append(f"hub: {source.repo} at commit {str(info.sha)[:40]}")
    return result


def _always(link: Link) -> Any:
    return lambda fresh: link


def _info(source: HubSource, task: Task) -> Any:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    # `False` keeps the library from sending the machine's own token.
    api = HfApi(endpoint=task.reach.hub_url, token=task.reach.hf_token or False)

    def ask() -> Any:
        try:
            return api.model_info(source.repo, revision=source.revision, files_metadata=True, timeout=_HTTP_SECONDS)
        except HfHubHTTPError:
            raise
        except Exception as error:  # of whichever HTTP library the hub's is built on
            raise _NoAnswer(type(error).__name__) from None

    try:
        return task.within(ask, task.reach.call_seconds)
    except GatedRepoError:
        raise errors.AdapterSourceForbidden(
            f"{source.repo} is gated: accept its terms on the hub, and send a token of that account in X-HF-Token."
        ) from None
    except RevisionNotFoundError:
        raise errors.AdapterSourceMissing(
            f"{source.repo} has no revision {source.revision}; name a branch, a tag or a commit of it"
        ) from None
    except RepositoryNotFoundError:
        raise _missing(source, task) from None
    except HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None and status < 500 and status not in (408, 429):
            raise _denied(source, status) from None
        raise _out_of_reach(task, f"it answered {status}" if status else "there was no answer") from None
    except CallTimeout:
        raise _out_of_reach(task, f"there was no answer in {task.reach.call_seconds:g} seconds") from None
    except _NoAnswer as error:
        raise _out_of_reach(task, str(error)) from None


def _below(source: HubSource, entries: dict[str, Any]) -> dict[str, Any]:
    """The files of the folder that is named, by their paths in it."""
    if len(entries) > 100_000:
        raise errors.AdapterTooLarge(f"{source.repo} lists {len(entries)} files; name a repository of one adapter")
    if source.folder is None:
        # Folders of a repository are named in the request, or there is just one of an adapter.
        return {path: entry for path, entry in entries.items() if path.count("/") <= 1}
    start = f"{source.folder}/"
    found = {path.removeprefix(start): entry for path, entry in entries.items() if path.startswith(start)}
    if not found:
        raise errors.AdapterSourceMissing(f"{source.repo} has no folder {source.folder}; correct the source")
    return {path: entry for path, entry in found.items() if "/" not in path}


def _size(entry: Any) -> int | None:
    return entry.size if isinstance(entry.size, int) else None


def _check_digest(path: Path, entry: Any, task: Task) -> None:
    """Against the SHA-256 that the hub lists of large files."""
    told = getattr(entry.lfs, "sha256", None) if entry.lfs else None
    if not told:
        return
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            task.beat()
            digest.update(piece)
    if digest.hexdigest() != told:
        raise errors.AdapterIncomplete(f"{path.name} is not what the hub lists (SHA-256); try again")


def _missing(source: HubSource, task: Task) -> errors.ProblemError:
    token = "the given token does not open it" if task.reach.hf_token else "it is private: send a token in X-HF-Token"
    return errors.AdapterSourceMissing(f"The hub has no repository {source.repo}, or {token}.")


def _denied(source: HubSource, status: int) -> errors.ProblemError:
    if status == 404:
        return errors.AdapterSourceMissing(f"The hub does not have what {source.text} names; correct the source.")
    return errors.AdapterSourceForbidden(
        f"The hub answered {status} for {source.repo}: send a token in X-HF-Token that opens it, and accept its terms "
        "if it is gated."
    )


def _out_of_reach(task: Task, why: str) -> errors.ProblemError:
    return errors.AdapterSourceOutOfReach(
        f"The hub at {task.reach.hub_url} could not be reached ({why}); try again later.", retry_after=30
    )
