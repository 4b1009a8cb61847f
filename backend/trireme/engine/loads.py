"""Loads: how many rows the experts of a stage were given lately, and records of them for a file. What follows from them is placing's
and the balancer's matter."""

from __future__ import annotations

from typing import Any, Literal, get_args

import msgspec
import numpy as np

from trireme.core.control import Push
from trireme.core.refusal import Refusal
from trireme.core.told import ToldRows

WINDOWS = (10, 100, 1000)  # pushes

Mode = Literal["stat", "per_pass", "per_token"]

_MOST_RECORDS = 10_000  # pushes of a stage that a record holds one by one; later ones are left out, and counted
_MOST_MIB = 16 << 10  # that may be asked for
MOST_MIB = 256  # of rows of a stage that a record holds one by one, if not told otherwise; older ones are left out, and counted


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

    def num_steps(self, last: int) -> np.ndarray:
        """Steps that each of these pushes sums up, int64 [pushes]."""
        return self._steps[self._rows(last)]

    def _rows(self, last: int) -> np.ndarray:
        size = len(self._ring)
        return np.arange(self.num_pushes - min(last, self.num_pushes, size), self.num_pushes) % size


class Recorder:
    """Pushes between start and stop, of all stages: `stat` sums them up, `per_pass` keeps each, and `per_token` keeps beside each the
    experts of every row that stages tell of."""

    def __init__(self) -> None:
        self.mode: Mode | None = None  # None: it does not record
        self._clear(MOST_MIB)

    def _clear(self, most_mib: int) -> None:
        self._most_bytes = most_mib << 20
        self._recorded: Mode | None = None  # what it has
        self._found: dict[int, list[tuple[Push, np.ndarray]]] = {}
        self._sums: dict[int, np.ndarray] = {}
        self._rows: dict[int, tuple[ToldRows, int]] = {}  # by stage, with the experts of a row in a layer
        self.num_pushes = 0
        self.left_out = 0

    def start(self, mode: Mode = "stat", most_mib: int | None = None) -> None:
        """Begins anew; what was recorded before and not dumped is gone. `most_mib`: of rows of a stage, per_token."""
        if mode not in get_args(Mode):
            fix = 'use "stat" (sums), "per_pass" (each push) or "per_token" (the experts of every row)'
            raise Refusal(f"cannot record {mode!r}", why="there is no such mode", fix=fix)
        if most_mib is not None and mode != "per_token":
            raise Refusal(f"{mode} has no limit of memory", why="its record is small", fix=f'ask "start {mode}"')
        if most_mib is not None and not 1 <= most_mib <= _MOST_MIB:
            why = "it is the memory of this process that rows of each stage may fill"
            raise Refusal(f"{most_mib} MiB of rows are refused", why=why, fix=f"give a number from 1 to {_MOST_MIB}")
        self._clear(most_mib or MOST_MIB)
        self.mode = self._recorded = mode

    def stop(self) -> None:
        """What was recorded waits for a dump."""
        self.mode = None

    def push(self, push: Push, loads: np.ndarray, num_chosen: int = 1) -> None:
        """Takes note of a push and its loads [layers, experts], if it records; a row has `num_chosen` experts in a layer."""
        if self.mode is None:
            return
        self.num_pushes += 1
        if self.mode == "per_token":
            told, _ = self._rows.setdefault(push.stage, (ToldRows(self._most_bytes), num_chosen))
            told.add(push.rows, push.experts, push.left_out)
            push = msgspec.structs.replace(push, rows=b"", experts=b"")  # which nobody reads again
        if self.mode == "stat":
            self._sums[push.stage] = self._sums.get(push.stage, 0) + loads.astype(np.int64)
        elif len(found := self._found.setdefault(push.stage, [])) < _MOST_RECORDS:
            found.append((push, loads))
        else:
            self.left_out += 1

    def dump(self) -> dict[str, np.ndarray]:
        """By name, for a file: `stage_K.loads`, int64 [layers, experts] of `stat`; of `per_pass` int32 [pushes, layers, experts] with
        int64 [pushes] `stage_K.number`, `.version` and `.num_steps`; of `per_token` that, and int32 [rows, columns] `stage_K.rows`
        with int16 [rows, layers, experts of a row] `stage_K.experts`, -1 where a layer told nothing."""
        found: dict[str, np.ndarray] = {f"stage_{stage}.loads": total for stage, total in self._sums.items()}
        for stage, records in self._found.items():
            found[f"stage_{stage}.loads"] = np.stack([loads for _, loads in records])
            for name in ("number", "version", "num_steps"):
                found[f"stage_{stage}.{name}"] = np.array([getattr(push, name) for push, _ in records], np.int64)
        for stage, (told, num_chosen) in self._rows.items():
            rows, experts = told.arrays()
            if len(rows):
                found[f"stage_{stage}.rows"], found[f"stage_{stage}.experts"] = rows, experts.reshape(len(rows), -1, num_chosen)
        if not found:
            fix = "start recording, send requests, then dump"
            raise Refusal("no loads were recorded", why="no stage has pushed any since recording began", fix=fix)
        return found

    def forget(self) -> None:
        """What was recorded, once it lies in a file and no more comes."""
        if self.mode is None:
            self._clear(MOST_MIB)

    def query(self) -> dict[str, Any]:
        """As plain values."""
        seen: dict[str, Any] = {"mode": self.mode, "num_pushes": self.num_pushes, "left_out": self.left_out}
        if self._recorded == "per_token":
            rows = {"num_rows": sum(told.num_rows for told, _ in self._rows.values())}
            seen |= rows | {"rows_left_out": sum(told.left_out for told, _ in self._rows.values())}
        return seen
