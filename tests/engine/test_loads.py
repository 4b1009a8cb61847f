"""Loads: windows are the sums of what was pushed last, in memory that does not grow; records are what was pushed meanwhile."""

from __future__ import annotations

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
                assert windows.num_steps(last) == sum(range(max(1, number - last + 1), number + 1))
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


def test_unknown_mode():
    with pytest.raises(Refusal, match="per_token"):
        Recorder().start("per_token")  # type: ignore[arg-type]
