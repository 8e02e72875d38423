"""Who goes first, and who shares."""

import time
from typing import Any

import numpy as np
import pytest

from bathyscope_workers.engine.protocol import RunJob
from bathyscope_workers.engine.scheduler import HEAD_START_SECONDS, Active, Scheduler, next_to_tokenise
from bathyscope_workers.extraction.plan import Pending, Queue
from bathyscope_workers.models.forward import Style

STYLE = Style("hooks", mask=False, alone=False)


class Resident:
    token_budget: int | None = None


class Work:
    """What the scheduler reads of an extraction."""

    answering = branching = False

    def __init__(
        self,
        lengths: list[int],
        resident: Resident,
        *,
        top: int = 8,
        style: Style = STYLE,
        adapters: tuple[str | None, ...] = (None,),
    ) -> None:
        self.queues = [queue(adapter, number, lengths) for number, adapter in enumerate(adapters)]
        self.resident, self.top, self.style = resident, top, style

    def group_of(self, adapter: str | None) -> str | None:
        """Adapters whose name begins with an x do not mix."""
        return adapter if adapter and adapter.startswith("x") else None


def queue(adapter: str | None, number: int, lengths: list[int]) -> Queue:
    return Queue(adapter, number * len(lengths), Pending(np.array(lengths, dtype=np.int64)))


@pytest.fixture
def resident() -> Resident:
    return Resident()


def active(name: str, work: Work, owner: str = "o", **job: Any) -> Active:
    made = Active(RunJob(id=name, kind="extraction", owner=owner, **job), received=time.monotonic())
    made.extraction = work  # type: ignore[assignment]
    made.tokenised = True
    return made


def serve(scheduler: Scheduler, jobs: list[Active], batches: int = 100) -> list[dict[str, int]]:
    served: list[dict[str, int]] = []
    while len(served) < batches and (rows := scheduler.next_batch(jobs)):
        counts: dict[str, int] = {}
        for row in rows:
            counts[row.active.job.id] = counts.get(row.active.job.id, 0) + 1
        served.append(counts)
    return served


def test_one_text_does_not_wait_for_ten_thousand(resident: Resident) -> None:
    big = active("big", Work([10] * 10_000, resident), owner="a")
    scheduler = Scheduler(batch_tokens=100)
    serve(scheduler, [big], batches=3)
    for owner in ("a", "b"):
        one = active(f"one-{owner}", Work([4], resident), owner=owner)
        assert any(f"one-{owner}" in batch for batch in serve(scheduler, [big, one], batches=2))


def test_owners_take_turns(resident: Resident) -> None:
    """Five jobs of one owner get as much as the one job of another."""
    jobs = [active(f"a{index}", Work([100] * 50, resident), owner="a") for index in range(5)]
    jobs.append(active("b", Work([100] * 50, resident), owner="b"))
    served = serve(Scheduler(batch_tokens=100), jobs, batches=20)
    assert sum(batch.get("b", 0) for batch in served) == 10
    assert {name for batch in served for name in batch} == {"a0", "a1", "a2", "a3", "a4", "b"}


def test_priority_then_age(resident: Resident) -> None:
    low = active("low", Work([100] * 9, resident), owner="a", priority="low")
    high = active("high", Work([100] * 9, resident), owner="b", priority="high")
    scheduler = Scheduler(batch_tokens=100)
    assert serve(scheduler, [low, high], batches=3) == [{"high": 1}] * 3
    low.received -= 60
    assert serve(scheduler, [low, high], batches=1) == [{"low": 1}]


def test_small_jobs_share_a_batch(resident: Resident) -> None:
    jobs = [active(f"j{index}", Work([10], resident), owner=f"o{index}") for index in range(8)]
    assert len(serve(Scheduler(batch_tokens=100), jobs)) == 1


