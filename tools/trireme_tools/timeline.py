"""Timeline: when each stage worked on each step, from a step trace. Numbers only; pictures are in plots."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from trireme.core.refusal import Refusal

_NEAR = 4  # steps after one that put maps of experts in force: still of the move


class Bar(NamedTuple):
    """One step in one stage, as engine/trace writes it. Seconds; `began` is time.time() of this host, then `receiving`, then `busy`."""

    stage: int
    number: int
    epoch: int
    rows: int
    began: float
    receiving: float
    busy: float
    stalled: float = 0.0  # of `busy`: until new expert maps were in force
    waiting: float = 0.0  # for the step to come, from the end of the one before

    @property
    def ended(self) -> float:
        return self.began + self.receiving + self.busy


def read_bars(lines: Iterable[str]) -> list[Bar]:
    """Bars of a `step_trace` file, by the time they began. Refusal where a line is not one of its lines."""
    bars = []
    for at, line in enumerate(lines, 1):
        try:
            bars.append(Bar(**{name: value for name, value in json.loads(line).items() if name in Bar._fields}))
        except (ValueError, TypeError, AttributeError) as error:
            raise Refusal(f"line {at} is no step of a trace", why=str(error), fix="give the file that step_trace names") from None
    if not bars:
        raise Refusal("the trace is empty", why="no step was computed", fix="send requests while step_trace is set")
    return sorted(bars, key=lambda bar: bar.began)


class Steps(NamedTuple):
    """One stage's decodes of all sequences, in order. Milliseconds [N]; a step takes from the end of the one before to its own, both
    as its rank tells them."""

    number: np.ndarray
    took: np.ndarray
    device: np.ndarray  # of that, from its first launch until its last kernel's end
    waiting: np.ndarray  # in which the device had nothing to do before it
    stalled: np.ndarray  # of `device`: until new maps were in force
    moving: list[tuple[int, int]]  # step numbers in which experts moved: from an offer until soon after its commit, or its fault

    @property
    def near(self) -> np.ndarray:
        """bool [N]: whether experts moved meanwhile."""
        return np.any([(first <= self.number) & (self.number <= last) for first, last in self.moving] or [self.number < 0], axis=0)


def steps_of(bars: Sequence[Bar], batch: int, history: Sequence[dict[str, Any]]) -> Steps:
    """Of one stage's steps those that decode `batch` sequences, as the step before does. `history`: that stage's events, as the
    service of experts' maps saves them."""
    bars = sorted(bars, key=lambda bar: (bar.epoch, bar.number))
    pairs = [(before, bar) for before, bar in pairwise(bars) if before.rows == bar.rows == batch]
    commits = np.array([bar.number for bar in bars if bar.stalled > 0], np.int64)
    moving = []
    for event in history:
        if "offered" not in event:
            continue
        # the service hears of a commit with the next push: it is the last one before that, unless all of it was dropped
        known = commits[(event["offered"] <= commits) & (commits <= event["step"])] if event["reason"] != "fault" else commits[:0]
        moving.append((event["offered"], int(known.max() if len(known) else event["step"]) + _NEAR))
    return Steps(
        number=np.array([bar.number for _, bar in pairs]),
        took=1e3 * np.array([bar.ended - before.ended for before, bar in pairs]),
        device=1e3 * np.array([bar.busy for _, bar in pairs]),
        waiting=1e3 * np.array([bar.waiting for _, bar in pairs]),
        stalled=1e3 * np.array([bar.stalled for _, bar in pairs]),
        moving=moving,
    )


def bubble_ratio(bars: Sequence[Bar]) -> dict[int, float]:
    """Share of each stage's time, from the first step to the last, in which it did not compute.

    >>> bubble_ratio([Bar(0, 0, 0, 1, 0.0, 0.0, 1.0), Bar(1, 0, 0, 1, 0.0, 1.0, 1.0)])
    {0: 0.5, 1: 0.5}
    """
    span = max(bar.ended for bar in bars) - min(bar.began for bar in bars)
    stages = sorted({bar.stage for bar in bars})
    return {stage: 1 - sum(bar.busy for bar in bars if bar.stage == stage) / span for stage in stages}


def chrome_trace(bars: Sequence[Bar]) -> dict[str, Any]:
    """The Chrome/Perfetto trace format: a process for each stage, microseconds."""
    zero = min(bar.began for bar in bars)
    stages = sorted({bar.stage for bar in bars})
    stages = sorted({bar.stage for bar in bars})
    names = [{"ph": "M", "name": "process_name", "pid": stage, "args": {"name": f"stage {stage}"}} for stage in stages]
    events: list[dict[str, Any]] = list(names)
    for bar in bars:
        common = {"ph": "X", "pid": bar.stage, "tid": 0, "args": {"step": bar.number, "epoch": bar.epoch, "rows": bar.rows}}
        at = (bar.began - zero) * 1e6
        if bar.receiving > 0:
            events.append({**common, "name": "receive", "ts": at, "dur": bar.receiving * 1e6})
        events.append({**common, "name": f"step {bar.number}", "ts": at + bar.receiving * 1e6, "dur": bar.busy * 1e6})
    return {"traceEvents": events, "displayTimeUnit": "ms"}
