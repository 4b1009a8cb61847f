"""StepTrace: one JSON line for each step and stage, read by `trireme trace`. Times are the ranks' own clocks."""

from __future__ import annotations

from pathlib import Path

import msgspec

from trireme.core.step import Outcome

_FLUSH_EVERY_S = 1.0


class StepTrace:
    """Lines {epoch, number, stage, began, waiting, receiving, busy, rows, samples, stalled}; seconds, `began` in time.time(), `stalled`
    by new expert maps."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("wb")
        self._encode = msgspec.json.Encoder().encode
        self._lines: list[bytes] = []
        self._flushed_at = 0.0

    def write(self, outcomes: list[Outcome], rows: int, samples: int, now: float) -> None:
        """Keep one step's lines; to the file about each second of `now`."""
        for outcome in outcomes:
            where = {"epoch": outcome.epoch, "number": outcome.number, "stage": outcome.stage}
            clock = msgspec.structs.asdict(outcome.clock)
            self._lines.append(self._encode({**where, **clock, "rows": rows, "samples": samples, "stalled": outcome.stalled_s}))
        if now - self._flushed_at >= _FLUSH_EVERY_S:
            self._flushed_at = now
            self.flush()

    def flush(self) -> None:
        if self._lines:
            self._file.write(b"\n".join(self._lines) + b"\n")
            self._file.flush()
            self._lines.clear()

    def close(self) -> None:
        self.flush()
        self._file.close()
