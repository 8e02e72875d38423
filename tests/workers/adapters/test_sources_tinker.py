"""Checkpoints of Tinker: the real SDK against the stand-in, which fails on demand."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bathyscope import errors
from bathyscope_workers.engine.handlers import JobStopped
from tests.tinker_standin import KEY, Fault, Run, Standin
from tests.workers.adapters.fetching import Fetching, adapter, weights

BASE = "Qwen/Qwen3-8B"


@pytest.fixture
def standin() -> Iterator[Standin]:
    with Standin() as server:
        yield server


@pytest.fixture
def run(standin: Standin) -> Run:
    return standin.add_run(base_model=f"{BASE}:peft:262144", rank=8)


@pytest.fixture
def fetching(standin: Standin, tmp_path: Path) -> Fetching:
    return Fetching(tmp_path, {"tinker_url": standin.url, "tinker_api_key": KEY})


def test_external_weights_come_with_what_tinker_says(run: Run, fetching: Fetching) -> None:
    fetched = fetching(run.add_checkpoint("external_weights", "final", adapter(**{"notes.txt": b"x"})))
    assert fetching.files() == adapter()
    assert (fetched.base_model, fetched.rank) == (BASE, 8)
    assert fetched.others == ["notes.txt"]
    assert fetching.steps[-1][1] == sum(len(content) for content in fetching.files().values())


def test_a_broken_transfer_is_gone_on_with(standin: Standin, run: Run, fetching: Fetching) -> None:
    path = run.add_checkpoint("external_weights", "final", adapter())
    standin.fail("file", Fault(cut_after=700_000), Fault(cut_after=300_000))
    fetching(path)
    assert fetching.files() == adapter()
    ranges = [text for text in standin.state.ranges if text]
    assert ranges
    assert all(int(text.removeprefix("bytes=").removesuffix("-")) > 0 for text in ranges)


def test_it_begins_anew_where_the_server_does_not_go_on(standin: Standin, run: Run, fetching: Fetching) -> None:
    path = run.add_checkpoint("external_weights", "final", adapter())
    standin.fail("file", Fault(cut_after=700_000, without_range=True), Fault(without_range=True))
    fetching(path)
    assert fetching.files() == adapter()
    assert not any(standin.state.ranges)


def test_another_file_in_the_midst_of_it_is_not_mixed_in(standin: Standin, run: Run, fetching: Fetching) -> None:
    path = run.add_checkpoint("external_weights", "final", adapter())
    standin.fail("file", Fault(cut_after=700_000))
    other = weights(seed=1)
    state = standin.state

    def swap() -> None:
        if len(state.ranges) == 1:
            for signed in state.signed.values():
                if isinstance(signed.content, bytes) and len(signed.content) > 10_000:
                    signed.content = other

    fetching.beat = swap
    fetching(path)
    assert fetching.files()["adapter_model.safetensors"] == other


def test_urls_are_signed_again_when_they_are_no_longer_taken(standin: Standin, run: Run, fetching: Fetching) -> None:
    path = run.add_checkpoint("external_weights", "final", adapter())
    standin.fail("file", Fault(cut_after=700_000), Fault(status=403))
    fetching(path)
    assert fetching.files() == adapter()
    assert standin.asked("external_weights_urls") == 2


def test_urls_are_signed_again_before_they_expire(standin: Standin, run: Run, fetching: Fetching) -> None:
    standin.state.signed_seconds = 2.0
    path = run.add_checkpoint("external_weights", "final", adapter())
    standin.fail("file", Fault(cut_after=200_000, seconds=1.2), Fault(cut_after=200_000))
    fetching(path)
    assert fetching.files() == adapter()
    assert standin.asked("external_weights_urls") >= 2


def test_a_store_that_never_takes_the_signature(standin: Standin, run: Run, fetching: Fetching) -> None:
    path = run.add_checkpoint("external_weights", "final", adapter())
    standin.fail("file", Fault(status=403), times=10)
    with pytest.raises(errors.TinkerOutOfReach):
        fetching(path)
    assert standin.asked("/files/") == 2


def test_a_transfer_that_breaks_for_ever_ends(standin: Standin, run: Run, fetching: Fetching) -> None:
    path = run.add_checkpoint("external_weights", "final", adapter())
    standin.fail("file", Fault(cut_after=0), times=50)
    with pytest.raises(errors.AdapterSourceOutOfReach):
        fetching(path, fetch_seconds=4.0)


def test_a_length_that_is_not_the_files_is_found(standin: Standin, run: Run, fetching: Fetching) -> None:
    """The file is taken for whole over HTTP: its own header tells, when it is opened."""
    from bathyscope_workers.adapters.source import SourceAdapter

    path = run.add_checkpoint("external_weights", "final", adapter())
    standin.fail("file", Fault(length=500_000))
    fetching(path)
    with pytest.raises(errors.AdapterIncomplete):
        SourceAdapter.open(fetching.into)


def test_what_is_too_large_is_refused_before_a_byte_of_it(standin: Standin, run: Run, fetching: Fetching) -> None:
    path = run.add_checkpoint("external_weights", "final", adapter())
    with pytest.raises(errors.AdapterTooLarge):
        fetching(path, max_bytes=1_000_000)
    assert standin.asked("/files/") == 0


def test_what_does_not_say_its_size_beforehand_is_refused_at_its_head(
    standin: Standin, run: Run, fetching: Fetching
) -> None:
    path = run.add_checkpoint("external_weights", "final", adapter())
    standin.fail("checkpoints", Fault(status=404))  # of a run that is another's: nothing is listed
    with pytest.raises(errors.AdapterTooLarge):
        fetching(path, max_bytes=1_000_000)
    assert all(path.stat().st_size == 0 for path in fetching.into.iterdir())


@pytest.mark.parametrize("location", ["http://user@127.0.0.1/x", "/etc/passwd"])
def test_a_url_of_another_kind_is_not_fetched(standin: Standin, run: Run, fetching: Fetching, location: str) -> None:
    path = run.add_checkpoint("external_weights", "final", adapter())
    standin.fail("urls", Fault(location=location))
    with pytest.raises(errors.AdapterSourceForbidden) as caught:
        fetching(path)
    assert location not in str(caught.value)


def test_weights_that_are_not_there_are_named_before_anything_is_fetched(
    standin: Standin, run: Run, fetching: Fetching
) -> None:
    path = run.add_checkpoint("external_weights", "final", {"adapter_model.bin": b"PK", "adapter_config.json": b"{}"})
    with pytest.raises(errors.AdapterPickled):
        fetching(path)
    assert standin.asked("/files/") == 0


# --- what goes wrong at Tinker -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("route", "fault", "problem"),
    [
        ("config", Fault(status=401), errors.TinkerKeyRefused),
        ("config", Fault(status=402), errors.TinkerBilling),
        ("info", Fault(status=402), errors.TinkerBilling),
        ("urls", Fault(status=403), errors.TinkerForbidden),
        ("urls", Fault(status=404), errors.TinkerNotFound),
        ("urls", Fault(status=429, headers={"Retry-After": "1"}), errors.TinkerRateLimited),
        ("urls", Fault(status=500), errors.TinkerOutOfReach),
        ("urls", Fault(seconds=30.0), errors.TinkerOutOfReach),
        ("config", Fault(seconds=30.0), errors.TinkerOutOfReach),
    ],
)
def test_each_answer_of_tinkers_is_a_problem_of_its_own(
    standin: Standin, run: Run, fetching: Fetching, route: str, fault: Fault, problem: type[errors.ProblemError]
) -> None:
    path = run.add_checkpoint("external_weights", "final", adapter())
    standin.fail(route, fault, times=100)
    with pytest.raises(errors.ProblemError) as caught:
        fetching(path, call_seconds=2.0)
    assert type(caught.value) is problem
    assert not fetching.files()


def test_a_moments_fault_of_tinkers_passes(standin: Standin, run: Run, fetching: Fetching) -> None:
    path = run.add_checkpoint("external_weights", "final", adapter())
    standin.fail("urls", Fault(status=429, headers={"Retry-After": "1"}), Fault(status=503))
    fetching(path)
    assert fetching.files() == adapter()


def test_without_a_key_it_says_where_to_put_one(run: Run, fetching: Fetching) -> None:
    with pytest.raises(errors.TinkerNotSetUp, match=r"X-Tinker-Api-Key.*adapters\.tinker_api_key"):
        fetching(run.add_checkpoint("external_weights", "final", adapter()), tinker_api_key=None)


@pytest.mark.parametrize("key", ["tml-unknown", "no-key-of-tinkers"])
def test_a_key_that_is_none_is_told(run: Run, fetching: Fetching, key: str) -> None:
    with pytest.raises(errors.TinkerKeyRefused):
        fetching(run.add_checkpoint("external_weights", "final", adapter()), tinker_api_key=key)


def test_another_accounts_checkpoint_is_not_there(standin: Standin, fetching: Fetching) -> None:
    other = standin.add_run(base_model=BASE, rank=8, key=standin.add_key("tml-other"))
    with pytest.raises(errors.TinkerNotFound):
        fetching(other.add_checkpoint("external_weights", "final", adapter()))


def test_a_server_that_is_not_there(run: Run, fetching: Fetching) -> None:
    path = run.add_checkpoint("external_weights", "final", adapter())
    with pytest.raises(errors.TinkerOutOfReach):
        fetching(path, tinker_url="http://127.0.0.1:9", call_seconds=2.0)


def test_a_job_is_stopped_while_tinker_hangs(standin: Standin, run: Run, fetching: Fetching) -> None:
    path = run.add_checkpoint("external_weights", "final", adapter())
    standin.fail("urls", Fault(seconds=30.0))

    def stop() -> None:
        if standin.asked("external_weights_urls"):
            raise JobStopped

    fetching.beat = stop
    started = time.monotonic()
    with pytest.raises(JobStopped):
        fetching(path)
    assert time.monotonic() - started < 20  # not an assertion of speed: the server hangs for 30


@pytest.mark.parametrize(("route", "status"), [("config", 401), ("urls", 500), ("file", 403), ("file", 500)])
def test_no_problem_and_no_line_holds_a_secret(
    standin: Standin,
    run: Run,
    fetching: Fetching,
    route: str,
    status: int,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level("DEBUG")
    path = run.add_checkpoint("external_weights", "final", adapter())
    standin.fail(route, Fault(status=status), times=100)
    with pytest.raises(errors.ProblemError) as caught:
        fetching(path, call_seconds=1.5, fetch_seconds=4.0)
    out = "".join(capfd.readouterr()) + caplog.text + str(caught.value.problem()) + repr(caught.value)
    assert not any(secret in out for secret in (KEY, "X-Signature", *standin.state.signed))
    assert not any(KEY in name for name in fetching.everything())


# --- training checkpoints --------------------------------------------------------------------------------------------


def test_a_training_checkpoint_is_off_unless_the_operator_allows_it(
    standin: Standin, run: Run, fetching: Fetching
) -> None:
    with pytest.raises(errors.TinkerExportOff, match="billed"):
        fetching(run.add_checkpoint("weights", "final", adapter()))
    assert not standin.state.requests


def test_a_training_checkpoint_is_exported_encrypted_and_deleted(
    standin: Standin, run: Run, fetching: Fetching
) -> None:
    fetched = fetching(run.add_checkpoint("weights", "final", adapter()), allow_training_export=True)
    assert fetching.files() == adapter()
    assert standin.asked("/files/adapter_model.safetensors.age") == 1
    assert standin.asked("DELETE") == 1
    assert not standin.state.sessions
    assert exported(standin) == []
    assert (fetched.base_model, fetched.rank) == (BASE, 8)


def exported(standin: Standin) -> list[str]:
    """Temporary checkpoints that are left at the server."""
    return [name for run in standin.state.runs.values() for name in run.checkpoints if "bathyscope-" in name]


@pytest.mark.parametrize("route", ["urls", "file"])
def test_the_temporary_checkpoint_is_deleted_after_a_failure(
    standin: Standin, run: Run, fetching: Fetching, route: str
) -> None:
    standin.fail(route, Fault(status=404), times=10)
    with pytest.raises(errors.ProblemError):
        fetching(run.add_checkpoint("weights", "final", adapter()), allow_training_export=True)
    assert exported(standin) == []


def test_the_temporary_checkpoint_is_deleted_when_the_job_is_stopped(
    standin: Standin, run: Run, fetching: Fetching
) -> None:
    def stop() -> None:
        if standin.asked("/files/"):
            raise JobStopped

    fetching.beat = stop
    with pytest.raises(JobStopped):
        fetching(run.add_checkpoint("weights", "final", adapter()), allow_training_export=True)
    assert exported(standin) == []
    assert standin.asked("DELETE") == 1


def test_an_export_that_takes_too_long_leaves_no_session_that_goes_on(
    standin: Standin, run: Run, fetching: Fetching
) -> None:
    standin.state.tries = 10_000
    standin.fail("future", Fault(seconds=30.0))
    with pytest.raises(errors.TinkerOutOfReach):
        fetching(run.add_checkpoint("weights", "final", adapter()), allow_training_export=True, export_seconds=2.0)
    assert exported(standin) == []


def test_a_checkpoint_whose_base_is_retired_starts_no_session(standin: Standin, fetching: Fetching) -> None:
    standin.add_model("meta-llama/Llama-3.2-1B", trainable=False)
    standin.add_model(BASE)
    run = standin.add_run(base_model="meta-llama/Llama-3.2-1B", rank=8)
    with pytest.raises(errors.TinkerBaseRetired, match=r"Llama-3\.2-1B"):
        fetching(run.add_checkpoint("weights", "final", adapter()), allow_training_export=True)
    assert standin.asked("create_session") == 0


# --- sampler checkpoints -------------------------------------------------------------------------------------------


def test_a_sampler_checkpoint_is_fetched_by_its_external_sibling(run: Run, fetching: Fetching) -> None:
    run.add_checkpoint("external_weights", "final", adapter())
    fetched = fetching(run.add_checkpoint("sampler_weights", "final", {"x": b"sampler"}))
    assert fetching.files() == adapter()
    assert any("external_weights/final in place of sampler_weights/final" in note for note in fetched.notes)


def test_a_sampler_checkpoint_is_fetched_by_its_training_sibling_where_that_is_allowed(
    standin: Standin, run: Run, fetching: Fetching
) -> None:
    run.add_checkpoint("weights", "final", adapter())
    path = run.add_checkpoint("sampler_weights", "final", {"x": b"sampler"})
    fetching(path, allow_training_export=True)
    assert fetching.files() == adapter()
    with pytest.raises(errors.TinkerNotDownloadable, match=r"weights/final can be fetched where the operator sets"):
        fetching(path)


def test_a_sampler_checkpoint_alone_says_what_exists_and_what_to_save(run: Run, fetching: Fetching) -> None:
    run.add_checkpoint("external_weights", "step-100", adapter())
    with pytest.raises(errors.TinkerNotDownloadable, match="save_weights_external") as caught:
        fetching(run.add_checkpoint("sampler_weights", "final", adapter()))
    assert caught.value.problem()["exists"] == ["external_weights/step-100", "sampler_weights/final"]


@pytest.mark.parametrize("way", ["302", "200"])
def test_the_archive_route_is_waited_for(standin: Standin, run: Run, fetching: Fetching, way: str) -> None:
    from bathyscope_workers.adapters.unpacking import unpack

    standin.state.archive = way  # type: ignore[assignment]
    standin.state.archive_pending = 1
    standin.fail("file", Fault(cut_after=500_000))
    fetched = fetching(run.add_checkpoint("sampler_weights", "final", adapter()))
    assert fetched.archive is not None
    unpack(fetched.archive, fetching.folder / "unpacked")
    assert (fetching.folder / "unpacked" / "adapter_model.safetensors").read_bytes() == weights()


def test_an_archive_that_is_never_made_is_not_waited_for_for_ever(
    standin: Standin, run: Run, fetching: Fetching
) -> None:
    standin.state.archive, standin.state.archive_pending = "302", 10_000
    with pytest.raises(errors.TinkerOutOfReach, match="archive"):
        fetching(run.add_checkpoint("sampler_weights", "final", adapter()), export_seconds=2.0)


def test_an_archive_at_a_url_of_another_kind_is_not_fetched(standin: Standin, run: Run, fetching: Fetching) -> None:
    standin.state.archive = "302"
    standin.fail("archive", Fault(location="file:///etc/passwd"))
    with pytest.raises(errors.AdapterSourceForbidden):
        fetching(run.add_checkpoint("sampler_weights", "final", adapter()))


def test_an_archive_whose_url_cannot_be_renewed_is_out_of_reach(standin: Standin, run: Run, fetching: Fetching) -> None:
    standin.state.archive, standin.state.signed_seconds = "302", 20.0  # so soon that it is asked for again
    standin.fail("archive", Fault(), Fault(seconds=4))
    with pytest.raises(errors.TinkerOutOfReach, match="could not be reached"):
        fetching(run.add_checkpoint("sampler_weights", "final", adapter()), stall_seconds=1.0)


# --- what is told of a checkpoint ----------------------------------------------------------------------------------


def test_when_it_was_made_and_what_its_account_noted_is_kept_cut_short(run: Run, fetching: Fetching) -> None:
    run.user_metadata = {f"{number:0100}"[::-1]: "x" * 10_000 for number in range(100)}
    path = run.add_checkpoint("external_weights", "final", adapter())
    run.checkpoints["external_weights/final"].made = 1_750_000_000.0
    facts = fetching(path).facts
    assert facts is not None
    assert facts["time"] == "2025-06-15T15:06:40Z"
    assert len(facts["user_metadata"]) == 32
    assert max(map(len, facts["user_metadata"])) == 64
    assert {len(value) for value in facts["user_metadata"].values()} == {512}
    run.checkpoints["external_weights/final"].user_metadata = {"dataset": "its own"}
    again = fetching(path).facts
    assert again is not None
    assert again["user_metadata"] == {"dataset": "its own"}
