"""Duty: what a rank does all day. Takes orders one by one and answers each; what a step computes is the runner's."""

from __future__ import annotations

import time

import numpy as np

from trireme.core.control import Answer, Fault, Found, Founded, Join, Joined, Parcel, open_message, pack_answer
from trireme.core.log import logger
from trireme.core.step import Step, peek_step
from trireme.parallel.comm import LinkLost, StoreHost
from trireme.parallel.link import form_link
from trireme.ranks.channel import BREAK, RankChannel
from trireme.ranks.launch import Brief
from trireme.ranks.runner import Runner


class Duty:
    """Answers orders. After a fault the epoch is over for this rank: it drops its groups, which frees ranks that wait for it,
    and keeps its weights for the next Join."""

    def __init__(self, brief: Brief, channel: RankChannel, runner: Runner):
        self._settings, self._stage, self._channel, self._runner = brief.settings, brief.stage, channel, runner
        self._store: StoreHost | None = None  # where this rank hosts the meeting of an epoch
        self._log = logger(f"stage_{brief.stage} rank {brief.rank}")
        self._epoch = -1
        self._over = "no epoch was joined"  # why no step is computed, or empty

    def do(self) -> None:
        idle = time.perf_counter()
        while True:
            ticket, parcel = self._channel.receive()
            if ticket == BREAK:
                self._leave("its leader ended it")
                continue
            answer, rows = self._carry_out(parcel, time.perf_counter() - idle)
            self._channel.answer(ticket, Parcel(pack_answer(answer), rows), fault=isinstance(answer, Fault))
            idle = time.perf_counter()

    def _carry_out(self, parcel: Parcel, waited_s: float) -> tuple[Answer, np.ndarray | None]:
        message = open_message(parcel.packed)
        asked = peek_step(bytes(message)) if isinstance(message, memoryview) else message
        assert isinstance(asked, Step | Found | Join), "a leader answers the rest itself"
        number = asked.number if isinstance(asked, Step) else -1
        try:
            if isinstance(asked, Found):
                return self._found(asked), None
            if isinstance(asked, Join):
                self._join(asked)
                return Joined(asked.epoch), None
            if self._over or asked.epoch != self._epoch:
                why = f"not computed: the rank's epoch is {self._epoch}{f', and is over: {self._over}' if self._over else ''}"
                return Fault("stale", why, self._stage, asked.epoch, number), None
            return self._runner.run(asked, parcel.rows, waited_s)
        except Exception as error:  # also a device out of memory: the rank lives on, the epoch does not
            kind = "link" if isinstance(error, LinkLost) else "rank"
            why = f"{type(error).__name__}: {error}"
            self._log.warning("epoch %d ended at %s %d: %s", asked.epoch, type(asked).__name__, number, why, exc_info=kind == "rank")
            self._leave(why)
            return Fault(kind, why, self._stage, asked.epoch, number), None

    def _found(self, found: Found) -> Founded:
        self._store = StoreHost(self._settings.step_timeout_s)
        return Founded(found.epoch, self._store.address)

    def _join(self, join: Join) -> None:
        self._leave("another was joined")  # before anything else: another stage may be waiting in a group of the old epoch
        link = form_link(
            self._settings,
            self._runner.collectives,
            self._stage,
            join.epoch,
            join.store,
            hidden=self._runner.hidden,
            dtype=self._runner.dtype,
            give_up=self._channel.waiting,  # the front says no more before all have joined, unless it gave up itself
        )
        self._runner.begin(link)
        self._epoch, self._over = join.epoch, ""

    def _leave(self, why: str) -> None:
        self._over = self._over or why
        self._runner.leave()
