"""Tinker's SDK under deadlines of ours, and its errors as this package's.

The SDK tries again by itself: for five minutes what may pass, for an hour while an account is paused for billing. So
each question runs in a thread of its own, which is left behind when it takes too long. Whoever waits in vain is to know
why: the route is then asked once by plain HTTP.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import httpx2

from bathyscope.errors import (
    BathyscopeError,
    InvalidRequest,
    ProblemError,
    SetupError,
    TinkerBaseRetired,
    TinkerBilling,
    TinkerForbidden,
    TinkerKeyRefused,
    TinkerNotDownloadable,
    TinkerNotFound,
    TinkerOutOfReach,
    TinkerRateLimited,
)

T = TypeVar("T")

URL = "https://tinker.thinkingmachines.dev/services/tinker-prod"
"""What the SDK takes when it is told nothing."""

CAPABILITIES = "get_server_capabilities"
"""A route that is answered to accounts in good standing only."""

_PATIENCE = 5.0
"""Seconds of silence after which it is looked whether the account is paused."""
_PROBE_SECONDS = 5.0
_ARCHIVE_PAUSE = 15.0
"""Seconds between two questions for an archive that is being made, where Tinker names none."""
_MAX_PAUSE = 60.0
_RETIRED = ("retired", "deprecated", "no longer supported", "sunset")


class Asker:
    """Asks Tinker with one key."""

    def __init__(self, api_key: str | None) -> None:
        self._api_key = api_key

    @property
    def key(self) -> str | None:
        """The key in use; null where the SDK is to find it by itself."""
        return self._api_key or os.environ.get("TINKER_API_KEY", "").strip() or None

    @property
    def base_url(self) -> str | None:
        """Where Tinker is; null where the SDK knows."""
        return os.environ.get("TINKER_BASE_URL") or None

    def module(self) -> Any:
        """Tinker's SDK."""
        try:
            import tinker
        except ModuleNotFoundError as error:
            raise SetupError(
                f"This needs {error.name}, which is not installed: pip install 'bathyscope[tinker]'."
            ) from error
        return tinker

    def ask(self, question: Callable[[Any], T], timeout: float, route: str = CAPABILITIES) -> T:
        """What `question` returns of a `RestClient`, within so many seconds. `route` is what it asks."""
        sdk = self.module()

        def call() -> Any:
            # Named, since the SDK keeps one connection for each pair of address and key, as they are given.
            client = sdk.RestClient(base_url=self.base_url, api_key=self.key)
            return awaited(question(client), timeout)

        found: T = self.within(call, timeout, route)
        return found

    def within(self, call: Callable[[], T], timeout: float, route: str = CAPABILITIES) -> T:
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
        thread.join(min(_PATIENCE, timeout))
        if thread.is_alive() and timeout > _PATIENCE:
            why = self._silence(route, timeout)
            if isinstance(why, TinkerBilling):
                raise why
            thread.join(timeout - _PATIENCE)
        if outcome:
            return outcome[0]
        if not faults or isinstance(faults[0], TimeoutError):
            raise self._silence(route, timeout)
        raise _problem(faults[0]) from faults[0]

    def archive(self, run: str, checkpoint: str, deadline: float) -> str | None:
        """The archive that Tinker once gave sampler checkpoints as; null where it does not any more."""
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TinkerOutOfReach("Tinker has not made the checkpoint's archive in time; try again in a while.")
            answer = self._get(f"training_runs/{run}/checkpoints/{checkpoint}/archive", left)
            if answer.status_code == 302:
                return answer.headers.get("location")
            if answer.status_code == 200:
                try:
                    return str(answer.json()["url"])
                except (ValueError, KeyError, TypeError):
                    raise TinkerOutOfReach(
                        "Tinker's archive route did not answer with a URL; try again later."
                    ) from None
            if answer.status_code in (400, 404, 405, 410, 501):
                return None
            if answer.status_code != 429 and answer.status_code < 500:
                raise of_status(answer.status_code)
            pause = _retry_after(answer.headers) or _ARCHIVE_PAUSE
            time.sleep(min(pause, _MAX_PAUSE, max(0.0, deadline - time.monotonic())))

    def _silence(self, route: str, timeout: float) -> BathyscopeError:
        """Why a question was not answered, as far as the route tells now."""
        try:
            answer = self._get(route, _PROBE_SECONDS, waited=timeout)
        except TinkerOutOfReach as error:
            return error
        # Without a key of ours the answer says nothing of the one that the SDK has found.
        if self.key is not None and (answer.status_code in (402, 429) or answer.status_code >= 500):
            return of_status(answer.status_code, retry_after=_retry_after(answer.headers))
        return TinkerOutOfReach(f"Tinker did not answer within {timeout:g} seconds; try again, or give it more.")

    def _get(self, route: str, timeout: float, waited: float | None = None) -> httpx2.Response:
        headers = {"Accept": "application/json", **({"X-API-Key": self.key} if self.key else {})}
        url = (self.base_url or URL).rstrip("/")
        try:
            return httpx2.get(f"{url}/api/v1/{route}", headers=headers, follow_redirects=False, timeout=timeout)
        except httpx2.TimeoutException as error:
            raise TinkerOutOfReach(
                f"Tinker did not answer within {waited or timeout:.3g} seconds; try again, or give it more."
            ) from error
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise TinkerOutOfReach(
                f"Tinker at {url} cannot be reached ({type(error).__name__}); try again in a moment."
            ) from error


