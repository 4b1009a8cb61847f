"""Duty: what a rank does all day. Takes orders one by one and answers each; what a step computes is the runner's."""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from trireme.core.control import Answer, Fault, Found, Founded, Join, Joined, Parcel, Prepare, Prepared, open_message, pack_answer
from trireme.core.log import logger
from trireme.core.step import Step, array, peek_step
from trireme.parallel.comm import LinkLost, StoreHost
from trireme.parallel.link import form_link
from trireme.ranks.channel import BREAK, RankChannel
from trireme.ranks.launch import Brief
from trireme.ranks.mixtures import MapLost
from trireme.ranks.runner import Pending, Runner
from trireme.ranks.watchdog import Late, Watchdog, or_end

_LEAVE_S = 15.0  # for a device to be freed; groups have been seen to close within two


class DeviceLost(RuntimeError):
    """An error after which this process does nothing more: of the device, or since its weights are of expert maps that are gone."""


class Duty:
    """Answers orders. After a fault the epoch is over for this rank: it drops its groups, which frees ranks that wait for it,
    and keeps its weights for the next Join."""

    def __init__(self, brief: Brief, channel: RankChannel, runner: Runner):
        self._settings, self._stage, self._channel, self._runner = brief.settings, brief.stage, channel, runner
        self._store: StoreHost | None = None  # where this rank hosts the meeting of an epoch
        self._log = logger(f"stage_{brief.stage} rank {brief.rank}")
        self._epoch = -1
        self._over = "no epoch was joined"  # why no step is computed, or empty
        self._watchdog = Watchdog(brief.settings.step_timeout_s, self._tell_stuck)
        self._lost = ""  # what the device said when it was lost, or empty

    def do(self) -> None:
        """Until the channel says Left. DeviceLost where only a new process can go on."""
        # A step that its device is still computing is answered from a thread of its own, in the order of steps, so that the
        # next one is launched meanwhile. New expert maps are made ready in another. Without either there is no thread.
        with (
            ThreadPoolExecutor(max_workers=1, thread_name_prefix="answers") as answers,
            ThreadPoolExecutor(max_workers=1, thread_name_prefix="maps") as maps,
            self._watchdog,
            contextlib.closing(self),  # before the threads are waited for: one may wait for other ranks
        ):
            idle = time.perf_counter()
            while True:
                ticket, parcel = self._channel.receive()
                if self._lost:
                    raise DeviceLost(self._lost)
                if ticket == BREAK:
                    self._leave("its leader ended it")
                    continue
                message = open_message(parcel.packed)
                asked = peek_step(bytes(message)) if isinstance(message, memoryview) else message
                assert isinstance(asked, Step | Found | Join | Prepare), "a leader answers the rest itself"
                if isinstance(asked, Prepare):
                    maps.submit(self._prepare, ticket, asked)
                    continue
                try:
                    pending = self._carry_out(asked, parcel.rows, time.perf_counter() - idle)
                except Exception as error:  # also a device out of memory: the rank lives on, the epoch does not
                    fault = self._fault(asked, error)
                    self._leave(fault.message)
                    pending = _at_once(fault)
                if pending.late:
                    self._watchdog.watch(Late(ticket, asked, pending))
                    answers.submit(self._answer_late)
                else:
                    self._answer(ticket, asked, pending)
                idle = time.perf_counter()

    def close(self) -> None:
        self._leave("the rank left")

    def _answer(self, ticket: int, asked: Step | Found | Join, pending: Pending) -> None:
        """A fault that shows only here ends the epoch, too: the leader says so to all ranks of the stage, and to this one."""
        try:
            answer, rows = pending.finish()
        except Exception as error:
            answer, rows = self._fault(asked, error), None
        self._channel.answer(ticket, Parcel(pack_answer(answer), rows), fault=isinstance(answer, Fault))

    def _answer_late(self) -> None:
        """The oldest step that its device is computing."""
        late = self._watchdog.oldest
        self._answer(late.ticket, late.asked, late.pending)
        self._watchdog.passed()

    def _tell_stuck(self, late: Late) -> None:
        """As a fault, which ends the epoch: the leader's BREAK then closes the groups, and with them whatever the device waits for."""
        limit_s = self._settings.step_timeout_s
        lost = LinkLost(f"the device has not come past it for {limit_s:g} s: {late.pending.where()}")
        fault = self._fault(late.asked, lost)
        self._channel.answer(late.ticket, Parcel(pack_answer(fault)), fault=True)

    def _carry_out(self, asked: Step | Found | Join, rows: np.ndarray | None, waited_s: float) -> Pending:
        if isinstance(asked, Found):
            return _at_once(self._found(asked))
        if isinstance(asked, Join):
            return _at_once(self._join(asked))
        if stale := self._stale(asked.epoch):
            return _at_once(Fault("stale", f"not computed: {stale}", self._stage, asked.epoch, asked.number))
        return self._runner.run(asked, rows, waited_s)

    def _stale(self, epoch: int) -> str:
        """Why nothing is done in this epoch, or empty."""
        if epoch == self._epoch and not self._over:
            return ""
        return f"the rank's epoch is {self._epoch}{f', and is over: {self._over}' if self._over else ''}"

    def _prepare(self, ticket: int, asked: Prepare) -> None:
        """In the thread for maps. Whatever fails, steps go on."""
        try:
            if stale := self._stale(asked.epoch):
                raise LinkLost(stale)
            maps = {layer: array(packed) for layer, packed in asked.maps.items()}
            answer = Prepared(asked.epoch, asked.version, self._runner.prepare_maps(asked.version, maps))
        except Exception as error:
            why = f"expert maps of version {asked.version} are not ready: {type(error).__name__}: {error}"
            self._log.warning("%s", why)
            if isinstance(error, torch.AcceleratorError):
                self._lost = why
            answer = Fault("map", why, self._stage, asked.epoch)
        self._channel.answer(ticket, Parcel(pack_answer(answer)), fault=isinstance(answer, Fault))

    def _fault(self, asked: Step | Found | Join, error: Exception) -> Fault:
        kind, number = "link" if isinstance(error, LinkLost) else "rank", asked.number if isinstance(asked, Step) else -1
        why = f"{type(error).__name__}: {error}"
        self._log.warning("epoch %d ended at %s %d: %s", asked.epoch, type(asked).__name__, number, why, exc_info=kind == "rank")
        if isinstance(error, torch.AcceleratorError) or (isinstance(error, MapLost) and isinstance(asked, Join)):
            self._lost = why
        return Fault(kind, why, self._stage, asked.epoch, number)

    def _found(self, found: Found) -> Founded:
        self._store = StoreHost(self._settings.step_timeout_s)
        return Founded(found.epoch, self._store.address)

    def _join(self, join: Join) -> Joined:
        self._leave("another was joined")  # before anything else: another stage may be waiting in a group of the old epoch
        self._runner.settle_maps(join.map_version)
        self._runner.make_way()
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
        self._runner.begin(link, self._channel.waiting, self._channel.broken)
        sp_from = self._runner.find_sp_from(self._channel.waiting)
        self._epoch, self._over = join.epoch, ""
        return Joined(join.epoch, self._runner.map_version, sp_from)

    def _leave(self, why: str) -> None:
        """A device that nothing frees is not waited for: a new process is there sooner."""
        self._over = self._over or why
        with or_end(_LEAVE_S, lambda: self._log.error("this rank ends: its device was not freed within %g s of an epoch's end", _LEAVE_S)):
            self._runner.leave()


def _at_once(answer: Answer) -> Pending:
    return Pending(False, lambda: (answer, None))
