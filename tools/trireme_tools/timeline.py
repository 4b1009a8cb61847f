"""Timeline: when each stage worked on each step, from a step trace. Numbers only; pictures are in plots."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from trireme.core.refusal import Refusal


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