def not_downloadable(checkpoint: str, name: str, run: str, found: list[str]) -> TinkerNotDownloadable:
    """A checkpoint that has no files to be downloaded, in a run that has `found`."""
    return TinkerNotDownloadable(
        f"{checkpoint} has no files that can be downloaded; save it with "
        f"TrainingClient.save_weights_external({name!r}), and ask for tinker://{run}/external_weights/{name}. "
        f"The run has: {', '.join(found) or 'nothing'}.",
        exists=found,
    )


def of_status(status: int, said: str = "", *, retry_after: float | None = None) -> ProblemError:
    """What an answer of Tinker's means. What it says may hold what was sent, and is not repeated."""
    if status == 401:
        return TinkerKeyRefused(
            "Tinker does not accept this key; give another as tinker_api_key, or in TINKER_API_KEY."
        )
    if status == 402:
        return TinkerBilling("The account of this key is paused for billing; settle that in Tinker's console.")
    if status == 403:
        return TinkerForbidden("Tinker accepts this key and does not permit this with it.")
    if status in (404, 410):
        return TinkerNotFound("Tinker has no such run or checkpoint, or it is another account's.")
    if status == 429:
        after = f"{retry_after:g} seconds" if retry_after is not None else "a while"
        return TinkerRateLimited(f"Tinker asks for fewer requests; try again after {after}.", retry_after=retry_after)
    if status < 500 and any(word in said.lower() for word in _RETIRED):
        return TinkerBaseRetired("Tinker has retired this base model; client.tinker.supported_models() are those left.")
    if status < 500:
        return InvalidRequest(f"Tinker refused the request with the status {status}; correct what was asked for.")
    return TinkerOutOfReach(f"Tinker answered with the status {status}; try again later.", retry_after=retry_after)


def _problem(error: BaseException) -> BaseException:
    """Of Tinker's own errors what this package calls them."""
    if isinstance(error, BathyscopeError) or type(error).__module__.split(".")[0] != "tinker":
        return error
    status = getattr(error, "status_code", None)
    if isinstance(status, int):
        headers = getattr(getattr(error, "response", None), "headers", {})
        return of_status(status, str(error), retry_after=_retry_after(headers))
    if "api_key" in str(error):
        return TinkerKeyRefused("There is no key for Tinker, or not one of its form: give it as tinker_api_key.")
    return TinkerOutOfReach(f"Tinker cannot be asked ({type(error).__name__}); try again in a moment.")


def _retry_after(headers: Any) -> float | None:
    text = str(headers.get("retry-after") or "")
    return float(text) if re.fullmatch(r"\d{1,6}", text) else None


def awaited(answer: Any, timeout: float) -> Any:
    """What a future of the SDK's comes to, else the answer itself."""
    return answer.result(timeout=timeout) if hasattr(answer, "result") else answer
