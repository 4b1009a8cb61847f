"""Watchdog: finds out that a device is stuck in a step, and at what, or never lets go of an epoch. Who is told what then is duty's."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple, Self

from trireme.core.control import Found, Join
from trireme.core.step import Step
from trireme.ranks.runner import Pending

_GLANCE_S = 1.0  # between looks


class Late(NamedTuple):
    """An order that a device is still carrying out."""

    ticket: int
    asked: Step | Found | Join
    pending: Pending


class Watchdog:
    """Late orders in their turn. `stuck` is told of the oldest, once and in a thread of this class, when nothing was passed for
    `limit_s`: a device computes in order, so an order's time begins when the one before it is passed. Without late orders, as on
    a CPU, there is no thread."""

    def __init__(self, limit_s: float, stuck: Callable[[Late], None]):
        self._limit_s, self._stuck = limit_s, stuck
        self._late = deque[Late]()
        self._since = 0.0  # time.monotonic() since which the device is at the oldest
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def oldest(self) -> Late:
        return self._late[0]

    def watch(self, late: Late) -> None:
        """It was launched."""
        if self._thread.ident is None:
            self._thread.start()
        if not self._late:
            self._since = time.monotonic()
        self._late.append(late)

    def passed(self) -> None:
        """The oldest is answered."""
        self._since = time.monotonic()
        self._late.popleft()

    def _run(self) -> None:
        told = None
        while not self._end.wait(min(_GLANCE_S, self._limit_s / 4)):
            with contextlib.suppress(IndexError):  # it was passed meanwhile
                late = self._late[0]
                if late is not told and time.monotonic() - self._since > self._limit_s:
                    told = late
                    self._stuck(late)


@contextlib.contextmanager
def or_end(limit_s: float, tell: Callable[[], None]) -> Iterator[None]:
    """What is done in this context ends within `limit_s`, or else this process does, once `tell` has said so: no exception reaches a
    thread that is in a driver's call."""

    def end() -> None:
        tell()
        os._exit(1)

    timer = threading.Timer(limit_s, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
