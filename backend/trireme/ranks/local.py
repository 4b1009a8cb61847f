"""LocalStages: all stages of a plan led from this process, without a server. The engine's `Stages` for `trireme generate` and tests."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from trireme.core.control import Offer, Parcel, Push
from trireme.core.log import logger
from trireme.core.settings import Settings
from trireme.ranks.courier import Courier
from trireme.ranks.launch import Launcher
from trireme.ranks.leader import Leader

_TICK_S = 0.05  # how late a TimeoutError may be


class LocalStages:
    """Leaders in this process. `run_dir`: a private folder for their sockets; it is made, and removed by `stop` if empty."""

    def __init__(
        self,
        settings: Settings,
        run_dir: Path,
        launcher: Launcher | None = None,
        *,
        service: Callable[[Push], Offer] | None = None,
        maps: Sequence[Mapping[int, np.ndarray]] | None = None,
    ):
        """`service` balances experts: it is asked by a thread of each stage, of all at once. `maps`: those of experts that each stage
        begins with, int32 [num_slots] by layer, where not trivial."""
        self.num_stages = settings.num_stages
        self._run_dir = run_dir
        self._leaders: list[Leader] = []
        self._couriers: list[Courier] = []
        for stage in range(settings.num_stages):
            begin = None if maps is None else maps[stage]
            if service is None:
                self._leaders.append(Leader(settings, stage, run_dir, launcher, maps=begin))
                continue
            courier = Courier(f"stage_{stage}", service)
            self._leaders.append(Leader(settings, stage, run_dir, launcher, maps=begin, push=courier.push))
            self._couriers.append(courier)
        self._waiting: dict[int, tuple[float, Callable[[Parcel | Exception], None]]] = {}  # deadline, done; by ticket
        self._tickets = itertools.count()
        self._stop = threading.Event()
        self._watch = threading.Thread(target=self._watch_deadlines, name="deadlines", daemon=True)

    def start(self) -> None:
        for courier, leader in zip(self._couriers, self._leaders, strict=False):
            courier.start(leader.prepare)
        for leader in self._leaders:
            leader.start()
        self._watch.start()

    def stop(self) -> None:
        """Every post has been answered when this returns, and nothing is left."""
        for leader in self._leaders:
            leader.stop()
        for courier in self._couriers:
            courier.stop()
        self._stop.set()
        if self._watch.is_alive():
            self._watch.join()
        if self._run_dir.is_dir() and not any(self._run_dir.iterdir()):
            self._run_dir.rmdir()

    def post(self, stage: int, parcel: Parcel, timeout_s: float, done: Callable[[Parcel | Exception], None]) -> None:
        """`done` gets the stage's answer, or TimeoutError after `timeout_s`; once, from any thread."""
        ticket = next(self._tickets)
        self._waiting[ticket] = (time.monotonic() + timeout_s, done)
        self._leaders[stage].post(parcel, lambda answer: self._answer(ticket, answer))

    def heal(self, stage: int, error: Exception) -> None:
        """A leader heals its ranks by itself, and is never gone while this process is there."""
        logger("stages").warning("stage_%d did not answer: %s", stage, error)

    def _answer(self, ticket: int, answer: Parcel | Exception) -> None:
        waiting = self._waiting.pop(ticket, None)  # atomic: whoever pops it answers
        if waiting:
            waiting[1](answer)

    def _watch_deadlines(self) -> None:
        while not self._stop.wait(_TICK_S):
            now = time.monotonic()
            for ticket, (deadline, _) in list(self._waiting.items()):
                if now > deadline:
                    self._answer(ticket, TimeoutError("the stage did not answer in time"))
