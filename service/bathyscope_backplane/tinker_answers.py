"""What Tinker's answers are here: one problem for one answer, whoever asked."""

from __future__ import annotations

from bathyscope import errors

_RETIRED = ("retired", "deprecated", "no longer supported", "sunset")


def problem_of(status: int | None, said: str = "") -> errors.ProblemError:
    """The problem that an answer of Tinker's is. `said` is what it says of it."""
    words = f" ({said})" if said else ""
    if status == 401:
        return key_refused("its answer was 401")
    if status == 402:
        return billing()
    if status == 403:
        return errors.TinkerForbidden(
            f"Tinker does not permit this with the given key{words}; use the key of the checkpoint's own account."
        )
    if status in (404, 410):
        return errors.TinkerNotFound(
            f"Tinker has no such run or checkpoint for this key{words}; check the path with `tinker checkpoint list`, "
            "and that the key is of the account that owns it."
        )
    if status == 429:
        return errors.TinkerRateLimited(
            "Tinker answered that there were too many requests; try again later.", retry_after=60
        )
    if status is not None and status < 500:
        if any(word in said.lower() for word in _RETIRED):
            return base_retired(said)
        return errors.AdapterSourceMissing(f"Tinker refused the request with {status}{words}; check the path.")
    return errors.TinkerOutOfReach(f"Tinker failed at the request{words}; try again later.", retry_after=30)


def problem_of_fault(kind: str, status: int | None, text: str, *, key: str, where: str) -> errors.ProblemError:
    """The problem that an exception of Tinker's SDK is: `kind` is its class, `where` the service that was asked.

    What it says is told without `key` and without addresses.
    """
    if kind in ("APIConnectionError", "APITimeoutError"):
        return errors.TinkerOutOfReach(f"{where} could not be reached; try again later.", retry_after=30)
    if kind == "TinkerError" and "api_key" in text:
        return key_refused("it does not begin with tml-")
    if status is None and "with status " in text:  # how the SDK tells a fault of a request it waited for
        found = text.rpartition("with status ")[2][:3]
        status = int(found) if found.isdigit() else None
    return problem_of(status, _said(text, key))


def problem_of_silence(status: int | None, seconds: float, *, where: str) -> errors.ProblemError:
    """The problem of a question that went on for so long; `status` is that of the last answer, which the SDK would not
    take for one."""
    if status == 402:  # it would ask again for an hour
        return billing()
    if status == 429:
        return errors.TinkerRateLimited(
            f"Tinker answered 429 (too many requests) for {seconds:g} seconds; try again later.", retry_after=60
        )
    last = f", the last answer was {status}" if status else ""
    return errors.TinkerOutOfReach(
        f"{where} did not answer within {seconds:g} seconds{last}; try again.", retry_after=30
    )


def base_retired(what: str) -> errors.TinkerBaseRetired:
    """The base model cannot be trained any more."""
    return errors.TinkerBaseRetired(
        f"Tinker has retired the base model of this checkpoint ({what}), so it cannot be exported; use external "
        "weights that were saved before, or an archive or hub repository of the adapter."
    )


def key_refused(why: str) -> errors.TinkerKeyRefused:
    """The key is none of Tinker's."""
    return errors.TinkerKeyRefused(
        f"Tinker does not accept the key, {why}; give a valid one in X-Tinker-Api-Key, or have the operator correct "
        "adapters.tinker_api_key."
    )


def billing() -> errors.TinkerBilling:
    """The account is paused."""
    return errors.TinkerBilling(
        "Tinker answered 402: the account of the key is paused for billing; settle it at Tinker's console, and try "
        "again."
    )


def _said(text: str, key: str) -> str:
    """What Tinker said, short, without the key and without addresses."""
    plain = "".join(letter if letter.isprintable() else " " for letter in text.replace(key, "…"))
    return " ".join(word if "://" not in word or word.startswith("tinker://") else "…" for word in plain.split())[:300]
