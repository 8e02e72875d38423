"""The cache of rows on the worker's disk: what is found in it, what goes, and what becomes of a damaged file."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from structlog.testing import capture_logs

from bathyscope_workers.extraction.cache import CacheOptions, RowCache

WIDTH = 256
MIB = 2**20


def block(key: bytes, layers: tuple[int, ...], vectors: int = 1) -> np.ndarray[Any, Any]:
    """What a row of that key is to have: bytes that its key and each layer decide."""
    return np.stack(
        [np.random.default_rng([*key, layer]).integers(0, 256, (vectors, WIDTH), dtype=np.uint8) for layer in layers],
        axis=1,
    )


def key(number: int) -> bytes:
    return number.to_bytes(20, "big")


class Kept:
    """A cache, and what is asked of it."""

    def __init__(self, folder: Path, *, max_bytes: int = 8 * MIB, free: int = 0) -> None:
        self.cache = RowCache(CacheOptions(folder, max_bytes, free))

    def put(self, numbers: list[int], layers: tuple[int, ...] = (1, 2), vectors: int = 1) -> int:
        self.cache.earn(10.0)
        keys = [key(one) for one in numbers]
        return self.cache.store(keys, layers, [block(one, layers, vectors) for one in keys])

    def has(self, numbers: list[int], layers: tuple[int, ...] = (1, 2), vectors: int = 1) -> list[int]:
        """Which rows are there; that they are what was put is looked at."""
        keys = [key(one) for one in numbers]
        targets = [np.zeros((vectors, len(layers), WIDTH), dtype=np.uint8) for _ in keys]
        found = self.cache.load(keys, layers, targets)
        for one, target, there in zip(keys, targets, found, strict=True):
            assert not there or np.array_equal(target, block(one, layers, vectors))
        return [number for number, there in zip(numbers, found, strict=True) if there]


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    made = Kept(tmp_path)
    yield made
    made.cache.close()


def test_rows_come_back_as_they_were(kept: Kept) -> None:
    assert kept.put([1, 2]) > 0
    assert kept.has([1, 2, 3]) == [1, 2]
    assert kept.has([1, 2], vectors=1) == [1, 2]


def test_a_row_serves_fewer_layers_and_takes_in_more_of_them(kept: Kept) -> None:
    kept.put([1], (8, 3, 5))
    assert kept.has([1], (3,)) == kept.has([1], (5, 8)) == kept.has([1], (3, 5, 8)) == [1]
    assert kept.has([1], (3, 4)) == []
    assert 0 < kept.put([1], (4, 3)) < kept.put([2], (4, 3)), "just the layer that it had not"
    assert kept.has([1], (8, 4, 3, 5)) == kept.has([1], (4,)) == [1]
    assert kept.put([1], (4, 8)) == 0


def test_rows_of_many_tokens(kept: Kept) -> None:
    kept.put([1], (0, 1, 2), vectors=40)
    assert kept.has([1], (2, 0), vectors=40) == [1]


def test_a_row_that_would_take_a_good_part_of_it_is_left_out(kept: Kept) -> None:
    assert kept.put([1], (1,), vectors=8 * MIB // 64 // WIDTH + 1) == 0
    assert kept.put([2], (1,), vectors=8 * MIB // 64 // WIDTH) > 0


def test_it_outlives_its_engine(tmp_path: Path) -> None:
    first = Kept(tmp_path)
    first.put([1])
    first.cache.close()
    second = Kept(tmp_path)
    assert second.has([1]) == [1]
    second.cache.close()


def test_those_used_longest_ago_go_first_and_it_never_grows_beyond_its_bound(tmp_path: Path) -> None:
    kept = Kept(tmp_path, max_bytes=2 * MIB)
    kept.put([0, 1], vectors=8)
    for number in range(10, 1500, 10):
        time.sleep(0.0015)
        assert kept.has([0], vectors=8) == [0], number
        kept.cache.tidy()
        kept.put(list(range(number, number + 10)), vectors=8)
    assert kept.has([1], vectors=8) == []
    assert kept.has(list(range(1490, 1500)), vectors=8) == list(range(1490, 1500))
    assert kept.cache.counts.evicted > 500
    assert kept.cache.used_bytes <= 2 * MIB
    kept.cache.close()
    assert (tmp_path / "0" / "data.mdb").stat().st_size <= 2 * MIB


def test_rows_of_many_sizes_do_not_fill_it_for_good(tmp_path: Path) -> None:
    kept = Kept(tmp_path, max_bytes=4 * MIB)
    sizes = random.Random(7)
    for number in range(1500):
        vectors = sizes.choice([1, 1, 3, 20, 100, 200])
        kept.put([number], (1,), vectors)
        if number % 100 == 99:
            kept.cache._file._resting_until = 0.0
            kept.put([10_000 + number, 20_000 + number], (1,), 5)
            assert kept.has([10_000 + number, 20_000 + number], (1,), 5), number
    kept.cache.close()


def test_one_that_is_larger_than_it_may_be_begins_anew(tmp_path: Path) -> None:
    first = Kept(tmp_path)
    first.put(list(range(1000)), vectors=8)
    first.cache.close()
    with capture_logs() as logs:
        second = Kept(tmp_path, max_bytes=MIB)
        assert second.has([1], vectors=8) == []
    assert [one["event"] for one in logs] == ["cache.dropped"]
    second.put([1])
    assert second.has([1]) == [1]
    second.cache.close()


def test_a_disk_without_room_is_no_error(tmp_path: Path) -> None:
    kept = Kept(tmp_path, free=2**60)
    assert kept.put(list(range(300))) == 0
    assert kept.has([1]) == []
    kept.cache.close()


def test_a_file_that_may_not_grow_is_no_error(tmp_path: Path) -> None:
    """The kernel refuses the write itself, as on a disk that is full."""
    code = textwrap.dedent(f"""
        import resource, signal, sys
        sys.path.insert(0, {str(Path(__file__).parents[3])!r})
        from pathlib import Path
        from tests.workers.extraction.test_cache import Kept
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        kept = Kept(Path({str(tmp_path)!r}))
        kept.put(list(range(100)))
        size = (Path({str(tmp_path)!r}) / "0" / "data.mdb").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        for start in range(1000, 3000, 100):
            kept.put(list(range(start, start + 100)))
        assert kept.has(list(range(100))) == list(range(100))
        kept.cache.close()
        print("whole")
    """)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert ended.stdout.endswith("whole\n"), (ended.returncode, ended.stdout[-2000:], ended.stderr[-2000:])


DAMAGE = [
    "cut",
    "emptied",
    "zeros in the middle",
    "noise in the middle",
    "noise everywhere",
    "another file",
    "one byte",
]


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_file_is_dropped_and_said_so(tmp_path: Path, how: str) -> None:
    first = Kept(tmp_path)
    first.put(list(range(300)))
    first.cache.close()
    path = tmp_path / "0" / "data.mdb"
    content = bytearray(path.read_bytes())
    noise = random.Random(how)
    match how:
        case "cut":
            del content[len(content) // 2 :]
        case "emptied":
            content.clear()
        case "zeros in the middle":
            content[8192:-8192] = bytes(len(content) - 16384)
        case "noise in the middle":
            content[8192:-8192] = noise.randbytes(len(content) - 16384)
        case "noise everywhere":
            content[:] = noise.randbytes(len(content))
        case "another file":
            content[:] = b"{}" * 5000
        case "one byte":
            place = content.index(block(key(7), (1, 2)).tobytes()[:64])
            content[place] ^= 1
    path.write_bytes(content)
    with capture_logs() as logs:
        second = Kept(tmp_path)
        found = second.has(list(range(300)))  # none of them other than it was
    assert how == "emptied" or "cache.dropped" in [one["event"] for one in logs]
    assert len(found) < 300
    second.put([1000])
    assert second.has([1000]) == [1000]
    second.cache.close()


def _alter(folder: Path, change: Callable[[dict[bytes, bytes]], None]) -> None:
    """Change records behind the cache's back, in a file that stays whole."""
    with lmdb.open(str(folder / "0"), max_dbs=3, map_size=8 * MIB) as env:
        rows = env.open_db(b"rows", create=False)
        with env.begin(db=rows, write=True) as txn:
            records = {bytes(name): bytes(value) for name, value in txn.cursor()}
            change(records)
            for name, value in records.items():
                txn.put(name, value)


