"""Loads: windows are the sums of what was pushed last, in memory that does not grow; records are what was pushed meanwhile."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from trireme.core.control import Push
from trireme.core.refusal import Refusal
from trireme.engine.loads import WINDOWS, LoadWindows, Recorder


def a_push(number: int, loads: np.ndarray, stage: int = 0, version: int = 0) -> Push:
    return Push(stage=stage, number=number, version=version, loads=loads.tobytes(), num_steps=10)


def test_windows_are_sums_of_the_last_pushes():
    rng = np.random.default_rng(0)
    pushed = rng.integers(0, 50, (2345, 2, 3)).astype(np.int32)
    windows = LoadWindows(2, 3)
    size = windows._ring.nbytes
    for number, loads in enumerate(pushed, 1):
        windows.push(loads, num_steps=number)
        if number in (1, 9, 10, 11, 100, 101, 999, 1000, 1001, 2345):
            for last in WINDOWS:
                assert (windows.total(last) == pushed[max(0, number - last) : number].sum(axis=0)).all()
                assert (windows.recent(last) == pushed[max(0, number - last) : number]).all()
                assert windows.num_steps(last).tolist() == [*range(max(1, number - last + 1), number + 1)]
    assert windows._ring.nbytes == size


def test_stat_sums_up():
    recorder = Recorder()
    loads = np.arange(6, dtype=np.int32).reshape(2, 3)
    recorder.push(a_push(0, loads), loads)  # not yet
    recorder.start("stat")
    for number in range(3):
        recorder.push(a_push(number, loads), loads)
    recorder.push(a_push(3, loads, stage=1), loads)
    recorder.stop()
    recorder.push(a_push(4, loads), loads)
    assert {name: values.tolist() for name, values in recorder.dump().items()} == {
        "stage_0.loads": (3 * loads).tolist(),
        "stage_1.loads": loads.tolist(),
    }
    assert recorder.query() == {"mode": None, "num_pushes": 4, "left_out": 0}


def test_per_pass_keeps_each(monkeypatch):
    monkeypatch.setattr("trireme.engine.loads._MOST_RECORDS", 2)
    recorder = Recorder()
    recorder.start("per_pass")
    for number in range(3):
        loads = np.full((1, 2), number, np.int32)
        recorder.push(a_push(10 * number, loads, version=number), loads)
    found = recorder.dump()
    assert found["stage_0.loads"].tolist() == [[[0, 0]], [[1, 1]]]
    assert (found["stage_0.number"].tolist(), found["stage_0.version"].tolist()) == ([0, 10], [0, 1])
    assert recorder.query() == {"mode": "per_pass", "num_pushes": 3, "left_out": 1}
    recorder.start("stat")
    with pytest.raises(Refusal, match="no loads were recorded"):
        recorder.dump()


def told(*numbers: int, width: int = 6) -> dict[str, bytes]:
    """Of a push: a row of each step, with experts that are its number."""
    rows = np.array([(0, number, 3, 2 * number) for number in numbers], np.int32)
    return {"rows": rows.tobytes(), "experts": np.repeat(np.array(numbers).astype(np.int16), width).tobytes()}


def test_per_token_keeps_the_experts_of_every_row():
    recorder, loads = Recorder(), np.ones((2, 4), np.int32)
    recorder.start("per_token")
    for numbers in ((1, 2), (), (3,)):
        push = msgspec.structs.replace(a_push(9, loads), **told(*numbers), left_out=len(numbers))
        recorder.push(push, loads, num_chosen=3)
    recorder.stop()
    assert recorder.query() == {"mode": None, "num_pushes": 3, "left_out": 0, "num_rows": 3, "rows_left_out": 3}
    found = recorder.dump()
    assert found["stage_0.rows"].tolist() == [[0, 1, 3, 2], [0, 2, 3, 4], [0, 3, 3, 6]]
    assert found["stage_0.experts"].tolist() == [[[number] * 3] * 2 for number in (1, 2, 3)]
    assert found["stage_0.loads"].shape == (3, 2, 4)
    recorder.forget()
    with pytest.raises(Refusal, match="no loads were recorded"):
        recorder.dump()
    recorder.start("per_token", 1)
    recorder.push(msgspec.structs.replace(a_push(9, loads), **told(*range(50_000))), loads, num_chosen=3)
    assert recorder.query()["num_rows"] == (1 << 20) // 28 and recorder.query()["rows_left_out"] == 50_000 - (1 << 20) // 28
    assert recorder.dump()["stage_0.rows"][-1, 1] == 49_999  # the newest stay


@pytest.mark.parametrize(
    ("asked", "why"),
    [(("per_week", None), "no such mode"), (("stat", 8), "its record is small"), (("per_token", 0), "memory of this process")],
)
def test_wrong_recordings_are_refused(asked, why):
    with pytest.raises(Refusal, match=why):
        Recorder().start(*asked)
