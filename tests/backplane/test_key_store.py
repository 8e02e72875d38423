"""The key store: hashes, one round trip, rotation with an overlap, changes that do not undo each other."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Any

import pytest
from redis.asyncio import Redis

from bathyscope.errors import SetupError
from bathyscope_backplane import keys as module
from bathyscope_backplane.keys import ApiKey, KeyStore, Quota


@pytest.fixture
def namespace() -> str:
    return uuid.uuid4().hex


@pytest.fixture
def store(redis: Redis, namespace: str) -> KeyStore:
    return KeyStore(redis, namespace)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Seconds by which this process' clock is ahead, for expiries."""
    ahead = {"by": 0.0}
    real = time.time
    monkeypatch.setattr(module, "_now_ms", lambda: int((real() + ahead["by"]) * 1000))
    return ahead


async def test_a_key_is_found_by_its_secret_and_kept_as_a_hash(store: KeyStore, redis: Redis, namespace: str) -> None:
    assert await store.look_up(None) == (False, None)
    key, secret = await store.create("anna", ["user", "metrics"], quota=Quota(max_jobs=3))
    assert await store.look_up(secret) == (True, key)
    assert await store.get(key.id) == key
    assert key.quota == Quota(max_jobs=3)
    for wrong in (None, "", "bsk_wrong", secret[:-1], secret + "x", secret.upper(), key.id):
        assert await store.look_up(wrong) == (True, None)
    async for name in redis.scan_iter(f"*{namespace}*"):
        assert secret not in str(await redis.hgetall(name))
        assert secret[4:] not in str(await redis.hgetall(name))


async def test_a_look_up_is_one_round_trip(store: KeyStore, redis: Redis) -> None:
    _, secret = await store.create("anna")
    await store.look_up(secret)  # notes the day
    before = (await redis.info("commandstats")).get("cmdstat_evalsha", {"calls": 0})["calls"]
    total = (await redis.info("stats"))["total_commands_processed"]
    for _ in range(5):
        await store.look_up(secret)
    after = await redis.info("commandstats")
    assert after["cmdstat_evalsha"]["calls"] - before == 5
    # Five scripts, the commands within them, and the two questions of this test; nothing else.
    assert (await redis.info("stats"))["total_commands_processed"] - total <= 5 * 4 + 2


async def test_it_works_after_the_server_forgot_its_scripts(store: KeyStore, redis: Redis) -> None:
    key, secret = await store.create("anna")
    await redis.script_flush()
    assert (await store.look_up(secret))[1] == key
    await redis.script_flush()
    assert await store.revoke("anna") == key


async def test_a_lapsed_key_is_refused_and_still_closes_the_service(store: KeyStore, clock: dict[str, float]) -> None:
    key, secret = await store.create("anna", expires_ms=module._now_ms() + 60_000)
    assert (await store.look_up(secret))[1] == key
    clock["by"] = 61
    assert await store.look_up(secret) == (True, None)


async def test_rotation_overlaps_as_long_as_asked_and_no_longer(store: KeyStore, clock: dict[str, float]) -> None:
    key, first = await store.create("anna", quota=Quota(max_bytes=5))
    made = await store.rotate("anna", overlap_s=60)
    assert made is not None
    rotated, second = made
    assert (rotated.id, rotated.quota, rotated.created_ms) == (key.id, key.quota, key.created_ms)
    assert rotated.webhook_salt != key.webhook_salt
    assert rotated.hint == second[-4:]
    assert (await store.look_up(first))[1] == (await store.look_up(second))[1] == rotated
    # The next rotation does not prolong the first key's time.
    clock["by"] = 30
    again = await store.rotate(key.id, overlap_s=3600)
    assert again is not None
    third = again[1]
    assert (await store.look_up(first))[1] is not None
    clock["by"] = 61
    assert (await store.look_up(first))[1] is None
    assert (await store.look_up(second))[1] is not None
    # Without an overlap every former one ends at once.
    last = await store.rotate("anna")
    assert last is not None
    for former in (first, second, third):
        assert await store.look_up(former) == (True, None)
    assert (await store.look_up(last[1]))[1] == last[0]


async def test_what_lapsed_of_a_rotation_is_cleared_away(
    store: KeyStore, redis: Redis, namespace: str, clock: dict[str, float]
) -> None:
    await store.create("anna")
    await store.create("bert")
    await store.rotate("anna", overlap_s=10)
    clock["by"] = 11
    await store.rotate("bert")
    assert await redis.hlen(f"{{{namespace}}}:keyhashes") == 2


async def test_a_lapsed_key_is_rotated_only_with_a_new_time(store: KeyStore, clock: dict[str, float]) -> None:
    await store.create("anna", expires_ms=module._now_ms() + 1000)
    clock["by"] = 2
    with pytest.raises(SetupError, match="--expires-in"):
        await store.rotate("anna")
    made = await store.rotate("anna", expires_ms=module._now_ms() + 60_000)
    assert made is not None
    assert (await store.look_up(made[1]))[1] == made[0]


async def test_revoking_ends_every_secret_of_a_key(store: KeyStore, redis: Redis, namespace: str) -> None:
    key, first = await store.create("anna")
    made = await store.rotate("anna", overlap_s=3600)
    assert made is not None
    await store.look_up(made[1])
    assert await store.last_days() == {key.id: time.strftime("%Y-%m-%d", time.gmtime())}
    assert await store.revoke("anna") == made[0]
    assert await store.revoke("anna") is None
    for secret in (first, made[1]):
        assert await store.look_up(secret) == (False, None)
    assert [name async for name in redis.scan_iter(f"*{namespace}*")] == []


async def test_limits_change_one_by_one(store: KeyStore) -> None:
    await store.create("anna", quota=Quota(max_jobs=1))
    assert (await store.limit("anna", max_bytes=7)) is not None
    changed = await store.limit("anna", max_jobs=None, max_inputs_per_day=3)
    assert changed is not None
    assert changed.quota == Quota(None, 3, 7)
    assert await store.list() == [changed]
    assert await store.limit("bert", max_bytes=7) is None


async def test_changes_at_the_same_moment_do_not_undo_each_other(store: KeyStore) -> None:
    for turn in range(10):
        name = f"anna{turn}"
        _, secret = await store.create(name)
        done: list[Any] = await asyncio.gather(
            store.rotate(name, overlap_s=60), store.revoke(name), store.limit(name, max_jobs=1), return_exceptions=True
        )
        assert isinstance(done[1], ApiKey)
        for gone in (secret, *(made[1] for made in done[:1] if isinstance(made, tuple))):
            assert (await store.look_up(gone))[1] is None
    assert await store.list() == []


@pytest.mark.parametrize("name", ["", "x" * 101, "two\nlines", " edge", "key_01jd3v9yhhk5t2m0r8q4x7w6nz"])
async def test_names_are_names(store: KeyStore, name: str) -> None:
    with pytest.raises(SetupError):
        await store.create(name)


async def test_a_name_is_given_once(store: KeyStore) -> None:
    made = await asyncio.gather(*(store.create("anna") for _ in range(8)), return_exceptions=True)
    assert sum(isinstance(one, tuple) for one in made) == 1
    assert len(await store.list()) == 1