def _alone(number: int) -> bytes:
    """The name of a row's first record."""
    return key(number) + b"\0"


RECORDS: dict[str, Callable[[dict[bytes, bytes]], None]] = (
    {
        "of another key": lambda records: records.update({_alone(1): records[_alone(2)]}),
        "cut": lambda records: records.update({_alone(1): records[_alone(1)][:-1]}),
        "cut within its header": lambda records: records.update({_alone(1): records[_alone(1)][:9]}),
        "cut within its layers": lambda records: records.update({_alone(1): records[_alone(1)][:19]}),
        "empty": lambda records: records.update({_alone(1): b""}),
        "longer": lambda records: records.update({_alone(1): records[_alone(1)] + b"\0"}),
        "with more layers than it has": lambda records: records.update(
            {_alone(1): records[_alone(1)][:4] + b"\xff\xff\xff\x7f" + records[_alone(1)][8:] + b"\0"}
        ),
    }
    | {
        f"with byte {place} flipped": lambda records, place=place: records.update(  # type: ignore[misc]
            {
                _alone(1): records[_alone(1)][:place]
                + bytes((records[_alone(1)][place] ^ 4,))
                + records[_alone(1)][place + 1 :]
            }
        )
        for place in (0, 4, 8, 12, 16, 18, 20, -1)
    }
)


