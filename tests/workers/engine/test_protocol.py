import pytest
from hypothesis import given
from hypothesis import strategies as st

from bathyscope_workers.engine.protocol import FrameDecoder, FrameError, RunJob, encode

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(st.lists(st.dictionaries(st.text(), VALUES, max_size=4), max_size=5), st.integers(1, 40))
def test_frames_however_they_are_cut(messages: list[dict[str, object]], size: int) -> None:
    data = b"".join(encode(message) for message in messages)
    decoder = FrameDecoder()
    found = [one for start in range(0, len(data), size) for one in decoder.feed(data[start : start + size])]
    assert found == messages


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\x00\x00\x00\x02[]", b"\x00\x00\x00\x02{x"])
def test_what_is_no_frame(data: bytes) -> None:
    with pytest.raises(FrameError):
        list(FrameDecoder().feed(data))


def test_a_frame_has_a_limit() -> None:
    with pytest.raises(FrameError):
        encode({"x": "a" * (64 * 2**20)})


def test_a_job_there_and_back() -> None:
    wire = {"id": "job_1", "kind": "prediction", "spec": {"layers": [1]}, "probe": {"w": [1]}, "alone": True}
    job = RunJob.from_wire(wire)
    assert job.solo
    assert job.extra == {"probe": {"w": [1]}}
    assert RunJob.from_wire(job.to_wire()) == job
