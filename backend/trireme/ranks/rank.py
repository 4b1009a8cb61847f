"""Rank: one rank as its leader sees it. Its process, its sockets, its signs of life, and when to start it again."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import zmq

from trireme.core.control import Parcel, RankState
from trireme.core.refusal import Refusal
from trireme.core.settings import Settings
from trireme.ranks.channel import AnswerSocket, Beat, OrderSocket, socket_paths
from trireme.ranks.launch import Brief, Launcher, RankProcess

MUTE_S = 10.0  # a ready rank beats every half second; longer silence than this is death
_MOST_ATTEMPTS = 5  # deaths in a row before it was ready, after which it is not started again
_FIRST_DELAY_S, _MOST_DELAY_S = 0.5, 30.0  # before another attempt; a rank that was ready is started again at once


class Rank:
    """Guarded by its leader's lock; started and ended by its leader's thread."""

    def __init__(self, settings: Settings, stage: int, rank: int, run_dir: Path, launcher: Launcher, log: logging.Logger):
        self.name = f"stage_{stage} rank {rank}"
        self.num_pages = 0
        self.num_snapshots: int | None = None
        self.activation_bytes = 0
        self.life = 0
        self.expected: set[int] = set()  # tickets of orders not answered yet
        self._settings, self._stage, self._rank, self._run_dir = settings, stage, rank, run_dir
        self._launcher, self._log = launcher, log
        self._process: RankProcess | None = None
        self._orders: OrderSocket | None = None
        self._state, self._detail = "starting", "has not started"
        self._attempts = 0  # in a row that did not reach ready
        self._launch_at = 0.0
        self._launched = self._heard = self._progress = 0.0  # time.monotonic() of the launch, the last beat, the last answer

    @property
    def state(self) -> RankState:
        return RankState(self._rank, self._state, self._process.pid if self._process else 0, self._detail)

    @property
    def is_ready(self) -> bool:
        return self._state == "ready"

    @property
    def restarts(self) -> int:
        return max(0, self.life - 1)

    def launch_if_due(
        self, context: zmq.Context, answers: AnswerSocket, now: float, map_version: int = 0, maps: Mapping[int, np.ndarray] | None = None
    ) -> None:
        """`maps`: of the stage's experts, int32 [num_slots] by layer."""
        if self._process is not None or self._state == "failed" or now < self._launch_at:
            return
        self.life += 1
        self._state, self._detail = "starting", "is starting"
        self._launched = self._heard = now
        try:
            orders, ears = socket_paths(self._run_dir, self._stage, self._rank, self.life)
            self._run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)  # anew for each life: it may be gone, since it is empty meanwhile
            answers.listen(ears)
            self._orders = OrderSocket(context, orders, ears)
            brief = Brief(
                stage=self._stage,
                rank=self._rank,
                life=self.life,
                leader=os.getpid(),
                run_dir=str(self._run_dir),
                settings=self._settings,
                map_version=map_version,
                maps={layer: map.astype(np.int16).tobytes() for layer, map in (maps or {}).items()},
            )
            self._process = self._launcher.launch(brief)
        except Refusal as refusal:
            self._fail(str(refusal), answers)

    def hear(self, beat: Beat, answers: AnswerSocket, now: float) -> None:
        """A beat of this life."""
        if self._orders is None:
            return
        self._orders.hide()
        self._heard = now
        if beat.state != self._state:
            self._log.info("rank %d %s", self._rank, beat.detail or f"is {beat.state}")
        self._state, self._detail = beat.state, beat.detail
        self.num_pages, self.num_snapshots, self.activation_bytes = beat.num_pages, beat.num_snapshots, beat.activation_bytes
        if beat.state == "ready":
            self._attempts = 0
        elif beat.state == "failed":
            self._fail(beat.detail, answers)

    def order(self, ticket: int, parcel: Parcel, now: float) -> bool:
        """Whether the order went out."""
        if self._orders is None or not self._orders.send(ticket, parcel):
            return False
        if ticket:
            if not self.expected:
                self._progress = now
            self.expected.add(ticket)
        return True

    def answered(self, ticket: int, now: float) -> None:
        self.expected.discard(ticket)
        self._progress = now

    def excuse(self, now: float) -> None:
        """The leader itself slept: silence and lateness up to now say nothing about the rank."""
        self._heard = self._progress = now

    def find_death(self, now: float) -> str:
        """How the rank ended or must end, as a clause for a user; empty while it is well."""
        if self._process is None:
            return ""
        if (code := self._process.exit_code()) is not None:
            return f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        if not self.is_ready:
            limit_s = self._settings.start_timeout_s
            return f"was not ready within start_timeout_s={limit_s:g} s" if now - self._launched > limit_s else ""
        if now - self._heard > MUTE_S:
            return f"was mute for {MUTE_S:g} s"
        # one step_timeout_s for rows of other stages to come (the link gives up then), another to compute
        if self.expected and now - self._progress > 2 * self._settings.step_timeout_s:
            return f"did not answer within {2 * self._settings.step_timeout_s:g} s"
        return ""

    def bury(self, why: str, answers: AnswerSocket, now: float) -> None:
        """End this life, and plan the next unless it never gets anywhere."""
        was_ready = self.is_ready
        self.end(answers)
        self._state, self._detail = "dead", why
        if was_ready:
            self._launch_at = now
            return
        self._attempts += 1
        self._launch_at = now + min(_MOST_DELAY_S, _FIRST_DELAY_S * 2 ** (self._attempts - 1))
        if self._attempts >= _MOST_ATTEMPTS:
            self._fail(f"{why}, {self._attempts} times in a row before it was ready; its own words are in the log", answers)

    def end(self, answers: AnswerSocket) -> None:
        """Nothing of this life stays: process, sockets, files."""
        if self._process is not None:
            self._process.kill()
            self._process = None
        if self._orders is not None:
            self._orders.close()
            self._orders = None
            answers.forget(socket_paths(self._run_dir, self._stage, self._rank, self.life)[1])
        self.expected.clear()
        self._state, self._detail = "dead", "has ended"

    def _fail(self, sentence: str, answers: AnswerSocket) -> None:
        self.end(answers)
        self._state, self._detail = "failed", sentence
        self._log.error("rank %d failed: %s", self._rank, sentence)