def test_what_ends_with_a_batch_is_not_kept_by_rows_of_what_does_not(resident: Resident) -> None:
    """A batch takes as long as it is large: of a job that goes on anyway it gets a quarter's filling at most."""
    big = active("big", Work([10] * 1000, resident), owner="a")
    scheduler = Scheduler(batch_tokens=100)
    assert serve(scheduler, [big], batches=1) == [{"big": 10}]
    one = active("one", Work([10], resident), owner="b")
    assert serve(scheduler, [big, one], batches=2) == [{"one": 1, "big": 1}, {"big": 10}]
    # Those that end with it too fill it up.
    few = [active(f"few{index}", Work([10] * 2, resident), owner=f"o{index}") for index in range(4)]
    assert serve(scheduler, [big, *few], batches=1) == [{f"few{index}": 2 for index in range(4)}]
    # One that does not end with it has no use for a smaller batch.
    two, wide = (
        active("two", Work([40, 5], resident), owner="c"),
        active("wide", Work([30] * 1000, resident), owner="d"),
    )
    wide.turn = 1
    assert serve(scheduler, [wide, two], batches=1) == [{"two": 1, "wide": 1}]


@pytest.mark.parametrize("reason", ["solo", "resident", "style", "depth", "length"])
def test_who_does_not_share(resident: Resident, reason: str) -> None:
    first = active("first", Work([10], resident), owner="a")
    other = active(
        "other",
        Work(
            [400 if reason == "length" else 10],
            Resident() if reason == "resident" else resident,
            style=Style("hooks", mask=True, alone=False) if reason == "style" else STYLE,
            top=30 if reason == "depth" else 8,
        ),
        owner="b",
        solo=reason == "solo",
    )
    for jobs in ([first, other], [other, first]):
        for one in jobs:
            assert one.extraction is not None
            one.running.queues = [queue(None, 0, [400 if one is other and reason == "length" else 10])]
        assert all(len(batch) == 1 for batch in serve(Scheduler(batch_tokens=512), jobs))


def test_texts_that_must_run_alone(resident: Resident) -> None:
    job = active("int8", Work([5, 9, 7], resident, style=Style("hooks", mask=False, alone=True)))
    assert serve(Scheduler(batch_tokens=512), [job]) == [{"int8": 1}] * 3


def test_a_lowered_budget_holds(resident: Resident) -> None:
    resident.token_budget = 20
    job = active("job", Work([10] * 4, resident))
    assert serve(Scheduler(batch_tokens=512), [job]) == [{"job": 2}] * 2


def test_rows_of_the_base_and_of_adapters_share(resident: Resident) -> None:
    jobs = [
        active("base", Work([10, 10], resident), owner="a"),
        active("one", Work([10], resident, adapters=("d1",)), owner="b"),
        active("pair", Work([10, 10], resident, adapters=(None, "d1", "d2")), owner="c"),
    ]
    assert serve(Scheduler(batch_tokens=100), jobs) == [{"base": 2, "one": 1, "pair": 6}]


def test_an_adapter_that_does_not_mix_has_its_batches_to_itself(resident: Resident) -> None:
    jobs = [
        active("pair", Work([10], resident, adapters=(None, "x1", "d1", "x2")), owner="a"),
        active("same", Work([10, 10], resident, adapters=("x1",)), owner="b"),
        active("base", Work([10], resident), owner="c"),
    ]
    scheduler = Scheduler(batch_tokens=100)
    together = []
    while rows := scheduler.next_batch(jobs):
        together.append(sorted((row.active.job.id, row.row) for row in rows))
    assert sorted(together) == [
        [("base", 0), ("pair", 0), ("pair", 2)],
        [("pair", 1), ("same", 0), ("same", 1)],
        [("pair", 3)],
    ]


def test_a_large_pair_runs_one_variant_after_the_other(resident: Resident) -> None:
    """The fewer adapters meet in a batch, the less it costs."""
    job = active("pair", Work([10] * 40, resident, adapters=(None, "d1")))
    scheduler = Scheduler(batch_tokens=100)
    batches = []
    while rows := scheduler.next_batch([job]):
        batches.append({row.row // 40 for row in rows})
    assert batches == [{0}] * 4 + [{1}] * 4


def test_a_new_job_is_tokenised_before_the_next_thousand_of_a_large_one(resident: Resident) -> None:
    big, small = active("big", Work([], resident)), active("small", Work([], resident))
    big.last_served = big.received
    small.received = big.last_served + HEAD_START_SECONDS / 2  # it came while the large one had its turn
    assert next_to_tokenise([big, small]) is small
    # But one after the other of them does not keep the large one from its turn.
    small.received = big.last_served + 2 * HEAD_START_SECONDS
    assert next_to_tokenise([big, small]) is big
    small.last_served = big.last_served + 1
    assert next_to_tokenise([small, big]) is big
