"""Stopwatch: where a rank's time goes in one step. A GPU is asked by events in its stream, since the host only launches."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

from trireme.core.step import Clock


class Stopwatch:
    """Started when a step begins; `stop` when all of it is launched.

    A GPU waits for a step from the end of the one before it; a CPU for as long as its process says (`waited_s`).
    """

    def __init__(self, device: torch.device, waited_s: float, before: Stopwatch | None):
        self._on_gpu, self._waited_s, self._before = device.type != "cpu", waited_s, before
        self._marks: list[Any] = []  # torch.cuda.Event, or seconds of a host
        self._stall: list[Any] = []
        self._began = time.time()
        self._mark()

    @contextmanager
    def stalling(self) -> Iterator[None]:
        """Around what a step has to wait for before it is computed."""
        self._stall.append(self._now())
        yield
        self._stall.append(self._now())

    @contextmanager
    def receiving(self) -> Iterator[None]:
        """Around what comes from other stages."""
        self._mark()
        yield
        self._mark()

    def stop(self) -> None:
        self._mark()

    def phase(self) -> Literal["queued", "receiving", "computing", "done"]:
        """After `stop`: how far a GPU has come, which other threads may ask."""
        passed = sum(mark.query() for mark in self._marks)
        return ("queued", "queued", "receiving", "computing", "done")[passed]

    def wait(self) -> None:
        """Until the device has done everything up to `stop`."""
        if self._on_gpu:
            self._marks[-1].synchronize()

    def clock(self) -> Clock:
        """After `wait`."""
        first, asked, received, last = self._marks
        waited_s, self._before = self._waited_s if self._before is None else self._before.gap_s(self), None
        receiving_s = _seconds(asked, received)
        busy_s = _seconds(first, last) - receiving_s
        began = time.time() - receiving_s - busy_s if self._on_gpu else self._began
        return Clock(began, waited_s, receiving_s, busy_s)

    def stalled_s(self) -> float:
        """After `wait`."""
        return _seconds(*self._stall) if self._stall else 0.0

    def gap_s(self, after: Stopwatch) -> float:
        """Seconds in which nothing of this step or the next was under way."""
        return _seconds(self._marks[-1], after._marks[0]) if self._on_gpu else after._waited_s

    def _mark(self) -> None:
        self._marks.append(self._now())

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record()
        return event


def _seconds(one: Any, other: Any) -> float:
    return other - one if isinstance(one, float) else one.elapsed_time(other) / 1000