@pytest.mark.parametrize("first_asked", ["read", "added to"])
@pytest.mark.parametrize("how", RECORDS)
def test_a_damaged_record_gives_no_row(tmp_path: Path, how: str, first_asked: str) -> None:
    first = Kept(tmp_path)
    first.put([1, 2])
    first.cache.close()
    _alter(tmp_path, RECORDS[how])
    second = Kept(tmp_path)
    if first_asked == "added to":
        second.put([1], (2, 3))
    for layers in ((1, 2), (1,), (2,)):
        second.has([1], layers)  # looks at what it finds
    second.put([1])
    assert second.has([1]) == [1]
    second.cache.close()


def _write_for_ever(folder: str, first: int, pipe: Any) -> None:
    kept = Kept(Path(folder), max_bytes=2 * MIB)
    kept.put([first])
    pipe.send("on")
    for number in range(first + 1, first + 10_000_000, 5):
        kept.put(list(range(number, number + 5)), vectors=number % 4 + 1)
        kept.has([number], vectors=number % 4 + 1)
        kept.cache.tidy()


def test_writers_that_are_killed_leave_it_whole(tmp_path: Path) -> None:
    """Two at a time, one of which lives on, over and over."""
    spawn = multiprocessing.get_context("spawn")
    moments = random.Random(11)

    def start(first: int) -> Any:
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=_write_for_ever, args=(str(tmp_path), first, theirs), daemon=True)
        process.start()
        return process, ours

    living, pipe = start(10**8)
    assert pipe.recv() == "on"
    for turn in range(3):
        writer, ours = start(turn * 10**9 + 10**9)
        assert ours.recv() == "on"
        time.sleep(moments.uniform(0.05, 0.3))
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join(30)
        assert living.is_alive()
    os.kill(living.pid, signal.SIGKILL)
    living.join(30)
    with capture_logs() as logs:
        last = Kept(tmp_path, max_bytes=2 * MIB)
        assert last.put([5]) > 0
        assert last.has([5]) == [5]
        assert last.cache.used_bytes > MIB // 2, "what they left is there"
    assert not [one for one in logs if one["event"] == "cache.dropped"]
    last.cache.close()


def test_engines_of_one_machine_share_it_and_strangers_have_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Kept(tmp_path)
    first.put([1])
    code = "from tests.workers.extraction.test_cache import *; kept = Kept(Path(sys.argv[1])); print(kept.has([1]))"
    root = str(Path(__file__).parents[3])
    said = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=root, capture_output=True, text=True, check=True
    )
    assert said.stdout == "[1]\n"
    monkeypatch.setattr("bathyscope_workers.extraction.cache_place._here", lambda: b"another container")
    stranger = Kept(tmp_path)
    assert stranger.has([1]) == []
    stranger.put([2])
    assert first.has([2]) == []
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["0", "1"]
    stranger.cache.close()
    first.cache.close()


def test_a_writer_that_was_stopped_holds_nobody_up(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    kept.put([1])
    code = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'rb+'); fcntl.flock(file, fcntl.LOCK_EX); "
        "print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "0" / "guard")], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert kept.put([2]) == 0
        assert kept.has([1, 2]) == [1]
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert kept.put([2]) > 0
    kept.cache.close()
