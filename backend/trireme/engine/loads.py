"""Loads: how many rows the experts of a stage were given lately, and records of them for a file. What follows from them is placing's
and the balancer's matter."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from trireme.core.control import Push
from trireme.core.refusal import Refusal

WINDOWS = (10, 100, 1000)  # pushes

Mode = Literal["stat", "per_pass"]

_MOST_RECORDS = 10_000  # pushes of a stage that a record holds one by one; later ones are left out, and counted


class LoadWindows:
    """The pushes of one stage: sums over the last 10, 100 and 1000, each kept up with two additions, and the last ones one by one.

    Memory is that of 1000 pushes, int32 [1000, layers, experts], whatever their number: 24 MiB for 48 layers of 128 experts.
    """

    def __init__(self, num_layers: int, num_experts: int):
        self._ring = np.zeros((WINDOWS[-1], num_layers, num_experts), np.int32)
        self._steps = np.zeros(WINDOWS[-1], np.int64)  # that each push sums up
        self._sums = {last: np.zeros((num_layers, num_experts), np.int64) for last in WINDOWS}
        self.num_pushes = 0

    def push(self, loads: np.ndarray, num_steps: int) -> None:
        """int32 [layers, experts]: rows since the push before, in so many steps."""
        for last, total in self._sums.items():
            if self.num_pushes >= last:
                total -= self._ring[(self.num_pushes - last) % len(self._ring)]
            total += loads
        at = self.num_pushes % len(self._ring)
        self._ring[at], self._steps[at] = loads, num_steps
        self.num_pushes += 1

    def total(self, last: int) -> np.ndarray:
        """int64 [layers, experts]: the sum of the last 10, 100 or 1000 pushes, or of as many as there were."""
        return self._sums[last].copy()

    def recent(self, last: int) -> np.ndarray:
        """int32 [pushes, layers, experts]: up to `last` pushes, the newest last."""
        return self._ring[self._rows(last)]

    def num_steps(self, last: int) -> int:
        """Steps that these pushes sum up."""
        return int(self._steps[self._rows(last)].sum())

    def _rows(self, last: int) -> np.ndarray:
        size = len(self._ring)
        return np.arange(self.num_pushes - min(last, self.num_pushes, size), self.num_pushes) % size


class Recorder:
    """Pushes between start and stop, of all stages: `stat` sums them up, `per_pass` keeps each."""

    def __init__(self) -> None:
        self.mode: Mode | None = None  # None: it does not record
        self._clear()

    def _clear(self) -> None:
        self._found: dict[int, list[tuple[Push, np.ndarray]]] = {}
        self._sums: dict[int, np.ndarray] = {}
        self.num_pushes = 0
        self.left_out = 0

    def start(self, mode: Mode = "stat") -> None:
        """Begins anew; what was recorded before and not dumped is gone."""
        if mode not in ("stat", "per_pass"):
            raise Refusal(f"cannot record {mode!r}", why="there is no such mode", fix='use "stat" (sums) or "per_pass" (each push)')
        self._clear()
        self.mode = mode

    def stop(self) -> None:
        self.mode = None

    def push(self, push: Push, loads: np.ndarray) -> None:
        """Takes note of a push and its loads [layers, experts], if it records."""
        if self.mode is None:
            return
        self.num_pushes += 1
        if self.mode == "stat":
            self._sums[push.stage] = self._sums.get(push.stage, 0) + loads.astype(np.int64)
        elif len(found := self._found.setdefault(push.stage, [])) < _MOST_RECORDS:
            found.append((push, loads))
        else:
            self.left_out += 1

    def dump(self) -> dict[str, np.ndarray]:
        """By name, for a file: `stage_K.loads`, int64 [layers, experts] of `stat`; of `per_pass` int32 [pushes, layers, experts] with
        int64 [pushes] `stage_K.number`, `.version` and `.num_steps`."""
        found: dict[str, np.ndarray] = {f"stage_{stage}.loads": total for stage, total in self._sums.items()}
        for stage, records in self._found.items():
            found[f"stage_{stage}.loads"] = np.stack([loads for _, loads in records])
            for name in ("number", "version", "num_steps"):
                found[f"stage_{stage}.{name}"] = np.array([getattr(push, name) for push, _ in records], np.int64)
        if not found:
            fix = "start recording, send requests, then dump"
            raise Refusal("no loads were recorded", why="no stage has pushed any since recording began", fix=fix)
        return found

    def query(self) -> dict[str, Any]:
        """As plain values."""
        return {"mode": self.mode, "num_pushes": self.num_pushes, "left_out": self.left_out}
